"""The database belongs to its owner: what he may legally do costs at most the events concerned.

What it does: gives the database triggers, constraints, columns, settings, an encoding, a pooler
or mute neighbours, as its owner may, and looks at what a device hears and a row holds. What it
does not: let the server fail; that is test_faults_database.py.
"""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import psycopg2
import pytest

from tests.support.device import Device, event
from tests.support.each import first_or_all, short_or_long
from tests.support.load import connects, heard_all
from tests.support.pgbouncer import PgBouncer
from tests.support.pipeline import Database, Pipeline, wait_until
from tests.support.proxy import Proxy
from tools.process import free_port
from tools.stack import Stack

faults = pytest.mark.faults

STOP_SECONDS_MAX = 5.0
FIX_SECONDS_MAX = 5.0
# What the tests' own connections need whatever the owner has set for everybody.
OWN_OPTIONS = {
    "client_encoding": "UTF8",
    "default_transaction_isolation": "read\\ committed",
    "default_transaction_read_only": "off",
    "extra_float_digits": "1",
    "search_path": "public",
    "statement_timeout": "0",
    "TimeZone": "UTC",
}


@pytest.fixture
def database(servers: Stack, database: Database) -> Database:
    """The same, looked into with settings of our own, whatever those of the database are."""
    options = " ".join(f"-c {name}={value}" for name, value in OWN_OPTIONS.items())
    database.conninfo["options"] = options
    return database


def wait_subscribed(pipeline: Pipeline) -> None:
    """Wait until the broker has granted its topic: what is published from then on arrives."""
    pipeline.ingester.wait_for_log("MQTT connected rc=Success; subscribing", 30)


def start(pipeline: Pipeline, **environment: str) -> None:
    pipeline.ingester.environment |= environment
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()


def stop(pipeline: Pipeline) -> None:
    """Stop the ingester by SIGTERM; it must be out in time, and not by a crash."""
    began_at = time.monotonic()
    code = pipeline.ingester.stop(timeout=20)
    seconds = time.monotonic() - began_at
    assert code == 0, pipeline.ingester.log_tail()
    assert seconds < STOP_SECONDS_MAX, pipeline.ingester.log_tail()
    assert "Traceback" not in pipeline.ingester.log()


def add_trigger(database: Database, body: str, table: str = "events") -> None:
    """Have this PL/pgSQL run before each row is inserted; drop_trigger() removes it."""
    database.query(
        "CREATE OR REPLACE FUNCTION owners() RETURNS trigger LANGUAGE plpgsql AS"
        f" $body$ BEGIN {body} END $body$"
    )
    database.query(
        f"CREATE TRIGGER owners BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION owners()"
    )


def drop_trigger(database: Database) -> None:
    database.query("DROP FUNCTION owners CASCADE")


def answers(device: Device) -> list[tuple[str, str]]:
    """Each ACK: the event's id, and the status or the reason."""
    return [(ack["event_id"], ack.get("reason", ack["status"])) for ack in device.acks]


def kept_payloads(database: Database) -> list[str]:
    rows = database.query("SELECT payload FROM dead_letters")
    return sorted(bytes(row[0]).decode() for row in rows)


def payloads(*items: object) -> list[str]:
    """What a device sends for each of them, as kept_payloads() returns it."""
    return sorted(json.dumps(item) for item in items)


def warnings(pipeline: Pipeline) -> list[str]:
    """What the log has had of the database since the ingester started."""
    log = pipeline.ingester.log(pipeline.ingester.log_start)
    return re.findall(r"WARNING Postgres: (.*)", log)


# --- a trigger that drops events -------------------------------------------------------

DROPS_NEGATIVE = "IF NEW.value_num < 0 THEN RETURN NULL; END IF; RETURN NEW;"


def test_what_a_trigger_drops_is_refused_and_the_others_are_stored(running: Pipeline) -> None:
    add_trigger(running.database, DROPS_NEGATIVE)
    sent = [event(1), event(2, value=-1), event(3), event(4, value=-2), event(5)]
    with running.device() as device:
        device.publish(sent)
        device.wait(lambda: len(device.dead_letters) == 2, "two dead letters")
        assert device.ask(event(6, value=-3))["reason"] == "not_storable"
        assert device.ask(event(7))["status"] == "stored"
        device.wait(lambda: len(device.dead_letters) == 3, "the third dead letter")
    assert answers(device)[:5] == [
        ("device-1-1", "stored"),
        ("device-1-2", "not_storable"),
        ("device-1-3", "stored"),
        ("device-1-4", "not_storable"),
        ("device-1-5", "stored"),
    ]
    errors = {ack["error"] for ack in device.acks if ack["status"] == "rejected"}
    assert all("database dropped it" in error for error in errors), errors
    assert kept_payloads(running.database) == payloads(sent[1], sent[3], event(6, value=-3))
    rows = running.database.query("SELECT event_id FROM events ORDER BY 1")
    assert rows == [(f"device-1-{number}",) for number in (1, 3, 5, 7)]
    assert warnings(running) == []
    assert connects(running) == 1


