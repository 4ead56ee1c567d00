"""The one PostgreSQL connection, and everything that knows SQL.

What it does: stores events exactly once and says of each what became of it; keeps dead
letters; decides by SQLSTATE whose fault an error is. What it does not: retry, wait between
tries or know of MQTT.

Invariant: what insert() calls STORED or DUPLICATE, and what keep() gives an id to, is
committed. Every method may be called again after StoreUnavailable and does no harm.

Each statement commits by itself, which costs half of an explicit transaction (0.23 against
0.45 ms for a batch of one). Between the events of a batch and its dead letters that is
safe: neither is PUBACKed before both are committed, and the broker sends both again.
"""

import hashlib
import json
import logging
import select
import time
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from enum import Enum
from itertools import chain
from operator import attrgetter
from typing import Any

import psycopg2
from psycopg2 import extensions

from ingester.event import Event
from ingester.rejection import DeadLetter, Reason, Rejection

log = logging.getLogger(__name__)

# A frozen server answers nothing, and neither keepalives nor tcp_user_timeout notice it.
ANSWER_SECONDS_MAX = 10.0
CONNECT_SECONDS_MAX = 5.0
# Old rows deleted at once, as what arrives meanwhile waits. With 1,000 a million rows go in 24 s
# and the 99th percentile of the ACKs is 7 ms; with 250, in 28 s and 4 ms.
DELETED_ROWS_MAX = 250

_INSERT = (
    f"INSERT INTO events ({', '.join(Event._fields)}) VALUES {{rows}} "
    "ON CONFLICT (event_id) DO NOTHING RETURNING event_id"
)
# For a batch of one: parsed and planned once, it takes an eighth less of the time to the ACK.
_PARAMETERS = ", ".join(f"${number}" for number in range(1, len(Event._fields) + 1))
_PREPARE_ONE = f"PREPARE insert_one AS {_INSERT.format(rows=f'({_PARAMETERS})')}"
_INSERT_ONE = "EXECUTE insert_one {rows}"
# meta as text and not as parsed by psycopg2, which would round numbers to doubles.
_FETCH = (
    f"SELECT {', '.join(Event._fields[:-1])}, coalesce(meta, '{{}}')::text "
    "FROM events WHERE event_id = ANY(%s)"
)
# What comes again was refused again, so it needs somebody's attention again.
_KEEP = (
    f"INSERT INTO dead_letters (digest, times, last_received_at, {', '.join(DeadLetter._fields)})"
    " VALUES {rows} ON CONFLICT (digest) DO UPDATE SET"
    " times = dead_letters.times + excluded.times, error = excluded.error,"
    " last_received_at = greatest(dead_letters.last_received_at, excluded.last_received_at),"
    " replayed_at = NULL, replay_outcome = NULL RETURNING digest, id"
)
_KEEP_ROW = f"({', '.join(['%s'] * (3 + len(DeadLetter._fields)))})"


Meanwhile = Callable[[bool], tuple[Sequence[Any], bool]]


def _nothing(_is_ready: bool) -> tuple[Sequence[Any], bool]:
    return (), False


class Outcome(Enum):
    """What the database said of an event."""

    STORED = "stored"
    DUPLICATE = "duplicate"  # its id and content were there already
    CONFLICT = "conflict"  # its id was there with other content, which stays


class Table(Enum):
    """What grows: a table, its key, and the column that says how old a row is."""

    EVENTS = ("events", "event_id", "ts_server")
    DEAD_LETTERS = ("dead_letters", "id", "last_received_at")


class StoreUnavailable(Exception):
    """Nothing can be stored now. No event is at fault; try the same again later."""


class Fault(Enum):
    """Whose fault a database error is, and so what is to be done."""

    CONNECTION = "reconnect, then try again"
    PASSING = "try again later"
    EVENT = "this event will never be stored"
    OPERATOR = "try again until somebody has mended the database"


# SQLSTATE, or its first two characters (its class), to fault: PostgreSQL's documentation,
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
    "54": Fault.EVENT,  # program limit exceeded: too big, too deep
}


