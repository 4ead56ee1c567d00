"""MQTT packets as bytes, held against paho, which builds and reads the same ones.

What it does: builds packets of any size, cuts streams of them anywhere, and feeds what is not
MQTT. What it does not: use a socket (test_session.py does).
"""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import _packet
from paho.mqtt.client import MQTTv311

from ingester import mqtt
from ingester.mqtt import (
    MalformedPacket,
    OtherPacket,
    Packet,
    PacketReader,
    Puback,
    Publish,
    Pubrel,
)
from tests.support.each import cases

TOPICS = st.text(st.characters(codec="utf-8", exclude_characters="\0+#"), min_size=1, max_size=40)
PACKET_IDS = st.integers(1, 65_535)
# Around what one, two and three bytes of remaining length can say.
SIZES = st.one_of(st.integers(0, 200), st.sampled_from([16_370, 16_384, 2_097_140, 2_097_152]))


def packets_in(*parts: bytes) -> list[Packet]:
    """Return the packets that the data is made of, which comes in these parts."""
    reader = PacketReader()
    return [packet for part in parts for packet in reader.packets(part)]


def read_by_paho(data: bytes) -> Publish:
    """Return what paho reads in a PUBLISH whose head is one byte and a length of one byte."""
    read = _packet.decode_publish(data[0], bytearray(data[2:]), MQTTv311)
    return Publish(
        read.topic.decode(), bytes(read.payload), read.mid or 0, read.qos, bool(read.retain)
    )


@given(TOPICS, SIZES, PACKET_IDS, st.booleans())
def test_a_publish_that_was_built_is_read_as_it_was(
    topic: str, size: int, packet_id: int, retain: bool
) -> None:
    payload = b"x" * size
    built = mqtt.publish(topic, payload, packet_id, retain=retain)
    assert packets_in(built) == [Publish(topic, payload, packet_id, 1, retain)]


@given(st.text("abc/", min_size=1, max_size=10), st.binary(max_size=100), PACKET_IDS)
def test_paho_reads_a_publish_that_was_built(topic: str, payload: bytes, packet_id: int) -> None:
    built = mqtt.publish(topic, payload, packet_id)
    assert read_by_paho(built) == Publish(topic, payload, packet_id, 1, False)


@given(TOPICS, st.binary(max_size=40), st.integers(0, 2), st.booleans(), st.booleans(), PACKET_IDS)
def test_a_publish_of_any_qos_is_read_as_paho_reads_it(
    topic: str, payload: bytes, qos: int, dup: bool, retain: bool, packet_id: int
) -> None:
    name = topic.encode()
    body = len(name).to_bytes(2, "big") + name
    body += (packet_id.to_bytes(2, "big") if qos else b"") + payload
    if len(body) < 128:
        data = bytes((0x30 | dup << 3 | qos << 1 | retain, len(body))) + body
        wanted = Publish(topic, payload, packet_id if qos else 0, qos, retain)
        assert packets_in(data) == [read_by_paho(data)] == [wanted]


@given(PACKET_IDS)
def test_an_answer_has_four_bytes_of_which_two_are_the_packet_id(packet_id: int) -> None:
    tail = b"\x02" + packet_id.to_bytes(2, "big")
    assert mqtt.puback(packet_id) == b"\x40" + tail
    assert mqtt.pubrec(packet_id) == b"\x50" + tail
    assert mqtt.pubcomp(packet_id) == b"\x70" + tail
    assert packets_in(b"\x40" + tail + b"\x62" + tail) == [Puback(packet_id), Pubrel(packet_id)]


@given(st.lists(st.tuples(TOPICS, st.binary(max_size=300), PACKET_IDS), max_size=5), st.data())
def test_what_is_cut_anywhere_is_read_as_if_it_came_at_once(
    wanted: list[tuple[str, bytes, int]], data: st.DataObject
) -> None:
    stream = b"".join(mqtt.publish(*item) + mqtt.puback(item[2]) for item in wanted)
    inner = st.lists(st.integers(0, len(stream)), max_size=20)
    cuts = sorted([0, *data.draw(inner), len(stream)])
    parts = [stream[begin:end] for begin, end in pairwise(cuts)]
    read = packets_in(*parts)
    assert read == packets_in(stream)
    assert [item for item in read if isinstance(item, Publish)] == [
        Publish(topic, payload, packet_id, 1, False) for topic, payload, packet_id in wanted
    ]


