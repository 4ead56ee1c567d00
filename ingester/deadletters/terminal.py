"""Text for a terminal: a tool's tables, payloads and progress.

What it does: turns what devices sent, or what was counted, into lines. What it does not:
print them, but for the progress.

Invariant: a line holds nothing that steers a terminal, whatever a device sent.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence

HEX_BYTES = 16
# Between two reports of a long run: on a terminal, and into a file.
REPORT_SECONDS = 0.2
REPORT_SECONDS_FILE = 5.0


def printable(text: str) -> str:
    """Return it with an escape for each character that steers, or that cannot be seen."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def payload_lines(payload: bytes) -> list[str]:
    """Return the payload as text, JSON indented; a hex dump if it is not UTF-8."""
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        return list(_hex_dump(payload))
    return [printable(line) for line in _indented(text).split("\n")]


def _indented(text: str) -> str:
    """Return JSON with a line for each field; as it is, if it would then say something else."""
    try:
        document = json.loads(text)
        same = json.dumps(document, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text
    # A key that comes twice, a number of 30 digits, an escape.
    if re.sub(r"\s", "", same) != re.sub(r"\s", "", text):
        return text
    return json.dumps(document, ensure_ascii=False, indent=2)


def _hex_dump(payload: bytes) -> Iterator[str]:
    for begin in range(0, len(payload), HEX_BYTES):
        part = payload[begin : begin + HEX_BYTES]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        yield f"{begin:08x}  {part.hex(' '):<{HEX_BYTES * 3}} {text}"


class Ticker:
    """How far a long run is: on stderr, in place if that is a terminal."""

    def __init__(self, done: str) -> None:
        """`done` is what stands before the number: replayed, deleted."""
        self._done = done
        self._in_place = sys.stderr.isatty()
        self._next_at = time.monotonic() + 1.0  # what is over by then needs none

    def tick(self, number: int, total: int | None = None) -> None:
        """Say it if it is time to."""
        now = time.monotonic()
        if now < self._next_at:
            return
        self._next_at = now + (REPORT_SECONDS if self._in_place else REPORT_SECONDS_FILE)
        text = f"{self._done} {number}" + (f" of {total}" if total is not None else "")
        begin, end = ("\r\x1b[K", "") if self._in_place else ("", "\n")
        print(begin + text, end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take it off the terminal."""
        if self._in_place:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