def test_repeats_of_a_dropped_event_are_each_refused(running: Pipeline) -> None:
    add_trigger(running.database, DROPS_NEGATIVE)
    with running.device() as device:
        device.publish([event(1, value=-1), event(1, value=-1), event(1), event(1, value=-1)])
        device.wait(lambda: len(device.acks) == 4, "four ACKs")
    # The third is the first that can be stored; that the others are another content is as true
    # as that they were dropped.
    statuses = [ack["status"] for ack in device.acks]
    assert statuses == ["rejected", "rejected", "stored", "rejected"]
    assert running.database.query("SELECT value_num FROM events") == [(21.5,)]


def test_a_trigger_that_drops_all_costs_them_all_and_nothing_after_it(running: Pipeline) -> None:
    add_trigger(running.database, "RETURN NULL;")
    array = [event(f"array-{number}") for number in range(50)]
    with running.device() as device:
        for number in range(50):
            device.send(event(number))
        device.publish(array)
        device.wait(lambda: len(device.acks) == 100, "an ACK for each")
        assert {reason for _, reason in answers(device)} == {"not_storable"}
        assert running.database.count() == 0
        drop_trigger(running.database)
        assert device.ask(event("after"))["status"] == "stored"
    # Of more than 20 refused elements the whole array is kept once.
    assert kept_payloads(running.database) == payloads(*(event(n) for n in range(50)), array)
    assert connects(running) == 1


def test_an_event_whose_row_is_there_is_stored_even_if_it_would_be_dropped_now(
    running: Pipeline,
) -> None:
    with running.device() as device:
        assert device.ask(event(1, value=-1))["status"] == "stored"
        add_trigger(running.database, DROPS_NEGATIVE)
        assert device.ask(event(1, value=-1))["status"] == "stored"
        assert device.ask(event(1, value=-2))["reason"] == "event_id_conflict"
    assert running.database.query("SELECT value_num FROM events") == [(-1.0,)]


def test_a_row_deleted_between_insert_and_comparison_is_stored_again_and_not_called_dropped(
    running: Pipeline,
) -> None:
    """The INSERT has passed by the row that is there, and waits at the next one meanwhile."""
    database = running.database
    add_trigger(
        database,
        "IF NEW.event_id = 'device-1-z' THEN PERFORM pg_advisory_xact_lock(7); END IF; RETURN NEW;",
    )
    with running.device() as device, closing(database.connect()) as gate:
        assert device.ask(event("a"))["status"] == "stored"
        with gate.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(7)")
        device.publish([event("a"), event("z")])
        database.wait_blocked()
        database.query("DELETE FROM events")
        gate.close()
        device.wait(lambda: len(device.acks) == 3, "both ACKs")
    assert answers(device)[1:] == [("device-1-a", "stored"), ("device-1-z", "stored")]
    assert database.count() == 2
    assert database.count("dead_letters") == 0


# --- constraints, and columns of the owner's -------------------------------------------

RAISES_HIGH = (
    "IF NEW.value_num > 1000 THEN RAISE EXCEPTION 'no sensor reads %', NEW.value_num; END IF;"
    " RETURN NEW;"
)
# What refuses an event of 5,000 without a unit, among others from 1 to 99 with one. Deferred
# ones speak up only at the COMMIT.
REFUSALS = {
    "check": ("ALTER TABLE events ADD CHECK (value_num < 1000) NOT VALID", "23514"),
    "a column of ours made NOT NULL": ("ALTER TABLE events ALTER unit SET NOT NULL", "23502"),
    "unique": ("CREATE UNIQUE INDEX ON events (value_num)", "23505"),
    "unique, deferred": (
        "ALTER TABLE events ADD UNIQUE (value_num) DEFERRABLE INITIALLY DEFERRED",
        "23505",
    ),
    "exclusion": ("ALTER TABLE events ADD EXCLUDE (value_num WITH =)", "23P01"),
    "foreign key": (
        "ALTER TABLE events ADD FOREIGN KEY (value_num) REFERENCES known NOT VALID",
        "23503",
    ),
    "foreign key, deferred": (
        "ALTER TABLE events ADD FOREIGN KEY (value_num) REFERENCES known"
        " DEFERRABLE INITIALLY DEFERRED NOT VALID",
        "23503",
    ),
    "a trigger's exception": (
        "CREATE TRIGGER high BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION high()",
        "P0001",
    ),
    "a trigger's exception, deferred": (
        "CREATE CONSTRAINT TRIGGER high AFTER INSERT ON events DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION high()",
        "P0001",
    ),
}


@pytest.mark.parametrize(("sql", "sqlstate"), REFUSALS.values(), ids=REFUSALS)
def test_what_the_owner_forbids_costs_the_events_concerned_and_no_others(
    running: Pipeline, sql: str, sqlstate: str
) -> None:
    database = running.database
    database.query(
        "INSERT INTO events (event_id, device_id, schema, event_type, value_num, unit)"
        " VALUES ('owner', 'owner', 1, 'first', 5000, 'C')"
    )
    database.query(
        "CREATE TABLE known AS SELECT i::float8 AS value FROM generate_series(1, 99) i;"
        " ALTER TABLE known ADD PRIMARY KEY (value)"
    )
    database.query(
        "CREATE FUNCTION high() RETURNS trigger LANGUAGE plpgsql AS"
        f" $body$ BEGIN {RAISES_HIGH} END $body$"
    )
    database.query(sql)
    bad = [event(f"bad-{number}", value=5000) for number in range(2)]
    good = [event(number, value=number, unit="C") for number in range(1, 8)]
    with running.device() as device:
        device.publish([*good[:3], bad[0], *good[3:6]])
        device.wait(lambda: len(device.acks) == 7, "an ACK for each")
        assert device.ask(bad[1])["reason"] == "not_storable"
        assert device.ask(good[6])["status"] == "stored"
        device.wait(lambda: len(device.dead_letters) == 2, "the dead letters")
    assert device.heard_at.keys() == {item["event_id"] for item in good}
    assert all(sqlstate in letter["error"] for letter in device.dead_letters)
    assert kept_payloads(database) == payloads(*bad)
    assert database.count() == 1 + len(good)
    assert warnings(running) == []
    assert connects(running) == 1


