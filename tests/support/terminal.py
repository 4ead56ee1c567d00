"""A terminal of 80 columns and 24 lines, in which a test types what a document shows.

What it does: runs a command in a shell on a pseudo-terminal, keeps what appears there, and
presses keys. What it does not: know what ought to appear.

Invariant: a command that waits for a key is not given one that the test does not press, so a
pager is found out; and nothing that was started is left running.
"""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

CTRL_C = "\x03"
# Colours, cursor movements and titles.
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[()].|[=>78c])")


class Terminal:
    """One command, typed. Use as a context manager: it has ended when the block is left."""

    def __init__(self, command: str, folder: Path, environment: Mapping[str, str]) -> None:
        self.command = command
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self._process = subprocess.Popen(
            ["setsid", "--ctty", "bash", "-c", command],
            cwd=folder,
            env={"TERM": "xterm", **environment},
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self._bytes = bytearray()
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def output(self) -> str:
        """What has appeared, without escape sequences."""
        text = self._bytes.decode("utf-8", "replace").replace("\r", "")
        return _ESCAPE.sub("", text)

    def press(self, keys: str) -> None:
        """Type on the keyboard."""
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, seconds: float = 30) -> None:
        """Wait until this has appeared."""
        with self._changed:
            found = self._changed.wait_for(lambda: text in self.output, seconds)
        assert found, f"waited {seconds} s for {text!r}: {self}"

    def wait_end(self, seconds: float = 60) -> int:
        """Wait until the command has ended by itself; return its exit code."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"has not ended after {seconds} s: {self}") from None
        self._reader.join(10)  # of what runs on behind it there is no more to see
        return code

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # nobody is left at the other side
                return
            with self._changed:
                self._bytes += data
                self._changed.notify_all()

    def __str__(self) -> str:
        return f"{self.command}\n{self.output}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(10)
        os.close(self._master)
