"""What an address may say of a period, how finely one is drawn, and where a line has a gap."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page.period import RANGES, BadPeriod, Period, gaps_after, read_period, step_seconds

NOW = datetime(2026, 11, 26, 8, tzinfo=UTC)
DAY = {"from": "2026-11-25T00:00:00Z", "to": "2026-11-26T00:00:00Z"}


@pytest.mark.parametrize(("name", "seconds"), RANGES.items())
def test_a_named_range_ends_now(name: str, seconds: int) -> None:
    period = read_period({"range": name}, NOW)
    assert period.name == name
    assert period.since == NOW - timedelta(seconds=seconds)
    assert NOW < period.until <= NOW + timedelta(seconds=1)


def test_without_a_period_it_is_the_last_day() -> None:
    assert read_period({}, NOW) == read_period({"range": "24h"}, NOW)


def test_a_period_of_ones_own_is_read_in_any_zone() -> None:
    period = read_period(DAY | {"to": "2026-11-26T01:00:00+01:00"}, NOW)
    assert period == Period(datetime(2026, 11, 25, tzinfo=UTC), datetime(2026, 11, 26, tzinfo=UTC))
    assert (period.seconds, period.name) == (86_400, "")


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"range": "2h"}, "range: must be one of 1h, 24h, 7d, 30d, 1y"),
        ({"range": ""}, "range: "),
        ({"from": DAY["from"]}, "to: must be a time"),
        ({"to": DAY["to"]}, "from: must be a time"),
        (DAY | {"from": "yesterday"}, "from: must be a time"),
        (DAY | {"to": "\0"}, "to: must be a time"),
        (DAY | {"to": "2026-11-26T00:00:00"}, "to: needs a time zone"),
        (DAY | {"from": DAY["to"]}, "from: must be before"),
        (DAY | {"from": "1969-12-31T23:00:00Z"}, "from: must be a year"),
        (DAY | {"to": "9999-12-31T23:59:59-14:00"}, "to: must be a year"),
        (DAY | {"from": "0001-01-01T00:00:00+14:00"}, "from: must be a year"),
        (DAY | {"from": "1990-01-01T00:00:00Z"}, "from: must be at most 20 years"),
    ],
)
def test_what_is_wrong_is_named(parameters: dict[str, str], problem: str) -> None:
    with pytest.raises(BadPeriod) as found:
        read_period(parameters, NOW)
    assert str(found.value).startswith(problem)


@given(st.dictionaries(st.sampled_from(["from", "to", "range"]), st.text(max_size=40)))
def test_any_other_text_is_a_bad_period_and_nothing_else(parameters: dict[str, str]) -> None:
    try:
        seconds, problem = read_period(parameters, NOW).seconds, ""
    except BadPeriod as error:
        seconds, problem = 0, str(error)
    assert seconds > 0 or problem.partition(":")[0] in ("from", "to", "range")


@given(
    st.datetimes(datetime(1970, 1, 1), datetime(2080, 1, 1)),
    st.floats(0.001, timedelta(days=366 * 20).total_seconds()),
    st.integers(80, 2_000),
)
def test_a_period_has_no_more_steps_than_were_asked_for(
    since: datetime, seconds: float, steps_max: int
) -> None:
    start = since.replace(tzinfo=UTC)
    period = Period(start, start + timedelta(seconds=seconds))
    step = step_seconds(period, steps_max)
    # As the database groups them.
    first, last = period.since.timestamp() // step, period.until.timestamp() // step
    assert last - first + 1 <= steps_max


def test_a_pause_of_three_usual_ones_is_a_gap() -> None:
    assert gaps_after([0, 60, 120, 180]) == []
    assert gaps_after([0, 60, 120, 300, 360]) == []  # exactly three is none
    assert gaps_after([0, 60, 120, 301, 361]) == [2]


def test_a_step_without_points_is_a_gap_when_each_has_some() -> None:
    assert gaps_after([0, 600, 1200, 3000, 3600], step=600) == []
    assert gaps_after([0, 600, 1200, 3001, 3600], step=600) == [2]
    # A device that speaks less often than a step is long has none in between.
    assert gaps_after([0, 3600, 7200], step=600) == []


def test_readings_of_one_delivery_do_not_make_all_else_a_gap() -> None:
    assert gaps_after([0, 0, 0, 60, 60, 120]) == []
    assert gaps_after([]) == gaps_after([1]) == gaps_after([1, 1]) == []


@given(st.lists(st.floats(0, 1e9), max_size=50), st.sampled_from([0, 1, 60, 3600]))
def test_gaps_are_places_between_two_points(times: list[float], step: float) -> None:
    times.sort()
    places = gaps_after(times, step)
    assert all(0 <= place < len(times) - 1 for place in places)
