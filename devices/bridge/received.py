"""What the bridge remembers in the outbox's database, in the transaction of its events.

What it does: keeps which messages were taken and may be delivered again, and the names of devices.
What it does not: keep events; that is the outbox's.

Invariant: a message is in here if and only if its events are in the outbox, or were.
"""

import hashlib
import sqlite3
from collections.abc import Iterable

from devices.bridge.session import Arrived

_TABLES = """
CREATE TABLE IF NOT EXISTS bridge_received (
    session INTEGER NOT NULL, mid INTEGER NOT NULL, digest BLOB NOT NULL,
    PRIMARY KEY (session, mid)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS bridge_names (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""


class Received:
    """The messages that were taken, by session and packet id, until the broker has the PUBACK."""

    def __init__(self) -> None:
        self.names: list[str] = []
        # The digest, and after how many confirmations of the session it was PUBACKed.
        self._taken: dict[tuple[int, int], tuple[bytes, int]] = {}
        self._confirmed: dict[int, int] = {}
        self._gone: set[tuple[int, int]] = set()

    def open(self, connection: sqlite3.Connection) -> None:
        """Make the tables and read what is in them."""
        for statement in _TABLES.split(";"):
            connection.execute(statement)
        rows = connection.execute("SELECT session, mid, digest FROM bridge_received")
        self._taken = {(session, mid): (digest, -1) for session, mid, digest in rows}
        rows = connection.execute("SELECT name FROM bridge_names")
        self.names = [name for (name,) in rows]

    def is_taken(self, session: int, message: Arrived) -> bool:
        """Tell whether a message is one that was taken, and is only delivered again."""
        if not (message.is_redelivered and message.qos):
            return False
        digest, _ = self._taken.get((session, message.mid), (b"", 0))
        return digest == _digest(message)

    def confirmed(self, session: int, count: int) -> None:
        """Note the session's confirmations: the broker has the PUBACKs before the last one.

        Its packet ids may then stand for other messages with the same content.
        """
        if count == self._confirmed.get(session, 0):
            return
        self._confirmed[session] = count
        gone = [
            key for key, (_, at) in self._taken.items() if key[0] == session and 0 <= at < count - 1
        ]
        self._forget(gone)

    def session_lost(self, session: int) -> None:
        """Note that the broker knows nothing of the session: it delivers nothing again."""
        self._forget([key for key in self._taken if key[0] == session])

    def note(self, session: int, messages: Iterable[Arrived], confirmations: int) -> None:
        """Note what is taken, in memory."""
        for message in messages:
            if message.qos:
                key = session, message.mid
                self._taken[key] = _digest(message), confirmations
                self._gone.discard(key)

    def write(
        self,
        connection: sqlite3.Connection,
        taken: Iterable[tuple[int, Arrived]],
        names: Iterable[str],
    ) -> None:
        """Write what is taken into the transaction, and delete what is gone."""
        connection.executemany(
            "DELETE FROM bridge_received WHERE session = ? AND mid = ?", list(self._gone)
        )
        connection.executemany(
            "INSERT OR REPLACE INTO bridge_received VALUES (?, ?, ?)",
            [(session, message.mid, _digest(message)) for session, message in taken if message.qos],
        )
        connection.executemany(
            "INSERT OR IGNORE INTO bridge_names VALUES (?)", [(name,) for name in names]
        )

    def written(self) -> None:
        """Note that the transaction is committed."""
        self._gone.clear()

    def _forget(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            del self._taken[key]
        self._gone.update(keys)


def _digest(message: Arrived) -> bytes:
    text = message.topic.encode("utf-8", "replace")
    return hashlib.blake2b(text + b"\0" + message.payload, digest_size=16).digest()
