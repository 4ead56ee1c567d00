"""The Store on a real PostgreSQL: outcomes, exact comparison, and whose fault an error is.

What it does not: MQTT; that is test_ingester.py.
"""

import re
import socket
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from psycopg2 import extensions

from ingester.event import Event
from ingester.rejection import DeadLetter, Reason, Rejection
from ingester.store import FAULTS, Fault, Outcome, Store, StoreUnavailable, fault_of
from tests.pipeline import Database

NOON = datetime(2026, 2, 10, 12, tzinfo=UTC)
STORED, DUPLICATE, CONFLICT = Outcome.STORED, Outcome.DUPLICATE, Outcome.CONFLICT


def make(event_id: str, **fields: Any) -> Event:
    usual = Event(event_id, "device-1", 1, "temperature", 21.5, None, "C", NOON, "{}")
    return usual._replace(**fields)


@pytest.fixture(autouse=True)
def no_wait_callback() -> Iterator[None]:
    """The Store's is process-wide; here the tests have connections of their own as well."""
    yield
    extensions.set_wait_callback(None)


@pytest.fixture
def store(database: Database) -> Iterator[Store]:
    store = Store(database.conninfo)
    store.connect()
    yield store
    store.close()


def refused(result: Outcome | Rejection) -> str:
    assert isinstance(result, Rejection)
    assert result.reason is Reason.NOT_STORABLE
    return result.error


def test_events_are_stored_once_and_come_out_in_the_order_given(
    store: Store, database: Database
) -> None:
    assert store.insert([make("b"), make("a")]) == [STORED, STORED]
    again = [make("a"), make("c"), make("b")]
    assert store.insert(again) == [DUPLICATE, STORED, DUPLICATE]
    assert database.query("SELECT event_id FROM events ORDER BY 1") == [("a",), ("b",), ("c",)]


def test_no_events_are_no_work(store: Store) -> None:
    assert store.insert([]) == []
    assert store.keep([]) == []


def test_repeats_within_a_batch_are_compared_with_the_first_of_them(
    store: Store, database: Database
) -> None:
    batch = [make("a"), make("a"), make("a", value_num=1.0), make("b"), make("a")]
    assert store.insert(batch) == [STORED, DUPLICATE, CONFLICT, STORED, DUPLICATE]
    assert database.query("SELECT value_num FROM events WHERE event_id = 'a'") == [(21.5,)]


@pytest.mark.parametrize(
    "change",
    [
        {"device_id": "device-2"},
        {"event_type": "humidity"},
        {"value_num": 21.500000000000004},
        {"value_num": None, "value_text": "21.5"},
        {"value_num": None},
        {"unit": None},
        {"unit": ""},
        {"ts_device": NOON + timedelta(microseconds=1)},
        {"ts_device": None},
        {"meta": '{"a": 1}'},
    ],
    ids=str,
)
def test_any_other_content_under_the_same_id_is_a_conflict(
    store: Store, change: dict[str, Any]
) -> None:
    assert store.insert([make("a")]) == [STORED]
    assert store.insert([make("a", **change)]) == [CONFLICT]
    assert store.insert([make("a")]) == [DUPLICATE]


@pytest.mark.parametrize(
    ("stored", "sent", "outcome"),
    [
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', DUPLICATE),
        ('{"a": 1.0}', '{"a": 1}', DUPLICATE),
        ('{"a": 1e+23}', '{"a": 1e+23}', DUPLICATE),
        ('{"a": 1e+23}', '{"a": 100000000000000000000000}', DUPLICATE),
        ('{"a": 5e-324}', '{"a": 5e-324}', DUPLICATE),
        ('{"a": -0.0}', '{"a": 0}', DUPLICATE),
        ('{"a": "\\u00e9\\ud83d\\ude00"}', '{"a": "é😀"}', DUPLICATE),
        ('{"a": "\\\\u0000"}', '{"a": "\\\\u0000"}', DUPLICATE),
        ('{"a": true}', '{"a": 1}', CONFLICT),
        ('{"a": false}', '{"a": 0}', CONFLICT),
        ('{"a": "1"}', '{"a": 1}', CONFLICT),
        ('{"a": [1]}', '{"a": 1}', CONFLICT),
        ('{"a": null}', "{}", CONFLICT),
        ('{"a": 1152921504606846976}', '{"a": 1152921504606846977}', CONFLICT),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', CONFLICT),
    ],
)
def test_meta_is_compared_as_jsonb_keeps_it(
    store: Store, stored: str, sent: str, outcome: Outcome
) -> None:
    assert store.insert([make("a", meta=stored)]) == [STORED]
    assert store.insert([make("a", meta=sent)]) == [outcome]


