-- The schema of version 0.4.0: postgres/init/001 to 006 as they were then, one behind the other.
-- What test_upgrade.py upgrades from. Never changed.

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
    'One row for each different event or payload that could not be stored, committed before the broker was told that it was taken.';
COMMENT ON COLUMN dead_letters.id IS 'The id that the published dead letter carries.';
COMMENT ON COLUMN dead_letters.received_at IS
    'When the ingester first received it, by the ingester''s clock.';
COMMENT ON COLUMN dead_letters.reason IS 'Stable code of the reason; the README lists them.';
COMMENT ON COLUMN dead_letters.error IS
    'The reason in words, as it was the last time: which field, what was expected.';
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

-- It reads events to tell a duplicate from a conflict, and deletes them when they are older
-- than RETENTION_DAYS. Of a dead letter, here, no more than the id of the one that it has just
-- written; the rest stands in 004.
GRANT SELECT, INSERT, DELETE ON events TO ingester;
GRANT SELECT (id), INSERT ON dead_letters TO ingester;
-- What became of the replays of dead letters, by `python -m ingester.deadletters`, and the
-- rights that it takes.
--
-- Idempotent: it runs on every `docker compose up`.

-- ALTER TABLE waits behind every open writer even when the columns are there. So the catalog
-- is asked first.
DO $$
BEGIN
    IF (SELECT count(*) FROM pg_attribute WHERE attrelid = 'dead_letters'::regclass
        AND attname IN ('replayed_at', 'replay_outcome')) < 2 THEN
        ALTER TABLE dead_letters
            ADD COLUMN IF NOT EXISTS replayed_at TIMESTAMPTZ,
            ADD COLUMN IF NOT EXISTS replay_outcome TEXT;
    END IF;
END
$$;

COMMENT ON COLUMN dead_letters.replayed_at IS
    'When it was last replayed, by the database''s clock; NULL if it has not been since it last came.';
COMMENT ON COLUMN dead_letters.replay_outcome IS
    '"stored" if all that it holds are rows of events since; otherwise the reason code of the first that was refused again.';

-- The same role as the daemon's: the tool runs in its container. It may not change what was
-- received.
GRANT SELECT, DELETE ON dead_letters TO ingester;
GRANT UPDATE (replayed_at, replay_outcome) ON dead_letters TO ingester;
-- Views for people: what each device said last, when it was heard, its readings by the hour,
-- how long events take, and who is silent. They hold no data; all of it comes from `events`.
--
-- Two clocks. Whatever asks what came last, or whether a device is alive, goes by ts_server,
-- the only clock that we trust: a device whose clock is in the future must not hide its later
-- values. What asks when something happened goes by event_time(): the device's clock where it
-- can be right.
--
-- Idempotent: it runs on every `docker compose up`. It makes what is missing, and looks into
-- the catalog first: CREATE OR REPLACE VIEW would wait behind a dashboard's long query on the
-- view, and every later query on it behind that. So a table or view of your own that has one
-- of these names stays as well. A release that changes a view drops it and makes it anew, in
-- this same transaction, if the catalog shows the earlier one.

-- The functions. Replacing one with itself waits for nobody.

CREATE OR REPLACE FUNCTION event_time(ts_device TIMESTAMPTZ, ts_server TIMESTAMPTZ)
    RETURNS TIMESTAMPTZ
    LANGUAGE sql STABLE PARALLEL SAFE
    -- A clock that was never set begins in 1970, 1980 or 2000; one that is ahead of the
    -- server's tells of what has not happened yet. Behind it may be by any time: the event
    -- may have waited in the device.
    RETURN CASE
        WHEN ts_device >= TIMESTAMPTZ '2001-01-01 00:00:00+00'
            AND ts_device <= ts_server + INTERVAL '1 hour'
        THEN ts_device
        ELSE ts_server
    END;

COMMENT ON FUNCTION event_time(TIMESTAMPTZ, TIMESTAMPTZ) IS
    'When an event happened: ts_device, unless it is NULL, before 2001 or over an hour ahead of ts_server; then ts_server.';

-- The views that stand on others come behind them.

