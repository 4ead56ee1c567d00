"""What each system loses, doubles or acknowledges falsely when something is killed under load.

What it does: queues events at the broker while the system is away, starts it, and kills either
PostgreSQL or the system by SIGKILL when a quarter of them are rows; starts what was killed again,
waits until nothing moves, and compares rows and ACKs with what was sent. What it does not: measure
a rate, or the faults of which the project's own tests are (tests/FAULTS.md).

Invariant: all counts are made at the sender, of events that the broker has PUBACKed. An event
counts as lost only if a second, orderly start of the system did not bring it either.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from benchmark.bench import wait_for_rows
from benchmark.fleet import Fleet, publishes
from benchmark.systems import LOG_SUBSCRIPTIONS, Running, System
from tools.stack import Postgres, Stack

# So many that each is at work for some seconds, whatever its rate.
EVENTS = {"plain": 12_000, "node-red": 20_000}
EVENTS_OTHERS = 80_000
AWAY_SECONDS = 2.0
# More than any of them waits before it tries again.
QUIET_SECONDS = 8.0
FAULTS = ("PostgreSQL killed", "itself killed")
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def measure(systems: dict[str, System], progress: Progress) -> dict[str, dict[str, Any]]:
    """Return what became of the events, by system and by fault."""
    results: dict[str, dict[str, Any]] = {}
    for name, system in systems.items():
        results[name] = {}
        for fault in FAULTS:
            count = EVENTS.get(name, EVENTS_OTHERS)
            with progress(f"{name}: {fault}", count) as show:
                results[name][fault] = _one(system, fault, count, show)
    return results


def _one(system: System, fault: str, count: int, show: Callable[[int], None]) -> dict[str, Any]:
    packets = publishes("promise", count)
    with (
        Stack(with_ingester=False, mosquitto_config=LOG_SUBSCRIPTIONS) as stack,
        Fleet(stack.ports.mqtt) as fleet,
    ):
        process = system.start(stack)
        try:
            process.stop()
            fleet.publish_all(packets)
            process.start()
            wait_for_rows(stack, system.table, count // 4, fleet.hear_for, show)
            victim: Running | Postgres = stack.postgres if fault == FAULTS[0] else process
            victim.kill()
            fleet.hear_for(AWAY_SECONDS)
            victim.start()
            stack.postgres.wait_ready()
            starts = _settle(stack, system, process, fleet, show)
            if _count_rows(stack, system.table, "DISTINCT event_id") < count:
                process.stop()
                process.start()
                _settle(stack, system, process, fleet, show)
        finally:
            process.stop()
        rows = stack.postgres.psql(f"SELECT event_id FROM {system.table}").encode().split()
        return _counts({key for each in packets for key in each.event_ids}, rows, fleet, system) | {
            "starts": starts
        }


def _counts(sent: set[bytes], rows: list[bytes], fleet: Fleet, system: System) -> dict[str, Any]:
    stored, heard = set(rows), fleet.stored()
    return {
        "events": len(sent),
        "lost": len(sent - stored),
        "doubled": len(rows) - len(stored),
        "false_acks": len(heard - stored) if system.answers else None,
        "unanswered": len(stored - heard) if system.answers else None,
    }


def _settle(
    stack: Stack, system: System, process: Running, fleet: Fleet, show: Callable[[int], None]
) -> int:
    """Wait until nothing has moved for a while; return how often the system had to be started.

    One that ended by itself is started again, as systemd would.
    """
    starts = 0
    before = (-1, -1)
    moved_at = time.monotonic()
    while time.monotonic() - moved_at < QUIET_SECONDS:
        if not process.running:
            process.start()
            starts += 1
        fleet.hear_for(0.5)
        rows = _count_rows(stack, system.table)
        show(rows)
        if (now := (rows, fleet.heard_bytes)) != before:
            before, moved_at = now, time.monotonic()
    return starts


def _count_rows(stack: Stack, table: str, what: str = "*") -> int:
    """How many there are; none, if the table is not there yet."""
    if not stack.postgres.psql(f"SELECT to_regclass('{table}')"):
        return 0
    return int(stack.postgres.psql(f"SELECT count({what}) FROM {table}"))
