-- The schema of version 0.1.0, the first that was released: postgres/init/001 to 003 as they
-- were then, one behind the other. What test_upgrade.py upgrades from. Never changed.

-- The table of events: one row for each event that a device was told is stored.
--
-- Idempotent: it runs on every `docker compose up`. It creates what is missing and
-- changes nothing that is there, neither rows nor columns.

CREATE TABLE IF NOT EXISTS events (
    event_id   TEXT PRIMARY KEY,
    device_id  TEXT NOT NULL,
    schema     INT  NOT NULL,
    event_type TEXT NOT NULL,
    value_num  DOUBLE PRECISION,
    value_text TEXT,
    unit       TEXT,
    ts_device  TIMESTAMPTZ,
    ts_server  TIMESTAMPTZ DEFAULT NOW(),
    meta       JSONB DEFAULT '{}'
);

-- CREATE INDEX IF NOT EXISTS waits behind every open writer even when the index is
-- there, and makes later writers wait behind it. So the catalog is asked first.
DO $$
BEGIN
    IF to_regclass('idx_events_ts_device') IS NULL THEN
        CREATE INDEX idx_events_ts_device ON events (ts_device);
    END IF;
    IF to_regclass('idx_events_type_ts') IS NULL THEN
        CREATE INDEX idx_events_type_ts ON events (event_type, ts_device);
    END IF;
    IF to_regclass('idx_events_device_ts') IS NULL THEN
        CREATE INDEX idx_events_device_ts ON events (device_id, ts_device);
    END IF;
    -- For "what came in last": ORDER BY ts_server DESC LIMIT 10.
    IF to_regclass('idx_events_ts_server') IS NULL THEN
        CREATE INDEX idx_events_ts_server ON events (ts_server);
    END IF;
END
$$;

COMMENT ON TABLE events IS
    'One row for each stored event. A device hears "stored" only after its row is committed.';
COMMENT ON COLUMN events.event_id IS
    'The device''s own name for the event, unique over all devices and all time; sending it again makes no second row.';
COMMENT ON COLUMN events.device_id IS 'The device, as in the topic qs/v1/{device_id}/events.';
COMMENT ON COLUMN events.schema IS 'Version of the event contract; 1.';
COMMENT ON COLUMN events.event_type IS 'What was measured or happened: temperature, button_press, ...';
COMMENT ON COLUMN events.value_num IS 'The value if it was a JSON number; otherwise NULL.';
COMMENT ON COLUMN events.value_text IS 'The value if it was a JSON string; otherwise NULL.';
COMMENT ON COLUMN events.unit IS 'Unit of the value, as the device wrote it; NULL if it wrote none.';
COMMENT ON COLUMN events.ts_device IS
    'When it happened by the device''s clock, which may be wrong; NULL if the device has none.';
COMMENT ON COLUMN events.ts_server IS 'When the row was inserted, by the database''s clock.';
COMMENT ON COLUMN events.meta IS 'Whatever else the device sent in "meta"; {} if nothing.';

-- The table of dead letters: what devices sent and could not be stored, whole, so that
-- a person can look at it and replay it. A topic that nobody listens to keeps nothing.
--
-- Idempotent: it runs on every `docker compose up`.

CREATE TABLE IF NOT EXISTS dead_letters (
    id          BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at TIMESTAMPTZ NOT NULL,
    reason      TEXT NOT NULL,
    error       TEXT NOT NULL,
    topic       TEXT NOT NULL,
    device_id   TEXT,
    event_id    TEXT,
    payload     BYTEA NOT NULL
);

DO $$
BEGIN
    IF to_regclass('idx_dead_letters_received_at') IS NULL THEN
        CREATE INDEX idx_dead_letters_received_at ON dead_letters (received_at);
    END IF;
END
$$;

COMMENT ON TABLE dead_letters IS
    'One row for each event or payload that could not be stored, committed before the broker was told that it was taken.';
COMMENT ON COLUMN dead_letters.id IS 'The id that the published dead letter carries.';
COMMENT ON COLUMN dead_letters.received_at IS 'When the ingester received it, by the ingester''s clock.';
COMMENT ON COLUMN dead_letters.reason IS 'Stable code of the reason; the README lists them.';
COMMENT ON COLUMN dead_letters.error IS 'The reason in words: which field, what was expected.';
COMMENT ON COLUMN dead_letters.topic IS 'The topic that it was published on.';
COMMENT ON COLUMN dead_letters.device_id IS 'The device, as the topic names it; NULL if it names none.';
COMMENT ON COLUMN dead_letters.event_id IS 'The event_id, if there was a valid one; otherwise NULL.';
COMMENT ON COLUMN dead_letters.payload IS
    'The bytes as received; for one bad event of an array, that event''s own JSON.';

-- Two roles with fewer rights than the owner: `ingester`, which may do what the daemon does
-- and no more, and `reader`, for dashboards. Neither can log in until somebody gives it
-- LOGIN and a password, as overlays/secure does.
--
-- Idempotent: it runs on every `docker compose up`.

DO $$
DECLARE
    role TEXT;
BEGIN
    FOREACH role IN ARRAY ARRAY['ingester', 'reader'] LOOP
        BEGIN
            IF to_regrole(role) IS NULL THEN
                EXECUTE format('CREATE ROLE %I NOLOGIN', role);
            END IF;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            -- Roles belong to the whole server: the schema step of another database on it
            -- has just made this one.
            NULL;
        END;
    END LOOP;
END
$$;

-- PUBLIC has it in databases that were made before PostgreSQL 15.
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO ingester, reader;

GRANT SELECT ON events, dead_letters TO reader;
-- And what is added later, by whoever runs these files.
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO reader;

-- It reads events to tell a duplicate from a conflict, and no dead letter but the id of the
-- one that it has just written.
GRANT SELECT, INSERT ON events TO ingester;
GRANT SELECT (id), INSERT ON dead_letters TO ingester;