def fault_of(sqlstate: str | None) -> Fault:
    """Return whose fault an error with this SQLSTATE is; None means no answer came."""
    if sqlstate is None:
        return Fault.CONNECTION
    for length in (5, 3, 2):
        if fault := FAULTS.get(sqlstate[:length]):
            return fault
    return Fault.OPERATOR


class Store:
    """The one connection. Methods raise StoreUnavailable; connect() must come first."""

    def __init__(self, database: Mapping[str, Any], meanwhile: Meanwhile = _nothing) -> None:
        """`database` is what libpq is told beyond its own environment variables.

        `meanwhile` does a step of other work while the database is at work. It is told whether
        one of its sockets is ready, and returns them, and whether there is more to do at once.
        """
        self._database = database
        self._meanwhile = meanwhile
        self._connection: Any = None
        self.round_trip_seconds = 0.0  # of the latest statement that was answered
        self._deadline = 0.0
        # Set by give_up_at(): no wait lasts beyond it.
        self._give_up_at = float("inf")
        # Process-wide, as psycopg2 has it; there is one connection in the process.
        extensions.set_wait_callback(self._wait)

    @property
    def connected(self) -> bool:
        """Whether there is a connection; only the next statement shows whether it lives."""
        return self._connection is not None

    def connect(self) -> None:
        """Connect if there is no connection."""
        if self._connection is not None:
            return
        self._deadline = time.monotonic() + CONNECT_SECONDS_MAX
        try:
            connection = psycopg2.connect(
                **self._database,
                client_encoding="UTF8",
                fallback_application_name="homelab-ingester",
                target_session_attrs="read-write",
                # Each alone misses one direction of a cut line.
                keepalives_idle=10,
                keepalives_interval=5,
                keepalives_count=3,
                tcp_user_timeout=15_000,
            )
            connection.autocommit = True
            self._deadline = time.monotonic() + ANSWER_SECONDS_MAX
            with connection.cursor() as cursor:
                # Not as connection options: those would override the user's PGOPTIONS. The
                # server gives up on a statement when we do; UTC keeps the year 1 the year 1.
                cursor.execute(
                    "SELECT set_config('TimeZone', 'UTC', false),"
                    " set_config('statement_timeout', %s, false)",
                    (f"{ANSWER_SECONDS_MAX * 1000:.0f}",),
                )
                cursor.execute(_PREPARE_ONE)
        except psycopg2.Error as error:
            raise StoreUnavailable(_summary(error)) from None
        self._connection = connection
        log.info("Connected to Postgres")

    def close(self) -> None:
        """Close the connection if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def give_up_at(self, moment: float) -> None:
        """Let no wait last beyond this moment of the monotonic clock, even one under way."""
        self._give_up_at = moment

    def ping(self) -> None:
        """Ask for an answer, whatever it is."""
        self._run("SELECT")

    def insert(self, events: Sequence[Event]) -> list[Outcome | Rejection]:
        """Store the events; return what became of each, in their order.

        Several may share an id: the first of them that can be stored is, and the others are
        compared with it. One that the database refuses is a Rejection (not_storable).
        """
        results: list[Outcome | Rejection | None] = [None] * len(events)
        pending = list(range(len(events)))
        while pending:
            first: dict[str, int] = {}
            for i in pending:
                first.setdefault(events[i].event_id, i)
            # Sorted, because two writers that take the same keys in other orders deadlock.
            rows = sorted((events[i] for i in first.values()), key=attrgetter("event_id"))
            inserted, refused = self._insert(rows)
            if len(inserted) == len(events):
                return [Outcome.STORED] * len(events)  # all are new, as they mostly are
            stored = {row.event_id: row for row in rows if row.event_id in inserted}
            if absent := [key for key in first if key not in inserted and key not in refused]:
                stored |= self._fetch(absent)
            for i in pending:
                event = events[i]
                is_first = first[event.event_id] == i
                if is_first and event.event_id in inserted:
                    results[i] = Outcome.STORED
                elif is_first and event.event_id in refused:
                    results[i] = refused[event.event_id]
                elif row := stored.get(event.event_id):
                    results[i] = Outcome.DUPLICATE if _same(event, row) else Outcome.CONFLICT
            # Left over: those behind a refused one of the same id, and those whose row was
            # deleted between the two statements.
            pending = [i for i in pending if results[i] is None]
        return [result for result in results if result is not None]

    def keep(self, letters: Sequence[DeadLetter]) -> list[int]:
        """Keep the dead letters, equal ones as one row; return their ids in the same order."""
        if not letters:
            return []
        digests = [_digest(letter) for letter in letters]
        # ON CONFLICT DO UPDATE takes no row twice.
        groups: dict[bytes, list[DeadLetter]] = {}
        for digest, letter in zip(digests, letters, strict=True):
            groups.setdefault(digest, []).append(letter)
        values: list[Any] = []
        # Sorted, because two writers that take the same rows in other orders deadlock.
        for digest in sorted(groups):
            first, last = groups[digest][0], groups[digest][-1]
            values += (digest, len(groups[digest]), last.received_at)
            values += last._replace(received_at=first.received_at)
        rows = self._run(_KEEP.format(rows=", ".join([_KEEP_ROW] * len(groups))), values)
        ids = {bytes(digest): letter_id for digest, letter_id in rows}
        return [ids[digest] for digest in digests]

    def _insert(self, rows: list[Event]) -> tuple[set[str], dict[str, Rejection]]:
        """Insert rows with distinct ids; return the ids inserted, and those refused."""
        try:
            sql = _INSERT if len(rows) > 1 else _INSERT_ONE
            return {row[0] for row in self._insert_rows(sql, rows, "ts_device")}, {}
        except _EventRefused as error:
            if len(rows) == 1:
                event_id = rows[0].event_id
                return set(), {event_id: Rejection(Reason.NOT_STORABLE, str(error), event_id)}
        # One bad row fails them all. Halving finds it in log2(n) more statements, and costs
        # nothing when there is none; a savepoint for each row would always cost.
        middle = len(rows) // 2
        inserted, refused = self._insert(rows[:middle])
        more_inserted, more_refused = self._insert(rows[middle:])
        return inserted | more_inserted, refused | more_refused

    def _fetch(self, event_ids: list[str]) -> dict[str, Event]:
        # A statement of its own: it sees rows that another writer committed meanwhile.
        rows = self._run(_FETCH, (event_ids,))
        return {row[0]: Event(*row) for row in rows}

    def _insert_rows(
        self, sql: str, rows: Sequence[Event] | Sequence[DeadLetter], time_column: str
    ) -> list[tuple[Any, ...]]:
        # One execute() for all: execute_values() quotes each row by a call of its own, at one
        # and a half times the cost.
        width = len(rows[0])
        row_sql = f"({', '.join(['%s'] * width)})"
        values: list[Any] = list(chain.from_iterable(rows))
        # A time as text costs less than as a datetime, which psycopg2 writes with a cast.
        times = slice(rows[0]._fields.index(time_column), None, width)
        values[times] = [moment and moment.isoformat() for moment in values[times]]
        return self._run(sql.format(rows=", ".join([row_sql] * len(rows))), values)

    def _run(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement in its own transaction, and tell whose fault an error is."""
        if self._connection is None:
            raise StoreUnavailable("not connected")
        began_at = time.monotonic()
        self._deadline = began_at + ANSWER_SECONDS_MAX
        try:
            with self._connection.cursor() as cursor:
                cursor.execute(sql, values)
                rows: list[tuple[Any, ...]] = cursor.fetchall()
            self.round_trip_seconds = time.monotonic() - began_at
            return rows
        except psycopg2.Error as error:
            fault = fault_of(error.pgcode)
            if fault is Fault.CONNECTION or self._connection.closed:
                self.close()
            elif fault is Fault.EVENT:
                raise _EventRefused(_summary(error)) from None
            raise StoreUnavailable(_summary(error)) from None

    def _wait(self, connection: Any) -> None:
        """Wait for the server's answer, but not for ever: psycopg2's wait callback."""
        while (state := connection.poll()) != extensions.POLL_OK:
            reading = [connection] if state == extensions.POLL_READ else []
            writing = [connection] if state == extensions.POLL_WRITE else []
            # Nothing is read before there is something to read: on two cores, what is done first
            # keeps the server from beginning (about 0.05 ms of 1.4 to the ACK of a single event,
            # as against the plain script of the benchmark; its rounds differ by as much).
            is_ready = False
            while True:
                others, has_more = self._meanwhile(is_ready)
                # The deadline may move closer meanwhile, when a signal comes.
                left_seconds = min(self._deadline, self._give_up_at) - time.monotonic()
                if left_seconds <= 0:
                    raise psycopg2.OperationalError("no answer in time")
                seconds_max = 0 if has_more else min(left_seconds, 0.25)
                readable, writable, _ = select.select([*reading, *others], writing, [], seconds_max)
                if connection in readable or writable:
                    break
                is_ready = bool(readable)

    def delete_old(self, table: Table, days: int, since: str) -> tuple[int, str]:
        """Delete a batch of the oldest rows, of those that are older than so many days.

        Return how many, and the time to give as `since` to the next call: the index still
        has all that was deleted, and would be walked through again from its beginning.
        """
        name, key, time_column = table.value
        is_old = f"{time_column} < now() - {days} * interval '1 day'"
        # Two statements, as Citus deletes by neither LIMIT nor ctid. The time as text, since
        # PostgreSQL's years are more than Python's; ordered by the column, not by that text.
        rows = self._run(
            f"SELECT {key}, {time_column}::text FROM {name} WHERE {time_column} >= %s"
            f" AND {is_old} ORDER BY {name}.{time_column} LIMIT {DELETED_ROWS_MAX}",
            (since,),
        )
        if not rows:
            return 0, since
        # A key may have been deleted and stored anew between the two. And where somebody else
        # holds a row locked, events are not to wait: the limit is set before the first row.
        deleted = self._run(
            f"DELETE FROM {name} WHERE {key} = ANY(%s) AND {is_old}"
            f" AND (SELECT set_config('lock_timeout', '500ms', true)) <> '' RETURNING {key}",
            ([row[0] for row in rows],),
        )
        return len(deleted), rows[-1][1]


