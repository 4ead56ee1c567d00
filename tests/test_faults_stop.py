"""SIGTERM, whatever state the ingester is in: out within 5 s, exit 0, and nothing is lost.

What it does: brings about the state, stops the ingester in it, fixes what was broken,
starts it again, and checks the promise at the sender. What it does not: SIGKILL, which is
test_faults_kill.py. The servers are this file's own, so that no other test suffers.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.support.device import Device, event
from tests.support.findings import Finding, find
from tests.support.pipeline import Pipeline, wait_until
from tests.support.proxy import Proxy
from tests.support.trial import under_load
from tools.stack import Stack

Report = Callable[[Finding], None]
faults = pytest.mark.faults

STOP_SECONDS_MAX = 5.0
EVENTS = 300


@pytest.fixture(scope="module")
def servers() -> Iterator[Stack]:
    """A PostgreSQL of this file's own."""
    with Stack(with_ingester=False) as stack:
        yield stack


def stop(pipeline: Pipeline) -> float:
    """Stop the ingester by SIGTERM; return how many seconds it took."""
    ingester = pipeline.ingester
    began_at = time.monotonic()
    code = ingester.stop(timeout=20)
    seconds = time.monotonic() - began_at
    assert code == 0, ingester.log_tail()
    assert seconds < STOP_SECONDS_MAX, ingester.log_tail()
    assert "Traceback" not in ingester.log()
    assert "INFO stopped" in ingester.log(ingester.log_start)
    return seconds


def test_when_idle_it_ends_at_a_sigterm(running: Pipeline, report: Report) -> None:
    with running.device() as device:
        device.deliver(event(i) for i in range(EVENTS))
        seconds = stop(running)
    report(find("SIGTERM when idle", [device], running.database, note=out_after(seconds)))


def test_under_load_it_ends_at_a_sigterm_again_and_again(running: Pipeline, report: Report) -> None:
    longest = 0.0
    with under_load(running, per_second=200) as trial:
        for _ in range(5):
            trial.flows()
            longest = max(longest, stop(running))
            running.ingester.start()
        trial.flows()
    report(trial.finding("SIGTERM under load, 5 times", out_after(longest)))


def out_after(seconds: float) -> str:
    return f"out after {seconds:.1f} s"


# --- with events in hand, and no database ----------------------------------------------


@contextmanager
def table_locked(pipeline: Pipeline, device: Device) -> Iterator[None]:
    """Its insert waits for a lock, with events in hand."""
    with pipeline.database.locked():
        publish(device)
        pipeline.database.wait_blocked()
        yield


@contextmanager
def database_frozen(pipeline: Pipeline, device: Device) -> Iterator[None]:
    """Its insert waits for a server that answers nothing any more."""
    with table_locked(pipeline, device):
        pipeline.database.postgres.pause()
        try:
            yield
        finally:
            pipeline.database.postgres.resume()


@contextmanager
def database_frozen_for_long(pipeline: Pipeline, device: Device) -> Iterator[None]:
    """It tries to connect to a server that takes connections and says nothing."""
    with database_frozen(pipeline, device):
        pipeline.ingester.wait_for_log("WARNING Postgres: ", 20)
        time.sleep(3)  # a few tries further; no line tells of them
        yield


@contextmanager
def database_down(pipeline: Pipeline, device: Device) -> Iterator[None]:
    postgres = pipeline.database.postgres
    postgres.stop()
    try:
        publish(device)
        pipeline.ingester.wait_for_log("WARNING Postgres: ")
        yield
    finally:
        postgres.start()
        postgres.wait_ready()


@contextmanager
def table_missing(pipeline: Pipeline, device: Device) -> Iterator[None]:
    pipeline.database.query("ALTER TABLE events RENAME TO elsewhere")
    publish(device)
    pipeline.ingester.wait_for_log("WARNING Postgres: ")
    try:
        yield
    finally:
        pipeline.database.query("ALTER TABLE elsewhere RENAME TO events")


def publish(device: Device) -> None:
    """Send each event once: the broker is up, and keeps them."""
    for number in range(EVENTS):
        device.send(event(number, value=number))
    device.wait_taken()


