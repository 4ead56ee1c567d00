"""What is published, byte for byte: ACKs, rejected ACKs and dead letters.

What it does: compares replies with DESIGN's documented forms, and their sizes with what
mosquitto.conf lets through. What it does not: publish.
"""

import base64
import json
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingester.event import ARRAY_EVENTS_MAX, PAYLOAD_BYTES_MAX
from ingester.rejection import DeadLetter, Reason, Rejection
from ingester.reply import Reply, ack, ack_for, dead_letter_for
from tests.support.each import cases
from tools.process import CHECKOUT

TOPIC = "qs/v1/esp32-01/acks"
DEADLETTER = "qs/v1/deadletter"

# A slow or busy machine is no reason to fail.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --- ACKs ----------------------------------------------------------------------------


def test_the_ack_of_a_stored_event_is_the_documented_one() -> None:
    reply = ack_for(TOPIC, [ack("esp32-01", "esp32-01-42", None)], is_array=False)
    assert reply == Reply(
        TOPIC,
        b'{"schema": 1, "event_id": "esp32-01-42", "device_id": "esp32-01", "status": "stored"}',
    )


def test_the_ack_of_a_rejected_event_is_the_documented_one() -> None:
    rejection = Rejection(
        Reason.INVALID_FIELD, "value: expected a number or a string, got an array"
    )
    reply = ack_for(TOPIC, [ack("esp32-01", "esp32-01-42", rejection)], is_array=False)
    assert reply.payload == (
        b'{"schema": 1, "event_id": "esp32-01-42", "device_id": "esp32-01", "status": "rejected", '
        b'"reason": "invalid_field", "error": "value: expected a number or a string, got an array"}'
    )


def test_a_rejected_event_without_a_valid_id_is_answered_with_null() -> None:
    reply = ack_for(
        TOPIC, [ack("esp32-01", None, Rejection(Reason.NOT_JSON, "no"))], is_array=False
    )
    assert b'"event_id": null, "device_id": "esp32-01", "status": "rejected"' in reply.payload


@cases("reason", Reason)
def test_every_reason_is_a_plain_string_in_ack_and_dead_letter(reason: Reason) -> None:
    answer = json.loads(
        ack_for(TOPIC, [ack("d", "e", Rejection(reason, "why"))], is_array=False).payload
    )
    assert answer["reason"] == reason.value
    assert answer["status"] == "rejected"
    assert published(letter(reason=reason))["reason"] == reason.value


def test_an_array_is_answered_by_an_array_in_the_same_order() -> None:
    answers = [
        ack("d", "1", None),
        ack("d", "2", Rejection(Reason.MISSING_FIELD, "schema is required")),
        ack("d", None, Rejection(Reason.NOT_AN_OBJECT, "no")),
    ]
    for number in (3, 1):
        payload = ack_for(TOPIC, answers[:number], is_array=True).payload
        assert json.loads(payload) == [json.loads(answer) for answer in answers[:number]]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=200))
@settings(PATIENT)
def test_an_ack_gives_the_event_id_back_as_it_was(event_id: str) -> None:
    payload = ack_for(TOPIC, [ack("d", event_id, None)], is_array=False).payload
    assert json.loads(payload.decode("utf-8"))["event_id"] == event_id


# --- dead letters --------------------------------------------------------------------


def letter(**fields: Any) -> DeadLetter:
    return DeadLetter(
        received_at=datetime(2026, 2, 10, tzinfo=UTC),
        reason=Reason.MISSING_FIELD,
        error="event_type is required",
        topic="qs/v1/esp32-01/events",
        device_id="esp32-01",
        event_id="esp32-01-42",
        payload=b'{"schema": 1}',
    )._replace(**fields)


def published(dead_letter: DeadLetter) -> dict[str, Any]:
    body = json.loads(dead_letter_for(DEADLETTER, 17, dead_letter).payload.decode("utf-8"))
    assert isinstance(body, dict)
    return body


def test_a_dead_letter_is_the_documented_one() -> None:
    assert dead_letter_for(DEADLETTER, 17, letter()) == Reply(
        DEADLETTER,
        b'{"schema": 1, "id": 17, "reason": "missing_field", "error": "event_type is required", '
        b'"topic": "qs/v1/esp32-01/events", "device_id": "esp32-01", "event_id": "esp32-01-42", '
        b'"payload": "{\\"schema\\": 1}", "payload_encoding": "utf-8", "truncated": false, '
        b'"received_at": "2026-02-10T00:00:00.000Z"}',
    )


def test_a_dead_letter_says_characters_as_utf8_and_not_by_escapes() -> None:
    payload = dead_letter_for(DEADLETTER, 1, letter(payload="{äΩ\U0001f600".encode())).payload
    assert "{äΩ\U0001f600".encode() in payload


def test_a_dead_letter_without_device_or_event_id_has_nulls() -> None:
    body = published(letter(device_id=None, event_id=None))
    assert (body["device_id"], body["event_id"]) == (None, None)


@cases("char", ["x", "ä", "\U0001f600", '"', "\\", "\0", "\n"])
@cases("chars", [0, 1, 1999, 2000])
def test_a_payload_of_up_to_2000_characters_is_published_whole(chars: int, char: str) -> None:
    body = published(letter(payload=(char * chars).encode()))
    assert body["payload"] == char * chars
    assert body["payload_encoding"] == "utf-8"
    assert body["truncated"] is False


