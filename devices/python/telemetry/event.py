"""An event as it goes over the wire: from the caller's values to bytes.

What it does: refuses what the ingester would reject, and writes the rest as JSON. What it
does not: keep or send it, or ask for the time.

Invariant: it writes an event once; whoever sends it again sends the same bytes.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from .errors import EventRefused

EVENT_ID_CHARS_MAX = 200
TYPE_CHARS_MAX = 100
UNIT_CHARS_MAX = 50
NESTING_MAX = 32
NO_TIME = 0.0  # what the clock shows that was never set
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# A clock outside of them was never set: from 2024 on, before 2100, and not 6 to 8 February
# 2036, as an empty NTP answer is the 7th.
PLAUSIBLE = (
    (datetime(2024, 1, 1, tzinfo=UTC), datetime(2036, 2, 6, tzinfo=UTC)),
    (datetime(2036, 2, 9, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)),
)
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
DEVICE_ID = re.compile("[A-Za-z0-9_.:-]{1,64}")
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Event:
    """What add_all() takes; `device_id` may be left out where the outbox has one.

    `timestamp`: seconds since 1970, as time.time() gives them: left out if that clock was
    never set; or a datetime (without a zone it is local time), which is taken for what it says;
    None: now; NO_TIME: the event has none. `event_id`: None for one of the outbox's own.
    `dead_letter`: in place of a value, what never can be one: the ingester will reject the
    event for it, and keep it where a person can look at it.
    """

    event_type: str
    value: float | str | None = None
    unit: str | None = None
    timestamp: datetime | float | None = None
    meta: Mapping[str, Any] | None = None
    device_id: str | None = None
    event_id: str | None = None
    dead_letter: Mapping[str, Any] | None = None


def is_device_id(device_id: object) -> bool:
    return isinstance(device_id, str) and DEVICE_ID.fullmatch(device_id) is not None


def timestamp_text(timestamp: datetime | float) -> str | None:
    """Return a moment in ISO 8601, or None if the clock that gave it was not set."""
    if isinstance(timestamp, datetime):
        moment = timestamp.astimezone(UTC)
    else:  # a float's noise is not sent: milliseconds, as clocks of devices have them
        milliseconds = round(timestamp * 1000)
        moment = EPOCH + timedelta(milliseconds=milliseconds)
        if not any(first <= moment < end for first, end in PLAUSIBLE):
            return None
    is_fine = moment.microsecond % 1000
    timespec = "microseconds" if is_fine else "milliseconds" if moment.microsecond else "seconds"
    return moment.isoformat(timespec=timespec).removesuffix("+00:00") + "Z"


def event_bytes(event_id: str, device_id: str, event: Event, now: str | None) -> bytes:
    """Return the event in JSON, or raise EventRefused if the ingester would reject it.

    `now` is the time of an event that has none of its own.
    """
    _check_text("event_id", event_id, 1, EVENT_ID_CHARS_MAX)
    _check_text("event_type", event.event_type, 1, TYPE_CHARS_MAX)
    fields: dict[str, Any] = {
        "schema": 1,
        "event_id": event_id,
        "device_id": device_id,
        "event_type": event.event_type,
    }
    value = event.value
    if event.dead_letter is not None:
        fields["value"] = _object("dead_letter", event.dead_letter)
    elif value is not None:
        if not isinstance(value, (bool, int, float, str)):
            raise EventRefused(f"value: expected a number or a string, got {type(value).__name__}")
        _check_storable("value", value, 0)
        fields["value"] = int(value) if isinstance(value, bool) else value
    if event.unit is not None:
        _check_text("unit", event.unit, 0, UNIT_CHARS_MAX)
        fields["unit"] = event.unit
    try:
        timestamp = now if event.timestamp is None else timestamp_text(event.timestamp)
    except (TypeError, ValueError, OverflowError):
        raise EventRefused("timestamp: expected a datetime or seconds since 1970") from None
    if timestamp is not None:
        fields["ts_device"] = timestamp
    if event.meta is not None:
        fields["meta"] = _object("meta", event.meta)
    try:
        return ENCODER.encode(fields).encode()
    except UnicodeEncodeError:
        raise EventRefused("a text has half of a surrogate pair") from None


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EventRefused(f"{name}: expected a dict, got {type(value).__name__}")
    _check_storable(name, value, 0)
    return value


def _check_text(name: str, text: object, chars_min: int, chars_max: int) -> None:
    if not isinstance(text, str) or not chars_min <= len(text) <= chars_max:
        raise EventRefused(f"{name}: expected a string of {chars_min} to {chars_max} characters")
    if not text.isprintable() and CONTROLS.search(text):
        raise EventRefused(f"{name}: has a control character")


def _check_storable(name: str, value: object, depth: int) -> None:
    """Refuse what PostgreSQL does not take: nan, U+0000, what is too large or too deep."""
    if isinstance(value, str):
        if "\0" in value:
            raise EventRefused(f"{name}: has the character U+0000")
    elif isinstance(value, (int, float)):  # bool too
        try:
            is_number = math.isfinite(value)
        except OverflowError:
            is_number = False
        if not is_number:
            raise EventRefused(f"{name}: not a finite number")
    elif isinstance(value, (dict, list, tuple)):
        if depth == NESTING_MAX:
            raise EventRefused(f"{name}: nested deeper than {NESTING_MAX} levels")
        for item in value.values() if isinstance(value, dict) else value:
            _check_storable(name, item, depth + 1)
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str):
                raise EventRefused(f"{name}: a name in it is no string")
            _check_storable(name, key, depth)
    elif value is not None:
        raise EventRefused(f"{name}: {type(value).__name__} is nothing that JSON has")
