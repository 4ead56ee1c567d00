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
COMMENT ON COLUMN dead_letters.reason IS 'Stable code of the reason; docs/contract.md lists them.';
COMMENT ON COLUMN dead_letters.error IS
    'The reason in words, as it was the last time: which field, what was expected.';
COMMENT ON COLUMN dead_letters.topic IS 'The topic that it was published on.';
COMMENT ON COLUMN dead_letters.device_id IS 'The device, as the topic names it; NULL if it names none.';
COMMENT ON COLUMN dead_letters.event_id IS 'The event_id, if there was a valid one; otherwise NULL.';
COMMENT ON COLUMN dead_letters.payload IS
    'The bytes as received; for one bad event of an array, that event''s own JSON.';