# What no event can be blamed for: how it breaks, what the log names, how it is fixed.
HAS_A_BUG = "NEW.no_such_column := 1; RETURN NEW;"
OWNERS_FAULTS = {
    "a NOT NULL column, then dropped NOT NULL": (
        "ALTER TABLE events ADD site TEXT NOT NULL DEFAULT 'x';"
        " ALTER TABLE events ALTER site DROP DEFAULT",
        '"site"',
        "ALTER TABLE events ALTER site DROP NOT NULL",
    ),
    "a NOT NULL column, then dropped": (
        "ALTER TABLE events ADD site TEXT NOT NULL",
        '"site"',
        "ALTER TABLE events DROP site",
    ),
    "a NOT NULL column, then given a default": (
        "ALTER TABLE events ADD site TEXT NOT NULL",
        '"site"',
        "ALTER TABLE events ALTER site SET DEFAULT 'attic'",
    ),
    "a trigger with a bug": (
        "CREATE FUNCTION bug() RETURNS trigger LANGUAGE plpgsql AS"
        f" $body$ BEGIN {HAS_A_BUG} END $body$;"
        " CREATE TRIGGER bug BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION bug()",
        '"no_such_column"',
        "DROP FUNCTION bug CASCADE",
    ),
}


@pytest.mark.parametrize(("breaks", "names", "fixes"), OWNERS_FAULTS.values(), ids=OWNERS_FAULTS)
def test_what_the_owner_must_fix_is_waited_for_loudly_and_costs_no_event(
    running: Pipeline, breaks: str, names: str, fixes: str
) -> None:
    database = running.database
    database.query(breaks)
    with running.device() as device:
        for number in range(20):
            device.publish(event(number))
        device.publish([event("array-1"), event("array-2")])
        running.ingester.wait_for_log("WARNING Postgres: ")
        time.sleep(1.5)  # several tries
        assert device.messages == []
        assert database.count("dead_letters") == 0
        fixed_at = time.monotonic()
        database.query(fixes)
        device.wait(lambda: len(device.heard_at) == 22, "an ACK for each")
        assert time.monotonic() - fixed_at < FIX_SECONDS_MAX
    (warning,) = warnings(running)
    assert names in warning
    assert database.count() == 22
    assert database.count("dead_letters") == 0
    assert connects(running) == 1


def test_a_column_of_the_owners_that_dead_letters_lack_is_waited_for_loudly(
    running: Pipeline,
) -> None:
    database = running.database
    database.query("ALTER TABLE dead_letters ADD seen_by TEXT NOT NULL")
    with running.device() as device:
        device.publish(event(1, value=[]))
        running.ingester.wait_for_log("WARNING Postgres: ")
        assert device.messages == []
        database.query("ALTER TABLE dead_letters ALTER seen_by DROP NOT NULL")
        device.wait(lambda: bool(device.dead_letters), "the dead letter")
        assert device.ask(event(2))["status"] == "stored"
    (warning,) = warnings(running)
    assert '"seen_by"' in warning
    assert database.count("dead_letters") == 1


# --- settings of the database and the role ---------------------------------------------

AWKWARD = "it's \\ \\' \\x41 \\u0041 \"\u00b0\" \u65e5 E'' $1 %s {}"
NUMBER = event(
    "number",
    value=0.30000000000000004,
    unit="\u00b0C",
    ts_device="2026-02-01T03:04:05.123457+01:00",
    meta={"sum": 0.30000000000000004, "large": 2**60 + 1, "text": AWKWARD},
)
TEXT = event("text", value=AWKWARD, ts_device="0001-01-02T00:00:00.000001Z")
NOT_UTF8 = bytes(range(256)) + b"\\'\\\\\\000 \xc2\xb0"
EXACT_ROWS = [
    (
        NUMBER["event_id"],
        0.30000000000000004,
        None,
        "\u00b0C",
        datetime(2026, 2, 1, 2, 4, 5, 123457, tzinfo=UTC),
        NUMBER["meta"],
    ),
    (TEXT["event_id"], None, AWKWARD, None, datetime(1, 1, 2, 0, 0, 0, 1, tzinfo=UTC), {}),
]


