"""The device's half of the promise: an event is kept and sent until the ingester answers it.

What it does: gives each event its id and keeps it on the disk before add() returns; says what
to send next, the oldest first, in batches, again and again; forgets an event when its ACK
comes, and never otherwise, unless there is no room: then it counts, and tells the server.
What it does not: connect, wait or send. A link calls connected(), due() and on_message().

Invariant: the store alone knows which events there are. In memory is only which of them are on
their way; if that is lost, they are sent once more than needed, and found to be duplicates.
"""

import json
import logging
import math
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, NamedTuple

from .ack import answers
from .errors import EventRefused, StoreFull
from .event import NO_TIME, Event, event_bytes, is_device_id, timestamp_text
from .kept import Kept, Run
from .store import Store

ANSWER_BYTES = 200  # of one event in an ACK, beyond the event id and the device id
BATCH_MAX = 200
IN_FLIGHT_EVENTS_MAX = 4_000  # of all devices together, without an answer
RESEND_SECONDS = 10.0
RESEND_SECONDS_MAX = 300.0
UPKEEP_SECONDS = 1.0
SILENT_MAX = 3  # sent so often without an answer, a connection is not trusted any more
NOTE_BYTES = 400  # an event that tells of one run of lost events has less
DEVICE = "{device_id}"
OWN_ID = re.compile("-([0-9a-f]{8})-([1-9][0-9]{0,9})-([1-9][0-9]{0,9})")  # behind the device

log = logging.getLogger(__name__)


class Message(NamedTuple):
    """What a link is to publish."""

    topic: str
    payload: bytes


class Rejected(NamedTuple):
    """An event that will never be stored; the ingester has kept it as a dead letter."""

    device_id: str
    event_id: str
    reason: str
    error: str
    payload: bytes  # the event, as it was sent


@dataclass
class Lane:
    """What waits of one device; one message at a time is on its way."""

    waiting: int = 0
    bytes: int = 0
    in_flight: dict[str, int] = field(default_factory=dict)  # event ids, and their bytes
    due_at: float = 0.0  # when what is in flight is sent again
    sent_at: float = 0.0
    silent: int = 0  # how often it was sent without an answer
    doubted: int = 0  # how often of these on this connection
    batch: int = BATCH_MAX  # fewer where no answer comes


def payload_of(batch: Sequence[bytes]) -> bytes:
    """Return the message that holds these events."""
    return batch[0] if len(batch) == 1 else b"[" + b",".join(batch) + b"]"


