"""Outages: when a failing thing is tried again, and how much the log says of it.

What it does: plays outages against a clock that the test sets. What it does not: wait.
"""

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from ingester import outage
from ingester.outage import BACKOFF_SECONDS_MAX, Outage


class Clock:
    """Stands in the module where `time` does."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(outage, "time", clock)
    return clock


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """A function that returns the log lines since its last call, each with its level."""
    caplog.set_level(logging.DEBUG, "ingester.outage")

    def take() -> list[tuple[str, str]]:
        taken = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return taken

    return take


Lines = Callable[[], list[tuple[str, str]]]


def jitter_of(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Let every random number be the lowest, or the highest, that is asked for."""
    uniform = min if end == "lowest" else max
    monkeypatch.setattr(outage, "random", SimpleNamespace(uniform=uniform))


def test_without_a_failure_there_is_nothing_to_wait_for_or_to_say(
    clock: Clock, lines: Lines
) -> None:
    thing = Outage("Postgres")
    assert not thing.is_ongoing
    assert thing.pause_seconds() == 0
    thing.recovered()
    assert not thing.is_ongoing
    assert lines() == []


def test_the_log_says_when_an_outage_begins_once_a_minute_and_when_it_ends(
    clock: Clock, lines: Lines
) -> None:
    thing = Outage("Postgres")
    thing.failed("connection refused")
    assert thing.is_ongoing
    assert lines() == [
        ("WARNING", "Postgres: connection refused; trying again until it works"),
    ]
    began = clock.now
    for seconds, expected in [
        (1, []),
        (59.9, []),
        (60, [("WARNING", "Postgres: still failing after 60 s: no route")]),
        (61, []),
        (119.9, []),
        (121, [("WARNING", "Postgres: still failing after 121 s: no route")]),
        # A minute after the last line, and not two minutes after the first.
        (180.9, []),
        (181, [("WARNING", "Postgres: still failing after 181 s: no route")]),
        (4000, [("WARNING", "Postgres: still failing after 4000 s: no route")]),
    ]:
        clock.now = began + seconds
        thing.failed("no route")
        assert lines() == expected
    clock.now = began + 4001.25
    thing.recovered()
    assert lines() == [("INFO", "Postgres: back after 4001.2 s")]
    thing.recovered()
    assert lines() == []
    assert not thing.is_ongoing


def test_a_later_outage_begins_anew(clock: Clock, lines: Lines) -> None:
    thing = Outage("MQTT")
    for _ in range(10):
        thing.failed("gone")
    clock.now += 3600
    thing.recovered()
    lines()
    clock.now += 3600
    assert thing.pause_seconds() == 0
    thing.failed("gone again")
    assert lines() == [("WARNING", "MQTT: gone again; trying again until it works")]
    assert thing.pause_seconds() <= 0.1
    clock.now += 5
    thing.recovered()
    assert lines() == [("INFO", "MQTT: back after 5.0 s")]


def test_one_outage_says_nothing_of_another(clock: Clock) -> None:
    broken, fine = Outage("MQTT"), Outage("Postgres")
    broken.failed("gone")
    assert broken.is_ongoing
    assert not fine.is_ongoing
    assert fine.pause_seconds() == 0


@pytest.mark.parametrize(("end", "share"), [("lowest", 0.75), ("highest", 1.0)])
def test_the_pause_doubles_with_each_try_up_to_2_seconds(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, end: str, share: float
) -> None:
    jitter_of(monkeypatch, end)
    thing = Outage("MQTT")
    for seconds in [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]:
        thing.failed("gone")
        assert thing.pause_seconds() == pytest.approx(seconds * share)
        clock.now += seconds


def test_the_pause_is_random_and_never_outside_of_its_bounds(clock: Clock) -> None:
    pauses = set()
    for _ in range(200):
        thing = Outage("MQTT")
        thing.failed("gone")
        pauses.add(thing.pause_seconds())
    assert 0.075 - 1e-6 <= min(pauses) < max(pauses) <= 0.1 + 1e-6
    assert len(pauses) > 100


def test_the_pause_runs_off_with_the_clock_and_never_below_zero(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    jitter_of(monkeypatch, "highest")
    thing = Outage("MQTT")
    thing.failed("gone")
    clock.now += 0.04
    assert thing.pause_seconds() == pytest.approx(0.06)
    clock.now += 0.0601
    assert thing.pause_seconds() == 0
    clock.now += 1000
    assert thing.pause_seconds() == 0
    assert thing.is_ongoing


def test_the_pause_stays_at_its_limit_after_a_night_of_failures(clock: Clock) -> None:
    thing = Outage("MQTT")
    for _ in range(100_000):
        thing.failed("gone")
        assert thing.pause_seconds() <= BACKOFF_SECONDS_MAX + 1e-6
        clock.now += thing.pause_seconds()


def test_there_are_at_most_ten_tries_in_the_first_second(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    jitter_of(monkeypatch, "lowest")
    thing, began, tries = Outage("MQTT"), clock.now, 0
    while clock.now < began + 1:
        tries += 1
        thing.failed("gone")
        clock.now += max(thing.pause_seconds(), 0.001)
    assert 3 <= tries <= 10


def test_a_fault_that_lasts_makes_at_most_two_lines_in_any_minute(
    clock: Clock, lines: Lines
) -> None:
    thing = Outage("MQTT")
    said_at = []
    for _ in range(20_000):
        thing.failed("gone")
        said_at += [clock.now] * len(lines())
        clock.now += 0.05
    for moment in said_at:
        assert sum(moment <= other < moment + 60 for other in said_at) <= 2


# Two ingesters with one client id cut each other off like this.
def test_a_thing_that_comes_and_goes_fills_neither_log_nor_time(clock: Clock, lines: Lines) -> None:
    thing, began, tries = Outage("MQTT"), clock.now, 0
    while clock.now < began + 60:
        tries += 1
        thing.failed("taken over")
        clock.now += max(thing.pause_seconds(), 0.001)
        thing.recovered()
        clock.now += 0.001
    assert len(lines()) <= 20
    assert tries <= 120
