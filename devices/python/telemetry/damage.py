"""A database that may be damaged: what is wrong with it, and what can still be read of it.

What it does: looks at every page and every event before the file is used, and reads around
what is broken. What it does not: repair anything, or throw away any file.

Invariant: an event that is read has the very bytes that were kept: each has a checksum.
"""

import json
import re
import sqlite3
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

PIECE_BYTES_MAX = 4_096  # a page; what is longer lies in several
DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,  # no such table
}


Event = tuple[str, str, bytes]  # event id, device id, payload
LostRun = tuple[str, str, int, int, int]  # device id, salt, boot, first, last


class Salvage(NamedTuple):
    """What could be read: each event, and the runs of lost ones."""

    events: list[Event]
    lost: list[LostRun]


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def is_gone(path: Path, last: int) -> bool:
    """Tell whether the database is not there, or empty, although there was one.

    SQLite would take it for a new one, and delete its WAL.
    """
    sizes = [it.stat().st_size if it.exists() else 0 for it in (path, wal_of(path))]
    return sizes[0] == 0 and (sizes[1] > 0 or last > 0)


def problem_of(connection: sqlite3.Connection, application_id: int, last: int) -> str | None:
    """Return why this database cannot be used, None if it is whole, or new.

    `last` is the number of an event that was kept in it: SQLite takes a broken WAL for over at
    the first frame that is broken, as a power cut leaves it, and says nothing.
    """
    try:
        (found,) = connection.execute("PRAGMA application_id").fetchone()
        if not connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
            # A power cut before its first transaction, if nothing was kept in it.
            return f"the last {last} events are missing" if last else None
        if found != application_id:
            return "not an outbox"
        (result,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if result != "ok":
            return str(result)
        if connection.execute("SELECT count(*) FROM state").fetchone() != (1,):
            return "no state"
        connection.create_function("crc32", 1, crc32, deterministic=True)
        sql = "SELECT count(*) FROM events WHERE crc32(payload) <> checksum"
        (count,) = connection.execute(sql).fetchone()
        if count:
            return f"{count} events with a wrong checksum"
        (newest,) = connection.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
        missing = last - (newest or 0)
        return f"the last {missing} events are missing" if missing > 0 else None
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", -1) & 0xFF in DAMAGED:
            return str(error)
        raise


def salvage(path: Path) -> Salvage:
    """Read what can be read: by SQL, and behind what is broken by the look of its bytes.

    Among the latter may be events that were answered already; they are found to be duplicates.
    """
    found: dict[str, Event] = {}
    lost: list[LostRun] = []
    files = [it for it in (path, wal_of(path)) if it.is_file() and it.stat().st_size]
    if path in files:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            found = {event[0]: event for event in read_events(connection)}
            lost = read_lost(connection)
        except sqlite3.DatabaseError:
            pass  # of the wrong format as a whole
        finally:
            # Closing tidies the WAL away, by its name; it may have more in it than SQLite reads.
            kept = path.with_name(path.name + "-wal.kept")
            files = [it if it == path else it.rename(kept) for it in files]
            connection.close()
    for file in files:
        for event in carve(file):
            found.setdefault(event[0], event)
    return Salvage(list(found.values()), lost)


def read_events(connection: sqlite3.Connection) -> list[Event]:
    """Return the events from either end up to what is broken, the oldest first."""
    found: dict[int, Event | None] = {}
    for order in ("ASC", "DESC"):
        sql = f"SELECT number, payload, checksum FROM events ORDER BY number {order}"
        try:
            for number, payload, checksum in connection.execute(sql):
                found[number] = whole_event(payload, checksum)
        except sqlite3.DatabaseError:
            continue
        break  # read from one end to the other
    return [event for _, event in sorted(found.items()) if event is not None]


def carve(path: Path) -> Iterator[Event]:
    """Yield the events that stand in one piece anywhere in a file: payload and checksum."""
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        for start in re.finditer(rb'\{"schema":1,"event_id":"', content):
            piece = content[start.start() : start.start() + PIECE_BYTES_MAX]
            try:
                _, end = json.JSONDecoder().raw_decode(piece.decode(errors="replace"))
            except (ValueError, RecursionError):
                continue
            payload = piece.decode(errors="replace")[:end].encode()
            checksum = crc32(payload)
            # As SQLite writes an integer: in the fewest of these bytes, with a sign.
            size = next(size for size in (1, 2, 3, 4, 6) if checksum < 1 << (8 * size - 1))
            if piece[len(payload) :][:size] == checksum.to_bytes(size, "big"):
                event = whole_event(payload, checksum)
                if event is not None:
                    yield event


def whole_event(payload: Any, checksum: Any) -> Event | None:
    if not isinstance(payload, bytes) or crc32(payload) != checksum:
        return None
    event = json.loads(payload)  # the columns beside it have no checksum
    return event["event_id"], event["device_id"], payload


def read_lost(connection: sqlite3.Connection) -> list[LostRun]:
    try:
        rows = connection.execute("SELECT device_id, salt, boot, first, last FROM lost").fetchall()
    except sqlite3.DatabaseError:
        return []
    types = (str, str, int, int, int)
    return [row for row in rows if all(map(isinstance, row, types))]
