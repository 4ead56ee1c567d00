"""A line between ingester and broker that notes each MQTT packet, and can be a bad one.

What it does: forwards as the proxy does, in pieces of given sizes and cut after given
numbers of bytes if asked, and says which packets passed, in their order. What it does not:
note what never reached the other side, or know more of MQTT 3.1.1 than the tests ask for.

Invariant: within one Line a packet is noted behind whatever caused it: what answers it
cannot have been read before it was forwarded.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.support.proxy import Connection, Direction, Flow, Proxy

# MQTT 3.1.1, section 2.2.1: the packet types that are looked at.
PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 3, 4, 5, 6, 7
# Pieces sent at one go, each by a send() of its own.
PIECES = 50
ENDLESS = 1 << 40


class Packet(NamedTuple):
    """A packet; the mid is that of a PUBLISH or of what answers one, the rest a PUBLISH's."""

    direction: Direction
    kind: int
    mid: int = 0  # 0: none, as with QoS 0
    topic: str = ""
    payload: bytes = b""


class Line:
    """What passed over one connection, and how much may yet pass to the client."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.packets: list[Packet] = []
        self._partial: dict[Direction, bytearray] = {
            "to_server": bytearray(),
            "to_client": bytearray(),
        }

    def add(self, direction: Direction, data: bytes) -> None:
        """Note bytes that have passed."""
        partial = self._partial[direction]
        partial += data
        while body := _body(partial):
            self.packets.append(_packet(direction, partial[0], bytes(partial[slice(*body)])))
            del partial[: body[1]]

    def passed(self, direction: Direction, kind: int) -> list[Packet]:
        """Return the packets of this kind that passed in this direction."""
        return [item for item in self.packets if (item.direction, item.kind) == (direction, kind)]

    def check(self) -> None:
        """Check that each PUBACK or PUBREC has a message of this line, and is behind its ACKs.

        For messages that hold nothing but valid events, which no other message repeats.
        """
        delivered: dict[int, set[str]] = {}
        acked: set[str] = set()
        for packet in self.packets:
            if packet.kind == PUBLISH and packet.direction == "to_client" and packet.mid:
                delivered[packet.mid] = _event_ids(packet.payload)
            elif packet.kind == PUBLISH and packet.topic.endswith("/acks"):
                acked |= _event_ids(packet.payload)
            elif packet.kind in (PUBACK, PUBREC) and packet.direction == "to_server":
                assert packet.mid in delivered, f"packet id {packet.mid} is from elsewhere"
                early = delivered.pop(packet.mid) - acked
                assert not early, f"a PUBACK or PUBREC came before the ACKs of {early}"


def _body(data: bytearray) -> tuple[int, int] | None:
    """Return where the body of the first packet begins and ends; None if it is not all here."""
    length, shift = 0, 0
    for position in range(1, len(data)):  # MQTT 3.1.1, section 2.2.3
        length |= (data[position] & 127) << shift
        shift += 7
        if data[position] < 128:
            begin = position + 1
            return (begin, begin + length) if begin + length <= len(data) else None
    return None


def _packet(direction: Direction, head: int, body: bytes) -> Packet:
    kind, qos = head >> 4, head >> 1 & 3
    if kind in (PUBACK, PUBREC, PUBREL, PUBCOMP):
        return Packet(direction, kind, int.from_bytes(body, "big"))
    if kind != PUBLISH:
        return Packet(direction, kind)
    end = 2 + int.from_bytes(body[:2], "big")
    topic, rest = body[2:end].decode(), body[end:]
    mid = int.from_bytes(rest[:2], "big") if qos else 0
    return Packet(direction, kind, mid, topic, rest[2:] if qos else rest)


def _event_ids(payload: bytes) -> set[str]:
    document = json.loads(payload)
    items = document if isinstance(document, list) else [document]
    return {str(item["event_id"]) for item in items}


class Tap(Proxy):
    """A proxy that notes the packets.

    `pieces`: the sizes in which to forward to the client. `limits`: after how many bytes to
    the client to cut each connection; what comes after the last of them is not cut.
    """

    def __init__(
        self,
        server_port: int,
        pieces: Iterator[int] | None = None,
        limits: Sequence[int] = (),
    ) -> None:
        super().__init__(server_port)
        self.lines: list[Line] = []
        self._pieces = pieces
        self._limits = itertools.chain(limits, itertools.repeat(ENDLESS))
        self._of: dict[Flow, tuple[Connection, Line]] = {}

    def check(self) -> None:
        """Check each line; see Line.check()."""
        for line in self.lines:
            line.check()

    def _on_client(self, ready: int) -> None:
        known = len(self._connections)
        super()._on_client(ready)
        for connection in self._connections[known:]:
            self.lines.append(Line(next(self._limits)))
            for flow in connection.flows():
                self._of[flow] = connection, self.lines[-1]

    def _write(self, flow: Flow) -> None:
        connection, line = self._of[flow]
        if flow.direction == "to_server":
            self._forward(flow, line, len(flow.buffer))
            return
        for size in itertools.islice(self._pieces or iter([len(flow.buffer)]), PIECES):
            with contextlib.suppress(BlockingIOError):
                while len(flow.buffer) < size and (more := flow.source.recv(size)):
                    flow.buffer += more
            self._forward(flow, line, min(size, line.left))
            if line.left == 0:
                self._close(connection, reset=False)
            if line.left == 0 or not flow.buffer:
                return

    def _forward(self, flow: Flow, line: Line, size: int) -> None:
        sent = flow.sink.send(flow.buffer[:size])
        line.add(flow.direction, bytes(flow.buffer[:sent]))
        del flow.buffer[:sent]
        if flow.direction == "to_client":
            line.left -= sent
