"""The number of the last event that is kept, beside the database.

What it does: shows at the next start that what the database had at its end is missing. What it
does not: wait for the disk: after a power cut an older number may be there.

Invariant: it is written after the event is on the disk, so what it names was kept.
"""

import os
import struct
from contextlib import suppress
from pathlib import Path
from zlib import crc32

RECORD = struct.Struct("<QI")  # the number and its checksum


class LastNumber:
    """The file; a damaged one says nothing, as if it were 0."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.number = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        content = os.pread(self._descriptor, RECORD.size, 0)
        if len(content) == RECORD.size:
            number, checksum = RECORD.unpack(content)
            if crc32(content[:8]) == checksum:
                self.number = number

    def write(self, number: int) -> None:
        if number <= self.number:
            return
        self.number = number
        content = struct.pack("<Q", number)
        with suppress(OSError):  # an older number shows less, and nothing wrong
            os.pwrite(self._descriptor, RECORD.pack(number, crc32(content)), 0)

    def close(self) -> None:
        os.close(self._descriptor)
