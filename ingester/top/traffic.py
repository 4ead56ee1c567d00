"""What a view has seen of the pipeline: counts, times, and the last of each kind.

What it does: takes messages as they were heard, of events, ACKs, dead letters and status,
and keeps what is worth a look. What it does not: subscribe, read the clock, or draw.

Invariant: whatever is published, and however much of it, what is kept is bounded, and no
payload raises. Nothing heard is trusted: texts are cut here, and made harmless by frame.py.
"""

import json
import math
from collections import Counter, deque
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ingester.event import PAYLOAD_BYTES_MAX
from ingester.progress import COUNTERS, State
from ingester.tool_session import Received
from ingester.topic import Topics

# Of events and of dead letters: more than a screen has lines.
ROWS_MAX = 200
# Of a text of theirs: more than a screen has columns.
TEXT_CHARS_MAX = 400
HISTORY_SECONDS = 60
RATE_SECONDS = 5
LATENCIES_MAX = 1_000
# Events whose ACK was not seen yet. Ids are as long as the contract lets them be, or not kept.
PENDING_MAX = 20_000
EVENT_ID_CHARS_MAX = 200
DEVICE_ID_CHARS_MAX = 64
# Of a cluster: more than have ever been of use, and whoever publishes may name any number.
PARTITIONS_MAX = 64


class ObservedEvent(NamedTuple):
    """One event as it was published, whether or not it is valid."""

    at: datetime
    device_id: str
    event_type: str
    value: str


class ObservedDeadLetter(NamedTuple):
    """One dead letter as it was published."""

    at: datetime
    letter_id: str
    reason: str
    device_id: str
    error: str


class Status(NamedTuple):
    """The ingester's own words; None is what it did not say, or not in a form that it has."""

    state: State | None
    since: datetime | None = None
    version: str | None = None
    counters: dict[str, float] = {}
    in_hand: float | None = None
    database_round_trip_ms: float | None = None
    broker_dropped: float | None = None


class Ingester:
    """What one ingester has said of itself."""

    def __init__(self) -> None:
        self.status: Status | None = None  # the last one
        self.facts = Status(None)  # the last one that said more than the state
        self.status_at = 0.0  # when it was heard, or else when the view began to listen


class PartitionedTopic:
    """A topic of ours as every partition has it: with another number at one of its levels."""

    def __init__(self, topic: str, partition: str) -> None:
        """`partition` is the number of ours; "" if there are none."""
        self._partition = partition
        self._levels = topic.split("/")
        self._index = self._levels.index(partition) if partition else None

    def subscription(self) -> str:
        """Return what hears it of all partitions."""
        return "/".join("+" if i == self._index else level for i, level in enumerate(self._levels))

    def take_apart(self, topic: str) -> tuple[str, str]:
        """Return a topic as it is in our partition, and the number of its own."""
        levels = topic.split("/")
        if self._index is None or len(levels) <= self._index or not _is_number(levels[self._index]):
            return topic, self._partition
        partition, levels[self._index] = levels[self._index], self._partition
        return "/".join(levels), partition


class Rate:
    """How many a second, over the last seconds and the last minute."""

    def __init__(self) -> None:
        self._began_at: float | None = None
        self._counts: Counter[int] = Counter()  # by second since the beginning

    def begin(self, now: float) -> None:
        """Count from now on."""
        self._began_at = now
        self._counts.clear()

    def add(self, at: float, number: int) -> None:
        """Count so many at that time."""
        if self._began_at is None:
            return
        second = int(at - self._began_at)
        if second not in self._counts and len(self._counts) > HISTORY_SECONDS:
            for old in [key for key in self._counts if key < second - HISTORY_SECONDS]:
                del self._counts[old]
        self._counts[second] += number

    def history(self, now: float) -> list[int]:
        """Return the counts of the last whole seconds, the newest last; up to a minute."""
        if self._began_at is None:
            return []
        second = int(now - self._began_at)
        return [self._counts[key] for key in range(max(0, second - HISTORY_SECONDS), second)]

    def per_second(self, now: float) -> float:
        """Return the mean of the last whole seconds, of which there may be none yet."""
        last = self.history(now)[-RATE_SECONDS:]
        return sum(last) / len(last) if last else 0.0


