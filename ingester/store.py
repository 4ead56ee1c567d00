"""The tables of events and dead letters, and all SQL of the daemon.

What it does: stores events exactly once and says of each what became of it; keeps dead
letters; deletes what is old. What it does not: know psycopg2 (connection.py does), retry, wait
between tries or know of MQTT.

Invariant: what finish_insert() calls STORED or DUPLICATE is committed once insert_dead_letters()
has returned, and so are the dead letters that it returns an id for. Every method may be called
again after StoreUnavailable and does no harm.

Each statement commits by itself, which costs half of an explicit transaction (0.23 against
0.45 ms for a batch of one). Between the events of a batch and its dead letters that is
safe: neither is PUBACKed before both are committed, and the broker sends both again. Only
where some of many rows are refused, there is a transaction: of finding them and keeping them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from ingester.connection import (
    ANSWER_SECONDS_MAX,
    Connection,
    Session,
    StatementRefused,
    StatementTimeout,
)
from ingester.event import Event
from ingester.rejection import DeadLetter, Reason, Rejection

# Rows of one statement, at first and at most: more than a batch has (settings.py and
# decoder.py bound it). Where so many take too long, it is halved until they do not.
ROWS_MAX = 16_384
# Old rows deleted at once, as what arrives meanwhile waits. With 1,000 a million rows go in 24 s
# and the 99th percentile of the ACKs is 7 ms; with 250, in 28 s and 4 ms.
DELETED_ROWS_MAX = 250

_COLUMNS = {
    "event_id": "text",
    "device_id": "text",
    "schema": "int",
    "event_type": "text",
    "value_num": "float8",
    "value_text": "text",
    "unit": "text",
    "ts_device": "timestamptz",
    "meta": "jsonb",
}
_PLACES = ["%s"] * len(_COLUMNS)


def _rows(places: Iterable[str]) -> str:
    # An array for each column: as rows of VALUES, whose every value is a parameter, an event
    # cost two and a half times as much here and a third more there.
    arrays = [f"{place}::{type_}[]" for place, type_ in zip(places, _COLUMNS.values(), strict=True)]
    return f"unnest({', '.join(arrays)})"


_INSERT = (
    f"INSERT INTO events ({', '.join(_COLUMNS)}) SELECT * FROM {{rows}}"
    " ON CONFLICT (event_id) DO NOTHING RETURNING event_id"
)
_INSERT_UNPREPARED = _INSERT.format(rows=_rows(_PLACES))
# Parsed and planned once.
_PREPARED = {
    "insert_events": _INSERT.format(rows=_rows(f"${n}" for n in range(1, len(_COLUMNS) + 1)))
}
_INSERT_PREPARED = f"EXECUTE insert_events ({', '.join(_PLACES)})"
# In the database, so that nothing is fetched: jsonb writes 1e308 with 309 digits, and a row of
# another writer may hold a time that Python has not. A statement of its own: it sees rows that
# others committed meanwhile.
_CONTENT = [name for name in _COLUMNS if name not in ("event_id", "meta")]
_COMPARE = (
    "SELECT sent.number - 1,"
    f" ({', '.join(f'events.{name}' for name in _CONTENT)}, coalesce(events.meta, '{{}}'))"
    f" IS NOT DISTINCT FROM ({', '.join(f'sent.{name}' for name in _CONTENT)}, sent.meta)"
    f" FROM {_rows(_PLACES)} WITH ORDINALITY AS sent ({', '.join(_COLUMNS)}, number)"
    " JOIN events USING (event_id) WHERE events.event_id = ANY(%s)"
)
# What comes again was refused again, so it needs somebody's attention again.
_UPSERT_DEAD_LETTERS = (
    f"INSERT INTO dead_letters (digest, times, last_received_at, {', '.join(DeadLetter._fields)})"
    " VALUES {rows} ON CONFLICT (digest) DO UPDATE SET"
    " times = dead_letters.times + excluded.times, error = excluded.error,"
    " last_received_at = greatest(dead_letters.last_received_at, excluded.last_received_at),"
    " replayed_at = NULL, replay_outcome = NULL RETURNING digest, id"
)
_DEAD_LETTER_ROW = f"({', '.join(['%s'] * (3 + len(DeadLetter._fields)))})"
DROPPED = "the database dropped it: neither stored nor refused, as by a trigger that returns NULL"


class Outcome(Enum):
    """What the database said of an event."""

    STORED = "stored"
    DUPLICATE = "duplicate"  # its id and content were there already
    CONFLICT = "conflict"  # its id was there with other content, which stays


class Table(Enum):
    """What grows: a table, its key, and the column that says how old a row is."""

    EVENTS = ("events", "event_id", "ts_server")
    DEAD_LETTERS = ("dead_letters", "id", "last_received_at")


class Store(Connection):
    """The connection, and the tables behind it. Methods raise StoreUnavailable."""

    def __init__(self, database: Mapping[str, Any], session: Session | None = None) -> None:
        """`database` is what libpq is told; `session` is served while the database works."""
        super().__init__(database, session, _PREPARED)
        self._rows_max = ROWS_MAX
        # What begin_insert() was given, by event_id, and how many of it are on their way; and
        # of what it was given twice, which one is the first.
        self._begun: list[tuple[int, Event]] = []
        self._sent = 0
        self._repeats: dict[int, int] = {}

    def begin_insert(self, events: Sequence[Event]) -> None:
        """Send the events, or the first of them; finish_insert() waits for the answer."""
        first: dict[int, int] = {}
        self._repeats = {
            number: first[id(event)]
            for number, event in enumerate(events)
            if first.setdefault(id(event), number) != number
        }
        items = [item for item in enumerate(events) if item[0] not in self._repeats]
        # Sorted, because two writers that take the same keys in other orders deadlock.
        self._begun = sorted(items, key=lambda item: item[1].event_id)
        self._sent = min(len(items), self._rows_max)
        if self._sent:
            self._send_insert(self._begun[: self._sent])

    def finish_insert(self) -> list[Outcome | Rejection]:
        """Return what became of each event of begin_insert(), in their order.

        Several may share an id: the first of them that can be stored is, and the others are
        compared with it. One that the database refuses is a Rejection (not_storable).
        """
        outcomes: list[Outcome | Rejection | None]
        outcomes = [None] * (len(self._begun) + len(self._repeats))
        # Twice: what is neither stored nor there may have been deleted between the two
        # statements, or stand behind another one of the same id that was not stored.
        for _ in range(2):
            inserted, refused = self._insert(self._begun)
            if len(inserted) == len(outcomes):
                return [Outcome.STORED] * len(outcomes)  # all are new, as they mostly are
            for number, rejection in refused.items():
                outcomes[number] = rejection
            left = [item for item in self._begun if item[0] not in refused]
            times = Counter(event.event_id for _, event in left)
            to_compare = []
            for number, event in left:
                if event.event_id in inserted and times[event.event_id] == 1:
                    outcomes[number] = Outcome.STORED
                else:
                    to_compare.append((number, event))
            for number, outcome in self._compare(to_compare, inserted).items():
                outcomes[number] = outcome
            self._begun = [item for item in left if outcomes[item[0]] is None]
            if not self._begun:
                break
        for number, event in self._begun:
            outcomes[number] = Rejection(Reason.NOT_STORABLE, DROPPED, event.event_id)
        for number, first in self._repeats.items():
            is_stored = outcomes[first] is Outcome.STORED
            outcomes[number] = Outcome.DUPLICATE if is_stored else outcomes[first]
        return [outcome for outcome in outcomes if outcome is not None]

    def look_up(self, events: Sequence[Event]) -> list[Outcome | None]:
        """Return DUPLICATE or CONFLICT of each event whose id there is; store none."""
        found = self._compare(list(enumerate(events)), set())
        return [found.get(number) for number in range(len(events))]

    def _send_insert(self, part: Sequence[tuple[int, Event]], before: str = "") -> None:
        sql = _INSERT_PREPARED if self.has_prepared else _INSERT_UNPREPARED
        self.send(before + sql, _columns([event for _, event in part]))

    def _insert(self, items: Sequence[tuple[int, Event]]) -> tuple[set[str], dict[int, Rejection]]:
        """Insert the events; return the ids inserted, and those refused by their number.

        One bad row fails its whole statement. Then a transaction is opened, in which each
        statement has a savepoint. insert_dead_letters() commits it with the dead letters, so
        that what was found is not lost. The number of rows is halved at each failure and doubled
        at each success: few bad rows are found in few statements, and many in about as many as
        there are rows.
        """
        inserted: set[str] = set()
        refused: dict[int, Rejection] = {}
        position, rows = 0, self._rows_max
        before = "SAVEPOINT part; " if self.in_transaction else ""
        while position < len(items):
            part = items[position : position + (self._sent or rows)]
            try:
                if not self._sent:
                    self._send_insert(part, before)
                self._sent = 0
                inserted.update(row[0] for row in self.rows())
            except StatementTimeout:
                if len(part) > 1:  # otherwise it is not their number
                    self._rows_max = len(part) // 2
                raise
            except StatementRefused as error:
                if error.column and error.column not in Event._fields:
                    raise  # a column of the owner's, which no event can fill
                if self.in_transaction:
                    before = "ROLLBACK TO SAVEPOINT part; "
                elif len(items) > 1:
                    self.begin()
                    before = "SAVEPOINT part; "
                if len(part) == 1:
                    [(number, event)] = part
                    refused[number] = Rejection(Reason.NOT_STORABLE, str(error), event.event_id)
                    position += 1
                rows = max(1, len(part) // 2)
            else:
                position += len(part)
                rows = min(2 * len(part), self._rows_max)
                if self.in_transaction:
                    before = "RELEASE SAVEPOINT part; SAVEPOINT part; "
        if before.startswith("ROLLBACK"):
            self.run(before)
        if self.round_trip_seconds < ANSWER_SECONDS_MAX / 4:
            self._rows_max = min(ROWS_MAX, 2 * self._rows_max)
        return inserted, refused

    def _compare(
        self, items: Sequence[tuple[int, Event]], inserted: set[str]
    ) -> dict[int, Outcome]:
        """Compare events with the rows of their ids; those without a row are left out.

        The first one that is like its row, of an id that was just inserted, is the one STORED.
        """
        if not items:
            return {}
        arrays = _columns([event for _, event in items])
        ids = sorted({event.event_id for _, event in items})
        is_same = dict(self.run(_COMPARE, (*arrays, ids)))
        outcomes = {}
        for index, (number, event) in enumerate(items):
            if index not in is_same:
                continue
            if not is_same[index]:
                outcomes[number] = Outcome.CONFLICT
            elif event.event_id in inserted:
                inserted.remove(event.event_id)
                outcomes[number] = Outcome.STORED
            else:
                outcomes[number] = Outcome.DUPLICATE
        return outcomes

    def insert_dead_letters(self, letters: Sequence[DeadLetter]) -> list[int]:
        """Keep the dead letters, equal ones as one row; return their ids in the same order.

        Commits them, with what finish_insert() may have left open, and even if there are none.
        """
        ids = self._upsert_dead_letters(letters) if letters else []
        if self.in_transaction:
            self.commit()
        return ids

    def _upsert_dead_letters(self, letters: Sequence[DeadLetter]) -> list[int]:
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
        sql = _UPSERT_DEAD_LETTERS.format(rows=", ".join([_DEAD_LETTER_ROW] * len(groups)))
        ids = {bytes(digest): letter_id for digest, letter_id in self.run(sql, values)}
        return [ids[digest] for digest in digests]

    def delete_old(self, table: Table, days: int, since: str) -> tuple[int, str]:
        """Delete a batch of the oldest rows, of those that are older than so many days.

        Return how many, and the time to give as `since` to the next call: the index still
        has all that was deleted, and would be walked through again from its beginning.
        """
        name, key, time_column = table.value
        is_old = f"{time_column} < now() - {days} * interval '1 day'"
        # Two statements, as Citus deletes by neither LIMIT nor ctid. The time as text, since
        # PostgreSQL's years are more than Python's; ordered by the column, not by that text.
        rows = self.run(
            f"SELECT {key}, {time_column}::text FROM {name} WHERE {time_column} >= %s"
            f" AND {is_old} ORDER BY {name}.{time_column} LIMIT {DELETED_ROWS_MAX}",
            (since,),
        )
        if not rows:
            return 0, since
        # A key may have been deleted and stored anew between the two. And where somebody else
        # holds a row locked, events are not to wait: the limit is set before the first row.
        deleted = self.run(
            f"DELETE FROM {name} WHERE {key} = ANY(%s) AND {is_old}"
            f" AND (SELECT set_config('lock_timeout', '500ms', true)) <> '' RETURNING {key}",
            ([row[0] for row in rows],),
        )
        return len(deleted), rows[-1][1]


def _digest(letter: DeadLetter) -> bytes:
    """Return what makes two letters the same row; 006_dead_letter_groups.sql has it in SQL."""
    # The topic too, because a replay answers its device. None of the two can hold a NUL.
    digest = hashlib.sha256(f"{letter.reason}\0{letter.topic}\0".encode())
    digest.update(letter.payload)
    return digest.digest()


def _columns(events: Sequence[Event]) -> list[str]:
    """Return the events as one array literal for each column."""
    ids, devices, schemas, types, numbers, texts, units, moments, metas = zip(*events, strict=True)
    return [
        _array(ids),
        _array(devices),
        f"{{{','.join(map(str, schemas))}}}",
        _array(types),
        f"{{{','.join(['NULL' if number is None else repr(number) for number in numbers])}}}",
        _array(texts),
        _array(units),
        _array([moment and moment.isoformat() for moment in moments]),
        _array(metas),
    ]


def _array(texts: Sequence[str | None]) -> str:
    """Return an array literal (PostgreSQL, "Array Input and Output Syntax")."""
    # Escaped by column and not by value, at a third of the cost: no text holds U+0000.
    present = [text for text in texts if text is not None]
    escaped = "\0".join(present).replace("\\", r"\\").replace('"', r"\"")
    if len(present) == len(texts):
        return '{"' + escaped.replace("\0", '","') + '"}'
    values = iter(escaped.split("\0"))
    quoted = ["NULL" if text is None else f'"{next(values)}"' for text in texts]
    return f"{{{','.join(quoted)}}}"
