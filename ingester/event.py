"""The event contract: from the bytes of a payload to valid, frozen events.

What it does: decides whether a payload holds events that can be stored, and says what is
wrong if not. What it does not: I/O, settings, the clock; the same bytes always give the
same answer.

Invariant: any bytes give events or a Rejection, never another exception, and every Event
is one that PostgreSQL takes. Python's own leniency (NaN, UTF-16, week dates, True == 1)
is not the contract.
"""

import contextlib
import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo
from typing import Any, NamedTuple

from ingester.rejection import Reason, Rejection

SCHEMA = 1

# Bytes. Far more than a device sends at once, and small enough to hold a thousand of.
PAYLOAD_BYTES_MAX = 262_144
# Each event of an array is answered, so the array's ACK must fit the broker's
# max_packet_size (mosquitto.conf): 1,000 answers of at most 1.4 kB.
ARRAY_EVENTS_MAX = 1_000
META_NESTING_MAX = 32

_DEVICE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_META_NESTING_RULE = f"meta: nested deeper than {META_NESTING_MAX} levels"
_DEVICE_ID_RULE = "device_id: expected 1 to 64 characters of A-Z a-z 0-9 _ . : -"
# The profile of ISO 8601 that RFC 3339 has, plus an absent, short or colonless offset.
_TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
    r"(Z|[+-]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?"
)
# What PostgreSQL's text cannot hold: U+0000, and halves of a surrogate pair.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_UNSTORABLE_OR_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")
# The same in JSON text, where U+0000 is an escape: an odd number of backslashes before it.
_UNSTORABLE_JSON = re.compile("[\ud800-\udfff]" + r"|(?<!\\)(?:\\\\)*\\u0000")


class Event(NamedTuple):
    """A valid event, field for column of the table `events`.

    At most one of value_num and value_text is set. ts_device is in UTC. meta is JSON text.
    """

    event_id: str
    device_id: str
    schema: int
    event_type: str
    value_num: float | None
    value_text: str | None
    unit: str | None
    ts_device: datetime | None
    meta: str


class Decoded(NamedTuple):
    """What a payload held, in its order.

    `is_array`: it is answered by an array, one answer for each result. `is_whole`: it was
    refused as a whole, and one dead letter holds it; each result is then a Rejection, one for
    each event id that could be read, or a single one without an id.
    """

    results: Sequence[Event | Rejection]
    is_array: bool
    is_whole: bool


def decode(device_id: str, payload: bytes, default_tz: tzinfo) -> Decoded:
    """Decode a payload: one event, or an array of events that each stand or fall alone.

    `device_id` is the topic's; `default_tz` applies to a ts_device without an offset. Never
    raises.
    """
    try:
        document = _parse(payload)
        if not isinstance(document, list):
            return Decoded([_result(document, device_id, default_tz)], False, False)
        if not document:
            raise _Refused(Reason.NOT_AN_OBJECT, "the array is empty: expected event objects")
        if len(document) > ARRAY_EVENTS_MAX:
            raise _Refused(
                Reason.PAYLOAD_TOO_LARGE,
                f"an array may hold {ARRAY_EVENTS_MAX} events, this one holds {len(document)}",
            )
        if not _DEVICE_ID.fullmatch(device_id):
            # No event on such a topic is ever stored. One answer says so, not a thousand that
            # each carry a device id of up to 65 kB.
            raise _invalid(_DEVICE_ID_RULE)
    except _Refused as refused:
        return Decoded([Rejection(refused.reason, refused.error)], False, True)
    return Decoded([_result(item, device_id, default_tz) for item in document], True, False)


def elements(payload: bytes, indexes: Sequence[int]) -> list[bytes]:
    """Return the JSON of these elements of an array that decode() took, as it was sent.

    Where that cannot be had, each is the whole payload.
    """
    try:
        document = _parse(payload)
        return [_own_json(document[index]) for index in indexes]
    except (_Refused, RecursionError):
        return [payload] * len(indexes)


class _Refused(Exception):
    """From where a fault is found to where it becomes a Rejection; never leaves this module."""

    def __init__(self, reason: Reason, error: str) -> None:
        super().__init__(reason, error)
        self.reason = reason
        self.error = error


def _result(fields: Any, device_id: str, default_tz: tzinfo) -> Event | Rejection:
    try:
        return _event(fields, device_id, default_tz)
    except _Refused as refused:
        # The device knows its event by the id, so the answer carries it where it can.
        event_id = None
        if isinstance(fields, dict):
            with contextlib.suppress(_Refused):
                event_id = _text(fields.get("event_id"), "event_id", 1, 200)
        return Rejection(refused.reason, refused.error, event_id)


def _parse(payload: bytes) -> Any:
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise _Refused(
            Reason.PAYLOAD_TOO_LARGE,
            f"a payload may have {PAYLOAD_BYTES_MAX} bytes, this one has {len(payload)}",
        )
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Refused(Reason.NOT_UTF8, f"byte {error.start} is not UTF-8") from None
    if not text:
        raise _Refused(Reason.NOT_JSON, "the payload is empty")
    try:
        return _JSON.decode(text)
    except ValueError as error:
        raise _Refused(Reason.NOT_JSON, str(error)) from None
    except RecursionError:
        raise _Refused(Reason.NOT_JSON, "nested too deeply to be read") from None


