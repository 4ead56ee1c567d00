"""The part of the outbox that survives a power cut: an SQLite database in a folder of its own.

What it does: keeps events, the boot number, and which events were dropped; refuses a second
process. What it does not: decide what is kept, or look into a damaged file (damage.py does).

Invariant: what a durable transaction wrote is on the disk when it ends; one that fails has
written nothing. Every error is one of errors.py.
"""

import fcntl
import logging
import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

from .damage import is_gone, problem_of, salvage
from .errors import OutboxError, StoreDamaged, StoreFailed, StoreLocked, file_error, store_error
from .kept import Kept, Run
from .last_number import LastNumber

APPLICATION_ID = 0x71730001  # "qs", in the file's header: it is ours
SCHEMA = """
CREATE TABLE state (boot INTEGER NOT NULL);
INSERT INTO state VALUES (0);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    device_id TEXT NOT NULL,
    payload BLOB NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE INDEX events_of_device ON events (device_id);
CREATE TABLE lost (
    device_id TEXT NOT NULL,
    salt TEXT NOT NULL,
    boot INTEGER NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    PRIMARY KEY (device_id, salt, boot, first)
);
"""
LOCK_SECONDS = 1.0  # how long another program may hold the file, until that is an error
WAL_BYTES_MAX = 4 * 1024 * 1024  # after a larger transaction it is cut off again
DAMAGED_MAX = 4  # that are kept; older ones go
RUNS_MAX = 1_000  # of lost events, that are remembered until they are told

log = logging.getLogger(__name__)


