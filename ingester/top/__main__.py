"""A live view of the pipeline on the terminal. Run by `python -m ingester.top`.

What it does: listens to events, ACKs, dead letters and the status, draws what it sees twice
a second, and tries again while the broker is away. What it does not: publish, or ask the
database; whoever may read the topics may run it.

Invariant: whatever ends it, the terminal is as it was before, and the broker has nothing
left for it: its session is clean and its subscriptions have QoS 0.

Exit codes: 0 after Ctrl-C, q or SIGTERM, 2 for wrong settings or an unreachable broker at
the start, 1 with a traceback for a bug.
"""

import argparse
import codecs
import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from types import FrameType
from typing import Self

from dotenv import load_dotenv

from ingester.settings import Settings, SettingsError
from ingester.tool_session import BrokerUnavailable, ToolSession
from ingester.top.frame import ASCII, UNICODE, Style, frame
from ingester.top.traffic import Traffic

# How long `q` and a signal may go unnoticed.
TURN_SECONDS = 0.1
FRAME_SECONDS = 0.5
# Between two tries to reach the broker again.
RETRY_SECONDS = 1.0
# What --once looks at. The retained status comes at once.
ONCE_SECONDS = 3.0
# Of a terminal that does not say how large it is, and of a file: those of the VT100.
COLUMNS, ROWS = 80, 24
STDIN, STDOUT = 0, 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# ECMA-48 and xterm's control sequences: the alternate screen, the cursor, the wrapping of
# lines (in case the terminal takes a character for wider than Unicode does).
BEGIN = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
END = "\x1b[?7h\x1b[?25h\x1b[?1049l"
# Before the text: behind a line that is full, the cursor is on its last character.
CLEAR_LINE = "\x1b[{}H\x1b[K"
# A terminal answers this at once (DSR, ECMA-48, section 8.3.35). One that has done so and does
# so no more has left: Docker tells a process nothing when the client of its `exec` is gone.
ASK, ANSWER = "\x1b[5n", b"\x1b[0n"
ASK_SECONDS = 30.0
ANSWER_SECONDS_MAX = 3 * ASK_SECONDS


class Screen:
    """The terminal, as long as it is taken by taken()."""

    def __init__(self) -> None:
        self._mode = termios.tcgetattr(STDIN) if os.isatty(STDIN) else None
        self._turned_at = self._shown_at = self._asked_at = float("-inf")
        self._answered_at: float | None = None

    @contextmanager
    def taken(self) -> Iterator[Self]:
        """Take the terminal while the block runs."""
        try:
            if self._mode:
                tty.setcbreak(STDIN, termios.TCSANOW)  # `q` without Enter, and not shown
            _write(BEGIN)
            yield self
        finally:
            # A terminal that takes nothing would keep us here: a second signal ends it.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            with suppress(OSError, termios.error):  # it is gone
                if self._mode:
                    termios.tcflush(STDIN, termios.TCIFLUSH)  # an answer is for us alone
                    termios.tcsetattr(STDIN, termios.TCSANOW, self._mode)
                _write(END)

    def turn(self, traffic: Traffic) -> bool:
        """Draw what was seen, if it is time to; return whether to go on."""
        if traffic.now - self._turned_at < TURN_SECONDS:
            return True
        self._turned_at = traffic.now
        try:
            # One that takes nothing (Ctrl-S, a line that hangs) must not keep us from hearing.
            is_ready = bool(select.select([], [STDOUT], [], 0)[1])
            if is_ready and traffic.now - self._shown_at >= FRAME_SECONDS:
                self._shown_at = traffic.now
                self._show(traffic)
                if traffic.now - self._asked_at >= ASK_SECONDS:
                    self._asked_at = traffic.now
                    _write(ASK)
            if b"q" in self._typed(traffic.now):
                return False
        except (OSError, EOFError):  # it is gone
            return False
        return self._answered_at is None or traffic.now - self._answered_at < ANSWER_SECONDS_MAX

    def _show(self, traffic: Traffic) -> None:
        columns, rows = os.get_terminal_size(STDOUT)
        columns, rows = columns or COLUMNS, rows or ROWS
        lines = frame(traffic, columns, rows, _style())
        lines += [""] * (rows - len(lines))
        _write("".join(CLEAR_LINE.format(n) + line for n, line in enumerate(lines, 1)))

    def _typed(self, now: float) -> bytes:
        """Return what has been typed, and note an answer of the terminal's in it."""
        if not self._mode or not select.select([STDIN], [], [], 0)[0]:
            return b""
        typed = os.read(STDIN, 1024)
        if not typed:
            raise EOFError
        if ANSWER in typed:
            self._answered_at = now
        return typed.lower()


def _write(text: str) -> None:
    data = text.encode("utf-8")
    while data:
        data = data[os.write(STDOUT, data) :]


def _style() -> Style:
    return UNICODE if codecs.lookup(sys.stdout.encoding).name == "utf-8" else ASCII


def live(settings: Settings, traffic: Traffic) -> None:
    """Draw until the user leaves. Raises BrokerUnavailable if it is so at the start."""
    screen: Screen | None = None
    with ExitStack() as stack:
        while True:
            try:
                with ToolSession(settings, traffic.subscriptions()) as session:
                    screen = screen or stack.enter_context(Screen().taken())
                    _tick(traffic)
                    traffic.connected()
                    while screen.turn(traffic):
                        messages = session.receive(TURN_SECONDS)
                        _tick(traffic)
                        traffic.take(messages)
                    return
            except BrokerUnavailable as error:
                if screen is None:
                    raise
                _tick(traffic)
                traffic.lost(str(error))
            until = time.monotonic() + RETRY_SECONDS
            while time.monotonic() < until:
                if not screen.turn(traffic):
                    return
                time.sleep(TURN_SECONDS)
                _tick(traffic)


def once(settings: Settings, traffic: Traffic) -> None:
    """Listen for a moment, and print one frame. Raises BrokerUnavailable."""
    with ToolSession(settings, traffic.subscriptions()) as session:
        _tick(traffic)
        traffic.connected()
        until = traffic.now + ONCE_SECONDS
        while traffic.now < until:
            messages = session.receive(until - traffic.now)
            _tick(traffic)
            traffic.take(messages)
    columns, rows = shutil.get_terminal_size((COLUMNS, ROWS))
    with suppress(BrokenPipeError):  # whoever reads has enough
        _write("\n".join(frame(traffic, columns, rows, _style())) + "\n")


def _tick(traffic: Traffic) -> None:
    traffic.tick(time.monotonic(), datetime.now(UTC))


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def main() -> int:
    """Show what happens until the user leaves; return the exit code."""
    parser = argparse.ArgumentParser("python -m ingester.top", description="Show what happens.")
    parser.add_argument("--once", action="store_true", help="print one frame, for scripts")
    arguments = parser.parse_args()
    load_dotenv(".env", interpolate=False)
    try:
        settings = Settings.from_env(os.environ)
    except SettingsError as error:
        print(f"top: {error}", file=sys.stderr)
        return 2
    if not arguments.once and not os.isatty(STDOUT):
        print("top: standard output is not a terminal; use --once", file=sys.stderr)
        return 2
    for number in SIGNALS:
        signal.signal(number, _leave)
    # A view that is suspended hears nothing, and the broker would have to keep it all.
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    traffic = Traffic(settings.topics, f"{settings.mqtt_host}:{settings.mqtt_port}")
    try:
        (once if arguments.once else live)(settings, traffic)
    except BrokerUnavailable as error:
        print(f"top: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
