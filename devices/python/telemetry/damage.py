"""A database that may be damaged: what is wrong with it, and what can still be read of it.

What it does: looks at every page and every event before the file is used, and reads around
what is broken. What it does not: repair or change anything; what was set aside stays as it is.

Invariant: an event that is read has the very bytes that were kept: each has a checksum.
"""

import json
import sqlite3
import struct
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

WAL_HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
GAP_MAX = 1_000_000  # numbers that are tried one by one
DAMAGED = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,  # no such table
}


class Salvage(NamedTuple):
    """What could be read: (payload, event id, device id) of each event, and lost runs."""

    events: list[tuple[bytes, str, str]]
    lost: list[tuple[str, str, int, int, int]]
    unreadable: int  # events that are known to be there


def wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def is_emptied(path: Path) -> bool:
    """Tell whether the database is gone or empty and its WAL is not.

    SQLite would take it for a new one, and delete the WAL.
    """
    sizes = [it.stat().st_size if it.exists() else 0 for it in (path, wal_of(path))]
    return sizes[0] == 0 and sizes[1] > 0


def problem_of(connection: sqlite3.Connection, path: Path, application_id: int) -> str | None:
    """Return why this database cannot be used, None if it is whole, or new."""
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
        return "its WAL" if is_wal_damaged(connection, wal_of(path)) else None
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", -1) & 0xFF in DAMAGED:
            return str(error)
        raise


def is_wal_damaged(connection: sqlite3.Connection, path: Path) -> bool:
    """Tell whether transactions were cut off that had been followed by others.

    At the first frame that is broken SQLite takes the WAL for over, since that is how a power
    cut leaves the last transaction. If there is one behind it, it was not the last.
    """
    if not path.exists():
        return False
    _, valid, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    with path.open("rb") as file:
        header = file.read(WAL_HEADER_BYTES)
        if len(header) < WAL_HEADER_BYTES:
            return False
        if not is_wal_header(header):
            return bool(file.read(1))  # frames follow only once the header is on the disk
        page_bytes = int.from_bytes(header[8:12], "big")
        is_commit_behind = False
        for number in range(max(valid, 0), path.stat().st_size // page_bytes):
            file.seek(WAL_HEADER_BYTES + number * (FRAME_HEADER_BYTES + page_bytes))
            frame = file.read(FRAME_HEADER_BYTES)
            if len(frame) < FRAME_HEADER_BYTES or frame[8:16] != header[16:24]:
                continue  # from before the WAL was begun again
            if is_commit_behind:
                return True
            is_commit_behind = frame[4:8] != bytes(4)
    return False


def is_wal_header(header: bytes) -> bool:
    """Tell whether it has its own checksum, and a page size."""
    magic, _, page_bytes = struct.unpack(">III", header[:12])
    order = ">" if magic & 1 else "<"
    first = second = 0
    words = struct.unpack(order + "6I", header[:24])
    for one, other in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    is_page_size = 512 <= page_bytes <= 65_536 and page_bytes & (page_bytes - 1) == 0
    return is_page_size and struct.pack(">II", first, second) == header[24:32]


def salvage(path: Path) -> Salvage:
    """Read what can be read."""
    if is_emptied(path) or not path.is_file():
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


def read_events(connection: sqlite3.Connection) -> tuple[list[tuple[bytes, str, str]], int]:
    found: dict[int, tuple[bytes, str, str] | None] = {}
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


def whole_event(payload: Any, checksum: Any) -> tuple[bytes, str, str] | None:
    if not isinstance(payload, bytes) or crc32(payload) != checksum:
        return None
    event = json.loads(payload)  # the columns beside it have no checksum
    return payload, event["event_id"], event["device_id"]


def read_lost(connection: sqlite3.Connection) -> list[tuple[str, str, int, int, int]]:
    try:
        rows = connection.execute("SELECT device_id, salt, boot, first, last FROM lost").fetchall()
    except sqlite3.DatabaseError:
        return []
    types = (str, str, int, int, int)
    return [row for row in rows if all(map(isinstance, row, types))]
