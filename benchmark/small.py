"""The ingester on a small machine: one core and 1 GB for broker, database and ingester together.

What it does: starts the three on one core and in one memory cgroup, which counts their page cache
too; the devices run on the other cores, outside of it. What it does not: make the core as slow as
a Raspberry Pi's.

Invariant: what the three start is inside as they are. Where no cgroup can be made it says so.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmark.bench import Bench, Size
from benchmark.fleet import Fleet
from benchmark.machine import memory_now_mb
from tools.process import SetupError
from tools.stack import Stack

MEMORY_BYTES_MAX = 1_000_000_000
SIZE = Size(
    rounds=3,
    singles={"small": 30_000},
    arrays={"small": 1_000},
    latency_seconds={200: 10},
)
CGROUPS = Path("/sys/fs/cgroup")
NAME = "homelab-benchmark"
# By version of cgroups: its folder, the files for the limit and the peak, and how the line of
# /proc/self/cgroup begins that says where a process is.
VERSIONS = (
    (CGROUPS / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory:"),
    (CGROUPS, "memory.max", "memory.peak", "0::"),
)


def measure() -> dict[str, list[Any]]:
    """Return the figures of all rounds."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SetupError("--small needs two cores: one for the three, another for the devices")
    results = []
    for number in range(1, SIZE.rounds + 1):
        with _memory_limited() as group:
            stack = Stack()
            try:
                with _inside(group), _on_cores({cores[0]}):
                    stack.start()
                with _on_cores(set(cores[1:])), Fleet(stack.ports.mqtt) as fleet:
                    bench = Bench(f"small {number}/{SIZE.rounds}", stack, stack.ingester, fleet)
                    figures = bench.all(SIZE)
                    results.append(figures | {"memory_sum_mb": _memory_mb(stack, group)})
            finally:
                stack.stop()
    return {"small": results}


def _memory_mb(stack: Stack, group: "Group | None") -> Mapping[str, float]:
    processes = (stack.ingester, stack.mosquitto, stack.postgres)
    sums = {"the three, what they share counted once": sum(map(memory_now_mb, processes))}
    if group is not None:
        with suppress(FileNotFoundError):  # memory.peak is of Linux 5.19
            sums["at most, with the page cache"] = int(group.peak.read_text()) / 1e6
    return sums


class Group:
    """A memory cgroup of our own."""

    def __init__(self, folder: Path, limit: str, peak: str, origin: Path) -> None:
        self.folder = folder
        self.limit = folder / limit
        self.peak = folder / peak
        self.origin = origin  # where this process is otherwise

    def enter(self) -> None:
        """Bring this process in, and so what it starts."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def leave(self) -> None:
        """Bring it back to where it was."""
        (self.origin / "cgroup.procs").write_text(str(os.getpid()))


@contextmanager
def _memory_limited() -> Iterator[Group | None]:
    """Make the cgroup, and remove it when its processes are gone; None where none can be made."""
    group = None
    for root, limit, peak, begin in VERSIONS:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        paths = [line.partition(begin)[2] for line in lines if begin in line]
        if not paths or not (root / "cgroup.procs").exists():
            continue
        group = Group(root / f"{NAME}-{os.getpid()}", limit, peak, root / paths[0].lstrip("/"))
        try:
            if begin == "0::":
                (root / "cgroup.subtree_control").write_text("+memory")
            group.folder.mkdir()
            group.limit.write_text(str(MEMORY_BYTES_MAX))
        except OSError as error:
            with suppress(OSError):
                group.folder.rmdir()
            print(f"small: the memory is not limited: {error}", file=sys.stderr, flush=True)
            group = None
        break
    try:
        yield group
    finally:
        if group is not None:
            group.folder.rmdir()


@contextmanager
def _inside(group: Group | None) -> Iterator[None]:
    if group is not None:
        group.enter()
    try:
        yield
    finally:
        if group is not None:
            group.leave()


@contextmanager
def _on_cores(cores: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
