"""The benchmark, in its short form: all stored, all ACKed, and far ahead of the plain script.

What it does: runs it as a person does and prints its figures; checks that its devices notice
what is missing, and that another checkout runs as itself. What it does not: assert a time; only
the ratio within one run.

Invariant: a benchmark that loses an event fails, however fast it is.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark import bridge, node_red, page, promise, report, run, systems
from benchmark.bench import progress
from benchmark.fleet import Fleet, FleetError, publishes
from benchmark.report import against, median
from tests.support.pipeline import Pipeline
from tools.process import CHECKOUT
from tools.stack import Stack

pytestmark = pytest.mark.services


def ignore(_: int) -> None:
    pass


@pytest.mark.faults  # takes a minute
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


def test_the_bridge_is_measured_with_all_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 1, "MESSAGES": 200, "WARMING_UP": 100}.items():
        monkeypatch.setattr(bridge, name, value)
    results = bridge.measure(progress)
    assert results.keys() == bridge.READINGS.keys()
    assert "| messages/s stored and ACKed |" in report.bridge(results)


@pytest.mark.faults  # takes half a minute
def test_what_a_fault_loses_is_counted_at_the_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EVENTS_OTHERS": 8_000, "AWAY_SECONDS": 0.5, "QUIET_SECONDS": 2.0}.items():
        monkeypatch.setattr(promise, name, value)
    results = promise.measure({"ingester": systems.System(systems.ingester)}, progress)
    for fault, counts in results["ingester"].items():
        assert counts == {
            "events": 8_000,
            "lost": 0,
            "doubled": 0,
            "false_acks": 0,
            "unanswered": 0,
            "starts": 0,
        }, fault
    assert "| ingester | itself killed | 8,000 | 0 |" in report.promise(results)


def test_a_backlog_is_measured_with_all_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BACKLOG_EVENTS", 2_000)
    starts = {"ingester": systems.ingester, "least-checked": systems.least("least-checked")}
    results = run.drain({name: systems.System(start) for name, start in starts.items()}, 1)
    assert "| events/s until all are rows |" in report.backlog(results)


def test_a_system_that_is_not_here_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node_red, "available", lambda: False)
    for name in systems.CONFIGURATIONS:
        monkeypatch.setenv(name.upper(), "/nowhere")
    assert list(systems.all_here()) == ["ingester", "plain"]
    said = capsys.readouterr().err
    assert all(f"{name} is left out: " in said for name in ("node-red", "telegraf", "bento"))


def test_a_median_is_taken_over_the_rounds() -> None:
    results = {"x": [{"a": {"b": 3}}, {"a": {"b": 1}}, {"a": {"b": 2}}]}
    assert median(results, "x", path=("a", "b")) == 2


def test_the_page_is_too_slow_beyond_a_second() -> None:
    within = dict.fromkeys(page.LIMITED, 1_000.0) | {"another": 5_000.0}
    assert page.too_slow(within) == []
    assert page.too_slow(within | {page.YEAR: 1_001.0}) == [page.YEAR]


def test_another_checkout_runs_with_its_own_code_schema_and_broker_configuration(
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    for name in ("ingester", "postgres", "mosquitto/config"):
        shutil.copytree(CHECKOUT / name, other / name)
    with (other / "ingester/__init__.py").open("a") as file:
        file.write("print('the other ingester', flush=True)\n")
    (other / "postgres/init/999_other.sql").write_text("CREATE TABLE IF NOT EXISTS other ();\n")
    with (other / "mosquitto/config/mosquitto.conf").open("a") as file:
        file.write("# the other configuration\n")
    with Stack(checkout=other) as stack, Fleet(stack.ports.mqtt) as fleet:
        assert fleet.closed_loop(publishes("other", 100), 50, ignore) > 0
        assert "the other ingester" in stack.ingester.log()
        assert stack.postgres.psql("SELECT count(*) FROM other") == "0"
        assert "# the other" in (stack.mosquitto.folder / "mosquitto.conf").read_text()


@pytest.mark.parametrize(("rate", "keeps_up"), [(951, True), (949, False), (2_000, True)])
def test_this_checkout_keeps_up_if_it_is_at_most_5_percent_slower(
    rate: float, keeps_up: bool
) -> None:
    def rounds(events_per_second: float) -> list[Any]:
        cpu = {"system": 1.0, "broker": 1.0, "database": 1.0}
        measured = {"events_per_second": events_per_second, "cpu_microseconds": cpu}
        latency = {"200": {"p50_ms": 1.0, "p99_ms": 2.0, "max_ms": 3.0}}
        one = {"singles": measured, "arrays": measured, "latency": latency, "memory_mb": 30}
        return [one, one]

    systems = {"this": rounds(rate), "other": rounds(1_000)}
    text, is_within = against("x", {"machine": {}, "systems": systems})
    assert is_within is keeps_up
    assert f"| {rate / 1_000:.3f} |" in text