@pytest.mark.parametrize("value", [0.1, -0.0, 1e308, 5e-324, 2.0**53 + 2, 1 / 3])
def test_doubles_and_early_and_late_timestamps_come_back_exactly(
    store: Store, value: float
) -> None:
    early = datetime(1, 1, 1, tzinfo=UTC)
    late = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    events = [make("a", value_num=value, ts_device=early), make("b", ts_device=late)]
    assert store.insert(events) == [STORED, STORED]
    assert store.insert(events) == [DUPLICATE, DUPLICATE]


def test_sql_in_every_string_is_stored_as_text(store: Store, database: Database) -> None:
    text = "'; DROP TABLE events; -- %s %(a)s \\ \" $$ {}"
    item = make(text, device_id=text, event_type=text, value_num=None, value_text=text, unit=text)
    assert store.insert([item]) == [STORED]
    columns = "event_id, device_id, event_type, value_text, unit"
    assert database.query(f"SELECT {columns} FROM events") == [(text,) * 5]


def test_one_refused_event_in_a_full_batch_leaves_the_rest_stored(
    store: Store, database: Database
) -> None:
    database.query("ALTER TABLE events ADD CHECK (value_num < 1000)")
    batch = [make(f"e{i:03}") for i in range(500)]
    batch[377] = make("e377", value_num=5000.0)
    results = store.insert(batch)
    assert "check constraint" in refused(results.pop(377))
    assert results == [STORED] * 499
    assert database.count() == 499


def test_a_value_too_large_for_an_index_of_the_user_is_refused_alone(
    store: Store, database: Database
) -> None:
    database.query("CREATE INDEX ON events (value_text)")
    noise = "".join(chr(0x4E00 + i * 7919 % 20_000) for i in range(6_000))  # does not compress
    batch = [make("a"), make("b", value_num=None, value_text=noise), make("c")]
    first, second, third = store.insert(batch)
    assert (first, third) == (STORED, STORED)
    assert "54000" in refused(second)


def test_behind_a_refused_event_another_of_the_same_id_is_still_stored(
    store: Store, database: Database
) -> None:
    database.query("ALTER TABLE events ADD CHECK (value_num < 1000)")
    results = store.insert([make("a", value_num=5000.0), make("a"), make("a"), make("b")])
    refused(results[0])
    assert results[1:] == [STORED, DUPLICATE, STORED]


def test_a_refused_event_is_found_by_halving(servers: Any, database: Database) -> None:
    database.query("ALTER TABLE events ADD CHECK (value_num < 1000)")
    store = Store(database.conninfo | {"options": "-c log_statement=all"})
    store.connect()
    batch = [make(f"e{i:03}") for i in range(128)]
    batch[99] = make("e099", value_num=5000.0)
    begin = servers.postgres.log_end
    store.insert(batch)
    store.close()
    log = servers.postgres.log(begin)
    statements = re.findall("statement: (?:INSERT INTO events|EXECUTE insert_one)", log)
    assert len(statements) == 1 + 2 * 7  # and not 128


