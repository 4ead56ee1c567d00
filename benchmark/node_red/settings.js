// Node-RED without its editor: it listens on no port, sends nothing home and installs nothing.
// The flow finds here what it needs of PostgreSQL: insert().

const net = require("net");
const { Pool } = require("pg");

// The one thing that is not as it comes. mqtt.js cannot be told to set TCP_NODELAY; without
// it an ACK close behind a PUBACK waits 40 ms for the broker's TCP ACK.
const { createConnection } = net;
net.createConnection = (...options) => createConnection(...options).setNoDelay(true);

const pool = new Pool({
    host: process.env.POSTGRES_HOST,
    port: Number(process.env.POSTGRES_PORT),
    database: process.env.POSTGRES_DB,
    user: process.env.POSTGRES_USER,
    password: process.env.POSTGRES_PASSWORD,
    max: 10,
});
// Without a listener, an idle connection that breaks would end Node-RED.
pool.on("error", (error) => console.error(`PostgreSQL: ${error.message}`));

const INSERT = {
    name: "insert-event", // named, so that each connection parses it once
    text: `INSERT INTO events
        (event_id, device_id, schema, event_type, value_num, value_text, unit, ts_device, meta)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        ON CONFLICT (event_id) DO NOTHING`,
};

function insert(event) {
    const { value } = event;
    const values = [
        event.event_id,
        event.device_id,
        event.schema,
        event.event_type,
        typeof value === "number" ? value : null,
        typeof value === "string" ? value : null,
        event.unit,
        event.ts_device,
        JSON.stringify(event.meta ?? {}),
    ];
    return pool.query({ ...INSERT, values });
}

module.exports = {
    flowFile: "flows.json",
    functionGlobalContext: { insert },
    // With both of them false, it opens no port at all.
    httpAdminRoot: false,
    httpNodeRoot: false,
    uiHost: "127.0.0.1",
    telemetry: { enabled: false, updateNotification: false },
    externalModules: {
        autoInstall: false,
        palette: { allowInstall: false, allowUpload: false },
        modules: { allowInstall: false },
    },
    credentialSecret: false,
    logging: { console: { level: "warn", metrics: false, audit: false } },
};
