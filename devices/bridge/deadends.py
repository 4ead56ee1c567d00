"""What looks like a reading and cannot become one: an event that becomes a dead letter.

What it does: makes the event, which the ingester rejects and keeps for its value, and bounds how
many there are. What it does not: keep or send it; the outbox does, as any other.

Invariant: at most KEPT_MAX of them wait, through restarts too, and at most PER_MINUTE_MAX are made
in a minute.
"""

from collections.abc import Callable, Iterable

from devices.bridge.names import digest
from devices.bridge.translate import Incoming
from devices.bridge.value import storable
from devices.python.telemetry import NO_TIME, Event

KEPT_MAX = 200
PER_MINUTE_MAX = 30
# Characters of a payload that a dead letter shows; the message itself is the firmware's.
SHOWN_CHARS_MAX = 2_000
ID_BEGIN = "bridge-dead-end-"
# Where neither topic nor payload has a device.
NOBODY = "bridge"


class DeadEnds:
    """Which of them wait; `waiting`: the ids of those that an earlier run has left."""

    def __init__(self, waiting: Iterable[str], clock: Callable[[], float]) -> None:
        self._waiting = set(waiting)
        self._clock = clock
        self._minute_at = -60.0
        self._this_minute = 0

    def event(self, message: Incoming, why: str, device_id: str | None) -> Event | None:
        """Return the event; None if it waits already, or there are too many."""
        # The same garbage is the same dead letter, which counts how often it came.
        event_id = f"{ID_BEGIN}{digest(repr((message.topic, message.payload)), 24)}"
        if event_id in self._waiting or len(self._waiting) >= KEPT_MAX:
            return None
        now = self._clock()
        if now - self._minute_at >= 60.0:
            self._minute_at, self._this_minute = now, 0
        self._this_minute += 1
        if self._this_minute > PER_MINUTE_MAX:
            return None
        self._waiting.add(event_id)
        shown = {
            "why": why,
            "topic": storable(message.topic[:1_000]),
            "bytes": len(message.payload),
            "payload": storable(
                message.payload[:SHOWN_CHARS_MAX].decode("utf-8", "backslashreplace")
            ),
        }
        return Event(
            "bridge.dead_end",
            timestamp=NO_TIME,
            device_id=device_id or NOBODY,
            event_id=event_id,
            dead_letter=shown,
        )

    def gone(self, event_id: str) -> None:
        """Note that an event does not wait any more."""
        self._waiting.discard(event_id)
