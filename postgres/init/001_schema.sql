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
