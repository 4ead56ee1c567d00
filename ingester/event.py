"""The event contract: from the bytes of a payload to valid, frozen events.

What it does: decides whether a payload holds events that can be stored, and says what is
wrong if not. What it does not: I/O, settings, the clock; the same bytes always give the
same answer.

Invariant: any bytes give events or a Rejection, never another exception, and every Event
is one that PostgreSQL takes. Python's own leniency (NaN, UTF-16, week dates, True == 1)
is not the contract.
"""

import json
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeGuard

from ingester.pattern import (
    DEVICE_ID,
    EVENT_ID_CHARS_MAX,
    EVENT_TYPE_CHARS_MAX,
    TIMESTAMP,
    UNIT_CHARS_MAX,
    Fields,
    recognise,
)
from ingester.payload import NotJSONError, begins_array, event_ids, holds_numbers, parse
from ingester.rejection import Reason, Rejection

SCHEMA = 1

# Bytes. Far more than a device sends at once, and small enough to hold a thousand of.
PAYLOAD_BYTES_MAX = 262_144
# Each event of an array is answered, so the array's ACK must fit the broker's
# max_packet_size (mosquitto.conf): 1,000 answers of at most 1.4 kB.
ARRAY_EVENTS_MAX = 1_000
META_NESTING_MAX = 32
# Each answer repeats the topic's device id, which can have 65 kB: of many, there is then one.
DEVICE_ID_ANSWERED_CHARS_MAX = 64
# Of a field's name in the text of a rejection.
NAME_CHARS_MAX = 50

_DEVICE_ID = re.compile(DEVICE_ID)
_NUMBER_RULE = "expected a finite number, got nan, an infinity or one too large for a double"
_DEVICE_ID_RULE = "device_id: expected 1 to 64 characters of A-Z a-z 0-9 _ . : -"
_TIMESTAMP = re.compile(TIMESTAMP)
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


class _Refused(Exception):
    """From where a fault is found to where it becomes a Rejection; never leaves this module."""

    def __init__(self, reason: Reason, error: str) -> None:
        super().__init__(reason, error)
        self.reason = reason
        self.error = error


def decode(device_id: str, payload: bytes, default_tz: tzinfo) -> Decoded:
    """Decode a payload: one event, or an array of events that each stand or fall alone.

    `device_id` is the topic's; `default_tz` applies to a ts_device without an offset. Never
    raises.
    """
    if len(payload) <= PAYLOAD_BYTES_MAX and (recognised := recognise(payload)):
        found, is_array = recognised
        if events := _recognised(found, device_id, default_tz):
            return Decoded(events, is_array, False)
    try:
        document, is_plain = _parse(payload)
    except _Refused as refused:
        # What is too large is looked at no further than what is not.
        head = payload[:PAYLOAD_BYTES_MAX]
        return _all_refused(refused, event_ids(head), begins_array(head), device_id)
    result = _result if is_plain else _checked_result
    if not isinstance(document, list):
        return Decoded([result(document, device_id, default_tz)], False, False)
    if refused_array := _refused_array(document, device_id):
        ids = [item.get("event_id") for item in document if isinstance(item, dict)]
        return _all_refused(refused_array, ids, True, device_id)
    return Decoded([result(item, device_id, default_tz) for item in document], True, False)


def _recognised(found: Sequence[Fields], device_id: str, default_tz: tzinfo) -> list[Event] | None:
    """Return the events; None if something is wrong, which parsing will find again and tell."""
    if len(found) > ARRAY_EVENTS_MAX:
        return None
    events = []
    for event_id, sent_device_id, schema, event_type, number, text, unit, sent_at, meta in found:
        if not (event_id and event_type and schema) or sent_device_id != device_id:
            return None
        value = None if number is None else float(number)
        # The number is too large, or the value is there twice, once as a text.
        if value is not None and (math.isinf(value) or text is not None):
            return None
        try:
            ts_device = None if sent_at is None else _moment(sent_at, default_tz)
        except (ValueError, OverflowError):
            return None
        meta = meta or "{}"
        event = Event(event_id, device_id, SCHEMA, event_type, value, text, unit, ts_device, meta)
        events.append(event)
    return events


def _refused_array(document: list[Any], device_id: str) -> _Refused | None:
    """Return why an array is refused as a whole, if it is."""
    if not document:
        return _Refused(Reason.NOT_AN_OBJECT, "the array is empty: expected event objects")
    if len(document) > ARRAY_EVENTS_MAX:
        return _Refused(
            Reason.PAYLOAD_TOO_LARGE,
            f"an array may hold {ARRAY_EVENTS_MAX} events, this one holds {len(document)}",
        )
    if not _DEVICE_ID.fullmatch(device_id):
        return _invalid(_DEVICE_ID_RULE)
    return None


def _all_refused(
    refused: _Refused, event_ids: Sequence[Any], is_array: bool, device_id: str
) -> Decoded:
    """Return one Rejection for each id that is one, or a single one without."""
    reason, error = refused.reason, refused.error
    ids: list[str | None] = [event_id for event_id in event_ids if _is_event_id(event_id)]
    if not ids or len(device_id) > DEVICE_ID_ANSWERED_CHARS_MAX:
        ids = [ids[0] if len(ids) == 1 else None]
    rejections = [Rejection(reason, error, event_id) for event_id in ids]
    return Decoded(rejections, is_array or len(ids) > 1, True)


def _result(fields: Any, device_id: str, default_tz: tzinfo) -> Event | Rejection:
    if not isinstance(fields, dict):
        return _no_object(_kind(fields))
    try:
        return _event(fields, device_id, default_tz)
    except _Refused as refused:
        return _rejection(refused, fields)


