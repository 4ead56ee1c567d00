"""The Store on a real PostgreSQL: outcomes, exact comparison, and whose fault an error is.

What it does not: MQTT; that is test_ingester.py.
"""

import re
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ingester.connection import StoreUnavailable
from ingester.event import Event
from ingester.rejection import DeadLetter, Reason, Rejection
from ingester.sqlstate import FAULTS, Fault, fault_of
from ingester.store import Outcome, Store
from tests.support.each import cases
from tests.support.pipeline import Database, insert

NOON = datetime(2026, 2, 10, 12, tzinfo=UTC)
STORED, DUPLICATE, CONFLICT = Outcome.STORED, Outcome.DUPLICATE, Outcome.CONFLICT


def make(event_id: str, **fields: Any) -> Event:
    usual = Event(event_id, "device-1", 1, "temperature", 21.5, None, "C", NOON, "{}")
    return usual._replace(**fields)


@pytest.fixture
def store(database: Database) -> Iterator[Store]:
    store = Store(database.conninfo)
    store.connect()
    yield store
    store.close()


def connect_and_insert(store: Store, events: Sequence[Event]) -> list[Outcome | Rejection]:
    store.connect()
    return insert(store, events)


def refused(result: Outcome | Rejection) -> str:
    assert isinstance(result, Rejection)
    assert result.reason is Reason.NOT_STORABLE
    return result.error


def test_events_are_stored_once_and_come_out_in_the_order_given(
    store: Store, database: Database
) -> None:
    assert insert(store, [make("b"), make("a")]) == [STORED, STORED]
    again = [make("a"), make("c"), make("b")]
    assert insert(store, again) == [DUPLICATE, STORED, DUPLICATE]
    assert database.query("SELECT event_id FROM events ORDER BY 1") == [("a",), ("b",), ("c",)]


def test_no_events_are_no_work(store: Store) -> None:
    assert insert(store, []) == []
    assert store.insert_dead_letters([]) == []


def test_repeats_within_a_batch_are_compared_with_the_first_of_them(
    store: Store, database: Database
) -> None:
    batch = [make("a"), make("a"), make("a", value_num=1.0), make("b"), make("a")]
    assert insert(store, batch) == [STORED, DUPLICATE, CONFLICT, STORED, DUPLICATE]
    assert database.query("SELECT value_num FROM events WHERE event_id = 'a'") == [(21.5,)]


@cases(
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
)
def test_any_other_content_under_the_same_id_is_a_conflict(
    store: Store, change: dict[str, Any]
) -> None:
    event_id = str(change)
    assert insert(store, [make(event_id)]) == [STORED]
    assert insert(store, [make(event_id, **change)]) == [CONFLICT]
    assert insert(store, [make(event_id)]) == [DUPLICATE]


