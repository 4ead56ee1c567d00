"""The least that one Python thread can do for an event: a bound for what the ingester can reach.

    python -m benchmark.least least            the least
    python -m benchmark.least least-qos1       and ACKs with QoS 1, as the contract has them
    python -m benchmark.least least-checked    and each event checked, as the contract has it

What it does: takes packets apart, takes the fields out by the ingester's pattern, inserts a batch
by one prepared statement, and answers and PUBACKs it by one send, with the same rows and ACKs. What
it never does: tell a repeated event from a conflict, keep a dead letter, read while the database
works, bound what it holds, count, have a deadline, or connect again.

Invariant: an ACK is sent only after the row is committed, and the PUBACK behind it.
"""

import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable
from datetime import UTC
from typing import Any, cast

from benchmark.plain import connect
from ingester.event import Event, decode
from ingester.pattern import Fields, recognise

BATCH_MAX = 500
READ_BYTES_MAX = 262_144
# MQTT 3.1.1, sections 3.1, 3.3, 3.4, 3.8 and 3.9.
CONNECT, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 0x10, 0x30, 0x40, 0x82, 0x90
QOS_1 = 0x02
PUBACK_HEAD = bytes([PUBACK, 2])
PACKET_ID_MAX = 65_535
COLUMNS = {
    "event_id": "text",
    "device_id": "text",
    "schema": "int",
    "event_type": "text",
    "value_num": "float8",
    "unit": "text",
    "ts_device": "timestamptz",
    "meta": "jsonb",
}
ARRAYS = ", ".join(f"${n}::{name}[]" for n, name in enumerate(COLUMNS.values(), 1))
PREPARE = (
    f"PREPARE least AS INSERT INTO events ({', '.join(COLUMNS)}) SELECT * FROM unnest({ARRAYS})"
    " ON CONFLICT (event_id) DO NOTHING RETURNING event_id"
)
EXECUTE = f"EXECUTE least ({', '.join(['%s'] * len(COLUMNS))})"
ACK = '{"schema": 1, "event_id": "%s", "device_id": "%s", "status": "stored"}'

# By name: whether ACKs have QoS 1, and whether events are checked.
STEPS = {"least": (False, False), "least-qos1": (True, False), "least-checked": (True, True)}
Found = tuple[list[Fields], bool]  # events, are they an array
Message = tuple[bytes, bytes, list[Fields], bool]  # topic, packet id, and the same


class Least:
    """The session, and what it is not done with."""

    def __init__(self, name: str) -> None:
        is_qos_1, is_checked = STEPS[name]
        self._find: Callable[[bytes, bytes], Found] = checked if is_checked else recognised
        self._packet_ids = itertools.cycle(range(1, PACKET_ID_MAX + 1)) if is_qos_1 else None
        self._unconfirmed: set[bytes] = set()
        self._waiting: list[Message] = []
        self._sock = socket.create_connection(
            (os.environ["MQTT_HOST"], int(os.environ["MQTT_PORT"]))
        )
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Kept, and without a keep-alive.
        session = text(b"MQTT") + b"\x04\x00\x00\x00" + text(f"homelab-{name}".encode())
        subscription = b"\x00\x01" + text(b"qs/v1/+/events") + b"\x01"
        self._sock.sendall(packet(CONNECT, session) + packet(SUBSCRIBE, subscription))

    def run(self, cursor: Any) -> None:
        """Store and answer until the broker ends the connection."""
        rest = b""
        while data := self._sock.recv(READ_BYTES_MAX):
            rest = self._take_apart(rest + data)
            while self._waiting:
                batch = self._waiting[:BATCH_MAX]
                del self._waiting[:BATCH_MAX]
                store(cursor, [event for _, _, events, _ in batch for event in events])
                self._sock.sendall(b"".join([self._answer(*message) for message in batch]))

    def _take_apart(self, data: bytes) -> bytes:
        """Add what was published to what waits; return the beginning of what has not come whole."""
        begin, size = 0, len(data)
        while begin + 2 <= size:
            length, body = data[begin + 1], begin + 2
            if length > 0x7F:  # two bytes: no event here needs more
                if body == size:
                    break
                length, body = length & 0x7F | data[body] << 7, body + 1
            end = body + length
            if end > size:
                break
            kind = data[begin] & 0xF0
            if kind == PUBLISH:
                topic_end = body + 2 + (data[body] << 8 | data[body + 1])
                topic, packet_id = data[body + 2 : topic_end], data[topic_end : topic_end + 2]
                found = self._find(topic, data[topic_end + 2 : end])
                self._waiting.append((topic, packet_id, *found))
            elif kind == PUBACK:
                self._unconfirmed.discard(data[body:end])
            elif kind == SUBACK:
                print("ready", flush=True)
            begin = end
        return data[begin:]

    def _answer(
        self, topic: bytes, packet_id: bytes, events: list[Fields], is_array: bool
    ) -> bytes:
        """Return the ACK and the PUBACK."""
        acks = ", ".join([ACK % event[:2] for event in events])
        body = (f"[{acks}]" if is_array else acks).encode()
        head = text(topic.removesuffix(b"events") + b"acks")
        if self._packet_ids is None:
            return packet(PUBLISH, head + body) + PUBACK_HEAD + packet_id
        own_id = next(self._packet_ids).to_bytes(2, "big")
        self._unconfirmed.add(own_id)
        return packet(PUBLISH | QOS_1, head + own_id + body) + PUBACK_HEAD + packet_id


def recognised(_topic: bytes, payload: bytes) -> Found:
    """Return the events of a payload as they are."""
    if not (found := recognise(payload)):
        raise ValueError(f"not as the benchmark's devices write it: {payload!r}")
    return found


def checked(topic: bytes, payload: bytes) -> Found:
    """Return the events of a payload, of which the contract refuses none."""
    device_id = topic.split(b"/")[2].decode()
    results, is_array, _ = decode(device_id, payload, UTC)
    events = cast(list[Event], results)
    return [
        (event_id, device_id, "1", event_type, repr(number), None, unit, str(moment), meta)
        for event_id, device_id, _, event_type, number, _, unit, moment, meta in events
    ], is_array


def store(cursor: Any, events: list[Fields]) -> None:
    """Insert the events, one array literal for each column."""
    ids, devices, schemas, types, numbers, _, units, moments, metas = zip(*events, strict=True)
    columns = (ids, devices, schemas, types, numbers, units, moments, metas)
    cursor.execute(EXECUTE, [array(column) for column in columns])
    cursor.fetchall()


def array(texts: tuple[str, ...]) -> str:
    joined = "\0".join(texts)
    escaped = joined.replace("\\", r"\\").replace('"', r"\"").replace("\0", '","')
    return f'{{"{escaped}"}}'


def packet(first: int, body: bytes) -> bytes:
    if (length := len(body)) > 0x7F:
        return bytes([first, length & 0x7F | 0x80, length >> 7]) + body
    return bytes([first, length]) + body


def text(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    cursor = connect().cursor()
    cursor.execute(PREPARE)
    Least(sys.argv[1]).run(cursor)


if __name__ == "__main__":
    main()
