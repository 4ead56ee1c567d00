"""A database that may be damaged: what is wrong with it, and what can still be read of it.

What it does: looks at every page and every event before the file is used, and reads around
what is broken. What it does not: repair anything, or throw away any file.

Invariant: an event that is read has the very bytes that were kept: each has a checksum.
"""

import json
import re
import shutil
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any
from zlib import crc32

from .kept import Kept, Run

PIECE_BYTES_MAX = 4_096  # a page; what is longer lies in several
DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,  # no such table
}


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


def salvage(path: Path) -> Generator[Kept | Run, None, None]:
    """Yield what can be read: by SQL, and what is behind the damage by the look of its bytes.

    Among the latter are events once more, and some that were answered already; they are found
    to be duplicates. It is not gathered first: there may be more than fits into memory.
    """
    kept = path.with_name(path.name + "-wal.kept")
    wal = wal_of(path)
    if wal.is_file() and not kept.exists():
        # SQLite deletes the WAL in the end, and there may be more in it than SQLite reads.
        try:
            kept.hardlink_to(wal)
        except OSError:  # a file system without links
            shutil.copy(wal, kept)
    if path.is_file() and path.stat().st_size:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            yield from read_events(connection)
            yield from read_lost(connection)
    for file in (path, kept):
        if file.is_file() and file.stat().st_size:
            yield from carve(file)


def read_events(connection: sqlite3.Connection) -> Iterator[Kept]:
    """Yield the events from either end up to what is broken."""
    for order in ("ASC", "DESC"):
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            sql = f"SELECT payload, checksum FROM events ORDER BY number {order}"
            for payload, checksum in connection.execute(sql):
                event = whole_event(payload, checksum)
                if event is not None:
                    yield event
        except sqlite3.DatabaseError:
            continue
        break  # read from one end to the other


def carve(path: Path) -> Iterator[Kept]:
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


def whole_event(payload: Any, checksum: Any) -> Kept | None:
    if not isinstance(payload, bytes) or crc32(payload) != checksum:
        return None
    event = json.loads(payload)  # the columns beside it have no checksum
    return Kept(event["event_id"], event["device_id"], payload)


def read_lost(connection: sqlite3.Connection) -> Iterator[Run]:
    try:
        for row in connection.execute("SELECT device_id, salt, boot, first, last FROM lost"):
            if all(map(isinstance, row, (str, str, int, int, int))):
                yield Run(*row)
    except sqlite3.DatabaseError:
        return