def test_what_another_writer_commits_meanwhile_is_a_duplicate(
    store: Store, database: Database
) -> None:
    other = database.connect()
    with other.cursor() as cursor:
        cursor.execute(
            "INSERT INTO events (event_id, device_id, schema, event_type, value_num, unit,"
            " ts_device) VALUES ('a', 'device-1', 1, 'temperature', 21.5, 'C', %s)",
            (NOON,),
        )
    results: list[Outcome | Rejection] = []
    thread = threading.Thread(target=lambda: results.extend(store.insert([make("a")])))
    thread.start()
    database.wait_blocked()
    other.commit()
    thread.join(10)
    other.close()
    assert results == [DUPLICATE]


def test_dead_letters_are_kept_whole(store: Store, database: Database) -> None:
    payloads = [bytes(range(256)), b"", b"x" * 300_000]
    letters = [
        DeadLetter(NOON, Reason.NOT_JSON, "bad", "qs/v1/d/events", "d", None, payload)
        for payload in payloads
    ]
    ids = store.keep(letters)
    rows = database.query("SELECT id, reason, received_at, payload FROM dead_letters")
    kept = {(row[0], row[1], row[2], bytes(row[3])) for row in rows}
    assert kept == {
        (i, "not_json", NOON, payload) for i, payload in zip(ids, payloads, strict=True)
    }


# --- whose fault ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sqlstate", "fault"),
    [
        (None, Fault.CONNECTION),
        ("08000", Fault.CONNECTION),
        ("08006", Fault.CONNECTION),
        ("57P01", Fault.CONNECTION),
        ("57P02", Fault.CONNECTION),
        ("57P03", Fault.CONNECTION),
        ("40001", Fault.PASSING),
        ("40P01", Fault.PASSING),
        ("53100", Fault.PASSING),
        ("53200", Fault.PASSING),
        ("53300", Fault.PASSING),
        ("55P03", Fault.PASSING),
        ("57014", Fault.PASSING),
        ("58030", Fault.PASSING),
        ("25006", Fault.CONNECTION),
        ("22003", Fault.EVENT),
        ("22P02", Fault.EVENT),
        ("22P05", Fault.EVENT),
        ("23502", Fault.EVENT),
        ("23505", Fault.EVENT),
        ("23514", Fault.EVENT),
        ("54000", Fault.EVENT),
        ("54001", Fault.EVENT),
        ("42P01", Fault.OPERATOR),
        ("42501", Fault.OPERATOR),
        ("42703", Fault.OPERATOR),
        ("25P02", Fault.OPERATOR),
        ("55000", Fault.OPERATOR),
        ("XX000", Fault.OPERATOR),
        ("0A000", Fault.OPERATOR),
        ("ZZZZZ", Fault.OPERATOR),
    ],
)
def test_the_sqlstate_decides(sqlstate: str | None, fault: Fault) -> None:
    assert fault_of(sqlstate) is fault


def test_every_row_of_the_table_is_tested() -> None:
    marks = test_the_sqlstate_decides.pytestmark  # type: ignore[attr-defined]
    tested = [row[0] for row in marks[0].args[1] if row[0]]
    assert all(any(code.startswith(prefix) for code in tested) for prefix in FAULTS)


@pytest.mark.parametrize(
    ("break_it", "mend_it", "message"),
    [
        ("ALTER TABLE events RENAME TO e", "ALTER TABLE e RENAME TO events", "42P01"),
        (
            "ALTER TABLE events RENAME COLUMN unit TO u",
            "ALTER TABLE events RENAME COLUMN u TO unit",
            "42703",
        ),
    ],
)
def test_while_the_table_is_not_as_it_should_be_no_event_is_at_fault(
    store: Store, database: Database, break_it: str, mend_it: str, message: str
) -> None:
    database.query(break_it)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=message):
            store.insert([make("a"), make("b")])
    database.query(mend_it)
    assert store.insert([make("a"), make("b")]) == [STORED, STORED]


def test_without_permission_no_event_is_at_fault(store: Store, database: Database) -> None:
    database.query("CREATE ROLE nobody_much LOGIN PASSWORD 'x'")
    try:
        weak = Store(database.conninfo | {"user": "nobody_much", "password": "x"})
        weak.connect()
        with pytest.raises(StoreUnavailable, match="42501"):
            weak.insert([make("a")])
        weak.close()
    finally:
        database.query("DROP ROLE nobody_much")


