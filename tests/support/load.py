"""Devices under load: they publish while something goes wrong, and see it through.

What it does: lets devices publish at a steady rate while a `with` block makes a fault and
fixes it, and looks from outside at what the ingester says and takes meanwhile. What it does
not: check the promise; that is find() in tests/support/findings.py.

Invariant: nothing is published any more when a block is left, whatever happened in it.
"""

import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from tests.support.device import Device, event
from tests.support.pipeline import Database, Pipeline, wait_until
from tools.process import clean_environment, run

TURN_SECONDS = 0.01


@contextmanager
def devices(
    pipeline: Pipeline, number: int, port: int | None = None, *, hear_dead_letters: bool = True
) -> Iterator[list[Device]]:
    """Connect so many devices, each of which hears its own ACKs."""
    with ExitStack() as stack:
        names = [f"device-{index}" for index in range(number)]
        port = port or pipeline.mosquitto.port
        made = [
            Device(port, name, hears=name, hears_dead_letters=hear_dead_letters) for name in names
        ]
        yield [stack.enter_context(device) for device in made]


@contextmanager
def load(publishers: Sequence[Device], per_second: int = 200, qos: int = 1) -> Iterator[None]:
    """Let each of them publish a new event so often, once, while the block runs."""
    over = threading.Event()
    turn_seconds = max(TURN_SECONDS, 1 / per_second)

    def publish() -> None:
        numbers = [itertools.count(len(device.sent)) for device in publishers]
        while not over.wait(turn_seconds):
            for device, count in zip(publishers, numbers, strict=True):
                for number in itertools.islice(count, round(per_second * turn_seconds)):
                    device.send(event(number, device.device_id, value=number), qos=qos)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def deliver_rest(publishers: Iterable[Device], timeout: float = 30) -> None:
    """Let each send again what it has not heard of, until it has."""
    for device in publishers:
        unheard = [item for key, item in device.sent.items() if key not in device.heard_at]
        device.deliver(unheard, timeout)


def hear_all(publishers: Iterable[Device], timeout: float = 30) -> None:
    """Wait until each has heard that all it sent is stored, without sending it again."""
    for device in publishers:
        what = f"an ACK for each of {len(device.sent)} events"
        device.wait(partial(heard_all, device), what, timeout)


def heard_all(device: Device) -> bool:
    return device.heard_at.keys() >= device.sent.keys()


def events_sent(publishers: Iterable[Device]) -> int:
    return sum(len(device.sent) for device in publishers)


def wait_for_load(publishers: Sequence[Device], number: int = 50) -> None:
    """Wait until so many more events were sent."""
    wanted = events_sent(publishers) + number
    timeout = 15 + number / 100
    wait_until(lambda: events_sent(publishers) >= wanted, f"{number} more events", timeout)


def wait_for_acks(publishers: Sequence[Device], number: int = 50) -> None:
    """Wait until they have heard so many more ACKs: that events flow."""

    def heard() -> int:
        return sum(len(device.heard_at) for device in publishers)

    wanted = heard() + number
    wait_until(lambda: heard() >= wanted, f"{number} more ACKs")


@contextmanager
def database_down(database: Database) -> Iterator[None]:
    """Stop PostgreSQL while the block runs."""
    database.postgres.stop()
    try:
        yield
    finally:
        database.postgres.start()
        database.postgres.wait_ready()


def check_log(pipeline: Pipeline, name: str, seconds: float, outages: int = 1) -> None:
    """Check what the log says of outages of `name`, which all together lasted at most so long.

    One line when each began, at most one a minute, one when it ended, and no traceback. Of
    several at short intervals not each needs to be told, and once it may be guessed that
    another client takes the session over.
    """
    log = pipeline.ingester.log(pipeline.ingester.log_start)
    began = re.findall(rf"WARNING {name}: .*trying again until it works", log)
    ended = re.findall(rf"INFO {name}: back after .*", log)
    # A broker that was killed may have forgotten the session; that is no line of an outage.
    warned = re.findall(rf"WARNING {name}: (?!the broker had lost this session).*", log)
    assert 1 <= len(began) <= outages, warned
    guesses = 1 if outages >= 3 else 0
    assert len(warned) <= len(began) + guesses + seconds / 60, warned
    assert len(began) <= len(ended) <= len(warned), (warned, ended)
    assert log.rindex(ended[-1]) > log.rindex(began[-1])
    assert "Traceback" not in log


def connects(pipeline: Pipeline) -> int:
    return pipeline.ingester.log().count("MQTT connected rc=Success")


def check_own_reconnects(pipeline: Pipeline) -> None:
    """Check that it connected once, and again only by choice: broker 2.0 sends too much."""

    def chosen() -> int:
        return pipeline.ingester.log().count("MQTT: reconnecting, so that the broker sends again")

    # The last of them may still be under way.
    wait_until(lambda: connects(pipeline) > chosen(), "the ingester to be connected again")
    assert connects(pipeline) == 1 + chosen()


def broker_dropped(pipeline: Pipeline) -> int:
    """Return how many messages the broker says it has dropped since it started."""
    command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(pipeline.mosquitto.port)]
    topic = "$SYS/broker/publish/messages/dropped"
    return int(run([*command, "-W", "5", "-C", "1", "-t", topic], clean_environment()))
