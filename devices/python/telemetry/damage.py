"""A database that may be damaged: what is wrong with it, and what can still be read of it.

What it does: looks at every page and every event before the file is used, and reads around
what is broken. What it does not: repair anything, or throw away any file.

Invariant: an event that is read has the very bytes that were kept: each has a checksum.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

GAP_MAX = 1_000_000  # numbers that are tried one by one
DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,  # no such table
}


Event = tuple[str, str, bytes]  # event id, device id, payload


class Salvage(NamedTuple):
    """What could be read: each event, and the runs of lost ones."""

    events: list[Event]
    lost: list[tuple[str, str, int, int, int]]
    unreadable: int  # events that are known to be there


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
            return None  # a power cut before its first transaction
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
    """Read what can be read."""
    if is_gone(path, 1):
        return Salvage([], [], 0)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        events, unreadable = read_events(connection)
        return Salvage(events, read_lost(connection), unreadable)
    except sqlite3.DatabaseError:
        return Salvage([], [], 0)
    finally:
        # So that closing does not tidy away what others may still make sense of.
        if wal_of(path).exists():
            wal_of(path).rename(path.with_name(path.name + "-wal.kept"))
        connection.close()


def read_events(connection: sqlite3.Connection) -> tuple[list[Event], int]:
    found: dict[int, Event | None] = {}
    columns = "SELECT number, payload, checksum FROM events"
    ends = []
    for order in ("ASC", "DESC"):
        numbers = [0]
        try:
            for number, payload, checksum in connection.execute(
                f"{columns} ORDER BY number {order}"
            ):
                numbers.append(number)
                found[number] = whole_event(payload, checksum)
        except sqlite3.DatabaseError:
            ends.append(numbers[-1])
            continue
        break  # read from one end to the other
    if len(ends) == 2:
        for number in range(ends[0] + 1, min(ends[1], ends[0] + GAP_MAX)):
            try:
                for _, payload, checksum in connection.execute(
                    f"{columns} WHERE number = {number}"
                ):
                    found[number] = whole_event(payload, checksum)
            except sqlite3.DatabaseError:
                found[number] = None
    events = [event for _, event in sorted(found.items()) if event is not None]
    return events, len(found) - len(events)


def whole_event(payload: Any, checksum: Any) -> Event | None:
    if not isinstance(payload, bytes) or crc32(payload) != checksum:
        return None
    event = json.loads(payload)  # the columns beside it have no checksum
    return event["event_id"], event["device_id"], payload


def read_lost(connection: sqlite3.Connection) -> list[tuple[str, str, int, int, int]]:
    try:
        rows = connection.execute("SELECT device_id, salt, boot, first, last FROM lost").fetchall()
    except sqlite3.DatabaseError:
        return []
    types = (str, str, int, int, int)
    return [row for row in rows if all(map(isinstance, row, types))]
