"""Upgrades: a database of an earlier release becomes the newest, with its rows in place.

What it does: applies the schema step to databases that tests/data/schema_*.sql made, one of
each release whose schema was another, and compares. What it does not: the command that a
person types; that is test_backup.py.
"""

import itertools
import threading
from collections.abc import Iterator

import pytest

from tests.support.device import event
from tests.support.each import first_or_all
from tests.support.pipeline import Database, Pipeline, wait_until
from tools.process import CHECKOUT, StackError, clean_environment, run
from tools.stack import Stack

FIRST_RELEASE = CHECKOUT / "tests/data/schema_0.1.0.sql"
# What the columns of 0.1.0 can hold: each type, NULL wherever it is allowed, odd times.
ROWS = r"""
INSERT INTO events VALUES
    ('a-1', 'a', 1, 'temperature', 21.5, NULL, 'C', '2026-02-10T00:00:00Z', now(), '{"n": 1e23}'),
    ('a-2', 'a', 1, 'state', NULL, E'open\n"\\\u00e9', NULL, NULL, '1970-01-01Z', '{}'),
    ('b-1', 'b', 1, 'none', 'NaN', NULL, '', 'infinity', NULL, NULL);
INSERT INTO dead_letters (received_at, reason, error, topic, device_id, event_id, payload) VALUES
    (now(), 'not_utf8', 'e', 'qs/v1/a/events', 'a', NULL, '\x00ff'),
    ('1999-12-31', 'missing_field', 'e', 'elsewhere', NULL, 'b-1', '{}');
"""
# Three of one, received in another order than their ids say, and what differs from them by one
# thing each: that is six rows, and four groups.
EQUALS = r"""
INSERT INTO dead_letters (received_at, reason, error, topic, device_id, event_id, payload) VALUES
    ('2026-02-02Z', 'not_json', 'second', 't/\u00e9', 'a', NULL, '\x7b00ff'),
    ('2026-02-03Z', 'not_json', 'third', 't/\u00e9', 'a', NULL, '\x7b00ff'),
    ('2026-02-01Z', 'not_json', 'first', 't/\u00e9', 'a', NULL, '\x7b00ff'),
    ('2026-02-04Z', 'not_utf8', 'reason', 't/\u00e9', 'a', NULL, '\x7b00ff'),
    ('2026-02-04Z', 'not_json', 'topic', 't/e', 'e', NULL, '\x7b00ff'),
    ('2026-02-04Z', 'not_json', 'payload', 't/\u00e9', 'a', NULL, '\x7b00');
"""
# As 0.3.0 and all before it write them.
OLD_EVENT = (
    "INSERT INTO events (event_id, device_id, schema, event_type) VALUES (%s, 'old', 1, 'x')"
    " ON CONFLICT (event_id) DO NOTHING RETURNING event_id"
)
OLD_LETTER = (
    "INSERT INTO dead_letters (received_at, reason, error, topic, device_id, event_id, payload)"
    " VALUES (now(), 'not_json', 'e', 'qs/v1/old/events', 'old', NULL, %s) RETURNING id"
)
COLUMNS = {
    "events": "event_id, device_id, schema, event_type, value_num, value_text, unit, ts_device,"
    " ts_server, meta",
    "dead_letters": "id, received_at, reason, error, topic, device_id, event_id, payload",
}