class Store:
    """The folder: `outbox/` is in use, `damaged-1/` and so on were set aside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged = 0  # stores that were set aside at this start
        # Anew at each start, and not with the store: a restored backup or a copied card would
        # else begin the same boot again.
        self.salt = secrets.token_hex(4)
        self.boot = 0
        self._newest = 0  # the number of the last event that was added
        self._connection: sqlite3.Connection | None = None
        self._last: LastNumber | None = None
        self._lock = self._locked()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the store to whoever comes next."""
        try:
            self._close_database()
        except sqlite3.Error as error:  # what was kept is in the file all the same
            raise store_error(error, self.folder) from None
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _close_database(self) -> None:
        connection, self._connection = self._connection, None
        last, self._last = self._last, None
        if last is not None:
            last.close()
        if connection is not None:
            connection.close()

    # --- start --------------------------------------------------------------------------

    def _locked(self) -> int | None:
        """Take the folder for this process alone; the kernel gives it back, also at kill -9."""
        try:
            missing = [it for it in (self.folder, *self.folder.parents) if not it.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            for made in missing:  # else a power cut could take the whole folder away
                sync(made.parent)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise file_error(error, self.folder) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if isinstance(error, BlockingIOError):
                raise StoreLocked(f"{self.folder}: another process has this outbox") from None
            raise file_error(error, self.folder) from None
        return lock

    def _open(self) -> None:
        place = self.folder / "outbox"
        try:
            problem = self._open_database(place)
            if problem is not None:
                self._set_aside(place, problem)
                self._open_database(place)
            self._begin_boot(self._opened())
            sync(place)
            sync(self.folder)
            for aside in self._numbered("aside"):
                self._take_over(aside)
        except sqlite3.Error as error:
            raise store_error(error, self.folder) from None
        except OSError as error:
            raise file_error(error, self.folder) from None

    def _open_database(self, place: Path) -> str | None:
        """Open what is there, or a new one; return what is wrong with it."""
        path = place / "events.db"
        if place.exists() and not place.is_dir():
            return "not a folder"
        place.mkdir(exist_ok=True)
        self._last = LastNumber(place / "last")
        if is_gone(path, self._last.number):
            return "the database is gone"
        self._connection = connect(path)
        return problem_of(self._connection, APPLICATION_ID, self._last.number)

    def _begin_boot(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}")
        with self.transaction(durable=True):
            if not connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
                for statement in SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute("UPDATE state SET boot = boot + 1")
            (self.boot,) = connection.execute("SELECT boot FROM state").fetchone()

    def _set_aside(self, place: Path, problem: str) -> None:
        """Move a damaged database away, as one rename: it is never half there."""
        numbers = [number_of(path) for path in self._numbered("aside") + self._numbered("damaged")]
        place.rename(self.folder / f"aside-{max(numbers, default=0) + 1}")
        self._close_database()  # only now, as it tidies the WAL away, by its name
        self.damaged += 1
        log.warning("%s: damaged, set aside (%s)", place, problem)

    def _take_over(self, aside: Path) -> None:
        """Take what can be read of it; cut short, the next start does the same again."""
        count = 0
        with self.transaction(durable=True), closing(salvage(aside / "events.db")) as found:
            for item in found:
                if isinstance(item, Kept):
                    count += len(self.add([item]))
                else:
                    self.add_run(item)
        damaged = aside.rename(self.folder / f"damaged-{number_of(aside)}")
        sync(self.folder)
        log.warning("%s: %d events were read of it and are sent", damaged, count)
        for old in self._numbered("damaged")[:-DAMAGED_MAX]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()

    def _numbered(self, name: str) -> list[Path]:
        found = [path for path in self.folder.glob(f"{name}-*") if number_of(path)]
        return sorted(found, key=number_of)

    # --- what is in it ------------------------------------------------------------------

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return of each device how many events wait, and their bytes."""
        sql = "SELECT device_id, count(*), sum(length(payload)) FROM events GROUP BY device_id"
        return {device_id: (count, size) for device_id, count, size in self._query(sql)}

    def oldest_of(self, device_id: str) -> Iterator[Kept]:
        """Yield a device's events, the oldest first."""
        sql = (
            "SELECT event_id, device_id, payload, checksum FROM events"
            " WHERE device_id = ? ORDER BY number"
        )
        for event_id, owner, payload, checksum in self._query(sql, device_id):
            if crc32(payload) != checksum:
                raise StoreDamaged(f"{self.folder}: {event_id} is damaged; start again")
            yield Kept(event_id, owner, payload)

    def oldest(self, events: int, size: int) -> list[Kept]:
        """Return the oldest of all, until there are so many and so many bytes."""
        found: list[Kept] = []
        sql = "SELECT event_id, device_id, payload FROM events ORDER BY number"
        for row in self._query(sql):
            if events <= 0 and size <= 0:
                break
            found.append(Kept(*row))
            events -= 1
            size -= len(found[-1].payload)
        return found

    def find(self, device_id: str, event_id: str) -> bytes | None:
        """Return the event's bytes if it is waiting."""
        sql = "SELECT payload FROM events WHERE event_id = ? AND device_id = ?"
        try:
            row = self._opened().execute(sql, (event_id, device_id)).fetchone()
        except sqlite3.Error as error:
            raise self._error(error) from None
        return row[0] if row else None

    def ids(self, begin: str) -> list[str]:
        """Return the ids that begin so."""
        sql = "SELECT event_id FROM events WHERE substr(event_id, 1, ?) = ?"
        return [event_id for (event_id,) in self._query(sql, len(begin), begin)]

    def runs(self) -> list[Run]:
        """Return what was lost and not told yet."""
        sql = "SELECT device_id, salt, boot, first, last FROM lost ORDER BY rowid"
        return [Run(*row) for row in self._query(sql)]

    # --- what changes it, within a transaction --------------------------------------------

    @contextmanager
    def transaction(self, durable: bool) -> Iterator[sqlite3.Connection]:
        """All or nothing of what is within; if `durable`, it is on the disk at the end.

        Otherwise a power cut may undo it, but nothing before it.
        """
        connection = self._opened()
        try:
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
            if self._last is not None:
                self._last.write(self._newest)
        except BaseException as error:
            self._undo(connection)
            if isinstance(error, sqlite3.Error):
                raise self._error(error) from None
            raise

    def add(self, events: Sequence[Kept]) -> list[Kept]:
        """Add events; return those that were not there yet."""
        if not events:
            return []
        connection = self._opened()
        newest = self._newest_number()
        changes = connection.total_changes
        self._each(
            "INSERT INTO events (event_id, device_id, payload, checksum) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (event_id) DO NOTHING",
            [(*event, crc32(event.payload)) for event in events],
        )
        if connection.total_changes == changes:
            return []
        self._newest = self._newest_number()
        if connection.total_changes - changes == len(events):
            return list(events)
        sql = "SELECT event_id FROM events WHERE number > ?"
        added = {event_id for (event_id,) in self._query(sql, newest)}
        first = {event.event_id: event for event in reversed(events)}
        return [event for event_id, event in reversed(first.items()) if event_id in added]

    def _newest_number(self) -> int:
        (number,) = self._opened().execute("SELECT max(number) FROM events").fetchone()
        return number or 0

    def remove(self, event_ids: Iterable[str]) -> None:
        self._each("DELETE FROM events WHERE event_id = ?", ((it,) for it in event_ids))

    def add_run(self, run: Run) -> None:
        """Note lost events; a run that ends just before is made longer."""
        if not run.salt:
            sql = (
                "INSERT INTO lost VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET last = last + excluded.last"
            )
            self._change(sql, *run)
            return
        key = (run.device_id, run.salt, run.boot)
        sql = "UPDATE lost SET last = ? WHERE device_id = ? AND salt = ? AND boot = ? AND last = ?"
        if self._change(sql, run.last, *key, run.first - 1) == 0:
            self._change("INSERT OR REPLACE INTO lost VALUES (?, ?, ?, ?, ?)", *run)
            sql = "DELETE FROM lost WHERE rowid <= (SELECT max(rowid) FROM lost) - ?"
            self._change(sql, RUNS_MAX)

    def remove_runs(self) -> None:
        self._change("DELETE FROM lost")

    # --- the connection ------------------------------------------------------------------

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreFailed(f"{self.folder}: closed")
        return self._connection

    def _query(self, sql: str, *values: object) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._opened().execute(sql, values)
        except sqlite3.Error as error:
            raise self._error(error) from None

    def _change(self, sql: str, *values: object) -> int:
        return self._opened().execute(sql, values).rowcount

    def _each(self, sql: str, rows: Iterable[tuple[Any, ...]]) -> None:
        self._opened().executemany(sql, rows)

    def _undo(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            # On a full disk: what the WAL takes can be used again once it is in the database.
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error:
            pass  # what led here is told

    def _error(self, error: sqlite3.Error) -> OutboxError:
        return store_error(error, self.folder)


def connect(path: Path) -> sqlite3.Connection:
    """Open the database for this process alone; it needs no shared memory then."""
    connection = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    return connection


def number_of(path: Path) -> int:
    """Return the N of damaged-N; 0 if the name is another one."""
    found = re.fullmatch("[a-z]+-([1-9][0-9]{0,8})", path.name)
    return int(found[1]) if found else 0


def sync(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
