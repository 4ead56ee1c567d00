"""What can go wrong with an outbox: one closed family, by who has to do something about it.

What it does: names the errors, and tells them apart by SQLite's code. What it does not:
handle them.

Invariant: whatever SQLite or the file system raises becomes exactly one of these.
"""

import errno
import sqlite3


class OutboxError(Exception):
    """Whatever an outbox raises. An event whose add() raised it was not taken."""


class EventRefused(OutboxError):
    """The ingester would reject this event, or it is too large. It is the caller's."""


class StoreFull(OutboxError):
    """The disk is full. Nothing that was kept is harmed; later it may work."""


class StoreLocked(OutboxError):
    """Another process has this store, or holds its file."""


class StoreReadOnly(OutboxError):
    """The folder or a file in it may not be written, or cannot be made."""


class StoreDamaged(OutboxError):
    """The file is damaged, seen while it was in use. The next start sets it aside."""


class StoreFailed(OutboxError):
    """The disk failed, or the store is closed."""


BY_CODE: dict[int, type[OutboxError]] = {
    sqlite3.SQLITE_FULL: StoreFull,
    sqlite3.SQLITE_BUSY: StoreLocked,
    sqlite3.SQLITE_LOCKED: StoreLocked,
    sqlite3.SQLITE_READONLY: StoreReadOnly,
    sqlite3.SQLITE_CANTOPEN: StoreReadOnly,
    sqlite3.SQLITE_PERM: StoreReadOnly,
    sqlite3.SQLITE_CORRUPT: StoreDamaged,
    sqlite3.SQLITE_NOTADB: StoreDamaged,
    # What is no table or column of ours.
    sqlite3.SQLITE_ERROR: StoreDamaged,
    sqlite3.SQLITE_CONSTRAINT: StoreDamaged,
}


def store_error(error: sqlite3.Error, where: object) -> OutboxError:
    """Return what this error of SQLite is to the caller."""
    code = getattr(error, "sqlite_errorcode", -1) & 0xFF  # without what makes it extended
    return BY_CODE.get(code, StoreFailed)(f"{where}: {error}")


def file_error(error: OSError, where: object) -> OutboxError:
    """Return what this error of the file system is to the caller."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"{where}: {error}")
    if error.errno in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return StoreFailed(f"{where}: {error}")
    return StoreReadOnly(f"{where}: {error}")