@pytest.mark.parametrize(
    ("case", "state"),
    [
        ("SIGTERM, table locked", table_locked),
        pytest.param("SIGTERM, database just frozen", database_frozen, marks=faults),
        pytest.param("SIGTERM, database long frozen", database_frozen_for_long, marks=faults),
        ("SIGTERM, database down", database_down),
        pytest.param("SIGTERM, table missing", table_missing, marks=faults),
    ],
)
def test_with_events_in_hand_and_no_database_it_ends_at_a_sigterm(
    running: Pipeline,
    report: Report,
    case: str,
    state: Callable[[Pipeline, Device], AbstractContextManager[None]],
) -> None:
    with running.device() as device:
        with state(running, device):
            seconds = stop(running)
            assert device.acks == []
        running.ingester.start()
        device.wait(lambda: len(device.heard_at) == EVENTS, "an ACK for each", 30)
    report(find(case, [device], running.database, note=out_after(seconds)))
    assert running.database.count("dead_letters") == 0


# --- without a broker ------------------------------------------------------------------


@contextmanager
def broker_down(pipeline: Pipeline) -> Iterator[None]:
    pipeline.mosquitto.stop()
    try:
        pipeline.ingester.wait_for_log("WARNING MQTT: ")
        yield
    finally:
        pipeline.mosquitto.start()
        pipeline.mosquitto.wait_ready()


@contextmanager
def broker_frozen(pipeline: Pipeline) -> Iterator[None]:
    pipeline.mosquitto.pause()
    try:
        yield
    finally:
        pipeline.mosquitto.resume()


@contextmanager
def both_down(pipeline: Pipeline) -> Iterator[None]:
    postgres = pipeline.database.postgres
    with broker_down(pipeline):
        postgres.stop()
        try:
            pipeline.ingester.wait_for_log("WARNING Postgres: ", 30)
            yield
        finally:
            postgres.start()
            postgres.wait_ready()


@contextmanager
def both_down_from_the_start(pipeline: Pipeline) -> Iterator[None]:
    assert pipeline.ingester.stop() == 0
    postgres = pipeline.database.postgres
    pipeline.mosquitto.stop()
    postgres.stop()
    try:
        pipeline.ingester.start()
        pipeline.ingester.wait_for_log("WARNING Postgres: ")
        pipeline.ingester.wait_for_log("WARNING MQTT: ")
        yield
    finally:
        postgres.start()
        postgres.wait_ready()
        pipeline.mosquitto.start()
        pipeline.mosquitto.wait_ready()


@contextmanager
def both_cut_off(pipeline: Pipeline) -> Iterator[None]:
    """It is in the middle of connecting to a broker, and a database, that never answer."""
    assert pipeline.ingester.stop() == 0
    environment = dict(pipeline.ingester.environment)
    with (
        Proxy(pipeline.mosquitto.port) as broker,
        Proxy(pipeline.database.postgres.port) as database,
    ):
        broker.freeze()
        database.freeze()
        pipeline.ingester.environment |= {
            "MQTT_PORT": str(broker.port),
            "POSTGRES_PORT": str(database.port),
        }
        pipeline.ingester.start()
        wait_until(lambda: database.connections > 0, "it to connect to the database")
        yield
    pipeline.ingester.environment |= environment


@pytest.mark.parametrize(
    ("case", "state"),
    [
        ("SIGTERM, waiting for the broker", broker_down),
        pytest.param("SIGTERM, broker frozen", broker_frozen, marks=faults),
        ("SIGTERM, broker and database down", both_down_from_the_start),
        pytest.param("SIGTERM, broker and then database gone", both_down, marks=faults),
        pytest.param("SIGTERM, connecting to what never answers", both_cut_off, marks=faults),
    ],
)
def test_without_a_broker_it_ends_at_a_sigterm(
    running: Pipeline,
    report: Report,
    case: str,
    state: Callable[[Pipeline], AbstractContextManager[None]],
) -> None:
    with running.device("before") as before:
        before.deliver(event(i, "before") for i in range(EVENTS))
    with state(running):
        seconds = stop(running)
    running.ingester.start()
    with running.device("after") as after:
        after.deliver(event(i, "after") for i in range(EVENTS))
    report(find(case, [before, after], running.database, note=out_after(seconds)))
