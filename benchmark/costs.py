"""Where each microsecond of an event goes: in ingester, broker and database, by stage.

What it does: takes the CPU time of the three for an event, then lets py-spy and perf look where it
goes, and multiplies. What it does not: look while it takes the time, as that costs some itself.

Invariant: the stages of a program add up to its CPU time.
"""

from typing import Any

from benchmark import profile, servers
from benchmark.bench import ARRAY_EVENTS, ARRAYS_OUTSTANDING, SINGLES_OUTSTANDING, Bench
from benchmark.fleet import Fleet, publishes
from tools.stack import Stack

# Messages, events in each, and messages outstanding; enough for as long as perf looks.
LOADS = {
    "singles": (90_000, 1, SINGLES_OUTSTANDING),
    f"arrays of {ARRAY_EVENTS}": (6_000, ARRAY_EVENTS, ARRAYS_OUTSTANDING),
}


def measure() -> dict[str, Any]:
    """Return for each load and program the stages, in microseconds of CPU an event."""
    servers.require()
    results = {}
    for load, (count, events_each, outstanding) in LOADS.items():
        with Stack() as stack, Fleet(stack.ports.mqtt) as fleet:
            bench = Bench(load, stack, stack.ingester, fleet)
            bench.warm_up()
            cpu = bench.closed_loop("CPU", count, events_each, outstanding)["cpu_microseconds"]
            packets = publishes("look", count, events_each)
            look = servers.Look(stack)
            fleet.closed_loop(packets, outstanding, lambda _: None)
            shares = look.shares()
        shares["ingester"] = profile.measure(count, events_each, outstanding)["stages"]
        results[load] = {
            program: {
                stage: percent / 100 * cpu["system" if program == "ingester" else program]
                for stage, percent in shares[program].items()
            }
            for program in ("ingester", "broker", "database")
        }
    return results
