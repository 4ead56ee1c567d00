"""The devices of the benchmark: raw sockets, packets encoded beforehand.

What it does: publishes events with QoS 1 over one MQTT connection for each device, so many
at a time or so often as it is told, hears the ACKs, and measures. What it does not: steal the
core that it measures. While the rate is taken it counts ACKs without taking packets apart;
the event ids are looked for afterwards.

Invariant: what it calls heard are distinct event ids with a `stored` ACK, counted here at
the sender. A run that does not hear all that it sent raises.
"""

import json
import re
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

DEVICES = 50
# A device that hears nothing for so long gives up the run.
SILENCE_SECONDS_MAX = 30.0
# MQTT 3.1.1, section 2.3.1: packet ids are 16 bits, and not 0.
PACKET_ID_MAX = 65_535
STORED = b'"stored"'
_ACK = re.compile(rb'"event_id":\s*"([^"]+)"[^}]*?"status":\s*"stored"')


class FleetError(Exception):
    """An ACK did not come, or the broker ended a connection."""


class Publish(NamedTuple):
    """A packet ready to be sent: whose it is, its bytes, the ids of the events in it."""

    device: int
    packet: bytes
    event_ids: list[bytes]


def publishes(run: str, count: int, events_each: int = 1, devices: int = DEVICES) -> list[Publish]:
    """So many PUBLISH packets in turn for each device; with events_each > 1 of arrays.

    `run` makes the event ids unique. An event is about 200 bytes of JSON.
    """
    return [_publish(run, number, events_each, devices) for number in range(count)]


def _publish(run: str, number: int, events_each: int, devices: int) -> Publish:
    device = number % devices
    name = _name(device)
    ids = [f"{run}-{number}-{index}" for index in range(events_each)]
    events = [_event(name, event_id, number) for event_id in ids]
    payload = json.dumps(events if events_each > 1 else events[0]).encode()
    packet_id = number // devices % PACKET_ID_MAX + 1
    encoded = packet(f"qs/v1/{name}/events", packet_id, payload)
    return Publish(device, encoded, [event_id.encode() for event_id in ids])


def packet(
    topic: str, packet_id: int, payload: bytes, *, qos: int = 1, retain: bool = False
) -> bytes:
    """Return a PUBLISH; with QoS 0 it has no packet id."""
    body = _string(topic.encode()) + (packet_id.to_bytes(2, "big") if qos else b"") + payload
    return bytes([0x30 | qos << 1 | retain]) + _length(len(body)) + body


def _event(name: str, event_id: str, number: int) -> dict[str, object]:
    return {
        "schema": 1,
        "event_id": event_id,
        "device_id": name,
        "event_type": "temperature",
        "value": 15 + number % 200 / 10,
        "unit": "C",
        "ts_device": "2026-02-10T00:00:00Z",
        "meta": {"sensor": "dht22", "n": number},
    }


def _name(device: int) -> str:
    return f"esp32-{device:02}"


