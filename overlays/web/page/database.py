"""The connections to the database: few, read-only, each with deadlines.

What it does: runs one SELECT at a time for each caller. What it does not: write, know the tables,
or wait for a database that is away: whoever asks within two seconds of a failure is told at once.

Invariant: nothing waits here longer than the deadlines below.
"""

import logging
import queue
import select
import threading
import time
from collections.abc import Mapping
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2.extras import RealDictCursor

# `reader` may have 10 at once; Grafana and psql want some of them.
CONNECTIONS_MAX = 4
STATEMENT_SECONDS = 10
# A database that is frozen does not end the statement itself.
ANSWER_SECONDS = STATEMENT_SECONDS + 2
CONNECT_SECONDS = 4
# How long a caller waits for one of the connections.
FREE_SECONDS = 5
AWAY_SECONDS = 2
# PostgreSQL compiles queries that it takes for long ones, and ours are not.
SESSION = (
    f"-c statement_timeout={STATEMENT_SECONDS}s -c default_transaction_read_only=on"
    " -c jit=off -c TimeZone=UTC -c search_path=public"
)

Row = Mapping[str, Any]
log = logging.getLogger("web")


class Unavailable(Exception):
    """The database cannot answer; the text says why, for whoever looks at the page."""


class TooSlow(Unavailable):
    """It would take longer than STATEMENT_SECONDS: the database works, and worked in vain."""


class DeadlinePassed(Exception):
    """The database has said nothing for as long as we wait."""


# By thread, as psycopg2 calls back without saying for whom.
_deadline = threading.local()


def _wait(connection: psycopg2.extensions.connection) -> None:
    """Wait for the server in place of libpq, which would wait for ever.

    Raises DeadlinePassed.
    """
    while True:
        state = connection.poll()
        if state == psycopg2.extensions.POLL_OK:
            return
        reading = state == psycopg2.extensions.POLL_READ
        seconds = max(0.0, _deadline.at - time.monotonic())
        sockets = ([connection], []) if reading else ([], [connection])
        if not any(select.select(*sockets, [], seconds)):
            raise DeadlinePassed


class Database:
    """Up to CONNECTIONS_MAX connections, made when they are needed."""

    def __init__(self) -> None:
        psycopg2.extensions.set_wait_callback(_wait)
        self._free: queue.LifoQueue[psycopg2.extensions.connection | None] = queue.LifoQueue()
        for _ in range(CONNECTIONS_MAX):
            self._free.put(None)  # one that may be made
        self._away_until = 0.0
        self._why = ""

    def rows(self, sql: str, **parameters: object) -> list[Row]:
        """Return what a SELECT finds, as mappings from the names of its columns.

        Raises Unavailable.
        """
        if time.monotonic() < self._away_until:
            raise Unavailable(self._why)
        try:
            connection = self._free.get(timeout=FREE_SECONDS)
        except queue.Empty:
            raise Unavailable("Too many questions at once; the database is still busy.") from None
        try:
            # One that the server has ended meanwhile is only noticed in use.
            for is_new in (connection is None, True):
                if connection is None or connection.closed:
                    connection = self._connect()
                try:
                    return self._ask(connection, sql, parameters)
                except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
                    if is_new or not connection.closed:
                        raise _unavailable(error) from None
            raise AssertionError("the second turn returns or raises")
        finally:
            self._free.put(None if connection is None or connection.closed else connection)

    def _connect(self) -> psycopg2.extensions.connection:
        _deadline.at = time.monotonic() + CONNECT_SECONDS
        try:
            # Where, as whom and with which password: libpq's own variables.
            connection = psycopg2.connect(options=SESSION, application_name="web")
        except psycopg2.OperationalError as error:
            reason = " ".join(str(error).split())
            raise self._is_away(f"The database cannot be reached: {reason}") from None
        except DeadlinePassed:
            raise self._is_away("The database cannot be reached: it does not answer.") from None
        connection.autocommit = True
        if self._why:
            # Whoever asks from now on is not told of what is over, and without its reason.
            self._away_until = 0.0
            self._why = ""
            log.info("the database answers again")
        return connection

    def _ask(
        self, connection: psycopg2.extensions.connection, sql: str, parameters: Row
    ) -> list[Row]:
        _deadline.at = time.monotonic() + ANSWER_SECONDS
        try:
            with connection.cursor(cursor_factory=RealDictCursor) as cursor:
                cursor.execute(sql, parameters)
                return list(cursor.fetchall())
        except psycopg2.extensions.QueryCanceledError:
            raise TooSlow(
                f"This takes the database longer than {STATEMENT_SECONDS} s: it is busy, or there "
                "is more to read than it can in that time."
            ) from None
        except (psycopg2.errors.InsufficientPrivilege, psycopg2.errors.UndefinedTable) as error:
            raise _unavailable(error) from None
        except DeadlinePassed:
            connection.close()
            raise self._is_away("The database does not answer.") from None

    def _is_away(self, why: str) -> Unavailable:
        if why != self._why:  # not once for each who asks
            log.warning("%s", why)
        self._why = why
        self._away_until = time.monotonic() + AWAY_SECONDS
        return Unavailable(why)


def _unavailable(error: psycopg2.Error) -> Unavailable:
    return Unavailable(f"The database says: {' '.join(str(error).split())}")