class Traffic:
    """All that was seen since the view began; tick() first says what time it is."""

    def __init__(self, topics: Topics, broker: str) -> None:
        """`broker` is what to call it."""
        self._topics = topics
        self._ack_prefix, self._ack_suffix = topics.ack_template.split("{device_id}")
        # In a cluster the events' topic and the status topic of an ingester both hold its number.
        shared = set(topics.events.split("/")) & set(topics.status.split("/"))
        partition = next(iter(sorted(filter(_is_number, shared))), "")
        self._events_topic = PartitionedTopic(topics.events, partition)
        self._status_topic = PartitionedTopic(topics.status, partition)
        self.broker = broker
        self.now = 0.0  # by the monotonic clock
        self.at = datetime.min.replace(tzinfo=UTC)
        # Whether we hear the broker, since when or since when not, and why not.
        self.is_connected = False
        self.changed_at = self.at
        self.error = ""
        # By the number of the partition: ours, and those that were heard of.
        self.ingesters = {partition: Ingester()}
        self.events = Rate()
        self.acks = Rate()
        self.latencies_ms: deque[float] = deque(maxlen=LATENCIES_MAX)
        self.last_events: deque[ObservedEvent] = deque(maxlen=ROWS_MAX)
        self.last_dead_letters: deque[ObservedDeadLetter] = deque(maxlen=ROWS_MAX)
        self._pending: dict[tuple[str, str], float] = {}  # when each event was seen

    @property
    def pending(self) -> int:
        """How many events have been seen whose ACK has not."""
        return len(self._pending)

    def subscriptions(self) -> list[str]:
        """Return what is to be heard."""
        # The id may be a part of a level; a wildcard is a whole one.
        levels = self._topics.ack_template.split("/")
        acks = "/".join("+" if "{device_id}" in level else level for level in levels)
        ours = self._events_topic.subscription(), self._status_topic.subscription()
        return [ours[0], acks, self._topics.deadletter, ours[1]]

    def tick(self, now: float, at: datetime) -> None:
        """Note the time, by the monotonic clock and in UTC."""
        self.now, self.at = now, at

    def connected(self) -> None:
        """Note that we hear the broker from now on."""
        self.is_connected, self.changed_at, self.error = True, self.at, ""
        for ingester in self.ingesters.values():
            ingester.status, ingester.status_at = None, self.now
        self.events.begin(self.now)
        self.acks.begin(self.now)
        self._pending.clear()  # their ACKs may have come meanwhile

    def lost(self, error: str) -> None:
        """Note that we do not hear the broker, and why."""
        if self.is_connected:
            self.changed_at = self.at
        self.is_connected, self.error = False, error

    def take(self, messages: Iterable[Received]) -> None:
        """Take what has been heard."""
        for message in messages:
            topic, partition = self._status_topic.take_apart(message.topic)
            if topic == self._topics.status:
                self._take_status(partition, message)
                continue
            topic, _ = self._events_topic.take_apart(message.topic)
            if message.retain:
                continue  # of some time ago
            if message.topic == self._topics.deadletter:
                self.last_dead_letters.append(_dead_letter(self.at, message.payload))
            elif (device_id := self._topics.device_id(topic)) is not None:
                self._take_event(device_id, message)
            elif (device_id := self._answered(message.topic)) is not None:
                self._take_ack(device_id, message)

    def latency_ms(self, quantile: float) -> float | None:
        """Return how long that part of the last ACKs took at most; None if none was traffic."""
        if not self.latencies_ms:
            return None
        return sorted(self.latencies_ms)[math.ceil(quantile * len(self.latencies_ms)) - 1]

    def _answered(self, topic: str) -> str | None:
        prefix, suffix = self._ack_prefix, self._ack_suffix
        device_id = topic[len(prefix) : len(topic) - len(suffix)]
        return device_id if prefix + device_id + suffix == topic else None

    def _take_event(self, device_id: str, message: Received) -> None:
        document, problem = _parse(message.payload)
        items = document if isinstance(document, list) and document else [document]
        self.events.add(message.received_at, len(items))
        for item in items:
            if key := _key(device_id, item):
                # The first time counts, when it is sent again: the device waits since then.
                self._pending.setdefault(key, message.received_at)
                if len(self._pending) > PENDING_MAX:
                    del self._pending[next(iter(self._pending))]
        for item in items[-ROWS_MAX:]:
            device, event_type, value = device_id[:TEXT_CHARS_MAX], "?", problem or _text(item)
            if isinstance(item, dict):
                event_type = _text(item.get("event_type", "?"))
                unit = item.get("unit")
                value = _text(item.get("value")) + (f" {_text(unit)}" if unit else "")
            self.last_events.append(ObservedEvent(self.at, device, event_type, value))

    def _take_ack(self, device_id: str, message: Received) -> None:
        document, _ = _parse(message.payload)
        answers = document if isinstance(document, list) else [document]
        self.acks.add(message.received_at, len(answers))
        for answer in answers:
            key = _key(device_id, answer)
            if key and (seen_at := self._pending.pop(key, None)) is not None:
                self.latencies_ms.append((message.received_at - seen_at) * 1000)

    def _take_status(self, partition: str, message: Received) -> None:
        if partition not in self.ingesters and len(self.ingesters) >= PARTITIONS_MAX:
            return
        ingester = self.ingesters.setdefault(partition, Ingester())
        ingester.status_at = message.received_at
        body, _ = _parse(message.payload)
        if not isinstance(body, dict):
            ingester.status = Status(None)
            return
        state = body.get("state")
        counters = body.get("counters")
        ingester.status = Status(
            state=State(state) if state in tuple(State) else None,
            # The broker, which says `offline` in the ingester's place, does not say since when.
            since=_moment(body.get("since")) or (None if message.retain else self.at),
            version=_text(body["version"]) if "version" in body else None,
            counters={
                name: number
                for name in COUNTERS
                if isinstance(counters, dict)
                and (number := _number(counters.get(name))) is not None
            },
            in_hand=_number(body.get("in_hand")),
            database_round_trip_ms=_number(body.get("database_round_trip_ms")),
            broker_dropped=_number(body.get("broker_dropped")),
        )
        if ingester.status.counters:
            ingester.facts = ingester.status


