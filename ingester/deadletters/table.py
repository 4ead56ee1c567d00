"""The table of dead letters as a person needs it: to look into, to replay, to empty.

What it does: the SQL for that, and the replay of one dead letter through ingest(); one that
came many times is replayed once. What it does not: print, or choose.

Invariant: a row is marked `stored` only after each event in it is a committed row of
`events` and the broker has PUBACKed the ACK. Whatever ends a replay before, another one
finishes it: what was stored comes out as a duplicate, which gets the very same ACK.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from ingester.decoder import Decoder
from ingester.ingest import ingest
from ingester.message import Message
from ingester.rejection import DeadLetter
from ingester.settings import Settings
from ingester.store import Store

# What replay_outcome says of a success; of anything else it is the code of a Reason.
STORED = "stored"
# Rows that one statement deletes: 13 ms in the median, on a busy machine with 2 cores.
PURGE_ROWS_MAX = 1_000


class Letter(NamedTuple):
    """A row of dead_letters, field for column, without its payload."""

    id: int
    received_at: datetime
    last_received_at: datetime
    times: int
    reason: str
    error: str
    topic: str
    device_id: str | None
    event_id: str | None
    replayed_at: datetime | None
    replay_outcome: str | None


class Filter(NamedTuple):
    """Which dead letters: of what reason, None for any, and last received since when."""

    reason: str | None
    since: datetime | str = "-infinity"


class Count(NamedTuple):
    """Of one reason: how many dead letters, how often they came, how many a replay has stored."""

    reason: str
    total: int
    times: int
    stored: int


_LETTER = f"SELECT {', '.join(Letter._fields)} FROM dead_letters"
_FILTER = "WHERE reason = coalesce(%s, reason) AND last_received_at >= %s"
_COUNT = (
    "SELECT reason, count(*), sum(times)::bigint, count(*) FILTER (WHERE replay_outcome = %s)"
    " FROM dead_letters"
)


class DeadLetterTable(Store):
    """A Store that inserts no dead letter: what a replay refuses is in the table already."""

    _refused: Sequence[DeadLetter] = ()

    def insert_dead_letters(self, letters: Sequence[DeadLetter]) -> list[int]:
        """Commit what was stored, and remember what was refused; the ids are no one's."""
        super().insert_dead_letters(())
        self._refused = letters
        return [0] * len(letters)

    def newest(self, which: Filter, number: int) -> list[Letter]:
        """Return so many at most, those that came last first."""
        order = "ORDER BY last_received_at DESC, id DESC LIMIT %s"
        return [Letter(*row) for row in self.run(f"{_LETTER} {_FILTER} {order}", (*which, number))]

    def counts(self, which: Filter) -> list[Count]:
        """Return the number of each reason, the most frequent first."""
        sql = f"{_COUNT} {_FILTER} GROUP BY reason ORDER BY count(*) DESC, reason"
        return [Count(*row) for row in self.run(sql, (STORED, *which))]

    def letters(self, ids: Sequence[int]) -> list[Letter]:
        """Return those of the ids that there are."""
        return [Letter(*row) for row in self.run(f"{_LETTER} WHERE id = ANY(%s)", (list(ids),))]

    def payload(self, letter: Letter) -> bytes:
        """Return the bytes as they were received."""
        rows = self.run("SELECT payload FROM dead_letters WHERE id = %s", (letter.id,))
        return bytes(rows[0][0]) if rows else b""

    def unstored(self, which: Filter) -> list[tuple[int, str]]:
        """Return id and reason of those that no replay has stored, in the order received."""
        sql = f"SELECT id, reason FROM dead_letters {_FILTER}"
        order = "AND replay_outcome IS DISTINCT FROM %s ORDER BY received_at, id"
        return [(row[0], row[1]) for row in self.run(f"{sql} {order}", (*which, STORED))]

    def replay(
        self,
        letter_id: int,
        settings: Settings,
        device_id: str | None,
        publish: Callable[[str, bytes], None],
    ) -> str | None:
        """Ingest one again, answer its device, mark it; return its outcome.

        As if it had come from `device_id`, if there is one. None: it is not there any more.
        """
        sql = "SELECT topic, device_id, payload, received_at FROM dead_letters WHERE id = %s"
        if not (rows := self.run(sql, (letter_id,))):
            return None
        topic, own_device_id, payload, received_at = rows[0]
        topics = settings.topics
        if device_id is None and topics.device_id(topic) is None:
            # An ingester that listens elsewhere has kept it: another partition of a cluster, or
            # this one before MQTT_EVENTS_TOPIC was changed. It knew which device it was.
            device_id = own_device_id
        if device_id is not None:
            topic = topics.events.replace("+", device_id)
        self._refused = ()
        message = Message(topic, bytes(payload), received_at, mid=0, qos=1, connection=0)
        done = ingest([message], self, Decoder(topics, settings.device_default_tz))
        # The last replies are dead letters, and nobody is to hear of this one twice.
        for reply in done.replies[: len(done.replies) - len(self._refused)]:
            publish(reply.topic, reply.payload)
        outcome = str(self._refused[0].reason) if self._refused else STORED
        self.run(
            "UPDATE dead_letters SET replayed_at = now(), replay_outcome = %s WHERE id = %s"
            " RETURNING id",
            (outcome, letter_id),
        )
        return outcome

    def count_older(self, moment: datetime) -> int:
        """Return how many were last received before the moment."""
        sql = "SELECT count(*) FROM dead_letters WHERE last_received_at < %s"
        return int(self.run(sql, (moment,))[0][0])

    def purge_some(self, moment: datetime) -> int:
        """Delete some that last came before the moment; return how many, 0 if none is left."""
        is_old = "last_received_at < %s"
        oldest = f"SELECT id FROM dead_letters WHERE {is_old} ORDER BY last_received_at LIMIT %s"
        # Looked at twice: what comes again in between stays.
        sql = f"DELETE FROM dead_letters WHERE id = ANY(ARRAY({oldest})) AND {is_old} RETURNING id"
        return len(self.run(sql, (moment, PURGE_ROWS_MAX, moment)))