@cases(
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
    event_id = f"{stored} and {sent}"
    assert insert(store, [make(event_id, meta=stored)]) == [STORED]
    assert insert(store, [make(event_id, meta=sent)]) == [outcome]


@cases("value", [0.1, -0.0, 1e308, 5e-324, 2.0**53 + 2, 1 / 3])
def test_doubles_and_early_and_late_timestamps_come_back_exactly(
    store: Store, value: float
) -> None:
    early = datetime(1, 1, 1, tzinfo=UTC)
    late = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    first, second = f"{value} early", f"{value} late"
    events = [make(first, value_num=value, ts_device=early), make(second, ts_device=late)]
    assert insert(store, events) == [STORED, STORED]
    assert insert(store, events) == [DUPLICATE, DUPLICATE]


def test_sql_in_every_string_is_stored_as_text(store: Store, database: Database) -> None:
    text = "'; DROP TABLE events; -- %s %(a)s \\ \" $$ {}"
    item = make(text, device_id=text, event_type=text, value_num=None, value_text=text, unit=text)
    assert insert(store, [item]) == [STORED]
    columns = "event_id, device_id, event_type, value_text, unit"
    assert database.query(f"SELECT {columns} FROM events") == [(text,) * 5]


def test_one_refused_event_in_a_full_batch_leaves_the_rest_stored(
    store: Store, database: Database
) -> None:
    database.query("ALTER TABLE events ADD CHECK (value_num < 1000)")
    batch = [make(f"e{i:03}") for i in range(500)]
    batch[377] = make("e377", value_num=5000.0)
    results = insert(store, batch)
    assert "check constraint" in refused(results.pop(377))
    assert results == [STORED] * 499
    assert database.count() == 499


def test_a_value_too_large_for_an_index_of_the_user_is_refused_alone(
    store: Store, database: Database
) -> None:
    database.query("CREATE INDEX ON events (value_text)")
    noise = "".join(chr(0x4E00 + i * 7919 % 20_000) for i in range(6_000))  # does not compress
    batch = [make("a"), make("b", value_num=None, value_text=noise), make("c")]
    first, second, third = insert(store, batch)
    assert (first, third) == (STORED, STORED)
    assert "54000" in refused(second)


def test_behind_a_refused_event_another_of_the_same_id_is_still_stored(
    store: Store, database: Database
) -> None:
    database.query("ALTER TABLE events ADD CHECK (value_num < 1000)")
    results = insert(store, [make("a", value_num=5000.0), make("a"), make("a"), make("b")])
    refused(results[0])
    assert results[1:] == [STORED, DUPLICATE, STORED]


def test_a_refused_event_is_found_in_few_statements(servers: Any, database: Database) -> None:
    database.query("ALTER TABLE events ADD CHECK (value_num < 1000)")
    store = Store(database.conninfo | {"options": "-c log_statement=all"})
    store.connect()
    batch = [make(f"e{i:03}") for i in range(128)]
    batch[99] = make("e099", value_num=5000.0)
    begin = servers.postgres.log_end
    insert(store, batch)
    store.close()
    log = servers.postgres.log(begin)
    statements = re.findall("statement: .*(?:INSERT INTO events|EXECUTE insert_events)", log)
    assert 2 * 7 <= len(statements) <= 4 * 7  # and not 128


def test_the_very_same_event_given_twice_has_one_row_and_an_outcome_for_each(
    store: Store, database: Database
) -> None:
    """The decoder gives it again where the same bytes come again."""
    database.query("ALTER TABLE events ADD CHECK (value_num < 1000)")
    good, bad = make("good"), make("bad", value_num=5000.0)
    outcomes = insert(store, [bad, good, bad, good, make("good"), make("good", unit="F")])
    assert refused(outcomes[0]) == refused(outcomes[2])
    assert [outcomes[1], *outcomes[3:]] == [STORED, DUPLICATE, DUPLICATE, CONFLICT]
    assert insert(store, [good, good]) == [DUPLICATE, DUPLICATE]


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
    thread = threading.Thread(target=lambda: results.extend(insert(store, [make("a")])))
    thread.start()
    database.wait_blocked()
    other.commit()
    thread.join(10)
    other.close()
    assert results == [DUPLICATE]


def test_an_answer_that_comes_at_once_is_an_answer_like_any_other(
    store: Store, database: Database
) -> None:
    database.query("ALTER TABLE events ADD CHECK (value_num < 30)")
    # Before the statement is sent in full, or right behind it: on a busy machine it is often so.
    for number in range(1_000):
        store.begin_insert([make(f"bad-{number}", value_num=30.0)])
        assert "check constraint" in refused(store.finish_insert()[0])
        store.insert_dead_letters([])


def test_dead_letters_are_kept_whole(store: Store, database: Database) -> None:
    payloads = [bytes(range(256)), b"", b"x" * 300_000]
    letters = [
        DeadLetter(NOON, Reason.NOT_JSON, "bad", "qs/v1/d/events", "d", None, payload)
        for payload in payloads
    ]
    ids = store.insert_dead_letters(letters)
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
        ("44000", Fault.EVENT),
        ("P0001", Fault.EVENT),
        ("P0002", Fault.OPERATOR),
        ("26000", Fault.OPERATOR),
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
    ("break_it", "fix_it", "message"),
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
    store: Store, database: Database, break_it: str, fix_it: str, message: str
) -> None:
    database.query(break_it)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=message):
            connect_and_insert(store, [make("a"), make("b")])
        assert not store.connected  # a right may be given to new sessions only
    database.query(fix_it)
    store.connect()
    assert insert(store, [make("a"), make("b")]) == [STORED, STORED]


def test_without_permission_no_event_is_at_fault(store: Store, database: Database) -> None:
    database.query("CREATE ROLE nobody_much LOGIN PASSWORD 'x'")
    try:
        weak = Store(database.conninfo | {"user": "nobody_much", "password": "x"})
        weak.connect()
        with pytest.raises(StoreUnavailable, match="42501"):
            insert(weak, [make("a")])
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
    assert insert(other, [make("a")]) == [STORED]
    other.close()


