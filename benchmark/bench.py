"""One running system with its devices, and the measurements on it.

What it does: the closed loop, the latency at a steady rate, and all of it at once; shows on stderr
how far it is. What it does not: start or stop anything; what is compared with what is run.py's.

Invariant: after each measurement the rows are counted, and it counts only if there is one for each
event that was ACKed.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2

from benchmark.fleet import Fleet, publishes
from benchmark.machine import CpuClock, memory_peak_mb
from tools.process import Process
from tools.stack import Stack

RESULTS = Path(__file__).resolve().parent / "results"
SINGLES_OUTSTANDING = 900
ARRAY_EVENTS = 50
# Arrays outstanding: more than one batch holds (ingest.EVENTS_MAX), as 900 singles are.
ARRAYS_OUTSTANDING = 200
WARMING_UP = 5_000
ROWS_SECONDS_MAX = 120.0
LOOK_SECONDS = 0.1

_run = itertools.count()  # no event id is used twice in a table


class BenchmarkError(Exception):
    """What was measured does not count: events are missing, or there are too many."""


class Size(NamedTuple):
    """How much is measured. Seconds of latency are those at each rate."""

    rounds: int
    singles: dict[str, int]
    arrays: dict[str, int]
    latency_seconds: dict[int, float]  # by events per second


class Bench:
    """A running system with its devices, and the measurements on it."""

    def __init__(self, name: str, stack: Stack, process: Process, fleet: Fleet) -> None:
        self._name = name
        self._stack = stack
        self._process = process
        self._fleet = fleet
        self._rows = self._count_rows()

    def closed_loop(self, what: str, count: int, events_each: int, outstanding: int) -> Any:
        """Measure the rate of events that are stored and ACKed, and what each costs."""
        packets = publishes(f"run-{next(_run)}", count, events_each, self._fleet.devices)
        events = count * events_each
        clock = CpuClock(
            system=self._process, broker=self._stack.mosquitto, database=self._stack.postgres
        )
        with progress(f"{self._name}: {what}", events) as show:
            seconds = self._fleet.closed_loop(packets, outstanding, show)
        cpu = clock.microseconds_each(events)
        cpu["devices"] = 1e6 * self._fleet.cpu_seconds / events
        self._expect_rows(events)
        return {"events_per_second": events / seconds, "cpu_microseconds": cpu}

    def latency(self, per_second: int, seconds: float) -> dict[str, float]:
        """Measure the time from when an event is due to its ACK."""
        count = round(per_second * seconds)
        packets = publishes(f"run-{next(_run)}", count, devices=self._fleet.devices)
        with progress(f"{self._name}: latency at {per_second:,}/s", len(packets)) as show:
            latencies = sorted(self._fleet.open_loop(packets, per_second, show))
        self._expect_rows(len(packets))
        return {
            "p50_ms": _percentile(latencies, 50) * 1e3,
            "p99_ms": _percentile(latencies, 99) * 1e3,
            "max_ms": latencies[-1] * 1e3,
        }

    def warm_up(self) -> None:
        """Leave the cold start behind."""
        self.closed_loop("warming up", WARMING_UP, 1, SINGLES_OUTSTANDING)

    def all(self, size: Size) -> dict[str, Any]:
        """Measure everything, the cold start left out."""
        self.warm_up()
        # First, while each system has stored the same: the disk is at work on what a closed
        # loop has written for a while longer, and the faster one has written more.
        latency = {
            str(per_second): self.latency(per_second, seconds)
            for per_second, seconds in size.latency_seconds.items()
        }
        name = self._name.split()[0]
        singles = self.closed_loop("singles", size.singles[name], 1, SINGLES_OUTSTANDING)
        arrays = self.closed_loop("arrays", size.arrays[name], ARRAY_EVENTS, ARRAYS_OUTSTANDING)
        memory = memory_peak_mb(self._process)
        return {"singles": singles, "arrays": arrays, "latency": latency, "memory_mb": memory}

    def _count_rows(self) -> int:
        # Those of publishes() here alone: with millions of others, all would take seconds.
        sql = "SELECT count(*) FROM events WHERE event_id LIKE 'run-%'"
        return int(self._stack.postgres.psql(sql))

    def _expect_rows(self, events: int) -> None:
        before, self._rows = self._rows, self._count_rows()
        if self._rows - before != events:
            raise BenchmarkError(
                f"{self._name}: {events} events were ACKed, {self._rows - before} are rows"
            )


def _percentile(ordered: list[float], percent: int) -> float:
    """The smallest of the values that is not less than so many percent of them."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on stderr how far it is: a terminal sees it move, a file gets one line."""
    began_at = shown_at = time.monotonic()
    moves = sys.stderr.isatty()

    def show(done: int) -> None:
        nonlocal shown_at
        if moves and time.monotonic() - shown_at > 0.2:
            shown_at = time.monotonic()
            print(f"\r{what}: {done:,} of {total:,} ", end="", file=sys.stderr, flush=True)

    yield show
    seconds = time.monotonic() - began_at
    begin = "\r" if moves else ""
    print(f"{begin}{what}: {total:,} in {seconds:.1f} s", file=sys.stderr, flush=True)


def wait_for_rows(
    stack: Stack,
    table: str,
    rows_min: int,
    wait: Callable[[float], Any],
    show: Callable[[int], None],
) -> None:
    """Wait until the table, which need not be there yet, has so many rows.

    `wait` is called with the seconds between two looks; a look takes 10 ms at most.
    """
    conninfo: dict[str, Any] = stack.postgres.conninfo()
    connection = psycopg2.connect(**conninfo)
    connection.autocommit = True
    with closing(connection), connection.cursor() as cursor:
        rows = 0
        deadline = time.monotonic() + ROWS_SECONDS_MAX
        while rows < rows_min:
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{table} has {rows} rows after {ROWS_SECONDS_MAX:.0f} s")
            wait(LOOK_SECONDS)
            cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (table,))
            if cursor.fetchone()[0]:
                cursor.execute(f"SELECT count(*) FROM {table}")
                rows = cursor.fetchone()[0]
                show(rows)
