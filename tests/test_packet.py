"""PUBLISH and PUBACK as bytes, held against paho, which builds and reads the same packets.

What it does: builds packets of any size, cuts streams of them anywhere, and feeds what is not
MQTT. What it does not: use a socket (test_fewer_calls.py does).
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import _packet
from paho.mqtt.client import MQTTv311

from ingester import packet
from ingester.packet import MalformedPacket, Puback, Publish

TOPICS = st.text(st.characters(codec="utf-8", exclude_characters="\0+#"), min_size=1, max_size=40)
MIDS = st.integers(1, 65_535)
# Around what one, two and three bytes of remaining length can say.
SIZES = st.one_of(st.integers(0, 200), st.sampled_from([16_370, 16_384, 2_097_140, 2_097_152]))


def packets_in(data: bytes) -> list[Publish | Puback | None]:
    """Return the packets that the data is made of."""
    found = []
    position = 0
    while (item := packet.packet_at(data, position)) is not None:
        assert position < item[1] <= len(data)
        found.append(item[0])
        position = item[1]
    assert position == len(data)
    return found


def read_by_paho(data: bytes) -> Publish:
    """Return what paho reads in a PUBLISH whose head is one byte and a length of one byte."""
    read = _packet.decode_publish(data[0], bytearray(data[2:]), MQTTv311)
    return Publish(read.topic.decode(), bytes(read.payload), read.mid or 0, read.qos)


@given(TOPICS, SIZES, MIDS)
def test_a_publish_that_was_built_is_read_as_it_was(topic: str, size: int, mid: int) -> None:
    payload = b"x" * size
    built = packet.publish(topic, payload, mid)
    assert packets_in(built) == [Publish(topic, payload, mid, 1)]


@given(st.text("abc/", min_size=1, max_size=10), st.binary(max_size=100), MIDS)
def test_paho_reads_a_publish_that_was_built(topic: str, payload: bytes, mid: int) -> None:
    built = packet.publish(topic, payload, mid)
    assert read_by_paho(built) == Publish(topic, payload, mid, 1)


@given(TOPICS, st.binary(max_size=40), st.booleans(), st.booleans())
def test_a_publish_with_qos_0_has_no_packet_id_and_dup_and_retain_make_no_difference(
    topic: str, payload: bytes, dup: bool, retain: bool
) -> None:
    name = topic.encode()
    body = len(name).to_bytes(2, "big") + name + payload
    if len(body) < 128:
        data = bytes((0x30 | dup << 3 | retain, len(body))) + body
        assert packets_in(data) == [read_by_paho(data)] == [Publish(topic, payload, 0, 0)]


@given(MIDS)
def test_a_puback_has_four_bytes_of_which_two_are_the_packet_id(mid: int) -> None:
    assert packet.puback(mid) == b"\x40\x02" + mid.to_bytes(2, "big")
    assert packets_in(packet.puback(mid)) == [Puback(mid)]


@given(st.lists(st.tuples(TOPICS, st.binary(max_size=300), MIDS), max_size=5), st.data())
def test_what_is_cut_anywhere_is_read_up_to_the_last_whole_packet(
    wanted: list[tuple[str, bytes, int]], data: st.DataObject
) -> None:
    packets = [piece for t, p, m in wanted for piece in (packet.publish(t, p, m), packet.puback(m))]
    stream = b"".join(packets)
    cut = data.draw(st.integers(0, len(stream)))
    ends = [len(b"".join(packets[:n])) for n in range(len(packets) + 1)]
    whole = max(n for n, end in enumerate(ends) if end <= cut)
    assert packet.packet_at(stream[:cut], ends[whole]) is None
    assert len(packets_in(stream[: ends[whole]])) == whole


@pytest.mark.parametrize("head", [0x20, 0x34, 0x36, 0x50, 0x62, 0x70, 0x90, 0xD0, 0xF0])
def test_what_is_neither_is_left_to_paho_whole(head: int) -> None:
    assert packet.packet_at(bytes((head, 3)) + b"abc" + b"rest", 0) == (None, 5)


# --- what is not MQTT ----------------------------------------------------------------


MALFORMED = {
    "a remaining length of five bytes": b"\x32\xff\xff\xff\xff\x01",
    "a remaining length that does not end": b"\x32\x80\x80\x80\x80",
    "no topic": b"\x32\x00",
    "half of the topic's length": b"\x32\x01\x00",
    "a topic longer than the packet": b"\x32\x05\x00\x09abc",
    "a topic and no packet id": b"\x32\x05\x00\x03abc",
    "half of a packet id": b"\x32\x06\x00\x03abc\x01",
    "a topic longer than the packet, QoS 0": b"\x30\x05\x00\x04abc",
    "a topic that is not UTF-8": b"\x32\x06\x00\x02\xff\xfe\x00\x01",
    "a surrogate in the topic": b"\x30\x05\x00\x03\xed\xa0\x80",
    "a PUBACK of one byte": b"\x40\x01\x01",
    "a PUBACK of three bytes": b"\x40\x03\x00\x01\x00",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_not_mqtt_is_said_to_be_so(what: str) -> None:
    with pytest.raises(MalformedPacket):
        # Behind it there is more, which must not be taken for a part of it.
        packets_in(MALFORMED[what] + packet.puback(1))


@given(st.binary(max_size=200))
def test_any_bytes_are_packets_or_the_beginning_of_one_or_malformed(data: bytes) -> None:
    position = 0
    try:
        while (found := packet.packet_at(data, position)) is not None:
            item, end = found
            assert position + 2 <= end <= len(data)
            if isinstance(item, Publish):
                assert len(item.topic.encode()) + len(item.payload) + 4 <= end - position
            elif item is not None:
                assert 0 <= item.mid <= 65_535
            position = end
    except MalformedPacket:
        pass
