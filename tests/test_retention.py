"""Retention: what is deleted, in which steps, and that events are stored all the while.

What it does: puts old rows into a real database and lets the ingester, or its Store, find
them. What it does not: wait for the hour between two passes; there the test sets the clock.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from ingester import retention
from ingester.connection import StoreUnavailable
from ingester.retention import PASS_SECONDS, PAUSE_FACTOR, Retention
from ingester.store import DELETED_ROWS_MAX, Store, Table
from tests.support.device import event
from tests.support.load import deliver_rest, devices, load
from tests.support.pipeline import Database, Pipeline, wait_until

DAYS = 30
SAYS = "Retention: deleted {} events and {} dead letters older than 30 days"
# As an option of libpq: statements are run with the rights of this role.
AS_INGESTER = "-c role=ingester"


def add_events(database: Database, number: int, days: float, name: str) -> None:
    """Add events that were stored so many days ago, one a millisecond."""
    database.query(
        "INSERT INTO events (event_id, device_id, schema, event_type, ts_server)"
        " SELECT %s || i, %s, 1, 'temperature',"
        " now() - %s * interval '1 day' - i * interval '1 ms' FROM generate_series(1, %s) i",
        *(f"{name}-", name, days, number),
    )


def add_dead_letters(database: Database, number: int, days: float, name: str) -> None:
    """Add dead letters that first came long ago, and last came so many days ago."""
    database.query(
        "INSERT INTO dead_letters (received_at, last_received_at, reason, error, topic, device_id,"
        " payload) SELECT now() - interval '20000 days', now() - %s * interval '1 day',"
        " 'not_json', 'x', 'x', %s, '' FROM generate_series(1, %s)",
        *(days, name, number),
    )


def rows_by_device(database: Database, table: str = "events") -> dict[str, int]:
    rows = database.query(f"SELECT device_id, count(*) FROM {table} GROUP BY 1")
    return dict(rows)


def start(pipeline: Pipeline, **environment: str) -> None:
    pipeline.ingester.environment |= {"RETENTION_DAYS": str(DAYS)} | environment
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()


def said(pipeline: Pipeline) -> list[str]:
    """What the log has of retention."""
    return re.findall(r"\w+ Retention: .*", pipeline.ingester.log())


# --- the daemon ----------------------------------------------------------------------


def test_what_is_older_is_deleted_and_said_and_all_else_stays(pipeline: Pipeline) -> None:
    database = pipeline.database
    add_events(database, 2 * DELETED_ROWS_MAX + 1, DAYS + 0.01, "old")
    add_events(database, 20, DAYS - 0.01, "young")
    add_dead_letters(database, 3, DAYS + 0.01, "old")
    add_dead_letters(database, 2, DAYS - 0.01, "young")
    start(pipeline)
    pipeline.ingester.wait_for_log(SAYS.format(2 * DELETED_ROWS_MAX + 1, 3))
    assert rows_by_device(database) == {"young": 20}
    assert rows_by_device(database, "dead_letters") == {"young": 2}
    with pipeline.device("old") as device:
        # As documented: what was deleted is not known any more, and is stored anew.
        assert device.ask(event(1, "old"))["status"] == "stored"
    assert rows_by_device(database) == {"young": 20, "old": 1}
    assert len(said(pipeline)) == 1


def test_without_a_number_of_days_all_is_kept(pipeline: Pipeline) -> None:
    add_events(pipeline.database, 10, 20_000, "old")
    add_dead_letters(pipeline.database, 10, 20_000, "old")
    start(pipeline, RETENTION_DAYS="")
    with pipeline.device() as device:
        for number in range(5):
            device.ask(event(number))
    assert pipeline.database.count() == 15
    assert pipeline.database.count("dead_letters") == 10
    assert said(pipeline) == []


def test_rows_go_in_batches_and_events_are_stored_between_them(pipeline: Pipeline) -> None:
    database, number = pipeline.database, 30 * DELETED_ROWS_MAX
    add_events(database, number, DAYS + 1, "old")
    database.query(
        "CREATE TABLE steps (id SERIAL, action TEXT, number INT);"
        " CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS"
        " 'BEGIN INSERT INTO steps (action, number) SELECT TG_OP, count(*) FROM touched;"
        " RETURN NULL; END';"
        " CREATE TRIGGER note_delete AFTER DELETE ON events REFERENCING OLD TABLE AS touched"
        " FOR EACH STATEMENT EXECUTE FUNCTION note();"
        " CREATE TRIGGER note_insert AFTER INSERT ON events REFERENCING NEW TABLE AS touched"
        " FOR EACH STATEMENT EXECUTE FUNCTION note()"
    )
    with devices(pipeline, 2) as publishers:
        with load(publishers, per_second=200):
            start(pipeline)
            pipeline.ingester.wait_for_log(SAYS.format(number, 0), 60)
        deliver_rest(publishers)
        sent = sum(len(device.sent) for device in publishers)
    assert database.count() == sent
    steps = database.query("SELECT action, number FROM steps ORDER BY id")
    deleted = [rows for action, rows in steps if action == "DELETE"]
    assert sum(deleted) == number
    assert max(deleted) <= DELETED_ROWS_MAX
    actions = [action for action, _ in steps]
    # Of what lies between the first and the last batch, most is INSERTs: the pause is longer
    # than a batch, and there is always something to store.
    first = actions.index("DELETE")
    last = len(actions) - actions[::-1].index("DELETE")
    assert actions[first:last].count("INSERT") > len(deleted) / 2


def test_it_deletes_with_the_rights_of_the_role_ingester(pipeline: Pipeline) -> None:
    add_events(pipeline.database, 5, DAYS + 1, "old")
    add_dead_letters(pipeline.database, 3, DAYS + 1, "old")
    start(pipeline, PGOPTIONS=AS_INGESTER)
    pipeline.ingester.wait_for_log(SAYS.format(5, 3))


def test_without_the_right_to_delete_events_are_stored_and_one_line_says_so(
    pipeline: Pipeline,
) -> None:
    pipeline.database.query("REVOKE DELETE ON events FROM ingester")
    add_events(pipeline.database, 5, DAYS + 1, "old")
    start(pipeline, PGOPTIONS=AS_INGESTER)
    pipeline.ingester.wait_for_log("WARNING Retention: ")
    with pipeline.device() as device:
        for number in range(20):
            assert device.ask(event(number))["status"] == "stored"
    assert rows_by_device(pipeline.database) == {"old": 5, "device-1": 20}
    (line,) = said(pipeline)
    assert "permission denied for table events (SQLSTATE 42501); trying again" in line
    assert "Postgres: " not in pipeline.ingester.log()


def test_a_row_that_somebody_holds_locked_does_not_hold_up_events(pipeline: Pipeline) -> None:
    add_events(pipeline.database, 5, DAYS + 1, "old")
    holder = pipeline.database.connect()
    with holder.cursor() as cursor:
        cursor.execute("SELECT FROM events WHERE event_id = 'old-3' FOR UPDATE")
        start(pipeline)
        with pipeline.device() as device:
            device.deliver([event(1)])
        pipeline.ingester.wait_for_log("WARNING Retention: ")
    holder.close()
    # The lock's own time limit, not the statement's, which is many times as long.
    assert "lock timeout (SQLSTATE 55P03)" in said(pipeline)[0]
    assert "Postgres: " not in pipeline.ingester.log()


def test_a_stop_amid_a_pass_says_how_far_it_came(pipeline: Pipeline) -> None:
    number = 100 * DELETED_ROWS_MAX
    add_events(pipeline.database, number, DAYS + 1, "old")
    start(pipeline)
    wait_until(lambda: pipeline.database.count() < number, "a batch to be deleted")
    assert pipeline.ingester.stop() == 0
    left = pipeline.database.count()
    assert left > 0, "the machine was faster than this test"
    assert said(pipeline) == [f"INFO {SAYS.format(number - left, 0)}"]
    # And not only when the interpreter clears up, which it need not do.
    log = pipeline.ingester.log()
    assert log.index("Retention: ") < log.index(" INFO stopped")


def test_it_deletes_no_slower_while_nothing_arrives(pipeline: Pipeline) -> None:
    """What arrives ends the wait for more; without it, a pause must."""
    number = 20 * DELETED_ROWS_MAX

    def seconds_for(name: str) -> float:
        add_events(pipeline.database, number, DAYS + 1, name)
        began_at = time.perf_counter()
        start(pipeline)
        pipeline.ingester.wait_for_log(SAYS.format(number, 0), 60)
        seconds = time.perf_counter() - began_at
        assert pipeline.ingester.stop() == 0
        return seconds

    idle_seconds = seconds_for("idle")
    with devices(pipeline, 1) as publishers, load(publishers, per_second=200):
        busy_seconds = seconds_for("busy")
    assert idle_seconds < 3 * busy_seconds


# --- the passes, by a clock of the test's own ----------------------------------------


class Clock:
    """Stands in the module where `time` does."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now

    @property
    def sockets(self) -> tuple[()]:
        """What a Store asks of the session beside it, at each step of a wait."""
        return ()

    def serve(self) -> None:
        """There is nothing to serve."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retention, "time", clock)
    return clock


@pytest.fixture
def store(database: Database, clock: Clock) -> Iterator[Store]:
    store = Store(database.conninfo, clock)
    store.connect()
    yield store
    store.close()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """A function that returns what was said since its last call."""
    caplog.set_level(logging.INFO, "ingester.retention")

    def take() -> list[str]:
        taken = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return taken

    return take


Lines = Callable[[], list[str]]


def finish_pass(passes: Retention, clock: Clock) -> int:
    """Go on until the pass is over; return how many turns that took."""
    turns = 1
    passes.turn()
    while (pause_seconds := passes.pause_seconds()) < PASS_SECONDS:
        clock.now += pause_seconds
        passes.turn()
        turns += 1
    return turns


def test_a_pass_begins_at_the_start_and_an_hour_after_the_one_before(
    store: Store, database: Database, clock: Clock, lines: Lines
) -> None:
    passes = Retention(store, DAYS)
    assert passes.pause_seconds() == 0
    for number in (3, 2 * DELETED_ROWS_MAX, 0, 1):
        add_events(database, number, DAYS + 1, "old")
        assert finish_pass(passes, clock) == 1 + -(-number // DELETED_ROWS_MAX)
        assert lines() == ([SAYS.format(number, 0)] if number else [])
        assert database.count() == 0
        add_events(database, 1, DAYS + 1, "old")
        clock.now += PASS_SECONDS - 1
        passes.turn()
        assert database.count() == 1
        database.query("DELETE FROM events")
        clock.now += 1


def test_the_pause_is_a_multiple_of_what_a_batch_took(
    store: Store, database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_events(database, 2 * DELETED_ROWS_MAX, DAYS + 1, "old")
    passes = Retention(store, DAYS)
    began_at = clock.now
    delete_old = store.delete_old

    def delete_slowly(table: Table, days: int, since: str) -> tuple[int, str]:
        clock.now += 0.25  # by this clock, however quick the database is
        return delete_old(table, days, since)

    with monkeypatch.context() as slow:
        slow.setattr(store, "delete_old", delete_slowly)
        passes.turn()
    pause_seconds = passes.pause_seconds()
    assert pause_seconds == PAUSE_FACTOR * (clock.now - began_at) > 0
    clock.now += pause_seconds - 0.01
    passes.turn()
    assert database.count() == DELETED_ROWS_MAX
    clock.now += 0.01
    passes.turn()
    assert database.count() == 0
    passes.close()  # else it says what it did when it is cleared up, in another test


def test_without_days_there_is_never_anything_to_do(
    store: Store, database: Database, clock: Clock
) -> None:
    add_events(database, 1, 20_000, "old")
    passes = Retention(store, None)
    for _ in range(3):
        assert passes.pause_seconds() > 100 * PASS_SECONDS
        passes.turn()
        clock.now += PASS_SECONDS
    assert database.count() == 1


def test_a_pass_that_fails_is_said_with_what_it_did_and_tried_again_in_an_hour(
    store: Store, database: Database, clock: Clock, lines: Lines
) -> None:
    add_events(database, DELETED_ROWS_MAX + 1, DAYS + 1, "old")
    passes = Retention(store, DAYS)
    passes.turn()
    database.query("ALTER TABLE events RENAME TO elsewhere")
    clock.now += passes.pause_seconds()
    passes.turn()
    assert lines() == [
        'Retention: relation "events" does not exist (SQLSTATE 42P01); trying again in an hour',
        SAYS.format(DELETED_ROWS_MAX, 0),
    ]
    assert passes.pause_seconds() == PASS_SECONDS
    database.query("ALTER TABLE elsewhere RENAME TO events")
    store.connect()  # as the loop does; after such an error it is another session's turn
    clock.now += PASS_SECONDS
    finish_pass(passes, clock)
    assert database.count() == 0


def test_what_a_trigger_of_the_users_keeps_is_not_asked_for_without_end(
    store: Store, database: Database, clock: Clock
) -> None:
    add_events(database, 3 * DELETED_ROWS_MAX, DAYS + 1, "old")
    database.query(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        " CREATE TRIGGER keep BEFORE DELETE ON events FOR EACH ROW EXECUTE FUNCTION keep()"
    )
    assert finish_pass(Retention(store, DAYS), clock) == 1
    assert database.count() == 3 * DELETED_ROWS_MAX


# --- the statements ------------------------------------------------------------------


def delete_all(store: Store, table: Table) -> int:
    """Delete batch after batch until there is nothing left; return how many there were."""
    batches, since = 0, "-infinity"
    while True:
        number, since = store.delete_old(table, DAYS, since)
        if not number:
            return batches
        batches += 1


@pytest.mark.parametrize("table", Table)
def test_old_rows_are_found_by_the_index_and_looked_at_once(
    database: Database, table: Table
) -> None:
    batches = 12
    add_events(database, batches * DELETED_ROWS_MAX, DAYS + 1, "old")
    database.query(
        "INSERT INTO dead_letters (received_at, last_received_at, reason, error, topic, payload)"
        " SELECT ts_server, ts_server, 'not_json', 'x', 'x', '' FROM events"
    )
    database.query("ANALYZE events, dead_letters")  # as autovacuum does
    name, _, time_column = table.value
    # A transaction that began before: what is deleted stays in the index, as during a backup.
    backup = database.connect()
    backup.set_session(isolation_level="REPEATABLE READ")
    with backup.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM events")
        store = Store(database.conninfo)
        store.connect()
        assert delete_all(store, table) == batches
        store.close()  # only then all that it did has been counted
        index = f"idx_{name}_{time_column}"

        def read() -> int:
            sql = "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = %s"
            return int(database.query(sql, index)[0][0])

        wait_until(lambda: read() >= batches * DELETED_ROWS_MAX, f"{index} to be read")
        # Each batch from the beginning of the index would be half the square of it.
        assert read() < 2 * batches * DELETED_ROWS_MAX
    backup.close()


def test_an_event_that_was_stored_anew_in_between_stays(store: Store, database: Database) -> None:
    add_events(database, 1, DAYS + 1, "old")
    anew = database.connect()
    with anew.cursor() as cursor:
        cursor.execute("UPDATE events SET ts_server = now()")

        def commit_when_waited_for() -> None:
            database.wait_blocked()
            anew.commit()

        other = threading.Thread(target=commit_when_waited_for)
        other.start()
        with suppress(StoreUnavailable):  # where all this takes longer than the lock's limit
            store.delete_old(Table.EVENTS, DAYS, "-infinity")
        other.join()
    anew.close()
    assert database.count() == 1
