"""The one PostgreSQL connection, and everything that knows psycopg2.

What it does: connects to the first server that takes writes, makes the session one whose
settings can be relied on, runs one statement at a time with a deadline, and decides by
SQLSTATE whose fault an error is. What it does not: know a table, retry, or wait between tries.

Invariant: no wait lasts beyond its deadline, and while it lasts the other session (the
broker's) is served. Every error is a StoreUnavailable; a connection of which it is not known
what it has done is closed.
"""

import logging
import re
import select
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import psycopg2
from psycopg2 import extensions

from ingester.addresses import addresses, where
from ingester.pins import FIND_SETTINGS, PINS, SET_CONFIG, pin, set_local
from ingester.sqlstate import Fault, fault_of

log = logging.getLogger(__name__)

# A frozen server answers nothing, and neither keepalives nor tcp_user_timeout notice it.
ANSWER_SECONDS_MAX = 10.0
# For the only address there is, and for each of several: one that is silent must not keep us
# from the next for long.
CONNECT_SECONDS_MAX = 5.0
CONNECT_SECONDS_EACH = 2.0
# The other session is served at least this often.
SERVE_SECONDS = 1.0
# A signal moves the deadline of a wait that is under way; it is looked at this often.
LOOK_SECONDS = 0.25


class Session(Protocol):
    """What is served while the database is at work."""

    @property
    def sockets(self) -> Sequence[Any]:
        """What to look at for more to read."""

    def serve(self) -> None:
        """Read and write what can be, without waiting."""


class StoreUnavailable(Exception):
    """Nothing can be stored now. No event is at fault; try the same again later."""


class StatementRefused(StoreUnavailable):
    """The database refuses a value: at least one row of the statement is at fault.

    `column` is the one that the database names, if it names one. Where no event can be at
    fault it is what it inherits from: try again, loudly.
    """

    def __init__(self, error: str, column: str | None) -> None:
        super().__init__(error)
        self.column = column


class StatementTimeout(StoreUnavailable):
    """The server has given the statement up: it took too long, or was canceled."""


# Where it wanted to connect to, which we say by ourselves for each address.
_LIBPQ_PREFIX = re.compile("(connection to server .* failed: )?(FATAL: +)?")
# The statement was prepared in another server session: something in between deals them out.
_LOST_STATEMENT = ("26000", "42P05")