def _integer(text: str) -> int:
    if len(text) > 308 and math.isinf(float(text)):
        raise ValueError("a number overflows a double")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number overflows a double")
    return number


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Made once: json.loads() and json.dumps() make one at every call with arguments like these.
_JSON = json.JSONDecoder(parse_int=_integer, parse_float=_finite, parse_constant=_constant)
_TO_JSON = json.JSONEncoder(ensure_ascii=False)


def _event(fields: Any, device_id: str, default_tz: tzinfo) -> Event:
    if not isinstance(fields, dict):
        raise _Refused(Reason.NOT_AN_OBJECT, f"expected an event object, got {_kind(fields)}")
    _check_schema(_required(fields, "schema"))
    event_id = _text(_required(fields, "event_id"), "event_id", 1, 200)
    _check_device_id(_required(fields, "device_id"), device_id)
    event_type = _text(_required(fields, "event_type"), "event_type", 1, 100)
    value_num, value_text = _value(fields.get("value"))
    unit = None if fields.get("unit") is None else _text(fields["unit"], "unit", 0, 50)
    ts_device = _timestamp(fields.get("ts_device"), default_tz)
    meta = _meta(fields.get("meta"))
    return Event(
        event_id, device_id, SCHEMA, event_type, value_num, value_text, unit, ts_device, meta
    )


def _required(fields: dict[str, Any], name: str) -> Any:
    try:
        return fields[name]
    except KeyError:
        raise _Refused(Reason.MISSING_FIELD, f"{name} is required") from None


def _check_schema(value: Any) -> None:
    if type(value) is not int:
        raise _mistyped("schema", f"the integer {SCHEMA}", value)
    if value != SCHEMA:
        raise _Refused(Reason.UNSUPPORTED_SCHEMA, f"schema: expected {SCHEMA}, got another number")


def _check_device_id(value: Any, topic_device_id: str) -> None:
    if not isinstance(value, str):
        raise _mistyped("device_id", "a string", value)
    if not _DEVICE_ID.fullmatch(value):
        raise _invalid(_DEVICE_ID_RULE)
    if value != topic_device_id:
        raise _Refused(Reason.DEVICE_MISMATCH, "device_id: is not the one in the topic")


def _text(value: Any, name: str, chars_min: int, chars_max: int) -> str:
    if not isinstance(value, str):
        raise _mistyped(name, "a string", value)
    if not chars_min <= len(value) <= chars_max:
        raise _invalid(f"{name}: expected {chars_min} to {chars_max} characters, got {len(value)}")
    # What is printable holds neither, and is most of what comes; to ask costs a tenth.
    if not value.isprintable() and _UNSTORABLE_OR_CONTROL.search(value):
        raise _invalid(f"{name}: holds a control character or half of a surrogate pair")
    return value


def _value(value: Any) -> tuple[float | None, str | None]:
    if value is None:
        return None, None
    if isinstance(value, str):
        if not value.isprintable() and _UNSTORABLE.search(value):
            raise _invalid("value: holds U+0000 or half of a surrogate pair")
        return None, value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value), None
    raise _mistyped("value", "a number or a string", value)


def _timestamp(value: Any, default_tz: tzinfo) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _mistyped("ts_device", "a string", value)
    if _TIMESTAMP.fullmatch(value):
        try:
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=default_tz)
            return moment.astimezone(UTC)
        except (ValueError, OverflowError):  # 30 February; year 1 at +14:00
            pass
    raise _invalid("ts_device: expected ISO 8601 date and time, such as 2026-02-10T00:00:00Z")


def _meta(value: Any) -> str:
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise _mistyped("meta", "an object", value)
    try:
        text = _TO_JSON.encode(value)
    except RecursionError:  # nested as deeply as can just be read, it may be too deep to write
        raise _invalid(_META_NESTING_RULE) from None
    # Each level has a bracket, so with few of them, as in most, there is no need to look.
    brackets = text.count("{") + text.count("[")
    if brackets > META_NESTING_MAX and _nests_deeper(value, META_NESTING_MAX):
        raise _invalid(_META_NESTING_RULE)
    if ("\\u0000" in text or not text.isprintable()) and _UNSTORABLE_JSON.search(text):
        raise _invalid("meta: a string holds U+0000 or half of a surrogate pair")
    return text


def _nests_deeper(value: Any, levels_max: int) -> bool:
    # Level by level and not recursively: the depth is the device's to choose.
    level = [value]
    for _ in range(levels_max):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _own_json(element: Any) -> bytes:
    try:
        return _TO_JSON.encode(element).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: only an escape can say it
        return json.dumps(element).encode("ascii")


def _invalid(error: str) -> _Refused:
    return _Refused(Reason.INVALID_FIELD, error)


def _mistyped(name: str, expected: str, value: Any) -> _Refused:
    return _invalid(f"{name}: expected {expected}, got {_kind(value)}")


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # null, true, false
    return _KINDS.get(type(value), "a number")


_KINDS: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