@cases("char", ["x", "ä", "\U0001f600", '"', "\\", "\0"])
@cases("chars", [2001, 2002, 50_000])
def test_a_longer_payload_is_cut_after_2000_characters(chars: int, char: str) -> None:
    body = published(letter(payload=(char * chars).encode()))
    assert body["payload"] == char * 2000
    assert body["payload_encoding"] == "utf-8"
    assert body["truncated"] is True


@cases("size", [1, 2, 3, 1498, 1499, 1500])
def test_bytes_that_are_not_utf8_are_published_whole_in_base64(size: int) -> None:
    payload = b"\xff" * size
    body = published(letter(payload=payload))
    assert body["payload_encoding"] == "base64"
    assert base64.b64decode(body["payload"], validate=True) == payload
    assert len(body["payload"]) <= 2000
    assert body["truncated"] is False


@cases("size", [1501, 1502, 300_000])
def test_more_bytes_that_are_not_utf8_are_cut_to_2000_characters_of_base64(size: int) -> None:
    payload = bytes(range(256)) * (size // 256 + 1)
    body = published(letter(payload=payload[:size]))
    assert body["payload_encoding"] == "base64"
    assert len(body["payload"]) == 2000
    assert base64.b64decode(body["payload"], validate=True) == payload[:1500]
    assert body["truncated"] is True


def test_a_payload_whose_last_byte_is_not_utf8_is_base64_although_that_is_cut_off() -> None:
    body = published(letter(payload=b"x" * 5000 + b"\xff"))
    assert body["payload_encoding"] == "base64"
    assert base64.b64decode(body["payload"]) == b"x" * 1500


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace")))
@settings(PATIENT)
def test_a_short_payload_can_be_had_back_from_its_dead_letter(payload: bytes) -> None:
    body = published(letter(payload=payload))
    if body["payload_encoding"] == "base64":
        assert base64.b64decode(body["payload"]) == payload
    else:
        assert body["payload"].encode("utf-8") == payload
    assert body["truncated"] is False


@cases(
    ("received_at", "text"),
    [
        (datetime(2026, 2, 10, tzinfo=UTC), "2026-02-10T00:00:00.000Z"),
        (datetime(2026, 2, 10, 1, 2, 3, 4999, tzinfo=UTC), "2026-02-10T01:02:03.004Z"),
        (datetime(2026, 2, 10, 23, 59, 59, 999_999, tzinfo=UTC), "2026-02-10T23:59:59.999Z"),
        (
            datetime(2026, 2, 10, 1, 0, 0, tzinfo=timezone(timedelta(hours=2))),
            "2026-02-09T23:00:00.000Z",
        ),
    ],
)
def test_received_at_is_utc_with_milliseconds(received_at: datetime, text: str) -> None:
    assert published(letter(received_at=received_at))["received_at"] == text


# --- sizes ---------------------------------------------------------------------------

# An MQTT topic's most bytes, and so a device id's.
TOPIC_BYTES = 65_535
# The longest text of a rejection: what store.py keeps of a database's message.
DATABASE_ERROR_CHARS = 300 + len(" (SQLSTATE 22P05)")


def packet_bytes_max() -> int:
    conf = (CHECKOUT / "mosquitto/config/mosquitto.conf").read_text("utf-8")
    (size,) = re.findall(r"^max_packet_size (\d+)$", conf, re.MULTILINE)
    return int(size)


def packet_bytes(reply: Reply) -> int:
    """MQTT 3.1.1, section 3.3: fixed header, topic, packet id, payload."""
    return 5 + 2 + len(reply.topic.encode()) + 2 + len(reply.payload)


@cases("char", ["\U0001f600", '"', "\\", "\u2028"])
def test_the_largest_ack_of_an_array_fits_a_packet(char: str) -> None:
    rejection = Rejection(Reason.UNSUPPORTED_SCHEMA, "x" * DATABASE_ERROR_CHARS)
    answers = [ack("d" * 64, char * 200, rejection)] * ARRAY_EVENTS_MAX
    assert packet_bytes(ack_for("t" * TOPIC_BYTES, answers, is_array=True)) < packet_bytes_max()


def test_the_largest_ack_of_an_array_fits_even_if_the_database_speaks_in_wide_characters() -> None:
    # All the ids of an array came in one payload, so they cannot all be that long.
    event_id = "\U0001f600" * (PAYLOAD_BYTES_MAX // ARRAY_EVENTS_MAX // 4)
    rejection = Rejection(Reason.NOT_STORABLE, "\U0001f600" * DATABASE_ERROR_CHARS)
    answers = [ack("d" * 64, event_id, rejection)] * ARRAY_EVENTS_MAX
    assert packet_bytes(ack_for("t" * TOPIC_BYTES, answers, is_array=True)) < packet_bytes_max()


@cases("payload", [b"\0" * 300_000, b"\xff" * 300_000, "\U0001f600".encode() * 9999])
def test_the_largest_dead_letter_fits_a_packet(payload: bytes) -> None:
    # Each quote in a topic is two characters in JSON.
    dead_letter = letter(
        reason=Reason.UNSUPPORTED_SCHEMA,
        error="\x01" * DATABASE_ERROR_CHARS,
        topic='"' * TOPIC_BYTES,
        device_id='"' * TOPIC_BYTES,
        event_id="\U0001f600" * 200,
        payload=payload,
    )
    reply = dead_letter_for("t" * TOPIC_BYTES, 2**63 - 1, dead_letter)
    assert packet_bytes(reply) < packet_bytes_max()


def test_the_largest_payload_that_is_answered_fits_a_packet_with_room_to_spare() -> None:
    # Else the broker would cut the device off, and nobody could tell it why.
    assert packet_bytes_max() > 2 * PAYLOAD_BYTES_MAX
