-- What never arrived: gaps in the sequences of devices that number their events. It holds no
-- data; all of it comes from `events` and `dead_letters`.
--
-- The device libraries name an event `<device>-<salt>-<boot>-<sequence>`: each boot of a device
-- counts from 1. A sequence that is not there, although a later one of the same boot is, is
-- missing, unless the device told that it dropped it (an event `outbox_dropped`) or it was kept
-- as a dead letter. What lies behind the newest of a boot may still be on its way. Ids of any
-- other form are left alone.
--
-- Whatever a device sends, these queries do not fail: a number is taken for one only once it is
-- known to fit.
--
-- Below, a "run" is what counts on its own: `<device>-<salt>-<boot>-`, an id without its last
-- number.
--
-- Idempotent: it runs on every `docker compose up`. As in 005, it looks into the catalog before
-- it makes a view, and a table of your own that has its name stays.

CREATE OR REPLACE FUNCTION has_sequence(event_id TEXT, device_id TEXT)
    RETURNS BOOLEAN
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- Without leading zeros, so that a number has one name, and short enough that each number
    -- fits a BIGINT: of both together 19 digits. Counted outside of the pattern, which takes five
    -- times as long with it. CASE, since the planner takes a bare pattern for one that next to
    -- nothing matches, and then compares each row with each.
    RETURN CASE
        WHEN starts_with(event_id, device_id || '-') AND length(event_id) - length(device_id) <= 30
        THEN substr(event_id, length(device_id) + 2) ~ '^[0-9a-f]{8}-[1-9][0-9]*-[1-9][0-9]*$'
        ELSE FALSE
    END;

COMMENT ON FUNCTION has_sequence(TEXT, TEXT) IS
    'Whether the id is <device_id>-<salt>-<boot>-<sequence>, as the device libraries name events.';

DO $$
BEGIN
    IF to_regclass('accounted_events') IS NULL THEN
        CREATE VIEW accounted_events AS
        SELECT device_id,
            -- What was dropped can be of an earlier boot, or of an earlier store with its own salt.
            device_id || '-'
                || coalesce(meta ->> 'salt', substr(event_id, length(device_id) + 2, 8)) || '-'
                || (meta ->> 'boot') || '-' AS run,
            CASE
                WHEN meta ->> 'from' ~ '^[1-9][0-9]{0,17}$' AND meta ->> 'to' ~ '^[1-9][0-9]{0,17}$'
                THEN CASE
                    WHEN (meta ->> 'from')::bigint <= (meta ->> 'to')::bigint
                    THEN int8range((meta ->> 'from')::bigint, (meta ->> 'to')::bigint, '[]')
                END
            END AS sequences
        FROM events
        WHERE event_type = 'outbox_dropped' AND has_sequence(event_id, device_id)
        UNION ALL
        SELECT device_id,
            rtrim(event_id, '0123456789'),
            int8range(
                split_part(event_id, '-', -1)::bigint, split_part(event_id, '-', -1)::bigint, '[]'
            )
        FROM (
            SELECT event_id,
                substring(event_id FROM '^(.+)-[0-9a-f]{8}-[0-9]+-[0-9]+$') AS device_id
            FROM (
                SELECT event_id FROM dead_letters WHERE event_id IS NOT NULL
                UNION ALL
                -- The bytes of a message that was kept whole need not be JSON, or text at all,
                -- so its ids are searched for.
                SELECT found[1]
                FROM dead_letters
                CROSS JOIN LATERAL regexp_matches(
                    encode(payload, 'escape'), '"event_id"\s*:\s*"([^"\\]*)"', 'g'
                ) AS found
                WHERE event_id IS NULL AND position('"event_id"'::bytea IN payload) > 0
            ) AS letters
        ) AS dead
        WHERE has_sequence(event_id, device_id);

        COMMENT ON VIEW accounted_events IS
            'Numbers of events that are no rows and yet not missing: the device told that it dropped them, or they were kept as dead letters. missing_events leaves them out.';
        COMMENT ON COLUMN accounted_events.device_id IS 'The device.';
        COMMENT ON COLUMN accounted_events.run IS 'Their ids without the last number.';
        COMMENT ON COLUMN accounted_events.sequences IS
            'The numbers themselves; NULL if what the device told makes no sense.';
    END IF;
