"""What could not be stored: the dead letters, by device and reason, and one by one.

What it does: asks the table. What it does not: replay or delete any (`python -m
ingester.deadletters` does), or know HTTP or HTML.

Invariant: of a payload no more than PAYLOAD_BYTES_MAX bytes are fetched.
"""

from collections.abc import Sequence

from page.database import Database, Row

LETTERS_MAX = 100
PAYLOAD_BYTES_MAX = 2_000  # of each, on the page


def dead_letter_groups(database: Database) -> Sequence[Row]:
    """Return how often each device was refused for each reason, the last first.

    Raises Unavailable.
    """
    return database.rows(
        """
        SELECT device_id, reason, count(*) AS letters, sum(times)::bigint AS times,
            max(last_received_at) AS last_received_at
        FROM dead_letters
        GROUP BY device_id, reason
        ORDER BY last_received_at DESC
        LIMIT 500
        """
    )


def dead_letters(database: Database, device: str | None, reason: str | None) -> Sequence[Row]:
    """Return the last LETTERS_MAX letters, of a device or reason if they are given.

    `payload` is its first PAYLOAD_BYTES_MAX bytes, `size` how many there are. An empty `device`
    stands for a topic that names none. Raises Unavailable.
    """
    return database.rows(
        f"""
        SELECT id, received_at, last_received_at, times, reason, error, topic, device_id, event_id,
            replayed_at, replay_outcome, length(payload) AS size,
            substring(payload FROM 1 FOR {PAYLOAD_BYTES_MAX}) AS payload
        FROM dead_letters
        WHERE (%(device)s IS NULL OR coalesce(device_id, '') = %(device)s)
            AND (%(reason)s IS NULL OR reason = %(reason)s)
        ORDER BY last_received_at DESC, id DESC
        LIMIT {LETTERS_MAX}
        """,
        device=device,
        reason=reason,
    )
