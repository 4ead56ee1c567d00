"""The messages that have arrived and are not settled.

What it does: keeps them in their order, within bounds, and hands them out in batches. What it does
not: read or settle them (broker.py), or look into one.

Invariant: all of them came over one connection, each once, and what is held is bounded whatever
the broker sends.
"""

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from ingester.mqtt import Publish

# Bytes of payloads that one batch holds, but always at least one message.
BATCH_BYTES_MAX = 1_048_576
# What is held unsettled at most. The broker's window (mosquitto.conf) is smaller, but 2.0.11
# lets each PUBACK open a whole one: it then sends all that it has queued. 25 MB with small
# events; with a fifth of it, a long backlog is sent and read five times over.
UNSETTLED_MESSAGES_MAX = 50_000
UNSETTLED_BYTES_MAX = 16_777_216


class Message(NamedTuple):
    """A topic and bytes off the wire; not trusted."""

    topic: str
    payload: bytes
    received_at: datetime
    mid: int
    qos: int
    connection: int  # the number of the connection that brought it
    retain: bool = False  # the broker had kept it, and hands it out again at each subscribe
    arrived_at: float = 0.0  # the same moment as received_at, by the monotonic clock


class InFlight:
    """The messages that have arrived over one connection and are not settled."""

    def __init__(self, connection: int) -> None:
        self._connection = connection
        self.messages: list[Message] = []  # in their order
        self.overflowed = False  # something arrived that was not kept
        self._bytes = 0
        self._by_mid: dict[int, Message] = {}

    def add(self, publish: Publish, received_at: datetime, arrived_at: float) -> None:
        """Keep a message, unless it is there already, or there is no room for it.

        A broker may send what waits for its PUBACK again over the same connection (NATS).
        """
        topic, payload, mid, qos, retain = publish
        known = self._by_mid.get(mid) if qos else None
        # Not by the packet id alone: Mosquitto 2.0 counts on when all of them are in use.
        if known is not None and known.payload == payload and known.topic == topic:
            return
        if len(self.messages) >= UNSETTLED_MESSAGES_MAX or self._bytes >= UNSETTLED_BYTES_MAX:
            self.overflowed = True
            return
        topic = sys.intern(topic)  # each device's once, not once a message
        message = Message(
            topic, payload, received_at, mid, qos, self._connection, retain, arrived_at
        )
        if qos:
            self._by_mid[mid] = message
        self._bytes += len(payload)
        self.messages.append(message)

    def batch(self, messages_max: int) -> list[Message]:
        """Return the oldest messages, up to a batch."""
        batch: list[Message] = []
        bytes_total = 0
        for message in self.messages[:messages_max]:
            bytes_total += len(message.payload)
            if batch and bytes_total > BATCH_BYTES_MAX:
                break
            batch.append(message)
        return batch

    def settled(self, batch: Sequence[Message]) -> None:
        """Forget a batch, which is made of the oldest messages."""
        del self.messages[: len(batch)]
        for message in batch:
            self._bytes -= len(message.payload)
            self._by_mid.pop(message.mid, None)
