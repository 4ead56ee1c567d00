"""Where the ingester's time goes: a sampling profile of the hot path.

What it does: lets py-spy look at the running ingester 500 times a second while the devices
keep it busy, and sums up by stage and by function. What it does not: slow the ingester, as a
tracing profiler would, which makes small functions look large.

Invariant: the shares of the stages do not overlap; reading MQTT while the database works
counts as reading.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmark.fleet import Fleet, publishes
from tools.stack import Stack

SAMPLES_PER_SECOND = 500
SECONDS = 4
FUNCTIONS_SHOWN = 15
# The innermost of these on the stack is the stage. Names as py-spy writes them.
STAGES = {
    "Broker.serve": "read MQTT while the database works",
    "Broker.receive": "read MQTT",
    "PacketReader.packets": "take packets apart",
    "recognise": "recognise events",
    "_parse": "parse JSON",
    "_meta": "write meta as JSON",
    "_columns": "write the arrays for SQL",
    "Link._execute": "psycopg2 and libpq: send",
    "Link._poll": "psycopg2 and libpq: read the answer",
    "Decoder.decode": "check events",
    "Decoder.decode_ahead": "check events while the database works",
    "Store.begin_insert": "insert: sort, the rest of sending",
    "Store.finish_insert": "insert: the rest of the answer",
    "_acks": "build ACKs",
    "Broker.settle": "publish ACKs, PUBACK",
}


def measure(count: int, events_each: int, outstanding: int) -> dict[str, dict[str, float]]:
    """Return the shares of stages and functions, in percent."""
    with Stack() as stack, Fleet(stack.ports.mqtt) as fleet:
        fleet.closed_loop(publishes("warm", 5_000), 900, lambda _: None)
        packets = publishes("profile", count, events_each)
        samples_file = stack.folder / "samples"
        py_spy = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("py-spy"), "record", "--format", "raw"),
                *("--pid", str(stack.ingester.pid), "--output", str(samples_file)),
                *("--rate", str(SAMPLES_PER_SECOND), "--duration", str(SECONDS)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        fleet.closed_loop(packets, outstanding, lambda _: None)
        if py_spy.wait(60) != 0:
            raise RuntimeError("py-spy failed")
        return _summarise(samples_file.read_text())


def _summarise(samples: str) -> dict[str, dict[str, float]]:
    """Sum up py-spy's raw format: frames from the outermost in, then how many samples."""
    stages: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for line in samples.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame.rpartition(":")[0] for frame in stack.split(";")]
        names = [frame.split(" (")[0] for frame in frames]
        inner = next((name for name in reversed(names) if name in STAGES), None)
        stages[STAGES[inner] if inner else "the rest"] += int(count)
        functions[frames[-1] + ")"] += int(count)
    total = sum(stages.values())
    return {
        "stages": {name: 100 * n / total for name, n in stages.most_common()},
        "functions": {name: 100 * n / total for name, n in functions.most_common(FUNCTIONS_SHOWN)},
    }
