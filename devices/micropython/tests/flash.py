"""A flash chip in memory that fails when it is told to, with real littlefs on it.

What it does: a block device for VfsLfs2 that counts erases and bytes, and at its operation k
loses the power (with the write half done) or refuses. What it does not: wear out.

Invariant: what unmount() returns is what the chip held when the power went.
"""

import vfs

BLOCK = 4096
EIO = 5


class PowerCut(BaseException):
    """Not an Exception: nothing in the library may catch it."""


class Flash:
    """`cut_at`: the operation in which the power goes. `refuses`: those that fail."""

    def __init__(self, blocks, data=None, cut_at=0, torn=0, refuses=()):
        self.blocks = blocks
        self.data = data or bytearray(b"\xff" * (blocks * BLOCK))
        self.cut_at = cut_at
        self.torn = torn
        self.refuses = refuses
        self.operations = 0
        self.erases = 0
        self.programmed = 0
        self.dead = False

    def readblocks(self, block, buffer, offset=0):
        if self.dead:
            raise PowerCut
        begin = block * BLOCK + offset
        buffer[:] = memoryview(self.data)[begin : begin + len(buffer)]
        return 0

    def writeblocks(self, block, buffer, offset=0):
        if not self._works():
            return -EIO
        begin = block * BLOCK + offset
        if self.dead:
            # A part of the page was written, or each of its bits only half of the way.
            written = len(buffer) * self.torn // 4
            self.data[begin : begin + written] = buffer[:written]
            raise PowerCut
        self.programmed += len(buffer)
        self.data[begin : begin + len(buffer)] = buffer
        return 0

    def ioctl(self, operation, argument):
        if operation == 4:
            return self.blocks
        if operation == 5:
            return BLOCK
        if operation == 6:
            if not self._works():
                return -EIO
            begin = argument * BLOCK
            if self.dead:
                half = BLOCK * self.torn // 4
                self.data[begin : begin + half] = b"\xff" * half
                raise PowerCut
            self.erases += 1
            self.data[begin : begin + BLOCK] = b"\xff" * BLOCK
        return 0

    def _works(self):
        if self.dead:
            raise PowerCut
        self.operations += 1
        if self.operations == self.cut_at:
            self.dead = True
        return self.operations not in self.refuses

    def format(self):
        vfs.VfsLfs2.mkfs(self)

    def mount(self, path="/flash"):
        vfs.mount(vfs.VfsLfs2(self), path)

    def unmount(self, path="/flash"):
        """Unmount, and return what is on the chip now."""
        vfs.umount(path)
        data = bytearray(self.data)
        # The garbage collector still closes files that the power cut left open: let it, here.
        self.dead = False
        self.cut_at = 0
        self.refuses = ()
        return data
