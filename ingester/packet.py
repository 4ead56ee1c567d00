"""MQTT 3.1.1's packets of the hot path: PUBLISH and PUBACK, from bytes and to bytes.

What it does: takes apart what was read, and builds what is to be written. What it does not:
read or write, or know any other packet; those are paho's.

Invariant: any bytes are packets, the beginning of one, or a MalformedPacket. What is built
has a topic and a length that MQTT allows, since topic.py and reply.py see to that.
"""

from typing import NamedTuple

# The first byte: the packet's type, and of a PUBLISH its QoS (sections 2.2.1 and 3.3.1). Its
# other two bits, DUP and RETAIN, make no difference to us.
_TYPE_AND_QOS = 0xF6
_PUBLISH_QOS_0 = 0x30
_PUBLISH_QOS_1 = 0x32
_PUBACK = 0x40
# The remaining length: at most four bytes of seven bits, the lowest first (section 2.2.3).
_LENGTH_BITS_MAX = 28


class MalformedPacket(Exception):
    """What the other side sends is not MQTT; the connection is of no use."""


class Publish(NamedTuple):
    """A PUBLISH as it was received; mid is 0 with QoS 0."""

    topic: str
    payload: bytes
    mid: int
    qos: int


class Puback(NamedTuple):
    """A PUBACK as it was received."""

    mid: int


def packet_at(data: bytes, begin: int) -> tuple[Publish | Puback | None, int] | None:
    """Return the packet that begins there, and where it ends; None if it is not whole.

    Itself it is None if it is neither a PUBLISH with QoS 0 or 1 nor a PUBACK. Raises
    MalformedPacket.
    """
    length = bits = 0
    for position in range(begin + 1, len(data)):
        byte = data[position]
        length |= (byte & 0x7F) << bits
        if byte < 0x80:
            break
        bits += 7
        if bits == _LENGTH_BITS_MAX:
            raise MalformedPacket("a remaining length of more than four bytes")
    else:
        return None
    body = position + 1
    end = body + length
    if end > len(data):
        return None
    kind = data[begin] & _TYPE_AND_QOS
    if kind == _PUBLISH_QOS_1:
        return _publish(data, body, end, 1), end
    if kind == _PUBACK:
        return _puback(data, body, end), end
    if kind == _PUBLISH_QOS_0:
        return _publish(data, body, end, 0), end
    return None, end


def _publish(data: bytes, begin: int, end: int, qos: int) -> Publish:
    topic_begin = begin + 2
    topic_end = topic_begin + int.from_bytes(data[begin:topic_begin], "big")
    payload_begin = topic_end + 2 if qos else topic_end
    if payload_begin > end:
        raise MalformedPacket("a PUBLISH that ends before its payload")
    try:
        topic = data[topic_begin:topic_end].decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedPacket("a topic that is not UTF-8") from None
    mid = int.from_bytes(data[topic_end:payload_begin], "big")
    return Publish(topic, data[payload_begin:end], mid, qos)


def _puback(data: bytes, begin: int, end: int) -> Puback:
    if end - begin != 2:
        raise MalformedPacket("a PUBACK without a packet id, or with more")
    return Puback(int.from_bytes(data[begin:end], "big"))


def publish(topic: str, payload: bytes, mid: int) -> bytes:
    """Return a PUBLISH with QoS 1, not retained."""
    name = topic.encode("utf-8")
    length = len(name) + len(payload) + 4
    head = bytearray((_PUBLISH_QOS_1,))
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    parts = (head, len(name).to_bytes(2, "big"), name, mid.to_bytes(2, "big"), payload)
    return b"".join(parts)


def puback(mid: int) -> bytes:
    """Return a PUBACK."""
    return b"\x40\x02" + mid.to_bytes(2, "big")