DO $$
BEGIN
    IF to_regclass('event_types_heard') IS NULL THEN
        -- A loose index scan: one step for each device and type, and not one for each row.
        -- It goes backwards, because then the first row of each is its last.
        CREATE VIEW event_types_heard AS
        WITH RECURSIVE heard AS (
            (
                SELECT device_id, event_type, ts_server
                FROM events
                ORDER BY device_id DESC, event_type DESC, ts_server DESC
                LIMIT 1
            )
            UNION ALL
            SELECT following.device_id, following.event_type, following.ts_server
            FROM heard
            CROSS JOIN LATERAL (
                SELECT device_id, event_type, ts_server
                FROM events
                WHERE (events.device_id, events.event_type) < (heard.device_id, heard.event_type)
                ORDER BY device_id DESC, event_type DESC, ts_server DESC
                LIMIT 1
            ) AS following
        )
        SELECT device_id, event_type, ts_server AS last_seen_at FROM heard;

        COMMENT ON VIEW event_types_heard IS
            'Each device and type of event that there is, and when the last one came in.';
        COMMENT ON COLUMN event_types_heard.device_id IS 'The device.';
        COMMENT ON COLUMN event_types_heard.event_type IS 'A type of event that it has sent.';
        COMMENT ON COLUMN event_types_heard.last_seen_at IS
            'When the last event of this type came in, by the database''s clock.';
    END IF;
END
$$;

DO $$
BEGIN
    IF to_regclass('latest_values') IS NULL THEN
        CREATE VIEW latest_values AS
        SELECT last.device_id, last.event_type, last.value_num, last.value_text, last.unit,
            last.ts_device, last.ts_server, last.event_id, last.meta
        FROM event_types_heard AS heard
        CROSS JOIN LATERAL (
            SELECT *
            FROM events
            WHERE events.device_id = heard.device_id
                AND events.event_type = heard.event_type
                AND events.ts_server = heard.last_seen_at
            -- Events of one batch have the same ts_server. Without a clock in the device, the
            -- longer id has the higher number.
            ORDER BY ts_device DESC NULLS LAST, length(event_id) DESC, event_id DESC
            LIMIT 1
        ) AS last;

        COMMENT ON VIEW latest_values IS
            'The event of each device and type that came in last, by the database''s clock.';
        COMMENT ON COLUMN latest_values.device_id IS 'The device.';
        COMMENT ON COLUMN latest_values.event_type IS 'What was measured or happened.';
        COMMENT ON COLUMN latest_values.value_num IS 'The value if it was a number.';
        COMMENT ON COLUMN latest_values.value_text IS 'The value if it was a string.';
        COMMENT ON COLUMN latest_values.unit IS 'Unit of the value.';
        COMMENT ON COLUMN latest_values.ts_device IS
            'When it happened by the device''s clock, which may be wrong.';
        COMMENT ON COLUMN latest_values.ts_server IS 'When it came in.';
        COMMENT ON COLUMN latest_values.event_id IS 'Its id in events.';
        COMMENT ON COLUMN latest_values.meta IS 'What else the device sent.';
    END IF;
END
$$;

DO $$
BEGIN
    IF to_regclass('devices') IS NULL THEN
        CREATE VIEW devices AS
        SELECT seen.device_id, seen.last_seen_at, coalesce(day.events, 0) AS events_24h,
            day.clock_drift
        FROM (
            SELECT device_id, max(last_seen_at) AS last_seen_at
            FROM event_types_heard
            GROUP BY device_id
        ) AS seen
        LEFT JOIN (
            SELECT device_id, count(*) AS events,
                percentile_disc(0.5) WITHIN GROUP (ORDER BY ts_server - ts_device) AS clock_drift
            FROM events
            WHERE ts_server > now() - INTERVAL '24 hours'
            GROUP BY device_id
        ) AS day USING (device_id);

        COMMENT ON VIEW devices IS 'Each device that has ever sent an event.';
        COMMENT ON COLUMN devices.device_id IS 'The device.';
        COMMENT ON COLUMN devices.last_seen_at IS
            'When its last event came in, by the database''s clock.';
        COMMENT ON COLUMN devices.events_24h IS 'How many came in during the last 24 hours.';
        COMMENT ON COLUMN devices.clock_drift IS
            'How far its clock is behind (negative: ahead): the median of ts_server - ts_device of those; NULL if none had a ts_device.';
    END IF;
END
$$;

