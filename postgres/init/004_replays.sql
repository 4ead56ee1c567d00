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
