"""PostgreSQL goes away, freezes, fills, refuses: nothing is lost, and the ingester waits.

What it does: makes each fault under load, fixes it, and checks the promise at the sender.
What it does not: SIGTERM meanwhile (test_faults_stop.py), or a full disk
(test_faults_disk.py). The server is this file's own, so that no other test suffers.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import psycopg2
import pytest

from benchmark.machine import memory_peak_mb
from tests.support.device import event
from tests.support.findings import Finding, find
from tests.support.load import (
    check_own_reconnects,
    connects,
    database_down,
    devices,
    hear_all,
)
from tests.support.pipeline import Database, Pipeline, wait_until
from tests.support.proxy import Proxy
from tests.support.trial import PEAK_MEGABYTES_MAX, under_load
from tools.stack import Stack

Report = Callable[[Finding], None]
Fault = Callable[[Pipeline], AbstractContextManager[None]]
faults = pytest.mark.faults

TERMINATE_INGESTER = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'homelab-ingester'"
)


@pytest.fixture(scope="module")
def servers() -> Iterator[Stack]:
    """A PostgreSQL of this file's own; `plain` is a user that may only what it is given."""
    with Stack(with_ingester=False, postgres_settings={"max_connections": "20"}) as stack:
        stack.postgres.psql("CREATE ROLE plain LOGIN PASSWORD 'plain'")
        stack.postgres.psql("GRANT SELECT, INSERT ON events, dead_letters TO plain")
        stack.postgres.psql("GRANT UPDATE ON dead_letters TO plain")
        yield stack


@pytest.fixture
def proxy(pipeline: Pipeline) -> Iterator[Proxy]:
    """Between the ingester, which is started here, and PostgreSQL."""
    with Proxy(pipeline.database.postgres.port) as proxy:
        pipeline.ingester.environment["POSTGRES_PORT"] = str(proxy.port)
        pipeline.ingester.start()
        pipeline.ingester.wait_ready()
        yield proxy
        pipeline.close()


@pytest.fixture
def plain(pipeline: Pipeline) -> Pipeline:
    """The ingester as a user who owns nothing."""
    pipeline.ingester.environment |= {"POSTGRES_USER": "plain", "POSTGRES_PASSWORD": "plain"}
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    return pipeline


# --- the server ------------------------------------------------------------------------


@contextmanager
def killed(pipeline: Pipeline) -> Iterator[None]:
    postgres = pipeline.database.postgres
    postgres.kill()
    try:
        yield
    finally:
        postgres.start()
        postgres.wait_ready()


@contextmanager
def stopped(pipeline: Pipeline) -> Iterator[None]:
    with database_down(pipeline.database):
        yield


@contextmanager
def restarted(pipeline: Pipeline) -> Iterator[None]:
    with stopped(pipeline):
        pass
    yield


@contextmanager
def frozen(pipeline: Pipeline) -> Iterator[None]:
    pipeline.database.postgres.pause()
    try:
        yield
    finally:
        pipeline.database.postgres.resume()
        pipeline.database.postgres.wait_ready()


def locked(pipeline: Pipeline) -> AbstractContextManager[None]:
    """As a nightly backup or a careless ALTER TABLE does."""
    return pipeline.database.locked()


def connect_if_possible(database: Database) -> Any:
    try:
        return database.connect()
    except psycopg2.OperationalError as error:
        if "too many clients" in str(error):
            return None
        raise


@contextmanager
def out_of_connections(pipeline: Pipeline) -> Iterator[None]:
    """Others hold every connection there is, that of the ingester too."""
    database = pipeline.database
    with ExitStack() as cleanup:
        held = database.connect()
        held.autocommit = True
        cleanup.callback(held.close)

        def nothing_left() -> bool:
            with held.cursor() as cursor:
                cursor.execute(TERMINATE_INGESTER)
            while connection := connect_if_possible(database):
                cleanup.callback(connection.close)
            with held.cursor() as cursor:
                cursor.execute(TERMINATE_INGESTER)
                return not cursor.fetchall()

        wait_until(nothing_left, "every connection to be taken")
        yield


@contextmanager
def read_only_by_configuration(pipeline: Pipeline) -> Iterator[None]:
    """As hosters do when a disk is nearly full; it reaches the sessions that are there."""
    postgres = pipeline.database.postgres
    postgres.psql("ALTER SYSTEM SET default_transaction_read_only = on", "postgres")
    postgres.psql("SELECT pg_reload_conf()", "postgres")
    try:
        yield
    finally:
        postgres.psql("ALTER SYSTEM RESET default_transaction_read_only", "postgres")
        postgres.psql("SELECT pg_reload_conf()", "postgres")


