"""The part of the outbox that survives a power cut: files in one folder of the flash.

What it does: keeps events as lines of segment files, and beside them the state: salt, boot
number, and which events were dropped. What it does not: decide what is kept, or format or
mount anything. It is made for littlefs, where a file has its old content until it is closed;
on another file system a line has a checksum, and a broken one is skipped and counted.

Invariant: a record is taken off the flash only once it is answered or is noted as dropped.
Any call that writes can fail; then it says so, and nothing that was kept before is touched.
"""

import os
from binascii import crc32

SEGMENT_BYTES = 4096  # a block of the flash: littlefs rewrites the last block at each append
SEGMENTS_MIN = 2
BLOCKS_SPARE = 8  # of the file system: littlefs needs some to move what it writes
HEAD_BYTES = 9  # the checksum and a space in front of each record
FILE_BYTES_MAX = 65_536  # a larger file is not ours, whatever its name is
STATE = "state"
EFBIG = 27
ENOSPC = 28


def _line(record: bytes) -> bytes:
    return b"%08x %s\n" % (crc32(record) & 0xFFFFFFFF, record)


def _record(line: bytes) -> bytes | None:
    """Return what the line holds, or None if it is damaged."""
    record = line[HEAD_BYTES:-1]
    is_whole = line[-1:] == b"\n" and line[:HEAD_BYTES] == b"%08x " % (crc32(record) & 0xFFFFFFFF)
    return record if record and is_whole else None


class Segment:
    """One file: `size` bytes of it are ours, and `waiting` of its records not answered yet."""

    def __init__(self, number: int, size: int, waiting: int) -> None:
        self.number = number
        self.size = size
        self.waiting = waiting


