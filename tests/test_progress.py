"""Progress: what the log and the status topic say, and when the heart beats.

What it does: plays the turns of the loop against a clock that the test sets. What it does
not: wait, or publish.
"""

import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ingester import __version__, progress
from ingester.progress import OFFLINE, Progress, State

BATCH = Counter(messages=2, received=5, stored=3, duplicates=1, rejected=1, dead_lettered=1)


class Clock:
    """Stands in the module where `time` does."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def status(told: Progress, connection: int = 1) -> dict[str, Any]:
    """Return what is to be published; empty if it is not time yet."""
    body: dict[str, Any] = json.loads(told.status(connection, in_hand=0) or b"{}")
    return body


def test_the_first_events_are_summarised_at_once_and_a_flood_every_10_s(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ingester.progress")
    told = Progress(None)
    for _ in range(250):
        told.settled(BATCH, 0.001)
        told.update(State.ONLINE, healthy=True)
        clock.now += 0.1
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "messages 2, stored 3, duplicates 1, rejected 1",
        "messages 200, stored 300, duplicates 100, rejected 100",
        "messages 200, stored 300, duplicates 100, rejected 100",
    ]


def test_a_quiet_hour_says_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "ingester.progress")
    told = Progress(None)
    for _ in range(3600):
        told.update(State.ONLINE, healthy=True)
        clock.now += 1
    assert caplog.records == []


def test_the_status_has_every_documented_field(clock: Clock) -> None:
    told = Progress(None)
    told.settled(BATCH, 0.001)
    told.settled(BATCH, 0.001)
    clock.now += 12.4
    told.update(State.ONLINE, healthy=True)
    body = status(told)
    for name in ("since", "last_commit_at"):
        assert body.pop(name).endswith("Z")
    assert body == {
        "state": "online",
        "version": __version__,
        "uptime_seconds": 12,
        "counters": {
            "received": 10,
            "stored": 6,
            "duplicates": 2,
            "rejected": 2,
            "dead_lettered": 2,
        },
        "batches": 2,
        "in_hand": 0,
    }


def test_the_status_is_due_on_connect_on_a_change_of_state_and_every_10_s(clock: Clock) -> None:
    told = Progress(None)
    assert not status(told)  # before the first turn there is no state
    told.update(State.WAITING_FOR_DATABASE, healthy=False)
    assert status(told, 1)
    assert not status(told, 1)
    assert status(told, 2)
    told.update(State.ONLINE, healthy=True)
    assert status(told, 2)
    clock.now += 9.9
    assert not status(told, 2)
    clock.now += 0.1
    assert status(told, 2)
    assert not status(told, 2)


def test_since_is_when_the_state_began(clock: Clock) -> None:
    told = Progress(None)
    told.update(State.ONLINE, healthy=True)
    first = status(told, 1)
    told.update(State.ONLINE, healthy=True)
    again = status(told, 2)
    told.update(State.WAITING_FOR_DATABASE, healthy=False)
    changed = status(told, 2)
    assert first["since"] == again["since"] <= changed["since"]
    assert (again["state"], changed["state"]) == ("online", "waiting_for_database")


def test_the_last_word_is_that_it_is_offline() -> None:
    assert json.loads(OFFLINE) == {"state": "offline"}


def test_the_heart_beats_once_a_second_and_only_while_all_is_well(
    clock: Clock, tmp_path: Path
) -> None:
    heartbeat = tmp_path / "heartbeat"
    told = Progress(str(heartbeat))

    def beats(healthy: bool) -> bool:
        if heartbeat.exists():
            os.utime(heartbeat, (0, 0))
        told.update(State.ONLINE, healthy=healthy)
        return heartbeat.exists() and heartbeat.stat().st_mtime > 0

    assert not beats(healthy=False)
    assert beats(healthy=True)
    assert not beats(healthy=True)
    clock.now += 1
    assert not beats(healthy=False)
    assert beats(healthy=True)
