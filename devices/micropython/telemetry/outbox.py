"""The device's half of the promise: an event is kept and sent until the ingester answers it.

What it does: gives each event its id, holds it in memory and, if no answer comes soon, in the
store; sends the oldest first, in batches, again and again; forgets an event when its ACK
comes, and never otherwise, unless there is no room: then it counts, and tells the server.
What it does not: connect, or wait. An adapter calls connected(), loop() and on_message().

Invariant: an event is in one of two places, `_sent` (what is on its way) or `_queue`
(behind it), or only on the flash, between them. What is on the flash was added before
anything in `_queue`.
"""

import os
from binascii import crc32
from collections import OrderedDict
from json import loads
from time import gmtime, ticks_add, ticks_diff, ticks_ms, ticks_us, time  # type: ignore

from telemetry.ack import answers
from telemetry.event import event_bytes, event_id_of, is_device_id
from telemetry.store import FolderStore

TYPE_CHECKING = False
if TYPE_CHECKING:  # MicroPython has no such modules
    from collections.abc import Callable

ANSWER_BYTES = 200  # of one event in an ACK, beyond the event id and the device id
BATCH_MAX = 32
NO_TIME = 0  # what the clock shows that was never set
RESEND_MS = 10_000
RESEND_MS_MAX = 300_000
SILENT_MAX = 3  # sent so often without an answer, a connection is not trusted any more
SAVE_AGAIN_MS = 10_000  # after the flash refused
RUNS_MAX = 8  # of lost events, that are remembered until they are told
NOTE_BYTES = 400  # an event that tells of one such run has less
EPOCH_MS = 946_684_800_000 if gmtime(0)[0] == 2000 else 0  # some boards count from 2000


def unix_ms_now() -> int:
    """Return the milliseconds since 1970 by the device's clock; boards count seconds."""
    return int(time() * 1000) + EPOCH_MS


class Waiting:
    """An event that is not answered; `segment` is where it is kept, 0 if it is not."""

    def __init__(self, event_id: str, data: bytes, segment: int, added_ms: int) -> None:
        self.event_id = event_id
        self.data = data
        self.segment = segment
        self.added_ms = added_ms


def payload_of(batch: list[bytes]) -> bytes:
    """Return the message that holds these events."""
    return batch[0] if len(batch) == 1 else b"[" + b",".join(batch) + b"]"


def random_bits(bits: int) -> int:
    """Return some random bits; where the hardware has no entropy yet, at least the board's."""
    seed = os.urandom(8) + str(ticks_us()).encode()
    try:
        from machine import unique_id

        seed += unique_id()
    except ImportError:
        pass
    return crc32(seed) & ((1 << bits) - 1)