def check_exact(database: Database, device: Device, letters: int = 1) -> None:
    """Send what is easily spoilt, twice, and see that each is stored, once, to the last bit."""
    for _ in range(2):
        assert device.ask(NUMBER)["status"] == "stored"
        assert device.ask(TEXT)["status"] == "stored"
    before = len(device.messages)
    device.publish(NOT_UTF8)
    device.wait(lambda: len(device.messages) == before + 2, "an ACK and a dead letter")
    assert device.acks[-1]["reason"] == "not_utf8"
    columns = "event_id, value_num, value_text, unit, ts_device, meta"
    names = [NUMBER["event_id"], TEXT["event_id"]]
    rows = database.query(
        f"SELECT {columns} FROM events WHERE event_id = ANY(%s) ORDER BY event_id", names
    )
    assert rows == EXACT_ROWS
    payloads = database.query("SELECT DISTINCT payload FROM dead_letters")
    assert [bytes(row[0]) for row in payloads] == [NOT_UTF8]


def add_old_event(database: Database) -> None:
    database.query(
        "INSERT INTO events (event_id, device_id, schema, event_type, ts_server)"
        " VALUES ('old', 'old', 1, 'old', now() - interval '40 days')"
    )


def wait_old_event_deleted(database: Database) -> None:
    def is_gone() -> bool:
        return database.query("SELECT 1 FROM events WHERE event_id = 'old'") == []

    wait_until(is_gone, "retention to delete what is old")