END
$$;

-- A gap has its place in time by the event behind it, the one that shows it: of a missing event
-- nobody knows when it would have come. So the events of the period are read, and beside them
-- only the few numbers that are not among these are looked up.
CREATE OR REPLACE FUNCTION missing_events(device TEXT, since TIMESTAMPTZ, until TIMESTAMPTZ)
    RETURNS TABLE (device_id TEXT, boot BIGINT, first_sequence BIGINT, last_sequence BIGINT)
    LANGUAGE sql STABLE
    -- What it takes to compile the branch that reads all of a device is seconds, and it is
    -- rarely taken.
    SET jit = off
BEGIN ATOMIC
    WITH behind_gaps AS MATERIALIZED (
        SELECT run, sequence, previous, ts_server
        FROM (
            SELECT run, sequence, ts_server,
                lag(sequence, 1, 0::bigint) OVER (PARTITION BY run ORDER BY sequence) AS previous
            FROM (
                SELECT rtrim(event_id, '0123456789') AS run,
                    split_part(event_id, '-', -1)::bigint AS sequence, ts_server
                FROM events
                WHERE events.device_id = device AND ts_server >= since AND ts_server < until
                    AND has_sequence(event_id, events.device_id)
            ) AS arrived
        ) AS ordered
        WHERE previous < sequence - 1
            -- Not EXISTS, here and below: each number is to be looked up by its index, whatever
            -- the planner thinks of how many there are.
            AND (
                SELECT TRUE FROM events WHERE event_id = run || (sequence - 1)
            ) IS NULL
    ),
    numbers AS MATERIALIZED (
        SELECT coalesce(sum(sequence - 2 - previous), 0) <= 100000 AS are_few FROM behind_gaps
    ),
    gaps AS MATERIALIZED (
        -- What came in before the period or after it may stand in between.
        SELECT run, sequence, ts_server,
            coalesce(
                (
                    SELECT max(number)
                    FROM generate_series(previous + 1, sequence - 2) AS number
                    WHERE (SELECT TRUE FROM events WHERE event_id = run || number)
                ),
                previous
            ) AS previous
        FROM behind_gaps
        WHERE (SELECT are_few FROM numbers)
        UNION ALL
        -- Too many to look up: all of the device is read instead.
        SELECT run, sequence, ts_server, previous
        FROM (
            SELECT run, sequence, ts_server,
                lag(sequence, 1, 0::bigint) OVER (PARTITION BY run ORDER BY sequence) AS previous
            FROM (
                SELECT rtrim(event_id, '0123456789') AS run,
                    split_part(event_id, '-', -1)::bigint AS sequence, ts_server
                FROM events
                WHERE NOT (SELECT are_few FROM numbers)
                    AND events.device_id = device AND has_sequence(event_id, events.device_id)
            ) AS stored
        ) AS ordered
        WHERE previous < sequence - 1 AND ts_server >= since AND ts_server < until
    )
    SELECT device, split_part(run, '-', -2)::bigint, lower(missing), upper(missing) - 1
    FROM (
        SELECT run,
            unnest(
                range_agg(sequences) FILTER (WHERE is_gap)
                - coalesce(range_agg(sequences) FILTER (WHERE NOT is_gap), int8multirange())
            ) AS missing
        FROM (
            SELECT run, TRUE AS is_gap, int8range(previous + 1, sequence) AS sequences
            FROM gaps
            -- Where old rows are deleted (RETENTION_DAYS, of 1 at least), so is the beginning of
            -- a long boot: of it nothing is said in the first hour that the table still has.
            WHERE previous > 0
                OR ts_server >= (SELECT min(ts_server) + INTERVAL '1 hour' FROM events)
                OR (SELECT min(ts_server) FROM events) >= now() - INTERVAL '1 day'
            UNION ALL
            SELECT run, FALSE, sequences
            FROM accounted_events
            WHERE EXISTS (SELECT FROM gaps) AND accounted_events.device_id = device
        ) AS gaps_and_accounted
        GROUP BY run
    ) AS of_runs;