class Connection:
    """The one connection. Methods raise StoreUnavailable; connect() must come first."""

    def __init__(
        self, parameters: Mapping[str, Any], session: Session | None, prepared: Mapping[str, str]
    ) -> None:
        """`parameters` is what libpq is told; its own variables say the rest.

        `session` is served while we wait. `prepared` are statements to prepare, by name.
        """
        self._parameters = parameters
        self._session = session
        self._prepared = prepared
        self._connection: Any = None
        self._cursor: Any = None
        # Whether the log has that we are connected; not each time while a person is waited for.
        self._is_logged = False
        self._state = extensions.POLL_OK
        self._failure: StoreUnavailable | None = None  # for rows() to raise
        self._deadline = self._sent_at = self._served_at = 0.0
        # Set by give_up_at(): no wait lasts beyond it.
        self._give_up_at = float("inf")
        # Whether a pooler may give each transaction another server session: then nothing is
        # prepared, and the pins are set for each transaction anew.
        self._is_pooled = False
        self._local_pins = ""
        self.round_trip_seconds = 0.0  # of the latest statement that was answered

    @property
    def connected(self) -> bool:
        """Whether there is a connection; only the next statement shows whether it lives."""
        return self._connection is not None

    @property
    def has_prepared(self) -> bool:
        """Whether the prepared statements can be executed."""
        return self.connected and not self._local_pins

    @property
    def in_transaction(self) -> bool:
        """Whether begin() was called, and neither commit() nor close() since."""
        return self.connected and bool(
            self._connection.info.transaction_status
            in (extensions.TRANSACTION_STATUS_INTRANS, extensions.TRANSACTION_STATUS_INERROR)
        )

    def connect(self) -> None:
        """Connect if there is no connection: to the first address that takes writes."""
        if self.connected:
            return
        problems: list[str] = []
        servers = list(addresses(self._parameters, problems))
        seconds_max = CONNECT_SECONDS_MAX if len(servers) == 1 else CONNECT_SECONDS_EACH
        for address in servers:
            try:
                self._open(address, seconds_max)
                self._set_up()
            except (StoreUnavailable, psycopg2.Error) as error:
                self.close()
                problems.append(_summary(error, address))
            else:
                if not self._is_logged:
                    log.info("Connected to Postgres")
                    self._is_logged = True
                return
        raise StoreUnavailable("; ".join(problems))

    def close(self) -> None:
        """Close the connection if there is one; what was not committed is undone."""
        if self._connection is not None:
            self._connection.close()
            self._connection = self._cursor = None
            self._state = extensions.POLL_OK

    def roll_back(self) -> None:
        """End the transaction that is open, if one is, as if it had not begun."""
        if self.in_transaction:
            self.close()

    def ping(self) -> None:
        """Ask for an answer, whatever it is."""
        self.run("SELECT")

    def give_up_at(self, moment: float) -> None:
        """Let no wait last beyond this moment of the monotonic clock, even one under way."""
        self._give_up_at = moment

    def run(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement, by itself or in the open transaction; return its rows."""
        self.send(sql, values)
        return self.rows()

    def begin(self) -> None:
        """Begin a transaction, in which each statement checks its own constraints."""
        self._execute(
            "BEGIN ISOLATION LEVEL READ COMMITTED;"
            f" {self._local_pins}SET CONSTRAINTS ALL IMMEDIATE",
            (),
        )
        self.rows()

    def commit(self) -> None:
        """Commit the transaction."""
        self._execute("COMMIT", ())
        self.rows()

    def send(self, sql: str, values: Sequence[Any] = ()) -> None:
        """Send one statement; rows() waits for the answer."""
        self._execute(sql if self.in_transaction else self._local_pins + sql, values)

    def is_answered(self, seconds_max: float) -> bool:
        """Wait so long, or until something can be read; tell whether rows() need not wait."""
        self._step(seconds_max)
        return bool(self._state == extensions.POLL_OK)

    def rows(self) -> list[tuple[Any, ...]]:
        """Wait for the answer to send(); return its rows, of which there may be none."""
        self._wait()
        self.round_trip_seconds = time.monotonic() - self._sent_at
        rows: list[tuple[Any, ...]] = self._cursor.fetchall() if self._cursor.description else []
        return rows

    def _execute(self, sql: str, values: Sequence[Any]) -> None:
        if not self.connected:
            raise StoreUnavailable("not connected")
        # Here too: of many short statements in a row, none waits for as long as that.
        self._serve_if_due()
        self._sent_at = time.monotonic()
        self._deadline = self._sent_at + ANSWER_SECONDS_MAX
        try:
            self._cursor = self._connection.cursor()
            self._cursor.execute(sql, values or None)
        except psycopg2.Error as error:
            raise self._failed(error) from None
        self._poll()

    def _wait(self) -> None:
        """Wait until nothing is under way any more."""
        while not self.is_answered(LOOK_SECONDS):
            pass
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _poll(self) -> None:
        """Go on with what is under way; an error, which may come at once, is for rows()."""
        try:
            self._state = self._connection.poll()
        except psycopg2.Error as error:
            self._failure = self._failed(error)
            self._state = extensions.POLL_OK

    def _step(self, seconds_max: float) -> None:
        """Wait for the server or the other session, once, and do what can be done then."""
        if self._state == extensions.POLL_OK:
            return
        # Nothing of the other session is read before there is something to read: on two cores,
        # what is done first keeps the server from beginning (0.05 ms of 1.4 to an ACK).
        others = self._session.sockets if self._session else []
        reading = [self._connection] if self._state == extensions.POLL_READ else []
        writing = [self._connection] if self._state == extensions.POLL_WRITE else []
        left_seconds = min(self._deadline, self._give_up_at) - time.monotonic()
        if left_seconds <= 0:
            self._is_logged = False
            self.close()
            self._failure = StoreUnavailable("no answer in time")
            return
        readable, writable, _ = select.select(
            [*reading, *others], writing, [], min(seconds_max, left_seconds)
        )
        if self._connection in readable or writable:
            self._poll()
        elif readable:
            self._serve()
        else:
            self._serve_if_due()

    def _serve_if_due(self) -> None:
        if time.monotonic() - self._served_at >= SERVE_SECONDS:
            self._serve()

    def _serve(self) -> None:
        if self._session:
            self._served_at = time.monotonic()
            self._session.serve()

    def _failed(self, error: psycopg2.Error) -> StoreUnavailable:
        """Return what to raise for the error; close what is of no use any more."""
        fault, text = fault_of(error.pgcode), _summary(error)
        if error.pgcode in _LOST_STATEMENT:
            self._is_pooled = True
        if fault is Fault.OPERATOR:
            # A missing right or setting may have been given to new sessions only.
            self.close()
        elif fault is Fault.CONNECTION or self._connection.closed:
            self._is_logged = False
            self.close()
        elif fault is Fault.EVENT:
            return StatementRefused(text, error.diag.column_name)
        elif error.pgcode == "57014":
            return StatementTimeout(text)
        return StoreUnavailable(text)

    # --- connecting --------------------------------------------------------------------

    def _open(self, address: Mapping[str, Any], seconds_max: float) -> None:
        self._serve()  # what is to be written there does not wait for this
        self._sent_at = time.monotonic()
        self._deadline = self._sent_at + seconds_max
        # Asynchronous, as psycopg2 calls it: it returns at once, and _step() does the rest.
        self._connection = psycopg2.connect(
            **{**self._parameters, **address},
            async_=True,
            client_encoding="UTF8",
            fallback_application_name="homelab-ingester",
            target_session_attrs="read-write",
            # Each alone misses one direction of a cut line.
            keepalives_idle=10,
            keepalives_interval=5,
            keepalives_count=3,
            tcp_user_timeout=15_000,
        )
        self._poll()
        self._wait()

    def _set_up(self) -> None:
        """Check the database, pin the settings, and prepare the statements."""
        self._local_pins = ""
        [[pid, encoding, database]] = self.run(
            "SELECT pg_backend_pid(), current_setting('server_encoding'), current_database()"
        )
        if encoding != "UTF8":
            raise StoreUnavailable(
                f"the database {database} has the encoding {encoding}, which cannot hold every"
                " event: make it anew with ENCODING 'UTF8' TEMPLATE template0"
            )
        settings = self.run(FIND_SETTINGS, (list(PINS),))
        pins = {name: pin(name, setting, reset) for name, setting, reset in settings}
        # A pooler answers for many sessions, and gives the client a number of its own.
        if self._is_pooled or pid != self._connection.info.backend_pid:
            self._local_pins = set_local(pins)
            return
        self.run(SET_CONFIG, (list(pins), list(pins.values())))
        for name, statement in self._prepared.items():
            self.run(f"PREPARE {name} AS {statement}")


def _summary(error: Exception, address: Mapping[str, Any] | None = None) -> str:
    """Return the error in one line of bounded length, with its SQLSTATE if it has one."""
    diag, sqlstate = getattr(error, "diag", None), getattr(error, "pgcode", None)
    text = (diag and diag.message_primary) or str(error).strip() or type(error).__name__
    # The first line: in those behind it, libpq guesses.
    text = text.splitlines()[0][:300]
    if text.endswith("certificate verify failed"):  # libpq does not say why
        text += ": it has expired, or is not signed by the CA in PGSSLROOTCERT"
    if sqlstate:
        text += f" (SQLSTATE {sqlstate})"
    return f"{where(address)}{_LIBPQ_PREFIX.sub('', text, count=1)}" if address else text