class Outbox:
    """The events of one device, or of many, that are not answered yet.

    `folder`: for this outbox alone; it is made if it is not there. `device_id`: of this
    device; None: each event names its own. `events_max`, `bytes_max`: what is kept; above it the
    oldest events are dropped. `receive_bytes_max`: the largest message that the MQTT client can
    take; the answers to a batch have to fit. `send_bytes_max`: likewise, and of one event.

    Opening it raises StoreLocked if another process has it, StoreReadOnly, StoreFull or
    StoreFailed. A damaged or foreign database is no error: it is set aside in
    `folder`/damaged-N, what can be read of it is taken over, and damaged() counts it.
    """

    def __init__(
        self,
        folder: str | Path,
        device_id: str | None = None,
        events_max: int = 100_000,
        bytes_max: int = 64 * 1024 * 1024,
        receive_bytes_max: int = 65_536,
        send_bytes_max: int = 131_072,
        events_topic: str = "qs/v1/{device_id}/events",
        acks_topic: str = "qs/v1/{device_id}/acks",
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        if device_id is not None and not is_device_id(device_id):
            raise EventRefused("device_id: expected 1 to 64 characters of A-Z a-z 0-9 _ . : -")
        self.device_id = device_id
        self._events_max = events_max
        self._bytes_max = bytes_max
        self._receive_bytes_max = receive_bytes_max
        self._send_bytes_max = send_bytes_max
        self._events_topic = events_topic
        self._acks_topic = acks_topic
        self._clock = clock
        self._ticks = ticks
        self._sequences: dict[str, int] = {}  # the last of each device in this boot
        self._lanes: dict[str, Lane] = {}  # of each device that has events waiting
        self._ready: dict[str, None] = {}  # devices with nothing in flight, in their order
        self._in_flight = 0  # events of all lanes
        self._unforgotten: set[str] = set()  # answered, and not deleted yet
        self._dropped = 0
        self._refused = 0
        self._repeated = 0
        self._connected = False
        self._answered = False  # since connected(): the way to the database is open
        self._answered_at = -math.inf
        self._next_due = math.inf
        self._next_upkeep = -math.inf  # of what may fail on a full disk
        self._is_reconnect_wanted = False
        self.on_stored: Callable[[str], object] = lambda event_id: None
        self.on_rejected: Callable[[Rejected], object] = log_rejected
        self.on_dropped: Callable[[str], object] = lambda event_id: None
        self._store = Store(Path(folder))
        self._has_lost = bool(self._store.runs())
        for owner, (count, size) in self._store.counts().items():
            self._lanes[owner] = Lane(count, size)
            self._ready[owner] = None

    def close(self) -> None:
        """Give the store to whoever opens it next. Nothing is lost without it either."""
        self._forget()
        self._store.close()

    # --- what the program calls ----------------------------------------------------------

    def add(
        self,
        event_type: str,
        value: float | str | None = None,
        unit: str | None = None,
        timestamp: datetime | float | None = None,
        meta: dict[str, Any] | None = None,
    ) -> str:
        """Keep an event of this device, and return its id: from now on it survives a power cut.

        Without a timestamp it gets the clock's, if that was set; with NO_TIME none. Raises
        EventRefused if the ingester would reject it or it is too large, and a Store error if
        it cannot be kept. It does not send.
        """
        (result,) = self.add_all([Event(event_type, value, unit, timestamp, meta)])
        if isinstance(result, EventRefused):
            raise result
        return result

    def add_all(
        self,
        events: Iterable[Event],
        also: Callable[[sqlite3.Connection], object] | None = None,
    ) -> list[str | EventRefused]:
        """Keep many events in one transaction: either all survive a power cut, or it raises.

        Return for each its id, or why it was refused: that one alone is left out. An event
        with an `event_id` of its own that is waiting already is no second event; repeated()
        counts it. `also` is called within the transaction, for tables of the program's own in
        the same database, perhaps a second time after all was undone; it is called without
        events too.
        """
        results: list[str | EventRefused] = []
        kept: list[Kept] = []
        sequences: dict[str, int] = {}
        now = timestamp_text(self._clock())
        for event in events:
            try:
                item = self._kept(event, now, sequences)
            except EventRefused as refused:
                results.append(refused.with_traceback(None))
                self._refused += 1
                continue
            kept.append(item)
            results.append(item.event_id)
        if kept or also is not None:
            # Before they are kept: whatever interrupts this, no number is given twice.
            before = {it: self._sequences.get(it, 0) for it in sequences}
            self._sequences.update(sequences)
            try:
                self._keep(kept, also)
            except Exception:
                self._sequences.update(before)
                raise
        return results

    def waiting(self) -> int:
        """Return how many events are not answered. All of them would survive a power cut."""
        return sum(lane.waiting for lane in self._lanes.values())

    def waiting_ids(self, begin: str) -> list[str]:
        """Return which events that are not answered have an id that begins so."""
        return self._store.ids(begin)

    def dropped(self) -> int:
        """Return how many events were dropped since it was opened."""
        return self._dropped

    def refused(self) -> int:
        """Return how many events were refused because they could never be stored."""
        return self._refused

    def repeated(self) -> int:
        """Return how many events were waiting already when they were added."""
        return self._repeated

    def damaged(self) -> int:
        """Return how many databases were set aside when it was opened."""
        return self._store.damaged

    @property
    def client_id(self) -> str:
        """A name for the MQTT session that no other has."""
        return f"{self.device_id or 'outbox'}-{self._store.salt}"

    # --- what the link calls -------------------------------------------------------------

    def subscriptions(self) -> list[str]:
        """Return the topics on which the answers come; subscribe at every connect."""
        if self.device_id is None:
            return [self._acks_topic.replace(DEVICE, "+")]
        # What an earlier device id has left here is sent under that one.
        devices = {self.device_id: None} | dict.fromkeys(self._lanes)
        return [self._acks_topic.replace(DEVICE, each) for each in devices]

    def connected(self) -> None:
        """Note a new connection, on which subscriptions() are made."""
        self._connected = True
        self._answered = False
        for device_id, lane in self._lanes.items():
            lane.doubted = 0
            self._land(device_id, lane)

    def disconnected(self) -> None:
        """Note that the connection is gone."""
        self._connected = False

    def reconnect_wanted(self) -> bool:
        """Tell whether the connection seems dead, as nothing is answered. Asks once."""
        is_wanted, self._is_reconnect_wanted = self._is_reconnect_wanted, False
        return is_wanted

    def due(self) -> list[Message]:
        """Return what is to be sent now. Call it often; what is not answered comes again.

        What was answered since the last call is deleted, by one transaction for all of it.
        If a message cannot be sent, the connection is gone: call disconnected().
        """
        now = self._ticks()
        if now >= self._next_upkeep:
            self._forget()
            if self._connected and self._answered and self._has_lost:
                self._tell_lost()
        if not self._connected:
            return []
        if now >= self._next_due:
            self._find_overdue(now)
        messages: list[Message] = []
        while self._ready and self._in_flight < IN_FLIGHT_EVENTS_MAX:
            device_id = next(iter(self._ready))
            del self._ready[device_id]
            batch = self._next_batch(device_id, now)
            if batch:
                topic = self._events_topic.replace(DEVICE, device_id)
                messages.append(Message(topic, payload_of(batch)))
        return messages

    def on_message(self, topic: str, payload: bytes) -> bool:
        """Take a message; return whether it was for the outbox."""
        device_id = self._device_of(topic)
        if device_id is None:
            return False
        lane = self._lanes.get(device_id)
        if lane is None:
            return True
        answered: dict[str, int] = {}
        dropped = self._dropped
        for answer in answers(device_id, payload):
            event_id = answer.event_id
            if event_id in answered or event_id in self._unforgotten:
                continue
            size = lane.in_flight.get(event_id)
            event = b""  # only what is rejected is looked at
            if size is None or answer.reason is not None:
                event = self._store.find(device_id, event_id) or b""
                size = len(event)
            if not size:
                continue
            # Told first: if the power goes in between, it is told twice and not never.
            if answer.reason is None:
                self.on_stored(event_id)
            else:
                reason, error = answer.reason, answer.error
                self.on_rejected(Rejected(device_id, event_id, reason, error, event))
            answered[event_id] = size
        if self._dropped != dropped:  # what was called has added events, and that made room
            find = self._store.find
            answered = {it: size for it, size in answered.items() if find(device_id, it)}
        if answered:
            self._note_answers(device_id, answered)
            self._unforgotten |= answered.keys()
        return True

    # --- events in ----------------------------------------------------------------------

    def _kept(self, event: Event, now: str | None, sequences: dict[str, int]) -> Kept:
        """Return the event with its id; `sequences` are those of this call."""
        device_id = event.device_id or self.device_id or ""
        if self.device_id not in (None, device_id):
            raise EventRefused(f"device_id: this outbox is for {self.device_id} alone")
        if not is_device_id(device_id):
            raise EventRefused("device_id: expected 1 to 64 characters of A-Z a-z 0-9 _ . : -")
        begin = f"{device_id}-{self._store.salt}-"
        event_id = event.event_id
        sequence = 0
        if event_id is None:
            sequence = sequences.get(device_id, self._sequences.get(device_id, 0)) + 1
            event_id = f"{begin}{self._store.boot}-{sequence}"
        elif isinstance(event_id, str) and event_id.startswith(begin):
            raise EventRefused("event_id: begins like those that the outbox makes")
        payload = event_bytes(event_id, device_id, event, now)
        if len(payload) > self._send_bytes_max:
            raise EventRefused(f"the event has {len(payload)} bytes, more than can be sent")
        if sequence:
            sequences[device_id] = sequence
        return Kept(event_id, device_id, payload)

    def _keep(
        self, kept: list[Kept], also: Callable[[sqlite3.Connection], object] | None = None
    ) -> None:
        try:
            new, dropped = self._write(kept, also)
        except StoreFull:  # there may be room now that the WAL is in the database
            new, dropped = self._write(kept, also)
        self._unforgotten.clear()
        self._repeated += len(kept) - len(new)
        self._dropped += len(dropped)
        self._has_lost = self._has_lost or bool(dropped)
        for item in new:
            lane = self._lanes.setdefault(item.device_id, Lane())
            lane.waiting += 1
            lane.bytes += len(item.payload)
            if not lane.in_flight:
                self._ready[item.device_id] = None
        for item in dropped:
            self._take(item.device_id, item.event_id, len(item.payload))
        for item in dropped:
            self.on_dropped(item.event_id)

    def _write(
        self, kept: list[Kept], also: Callable[[sqlite3.Connection], object] | None
    ) -> tuple[list[Kept], list[Kept]]:
        """Return what was not there yet, and what was dropped for it."""
        with self._store.transaction(durable=True) as connection:
            self._store.remove(self._unforgotten)
            new = self._store.add(kept)
            dropped = self._drop_oldest(new)
            if also is not None:
                also(connection)
        return new, dropped

    # --- events out ----------------------------------------------------------------------

    def _next_batch(self, device_id: str, now: float) -> list[bytes]:
        """Return a device's first events that fit, and whose answers do; at least one."""
        lane = self._lanes[device_id]
        batch: list[bytes] = []
        size, answer_size = 1, 2
        for event in self._store.oldest_of(device_id):
            if event.event_id in self._unforgotten:
                continue
            size += len(event.payload) + 1
            answer_size += (
                len(encode_basestring_ascii(event.event_id)) - 2 + len(device_id) + ANSWER_BYTES
            )
            is_full = size > self._send_bytes_max or answer_size > self._receive_bytes_max
            if batch and (is_full or len(batch) == lane.batch):
                break
            batch.append(event.payload)
            lane.in_flight[event.event_id] = len(event.payload)
        if not batch:
            return []
        self._in_flight += len(batch)
        if lane.silent:
            # Perhaps the answer is too large for the way back: fewer are answered shorter.
            lane.batch = max(1, len(batch) // 2)
        delay = min(RESEND_SECONDS * 2.0 ** min(lane.silent, 10), RESEND_SECONDS_MAX)
        lane.due_at = now + delay * random.uniform(0.5, 1.5)
        lane.sent_at = now
        lane.silent += 1
        lane.doubted += 1
        self._next_due = min(self._next_due, lane.due_at)
        return batch

    def _find_overdue(self, now: float) -> None:
        self._next_due = math.inf
        for device_id, lane in self._lanes.items():
            if not lane.in_flight:
                continue
            if lane.due_at > now:
                self._next_due = min(self._next_due, lane.due_at)
                continue
            is_all_silent = self._answered_at < lane.sent_at
            if lane.doubted and lane.doubted % SILENT_MAX == 0 and is_all_silent:
                self._is_reconnect_wanted = True
            self._land(device_id, lane)

    def _land(self, device_id: str, lane: Lane) -> None:
        """Take what is in flight for not sent."""
        self._in_flight -= len(lane.in_flight)
        lane.in_flight.clear()
        if lane.waiting:
            self._ready[device_id] = None

    # --- answers -------------------------------------------------------------------------

    def _device_of(self, topic: str) -> str | None:
        begin, _, end = self._acks_topic.partition(DEVICE)
        if not topic.startswith(begin) or not topic.endswith(end):
            return None
        device_id = topic[len(begin) : len(topic) - len(end)]
        return device_id if is_device_id(device_id) else None

    def _note_answers(self, device_id: str, answered: dict[str, int]) -> None:
        now = self._ticks()
        if now - self._answered_at >= RESEND_SECONDS:
            # The way is open again: what was sent in vain meanwhile need not wait its time.
            for lane in self._lanes.values():
                if lane.in_flight and lane.sent_at >= self._answered_at:
                    lane.due_at = min(lane.due_at, now + RESEND_SECONDS * random.random())
                    self._next_due = min(self._next_due, lane.due_at)
        self._answered = True
        self._answered_at = now
        lane = self._lanes[device_id]
        lane.silent = lane.doubted = 0
        lane.batch = BATCH_MAX
        for event_id, size in answered.items():
            self._take(device_id, event_id, size)

    def _take(self, device_id: str, event_id: str, size: int) -> None:
        """Note in memory that an event does not wait any more."""
        lane = self._lanes[device_id]
        lane.waiting -= 1
        lane.bytes -= size
        if lane.in_flight.pop(event_id, None) is not None:
            self._in_flight -= 1
        if lane.waiting == 0:
            del self._lanes[device_id]
            self._ready.pop(device_id, None)
        elif not lane.in_flight:
            self._ready[device_id] = None

    def _forget(self) -> None:
        """Delete what is answered. A power cut may undo that: it is sent again, no more."""
        if not self._unforgotten:
            return
        try:
            with self._store.transaction(durable=False):
                self._store.remove(self._unforgotten)
        except StoreFull:  # it takes room to delete, too; due() tries it again
            self._next_upkeep = self._ticks() + UPKEEP_SECONDS
            return
        self._unforgotten.clear()

    # --- where there is no room ------------------------------------------------------------

    def _drop_oldest(self, new: list[Kept]) -> list[Kept]:
        """Within a transaction: make room for what was just added."""
        lanes = self._lanes.values()
        events = sum(lane.waiting for lane in lanes) + len(new) - self._events_max
        size = sum(lane.bytes for lane in lanes) + sum(len(it.payload) for it in new)
        if events <= 0 and size <= self._bytes_max:
            return []
        dropped = self._store.oldest(events, size - self._bytes_max)
        self._store.remove(item.event_id for item in dropped)
        for item in dropped:
            for run in self._runs_of(item):
                self._store.add_run(run)
        return dropped

    def _runs_of(self, dropped: Kept) -> Iterator[Run]:
        """Yield what the server has to be told: of an event that tells of others, those too."""
        device_id = dropped.device_id
        found = OWN_ID.fullmatch(dropped.event_id.removeprefix(device_id))
        if found:
            yield Run(device_id, found[1], int(found[2]), int(found[3]), int(found[3]))
        else:  # an id from outside has no number: it can be counted, no more
            yield Run(device_id, "", 0, 1, 1)
        if b'"event_type":"outbox_dropped"' in dropped.payload:
            event = json.loads(dropped.payload)
            told = event.get("meta", {"salt": "", "boot": 0, "from": 1, "to": event["value"]})
            yield Run(device_id, told["salt"], told["boot"], told["from"], told["to"])

    def _tell_lost(self) -> None:
        """Make events of what was dropped, in the transaction that takes the note of it away."""
        runs = self._store.runs()
        size = sum(lane.bytes for lane in self._lanes.values()) + len(runs) * NOTE_BYTES
        if self.waiting() + len(runs) > self._events_max or size > self._bytes_max:
            self._next_upkeep = self._ticks() + UPKEEP_SECONDS
            return
        kept: list[Kept] = []
        sequences: dict[str, int] = {}
        for device_id, salt, boot, first, last in runs:
            meta = {"salt": salt, "boot": boot, "from": first, "to": last} if salt else None
            number = last - first + 1
            event = Event("outbox_dropped", number, None, NO_TIME, meta, device_id)
            kept.append(self._kept(event, None, sequences))
        try:
            self._keep(kept, lambda connection: self._store.remove_runs())
        except StoreFull:
            self._next_upkeep = self._ticks() + UPKEEP_SECONDS
            return
        self._sequences.update(sequences)
        self._has_lost = False


def log_rejected(rejected: Rejected) -> None:
    log.warning("rejected: %s %s: %s", rejected.event_id, rejected.reason, rejected.error)