END;

COMMENT ON FUNCTION missing_events(TEXT, TIMESTAMPTZ, TIMESTAMPTZ) IS
    'What missing_events has of one device, as far as the event behind the gap came in from `since` up to but without `until`; read by index.';

DO $$
BEGIN
    IF to_regclass('missing_events') IS NULL THEN
        CREATE VIEW missing_events AS
        WITH incomplete AS MATERIALIZED (
            -- Counted first, which needs no order: most have no gap. No id is there twice, so
            -- whoever has as many rows as its greatest number has them all.
            SELECT rtrim(event_id, '0123456789') AS run
            FROM events
            WHERE has_sequence(event_id, device_id)
            GROUP BY 1
            HAVING count(*) < max(split_part(event_id, '-', -1)::bigint)
        ),
        gaps AS MATERIALIZED (
            SELECT device_id, run, int8range(previous + 1, sequence) AS sequences
            FROM (
                SELECT device_id, run, sequence, ts_server,
                    lag(sequence, 1, 0::bigint) OVER (PARTITION BY run ORDER BY sequence)
                        AS previous
                FROM (
                    SELECT device_id, run, split_part(event_id, '-', -1)::bigint AS sequence,
                        ts_server
                    FROM (
                        SELECT device_id, event_id, rtrim(event_id, '0123456789') AS run, ts_server
                        FROM events
                        WHERE EXISTS (SELECT FROM incomplete)
                            AND rtrim(event_id, '0123456789') IN (SELECT run FROM incomplete)
                        OFFSET 0  -- so that has_sequence(), the dear part, is asked of these alone
                    ) AS of_incomplete
                    WHERE has_sequence(event_id, device_id)
                ) AS stored
            ) AS ordered
            WHERE previous < sequence - 1
                -- As in the function.
                AND (
                    previous > 0
                    OR ts_server >= (SELECT min(ts_server) + INTERVAL '1 hour' FROM events)
                    OR (SELECT min(ts_server) FROM events) >= now() - INTERVAL '1 day'
                )
        )
        SELECT device_id, split_part(run, '-', -2)::bigint AS boot,
            lower(missing) AS first_sequence, upper(missing) - 1 AS last_sequence
        FROM (
            SELECT device_id, run,
                unnest(
                    range_agg(sequences) FILTER (WHERE is_gap)
                    - coalesce(range_agg(sequences) FILTER (WHERE NOT is_gap), int8multirange())
                ) AS missing
            FROM (
                SELECT device_id, run, TRUE AS is_gap, sequences FROM gaps
                UNION ALL
                SELECT device_id, run, FALSE, sequences
                FROM accounted_events
                WHERE EXISTS (SELECT FROM gaps)
            ) AS gaps_and_accounted
            GROUP BY device_id, run
        ) AS of_runs;

        COMMENT ON VIEW missing_events IS
            'Events that never arrived, although a later one of the same boot did: one row for each gap in the numbers that end the ids of the device libraries. Without what was told as dropped or kept as a dead letter. It reads all of events; for one device ask the function missing_events(device, since, until).';
        COMMENT ON COLUMN missing_events.device_id IS 'The device.';
        COMMENT ON COLUMN missing_events.boot IS
            'Which of its boots: the number before the last in the ids.';
        COMMENT ON COLUMN missing_events.first_sequence IS
            'The first number of the gap, as at the end of the ids.';
        COMMENT ON COLUMN missing_events.last_sequence IS
            'The last number of the gap; the event behind it is there.';
    END IF;
END
$$;

DO $$
DECLARE
    name TEXT;
BEGIN
    SELECT string_agg(relname, ', ' ORDER BY relname) INTO name
    FROM pg_class
    WHERE oid = ANY (ARRAY[to_regclass('accounted_events'), to_regclass('missing_events')]::oid[])
        AND relkind <> 'v';
    IF name IS NOT NULL THEN
        RAISE WARNING 'no view, because a table of yours has its name: %', name;
    END IF;
END
$$;