def test_a_session_that_is_read_only_is_left(database: Database) -> None:
    store = Store(database.conninfo)
    store.connect()
    store.run("SELECT set_config('default_transaction_read_only', 'on', false)")
    with pytest.raises(StoreUnavailable, match="25006"):
        insert(store, [make("a")])
    assert not store.connected
    store.connect()
    assert insert(store, [make("a")]) == [STORED]
    store.close()


def test_a_lost_connection_is_noticed_and_the_next_one_works(
    store: Store, database: Database
) -> None:
    assert insert(store, [make("a")]) == [STORED]
    database.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with pytest.raises(StoreUnavailable):
        insert(store, [make("a"), make("b")])
    assert not store.connected
    store.connect()
    assert insert(store, [make("a"), make("b")]) == [DUPLICATE, STORED]


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
            insert(store, [make("a")])
        thread.join(10)
    assert not store.connected


# --- the other session ---------------------------------------------------------------


class OtherSession:
    """Counts how often it is served, and acts at one of them; what it reads stays unread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sockets = [sock]
        self.served = 0
        self._act_at = 0
        self._action: Callable[[], object] = tuple

    def act_at(self, number: int, action: Callable[[], object]) -> None:
        self.served, self._act_at, self._action = 0, number, action

    def serve(self) -> None:
        self.served += 1
        if self.served == self._act_at:
            self._action()


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


@pytest.fixture
def other_session(line: tuple[socket.socket, socket.socket]) -> OtherSession:
    return OtherSession(line[0])


@pytest.fixture
def busy_store(database: Database, other_session: OtherSession) -> Iterator[Store]:
    """One with another session beside it."""
    store = Store(database.conninfo, other_session)
    store.connect()
    yield store
    store.close()


def test_while_it_waits_the_other_session_is_served_as_often_as_it_has_more_to_read(
    database: Database,
    busy_store: Store,
    other_session: OtherSession,
    line: tuple[socket.socket, socket.socket],
) -> None:
    """That releases the lock, and if each time came at the end of a wait, far too late."""
    line[1].send(b"!")
    with ExitStack() as lock:
        lock.enter_context(database.locked())
        other_session.act_at(2000, lock.close)
        assert insert(busy_store, [make("a")]) == [STORED]


def test_while_it_waits_the_other_session_is_served_even_if_it_has_nothing_to_read(
    database: Database, busy_store: Store, other_session: OtherSession
) -> None:
    """Its keepalive is due at some time."""
    with ExitStack() as lock:
        lock.enter_context(database.locked())
        other_session.act_at(2, lock.close)
        assert insert(busy_store, [make("a")]) == [STORED]


def test_between_many_short_statements_the_other_session_is_served_as_well(
    database: Database, busy_store: Store, other_session: OtherSession
) -> None:
    """Finding refused rows can take minutes, and the broker ends a session that says nothing."""
    other_session.served = 0
    began_at = time.monotonic()
    while other_session.served < 2 and time.monotonic() - began_at < 10:
        busy_store.ping()
    assert other_session.served == 2


@pytest.mark.alone
def test_an_answer_is_taken_at_once_even_if_the_other_session_always_has_more(
    store: Store,
    busy_store: Store,
    other_session: OtherSession,
    line: tuple[socket.socket, socket.socket],
) -> None:
    def quick_seconds(store: Store, name: str) -> float:
        """Of ten the quickest: the others had to wait for a processor on a busy machine."""
        seconds = []
        for number in range(100):
            assert insert(store, [make(f"{name}-{number}")]) == [STORED]
            seconds.append(store.round_trip_seconds)
        return statistics.quantiles(seconds, n=10)[0]

    idle = quick_seconds(store, "idle")
    line[1].send(b"!")
    other_session.served = 0
    busy = quick_seconds(busy_store, "busy")
    print(f"one INSERT: {idle * 1000:.2f} ms, with another session {busy * 1000:.2f} ms")
    assert busy < 5 * idle
    assert other_session.served >= 100


def test_a_wait_ends_in_time_even_if_the_other_session_always_has_more(
    database: Database,
    busy_store: Store,
    other_session: OtherSession,
    line: tuple[socket.socket, socket.socket],
) -> None:
    line[1].send(b"!")
    with database.locked():
        other_session.act_at(100, lambda: busy_store.give_up_at(0.0))
        with pytest.raises(StoreUnavailable, match="no answer in time"):
            insert(busy_store, [make("a")])


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