@contextmanager
def read_only_database(pipeline: Pipeline) -> Iterator[None]:
    """A session that began meanwhile stays read-only for ever, as one on a standby does."""
    postgres, name = pipeline.database.postgres, pipeline.database.name
    postgres.psql(f"ALTER DATABASE {name} SET default_transaction_read_only = on", "postgres")
    pipeline.database.query(TERMINATE_INGESTER)
    try:
        yield
    finally:
        postgres.psql(f"ALTER DATABASE {name} RESET default_transaction_read_only", "postgres")


@contextmanager
def table_missing(pipeline: Pipeline) -> Iterator[None]:
    pipeline.database.query("ALTER TABLE events RENAME TO elsewhere")
    try:
        yield
    finally:
        pipeline.database.query("ALTER TABLE elsewhere RENAME TO events")


@contextmanager
def no_dead_letters(pipeline: Pipeline) -> Iterator[None]:
    pipeline.database.query("ALTER TABLE dead_letters RENAME TO elsewhere")
    try:
        yield
    finally:
        pipeline.database.query("ALTER TABLE elsewhere RENAME TO dead_letters")


@pytest.mark.parametrize(
    ("case", "fault", "seconds", "seconds_with_faults"),
    [
        ("database killed", killed, 0.5, 1),
        pytest.param("database stopped for {} s", stopped, 5, 5, marks=faults),
        ("database restarted", restarted, 0, 0),
        pytest.param("database frozen for {} s", frozen, 60, 60, marks=faults),
        pytest.param("table locked for {} s", locked, 25, 25, marks=faults),
        ("database out of connections", out_of_connections, 0.5, 1),
        pytest.param("database made read-only", read_only_by_configuration, 1, 1, marks=faults),
        ("database read-only for new sessions", read_only_database, 0.5, 1),
        ("table of events missing for {} s", table_missing, 1, 64),
        pytest.param("table of dead letters missing", no_dead_letters, 1, 1, marks=faults),
    ],
)
def test_a_fault_of_the_database_loses_nothing_and_work_goes_on_within_5_s(
    running: Pipeline,
    report: Report,
    pytestconfig: pytest.Config,
    case: str,
    fault: Fault,
    seconds: float,
    seconds_with_faults: float,
) -> None:
    if pytestconfig.getoption("faults"):
        seconds = seconds_with_faults
    with under_load(running) as trial:
        with fault(running):
            began_at = time.monotonic()
            trial.warned()
            trial.lasts(seconds - (time.monotonic() - began_at))
        trial.fixed()
        trial.flows()
    if seconds > 62:
        assert "Postgres: still failing after 6" in running.ingester.log()
    report(trial.finding_after_outage(case.format(seconds)))


@contextmanager
def permission_missing(pipeline: Pipeline) -> Iterator[None]:
    pipeline.database.query("REVOKE INSERT ON events FROM plain")
    try:
        yield
    finally:
        pipeline.database.query("GRANT INSERT ON events TO plain")


@contextmanager
def password_changed(pipeline: Pipeline) -> Iterator[None]:
    pipeline.database.query("ALTER ROLE plain PASSWORD 'another'")
    pipeline.database.query(TERMINATE_INGESTER)
    try:
        yield
    finally:
        pipeline.database.query("ALTER ROLE plain PASSWORD 'plain'")


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("permission missing", permission_missing),
        pytest.param("password changed", password_changed, marks=faults),
    ],
)
def test_what_a_person_must_mend_is_waited_for_and_never_an_events_fault(
    plain: Pipeline, report: Report, case: str, fault: Fault
) -> None:
    with under_load(plain) as trial:
        with fault(plain):
            trial.warned()
            trial.lasts(1)
        trial.fixed()
    report(trial.finding_after_outage(case))


# --- the line to it --------------------------------------------------------------------


@faults
@pytest.mark.parametrize(
    ("case", "to_client", "to_server"),
    [
        ("nothing reaches the database for 15 s", False, True),
        ("nothing comes back from the database for 15 s", True, False),
        ("database cut off for 15 s", True, True),
    ],
)
def test_a_line_that_is_dead_in_either_direction_is_noticed(
    proxy: Proxy, pipeline: Pipeline, report: Report, case: str, to_client: bool, to_server: bool
) -> None:
    with under_load(pipeline) as trial:
        began_at = time.monotonic()
        proxy.freeze(to_client=to_client, to_server=to_server)
        trial.warned()
        trial.lasts(15 - (time.monotonic() - began_at))
        proxy.thaw()
        trial.fixed()
    report(trial.finding_after_outage(case))


@faults
def test_a_connection_that_the_network_has_forgotten_is_given_up(
    proxy: Proxy, pipeline: Pipeline, report: Report
) -> None:
    """As after a router's restart: nobody tells, and only a new connection works."""
    with under_load(pipeline) as trial:
        proxy.forget()
        trial.warned()
        trial.fixed()
    report(trial.finding_after_outage("connection to the database forgotten by a router"))


