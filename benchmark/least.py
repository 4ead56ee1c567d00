"""The least that one Python thread can do for an event: a bound for what the ingester can reach.

What it does: takes packets apart, takes the fields out by the ingester's pattern, inserts a batch
by one prepared statement, and answers and PUBACKs it by one send, with the same rows and ACKs. What
it does not: publish with QoS 1, check what the pattern does not, tell a repeated event from a
conflict, keep a dead letter, read while the database works, have a deadline, or connect again.

Invariant: an ACK is sent only after the row is committed, and the PUBACK behind it.
"""

import os
import signal
import socket
from typing import Any

from benchmark.plain import connect
from ingester.pattern import Fields, recognise

BATCH_MAX = 500
READ_BYTES_MAX = 262_144
# MQTT 3.1.1, sections 3.1, 3.3, 3.4, 3.8 and 3.9.
CONNECT, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 0x10, 0x30, b"\x40\x02", 0x82, 0x90
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

Message = tuple[bytes, bytes, list[Fields], bool]  # topic, packet id, events, are they an array


def take_apart(data: bytes, waiting: list[Message]) -> bytes:
    """Add what was published to `waiting`; return the beginning of what has not come whole."""
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
        if data[begin] & 0xF0 == PUBLISH:
            topic_end = body + 2 + (data[body] << 8 | data[body + 1])
            topic, packet_id = data[body + 2 : topic_end], data[topic_end : topic_end + 2]
            if not (found := recognise(data[topic_end + 2 : end])):
                raise ValueError(
                    f"not as the benchmark's devices write it: {data[topic_end:end]!r}"
                )
            waiting.append((topic, packet_id, *found))
        elif data[begin] == SUBACK:
            print("ready", flush=True)
        begin = end
    return data[begin:]


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


def answer(topic: bytes, packet_id: bytes, events: list[Fields], is_array: bool) -> bytes:
    """Return the ACK, with QoS 0, and the PUBACK."""
    acks = ", ".join([ACK % event[:2] for event in events])
    body = (f"[{acks}]" if is_array else acks).encode()
    topic = topic.removesuffix(b"events") + b"acks"
    return packet(PUBLISH, len(topic).to_bytes(2, "big") + topic + body) + PUBACK + packet_id


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
    sock = socket.create_connection((os.environ["MQTT_HOST"], int(os.environ["MQTT_PORT"])))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    session = text(b"MQTT") + b"\x04\x00\x00\x00" + text(b"homelab-least")  # kept, no keep-alive
    subscription = b"\x00\x01" + text(b"qs/v1/+/events") + b"\x01"
    sock.sendall(packet(CONNECT, session) + packet(SUBSCRIBE, subscription))
    waiting: list[Message] = []
    rest = b""
    while data := sock.recv(READ_BYTES_MAX):
        rest = take_apart(rest + data, waiting)
        while waiting:
            batch = waiting[:BATCH_MAX]
            del waiting[:BATCH_MAX]
            store(cursor, [event for _, _, events, _ in batch for event in events])
            sock.sendall(b"".join([answer(*message) for message in batch]))


if __name__ == "__main__":
    main()