@pytest.fixture(
    # The newest first.
    params=first_or_all(sorted((CHECKOUT / "tests/data").glob("schema_*.sql"), reverse=True)),
    ids=lambda it: it.stem,
)
def earlier_release(servers: Stack, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database as an earlier version made it, with rows in it."""
    name = "earlier_release"
    servers.postgres.create_database(name)
    servers.postgres.psql(request.param.read_text(), name)
    servers.postgres.psql(ROWS, name)
    yield Database(servers.postgres, name)
    servers.postgres.drop_database(name)


def schema(database: Database) -> str:
    """All that is defined in it, rights and comments included, as pg_dump writes it."""
    libpq = {
        "PGHOST": str(database.conninfo["host"]),
        "PGPORT": str(database.conninfo["port"]),
        "PGUSER": str(database.conninfo["user"]),
        "PGPASSWORD": str(database.conninfo["password"]),
    }
    dump = run(["pg_dump", "--schema-only", database.name], clean_environment() | libpq)
    # \restrict and \unrestrict carry a key that is another each time.
    return "\n".join(line for line in dump.splitlines() if "restrict " not in line)


def rows(database: Database) -> dict[str, list[tuple[object, ...]]]:
    """Every row, whole, as text."""
    return {
        table: database.query(f"SELECT ({columns})::text FROM {table} ORDER BY 1")
        for table, columns in COLUMNS.items()
    }


def made(database: Database) -> list[tuple[object, ...]]:
    """Every object of ours, with what changes when it is made anew or written anew."""
    return database.query(
        "SELECT relname, oid, relfilenode FROM pg_class"
        " WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    )


def test_the_fixture_is_not_the_newest_schema(
    earlier_release: Database, database: Database
) -> None:
    assert schema(earlier_release) != schema(database)
    assert {table: len(found) for table, found in rows(earlier_release).items()} == {
        "events": 3,
        "dead_letters": 2,
    }


def test_an_upgraded_database_has_its_rows_and_the_schema_of_a_new_one(
    servers: Stack, earlier_release: Database, database: Database
) -> None:
    before = rows(earlier_release)
    tables = {"events", "dead_letters", "events_pkey", "dead_letters_pkey", "dead_letters_id_seq"}
    files = [row for row in made(earlier_release) if row[0] in tables]
    servers.postgres.apply_schema(earlier_release.name)
    assert schema(earlier_release) == schema(database)
    assert rows(earlier_release) == before
    # No table was written anew, which with 10 million rows would take minutes.
    assert [row for row in made(earlier_release) if row[0] in tables] == files


def test_a_second_upgrade_changes_nothing(servers: Stack, earlier_release: Database) -> None:
    servers.postgres.apply_schema(earlier_release.name)
    before = schema(earlier_release), made(earlier_release), rows(earlier_release)
    servers.postgres.apply_schema(earlier_release.name)
    assert (schema(earlier_release), made(earlier_release), rows(earlier_release)) == before


def test_what_stands_on_a_view_that_a_release_changes_stays(
    servers: Stack, earlier_release: Database
) -> None:
    if not earlier_release.query("SELECT to_regclass('silent_devices')")[0][0]:
        servers.postgres.apply_schema(earlier_release.name)
    servers.postgres.psql("CREATE VIEW mine AS SELECT * FROM silent_devices", earlier_release.name)
    servers.postgres.apply_schema(earlier_release.name)
    assert "LIMIT 10" in str(earlier_release.query("SELECT pg_get_viewdef('silent_devices')"))
    assert earlier_release.query("SELECT * FROM mine") == []


def test_the_ingester_knows_the_events_of_the_earlier_release(
    servers: Stack, earlier_release: Database, pipeline: Pipeline
) -> None:
    servers.postgres.apply_schema(earlier_release.name)
    pipeline.ingester.environment["POSTGRES_DB"] = earlier_release.name
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    known = event(1, "a", unit="C", ts_device="2026-02-10T00:00:00Z", meta={"n": 1e23})
    letters = earlier_release.query("SELECT id, times FROM dead_letters ORDER BY id")
    assert letters == [(1, 1), (2, 1)]
    with pipeline.device("a") as device:
        assert device.ask(known)["status"] == "stored"
        assert device.ask(known | {"value": 22})["reason"] == "event_id_conflict"
        assert device.ask(event(3, "a"))["status"] == "stored"
        device.wait(lambda: bool(device.dead_letters), "the dead letter")
        # The ids go on behind those of the earlier release.
        assert device.dead_letters[0]["id"] == 3
        # What comes again is known as well.
        device.publish(b"\x00\xff")
        device.wait(lambda: len(device.dead_letters) == 2, "the dead letter of before")
        assert device.dead_letters[1]["id"] == 1
    letters = earlier_release.query("SELECT id, times FROM dead_letters ORDER BY id")
    assert letters == [(1, 2), (2, 1), (3, 1)]
    assert earlier_release.count() == 4
    pipeline.ingester.stop()


# --- dead letters that are equal -----------------------------------------------------


def groups(database: Database) -> list[tuple[object, ...]]:
    return database.query(
        "SELECT id, times, (received_at AT TIME ZONE 'UTC')::date::text,"
        " (last_received_at AT TIME ZONE 'UTC')::date::text,"
        " error, digest IS NOT NULL FROM dead_letters WHERE topic LIKE 't/%' ORDER BY id"
    )


def test_equal_dead_letters_of_before_become_one_row_and_none_is_lost(
    servers: Stack, earlier_release: Database
) -> None:
    servers.postgres.psql(EQUALS, earlier_release.name)
    marks = earlier_release.query(
        "SELECT FROM pg_attribute WHERE attrelid = 'dead_letters'::regclass"
        " AND attname = 'replay_outcome'"
    )
    if marks:
        # The one that came last has not been replayed: somebody is to look at it.
        earlier_release.query(
            "UPDATE dead_letters SET replayed_at = now(), replay_outcome = error"
            " WHERE error IN ('first', 'second', 'topic')"
        )
    servers.postgres.apply_schema(earlier_release.name)
    assert groups(earlier_release) == [
        (3, 3, "2026-02-01", "2026-02-03", "third", True),
        (6, 1, "2026-02-04", "2026-02-04", "reason", True),
        (7, 1, "2026-02-04", "2026-02-04", "topic", True),
        (8, 1, "2026-02-04", "2026-02-04", "payload", True),
    ]
    found = "SELECT id, replay_outcome FROM dead_letters WHERE replay_outcome IS NOT NULL"
    assert earlier_release.query(found) == ([(7, "topic")] if marks else [])
    payload = earlier_release.query("SELECT payload FROM dead_letters WHERE id = 3")[0][0]
    assert bytes(payload) == b"\x7b\x00\xff"


def test_what_an_earlier_release_writes_after_the_upgrade_is_merged_by_the_next_one(
    servers: Stack, earlier_release: Database
) -> None:
    servers.postgres.apply_schema(earlier_release.name)
    for _ in range(2):
        servers.postgres.psql(EQUALS, earlier_release.name)
        servers.postgres.apply_schema(earlier_release.name)
    # The ids are those of the rows that were there first, and have a digest.
    assert [row[:5] for row in groups(earlier_release)] == [
        (3, 6, "2026-02-01", "2026-02-03", "third"),
        (6, 2, "2026-02-04", "2026-02-04", "reason"),
        (7, 2, "2026-02-04", "2026-02-04", "topic"),
        (8, 2, "2026-02-04", "2026-02-04", "payload"),
    ]


def test_a_dead_letter_that_is_kept_while_the_schema_merges_is_counted(
    servers: Stack, database: Database
) -> None:
    database.query(OLD_LETTER, b"{")
    servers.postgres.apply_schema(database.name)
    digest = database.query("SELECT digest FROM dead_letters")[0][0]
    database.query("UPDATE dead_letters SET digest = NULL")
    writer = database.connect()
    with writer.cursor() as cursor:
        cursor.execute(OLD_LETTER, (b"{",))
        cursor.execute("UPDATE dead_letters SET digest = %s WHERE id = 2", (digest,))
        step = threading.Thread(target=servers.postgres.apply_schema, args=(database.name,))
        step.start()
        database.wait_blocked()
    writer.commit()
    writer.close()
    step.join(30)
    assert database.query("SELECT id, times FROM dead_letters") == [(2, 2)]


class OldWriter(threading.Thread):
    """An ingester of an earlier release at work: events and dead letters, five of them equal."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._connection = database.connect()
        self._connection.autocommit = True
        self.written = 0
        self.stop = threading.Event()
        self.is_at_work = threading.Event()

    def run(self) -> None:
        with self._connection.cursor() as cursor:
            # As the ingester has it; an error ends this thread, and `written` does not go on.
            cursor.execute("SET statement_timeout = '10s'")
            for number in itertools.count():
                cursor.execute(OLD_EVENT, (f"old-{number}",))
                cursor.execute(OLD_LETTER, (b"%d" % (number % 5),))
                self.written += 1
                self.is_at_work.set()
                if self.stop.is_set():
                    break
        self._connection.close()


def test_upgrades_at_once_and_an_earlier_release_at_work_neither_fail_nor_lose(
    servers: Stack, earlier_release: Database, database: Database
) -> None:
    writer = OldWriter(earlier_release)
    writer.start()
    assert writer.is_at_work.wait(10)
    name = earlier_release.name
    failed: list[Exception] = []

    def upgrade() -> None:
        try:
            servers.postgres.apply_schema(name)
        except StackError as error:
            failed.append(error)

    upgrades = [threading.Thread(target=upgrade) for _ in range(3)]
    for each in upgrades:
        each.start()
    for each in upgrades:
        each.join(60)
    before = writer.written
    wait_until(lambda: writer.written > before, "the writer to go on")
    writer.stop.set()
    writer.join(20)
    assert not failed
    assert earlier_release.count("events WHERE device_id = 'old'") == writer.written
    servers.postgres.apply_schema(name)
    assert schema(earlier_release) == schema(database)
    merged = "SELECT count(*), sum(times) FROM dead_letters WHERE topic = 'qs/v1/old/events'"
    assert earlier_release.query(merged) == [(min(5, writer.written), writer.written)]
    assert earlier_release.count("dead_letters WHERE digest IS NULL") == 0


def test_what_the_owner_has_set_for_the_database_does_not_stop_an_upgrade(
    servers: Stack, earlier_release: Database
) -> None:
    servers.postgres.psql(EQUALS, earlier_release.name)
    for setting in (
        "statement_timeout = 1",
        "default_transaction_read_only = on",
        "default_transaction_isolation = 'serializable'",
        "standard_conforming_strings = off",
        "bytea_output = 'escape'",
    ):
        servers.postgres.psql(f"ALTER DATABASE {earlier_release.name} SET {setting}", "postgres")
    servers.postgres.apply_schema(earlier_release.name)
    servers.postgres.psql(f"ALTER DATABASE {earlier_release.name} RESET ALL", "postgres")
    assert groups(earlier_release)[0] == (3, 3, "2026-02-01", "2026-02-03", "third", True)
