"""Whether events get stored: the newest row, how many a minute, how long it took, what is missing.

What it does: asks the views. What it does not: know HTTP or HTML, or tell whether the ingester
runs: an ingester without events looks the same.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from page.database import Database, Row
from page.text import visible

RATE_HOURS = 6
MISSING_DAYS = 7
MISSING_MAX = 200


def newest(database: Database) -> datetime | None:
    """Return when the newest row was stored; None if there is none. Raises Unavailable."""
    rows = database.rows("SELECT ts_server FROM events ORDER BY ts_server DESC LIMIT 1")
    return rows[0]["ts_server"] if rows else None


def silent(database: Database) -> Sequence[Row]:
    """Return the `id` of each silent device and its `last_seen_at`. Raises Unavailable."""
    return database.rows(
        "SELECT device_id AS id, last_seen_at FROM silent_devices ORDER BY device_id"
    )


def events_per_minute(database: Database, now: datetime) -> dict[str, Any]:
    """Return each whole minute of the last RATE_HOURS, and how many events came in.

    Raises Unavailable.
    """
    until = now.replace(second=0, microsecond=0)
    since = until - timedelta(hours=RATE_HOURS)
    rows = database.rows(
        """
        SELECT date_bin('1 minute', ts_server, %(since)s) AS minute, count(*) AS events
        FROM events
        WHERE ts_server >= %(since)s AND ts_server < %(until)s
        GROUP BY 1
        """,
        since=since,
        until=until,
    )
    counts = {row["minute"].timestamp(): row["events"] for row in rows}
    minutes = [since.timestamp() + 60.0 * minute for minute in range(RATE_HOURS * 60)]
    return {"at": minutes, "events": [counts.get(minute, 0) for minute in minutes]}


def latency(database: Database) -> list[dict[str, Any]]:
    """Return the rows of ingest_latency, the last hour first, in seconds. Raises Unavailable."""
    return [
        {
            "hour": row["hour"].timestamp(),
            "events": row["events"],
            **{name: row[name].total_seconds() for name in ("p50", "p95", "p99", "max")},
        }
        for row in database.rows("SELECT * FROM ingest_latency ORDER BY hour DESC")
    ]


def missing(database: Database) -> dict[str, Any]:
    """Return the gaps that showed in the last MISSING_DAYS, at most MISSING_MAX, and how many.

    The view missing_events would have all there ever were, and reads all of events for it, which
    takes too long to look at. Raises Unavailable.
    """
    rows = database.rows(
        f"""
        SELECT missing.*, count(*) OVER () AS gaps,
            sum(last_sequence - first_sequence + 1) OVER ()::float8 AS events
        FROM (
            -- Those that number their events and were heard of since.
            SELECT DISTINCT device_id
            FROM latest_values
            WHERE ts_server >= now() - %(period)s AND has_sequence(event_id, device_id)
        ) AS numbering
        CROSS JOIN LATERAL
            missing_events(numbering.device_id, now() - %(period)s, 'infinity') AS missing
        ORDER BY missing.device_id, boot, first_sequence
        LIMIT {MISSING_MAX}
        """,
        period=timedelta(days=MISSING_DAYS),
    )
    return {
        "gaps": rows[0]["gaps"] if rows else 0,
        "events": rows[0]["events"] if rows else 0,
        "rows": [
            {
                "device": visible(row["device_id"]),
                "boot": row["boot"],
                "first": row["first_sequence"],
                "last": row["last_sequence"],
            }
            for row in rows
        ],
    }