def test_a_database_that_becomes_read_only_is_left_and_not_taken_until_it_is_writable(
    store: Store, database: Database
) -> None:
    default = f"ALTER DATABASE {database.name} SET default_transaction_read_only"
    store.ping()
    database.query(f"{default} = on")
    other = Store(database.conninfo)
    with pytest.raises(StoreUnavailable, match="read-only"):
        other.connect()
    database.postgres.psql(f"{default} = off", "qs")  # from another one, which may write
    other.connect()
    assert other.insert([make("a")]) == [STORED]
    other.close()


def test_a_session_that_is_read_only_is_left(database: Database) -> None:
    store = Store(database.conninfo)
    store.connect()
    store._run("SELECT set_config('default_transaction_read_only', 'on', false)")
    with pytest.raises(StoreUnavailable, match="25006"):
        store.insert([make("a")])
    assert not store.connected
    store.connect()
    assert store.insert([make("a")]) == [STORED]
    store.close()


def test_a_locked_table_passes(database: Database) -> None:
    store = Store(database.conninfo | {"options": "-c lock_timeout=100"})
    store.connect()
    with database.locked(), pytest.raises(StoreUnavailable, match="55P03"):
        store.insert([make("a")])
    assert store.insert([make("a")]) == [STORED]
    store.close()


def test_a_lost_connection_is_noticed_and_the_next_one_works(
    store: Store, database: Database
) -> None:
    assert store.insert([make("a")]) == [STORED]
    database.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with pytest.raises(StoreUnavailable):
        store.insert([make("a"), make("b")])
    assert not store.connected
    store.connect()
    assert store.insert([make("a"), make("b")]) == [DUPLICATE, STORED]


def test_a_wrong_password_is_unavailable_and_is_not_in_the_message(database: Database) -> None:
    store = Store(database.conninfo | {"password": "hunter2"})
    with pytest.raises(StoreUnavailable, match="password authentication failed") as caught:
        store.connect()
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wait_ends_when_the_store_is_told_to_give_up(store: Store, database: Database) -> None:
    def give_up_once_it_waits() -> None:
        database.wait_blocked()
        store.give_up_at(0.0)

    thread = threading.Thread(target=give_up_once_it_waits)
    with database.locked():
        thread.start()
        with pytest.raises(StoreUnavailable, match="no answer in time"):
            store.insert([make("a")])
        thread.join(10)
    assert not store.connected


# --- other work meanwhile ------------------------------------------------------------


