"""A device, as the tests need it: it publishes, and hears what comes back.

What it does: keeps everything that it hears, and waits for it; connects again, and sends again
what the broker has not taken. It speaks MQTT 3.1.1 by itself, as many at once and as cheaply as
the benchmark's devices: tests send so much that with paho they would measure paho. What it does
not: know what is in the database; what it counts, it counts at the sender.

Invariant: `acks` has each ACK in the order it came, arrays taken apart; `sent` has every
event that was ever handed to MQTT, whatever became of it.
"""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

from benchmark.fleet import PACKET_ID_MAX, FleetError, connect, packet
from ingester.mqtt import OtherPacket, PacketReader, Puback, Publish, puback

# MQTT 3.1.1, sections 3.3.1.1, 3.5, 3.6, 3.7 and 3.14.
DUP = 0x08
PUBREC, PUBREL, PUBCOMP = 0x50, b"\x62\x02", 0x70
DISCONNECT = b"\xe0\x00"
READ_BYTES_MAX = 262_144
RECONNECT_SECONDS = 0.1
LEAVE_SECONDS_MAX = 5.0


def event(number: int | str, device_id: str = "device-1", **fields: Any) -> dict[str, Any]:
    """A valid event; `fields` replace or add."""
    return {
        "schema": 1,
        "event_id": f"{device_id}-{number}",
        "device_id": device_id,
        "event_type": "temperature",
        "value": 21.5,
    } | fields