class Telemetry:
    """One device's outbox.

    `store`: a FolderStore, or None for memory alone. `hold_ms`: how long an event may wait for
    its answer before it is written to the store; 0: it is written before it is sent.
    `memory_bytes_max`: of events in memory. `refuse_newest`: where there is no room the new
    event gives way, and not the oldest. `receive_bytes_max`: the largest packet that the
    MQTT client can take; the answers to a batch have to fit. `send_bytes_max`: likewise.
    `clock` gives milliseconds since 1970, `ticks` milliseconds as ticks_ms() does.
    """

    def __init__(
        self,
        device_id: str,
        store: FolderStore | None = None,
        hold_ms: int = 30_000,
        memory_bytes_max: int = 8_192,
        refuse_newest: bool = False,
        receive_bytes_max: int = 2_048,
        send_bytes_max: int = 2_048,
        clock: Callable[[], int] = unix_ms_now,
        ticks: Callable[[], int] = ticks_ms,
        topic_root: str = "qs/v1",
    ) -> None:
        if not is_device_id(device_id):
            raise ValueError("device_id: expected 1 to 64 characters of A-Z a-z 0-9 _ . : -")
        self.device_id = device_id
        self.events_topic = "%s/%s/events" % (topic_root, device_id)
        self.acks_topic = "%s/%s/acks" % (topic_root, device_id)
        self.client_id = device_id  # for the MQTT session; from begin() on it is this board's own
        self._store = store
        self._hold_ms = hold_ms
        self._memory_bytes_max = max(memory_bytes_max, 2 * send_bytes_max)
        self._refuse_newest = refuse_newest
        self._send_bytes_max = send_bytes_max
        self._receive_bytes_max = receive_bytes_max
        self._batch = BATCH_MAX  # fewer where no answer comes
        self._sent: list[Waiting] = []
        self._queue: list[Waiting] = []
        self._bytes = 0  # of what is in both
        self._in_flight = 0  # how many of `_sent` the last message held
        self._lost: list[tuple[str, int, int, int]] = []  # salt, boot, from, to; not told yet
        self._told: list[tuple[str, int, int, int]] = []  # told by events that are not kept yet
        self._salt = ""
        self._boot = 1
        self._sequence = 0
        self._dropped = 0
        self._refused = 0
        self._connected = False
        self._answered = False  # since connected(): the way to the database is open
        self._silent = 0  # how often it was sent without an answer
        self._next_send = 0  # when what is in flight is sent again
        self._next_save: int | None = None
        self._doubted = 0  # at how many silent sends a new connection was asked for
        self._is_reconnect_wanted = False
        self._ticks = ticks
        self._clock = clock
        self.on_stored: Callable[[str], object] = self._ignore
        self.on_rejected: Callable[[str, str], object] = self._ignore
        self.on_kept: Callable[[str], object] = self._ignore
        self.on_dropped: Callable[[str], object] = self._ignore

    def _ignore(self, event_id: str, reason: str = "") -> None:
        pass

    def begin(self) -> None:
        """Read the store, and make the ids of this boot ones that were never there before."""
        self._salt = "%08x" % random_bits(32)
        if self._store is not None:
            self._store.begin(self._salt)
            self._salt, self._boot = self._store.salt, self._store.boot
            self._lost = self._store.lost
        # Two boards with one device id would throw each other out without the salt.
        self.client_id = self.device_id + "-" + self._salt

    # --- what the program calls ----------------------------------------------------------

    def add(
        self,
        event_type: str,
        value: object = None,
        unit: str | None = None,
        unix_ms: int | None = None,
        meta: object = None,
    ) -> str | None:
        """Put an event into the outbox; return its id, or None if it cannot be taken.

        It is refused if the ingester would reject it, if it is too large to be sent, or if
        there is no room and the newest gives way. Without a time of its own it gets the
        clock's, if that was set; with 0 none. It does not send. Only where memory is full it
        writes to the flash.
        """
        event_id = "%s-%s-%d-%d" % (self.device_id, self._salt, self._boot, self._sequence + 1)
        if unix_ms is None:
            unix_ms = self._clock()
        data = event_bytes(event_id, self.device_id, event_type, value, unit, unix_ms, meta)
        if data is None or len(data) > self._send_bytes_max:
            self._refused += 1
            return None
        self._sequence += 1
        if not self._make_room(data):
            self._drop(event_id, data)
            return None
        self._queue.append(Waiting(event_id, data, 0, self._ticks()))
        self._bytes += len(data)
        return event_id

    def loop(self, publish: Callable[[str, bytes], bool]) -> None:
        """Do what is due: write to the flash, send. Call it often; it does not wait.

        `publish(topic, payload)` hands a message to the MQTT client, and returns whether it
        took it.
        """
        now = self._ticks()
        if self._is_save_due(now):
            self.save()
        if not self._connected:
            return
        if self._answered and self._lost:
            self._tell_lost()
        if self._in_flight:
            if ticks_diff(now, self._next_send) < 0:
                return
            if self._silent % SILENT_MAX == 0 and self._doubted != self._silent:
                self._doubted = self._silent
                self._is_reconnect_wanted = True
                return
        self._send(publish, now)

    def save(self) -> bool:
        """Write to the flash what is in memory alone; tell whether everything is safe now."""
        store = self._store
        self._next_save = None
        if store is None:
            self._told = []
            return not self.waiting()
        while True:
            unkept = [item for item in self._sent if not item.segment]
            are_read = len(unkept)
            unkept += self._queue
            if not unkept:
                self._erase_told(store)
                return True
            if store.is_full(unkept[0].data):
                if self._refuse_newest:
                    break
                self._drop_segment(store)
                continue
            count, segment = store.append([item.data for item in unkept], are_read)
            if not count:
                break
            for item in unkept[:count]:
                item.segment = segment
            for item in self._queue[: max(0, count - are_read)]:
                self._bytes -= len(item.data)
            del self._queue[: max(0, count - are_read)]
            for item in unkept[:count]:
                self.on_kept(item.event_id)
        self._next_save = ticks_add(self._ticks(), SAVE_AGAIN_MS)
        return False

    def waiting(self) -> int:
        """Return how many events are not answered."""
        return len(self._queue) + sum(not item.segment for item in self._sent) + self.kept()

    def kept(self) -> int:
        """Return how many of them would survive a power cut."""
        return self._store.waiting() if self._store is not None else 0

    def dropped(self) -> int:
        """Return how many events were dropped since begin()."""
        return self._dropped

    def refused(self) -> int:
        """Return how many add() did not take because they could never be stored."""
        return self._refused

    def damaged(self) -> int:
        """Return how many files and records of the store could not be read."""
        return self._store.damaged if self._store is not None else 0

    def store_errors(self) -> int:
        """Return how many calls the flash refused."""
        return self._store.errors if self._store is not None else 0

    def sleep_allowed(self) -> bool:
        """Tell whether nothing is lost if the memory is: all is answered or on the flash."""
        return self.waiting() == self.kept()

    # --- what the adapter calls ----------------------------------------------------------

    def connected(self) -> None:
        """Note a new connection, on which acks_topic is subscribed."""
        self._connected = True
        self._answered = False
        self._in_flight = 0

    def disconnected(self) -> None:
        """Note that the connection is gone."""
        self._connected = False

    def reconnect_wanted(self) -> bool:
        """Tell whether the connection seems dead, as nothing is answered. Asks once."""
        is_wanted, self._is_reconnect_wanted = self._is_reconnect_wanted, False
        return is_wanted

    def on_message(self, topic: str, payload: bytes) -> bool:
        """Take a message; return whether it was for the outbox."""
        if topic != self.acks_topic:
            return False
        for event_id, reason in answers(self.device_id, payload):
            for item in self._sent:
                if item.event_id == event_id:
                    # Told first: if the power goes in between, it is told twice and not never.
                    if reason is None:
                        self.on_stored(event_id)
                    else:
                        self.on_rejected(event_id, reason)
                    self._forget(item)
                    break
        return True

    # --- inside -------------------------------------------------------------------------

    def _take(self, item: Waiting) -> None:
        if item in self._sent[: self._in_flight]:
            self._in_flight -= 1
        self._sent.remove(item)
        self._bytes -= len(item.data)

    def _forget(self, item: Waiting) -> None:
        if item not in self._sent:
            return  # a callback made room
        self._take(item)
        self._answered = True
        self._silent = self._doubted = 0
        self._batch = BATCH_MAX
        if item.segment and self._store is not None:
            self._store.answered(item.segment)

    def _is_save_due(self, now: int) -> bool:
        if self._store is None:
            return False
        if self._next_save is not None:  # the flash refused before
            return bool(ticks_diff(now, self._next_save) >= 0)
        for item in self._sent:
            if not item.segment:
                return bool(ticks_diff(now, item.added_ms) >= self._hold_ms)
        return bool(self._queue) and ticks_diff(now, self._queue[0].added_ms) >= self._hold_ms

    def _fill(self) -> None:
        """Put into `_sent` what is next, from the flash first."""
        size = 0
        for item in self._sent:
            size += len(item.data)
        store = self._store
        while len(self._sent) < BATCH_MAX and size < self._send_bytes_max:
            if store is not None and not store.all_read():
                for segment, data in store.read(
                    BATCH_MAX - len(self._sent), self._send_bytes_max - size
                ):
                    size += len(data)
                    self._bytes += len(data)
                    self._sent.append(Waiting(event_id_of(data) or "", data, segment, 0))
            elif self._queue:
                size += len(self._queue[0].data)
                self._sent.append(self._queue.pop(0))
            else:
                return

    def _next_batch(self) -> list[bytes]:
        """Return the first events of `_sent` that fit, and whose answers do; at least one."""
        batch: list[bytes] = []
        size, answer_size = 1, 2
        for item in self._sent[: self._batch]:
            size += len(item.data) + 1
            answer_size += len(item.event_id) + len(self.device_id) + ANSWER_BYTES
            if batch and (size > self._send_bytes_max or answer_size > self._receive_bytes_max):
                break
            batch.append(item.data)
        return batch

    def _send(self, publish: Callable[[str, bytes], bool], now: int) -> None:
        self._fill()
        if not self._sent:
            return
        batch = self._next_batch()
        if not publish(self.events_topic, payload_of(batch)):
            return
        self._in_flight = len(batch)
        delay = min(RESEND_MS << min(self._silent, 6), RESEND_MS_MAX)
        self._next_send = ticks_add(now, delay // 2 + random_bits(16) * delay // 65_536)
        if self._silent:
            # Perhaps the answer is too large for the way back: fewer are answered shorter.
            self._batch = max(1, len(batch) // 2)
        self._silent += 1

    # --- where there is no room -----------------------------------------------------------

    def _make_room(self, data: bytes) -> bool:
        if self._bytes + len(data) <= self._memory_bytes_max:
            return True
        if self._next_save is None and self._store is not None:
            self.save()
        while self._bytes + len(data) > self._memory_bytes_max:
            if self._refuse_newest or not self._queue:
                return False
            oldest = self._queue.pop(0)  # what is on its way may be stored already
            self._bytes -= len(oldest.data)
            self._drop(oldest.event_id, oldest.data)
        return True

    def _drop_segment(self, store: FolderStore) -> None:
        """Give up the oldest events on the flash."""
        number, records, read_count = store.oldest()
        waiting = []
        for item in self._sent[:]:
            if item.segment == number:
                self._take(item)
                waiting.append(item.data)
        for data in waiting + records[read_count:]:  # what was read and has gone is answered
            self._drop(event_id_of(data) or "", data)
        store.drop(number, self._told + self._lost)

    def _drop(self, event_id: str, data: bytes) -> None:
        self._dropped += 1
        _, salt, boot, sequence = event_id.rsplit("-", 3)
        self._add_run(salt, int(boot), int(sequence), int(sequence))
        if b'"event_type":"outbox_dropped"' in data:  # what it tells is to be told again
            told = loads(data)["meta"]
            self._add_run(told["salt"], told["boot"], told["from"], told["to"])
        self.on_dropped(event_id)

    def _add_run(self, salt: str, boot: int, first: int, last: int) -> None:
        for index, run in enumerate(self._lost):
            if run[:2] == (salt, boot) and run[3] == first - 1:
                self._lost[index] = (salt, boot, run[2], last)
                return
        if len(self._lost) == RUNS_MAX:
            del self._lost[0]
        self._lost.append((salt, boot, first, last))

    def _tell_lost(self) -> None:
        """Make events of what was dropped, and keep them before the note of it is erased."""
        if self._bytes + len(self._lost) * NOTE_BYTES > self._memory_bytes_max:
            return
        told, self._lost = self._lost, []
        self._told += told
        for salt, boot, first, last in told:
            meta = OrderedDict((("salt", salt), ("boot", boot), ("from", first), ("to", last)))
            self.add("outbox_dropped", last - first + 1, None, NO_TIME, meta)
        self.save()

    def _erase_told(self, store: FolderStore) -> None:
        if self._told:
            self._told = []
            store.lost = self._lost
            store.save_state()
