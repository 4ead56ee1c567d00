"""What looks like a reading and cannot become one: on its way to the ingester's dead letters.

What it does: an outbox that also keeps such messages, as events whose value is an object. The
ingester refuses them, keeps each as a dead letter, and answers `rejected`; then they are forgotten.
What it does not: keep more than a few at a time; what is above that is only counted.

Invariant: a kept one is sent until it is answered, through restarts, as any event.
"""

import json
import sqlite3
import time
from collections.abc import Callable
from typing import Any

from devices.bridge.event import as_bytes, dead_end_of
from devices.bridge.names import digest
from devices.bridge.translate import Incoming
from devices.python.telemetry import Message, Outbox

KEPT_MAX = 200
PER_MINUTE_MAX = 30
RESEND_SECONDS = 60.0
# Where neither topic nor payload has a device.
NOBODY = "bridge"

_TABLE = """CREATE TABLE IF NOT EXISTS bridge_dead_ends (
    event_id TEXT PRIMARY KEY, device_id TEXT NOT NULL, payload BLOB NOT NULL) WITHOUT ROWID"""


class BridgeOutbox(Outbox):
    """The outbox, and the dead ends beside it."""

    def __init__(
        self, folder: str, events_topic: str, acks_topic: str, events_max: int, bytes_max: int
    ) -> None:
        self._dead_ends: dict[str, tuple[str, bytes]] = {}
        self._due_at: dict[str, float] = {}
        self._has_connection = False
        self._since = -60.0
        self._this_minute = 0
        self._topic = events_topic
        super().__init__(
            folder,
            events_max=events_max,
            bytes_max=bytes_max,
            events_topic=events_topic,
            acks_topic=acks_topic,
        )

    def open_dead_ends(self, connection: sqlite3.Connection) -> None:
        """Make the table and read what is in it."""
        connection.execute(_TABLE)
        for event_id, device_id, payload in connection.execute("SELECT * FROM bridge_dead_ends"):
            self._dead_ends[event_id] = device_id, payload
            self._due_at[event_id] = 0.0

    def dead_end(
        self, message: Incoming, why: str, device_id: str | None
    ) -> Callable[[sqlite3.Connection], Any] | None:
        """Return what keeps it within a transaction; None if it is kept already, or not at all."""
        # The same garbage is the same dead letter, which counts how often it came.
        event_id = f"bridge-dead-end-{digest(repr((message.topic, message.payload)), 24)}"
        if event_id in self._dead_ends or len(self._dead_ends) >= KEPT_MAX:
            return None
        now = time.monotonic()
        if now - self._since >= 60.0:
            self._since, self._this_minute = now, 0
        self._this_minute += 1
        if self._this_minute > PER_MINUTE_MAX:
            return None
        device_id = device_id or NOBODY
        payload = as_bytes(dead_end_of(message, why, device_id, event_id))
        self._dead_ends[event_id] = device_id, payload
        self._due_at[event_id] = 0.0
        row = event_id, device_id, payload
        return lambda connection: connection.execute(
            "INSERT OR REPLACE INTO bridge_dead_ends VALUES (?, ?, ?)", row
        )

    def connected(self) -> None:
        """Note a new connection: all of them are due."""
        self._due_at = dict.fromkeys(self._dead_ends, 0.0)
        self._has_connection = True
        super().connected()

    def disconnected(self) -> None:
        """Note that the connection is gone."""
        self._has_connection = False
        super().disconnected()

    def due(self) -> list[Message]:
        """Return what is to be sent now, dead ends among it."""
        messages = super().due()
        now = time.monotonic()
        for event_id, (device_id, payload) in self._dead_ends.items():
            if self._has_connection and now >= self._due_at[event_id]:
                self._due_at[event_id] = now + RESEND_SECONDS
                messages.append(Message(self._topic.replace("{device_id}", device_id), payload))
        return messages

    def on_message(self, topic: str, payload: bytes) -> bool:
        """Take a message; forget the dead ends that it answers."""
        if self._dead_ends and b"bridge-dead-end-" in payload:
            answered = [each for each in _event_ids(payload) if each in self._dead_ends]
            for event_id in answered:
                del self._dead_ends[event_id]
                del self._due_at[event_id]
            if answered:
                rows = [(event_id,) for event_id in answered]
                delete = "DELETE FROM bridge_dead_ends WHERE event_id = ?"
                self.add_all([], also=lambda connection: connection.executemany(delete, rows))
        return super().on_message(topic, payload)


def _event_ids(payload: bytes) -> list[str]:
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError):
        return []
    answers = document if isinstance(document, list) else [document]
    ids = [answer.get("event_id") for answer in answers if isinstance(answer, dict)]
    return [event_id for event_id in ids if isinstance(event_id, str)]