class OtherWork:
    """Counts its steps, and acts at one of them; a socket that nobody reads brings more."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._steps_to_go = 0
        self._action: Callable[[], object] = tuple
        self.has_more = False
        self.heard: list[bool] = []  # at each step, whether the socket is ready

    @property
    def steps(self) -> int:
        return len(self.heard)

    def drain(self) -> None:
        """Read what makes the socket ready."""
        self._sock.recv(1)

    def act_at(self, step: int, action: Callable[[], object]) -> None:
        self._steps_to_go, self._action = step, action

    def __call__(self, is_ready: bool) -> tuple[list[socket.socket], bool]:
        self.heard.append(is_ready)
        self._steps_to_go -= 1
        if self._steps_to_go == 0:
            self._action()
        return [self._sock], self.has_more


@pytest.fixture
def other_work() -> Iterator[OtherWork]:
    here, there = socket.socketpair()
    with here, there:
        there.send(b"!")
        yield OtherWork(here)


@pytest.fixture
def busy_store(database: Database, other_work: OtherWork) -> Iterator[Store]:
    """One with other work at all times."""
    store = Store(database.conninfo, other_work)
    store.connect()
    yield store
    store.close()


@pytest.mark.parametrize("has_more", [False, True], ids=["its socket is ready", "it has more"])
def test_while_it_waits_other_work_is_done_as_it_comes(
    database: Database, busy_store: Store, other_work: OtherWork, has_more: bool
) -> None:
    """That work releases the lock, and if each step came at the end of a wait (0.25 s), late."""
    with ExitStack() as lock:
        lock.enter_context(database.locked())
        other_work.has_more = has_more
        if has_more:
            other_work.drain()
        other_work.act_at(2000, lock.close)
        assert busy_store.insert([make("a")]) == [STORED]


def test_other_work_is_told_what_is_ready_and_asks_nothing_before(
    database: Database, busy_store: Store, other_work: OtherWork
) -> None:
    with ExitStack() as lock:
        lock.enter_context(database.locked())
        other_work.heard.clear()
        other_work.act_at(3, lock.close)
        busy_store.insert([make("a")])
    assert other_work.heard[:3] == [False, True, True]
    other_work.drain()
    with ExitStack() as lock:
        lock.enter_context(database.locked())
        other_work.heard.clear()
        other_work.act_at(2, lock.close)
        busy_store.insert([make("b")])
    assert not any(other_work.heard)


def test_an_answer_is_taken_at_once_even_if_there_is_always_other_work(
    store: Store, busy_store: Store, other_work: OtherWork
) -> None:
    def median_seconds(store: Store, name: str) -> float:
        # Process-wide, so it is set for the one that is asked.
        extensions.set_wait_callback(store._wait)
        seconds = []
        for number in range(100):
            assert store.insert([make(f"{name}-{number}")]) == [STORED]
            seconds.append(store.round_trip_seconds)
        return statistics.median(seconds)

    idle = median_seconds(store, "idle")
    steps = other_work.steps
    busy = median_seconds(busy_store, "busy")
    print(f"one INSERT: {idle * 1000:.2f} ms, with other work {busy * 1000:.2f} ms")
    assert busy < 5 * idle
    assert other_work.steps >= steps + 100


def test_a_wait_ends_in_time_even_if_there_is_always_other_work(
    database: Database, busy_store: Store, other_work: OtherWork
) -> None:
    with database.locked():
        other_work.act_at(100, lambda: busy_store.give_up_at(0.0))
        with pytest.raises(StoreUnavailable, match="no answer in time"):
            busy_store.insert([make("a")])


def test_each_column_has_a_comment_and_the_indexes_are_there(database: Database) -> None:
    bare = database.query(
        "SELECT relname, attname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid"
        " WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v') AND attnum > 0"
        " AND NOT attisdropped AND col_description(attrelid, attnum) IS NULL"
    )
    assert bare == []
    names = {row[0] for row in database.query("SELECT indexname FROM pg_indexes")}
    assert names >= {"idx_events_ts_device", "idx_events_type_ts", "idx_events_device_ts"}


def test_applying_the_schema_again_changes_nothing_and_does_not_wait_for_writers(
    servers: Any, database: Database
) -> None:
    describe = (
        "SELECT table_name, column_name, data_type FROM information_schema.columns ORDER BY 1, 2"
    )
    indexes = "SELECT indexname, indexdef FROM pg_indexes ORDER BY 1"
    before = database.query(describe), database.query(indexes)
    database.query(
        "INSERT INTO events (event_id, device_id, schema, event_type) VALUES ('a', 'b', 1, 'c')"
    )
    writer = database.connect()
    with writer.cursor() as cursor:
        cursor.execute("UPDATE events SET unit = 'x'")
        servers.postgres.apply_schema(database.name)
    writer.commit()
    writer.close()
    assert (database.query(describe), database.query(indexes)) == before
    assert database.count() == 1


def test_the_latest_events_are_found_by_an_index(database: Database) -> None:
    database.query(
        "INSERT INTO events (event_id, device_id, schema, event_type, ts_server)"
        " SELECT i::text, 'd', 1, 't', now() - i * interval '1 s' FROM generate_series(1, 5000) i"
    )
    database.query("ANALYZE events")
    plan = database.query("EXPLAIN SELECT * FROM events ORDER BY ts_server DESC LIMIT 10")
    assert re.search(r"Index Scan.* using idx_events_ts_server", str(plan))