class Device:
    """A connected MQTT client that hears all ACKs and dead letters."""

    def __init__(
        self,
        port: int,
        device_id: str = "device-1",
        *,
        root: str = "qs/v1",
        hears: str = "+",
        hears_dead_letters: bool = True,
    ) -> None:
        """`hears` is whose ACKs: each device's, or those of one id (for when there are many)."""
        self.device_id = device_id
        self.root = root
        self.messages: list[tuple[str, bytes]] = []
        self.acks: list[dict[str, Any]] = []
        self.dead_letters: list[dict[str, Any]] = []
        self.sent: dict[str, dict[str, Any]] = {}
        self.heard_at: dict[str, float] = {}  # when each was first heard to be stored
        self._port = port
        self._topics = [f"{root}/{hears}/acks"]
        if hears_dead_letters:
            self._topics.append(f"{root}/deadletter")
        self._changed = threading.Condition()  # guards all of the following, too
        self._connected = False
        self._leaving = False
        self._packet_id = 0
        self._not_taken: dict[int, bytes] = {}  # by packet id: what was sent with QoS 1 or 2
        self._to_write: list[bytes] = []
        self._wake, self._woken = socket.socketpair()

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 15
        while (sock := self._connect()) is None:  # the broker is being restarted
            assert time.monotonic() < deadline, "the broker takes no connection"
            time.sleep(0.05)
        self._thread = threading.Thread(target=self._run, args=[sock])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._leaving = True
            self._write(DISCONNECT)
        self._wake.send(b"!")
        self._thread.join()
        self._wake.close()
        self._woken.close()

    def publish(
        self, payload: object, *, topic: str | None = None, qos: int = 1, retain: bool = False
    ) -> None:
        """Publish bytes as they are, anything else as JSON; wait until the broker has it.

        With QoS 0 nobody says so, and it waits for nothing.
        """
        number = self.send(payload, topic=topic, qos=qos, retain=retain)
        self.wait(lambda: number not in self._not_taken, "the broker to take it")

    def send(
        self, payload: object, *, topic: str | None = None, qos: int = 1, retain: bool = False
    ) -> int:
        """Publish and wait for nothing; return the packet id, which is 0 with QoS 0."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        topic = topic or f"{self.root}/{self.device_id}/events"
        with self._changed:
            if isinstance(payload, dict) and "event_id" in payload:
                self.sent[payload["event_id"]] = payload
            number = self._next_packet_id() if qos else 0
            data = packet(topic, number, body, qos=qos, retain=retain)
            if qos:
                self._not_taken[number] = data
            self._write(data)
        return number

    def wait_taken(self, timeout: float = 15) -> None:
        """Wait until the broker has all that was sent with QoS 1 or 2."""
        self.wait(lambda: not self._not_taken, "the broker to take all", timeout)

    def ask(self, payload: object, *, qos: int = 1, topic: str | None = None) -> dict[str, Any]:
        """Publish one event; return its ACK."""
        before = len(self.acks)
        self.publish(payload, qos=qos, topic=topic)
        self.wait(lambda: len(self.acks) > before, "an ACK")
        return self.acks[before]

    def deliver(self, events: Iterable[dict[str, Any]], timeout: float = 60) -> None:
        """Send events, again every 2 s, until each has its ACK: what a real device does."""
        waiting = {str(item["event_id"]): item for item in events}
        wanted = set(waiting)
        deadline = time.monotonic() + timeout
        while waiting:
            assert time.monotonic() < deadline, f"no ACK for {len(waiting)} events"
            for item in waiting.values():
                self.send(item)
            self._wait(lambda: self.heard_at.keys() >= wanted, 2)
            waiting = {k: item for k, item in waiting.items() if k not in self.heard_at}

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 15) -> None:
        """Wait until the condition holds; it is looked at whenever something has come."""
        if not self._wait(condition, timeout):
            heard = f"heard {len(self.acks)} ACKs and {len(self.dead_letters)} dead letters"
            raise AssertionError(
                f"waited {timeout} s for {what}; {heard}, the last: {self.messages[-3:]}"
            )

    def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def _next_packet_id(self) -> int:
        while True:
            self._packet_id = self._packet_id % PACKET_ID_MAX + 1
            if self._packet_id not in self._not_taken:
                return self._packet_id

    def _write(self, data: bytes) -> None:
        """Hand it to the thread; without a connection only what `_not_taken` has is sent later."""
        if self._connected:
            self._to_write.append(data)
            if len(self._to_write) == 1:
                self._wake.send(b"!")

    # --- in a thread of its own ----------------------------------------------------------

    def _run(self, sock: socket.socket) -> None:
        while True:
            with sock, contextlib.suppress(OSError):
                self._serve(sock)
                return
            with self._changed:
                self._connected = False
                self._to_write.clear()
            while (again := self._connect()) is None:
                if self._leaving:
                    return
                time.sleep(RECONNECT_SECONDS)
            sock = again

    def _connect(self) -> socket.socket | None:
        try:
            sock = connect(self._port, "", self._topics, qos=1)
        except (OSError, FleetError):
            return None
        sock.setblocking(False)
        with self._changed:
            self._connected = True
            not_taken = self._not_taken.values()
            self._to_write = [bytes([data[0] | DUP]) + data[1:] for data in not_taken]
        return sock

    def _serve(self, sock: socket.socket) -> None:
        """Write and read until it is to leave, and all is written."""
        reader, unwritten = PacketReader(), memoryview(b"")
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        while unwritten or self._to_write or not self._leaving:
            if not unwritten:
                unwritten = self._take()
            with contextlib.suppress(BlockingIOError):
                unwritten = unwritten[sock.send(unwritten) :]
            poll.register(sock, select.POLLIN | (select.POLLOUT if unwritten else 0))
            ready = dict(poll.poll(LEAVE_SECONDS_MAX * 1000 if self._leaving else None))
            if not ready:
                return  # the broker does not take it
            if self._woken.fileno() in ready:
                self._woken.recv(READ_BYTES_MAX)
            if ready.get(sock.fileno(), 0) & ~select.POLLOUT:
                self._hear(reader, sock.recv(READ_BYTES_MAX))

    def _take(self) -> memoryview:
        with self._changed:
            data = b"".join(self._to_write)
            self._to_write.clear()
        return memoryview(data)

    def _hear(self, reader: PacketReader, data: bytes) -> None:
        if not data:
            raise ConnectionError("the broker has ended the connection")
        now = time.perf_counter()
        with self._changed:
            for item in reader.packets(data):
                if isinstance(item, Publish):
                    self._hear_message(item.topic, item.payload, now)
                    self._to_write.append(puback(item.packet_id))
                elif isinstance(item, Puback):
                    self._not_taken.pop(item.packet_id, None)
                elif isinstance(item, OtherPacket) and item.data[0] == PUBREC:
                    self._to_write.append(PUBREL + item.data[2:])
                elif isinstance(item, OtherPacket) and item.data[0] == PUBCOMP:
                    self._not_taken.pop(int.from_bytes(item.data[2:], "big"), None)
            self._changed.notify_all()

    def _hear_message(self, topic: str, payload: bytes, now: float) -> None:
        self.messages.append((topic, payload))
        body = json.loads(payload)
        if topic.endswith("/deadletter"):
            self.dead_letters.append(body)
            return
        for ack in body if isinstance(body, list) else [body]:
            self.acks.append(ack)
            if ack["status"] == "stored":
                self.heard_at.setdefault(ack["event_id"], now)
