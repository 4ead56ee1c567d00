"""The machine: what it is, and what its processes take of it.

What it does: reads CPU time and memory from /proc, and describes machine and programs for the
results. What it does not: start or stop anything; Linux only, as tools/process.py.

Invariant: CPU time counts a process with all its threads and children, so PostgreSQL's
background writers are in the database's figure.
"""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tools.process import Process, clean_environment, process_status

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class CpuClock:
    """The CPU time of some processes from one moment on."""

    def __init__(self, **processes: Process) -> None:
        self._processes = processes
        self._began = {name: _cpu_seconds(process.pid) for name, process in processes.items()}

    def microseconds_each(self, events: int) -> dict[str, float]:
        """Return the CPU time since the beginning for each event, by process."""
        return {
            name: 1e6 * _since(_cpu_seconds(process.pid), self._began[name]) / events
            for name, process in self._processes.items()
        }


def memory_now_mb(process: Process) -> float:
    """Return its resident memory and its children's in MB, shared pages in equal parts."""
    total = 0
    for pid in _cpu_seconds(process.pid):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total / 1e6


def memory_peak_mb(process: Process) -> float:
    """Return the most resident memory that it ever had, in MB."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"/proc/{process.pid}/status has no VmHWM")


def describe() -> dict[str, str]:
    """Return what the figures depend on, beside the code."""
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "Model"))
    ]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    kernel = platform.release().split("-")[0]
    return {
        "CPU": f"{os.cpu_count()} cores, {cpu[0] if cpu else platform.machine()}",
        "memory": f"{memory_kib / 1024**2:.0f} GiB",
        "system": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux {kernel}",
        "Python": sys.version.split()[0],
        "paho-mqtt": version("paho-mqtt"),
        "psycopg2": version("psycopg2-binary"),
        "PostgreSQL": _first_line("postgres", "--version"),
        "Mosquitto": _first_line("mosquitto", "-h"),
    }


def _cpu_seconds(pid: int) -> dict[int, float]:
    others = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return {
        member: _own_cpu_seconds(member)
        for member in (pid, *(other for other in others if process_status(other)[1] == pid))
    }


def _own_cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND  # user and system


def _since(now: dict[int, float], before: dict[int, float]) -> float:
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in now.items())


def _first_line(*command: str) -> str:
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=False
    )
    return done.stdout.splitlines()[0].strip()
