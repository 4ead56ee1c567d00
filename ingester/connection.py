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
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

import psycopg2
from psycopg2 import extensions

log = logging.getLogger(__name__)

# A frozen server answers nothing, and neither keepalives nor tcp_user_timeout notice it.
ANSWER_SECONDS_MAX = 10.0
# The server gives a statement up before we give the server up, so that it can say so.
STATEMENT_SECONDS_MAX = 9.0
# For the only address there is, and for each of several: one that is silent must not keep us
# from the next for long.
CONNECT_SECONDS_MAX = 5.0
CONNECT_SECONDS_EACH = 2.0
# The other session is served at least this often.
SERVE_SECONDS = 1.0
# A signal moves the deadline of a wait that is under way; it is looked at this often.
LOOK_SECONDS = 0.25

# What the database or the role may have set otherwise, and correctness depends on: how values
# are read and written, how durable a commit is, and that no timeout but ours ends a statement.
# Pinned once connected, since a connection option would override the user's PGOPTIONS. Not
# standard_conforming_strings: psycopg2 quotes by what it was when it connected.
PINS = {
    "TimeZone": "UTC",  # keeps the year 1 the year 1
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",  # the shortest text that gives the same double
    "synchronous_commit": "on",  # or what is stricter; the promise rests on it
    "default_transaction_isolation": "read committed",  # a row committed meanwhile is seen
    "search_path": "public",  # behind the owner's own
    "statement_timeout": f"{STATEMENT_SECONDS_MAX * 1000:.0f}",
    "lock_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "exit_on_error": "off",  # a refused event must not cost the connection
}


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


class Fault(Enum):
    """Whose fault a database error is, and so what is to be done."""

    CONNECTION = "reconnect, then try again"
    PASSING = "try again later"
    EVENT = "this event will never be stored"
    OPERATOR = "reconnect, and try again until somebody has repaired the database"


# SQLSTATE, or its first two or three characters, to fault: PostgreSQL's documentation,
# appendix A. Never the exception's class: OperationalError alone means four things.
FAULTS = {
    "08": Fault.CONNECTION,  # connection exception
    "57P": Fault.CONNECTION,  # shutdown, crash, starting up, database dropped
    # Read-only transaction: a session that began so stays so when the database no longer is.
    "25006": Fault.CONNECTION,
    "40": Fault.PASSING,  # serialization failure, deadlock
    "53": Fault.PASSING,  # disk full, out of memory, too many connections
    "55P03": Fault.PASSING,  # lock not available
    "57014": Fault.PASSING,  # query canceled: statement_timeout
    "58": Fault.PASSING,  # system error: I/O
    "22": Fault.EVENT,  # data exception
    "23": Fault.EVENT,  # integrity constraint violation
    "44": Fault.EVENT,  # a view's WITH CHECK OPTION
    "54": Fault.EVENT,  # program limit exceeded: too big, too deep
    "P0001": Fault.EVENT,  # RAISE EXCEPTION in a trigger of the owner's
}
# Where it wanted to connect to, which we say by ourselves for each address.
_LIBPQ_PREFIX = re.compile("(connection to server .* failed: )?(FATAL: +)?")
# The statement was prepared in another server session: something in between deals them out.
_LOST_STATEMENT = ("26000", "42P05")


def fault_of(sqlstate: str | None) -> Fault:
    """Return whose fault an error with this SQLSTATE is; None means no answer came."""
    if sqlstate is None:
        return Fault.CONNECTION
    for length in (5, 3, 2):
        if fault := FAULTS.get(sqlstate[:length]):
            return fault
    return Fault.OPERATOR


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
        addresses = list(_addresses(self._parameters, problems))
        seconds_max = CONNECT_SECONDS_MAX if len(addresses) == 1 else CONNECT_SECONDS_EACH
        for address in addresses:
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
        settings = self.run(
            "SELECT name, setting, reset_val FROM pg_settings WHERE name = ANY(%s)", (list(PINS),)
        )
        pins = {name: _pin(name, setting, reset) for name, setting, reset in settings}
        # A pooler answers for many sessions, and gives the client a number of its own.
        if self._is_pooled or pid != self._connection.info.backend_pid:
            self._local_pins = "".join(
                f"SET LOCAL {name} TO {value}; " for name, value in _quoted(pins).items()
            )
            return
        names, values = list(pins), list(pins.values())
        self.run(
            "SELECT set_config(name, value, false)"
            " FROM unnest(%s::text[], %s::text[]) AS pins (name, value)",
            (names, values),
        )
        for name, statement in self._prepared.items():
            self.run(f"PREPARE {name} AS {statement}")


def _pin(name: str, setting: str, reset: str) -> str:
    """Return what to set, knowing what is set, and what would be without this session."""
    if name == "synchronous_commit" and "remote_apply" in (setting, reset):
        return "remote_apply"
    if name == "search_path":
        schemas = reset.split(", ") if reset else []
        return reset if PINS[name] in schemas else ", ".join([*schemas, PINS[name]])
    return PINS[name]


def _quoted(pins: Mapping[str, str]) -> dict[str, str]:
    # search_path is a list of identifiers, quoted already where they need to be.
    return {name: value if name == "search_path" else f"'{value}'" for name, value in pins.items()}


def _addresses(parameters: Mapping[str, Any], problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what to tell libpq of each address in turn, so that none costs the others.

    libpq goes through its own list only with connect_timeout, which it ignores here, and it
    says of several failures that it has not connected, but not always why.
    """
    if not ("host" in parameters or "hostaddr" in parameters):
        yield {}  # a service file says it
        return
    # Settings has seen to it that these lists are of one length.
    hosts = str(parameters.get("host") or parameters["hostaddr"]).split(",")
    given = str(parameters["hostaddr"]).split(",") if parameters.get("hostaddr") else []
    ports = str(parameters.get("port", 5432)).split(",")
    for number, host in enumerate(hosts):
        port = ports[number if len(ports) > 1 else 0] or "5432"
        if given and given[number]:
            yield {"host": host, "hostaddr": given[number], "port": port}
        elif not host or host[0] in "/@":  # a Unix socket
            yield {"host": host, "hostaddr": "", "port": port}
        else:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                problems.append(f"{host}: {getattr(error, 'strerror', None) or error}")
                continue
            for ip in dict.fromkeys(str(item[4][0]) for item in found):
                yield {"host": host, "hostaddr": ip, "port": port}


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
    return f"{_where(address)}{_LIBPQ_PREFIX.sub('', text, count=1)}" if address else text


def _where(address: Mapping[str, Any]) -> str:
    host, ip, port = address["host"], address["hostaddr"], address["port"]
    if not ip:
        return f"{host}: "  # a Unix socket
    place = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
    return f"{place}: " if host == ip else f"{host} ({place}): "
