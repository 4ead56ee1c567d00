"""How the cost of an event grows: with the devices, with the rows, with the events per array.

What it does: measures the ingester with more and more of one thing while all else stays as it is,
and says which sizes did not fit the machine. What it does not: compare with anything.

Invariant: the load is the same at each size of a part; what is measured at all sizes took turns,
so that a machine that becomes slower bends no curve. Only the rows are filled once, upwards.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmark import plot, queries, report
from benchmark.bench import RESULTS, SINGLES_OUTSTANDING, Bench, progress
from benchmark.fleet import Fleet
from benchmark.machine import describe, memory_peak_mb
from tools.process import many_open_files, open_files_max
from tools.stack import Postgres, Stack

ROUNDS = 3
EVENTS = 40_000  # of each closed loop
LATENCY_PER_SECOND = 200
LATENCY_SECONDS = 5
DEVICES = (1, 10, 100, 1_000, 10_000)
ROWS = (10_000, 100_000, 1_000_000, 10_000_000, 30_000_000, 100_000_000)
# A year of so many devices that the rows of all sizes look alike.
YEAR_ROWS = ROWS[-1]
# Rows that are filled anew for each round, so that those measured before do not count.
FILLED_EACH_ROUND_MAX = 100_000
FILL_SECONDS_MAX = 600
DISK_FREE_BYTES_MIN = 8_000_000_000
ELEMENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)
# Events outstanding, in messages that the bounds below allow: more than one batch holds.
EVENTS_OUTSTANDING = 10_000
ARRAYS_OUTSTANDING_MIN = 20
# Files that the broker and the devices have open besides the connections.
OTHER_FILES = 200


def devices() -> dict[str, list[Any]]:
    """Measure with so many devices connected, all of which take turns to publish."""
    sizes = [size for size in DEVICES if size + OTHER_FILES <= open_files_max()]
    _tell_left_out("devices", DEVICES, sizes, f"a process may open {open_files_max()} files")
    results: dict[str, list[Any]] = {str(size): [] for size in sizes}
    for number in range(1, ROUNDS + 1):
        for size in sizes[:: 1 if number % 2 else -1]:
            with Stack() as stack, many_open_files(), Fleet(stack.ports.mqtt, size) as fleet:
                bench = Bench(f"{size:,} devices {number}/{ROUNDS}", stack, stack.ingester, fleet)
                bench.warm_up()
                results[str(size)].append(_singles(bench, stack))
    return results


def rows() -> dict[str, list[Any]]:
    """Measure with so many rows in the table before: as many as fit time and disk."""
    results: dict[str, list[Any]] = {}
    with Stack() as stack, Fleet(stack.ports.mqtt) as fleet:
        Bench("rows", stack, stack.ingester, fleet).warm_up()
        filled_seconds = 0.0
        for before, size in zip((0, *ROWS), ROWS, strict=False):
            if reason := _does_not_fit(stack, size, filled_seconds, before):
                _tell_left_out("rows", ROWS, [int(done) for done in results], reason)
                break
            began_at = time.monotonic()
            with progress("rows: filling", size):
                queries.load_up_to(stack.postgres, size, YEAR_ROWS)
            filled_seconds += time.monotonic() - began_at
            results[str(size)] = []
            for number in range(1, ROUNDS + 1):
                if size <= FILLED_EACH_ROUND_MAX:
                    stack.postgres.psql("TRUNCATE events")
                    queries.load_up_to(stack.postgres, size, YEAR_ROWS)
                bench = Bench(f"{size:,} rows {number}/{ROUNDS}", stack, stack.ingester, fleet)
                results[str(size)].append(_singles(bench, stack))
    return results


def elements() -> dict[str, list[Any]]:
    """Measure with so many events in each array."""
    results: dict[str, list[Any]] = {str(size): [] for size in ELEMENTS}
    for number in range(1, ROUNDS + 1):
        with Stack() as stack, Fleet(stack.ports.mqtt) as fleet:
            bench = Bench(f"elements {number}/{ROUNDS}", stack, stack.ingester, fleet)
            bench.warm_up()
            for size in ELEMENTS[:: 1 if number % 2 else -1]:
                outstanding = max(EVENTS_OUTSTANDING // size, ARRAYS_OUTSTANDING_MIN)
                outstanding = min(outstanding, SINGLES_OUTSTANDING)
                count = max(EVENTS // size, 4 * outstanding)
                results[str(size)].append(_closed_loop(bench, stack, count, size, outstanding))
    return results


PARTS: dict[str, Callable[[], dict[str, list[Any]]]] = {
    "devices": devices,
    "elements": elements,
    "rows": rows,
}
_X_LABELS = {
    "devices": "connected devices",
    "elements": "events per array",
    "rows": "rows in the table before",
}


def run(name: str, parts: Sequence[str]) -> None:
    """Measure these parts, or all; keep the figures, beside those that another run has kept."""
    plot.require()
    file = RESULTS / f"{name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results["machine"] = describe()
    for part in parts or PARTS:
        results[part] = PARTS[part]()
        file.write_text(json.dumps(results, indent=1) + "\n")
        draw(name, part, results[part])
    measured = {part: results[part] for part in PARTS if part in results}
    text = report.growth(name, results["machine"], measured)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def draw(name: str, part: str, results: dict[str, list[Any]]) -> None:
    """Draw a part into benchmark/results."""

    def line(*keys: str) -> list[tuple[float, float]]:
        return [(int(size), report.median(results, size, path=keys)) for size in results]

    cpu = {
        "ingester": line("cpu_microseconds", "system"),
        "broker": line("cpu_microseconds", "broker"),
        "database": line("cpu_microseconds", "database"),
        "the devices": line("cpu_microseconds", "devices"),
    }
    panels = [
        plot.Panel("CPU us per event", cpu),
        plot.Panel("events/s stored and ACKed", {"closed loop": line("events_per_second")}),
    ]
    if part != "elements":
        at = f"to the ACK at {LATENCY_PER_SECOND}/s, ms"
        panels.append(plot.Panel(at, {key[:3]: line(key) for key in ("p50_ms", "p99_ms")}))
    plot.draw(RESULTS / f"{name}-{part}.png", _X_LABELS[part], panels)


def _singles(bench: Bench, stack: Stack) -> Any:
    # The latency first: the disk is at work on what a closed loop has written for a while longer.
    latency = bench.latency(LATENCY_PER_SECOND, LATENCY_SECONDS)
    return latency | _closed_loop(bench, stack, EVENTS, 1, SINGLES_OUTSTANDING)


def _closed_loop(bench: Bench, stack: Stack, count: int, size: int, outstanding: int) -> Any:
    wal_before, transactions_before = _database_counts(stack.postgres)
    figures = bench.closed_loop(f"{count:,} of {size}", count, size, outstanding)
    wal, transactions = _database_counts(stack.postgres)
    events = count * size
    return figures | {
        "events_per_commit": events / max(1, transactions - transactions_before - 1),
        "wal_bytes": (wal - wal_before) / events,
        "memory_mb": {
            "ingester": memory_peak_mb(stack.ingester),
            "broker": memory_peak_mb(stack.mosquitto),
        },
    }


def _database_counts(postgres: Postgres) -> tuple[int, int]:
    """Return the bytes of WAL ever written, and the transactions; this is one of them."""
    found = postgres.psql("SELECT pg_current_wal_insert_lsn() - '0/0', txid_current()")
    wal, transactions = found.split("|")
    return int(wal), int(transactions)


def _does_not_fit(stack: Stack, size: int, filled_seconds: float, filled: int) -> str:
    """Return why so many rows do not fit, judged by those that were filled before; or nothing."""
    if filled < 1_000_000:
        return ""
    seconds = filled_seconds + filled_seconds / filled * (size - filled)
    if seconds > FILL_SECONDS_MAX:
        return f"filling {size:,} would take {seconds / 60:.0f} minutes"
    bytes_each = int(stack.postgres.psql("SELECT pg_total_relation_size('events')")) / filled
    needed = bytes_each * (size - filled) + DISK_FREE_BYTES_MIN
    if needed > shutil.disk_usage(stack.folder).free:
        return f"{size:,} take {bytes_each * size / 1e9:.0f} GB, and the disk has no room for that"
    return ""


def _tell_left_out(part: str, wanted: Sequence[int], measured: Sequence[int], why: str) -> None:
    for size in wanted:
        if size not in measured:
            print(f"{part}: not with {size:,}: {why}", file=sys.stderr, flush=True)