@faults
def test_an_attempt_to_connect_that_the_network_has_forgotten_is_given_up(
    proxy: Proxy, pipeline: Pipeline, report: Report
) -> None:
    """The next attempt works; until then it takes the 5 s that one is given."""
    with under_load(pipeline) as trial:
        proxy.freeze()
        trial.warned()
        wait_until(lambda: proxy.connections > 1, "another attempt to connect")
        proxy.forget()
        proxy.thaw()
        trial.fixed(seconds_max=5 + 3)
    report(trial.finding_after_outage("attempt to connect forgotten by a router"))


@faults
def test_a_line_that_stutters_costs_nothing(
    proxy: Proxy, pipeline: Pipeline, report: Report
) -> None:
    with under_load(pipeline) as trial:
        for to_client, to_server in ((True, False), (False, True), (True, True)):
            proxy.freeze(to_client, to_server)
            trial.lasts(0.4)
            proxy.thaw()
            trial.fixed()
    assert "WARNING" not in pipeline.ingester.log()
    report(trial.finding("line to the database stutters, 3 times 0.4 s"))


def test_a_refused_and_cut_connection_is_made_again(
    proxy: Proxy, pipeline: Pipeline, report: Report
) -> None:
    with under_load(pipeline) as trial:
        proxy.refuse()
        proxy.cut()
        trial.warned()
        trial.lasts(1)
        proxy.accept()
        trial.fixed()
    report(trial.finding_after_outage("connection to the database reset, then refused"))


@pytest.mark.parametrize(
    "bad", [False, pytest.param(True, marks=faults)], ids=["events", "dead letters"]
)
def test_a_lost_reply_to_a_commit_makes_no_second_row_and_no_false_ack(
    proxy: Proxy, pipeline: Pipeline, report: Report, pytestconfig: pytest.Config, bad: bool
) -> None:
    """The row is committed, and the line is cut before the ingester hears so."""
    table, value = ("dead_letters", []) if bad else ("events", 1)
    times = 6 if pytestconfig.getoption("faults") else 3
    with pipeline.device() as device:
        for turn in range(times):
            # PostgreSQL says this once the transaction is committed.
            cut = proxy.cut_after(b"INSERT 0 ", "to_client")
            for number in range(50):
                device.send(event(f"{turn}-{number}", value=value))
            assert cut.wait(10), pipeline.ingester.log_tail()
            heard = len(device.acks)
            assert pipeline.database.count(table) > heard, "the cut came before the commit"
            device.wait(lambda: {a["event_id"] for a in device.acks} >= device.sent.keys(), "ACKs")
    case = f"reply to a COMMIT of {'dead letters' if bad else 'events'} lost, {times} times"
    report(find(case, [device], pipeline.database))
    if bad:  # kept again rather than not at all
        assert pipeline.database.query("SELECT count(DISTINCT event_id) FROM dead_letters") == [
            (len(device.sent),)
        ]
    log = pipeline.ingester.log()
    assert log.count("WARNING Postgres: ") == 1
    assert log.count("Connected to Postgres") == 1 + times


@faults
def test_a_line_cut_amid_a_statement_is_tried_again(
    proxy: Proxy, pipeline: Pipeline, report: Report
) -> None:
    """Whether it was committed nobody can know."""
    with under_load(pipeline) as trial:
        for _ in range(3):
            assert proxy.cut_after(b"EXECUTE insert_events", "to_server").wait(10)
            trial.fixed()
    report(trial.finding_after_outage("line cut behind an INSERT, 3 times"))


# --- a long queue ----------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_all_that_queues_up_while_the_database_is_down_is_stored(
    running: Pipeline, report: Report, pytestconfig: pytest.Config
) -> None:
    # More than the ingester holds (message.py).
    number = 60_000 if pytestconfig.getoption("faults") else 4_000
    ingester = running.ingester
    pid = ingester.pid
    with devices(running, 4) as publishers:
        with stopped(running):
            for index in range(number // 4):
                for device in publishers:
                    device.send(event(index, device.device_id, value=index))
            for device in publishers:
                device.wait_taken(60)
            ingester.wait_for_log("WARNING Postgres: ")
            assert connects(running) == 1
        ready_at = time.monotonic()
        wait_until(lambda: any(device.heard_at for device in publishers), "an ACK")
        first_seconds = time.monotonic() - ready_at
        hear_all(publishers, 90)
        seconds = time.monotonic() - ready_at
    assert first_seconds < 5
    assert ingester.pid == pid
    assert ingester.running
    check_own_reconnects(running)
    log = ingester.log()
    assert log.count("WARNING") == 1, log
    assert log.count("INFO Postgres: back after") == 1
    peak = memory_peak_mb(ingester)
    assert peak < PEAK_MEGABYTES_MAX
    note = f"first ACK after {first_seconds:.1f} s, the last after {seconds:.0f} s, {peak:.0f} MB"
    case = f"database down until {number:,} events wait"
    report(find(case, publishers, running.database, note=note))
    assert running.database.count("dead_letters") == 0