def _parse(payload: bytes) -> tuple[Any, str]:
    """Return the JSON of a payload, and what is wrong with it."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        return None, f"too large: {len(payload)} bytes"
    try:
        return json.loads(payload), ""
    except (ValueError, RecursionError):
        start = payload[:TEXT_CHARS_MAX].decode("utf-8", "replace")
        return None, f"not JSON: {start}" if start else "an empty payload"


def _key(device_id: str, item: object) -> tuple[str, str] | None:
    """Return what an event and its ACK have in common; None if they have no id to keep."""
    event_id = item.get("event_id") if isinstance(item, dict) else None
    if not isinstance(event_id, str) or len(event_id) > EVENT_ID_CHARS_MAX:
        return None
    return (device_id, event_id) if len(device_id) <= DEVICE_ID_CHARS_MAX else None


def _dead_letter(at: datetime, payload: bytes) -> ObservedDeadLetter:
    body, problem = _parse(payload)
    if not isinstance(body, dict):
        return ObservedDeadLetter(at, "?", "?", "?", problem or _text(body))
    fields = [_text(body.get(name)) for name in ("id", "reason", "device_id", "error")]
    return ObservedDeadLetter(at, *fields)


def _text(value: object) -> str:
    """Return a value of JSON as a text to show, cut."""
    if isinstance(value, str):
        return value[:TEXT_CHARS_MAX]
    if isinstance(value, list):
        return "[...]"
    if isinstance(value, dict):
        return "{...}"
    return json.dumps(value)[:TEXT_CHARS_MAX]


def _is_number(level: str) -> bool:
    return level.isascii() and level.isdecimal() and len(level) <= 4


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    # Nothing that is counted or measured is larger; and so no text of a number is long.
    return value if 0 <= value < 1e15 else None


def _moment(value: object) -> datetime | None:
    if not isinstance(value, str) or not value.endswith("Z"):
        return None
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        return None