DO $$
BEGIN
    IF to_regclass('hourly_values') IS NULL THEN
        CREATE VIEW hourly_values AS
        SELECT device_id, event_type, unit,
            date_trunc('hour', event_time(ts_device, ts_server)) AS hour,
            count(*) AS readings,
            min(value_num) AS min,
            -- avg() fails with "value out of range" as soon as a square overflows, for 1e200
            -- say, and one silly reading must not take the others away.
            avg(value_num) FILTER (WHERE abs(value_num) < 1e100) AS mean,
            max(value_num) AS max
        FROM events
        WHERE value_num IS NOT NULL
        GROUP BY device_id, event_type, unit, date_trunc('hour', event_time(ts_device, ts_server));

        COMMENT ON VIEW hourly_values IS
            'Numbers by the hour, for each device, type and unit. Ask for one device; for a period of one that sends a lot, hourly() reads that period alone.';
        COMMENT ON COLUMN hourly_values.device_id IS 'The device.';
        COMMENT ON COLUMN hourly_values.event_type IS 'What was measured.';
        COMMENT ON COLUMN hourly_values.unit IS
            'Unit of the values; readings of different units are not mixed.';
        COMMENT ON COLUMN hourly_values.hour IS
            'When the hour begins in which they happened, as event_time() says.';
        COMMENT ON COLUMN hourly_values.readings IS 'How many numbers there were.';
        COMMENT ON COLUMN hourly_values.min IS 'The least.';
        COMMENT ON COLUMN hourly_values.mean IS
            'Their mean, without those of 1e100 or more in either direction.';
        COMMENT ON COLUMN hourly_values.max IS 'The greatest.';
    END IF;
END
$$;

DO $$
BEGIN
    IF to_regclass('ingest_latency') IS NULL THEN
        CREATE VIEW ingest_latency AS
        SELECT hour, count(*) AS events,
            percentile_disc(0.5) WITHIN GROUP (ORDER BY latency) AS p50,
            percentile_disc(0.95) WITHIN GROUP (ORDER BY latency) AS p95,
            percentile_disc(0.99) WITHIN GROUP (ORDER BY latency) AS p99,
            max(latency) AS max
        FROM (
            SELECT date_trunc('hour', ts_server) AS hour,
                -- The two times come from two clocks. What the quickest event of a device took
                -- is how far they are apart.
                ts_server - ts_device
                    - min(ts_server - ts_device) OVER (PARTITION BY device_id) AS latency
            FROM events
            WHERE ts_server > now() - INTERVAL '24 hours'
                AND ts_device = event_time(ts_device, ts_server)
        ) AS day
        GROUP BY hour;

        COMMENT ON VIEW ingest_latency IS
            'How much longer events took from ts_device to ts_server than the quickest one of the same device, for each of the last 24 hours. A clock that is wrong by the same all day does not count; one that was set meanwhile does.';
        COMMENT ON COLUMN ingest_latency.hour IS 'When the hour begins in which they came in.';
        COMMENT ON COLUMN ingest_latency.events IS
            'How many came in with a ts_device that can be right.';
        COMMENT ON COLUMN ingest_latency.p50 IS 'Half of them took no longer.';
        COMMENT ON COLUMN ingest_latency.p95 IS '95 % of them took no longer.';
        COMMENT ON COLUMN ingest_latency.p99 IS '99 % of them took no longer.';
        COMMENT ON COLUMN ingest_latency.max IS 'The slowest.';
    END IF;
END
$$;