SETTINGS = [
    ("extra_float_digits", "0"),
    ("extra_float_digits", "-15"),
    ("TimeZone", "Asia/Tokyo"),
    ("TimeZone", "America/St_Johns"),
    ("DateStyle", "German, DMY"),
    ("DateStyle", "SQL, DMY"),
    ("IntervalStyle", "iso_8601"),
    ("bytea_output", "escape"),
    ("standard_conforming_strings", "off"),
    ("backslash_quote", "on"),
    ("backslash_quote", "off"),
    ("array_nulls", "off"),
    ("synchronous_commit", "off"),
    ("statement_timeout", "50ms"),
    ("lock_timeout", "1ms"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_isolation", "repeatable read"),
    ("client_encoding", "LATIN1"),
    ("client_encoding", "SQL_ASCII"),
    ("search_path", "''"),
    ("search_path", "elsewhere"),
]
IDLE_TIMEOUTS = ("idle_in_transaction_session_timeout", "idle_session_timeout")


@pytest.mark.parametrize(("setting", "value"), SETTINGS, ids=map(" ".join, SETTINGS))
def test_a_setting_of_the_database_changes_nothing_that_is_correct(
    pipeline: Pipeline, setting: str, value: str
) -> None:
    database = pipeline.database
    database.query("CREATE SCHEMA elsewhere")  # where there is no table
    add_old_event(database)
    set_for_database(database, setting, value)
    start(pipeline, RETENTION_DAYS="30")
    with pipeline.device() as device:
        check_exact(database, device)
    wait_old_event_deleted(database)
    assert "WARNING" not in pipeline.ingester.log()


def set_for_database(database: Database, setting: str, value: str) -> None:
    database.query(f"ALTER DATABASE {database.name} SET {setting} = {literal(setting, value)}")


def literal(setting: str, value: str) -> str:
    # These are lists, which quotes would make one name of.
    return value if setting in ("search_path", "DateStyle") else f"'{value}'"


def test_settings_of_the_role_change_nothing_that_is_correct(pipeline: Pipeline) -> None:
    """All of them at once, as far as they go together."""
    database = pipeline.database
    add_old_event(database)
    for setting, value in dict(SETTINGS).items():
        role = f"ROLE {database.conninfo['user']} IN DATABASE {database.name}"
        database.query(f"ALTER {role} SET {setting} = {literal(setting, value)}")
    start(pipeline, RETENTION_DAYS="30")
    with pipeline.device() as device:
        check_exact(database, device)
    wait_old_event_deleted(database)
    assert "WARNING" not in pipeline.ingester.log()


def test_timeouts_of_the_owners_for_what_is_idle_do_not_reach_the_ingester(
    pipeline: Pipeline,
) -> None:
    """It is idle between two events; and maybe, for an instant, amid a transaction."""
    database = pipeline.database
    # transaction_timeout came with PostgreSQL 17.
    known = database.query("SELECT name FROM pg_settings WHERE name = 'transaction_timeout'")
    for setting in (*IDLE_TIMEOUTS, *(row[0] for row in known)):
        set_for_database(database, setting, "200ms" if setting != IDLE_TIMEOUTS[0] else "1ms")
    start(pipeline)
    with pipeline.device() as device:
        for _ in range(3):
            check_exact(database, device)
            time.sleep(0.5)
    assert "WARNING" not in pipeline.ingester.log()
    assert pipeline.ingester.log().count("Connected to Postgres") == 1


@pytest.mark.parametrize("value", ["off", "local", "remote_write"])
def test_a_commit_of_the_ingesters_waits_for_the_disk_whatever_the_owner_has_set(
    pipeline: Pipeline, value: str
) -> None:
    database = pipeline.database
    set_for_database(database, "synchronous_commit", value)
    database.query("CREATE TABLE commits (place TEXT, setting TEXT)")
    record = (
        "INSERT INTO commits VALUES (TG_TABLE_NAME, current_setting('synchronous_commit'));"
        " RETURN NEW;"
    )
    add_trigger(database, record)
    add_trigger(database, record, "dead_letters")
    start(pipeline)
    with pipeline.device() as device:
        device.ask(event(1))
        device.publish([event(2), event(3), event(4, value=[])])
        device.wait(lambda: bool(device.dead_letters), "a dead letter")
    rows = database.query("SELECT place, setting, count(*) FROM commits GROUP BY 1, 2 ORDER BY 1")
    assert rows == [("dead_letters", "on", 1), ("events", "on", 3)]


def test_a_database_made_read_only_is_said_once_and_waited_out(pipeline: Pipeline) -> None:
    """Such a setting reaches new sessions only, both when it comes and when it goes."""
    database = pipeline.database
    set_for_database(database, "default_transaction_read_only", "on")
    pipeline.ingester.start()
    wait_subscribed(pipeline)
    with pipeline.device() as device:
        for number in range(5):
            device.publish(event(number))
        device.publish(b"junk")
        pipeline.ingester.wait_for_log("WARNING Postgres: ")
        time.sleep(1.5)  # several tries
        assert device.messages == []
        database.query(f"ALTER DATABASE {database.name} RESET default_transaction_read_only")
        device.wait(lambda: len(device.heard_at) == 5, "an ACK for each")
        device.wait(lambda: bool(device.dead_letters), "the dead letter")
    (warning,) = warnings(pipeline)
    assert "read-only" in warning
    assert database.count() == 5
    assert database.query("SELECT reason FROM dead_letters") == [("not_json",)]
    assert connects(pipeline) == 1


# --- a pooler --------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["a pool of 1", "a pool of 2"])
def pooler(pipeline: Pipeline, request: pytest.FixtureRequest) -> Iterator[PgBouncer]:
    """PgBouncer in transaction mode, which the ingester is to use; it is not started yet."""
    folder = pipeline.mosquitto.folder / "pgbouncer"
    pooler = PgBouncer(folder, pipeline.database.postgres, request.param)
    pooler.start()
    pooler.wait_ready()
    pipeline.ingester.environment["POSTGRES_PORT"] = str(pooler.port)
    yield pooler
    pipeline.close()
    pooler.stop()


def connect_through(pooler: PgBouncer, database: Database) -> Any:
    """Return a connection of another client of the pool, one transaction for each statement."""
    connection = psycopg2.connect(
        host="127.0.0.1", port=pooler.port, user=pooler.postgres.user, dbname=database.name
    )
    connection.autocommit = True
    return connection


def test_through_a_pooler_all_is_exact_also_after_restarts_of_either(
    pipeline: Pipeline, pooler: PgBouncer
) -> None:
    database = pipeline.database
    add_old_event(database)
    start(pipeline, RETENTION_DAYS="30")
    with pipeline.device() as device:
        check_exact(database, device)
        stop(pipeline)
        start(pipeline)  # in server connections that were used before
        check_exact(database, device)
        pooler.stop()
        device.publish(event("meanwhile"))
        pipeline.ingester.wait_for_log("WARNING Postgres: ")
        pooler.start()
        pooler.wait_ready()
        device.wait(lambda: "device-1-meanwhile" in device.heard_at, "its ACK")
        check_exact(database, device)
        device.publish([event(number) for number in range(50)])
        device.wait(lambda: "device-1-49" in device.heard_at, "the array's ACKs")
    wait_old_event_deleted(database)
    assert database.count() == 2 + 1 + 50
    assert connects(pipeline) == 2  # one for each start
    assert len(warnings(pipeline)) == 1


# Each leaks into the pooled server connection, and so into the transactions of others.
LEAKS = [
    "DEALLOCATE ALL",
    "DISCARD ALL",
    "SET extra_float_digits = 0",
    "SET TimeZone = 'Asia/Tokyo'",
    "SET DateStyle = 'German, DMY'",
    "SET standard_conforming_strings = off",
    "SET bytea_output = escape",
    "SET synchronous_commit = off",
    "SET statement_timeout = '50ms'",
    "SET lock_timeout = '1ms'",
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL SERIALIZABLE",
]
LEAKS_IN_THE_WAY = [
    "SET default_transaction_read_only = on",
    "SET search_path = ''",
    "SET idle_in_transaction_session_timeout = '1ms'",
]


def test_what_another_client_of_the_pool_leaves_behind_changes_nothing(
    pipeline: Pipeline, pooler: PgBouncer
) -> None:
    database = pipeline.database
    database.query("CREATE TABLE commits (setting TEXT)")
    add_trigger(
        database,
        "INSERT INTO commits VALUES (current_setting('synchronous_commit')); RETURN NEW;",
    )
    start(pipeline)
    with pipeline.device() as device, closing(connect_through(pooler, database)) as other:
        check_exact(database, device)
        for number, leak in enumerate(LEAKS):
            with other.cursor() as cursor:
                for _ in range(2 * pooler.pool_size):  # with luck, each of the connections
                    cursor.execute(leak)
            check_exact(database, device)
            assert device.ask(event(number))["status"] == "stored", leak
    assert database.query("SELECT DISTINCT setting FROM commits") == [("on",)]
    assert warnings(pipeline) == []


def test_what_another_client_leaves_behind_that_is_in_the_way_loses_nothing(
    pipeline: Pipeline, pooler: PgBouncer
) -> None:
    """Sessions that may not write, find no table, or die at any pause, until the pool is new."""
    database = pipeline.database
    start(pipeline)
    with pipeline.device() as device, closing(connect_through(pooler, database)) as other:
        for number, leak in enumerate(LEAKS_IN_THE_WAY):
            with other.cursor() as cursor:
                for _ in range(2 * pooler.pool_size):
                    cursor.execute(leak)
            device.publish(event(number))
            time.sleep(0.5)
            with closing(connect_through_console(pooler)) as console, console.cursor() as cursor:
                cursor.execute(f"RECONNECT {database.name}")
            wait_until(partial(heard_all, device), f"an ACK after {leak}")
    assert database.count() == len(LEAKS_IN_THE_WAY)
    assert database.count("dead_letters") == 0


def connect_through_console(pooler: PgBouncer) -> Any:
    user = pooler.postgres.user
    connection = psycopg2.connect(host="127.0.0.1", port=pooler.port, user=user, dbname="pgbouncer")
    connection.autocommit = True
    return connection


@contextmanager
def pool_taken(pooler: PgBouncer, database: Database) -> Iterator[None]:
    """Others hold each server connection, amid a transaction, while the block runs."""
    with ExitStack() as cleanup:
        for _ in range(pooler.pool_size):
            other = cleanup.enter_context(closing(connect_through(pooler, database)))
            other.autocommit = False
            with other.cursor() as cursor:
                cursor.execute("SELECT 1")
        yield


def test_while_others_hold_the_whole_pool_it_waits_and_hears_a_sigterm(
    pipeline: Pipeline, pooler: PgBouncer
) -> None:
    start(pipeline)
    with pipeline.device() as device:
        with pool_taken(pooler, pipeline.database):
            device.publish(event(1))
            time.sleep(1)
            stop(pipeline)
            assert device.messages == []
        start(pipeline)
        device.wait(lambda: bool(device.heard_at), "an ACK")
    assert pipeline.database.count() == 1


# --- an encoding that does not hold what devices send ----------------------------------


def make_again(database: Database, encoding: str) -> None:
    """Make the database anew, in this encoding."""
    database.postgres.drop_database(database.name)
    clause = f"ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0"
    database.postgres.psql(f"CREATE DATABASE {database.name} {clause}", "postgres")
    database.postgres.apply_schema(database.name)


@pytest.mark.parametrize("encoding", first_or_all(["LATIN1", "SQL_ASCII", "EUC_JP"]))
def test_a_database_that_is_not_utf8_is_refused_in_words_before_anything_is_taken(
    pipeline: Pipeline, encoding: str
) -> None:
    database = pipeline.database
    make_again(database, encoding)
    pipeline.ingester.start()
    wait_subscribed(pipeline)
    with pipeline.device() as device:
        for number in range(5):
            device.publish(event(number))
        device.publish(b"\xff")
        pipeline.ingester.wait_for_log("WARNING Postgres: ")
        time.sleep(1.5)  # several tries
        assert device.messages == []
        assert database.count() == database.count("dead_letters") == 0
        (warning,) = warnings(pipeline)
        assert encoding in warning
        assert "UTF8" in warning
        make_again(database, "UTF8")
        device.wait(lambda: len(device.heard_at) == 5, "an ACK for each")
        device.wait(lambda: bool(device.dead_letters), "the dead letter")
    assert database.count() == 5
    assert connects(pipeline) == 1


# --- several hosts ---------------------------------------------------------------------


@contextmanager
def mute_servers(number: int) -> Iterator[list[int]]:
    """Ports that take connections and never say a word."""
    with ExitStack() as cleanup:
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
        for server in servers:
            cleanup.enter_context(closing(server))
        yield [int(server.getsockname()[1]) for server in servers]


def point_at(pipeline: Pipeline, ports: Sequence[int], name: str) -> None:
    """Give the ingester these ports of this machine as its database's hosts."""
    if name == "PGHOST":
        del pipeline.ingester.environment["POSTGRES_HOST"]
    pipeline.ingester.environment |= {
        name: ",".join(["127.0.0.1"] * len(ports)),
        "PGPORT": ",".join(map(str, ports)),
    }


@pytest.mark.parametrize("name", ["PGHOST", "POSTGRES_HOST"])
@pytest.mark.parametrize("number", short_or_long(1, 3))
def test_hosts_that_never_answer_cost_a_few_seconds_each(
    pipeline: Pipeline, name: str, number: int
) -> None:
    port = pipeline.database.postgres.port
    with mute_servers(number) as ports:
        point_at(pipeline, [*ports, port], name)
        pipeline.ingester.start()
        began_at = time.monotonic()
        pipeline.ingester.wait_for_log("Connected to Postgres", 7 * number + 5)
        assert time.monotonic() - began_at < 7 * number
        wait_subscribed(pipeline)
        with pipeline.device() as device:
            assert device.ask(event(1))["status"] == "stored"
        # And again when the connection is lost.
        pipeline.database.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'homelab-ingester' AND datname = current_database()"
        )
        with pipeline.device() as device:
            device.publish(event(2))
            device.wait(lambda: bool(device.heard_at), "an ACK", 7 * number + 5)
    assert connects(pipeline) == 1


