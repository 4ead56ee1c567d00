"""Upgrades: a database of an earlier release becomes the newest, with its rows in place.

What it does: applies the schema step to databases that tests/data/schema_*.sql made, one of
each release whose schema was another, and compares. What it does not: the command that a
person types; that is test_backup.py.
"""

from collections.abc import Iterator

import pytest

from tests.device import event
from tests.pipeline import Database, Pipeline
from tools.process import CHECKOUT, clean_environment, run
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
COLUMNS = {
    "events": "event_id, device_id, schema, event_type, value_num, value_text, unit, ts_device,"
    " ts_server, meta",
    "dead_letters": "id, received_at, reason, error, topic, device_id, event_id, payload",
}


@pytest.fixture(
    params=sorted((CHECKOUT / "tests/data").glob("schema_*.sql")), ids=lambda it: it.stem
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
    with pipeline.device("a") as device:
        assert device.ask(known)["status"] == "stored"
        assert device.ask(known | {"value": 22})["reason"] == "event_id_conflict"
        assert device.ask(event(3, "a"))["status"] == "stored"
        device.wait(lambda: bool(device.dead_letters), "the dead letter")
        # The ids go on behind those of the earlier release.
        assert device.dead_letters[0]["id"] == 3
    assert earlier_release.count() == 4
    pipeline.ingester.stop()