DO $$
BEGIN
    -- 0.2.0 looked at the last 20 events, and of devices that were just heard as well.
    IF to_regclass('silent_devices') IS NULL
        OR pg_get_viewdef(to_regclass('silent_devices')) LIKE '%LIMIT 20%'
    THEN
        CREATE OR REPLACE VIEW silent_devices AS
        SELECT device_id, last_seen_at, now() - last_seen_at AS silent_for, usual_pause
        FROM (
            SELECT heard.device_id, max(heard.last_seen_at) AS last_seen_at,
                min(pauses.median) AS usual_pause
            FROM (
                SELECT device_id, event_type, last_seen_at,
                    max(last_seen_at) OVER (PARTITION BY device_id) AS device_last_seen_at
                FROM event_types_heard
            ) AS heard
            CROSS JOIN LATERAL (
                SELECT percentile_disc(0.5) WITHIN GROUP (ORDER BY pause) AS median
                FROM (
                    SELECT lag(ts_server) OVER (ORDER BY ts_server DESC) - ts_server AS pause
                    FROM (
                        SELECT ts_server
                        FROM events
                        WHERE events.device_id = heard.device_id
                            AND events.event_type = heard.event_type
                        ORDER BY ts_server DESC
                        LIMIT 10
                    ) AS last_events
                ) AS between_them
                WHERE pause > INTERVAL '0'  -- else they came in one batch
            ) AS pauses
            -- The others cannot be silent, and are most: their pauses need not be looked at.
            WHERE heard.device_last_seen_at < now() - INTERVAL '10 minutes'
            GROUP BY heard.device_id
        ) AS device
        WHERE last_seen_at < now() - coalesce(3 * usual_pause, INTERVAL '24 hours');

        COMMENT ON VIEW silent_devices IS
            'The devices not heard for three times their usual pause, and for 10 minutes at least; those heard of only once, for 24 hours.';
        COMMENT ON COLUMN silent_devices.device_id IS 'The device.';
        COMMENT ON COLUMN silent_devices.last_seen_at IS
            'When its last event came in, by the database''s clock.';
        COMMENT ON COLUMN silent_devices.silent_for IS 'How long ago that is.';
        COMMENT ON COLUMN silent_devices.usual_pause IS
            'The median pause between its last 10 events of one type, of the type that it sends most often; NULL if there was only one delivery.';
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION hourly(device TEXT, since TIMESTAMPTZ, until TIMESTAMPTZ)
    RETURNS TABLE (
        event_type TEXT, unit TEXT, hour TIMESTAMPTZ,
        readings BIGINT, min DOUBLE PRECISION, mean DOUBLE PRECISION, max DOUBLE PRECISION
    )
    LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT events.event_type, events.unit,
        date_trunc('hour', event_time(ts_device, ts_server)),
        count(*),
        min(value_num),
        avg(value_num) FILTER (WHERE abs(value_num) < 1e100),
        max(value_num)
    FROM events
    WHERE device_id = device
        AND value_num IS NOT NULL
        -- event_time() is one of the two, so this takes nothing away; an index knows each.
        AND (ts_device >= since AND ts_device < until OR ts_server >= since AND ts_server < until)
        AND event_time(ts_device, ts_server) >= since
        AND event_time(ts_device, ts_server) < until
    GROUP BY 1, 2, 3;
END;

COMMENT ON FUNCTION hourly(TEXT, TIMESTAMPTZ, TIMESTAMPTZ) IS
    'What hourly_values has of one device, from `since` up to but without `until`, read by index.';

DO $$
DECLARE
    name TEXT;
BEGIN
    SELECT string_agg(relname, ', ' ORDER BY relname) INTO name
    FROM pg_class
    WHERE oid = ANY (ARRAY[
            to_regclass('event_types_heard'), to_regclass('latest_values'),
            to_regclass('devices'), to_regclass('hourly_values'),
            to_regclass('ingest_latency'), to_regclass('silent_devices')
        ]::oid[])
        AND relkind <> 'v';
    IF name IS NOT NULL THEN
        RAISE WARNING 'no view, because a table of yours has its name: %', name;
    END IF;
END
$$;

-- For the views above; without it they take a minute with 10 million rows. Measured with these,
-- in batches of 500: 46 MB per million rows; 28 us of the server's CPU time for each row where
-- it was 20, 1.3 kB of WAL where it was 0.9; 21,000 rows/s where it was 30,000, which is still
-- more than twice what the ingester brings. It is made in 12 to 25 s.
--
-- Last of all, because meanwhile nobody can write: the ingester tries again until it is there,
-- and the broker keeps the events. CONCURRENTLY would not stop writers, but cannot run in the
-- transaction of the schema step, and leaves an invalid index behind when it fails.
DO $$
BEGIN
    IF to_regclass('idx_events_device_type_server') IS NULL THEN
        CREATE INDEX idx_events_device_type_server ON events (device_id, event_type, ts_server);
    END IF;
END
$$;
-- The same payload on the same topic, refused for the same reason, is one row of dead_letters
-- that counts how often it came and when it came last: a device that sends garbage for a year
-- does not fill the disk. Rows of earlier releases are merged in place.
--
-- Idempotent: it runs on every `docker compose up`, and waits for nobody once all rows have
-- their digest. While it merges, dead letters can not be written; the ingester tries again
-- until they can, and the broker keeps the events.

