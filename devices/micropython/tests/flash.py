"""A flash chip in memory that fails when it is told to, with real littlefs on it.

What it does: a block device for VfsLfs2 that counts erases and bytes, and at its operation k
loses the power (with the write half done) or refuses. What it does not: wear out.

Invariant: what unmount() returns is what the chip held when the power went. Up to then the
chip lives on as a ghost, since MicroPython closes open files while PowerCut is passed up.
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
        self.torn = torn  # quarters of the write that are done when the power goes
        self.refuses = refuses
        self.operations = 0
        self.erases = 0
        self.programmed = 0
        self._left = None  # what the power cut left

    def readblocks(self, block, buffer, offset=0):
        begin = block * BLOCK + offset
        buffer[:] = memoryview(self.data)[begin : begin + len(buffer)]
        return 0

    def writeblocks(self, block, buffer, offset=0):
        self.programmed += len(buffer)
        return self._change(block * BLOCK + offset, buffer)

    def ioctl(self, operation, argument):
        if operation == 4:
            return self.blocks
        if operation == 5:
            return BLOCK
        if operation == 6:
            self.erases += 1
            return self._change(argument * BLOCK, b"\xff" * BLOCK)
        return 0

    def _change(self, begin, content):
        self.operations += 1
        if self.operations in self.refuses:
            return -EIO
        if self.operations == self.cut_at:
            done = len(content) * self.torn // 4
            self.data[begin : begin + done] = content[:done]
            self._left = bytearray(self.data)
            raise PowerCut
        self.data[begin : begin + len(content)] = content
        return 0

    def format(self):
        vfs.VfsLfs2.mkfs(self)

    def mount(self, path="/flash"):
        vfs.mount(vfs.VfsLfs2(self), path)

    def unmount(self, path="/flash"):
        """Unmount, and return what is on the chip."""
        vfs.umount(path)
        return self._left or bytearray(self.data)
