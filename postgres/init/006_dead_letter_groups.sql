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
