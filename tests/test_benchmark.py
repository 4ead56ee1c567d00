"""The benchmark, in its short form: all stored, all ACKed, and far ahead of the plain script.

What it does: runs it as a person does and prints its figures; checks that its devices notice
what is missing. What it does not: assert a time; only the ratio within one run.

Invariant: a benchmark that loses an event fails, however fast it is.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest

from benchmark.fleet import Fleet, FleetError, publishes
from benchmark.report import median
from tests.pipeline import Pipeline
from tools.process import CHECKOUT

pytestmark = pytest.mark.services


def ignore(_: int) -> None:
    pass


def test_the_short_form_stores_and_acks_all_and_is_far_ahead(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmark.run", "--short"],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert "events/s stored and ACKed" in done.stdout


@pytest.mark.parametrize("events_each", [1, 3])
def test_the_devices_hear_an_ack_for_each_event(running: Pipeline, events_each: int) -> None:
    with Fleet(running.mosquitto.port) as fleet:
        packets = publishes("all", 200, events_each)
        assert fleet.closed_loop(packets, 70, ignore) > 0
        assert len(fleet.open_loop(publishes("due", 100), 500, ignore)) == 100
    assert running.database.query("SELECT count(*) FROM events") == [(200 * events_each + 100,)]


@pytest.mark.parametrize("run", ["closed", "backlog"])
def test_the_devices_notice_an_ack_that_is_missing(
    running: Pipeline, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    monkeypatch.setattr("benchmark.fleet.SILENCE_SECONDS_MAX", 1.0)
    good, bad = publishes("good", 49), publishes("bad", 50)[49]
    refused = bad._replace(packet=bad.packet.replace(b'"schema": 1', b'"schema": 2'))
    with Fleet(running.mosquitto.port) as fleet:
        measure: dict[str, Callable[[], float]] = {
            "closed": lambda: fleet.closed_loop([*good, refused], 50, ignore),
            "backlog": lambda: fleet.hear_all([*good, refused], ignore),
        }
        if run == "backlog":
            fleet.publish_all([*good, refused])
        with pytest.raises(FleetError, match="no ACK for 1 s"):
            measure[run]()


def test_an_ack_for_another_event_does_not_count(running: Pipeline) -> None:
    asked, other = publishes("asked", 1)[0], publishes("other", 1)[0]
    with (
        Fleet(running.mosquitto.port) as fleet,
        pytest.raises(FleetError, match="no ACK for 1 events, such as b'asked-0-0'"),
    ):
        fleet.closed_loop([asked._replace(packet=other.packet)], 1, ignore)


def test_a_median_is_taken_over_the_rounds() -> None:
    results = {"x": [{"a": {"b": 3}}, {"a": {"b": 1}}, {"a": {"b": 2}}]}
    assert median(results, "x", path=("a", "b")) == 2
