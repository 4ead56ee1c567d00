"""The library on its own, to try it and to prove it: adds events, and says what became of each.

    python -m devices.python.host --host H --port P --device ID --store DIR
        --count N --interval-ms M --hold-ms T [--username U --password-file F --cafile C]

What it does: adds N events, one every M ms, while sending; prints a line at once for each
that was kept, stored, rejected or dropped; ends with 0 when N are added and nothing waits.
--count 0 only sends what an earlier run left in DIR. What it does not: measure anything; or
hold events in memory, whatever T is: on a computer each is kept before add() returns.

Invariant: SIGTERM and Ctrl-C end it with 0 between two events; all that was added is kept.
"""

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path

from devices.python.telemetry import Outbox, OutboxError, PahoLink


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one write, so that a kill leaves no half of it


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="devices.python.host")
    for name in ("host", "device", "store"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("port", "count", "interval-ms", "hold-ms"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--username")
    parser.add_argument("--password-file", type=Path)
    parser.add_argument("--cafile")
    return parser.parse_args()


def run(outbox: Outbox, link: PahoLink, count: int, interval_seconds: float) -> None:
    """Add and send until there is nothing left, or a signal comes."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    next_add = time.monotonic()
    added = 0
    while not signals and (added < count or outbox.waiting()):
        if added < count and time.monotonic() >= next_add:
            next_add += interval_seconds
            added += 1
            say(f"kept {outbox.add('test', added)}")
        until_add = next_add - time.monotonic() if added < count else 1.0
        link.loop(max(0.0, min(0.01, until_add)))


def main() -> int:
    given = options()
    logging.basicConfig(level=logging.ERROR)  # its log is read line by line
    password = None
    if given.password_file:
        password = given.password_file.read_text("utf-8").rstrip("\r\n")
    try:
        outbox = Outbox(given.store, given.device)
    except OutboxError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    outbox.on_stored = lambda event_id: say(f"stored {event_id}")
    outbox.on_rejected = lambda event: say(f"rejected {event.event_id} {event.reason}")
    outbox.on_dropped = lambda event_id: say(f"dropped {event_id}")
    link = PahoLink(outbox, given.host, given.port, given.username, password, given.cafile)
    run(outbox, link, given.count, given.interval_ms / 1000)
    link.close()
    outbox.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