class _EventRefused(StoreUnavailable):
    """The database refuses a value: at least one row of the statement is at fault.

    Where no event can be at fault it is what it inherits from: try again, loudly.
    """


def _digest(letter: DeadLetter) -> bytes:
    """Return what makes two letters the same row; 006_dead_letter_groups.sql has it in SQL."""
    # The topic too, because a replay answers its device. None of the two can hold a NUL.
    digest = hashlib.sha256(f"{letter.reason}\0{letter.topic}\0".encode())
    digest.update(letter.payload)
    return digest.digest()


def _same(event: Event, row: Event) -> bool:
    """Tell whether the event has the content of the row."""
    return event[:-1] == row[:-1] and _comparable(event.meta) == _comparable(row.meta)


def _comparable(meta: str) -> Any:
    return _COMPARABLE.decode(meta)


def _number(text: str) -> tuple[Decimal]:
    # Exact, as jsonb keeps it: 1e23 comes back as 24 digits, which are another double. In a
    # tuple, because True == Decimal(1) in Python.
    return (Decimal(text),)


_COMPARABLE = json.JSONDecoder(parse_int=_number, parse_float=_number)


def _summary(error: psycopg2.Error) -> str:
    """Return the error in one line of bounded length, with its SQLSTATE if it has one."""
    # The first line: in those behind it, libpq guesses.
    text = (error.diag.message_primary or str(error)).strip() or type(error).__name__
    sqlstate = f" (SQLSTATE {error.pgcode})" if error.pgcode else ""
    if text.endswith("certificate verify failed"):  # libpq does not say why
        text += ": it has expired, or is not signed by the CA in PGSSLROOTCERT"
    return text.splitlines()[0][:300] + sqlstate
