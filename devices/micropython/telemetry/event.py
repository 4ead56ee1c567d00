"""An event as it goes over the wire: from the caller's values to bytes.

What it does: refuses what the ingester would reject, and writes the rest as JSON. What it
does not: keep or send it, or ask for the time.

Invariant: it writes an event once; whoever sends it again sends the same bytes.
"""

from json import dumps

TYPE_CHARS_MAX = 100
UNIT_CHARS_MAX = 50
NESTING_MAX = 32
# Seconds since 1970. A clock outside of them was never set: from 2024 on, before 2100, and not
# 6 to 8 February 2036, as an empty NTP answer is the 7th.
PLAUSIBLE = ((1_704_067_200, 2_085_868_800), (2_086_128_000, 4_102_444_800))


def is_device_id(device_id: str) -> bool:
    """Tell whether it has 1 to 64 characters of A-Z a-z 0-9 _ . : -"""
    if not 1 <= len(device_id) <= 64:
        return False
    for char in device_id:
        if not ("a" <= char <= "z" or "A" <= char <= "Z" or "0" <= char <= "9" or char in "_.:-"):
            return False
    return True


def timestamp_text(unix_ms: int) -> str | None:
    """Return a moment in ISO 8601, or None if the clock that gave it was not set."""
    seconds = unix_ms // 1000
    if not (
        PLAUSIBLE[0][0] <= seconds < PLAUSIBLE[0][1] or PLAUSIBLE[1][0] <= seconds < PLAUSIBLE[1][1]
    ):
        return None
    # By hand: gmtime() begins in 1970 or 2000 and ends in 2038 or later, as the board has it.
    # Years of this count begin in March, so that the leap day is the last; 400 of them are one
    # era of 146,097 days. Day 0 is 1 March 0000.
    days = seconds // 86_400 + 719_468
    of_era = days % 146_097
    year = (of_era - of_era // 1_460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    month = (5 * of_year + 2) // 153
    day = of_year - (153 * month + 2) // 5 + 1
    month = month + 3 if month < 10 else month - 9
    year += days // 146_097 * 400 + (month <= 2)
    seconds %= 86_400
    text = "%04d-%02d-%02dT%02d:%02d:%02d" % (
        year,
        month,
        day,
        seconds // 3600,
        seconds // 60 % 60,
        seconds % 60,
    )
    return text + (".%03dZ" % (unix_ms % 1000) if unix_ms % 1000 else "Z")


def event_bytes(
    event_id: str,
    device_id: str,
    event_type: str,
    value: object,
    unit: str | None,
    unix_ms: int,
    meta: object,
) -> bytes | None:
    """Return the event in JSON, or None if the ingester would reject it."""
    if not (
        _is_text(event_type, 1, TYPE_CHARS_MAX)
        and (unit is None or _is_text(unit, 0, UNIT_CHARS_MAX))
        and not isinstance(value, (dict, list, tuple))
        and _is_storable(value, 0)
        and (meta is None or (isinstance(meta, dict) and _is_storable(meta, 0)))
    ):
        return None
    # By hand: MicroPython does not keep the order of a dict's keys. In parts, joined once.
    parts = [
        '{"schema":1,"event_id":"',
        event_id,
        '","device_id":"',
        device_id,
        '","event_type":',
        dumps(event_type),
    ]
    if value is not None:
        parts.append(',"value":')
        parts.append(dumps(int(value) if isinstance(value, bool) else value))
    if unit is not None:
        parts.append(',"unit":')
        parts.append(dumps(unit))
    timestamp = timestamp_text(unix_ms)
    if timestamp is not None:
        parts.append(',"ts_device":"')
        parts.append(timestamp)
        parts.append('"')
    if meta is not None:
        parts.append(',"meta":')
        parts.append(dumps(meta, separators=(",", ":")))
    parts.append("}")
    return "".join(parts).encode()


def event_id_of(event: bytes) -> str | None:
    """Return the id of what event_bytes() made, None if it is anything else."""
    if not event.startswith(b'{"schema":1,"event_id":"'):
        return None
    end = event.find(b'"', 24)
    return event[24:end].decode() if end > 24 else None


def _is_text(text: object, chars_min: int, chars_max: int) -> bool:
    return (
        isinstance(text, str)
        and chars_min <= len(text) <= chars_max
        and _is_clean(text.encode(), True)
    )


def _is_clean(text: bytes, is_one_line: bool) -> bool:
    """Tell whether UTF-8 is free of U+0000 and halves of surrogate pairs; or of all controls."""
    before = 0
    for byte in text:  # of bytes: a loop over characters makes an object of each
        if byte == 0 or (before == 0xED and byte >= 0xA0):
            return False
        if is_one_line and (byte < 0x20 or byte == 0x7F or (before == 0xC2 and byte < 0xA0)):
            return False
        before = byte
    return True


def _is_storable(value: object, depth: int) -> bool:
    """Tell whether PostgreSQL takes it: no nan, no U+0000, not too deep."""
    if value is None or isinstance(value, (bool, int)):
        return True
    if isinstance(value, float):
        return value - value == 0  # neither nan nor an infinity
    if isinstance(value, str):
        return _is_clean(value.encode(), False)
    if depth == NESTING_MAX:
        return False
    if isinstance(value, dict):
        return all(
            isinstance(name, str) and _is_storable(name, 0) and _is_storable(item, depth + 1)
            for name, item in value.items()
        )
    if isinstance(value, (list, tuple)):
        return all(_is_storable(item, depth + 1) for item in value)
    return False
