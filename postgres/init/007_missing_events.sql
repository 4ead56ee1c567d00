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
-- Idempotent: it runs on every `docker compose up`. As in 005, it looks into the catalog before
-- it makes the view, and a table of your own that has its name stays.

CREATE OR REPLACE FUNCTION has_sequence(event_id TEXT, device_id TEXT)
    RETURNS BOOLEAN
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    -- Without leading zeros, so that a number has one name; 18 digits always fit a BIGINT.
    RETURN starts_with(event_id, device_id || '-')
        AND substr(event_id, length(device_id) + 2)
            ~ '^[0-9a-f]{8}-[1-9][0-9]{0,17}-[1-9][0-9]{0,17}$';

COMMENT ON FUNCTION has_sequence(TEXT, TEXT) IS
    'Whether the id is <device_id>-<salt>-<boot>-<sequence>, as the device libraries name events.';

-- A gap has its place in time by the event behind it, the one that shows it: of a missing event
-- nobody knows when it would have come. So only the events of the period need to be read, and
-- the rest of a boot only if it has a gap.
--
-- A "run" is what counts on its own: `<device>-<salt>-<boot>`, the id without its last number.
CREATE OR REPLACE FUNCTION missing_events(device TEXT, since TIMESTAMPTZ, until TIMESTAMPTZ)
    RETURNS TABLE (device_id TEXT, boot BIGINT, first_sequence BIGINT, last_sequence BIGINT)
    LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    WITH arrived AS (
        SELECT events.event_id, events.ts_server,
            left(events.event_id, -1 - length(split_part(events.event_id, '-', -1))) AS run,
            split_part(events.event_id, '-', -1)::bigint AS sequence
        FROM events
        WHERE events.device_id = device
            AND events.ts_server >= since AND events.ts_server < until
            AND has_sequence(events.event_id, events.device_id)
    ),
    -- The events behind a gap: the one just before was never stored, in the period or outside.
    behind_gaps AS MATERIALIZED (
        SELECT event_id, ts_server, run
        FROM (
            SELECT event_id, ts_server, run, sequence,
                lag(sequence, 1, 0::bigint) OVER (PARTITION BY run ORDER BY sequence) AS previous
            FROM arrived
        ) AS ordered
        WHERE previous < sequence - 1
            AND NOT EXISTS (
                SELECT FROM events WHERE events.event_id = run || '-' || sequence - 1
            )
    ),
    stored AS (
        SELECT events.event_id,
            left(events.event_id, -1 - length(split_part(events.event_id, '-', -1))) AS run,
            split_part(events.event_id, '-', -1)::bigint AS sequence
        FROM events
        WHERE EXISTS (SELECT FROM behind_gaps)
            AND events.device_id = device
            AND has_sequence(events.event_id, events.device_id)
    ),
    gaps AS MATERIALIZED (
        SELECT run, int8range(previous + 1, sequence) AS sequences
        FROM (
            SELECT event_id, run, sequence,
                lag(sequence, 1, 0::bigint) OVER (PARTITION BY run ORDER BY sequence) AS previous
            FROM stored
            WHERE run IN (SELECT behind_gaps.run FROM behind_gaps)
        ) AS ordered
        JOIN behind_gaps USING (event_id, run)
        -- Where old rows are deleted (RETENTION_DAYS, of 1 at least), the beginning of a long
        -- boot is: nothing is said of it in the first hour that the table still has.
        WHERE previous > 0
            OR ts_server >= (SELECT min(ts_server) + INTERVAL '1 hour' FROM events)
            OR (SELECT min(ts_server) FROM events) >= now() - INTERVAL '1 day'
    ),
    -- Ids that were kept as dead letters. The bytes of a message that was kept whole need not
    -- be JSON, or text at all, so its ids are searched for.
    dead_ids AS (
        SELECT event_id FROM dead_letters WHERE event_id IS NOT NULL
        UNION ALL
        SELECT found[1]
        FROM dead_letters
        CROSS JOIN LATERAL regexp_matches(
            encode(payload, 'escape'), '"event_id"\s*:\s*"([^"\\]*)"', 'g'
        ) AS found
        WHERE event_id IS NULL AND position(convert_to(device || '-', 'UTF8') IN payload) > 0
    ),
    told AS (
        SELECT device || '-' || substr(event_id, length(device) + 2, 8) || '-' || (meta ->> 'boot')
                AS run,
            CASE WHEN meta ->> 'from' ~ '^[1-9][0-9]{0,17}$' AND meta ->> 'to' ~ '^[1-9][0-9]{0,17}$'
                THEN CASE WHEN (meta ->> 'from')::bigint <= (meta ->> 'to')::bigint
                    THEN int8range((meta ->> 'from')::bigint, (meta ->> 'to')::bigint, '[]')
                END
            END AS sequences
        FROM events
        WHERE EXISTS (SELECT FROM gaps)
            AND events.device_id = device AND event_type = 'outbox_dropped'
            AND has_sequence(event_id, device)
        UNION ALL
        SELECT left(event_id, -1 - length(split_part(event_id, '-', -1))),
            int8range(
                split_part(event_id, '-', -1)::bigint, split_part(event_id, '-', -1)::bigint, '[]'
            )
        FROM dead_ids
        WHERE EXISTS (SELECT FROM gaps) AND has_sequence(event_id, device)
    ),
    told_by_run AS (
        SELECT run, range_agg(sequences) AS sequences FROM told GROUP BY run
    )
    SELECT device, split_part(run, '-', -1)::bigint, lower(missing), upper(missing) - 1
    FROM gaps
    LEFT JOIN told_by_run USING (run)
    CROSS JOIN LATERAL unnest(
        int8multirange(gaps.sequences) - coalesce(told_by_run.sequences, int8multirange())
    ) AS missing;
END;

COMMENT ON FUNCTION missing_events(TEXT, TIMESTAMPTZ, TIMESTAMPTZ) IS
    'What missing_events has of one device, as far as the event behind the gap came in from `since` up to but without `until`; read by index.';

DO $$
BEGIN
    IF to_regclass('missing_events') IS NULL THEN
        CREATE VIEW missing_events AS
        SELECT missing.device_id, missing.boot, missing.first_sequence, missing.last_sequence
        FROM (
            -- Counted first, which needs no order: most have no gap. No id is there twice, so
            -- whoever has as many rows as its greatest number has them all.
            SELECT DISTINCT device_id
            FROM (
                SELECT device_id
                FROM events
                WHERE has_sequence(event_id, device_id)
                GROUP BY device_id, left(event_id, -1 - length(split_part(event_id, '-', -1)))
                HAVING count(*) < max(split_part(event_id, '-', -1)::bigint)
            ) AS runs
        ) AS incomplete
        CROSS JOIN LATERAL missing_events(incomplete.device_id, '-infinity', 'infinity') AS missing;

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

    IF (SELECT relkind FROM pg_class WHERE oid = to_regclass('missing_events')) <> 'v' THEN
        RAISE WARNING 'no view, because a table of yours has its name: missing_events';
    END IF;
END
$$;
