"""What the bridge remembers in the outbox's database, in the transaction of its events.

What it does: keeps which messages were taken and may be delivered again, and the names of devices.
What it does not: keep events; that is the outbox's.

Invariant: a message is in here if and only if its events are in the outbox, or were; and it is
forgotten before the broker can have used its packet id for another one.
"""

import hashlib
import sqlite3
from collections.abc import Iterable, Sequence

from devices.bridge.session import Arrived

# Packet ids begin again after 65,535 messages: then the same id and content can be a new message.
MESSAGES_MAX = 60_000

_TABLES = (
    """CREATE TABLE IF NOT EXISTS bridge_received (
        session INTEGER NOT NULL, mid INTEGER NOT NULL, number INTEGER NOT NULL,
        digest BLOB NOT NULL, PRIMARY KEY (session, mid)) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS bridge_names (name TEXT PRIMARY KEY) WITHOUT ROWID",
    """CREATE TABLE IF NOT EXISTS bridge_filters (
        session INTEGER NOT NULL, filter TEXT NOT NULL,
        PRIMARY KEY (session, filter)) WITHOUT ROWID""",
)


class Received:
    """The messages that were taken, by session and packet id."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.filters: dict[int, list[str]] = {}  # that each session has ever had
        self._taken: dict[tuple[int, int], tuple[int, bytes]] = {}
        self._numbers: dict[int, int] = {}  # of the last message of each session

    def open(self, connection: sqlite3.Connection) -> None:
        """Make the tables and read what is in them."""
        for statement in _TABLES:
            connection.execute(statement)
        self._taken.clear()
        rows = connection.execute("SELECT session, mid, number, digest FROM bridge_received")
        for session, mid, number, digest in rows:
            self._taken[session, mid] = number, digest
            self._numbers[session] = max(number, self._numbers.get(session, 0))
        self.filters.clear()
        for session, each in connection.execute("SELECT session, filter FROM bridge_filters"):
            self.filters.setdefault(session, []).append(each)
        self.names = [name for (name,) in connection.execute("SELECT name FROM bridge_names")]

    def is_taken(self, session: int, message: Arrived) -> bool:
        """Tell whether a message is one that was taken, and is only delivered again."""
        known = self._taken.get((session, message.mid))
        if known is None or not (message.is_redelivered and message.qos):
            return False
        number, digest = known
        is_recent = self._numbers.get(session, 0) - number < MESSAGES_MAX
        return is_recent and digest == _digest(message)

    def session_lost(self, session: int) -> None:
        """Note that the broker knows nothing of the session: it delivers nothing again."""
        for key in [key for key in self._taken if key[0] == session]:
            del self._taken[key]

    def note(self, session: int, messages: Iterable[Arrived]) -> list[tuple[int, int, int, bytes]]:
        """Note what is taken, and return the rows to write()."""
        rows = []
        number = self._numbers.get(session, 0)
        for message in messages:
            if message.qos:
                number += 1
                digest = _digest(message)
                self._taken[session, message.mid] = number, digest
                rows.append((session, message.mid, number, digest))
        self._numbers[session] = number
        return rows

    @staticmethod
    def write_filters(connection: sqlite3.Connection, filters: Sequence[Sequence[str]]) -> None:
        """Write the filters of each session, before the broker hears of them."""
        connection.executemany(
            "INSERT OR IGNORE INTO bridge_filters VALUES (?, ?)",
            [(number, each) for number, group in enumerate(filters) for each in group],
        )

    @staticmethod
    def write(
        connection: sqlite3.Connection,
        rows: Iterable[tuple[int, int, int, bytes]],
        names: Iterable[str],
    ) -> None:
        """Write what note() has returned, and new names, in the transaction of the events."""
        connection.executemany("INSERT OR REPLACE INTO bridge_received VALUES (?, ?, ?, ?)", rows)
        connection.executemany(
            "INSERT OR IGNORE INTO bridge_names VALUES (?)", [(name,) for name in names]
        )


def _digest(message: Arrived) -> bytes:
    text = message.topic.encode("utf-8", "replace")
    return hashlib.blake2b(text + b"\0" + message.payload, digest_size=16).digest()