def test_a_packet_is_read_byte_by_byte_and_no_sooner_than_its_last() -> None:
    built = mqtt.publish("qs/v1/device-1/events", b"x" * 200, 7)
    reader = PacketReader()
    for byte in built[:-1]:
        assert list(reader.packets(bytes((byte,)))) == []
    (packet,) = reader.packets(built[-1:] + mqtt.puback(9)[:1])
    assert packet == Publish("qs/v1/device-1/events", b"x" * 200, 7, 1, False)
    assert list(reader.packets(mqtt.puback(9)[1:])) == [Puback(9)]


@cases("head", [0x20, 0x50, 0x60, 0x70, 0x90, 0xB0, 0xD0, 0xE0, 0xF0, 0x00])
def test_any_other_packet_is_left_to_paho_whole(head: int) -> None:
    packet = bytes((head, 3)) + b"abc"
    assert packets_in(packet + mqtt.puback(1)) == [OtherPacket(packet), Puback(1)]


# --- topics that MQTT forbids --------------------------------------------------------


WRONG_TOPICS = {
    "NUL": (b"qs/v1/a\0b/events", "qs/v1/a\ufffdb/events"),
    "nothing but NUL": (b"\0\0", "\ufffd\ufffd"),
    "not UTF-8": (b"qs/v1/\xff\xfe/events", "qs/v1/\ufffd\ufffd/events"),
    "a surrogate": (b"a\xed\xa0\x80", "a\ufffd\ufffd\ufffd"),
    "cut within a character": (b"a\xc3", "a\ufffd"),
    "NUL in two bytes": (b"a\xc0\x80", "a\ufffd\ufffd"),
    "empty": (b"", ""),
}


@cases("qos", [0, 1, 2])
@cases("what", WRONG_TOPICS)
def test_a_topic_that_is_wrong_is_read_with_replacement_characters(what: str, qos: int) -> None:
    name, topic = WRONG_TOPICS[what]
    body = len(name).to_bytes(2, "big") + name + (b"\0\x07" if qos else b"") + b"payload"
    wanted = Publish(topic, b"payload", 7 if qos else 0, qos, False)
    assert packets_in(bytes((0x30 | qos << 1, len(body))) + body) == [wanted]


@given(st.binary(max_size=50))
def test_no_topic_holds_nul_or_a_surrogate(name: bytes) -> None:
    (packet,) = packets_in(bytes((0x30, len(name) + 2)) + len(name).to_bytes(2, "big") + name)
    assert isinstance(packet, Publish)
    assert "\0" not in packet.topic
    packet.topic.encode()


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
    "half of a packet id, QoS 2": b"\x34\x06\x00\x03abc\x01",
    "QoS 3": b"\x36\x07\x00\x03abc\x00\x01",
    "a PUBACK of one byte": b"\x40\x01\x01",
    "a PUBACK of three bytes": b"\x40\x03\x00\x01\x00",
    "a PUBREL of one byte": b"\x62\x01\x01",
}


@cases("what", MALFORMED)
def test_what_is_not_mqtt_is_said_to_be_so_behind_what_is(what: str) -> None:
    # Behind it there is more, which must not be taken for a part of it.
    packets = PacketReader().packets(mqtt.puback(1) + MALFORMED[what] + mqtt.puback(2))
    assert next(packets) == Puback(1)
    with pytest.raises(MalformedPacket):
        next(packets)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_packets_or_the_beginning_of_one_or_malformed(data: bytes, cut: int) -> None:
    reader = PacketReader()
    size = 0
    try:
        for part in (data[:cut], data[cut:]):
            for packet in reader.packets(part):
                if isinstance(packet, Publish):
                    size += len(packet.payload) + 4
                elif isinstance(packet, OtherPacket):
                    size += len(packet.data)
                else:
                    assert 0 <= packet.packet_id <= 65_535
                    size += 4
    except MalformedPacket:
        pass
    assert size <= len(data)
