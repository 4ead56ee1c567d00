"""The systems that are compared: the ingester, and what one would use instead.

What it does: starts each of them on a running stack, and says which are not on this machine.
Telegraf and Bento are programs on PATH, or those that the variables TELEGRAF and BENTO name.
What it does not: install any of them but Node-RED (node_red.py), or measure.

Invariant: a system that is ready has its persistent session at the broker, so what is published
from then on waits for it, if it stops.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmark import node_red
from tools.process import Process, clean_environment, search_path
from tools.stack import Ingester, Stack

FOLDER = Path(__file__).resolve().parent
CONFIGURATIONS = {
    "telegraf": FOLDER / "telegraf/telegraf.conf",
    "bento": FOLDER / "bento/bento.yaml",
}
# A line for the broker, so that its log says who has subscribed: Telegraf and Bento do not.
LOG_SUBSCRIPTIONS = "log_type subscribe"


class Configured(Process):
    """A program that takes a file and the stack's variables."""

    def __init__(self, name: str, stack: Stack) -> None:
        self._folder = stack.folder
        self._environment = clean_environment() | stack.environment
        self._command = [_program(name) or name, "--config", str(CONFIGURATIONS[name])]
        super().__init__(name, stack.folder / f"{name}.log")

    def start(self) -> None:
        self._spawn(self._command, self._environment, self._folder)


Running = Ingester | node_red.NodeRed | Configured
Start = Callable[[Stack], Running]


class System(NamedTuple):
    """How to start it; the table that it writes; whether it answers the devices."""

    start: Start
    table: str = "events"
    answers: bool = True


def ingester(stack: Stack) -> Running:
    """Return the ingester, ready."""
    stack.ingester.start()
    stack.ingester.wait_ready()
    return stack.ingester


def plain(stack: Stack) -> Running:
    """Return the plain script, ready."""
    return _script("benchmark.plain", stack)


def least(name: str) -> Start:
    """Return how to start least.py as the step of this name."""
    return lambda stack: _script("benchmark.least", stack, name)


def _script(module: str, stack: Stack, *arguments: str) -> Running:
    log_file = stack.folder / f"{module}.log"
    process = Ingester(stack.environment, log_file, arguments=("-m", module, *arguments))
    process.start()
    process.wait_for_log("ready")
    return process


def red(stack: Stack) -> Running:
    """Return Node-RED with its flow, ready."""
    process = node_red.NodeRed(stack.environment, stack.folder / "node-red")
    process.start()
    process.wait_ready()
    return process


def telegraf(stack: Stack) -> Running:
    """Return Telegraf, ready."""
    return _configured("telegraf", stack)


def bento(stack: Stack) -> Running:
    """Return Bento, ready."""
    return _configured("bento", stack)


def _configured(name: str, stack: Stack) -> Configured:
    process = Configured(name, stack)
    process.start()
    stack.mosquitto.wait_for_log(f"homelab-{name} 1 qs/v1/+/events")
    return process


def _program(name: str) -> str | None:
    return shutil.which(os.environ.get(name.upper(), name), path=search_path())


def all_here() -> dict[str, System]:
    """Return the systems that can be run here; say on stderr which are left out."""
    systems = {"ingester": System(ingester), "plain": System(plain)}
    if node_red.available():
        node_red.install()
        systems["node-red"] = System(red)
    else:
        _leave_out("node-red", "node and npm are not installed")
    peers = {
        "telegraf": System(telegraf, "telegraf_events", answers=False),
        "bento": System(bento),
    }
    for name, system in peers.items():
        if _program(name):
            systems[name] = system
        else:
            _leave_out(name, f"it is not on PATH, and {name.upper()} does not name it")
    return systems


def _leave_out(name: str, why: str) -> None:
    print(f"{name} is left out: {why}", file=sys.stderr, flush=True)