def test_a_mute_host_by_address_with_one_port_for_all(pipeline: Pipeline) -> None:
    port = pipeline.database.postgres.port
    with closing(socket.create_server(("127.0.0.2", port))):
        pipeline.ingester.environment["POSTGRES_HOST"] = "127.0.0.2,127.0.0.1"
        pipeline.ingester.start()
        pipeline.ingester.wait_for_log("Connected to Postgres", 12)


def test_the_first_of_several_hosts_is_used_when_it_answers(pipeline: Pipeline) -> None:
    with mute_servers(1) as ports:
        point_at(pipeline, [pipeline.database.postgres.port, *ports], "PGHOST")
        pipeline.ingester.start()
        pipeline.ingester.wait_for_log("Connected to Postgres", 3)


@pytest.mark.parametrize("first", ["127.0.0.2", "::1"])
@pytest.mark.parametrize("turned", [False, True], ids=["refused first", "refused last"])
def test_each_address_is_named_with_a_reason_of_its_own(
    pipeline: Pipeline, first: str, turned: bool
) -> None:
    """As with a `localhost` that is ::1 and 127.0.0.1, where the server listens on one."""
    addresses = [first, "127.0.0.1"]
    environment = pipeline.ingester.environment
    del environment["POSTGRES_HOST"]
    environment["PGHOSTADDR"] = ",".join(addresses[::-1] if turned else addresses)
    environment["POSTGRES_PASSWORD"] = "sesame"
    pipeline.ingester.start()
    pipeline.ingester.wait_for_log("WARNING Postgres: ")
    (warning,) = warnings(pipeline)
    assert "password authentication failed" in warning
    assert "127.0.0.1" in warning
    # Behind a server that answers, if only by a refusal, the others need not be tried.
    reasons = re.search(rf"{first}\b.*(refused|Cannot assign|unreachable)", warning)
    assert reasons or turned, warning
    assert "sesame" not in warning
    assert "Traceback" not in pipeline.ingester.log()


