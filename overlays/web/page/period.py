"""A period of time to look at, and how finely it is drawn.

What it does: reads a period from an address, chooses the length of a step, and finds the gaps
between points. What it does not: ask the database. Pure.

Invariant: a period has a positive length, and its steps are no more than were asked for.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

DAY_SECONDS = 86_400
# What the buttons say, and what it means in seconds.
RANGES = {
    "1h": 3_600,
    "24h": DAY_SECONDS,
    "7d": 7 * DAY_SECONDS,
    "30d": 30 * DAY_SECONDS,
    "1y": 365 * DAY_SECONDS,
}
RANGE_DEFAULT = "24h"
LENGTH_MAX = timedelta(days=366 * 20)
# Steps that a person would choose, in seconds. Beyond two days they are whole weeks.
STEPS_SECONDS = (
    *(1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1_800),
    *(3_600, 7_200, 10_800, 21_600, 43_200, DAY_SECONDS, 2 * DAY_SECONDS),
)
WEEK_SECONDS = 7 * DAY_SECONDS
# A pause of so many usual ones is a gap, as in the view silent_devices.
GAP_PAUSES = 3


class BadPeriod(ValueError):
    """The address names a period that cannot be; the text says which part, and what would do."""


@dataclass(frozen=True)
class Period:
    """From `since` up to but without `until`; `name` if it is one of RANGES, which ends now."""

    since: datetime
    until: datetime
    name: str = ""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.until - self.since).total_seconds()


def read_period(parameters: Mapping[str, str], now: datetime) -> Period:
    """Read `from` and `to`, or `range`, of an address; without any the last day.

    Raises BadPeriod.
    """
    if "from" in parameters or "to" in parameters:
        since = _read_time(parameters, "from")
        until = _read_time(parameters, "to")
        if since >= until:
            raise BadPeriod("from: must be before `to`")
        if until - since > LENGTH_MAX:
            raise BadPeriod("from: must be at most 20 years before `to`")
        return Period(since, until)
    name = parameters.get("range", RANGE_DEFAULT)
    if name not in RANGES:
        raise BadPeriod(f"range: must be one of {', '.join(RANGES)}")
    # A second more, for what has just been stored by a clock that is ahead of ours.
    return Period(now - timedelta(seconds=RANGES[name]), now + timedelta(seconds=1), name)


def _read_time(parameters: Mapping[str, str], name: str) -> datetime:
    try:
        time = datetime.fromisoformat(parameters[name])
    except (KeyError, ValueError):
        raise BadPeriod(f"{name}: must be a time such as 2026-11-26T08:00:00Z") from None
    if time.tzinfo is None:
        raise BadPeriod(f"{name}: needs a time zone, as in 2026-11-26T08:00:00Z")
    if not 1970 <= time.year <= 9000:
        raise BadPeriod(f"{name}: must be a year from 1970 to 9000")
    return time.astimezone(UTC)


def step_seconds(period: Period, steps_max: int) -> int:
    """Return the shortest step of which no more than so many make up the period."""
    # One more than fits, as the period begins and ends somewhere in a step.
    shortest = period.seconds / (steps_max - 1)
    for step in STEPS_SECONDS:
        if step >= shortest:
            return step
    return math.ceil(shortest / WEEK_SECONDS) * WEEK_SECONDS


def gaps_after(times: Sequence[float], step: float = 0) -> list[int]:
    """Return the places in `times` (ascending, in seconds) behind which there is a gap.

    That is a pause of three usual ones, the usual one being the median; of points that stand for
    steps of time, one that is longer than a step and a half.
    """
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    positive = [pause for pause in pauses if pause > 0]  # the others came in one delivery
    if not positive:
        return []
    longest = max(GAP_PAUSES * statistics.median(positive), 1.5 * step)
    return [place for place, pause in enumerate(pauses) if pause > longest]
