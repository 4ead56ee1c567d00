"""The MQTT 3.1.1 packets of the hot path, from bytes and to bytes.

What it does: takes apart what was read, and builds what is to be written. What it does not:
read or write, or keep a session; a packet that paho handles is passed on whole.

Invariant: any bytes are packets, the beginning of one, or a MalformedPacket. No topic that
comes out holds NUL or a surrogate, so that it can be stored and published as it is. What is
built has a topic and a length that MQTT allows, since topic.py and reply.py see to that.
"""

from collections.abc import Iterator
from typing import NamedTuple

# The first byte (section 2.2): the packet type, and four flags. Those of a PUBLISH are DUP,
# two of QoS, and RETAIN; DUP makes no difference to us. The others' are fixed.
_PUBLISH = 0x30
_PUBLISH_QOS_1 = 0x32
_RETAIN = 0x01
_PUBACK = 0x40
_PUBREL = 0x62
# The remaining length: at most four bytes of seven bits, the lowest first (section 2.2.3).
_LENGTH_BITS_MAX = 28


class MalformedPacket(Exception):
    """What the other side sends is not MQTT; the connection is of no use."""


class Publish(NamedTuple):
    """A PUBLISH; the packet id is 0 with QoS 0."""

    topic: str
    payload: bytes
    packet_id: int
    qos: int
    retain: bool


class Puback(NamedTuple):
    """The broker has taken what we published under this packet id with QoS 1."""

    packet_id: int


class Pubrel(NamedTuple):
    """The broker knows that we have its message of QoS 2, and waits for a PUBCOMP."""

    packet_id: int


class OtherPacket(NamedTuple):
    """A packet that paho handles, whole."""

    data: bytes


Packet = Publish | Puback | Pubrel | OtherPacket


class PacketReader:
    """Takes the bytes of one connection apart, wherever they are cut."""

    def __init__(self) -> None:
        self._begun = bytearray()  # the beginning of a packet whose end has not come
        self._begun_bytes_min = 0  # the least that this packet has, as far as is known

    def packets(self, data: bytes) -> Iterator[Packet]:
        """Yield the packets that end in `data`, which comes behind what came before.

        To be exhausted before the next call. Raises MalformedPacket; then the reader is of
        no more use.
        """
        if self._begun:
            self._begun += data
            if len(self._begun) < self._begun_bytes_min:
                return  # a large packet is not copied at each read
            data = bytes(self._begun)
            self._begun.clear()
        position, size = 0, len(data)
        while position < size:
            body = position + 2
            length = data[position + 1] if body <= size else 0x80
            if length > 0x7F and body < size and data[body] <= 0x7F:
                # Two bytes, as most events have: one call less for each.
                length, body = length & 0x7F | data[body] << 7, body + 1
            elif length > 0x7F:  # more of them, or cut off
                if (found := _remaining_length(data, position + 1)) is None:
                    self._begin(data[position:], bytes_min=0)
                    return
                length, body = found
            end = body + length
            if end > size:
                self._begin(data[position:], bytes_min=end - position)
                return
            first = data[position]
            if first & 0xF0 == _PUBLISH:
                yield _publish(data, first, body, end)
            elif first == _PUBACK:
                yield Puback(_packet_id(data, body, end, "PUBACK"))
            elif first == _PUBREL:
                yield Pubrel(_packet_id(data, body, end, "PUBREL"))
            else:
                yield OtherPacket(data[position:end])
            position = end

    def _begin(self, data: bytes, bytes_min: int) -> None:
        self._begun += data
        self._begun_bytes_min = bytes_min


def _remaining_length(data: bytes, begin: int) -> tuple[int, int] | None:
    """Return the length and where it ends; None if its end has not come."""
    length = bits = 0
    for position in range(begin, len(data)):
        byte = data[position]
        length |= (byte & 0x7F) << bits
        if byte < 0x80:
            return length, position + 1
        bits += 7
        if bits == _LENGTH_BITS_MAX:
            raise MalformedPacket("a remaining length of more than four bytes")
    return None


def _publish(data: bytes, first: int, begin: int, end: int) -> Publish:
    qos = first >> 1 & 3
    if qos == 3:
        raise MalformedPacket("a PUBLISH with QoS 3")
    topic_begin = begin + 2
    topic_end = topic_begin + int.from_bytes(data[begin:topic_begin], "big")
    payload_begin = topic_end + 2 if qos else topic_end
    if payload_begin > end:
        raise MalformedPacket("a PUBLISH that ends before its payload")
    # MQTT forbids such topics, yet not every broker refuses them. To end the connection would
    # bring the same message again after each reconnect: it must be settled.
    topic = data[topic_begin:topic_end].decode("utf-8", "replace")
    if "\0" in topic:
        topic = topic.replace("\0", "\N{REPLACEMENT CHARACTER}")
    packet_id = int.from_bytes(data[topic_end:payload_begin], "big")
    return Publish(topic, data[payload_begin:end], packet_id, qos, bool(first & _RETAIN))


def _packet_id(data: bytes, begin: int, end: int, name: str) -> int:
    if end - begin != 2:
        raise MalformedPacket(f"a {name} without a packet id, or with more")
    return int.from_bytes(data[begin:end], "big")


def publish(topic: str, payload: bytes, packet_id: int, *, retain: bool = False) -> bytes:
    """Return a PUBLISH with QoS 1."""
    name = topic.encode("utf-8")
    length = len(name) + len(payload) + 4
    head = bytearray((_PUBLISH_QOS_1 | retain,))
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    parts = (head, len(name).to_bytes(2, "big"), name, packet_id.to_bytes(2, "big"), payload)
    return b"".join(parts)


def puback(packet_id: int) -> bytes:
    """Return a PUBACK: a message of QoS 1 is settled."""
    return b"\x40\x02" + packet_id.to_bytes(2, "big")


def pubrec(packet_id: int) -> bytes:
    """Return a PUBREC: a message of QoS 2 is settled, and the broker may forget it."""
    return b"\x50\x02" + packet_id.to_bytes(2, "big")


def pubcomp(packet_id: int) -> bytes:
    """Return a PUBCOMP: the answer to a PUBREL, after which the packet id is free again."""
    return b"\x70\x02" + packet_id.to_bytes(2, "big")