def test_a_mute_and_a_refused_host_are_each_named_with_their_reason(pipeline: Pipeline) -> None:
    with mute_servers(1) as ports:
        refused = free_port()
        point_at(pipeline, [*ports, refused], "PGHOST")
        pipeline.ingester.start()
        pipeline.ingester.wait_for_log("WARNING Postgres: ")
        (warning,) = warnings(pipeline)
    assert str(ports[0]) in warning
    assert str(refused) in warning
    assert "no answer in time" in warning
    assert "refused" in warning


@faults
def test_while_the_database_is_mute_for_40_s_the_mqtt_session_stays(pipeline: Pipeline) -> None:
    with Proxy(pipeline.database.postgres.port) as proxy, pipeline.device() as device:
        proxy.freeze()
        point_at(pipeline, [proxy.port, proxy.port, proxy.port], "PGHOST")
        pipeline.ingester.start()
        wait_subscribed(pipeline)
        device.publish(event(1))
        time.sleep(40)
        assert device.messages == []
        proxy.thaw()
        device.wait(lambda: bool(device.heard_at), "an ACK", 20)
        assert connects(pipeline) == 1
        assert "WARNING MQTT" not in pipeline.ingester.log()
        assert "exceeded timeout" not in pipeline.mosquitto.log()
        pipeline.close()


# --- refused rows that take long to find -----------------------------------------------

BATCH = 500


def refuse_slowly(database: Database, seconds: float, one_in: int = 3) -> None:
    """Let each row take so long, and refuse one in so many."""
    add_trigger(
        database,
        f"PERFORM pg_sleep({seconds}); IF NEW.value_num::int % {one_in} = {one_in - 1}"
        " THEN RAISE check_violation USING MESSAGE = 'refused by the owner'; END IF; RETURN NEW;",
    )


def send_full_batch(pipeline: Pipeline, device: Device, one_in: int = 3) -> set[str]:
    """Send 1 + BATCH events, each a message; return the ids of those to be refused."""
    # While the first waits for the table, a full batch comes together behind it.
    with pipeline.database.locked():
        device.publish(event("first", value=1))
        pipeline.database.wait_blocked()
        for number in range(BATCH - 1):
            device.send(event(number, value=number))
        device.publish(event("last", value=1))
    return {f"device-1-{number}" for number in range(one_in - 1, BATCH - 1, one_in)}


def wait_answered(pipeline: Pipeline, device: Device, timeout: float) -> None:
    device.wait(
        lambda: {ack["event_id"] for ack in device.acks} >= device.sent.keys(),
        "an ACK for each\n" + pipeline.ingester.log_tail(),
        timeout,
    )


def check_refused(pipeline: Pipeline, device: Device, bad: set[str]) -> None:
    """Check that the bad ones are a dead letter each, and all the others rows."""
    database = pipeline.database
    assert {ack["event_id"] for ack in device.acks if ack["status"] == "rejected"} == bad
    assert device.heard_at.keys() == device.sent.keys() - bad
    rows = {row[0] for row in database.query("SELECT event_id FROM events")}
    assert rows == device.sent.keys() - bad
    kept = database.query("SELECT event_id, reason FROM dead_letters")
    assert sorted(kept) == sorted((event_id, "not_storable") for event_id in bad)


def letter_counts(database: Database) -> set[int]:
    """How often each dead letter came."""
    return {row[0] for row in database.query("SELECT DISTINCT times FROM dead_letters")}


