"""`reader` logs in by READER_PASSWORD: reads everything, changes nothing, within its limits.

What it does: runs the schema step with and without a password on a server of its own, and
comes in as `reader`. What it does not: bring the password there from .env (test_options.py,
test_compose.py), or look at overlays/secure (test_secure.py).

Invariant: roles belong to the whole server, so no other test uses this one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import psycopg2
import pytest

from tests.support.each import first_or_all
from tests.support.pipeline import wait_until
from tools.stack import Stack

pytestmark = pytest.mark.services

ODD_PASSWORD = r""" a $b ${c} #d 'e' \f "g' é """
WRONG = "password authentication failed"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A database that logs each statement."""
    with Stack(with_ingester=False, postgres_settings={"log_statement": "all"}) as stack:
        yield stack


@pytest.fixture
def fresh(stack: Stack) -> Stack:
    """The same, with `reader` as a new database has it."""
    stack.postgres.apply_schema(reader_password="any")
    stack.postgres.apply_schema()
    return stack


def log_in(stack: Stack, password: str, **options: str) -> Any:
    conninfo: dict[str, Any] = {**stack.postgres.conninfo(), **options}
    connection = psycopg2.connect(**conninfo | {"user": "reader", "password": password})
    connection.autocommit = True
    return connection


def query(stack: Stack, sql: str, **options: str) -> list[tuple[Any, ...]]:
    """Run one statement as `reader`, whose password is "any"."""
    with closing(log_in(stack, "any", **options)) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
        rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows


def refused(stack: Stack, password: str) -> str:
    with pytest.raises(psycopg2.OperationalError) as error:
        log_in(stack, password)
    return str(error.value)


@pytest.mark.parametrize("password", first_or_all([ODD_PASSWORD, "any", "'", "\\", "a" * 200]))
def test_it_logs_in_by_the_password_that_was_given_last(fresh: Stack, password: str) -> None:
    fresh.postgres.apply_schema(reader_password="before")
    fresh.postgres.apply_schema(reader_password=password)
    log_in(fresh, password).close()
    for other in ("before", f"{password}x"):
        assert WRONG in refused(fresh, other)
    log = fresh.postgres.log()
    assert "PASSWORD 'SCRAM-SHA-256$" in log  # of the statement that sets it
    assert "$b ${c} #d" not in log
    assert "aaaa" not in log


def test_without_a_password_nobody_logs_in_and_who_was_in_is_out(fresh: Stack) -> None:
    assert WRONG in refused(fresh, "any")
    fresh.postgres.apply_schema(reader_password="any")
    with closing(log_in(fresh, "any")) as connection:
        fresh.postgres.apply_schema()

        def is_out() -> bool:
            try:
                connection.cursor().execute("SELECT 1")
            except psycopg2.OperationalError:
                return True
            return False

        wait_until(is_out, "the session to end")
    assert WRONG in refused(fresh, "any")
    role = "SELECT rolcanlogin, rolpassword FROM pg_authid WHERE rolname = 'reader'"
    assert fresh.postgres.psql(role) == "f|"


def test_a_login_that_the_owner_gave_by_hand_stays_until_a_password_replaces_it(
    fresh: Stack,
) -> None:
    fresh.postgres.psql("ALTER ROLE reader LOGIN PASSWORD 'mine' CONNECTION LIMIT 3")
    fresh.postgres.psql("ALTER ROLE reader SET work_mem = '1MB'")
    for _ in range(2):
        fresh.postgres.apply_schema()
        log_in(fresh, "mine").close()
    kept = "SELECT rolconnlimit, rolconfig FROM pg_roles WHERE rolname = 'reader'"
    assert fresh.postgres.psql(kept) == "3|{work_mem=1MB}"
    fresh.postgres.apply_schema(reader_password="any")
    assert WRONG in refused(fresh, "mine")
    fresh.postgres.apply_schema()
    assert WRONG in refused(fresh, "any")


@pytest.fixture
def let_in(fresh: Stack) -> Stack:
    fresh.postgres.apply_schema(reader_password="any")
    return fresh


def test_it_reads_all_that_a_dashboard_needs(let_in: Stack) -> None:
    names = let_in.postgres.psql(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        " AND relkind IN ('r', 'v', 'm', 'p')"
    ).split()
    assert {"events", "dead_letters", "devices", "missing_events"} < set(names)
    calls = (
        "hourly('d', now() - interval '1 day', now())",
        "missing_events('d', now() - interval '1 day', now())",
        "event_time(now(), now())",
        "has_sequence('d-1', 'd')",
    )
    for name in (*names, *calls):
        query(let_in, f"SELECT * FROM {name} LIMIT 1")


def test_it_changes_nothing_even_where_it_lifts_its_own_limits(let_in: Stack) -> None:
    lifted = {"options": "-c default_transaction_read_only=off"}
    for sql in (
        "INSERT INTO events (event_id, device_id, schema, event_type) VALUES ('x', 'x', 1, 'x')",
        "DELETE FROM events",
        "UPDATE dead_letters SET times = 1",
        "TRUNCATE events",
        "CREATE TABLE mine (x INT)",
        "ALTER ROLE reader CONNECTION LIMIT -1",
        "SET ROLE qs",
        "SELECT pg_read_file('/etc/passwd')",
    ):
        with pytest.raises(psycopg2.Error) as error:
            query(let_in, sql, **lifted)
        assert error.value.pgcode == "42501", sql
    with pytest.raises(psycopg2.Error) as error:
        query(let_in, "CREATE TEMPORARY TABLE mine (x INT)")
    assert error.value.pgcode == "25006"


def test_it_takes_its_share_and_no_more_and_what_it_sets_for_itself_is_undone(
    let_in: Stack,
) -> None:
    limits = {
        "temp_file_limit": "512MB",
        "statement_timeout": "30s",
        "idle_in_transaction_session_timeout": "1min",
        "work_mem": "8MB",
        "default_transaction_read_only": "on",
    }
    for text in ("", "ALTER ROLE reader SET", "ALTER ROLE reader IN DATABASE qs SET"):
        if text:
            with closing(log_in(let_in, "any")) as connection, connection.cursor() as cursor:
                cursor.execute("SET default_transaction_read_only = off")
                cursor.execute(f"{text} statement_timeout = 0")
            let_in.postgres.apply_schema(reader_password="any")
        assert {name: query(let_in, f"SHOW {name}")[0][0] for name in limits} == limits
    with ExitStack() as cleanup:
        for _ in range(10):
            cleanup.enter_context(closing(log_in(let_in, "any")))
        assert "too many connections for role" in refused(let_in, "any")


def test_what_the_owner_has_set_for_everybody_does_not_keep_it_out(let_in: Stack) -> None:
    defaults = ("default_transaction_read_only = on", "statement_timeout = '1ms'")
    let_in.postgres.psql(";".join(f"ALTER DATABASE qs SET {default}" for default in defaults))
    try:
        let_in.postgres.apply_schema(reader_password="other")
    finally:
        let_in.postgres.psql("ALTER DATABASE qs RESET ALL", "postgres")
    log_in(let_in, "other").close()