-- Their defaults are what the INSERT of an earlier release needs, which names none of them and
-- may run once more while the schema is already this one. Nobody loses anything then: such a
-- row has no digest yet, and the next run merges it.
DO $$
BEGIN
    IF (SELECT count(*) FROM pg_attribute WHERE attrelid = 'dead_letters'::regclass
        AND attname IN ('times', 'last_received_at', 'digest')) < 3 THEN
        ALTER TABLE dead_letters
            ADD COLUMN IF NOT EXISTS times BIGINT NOT NULL DEFAULT 1,
            ADD COLUMN IF NOT EXISTS last_received_at TIMESTAMPTZ NOT NULL DEFAULT now(),
            ADD COLUMN IF NOT EXISTS digest BYTEA;
    END IF;
END
$$;

-- In one statement, since the digest is unique: a row that has one already stays, otherwise the
-- oldest does, and the others are deleted. What can differ among them is taken from the one that
-- came last. Every step sorts or joins on the disk if it has to: there may be millions.
DO $$
BEGIN
    IF EXISTS (SELECT FROM dead_letters WHERE digest IS NULL) THEN
        -- Who adds the same digest meanwhile would make this fail.
        LOCK TABLE dead_letters IN SHARE ROW EXCLUSIVE MODE;
        WITH undigested AS MATERIALIZED (
            SELECT id, times, received_at, error, event_id, replayed_at, replay_outcome,
                -- Neither a reason nor a topic can hold the NUL that ends it here. The daemon
                -- computes the same, in store.py.
                sha256(
                    convert_to(reason, 'UTF8') || decode('00', 'hex')
                    || convert_to(topic, 'UTF8') || decode('00', 'hex') || payload
                ) AS digest
            FROM dead_letters
            WHERE digest IS NULL
        ),
        equals AS (
            SELECT id, times, received_at, error, event_id, replayed_at, replay_outcome, digest,
                received_at AS last_received_at, NULL::bigint AS known_id
            FROM undigested
            UNION ALL
            SELECT id, times, received_at, error, event_id, replayed_at, replay_outcome, digest,
                last_received_at, id
            FROM dead_letters
            WHERE digest IN (SELECT digest FROM undigested)
        ),
        ranked AS MATERIALIZED (
            SELECT id, error, event_id, replayed_at, replay_outcome, digest,
                coalesce(min(known_id) OVER same, min(id) OVER same) AS kept_id,
                sum(times) OVER same AS times,
                min(received_at) OVER same AS received_at,
                max(last_received_at) OVER same AS last_received_at,
                row_number() OVER (
                    PARTITION BY digest ORDER BY last_received_at DESC, id DESC
                ) AS place
            FROM equals
            WINDOW same AS (PARTITION BY digest)
        ),
        merged AS (
            DELETE FROM dead_letters USING ranked
            WHERE dead_letters.id = ranked.id AND ranked.id <> ranked.kept_id
        )
        UPDATE dead_letters
        SET times = ranked.times, received_at = ranked.received_at,
            last_received_at = ranked.last_received_at, digest = ranked.digest,
            error = ranked.error, event_id = ranked.event_id,
            replayed_at = ranked.replayed_at, replay_outcome = ranked.replay_outcome
        FROM ranked
        WHERE dead_letters.id = ranked.kept_id AND ranked.place = 1;
    END IF;
END
$$;

DO $$
BEGIN
    IF to_regclass('idx_dead_letters_digest') IS NULL THEN
        CREATE UNIQUE INDEX idx_dead_letters_digest ON dead_letters (digest);
    END IF;
    -- For the list and the retention.
    IF to_regclass('idx_dead_letters_last_received_at') IS NULL THEN
        CREATE INDEX idx_dead_letters_last_received_at ON dead_letters (last_received_at);
    END IF;
END
$$;

COMMENT ON COLUMN dead_letters.times IS
    'How often the same payload came on the same topic and was refused for the same reason. At least once: what the broker delivers again after a lost connection counts again.';
COMMENT ON COLUMN dead_letters.last_received_at IS
    'When it last came, by the ingester''s clock. Retention and purge go by it.';
COMMENT ON COLUMN dead_letters.digest IS
    'SHA-256 of reason, NUL, topic, NUL, payload; the same is the same row. NULL if an earlier version wrote the row; the next start of the stack merges it.';

-- A letter that comes again changes no more than this. SELECT is granted in 004.
GRANT UPDATE (times, last_received_at, error) ON dead_letters TO ingester;