class Fleet:
    """The connected devices, for as long as a `with` block lasts."""

    def __init__(self, port: int, devices: int = DEVICES) -> None:
        self._port = port
        self.devices = devices
        self.cpu_seconds = 0.0  # that the devices themselves took in the latest closed loop
        self._sockets: list[socket.socket] = []
        self._devices: dict[int, int] = {}  # file descriptor to device
        self._poll = select.epoll()
        self._chunks: list[list[bytes]] = []  # what each device has heard
        self._tails: list[bytes] = []

    def __enter__(self) -> "Fleet":
        for device in range(self.devices):
            name = _name(device)
            sock = connect(self._port, f"benchmark-{name}", [f"qs/v1/{name}/acks"])
            self._sockets.append(sock)
            self._devices[sock.fileno()] = device
            self._poll.register(sock, select.EPOLLIN)
        return self

    def __exit__(self, *_: object) -> None:
        self._poll.close()
        for sock in self._sockets:
            sock.sendall(b"\xe0\x00")  # DISCONNECT
            sock.close()

    def closed_loop(
        self, packets: Sequence[Publish], outstanding: int, progress: Callable[[int], None]
    ) -> float:
        """Keep so many packets outstanding until all are ACKed; return the seconds it took.

        Of more devices than that, each leaves the next packet to another one.
        """
        self._begin()
        ready = self._queues(packets)
        expected = _count(packets)
        events_each = len(packets[0].event_ids)
        heard = [0] * self.devices
        total = 0
        cpu_before = time.process_time()
        began_at = time.perf_counter()
        for device, queue in enumerate(ready):
            self._send(device, queue, len(range(device, outstanding, self.devices)))
        while total < expected:
            for device in self._readable():
                count = self._hear(device)
                total += count
                heard[device] += count
                complete, heard[device] = divmod(heard[device], events_each)
                following = device
                if outstanding < self.devices:
                    following += outstanding
                    following = following if following < self.devices else device % outstanding
                self._send(following, ready[following], complete)
            progress(total)
        seconds = time.perf_counter() - began_at
        self.cpu_seconds = time.process_time() - cpu_before
        if missing := self._missing(packets):
            raise FleetError(f"no ACK for {len(missing)} events, such as {min(missing)!r}")
        return seconds

    def open_loop(
        self, packets: Sequence[Publish], per_second: float, progress: Callable[[int], None]
    ) -> list[float]:
        """Send each packet at its time, whatever comes back; return the latencies in seconds.

        Counted from when the packet was due, not from when it was sent: so a stall counts for
        every packet that it delays.
        """
        self._begin()
        due_at: dict[bytes, float] = {}
        latencies: list[float] = []
        began_at = time.perf_counter()
        sent = 0
        while len(latencies) < len(packets):
            next_at = began_at + sent / per_second
            now = time.perf_counter()
            if sent < len(packets) and now >= next_at:
                publish = packets[sent]
                due_at[publish.event_ids[0]] = next_at
                self._sockets[publish.device].sendall(publish.packet)
                sent += 1
                continue
            wait = next_at - now if sent < len(packets) else None
            for device in self._readable(wait, or_raise=sent == len(packets)):
                self._hear(device)
                now = time.perf_counter()
                whole = b"".join(self._chunks[device])
                found = list(_ACK.finditer(whole))
                latencies += [now - due_at.pop(match[1]) for match in found if match[1] in due_at]
                # What is behind the last ACK may be the beginning of the next.
                self._chunks[device] = [whole[found[-1].end() :]] if found else [whole]
            progress(len(latencies))
        return latencies

    def publish_all(self, packets: Sequence[Publish]) -> None:
        """Publish all and wait until the broker has each; nobody may be there to answer."""
        self._begin()
        for device, queue in enumerate(self._queues(packets)):
            pubacks = len(queue) * 4
            for start in range(0, len(queue), 500):
                self._sockets[device].sendall(b"".join(queue[start : start + 500]))
            received = 0
            while received < pubacks:
                received += len(self._receive(device))

    def hear_all(self, packets: Sequence[Publish], progress: Callable[[int], None]) -> float:
        """Hear an ACK for each; return the seconds until the last.

        Some may come twice: after a reconnect MQTT sends again what was not PUBACKed.
        """
        self._begin()
        expected = _count(packets)
        total = 0
        began_at = time.perf_counter()
        seconds = 0.0
        while total < expected:
            for device in self._readable():
                total += self._hear(device)
            seconds = time.perf_counter() - began_at
            progress(total)
            if total >= expected:
                expected = total + len(self._missing(packets))
        return seconds

    def hear_for(self, seconds: float) -> None:
        """Take in what comes meanwhile, if anything does."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for device in self._readable(left, or_raise=False):
                self._hear(device)

    def stored(self) -> set[bytes]:
        """Return the ids in the `stored` ACKs heard since the last events were sent."""
        return {key for chunks in self._chunks for key in _ACK.findall(b"".join(chunks))}

    @property
    def heard_bytes(self) -> int:
        return sum(len(chunk) for chunks in self._chunks for chunk in chunks)

    def _begin(self) -> None:
        self._chunks = [[] for _ in range(self.devices)]
        self._tails = [b""] * self.devices

    def _queues(self, packets: Sequence[Publish]) -> list[list[bytes]]:
        queues: list[list[bytes]] = [[] for _ in range(self.devices)]
        for publish in reversed(packets):  # so that the next one is the last
            queues[publish.device].append(publish.packet)
        return queues

    def _send(self, device: int, queue: list[bytes], count: int) -> None:
        if packets := queue[: -count - 1 : -1] if count else []:
            del queue[-count:]
            self._sockets[device].sendall(b"".join(packets))

    def _readable(
        self, wait_seconds: float | None = None, *, or_raise: bool = True
    ) -> Iterator[int]:
        ready = self._poll.poll(SILENCE_SECONDS_MAX if wait_seconds is None else wait_seconds)
        if not ready and or_raise:
            raise FleetError(f"no ACK for {SILENCE_SECONDS_MAX:.0f} s, and some are outstanding")
        return (self._devices[fileno] for fileno, _ in ready)

    def _hear(self, device: int) -> int:
        """Take in what has come; return how many ACKs it completes."""
        chunk = self._receive(device)
        self._chunks[device].append(chunk)
        text = self._tails[device] + chunk
        self._tails[device] = text[1 - len(STORED) :]
        return text.count(STORED)

    def _receive(self, device: int) -> bytes:
        chunk = self._sockets[device].recv(262_144)
        if not chunk:
            raise FleetError(f"the broker has ended the connection of {_name(device)}")
        return chunk

    def _missing(self, packets: Sequence[Publish]) -> set[bytes]:
        """Return the ids that were sent and not heard of."""
        return {key for publish in packets for key in publish.event_ids} - self.stored()


def _count(packets: Sequence[Publish]) -> int:
    return sum(len(publish.event_ids) for publish in packets)


def connect(port: int, client_id: str, topics: Sequence[str], *, qos: int = 0) -> socket.socket:
    """Connect to the broker with a clean session and no keepalive, and subscribe."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=SILENCE_SECONDS_MAX)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # MQTT 3.1.1, section 3.1.
        body = _string(b"MQTT") + b"\x04\x02\x00\x00" + _string(client_id.encode())
        sock.sendall(b"\x10" + _length(len(body)) + body)
        _expect(sock, b"\x20\x02\x00\x00")
        granted = bytes([qos])
        body = b"\x00\x01" + b"".join(_string(topic.encode()) + granted for topic in topics)
        sock.sendall(b"\x82" + _length(len(body)) + body)
        _expect(sock, bytes([0x90, 2 + len(topics), 0, 1]) + granted * len(topics))
    except BaseException:
        sock.close()
        raise
    return sock


def _expect(sock: socket.socket, wanted: bytes) -> None:
    if (got := sock.recv(len(wanted), socket.MSG_WAITALL)) != wanted:
        raise FleetError(f"the broker answers {got.hex()} instead of {wanted.hex()}")


def _string(text: bytes) -> bytes:
    return len(text).to_bytes(2, "big") + text


def _length(number: int) -> bytes:
    """MQTT 3.1.1, section 2.2.3: seven bits a byte, lowest first."""
    encoded = bytearray()
    while True:
        number, low = divmod(number, 128)
        encoded.append(low | (0x80 if number else 0))
        if not number:
            return bytes(encoded)