class FolderStore:
    """A folder on the flash; its parent must be there. `bytes_max` bounds what it takes."""

    def __init__(self, folder: str, bytes_max: int = 131072) -> None:
        self._folder = folder
        self._segments_max = max(SEGMENTS_MIN, bytes_max // SEGMENT_BYTES)
        self._segments: list[Segment] = []  # oldest first
        self._first = 1  # segments with smaller numbers were dropped
        self._next = 1  # the number of the next segment
        # Where to read on: the segment's number, and an offset in it.
        self._at = 0
        self._offset = 0
        self._unsafe_tail = False  # an append to it failed: what it ends with is not known
        self.salt = ""
        self.boot = 0
        self.lost: list[tuple[str, int, int, int]] = []  # what dropped() found, until it was told
        self.damaged = 0  # files and records that could not be read
        self.errors = 0  # calls that the flash refused

    # --- start --------------------------------------------------------------------------

    def begin(self, new_salt: str) -> None:
        """Read what is there, and begin the next boot; with `new_salt` where there is none."""
        try:
            os.mkdir(self._folder)
        except OSError:
            pass  # it is there already, or the writes below fail
        self._read_state()
        if not self.salt:
            self.salt, self.boot, self.lost = new_salt, 0, []
        self.boot += 1
        self._find_segments()
        if not self.save_state():
            # The next boot will not know of this one, so nothing of it may come again.
            self.salt, self.boot = new_salt, 1
        self._bound()

    def _read_state(self) -> None:
        """Read salt, boot number, the first segment that counts, and what is lost."""
        from json import loads

        try:
            with open(self._path(STATE), "rb") as file:
                line = file.readline()
        except OSError:
            return  # none: the store is new
        record = _record(line)
        if record is None:
            if line:  # an empty one is what a power cut leaves of a new file
                self.damaged += 1
            return
        self.salt, self.boot, self._first, lost = loads(record)
        self.lost = [tuple(run) for run in lost]

    def _find_segments(self) -> None:
        self._next = self._first
        try:
            names = os.listdir(self._folder)
        except OSError:
            self.errors += 1
            return
        for name in names:
            if name.isdigit():
                self._segments.append(Segment(int(name), 0, 0))
            elif name not in (STATE, STATE + ".new"):
                self.damaged += 1
        self._segments.sort(key=lambda segment: segment.number)
        for segment in self._segments[:]:
            self._next = max(self._next, segment.number + 1)
            # Before the first: dropped, but the power went before the file did.
            if segment.number >= self._first and not self._count(segment):
                self._segments.remove(segment)  # cannot be read now; perhaps at the next boot
            elif not segment.waiting:
                self._remove(segment)

    def _count(self, segment: Segment) -> bool:
        """Find size and records of a segment; tell whether it could be read."""
        try:
            if os.stat(self._path(segment.number))[6] > FILE_BYTES_MAX:
                raise OSError(EFBIG)
            with open(self._path(segment.number), "rb") as file:
                while True:
                    # Without a limit: MicroPython would take as much memory as the limit says.
                    line = file.readline()
                    if not line:
                        return True
                    segment.size += len(line)
                    # Behind a damaged line nothing is appended: it may have no end.
                    self._unsafe_tail = _record(line) is None
                    if self._unsafe_tail:
                        self.damaged += 1
                    else:
                        segment.waiting += 1
        except OSError:
            self.damaged += 1
            return False

    def _bound(self) -> None:
        """Take no more than the file system has, and leave it room to work in."""
        try:
            status = os.statvfs(self._folder)
        except OSError:
            return
        free = status[0] * (status[3] - BLOCKS_SPARE) // SEGMENT_BYTES + len(self._segments)
        self._segments_max = max(SEGMENTS_MIN, min(self._segments_max, free))

    # --- what is in it ------------------------------------------------------------------

    def waiting(self) -> int:
        """Return how many records are kept and not answered."""
        return sum(segment.waiting for segment in self._segments)

    def all_read(self) -> bool:
        """Tell whether read() would find nothing."""
        if not self._segments:
            return True
        last = self._segments[-1]
        return last.number < self._at or (last.number == self._at and self._offset >= last.size)

    def read(self, count_max: int, bytes_max: int) -> list[tuple[int, bytes]]:
        """Return the next records, each with the number of its segment; at least one if any."""
        for segment in self._segments:
            if segment.number < self._at:
                continue
            if segment.number > self._at:
                self._at, self._offset = segment.number, 0
            if self._offset < segment.size:
                found, self._offset = self._read_from(
                    segment, self._offset, segment.size, count_max, bytes_max
                )
                if found:
                    return [(segment.number, record) for record in found]
                self._offset = segment.size  # unreadable now: the next boot looks at it again
        return []

    def _read_from(
        self, segment: Segment, offset: int, end: int, count_max: int, bytes_max: int
    ) -> tuple[list[bytes], int]:
        """Return records from `offset` on, and where the next one is."""
        found: list[bytes] = []
        try:
            with open(self._path(segment.number), "rb") as file:
                file.seek(offset)
                while offset < end and len(found) < count_max:
                    line = file.readline()
                    bytes_max -= len(line)
                    if not line or (found and bytes_max < 0):
                        break
                    offset += len(line)
                    record = _record(line)
                    if record is not None:
                        found.append(record)
        except OSError:
            self.errors += 1
        return found, offset

    # --- what changes it ----------------------------------------------------------------

    def is_full(self, record: bytes) -> bool:
        """Tell whether the record has no room unless something is dropped."""
        return len(self._segments) >= self._segments_max and not self._fits(record)

    def _fits(self, record: bytes) -> bool:
        if self._unsafe_tail or not self._segments:
            return False
        return self._segments[-1].size + HEAD_BYTES + len(record) < SEGMENT_BYTES

    def append(self, records: list[bytes], are_read: int) -> tuple[int, int]:
        """Keep as many of the records as one segment takes, from the first on.

        Return how many, 0 if the flash refuses, and the segment's number. The first `are_read`
        are in memory already and are not for read(), which must then be at the end.
        """
        if not self._fits(records[0]):
            self._segments.append(Segment(self._next, 0, 0))
            self._next += 1
        segment = self._segments[-1]
        size = segment.size
        lines: list[bytes] = []
        for record in records:
            line = _line(record)
            if lines and size + len(line) > SEGMENT_BYTES:
                break
            lines.append(line)
            size += len(line)
            if len(lines) <= are_read:
                self._at, self._offset = segment.number, size
        if not self._write(self._path(segment.number), "ab" if segment.size else "wb", lines):
            self._unsafe_tail = True
            if not segment.size:
                self._remove(segment)
            return 0, 0
        self._unsafe_tail = False
        segment.size = size
        segment.waiting += len(lines)
        return len(lines), segment.number

    def answered(self, number: int) -> None:
        """Forget one record of the segment; the file goes with its last one."""
        for segment in self._segments:
            if segment.number == number:
                segment.waiting -= 1
                if segment.waiting <= 0:
                    self._remove(segment)
                return

    def oldest(self) -> tuple[int, list[bytes], int]:
        """Return the oldest segment's number, its records, and how many of them were read."""
        segment = self._segments[0]
        end = segment.size if segment.number < self._at else 0
        if segment.number == self._at:
            end = self._offset
        read, _ = self._read_from(segment, 0, end, SEGMENT_BYTES, SEGMENT_BYTES * 2)
        rest, _ = self._read_from(segment, end, segment.size, SEGMENT_BYTES, SEGMENT_BYTES * 2)
        return segment.number, read + rest, len(read)

    def drop(self, number: int, lost: list[tuple[str, int, int, int]]) -> None:
        """Give the oldest segment up, once it is noted on the flash that its events are lost."""
        self._first, self.lost = number + 1, lost
        is_noted = self.save_state()
        self._remove(self._segments[0])
        if not is_noted:  # on a full flash there is room only now
            self.save_state()

    def save_state(self) -> bool:
        """Write the state; tell whether that worked."""
        from json import dumps

        line = _line(dumps([self.salt, self.boot, self._first, self.lost]).encode())
        path = self._path(STATE)
        if not self._write(path + ".new", "wb", [line]):
            return False
        try:
            os.rename(path + ".new", path)
        except OSError:
            self.errors += 1
            return False
        return True

    # --- the flash ----------------------------------------------------------------------

    def _path(self, name: str | int) -> str:
        return "%s/%s" % (self._folder, name)

    def _write(self, path: str, mode: str, lines: list[bytes]) -> bool:
        try:
            with open(path, mode) as file:
                for line in lines:
                    if file.write(line) != len(line):
                        raise OSError(ENOSPC)
                file.flush()  # on a computer, close() alone does not bring it to the disk
            return True
        except OSError:
            self.errors += 1
            return False

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        try:
            os.remove(self._path(segment.number))
        except OSError:
            self.errors += 1  # the next boot finds it, sends it again, and removes it then