LONG = pytest.mark.timeout(260)


@faults
@pytest.mark.parametrize(
    ("seconds", "one_in", "timeout"),
    [
        (0.01, 3, 60),
        # A whole batch takes 25 s, longer than a statement may: it must be halved.
        pytest.param(0.05, 3, 200, marks=LONG),
        pytest.param(0.05, 450, 200, marks=LONG),
    ],
)
def test_refused_rows_that_take_long_to_find_are_each_a_dead_letter(
    running: Pipeline, seconds: float, one_in: int, timeout: float
) -> None:
    refuse_slowly(running.database, seconds, one_in)
    with running.device() as device:
        bad = send_full_batch(running, device, one_in)
        began_at = time.monotonic()
        wait_answered(running, device, timeout)
        print(f"{BATCH} events, one in {one_in} refused: {time.monotonic() - began_at:.1f} s")
        device.wait(lambda: len(device.dead_letters) == len(bad), "each dead letter")
        drop_trigger(running.database)
        assert device.ask(event("after"))["status"] == "stored"
    check_refused(running, device, bad)
    assert letter_counts(running.database) == {1}
    assert connects(running) == 1
    assert "WARNING MQTT" not in running.ingester.log()


@faults
def test_killed_while_it_looks_for_refused_rows_it_doubles_none_of_them(
    running: Pipeline,
) -> None:
    refuse_slowly(running.database, 0.01)
    sleeps = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event = 'PgSleep'"
    )
    with running.device() as device:
        bad = send_full_batch(running, device)
        for seconds in (0.3, 1.0, 3.0):
            wait_until(lambda: running.database.query(sleeps) != [(0,)], "the trigger to sleep")
            time.sleep(seconds)
            running.ingester.kill()
            running.ingester.start()
            running.ingester.wait_ready(30)
        wait_answered(running, device, 90)
    check_refused(running, device, bad)


# --- SIGTERM meanwhile -----------------------------------------------------------------

State = Callable[[Pipeline, Device], AbstractContextManager[None]]


@contextmanager
def all_dropped(pipeline: Pipeline, device: Device) -> Iterator[None]:
    """More of them than are answered at once."""
    add_trigger(pipeline.database, "RETURN NULL;")
    start(pipeline)
    send_full_batch(pipeline, device)
    yield
    drop_trigger(pipeline.database)


@contextmanager
def column_missing(pipeline: Pipeline, device: Device) -> Iterator[None]:
    pipeline.database.query("ALTER TABLE events ADD site TEXT NOT NULL")
    start(pipeline)
    device.publish(event(1))
    pipeline.ingester.wait_for_log("WARNING Postgres: ")
    yield
    pipeline.database.query("ALTER TABLE events DROP site")


@contextmanager
def looking_for_refused(pipeline: Pipeline, device: Device) -> Iterator[None]:
    refuse_slowly(pipeline.database, 0.05)
    start(pipeline)
    send_full_batch(pipeline, device)
    yield
    drop_trigger(pipeline.database)


@contextmanager
def read_only(pipeline: Pipeline, device: Device) -> Iterator[None]:
    set_for_database(pipeline.database, "default_transaction_read_only", "on")
    pipeline.ingester.start()
    pipeline.ingester.wait_for_log("WARNING Postgres: ")
    device.publish(event(1))
    yield
    name = pipeline.database.name
    pipeline.database.query(f"ALTER DATABASE {name} RESET default_transaction_read_only")


@contextmanager
def hosts_mute(pipeline: Pipeline, device: Device) -> Iterator[None]:
    """Amid its first attempts, and with more hosts to try than time."""
    environment = dict(pipeline.ingester.environment)
    with mute_servers(3) as ports:
        point_at(pipeline, ports, "POSTGRES_HOST")
        pipeline.ingester.start()
        pipeline.ingester.wait_for_log("MQTT connected rc=Success", 30)
        device.publish(event(1))
        yield
    pipeline.ingester.environment = environment


@contextmanager
def encoding_wrong(pipeline: Pipeline, device: Device) -> Iterator[None]:
    make_again(pipeline.database, "LATIN1")
    pipeline.ingester.start()
    pipeline.ingester.wait_for_log("WARNING Postgres: ")
    device.publish(event(1))
    yield
    make_again(pipeline.database, "UTF8")


STATES = [all_dropped, column_missing, looking_for_refused, read_only, hosts_mute, encoding_wrong]


@pytest.mark.parametrize("state", first_or_all(STATES), ids=lambda state: state.__name__)
def test_a_sigterm_meanwhile_ends_it_in_time_and_loses_nothing(
    pipeline: Pipeline, state: State
) -> None:
    # The session of the ingester must be there before anything is published.
    start(pipeline)
    assert pipeline.ingester.stop() == 0
    with pipeline.device() as device:
        with state(pipeline, device):
            stop(pipeline)
        pipeline.ingester.start()
        wait_answered(pipeline, device, 30)
    rows = {row[0] for row in pipeline.database.query("SELECT event_id FROM events")}
    assert rows >= device.heard_at.keys()
    refused = {ack["event_id"] for ack in device.acks if ack["status"] == "rejected"}
    assert rows | refused == device.sent.keys()