@cache
def _no_object(kind: str) -> Rejection:
    return Rejection(Reason.NOT_AN_OBJECT, f"expected an event object, got {kind}")


def _checked_result(fields: Any, device_id: str, default_tz: tzinfo) -> Event | Rejection:
    """Do the same where a number may be none, in a field that is ignored too."""
    if isinstance(fields, dict) and not holds_numbers(fields):
        name = next(name for name, value in fields.items() if not holds_numbers(value))
        return _rejection(_invalid(f"{_told(name)}: {_NUMBER_RULE}"), fields)
    return _result(fields, device_id, default_tz)


@lru_cache(maxsize=256)
def _shared(error: str) -> str:
    """Return the same object for the same text: of a thousand answers, most say the same."""
    return error


def _rejection(refused: _Refused, fields: dict[str, Any]) -> Rejection:
    # The device knows its event by the id, so the answer carries it where it can.
    event_id = fields.get("event_id")
    event_id = event_id if _is_event_id(event_id) else None
    return Rejection(refused.reason, _shared(refused.error), event_id)


def _parse(payload: bytes) -> tuple[Any, bool]:
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise _Refused(
            Reason.PAYLOAD_TOO_LARGE,
            f"a payload may have {PAYLOAD_BYTES_MAX} bytes, this one has {len(payload)}",
        )
    try:
        return parse(payload)
    except UnicodeDecodeError as error:
        raise _Refused(Reason.NOT_UTF8, f"byte {error.start} is not UTF-8") from None
    except NotJSONError as error:
        raise _Refused(Reason.NOT_JSON, str(error)) from None


# Made once: json.dumps() makes one at every call that is not to escape what is not ASCII.
_TO_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def _event(fields: dict[str, Any], device_id: str, default_tz: tzinfo) -> Event:
    _check_schema(_required(fields, "schema"))
    event_id = _text(_required(fields, "event_id"), "event_id", 1, EVENT_ID_CHARS_MAX)
    _check_device_id(_required(fields, "device_id"), device_id)
    event_type = _text(_required(fields, "event_type"), "event_type", 1, EVENT_TYPE_CHARS_MAX)
    value_num, value_text = _value(fields.get("value"))
    unit = None if fields.get("unit") is None else _text(fields["unit"], "unit", 0, UNIT_CHARS_MAX)
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


def _is_event_id(value: Any) -> TypeGuard[str]:
    if not isinstance(value, str):
        return False
    try:
        _text(value, "event_id", 1, EVENT_ID_CHARS_MAX)
    except _Refused:
        return False
    return True


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
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isinf(number):
            raise _invalid(f"value: {_NUMBER_RULE}")
        return number, None
    raise _mistyped("value", "a number or a string", value)


def _timestamp(value: Any, default_tz: tzinfo) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _mistyped("ts_device", "a string", value)
    if _TIMESTAMP.fullmatch(value):
        try:
            return _moment(value, default_tz)
        except (ValueError, OverflowError):
            pass
    raise _invalid("ts_device: expected ISO 8601 date and time, such as 2026-02-10T00:00:00Z")


def _moment(timestamp: str, default_tz: tzinfo) -> datetime:
    """Raise ValueError for 30 February, OverflowError for year 1 at +14:00."""
    moment = datetime.fromisoformat(timestamp)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=default_tz)
    return moment.astimezone(UTC)


def _meta(value: Any) -> str:
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise _mistyped("meta", "an object", value)
    # Before it is written, which costs more; and what is flat, as most are, need not be looked at.
    if not _CONTAINERS.isdisjoint(map(type, value.values())) and _nests_deeper(value):
        raise _invalid(f"meta: nested deeper than {META_NESTING_MAX} levels")
    try:
        text = _TO_JSON.encode(value)
    except ValueError:  # an infinity
        raise _invalid(f"meta: {_NUMBER_RULE}") from None
    if ("\\u0000" in text or not text.isprintable()) and _UNSTORABLE_JSON.search(text):
        raise _invalid("meta: a string holds U+0000 or half of a surrogate pair")
    return text


def _nests_deeper(meta: dict[str, Any]) -> bool:
    # What is absurdly deep is mostly one in the other and nothing beside: a third of the time.
    node: Any = meta
    for _ in range(META_NESTING_MAX):
        if len(node) != 1:
            break
        (node,) = node.values() if type(node) is dict else node
        if type(node) not in _CONTAINERS:
            return False
    else:
        return True
    # Level by level and not recursively: the depth is the device's to choose.
    level: list[Any] = [meta]
    for _ in range(META_NESTING_MAX):
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) in _CONTAINERS
        ]
        if not level:
            return False
    return True


def _told(name: str) -> str:
    """Return the name of a field as the text of a rejection has it, whatever it is."""
    cut = name if len(name) <= NAME_CHARS_MAX else f"{name[:NAME_CHARS_MAX]}..."
    return cut if cut.isprintable() else ascii(cut)[1:-1]


def _invalid(error: str) -> _Refused:
    return _Refused(Reason.INVALID_FIELD, error)


def _mistyped(name: str, expected: str, value: Any) -> _Refused:
    return _invalid(f"{name}: expected {expected}, got {_kind(value)}")


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # null, true, false
    return _KINDS.get(type(value), "a number")


_CONTAINERS = frozenset({dict, list})
_KINDS: dict[type, str] = {str: "a string", list: "an array", dict: "an object"}
