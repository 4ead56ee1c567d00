"""Points in time as other firmware writes them.

What it does: ISO 8601 with and without an offset, with a blank or a T, and seconds, milliseconds,
microseconds or nanoseconds since 1970. What it does not: ask a clock; the present is handed in.

Invariant: never raises, and what comes out is in UTC, not before 2001 and not in the future.
"""

import re
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

# Clocks that are not set begin in 1970 or 2000.
PLAUSIBLE_FROM = datetime(2001, 1, 1, tzinfo=UTC)
# So much may another clock be ahead of ours.
AHEAD_MAX = timedelta(minutes=2)

_EPOCH_BEGIN = datetime(1970, 1, 1, tzinfo=UTC)
_ISO = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[T ]([0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:[.,]([0-9]{1,12}))?"
    r"\s?(Z|z|UTC|[+-][0-9]{2}(?::?[0-9]{2})?)?"
)
_EPOCH = re.compile(r"[0-9]{9,20}(?:\.[0-9]{1,12})?")


def moment(given: Any, zone: tzinfo, received_at: datetime) -> datetime | None:
    """Return the point in time that is given, in UTC; None for none, or an implausible one."""
    found: datetime | None = None
    if isinstance(given, str):
        text = given.strip(" \t\r\n\0")
        if iso := _ISO.fullmatch(text):
            found = _from_iso(iso, zone, received_at)
        elif _EPOCH.fullmatch(text):
            found = _from_epoch(float(text))
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        found = _from_epoch(given)
    if found is None or not PLAUSIBLE_FROM <= found <= received_at + AHEAD_MAX:
        return None
    return found


def _from_epoch(number: float) -> datetime | None:
    for factor in (1, 1_000, 1_000_000, 1_000_000_000):  # until the year 5138 of each
        if abs(number) < 1e11 * factor:
            try:
                return _EPOCH_BEGIN + timedelta(microseconds=round(number * 1_000_000 / factor))
            except (OverflowError, ValueError):
                return None
    return None


def _from_iso(iso: re.Match[str], zone: tzinfo, received_at: datetime) -> datetime | None:
    date, clock, fraction, offset = iso.groups()
    clock = clock if len(clock) == 8 else f"{clock}:00"
    try:
        local = datetime.fromisoformat(f"{date}T{clock}.{(fraction or '0')[:6]:0<6}")
        if offset is None:
            return _from_local(local, zone, received_at)
        if offset in ("Z", "z", "UTC"):
            return local.replace(tzinfo=UTC)
        digits = offset[1:].replace(":", "")
        away = timedelta(hours=int(digits[:2]), minutes=int(digits[2:] or 0))
        return local.replace(tzinfo=UTC) + (away if offset[0] == "-" else -away)
    except (ValueError, OverflowError):  # 30 February; the year 1
        return None


def _from_local(local: datetime, zone: tzinfo, received_at: datetime) -> datetime:
    """Return a local time in UTC. Of an hour that the clock shows twice, the first one.

    Unless it came within the hour after the second: then that one is meant.
    """
    first = local.replace(tzinfo=zone).astimezone(UTC)
    second = local.replace(tzinfo=zone, fold=1).astimezone(UTC)
    if first < second and second - AHEAD_MAX <= received_at < second + (second - first):
        return second
    return first
