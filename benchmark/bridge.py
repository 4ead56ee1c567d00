"""The bridge between other firmware and the ingester: what it takes, and what that costs.

What it does: the fleet publishes as Zigbee2MQTT does, and hears the ingester's ACKs for the events
that the bridge makes of it. What it does not: compare with anything.

Invariant: a message counts when each of its events has been heard as stored and is a row; the ids
were known before it was sent.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC
from typing import Any

from benchmark.fleet import DEVICES, PACKET_ID_MAX, Fleet, Publish, packet
from benchmark.machine import CpuClock
from devices.bridge.source import Source, Sources, SourceSettings
from devices.bridge.translate import Incoming, Translator
from tools.process import Process
from tools.stack import Ingester, Stack

# Messages on their way, so that each of the three programs has a batch in hand.
OUTSTANDING = 3_000
ROUNDS = 3
WARMING_UP = 5_000
MESSAGES = 20_000
CONFIGURATION = '[[source]]\npreset = "zigbee2mqtt"\n'
FIRST_MILLISECONDS = 1_770_681_600_000  # 2026-02-10
# Behind the time, by name: a sensor with one reading, and one with all that sensors have.
READINGS = {
    "one reading": '"temperature":{}',
    "five readings": '"temperature":{},"humidity":44,"pressure":1013,"battery":87,"linkquality":90',
}


class Missing(Exception):
    """There are other rows than those of the messages."""


def measure(progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]) -> Any:
    """Return for each kind of message the figures of all rounds."""
    results: dict[str, list[Any]] = {name: [] for name in READINGS}
    for number in range(1, ROUNDS + 1):
        with Stack() as stack, bridge(stack) as process, Fleet(stack.ports.mqtt) as fleet:
            warming_up = publishes(0, WARMING_UP, READINGS["one reading"])
            fleet.closed_loop(warming_up, OUTSTANDING, lambda _: None)
            first = rows = WARMING_UP
            for name, readings in READINGS.items():
                packets = publishes(first, MESSAGES, readings)
                first += MESSAGES
                rows += sum(len(each.event_ids) for each in packets)
                clock = CpuClock(
                    bridge=process,
                    broker=stack.mosquitto,
                    ingester=stack.ingester,
                    database=stack.postgres,
                )
                with progress(f"bridge {number}/{ROUNDS}: {name}", MESSAGES) as show:
                    seconds = fleet.closed_loop(packets, OUTSTANDING, show)
                results[name].append(
                    {
                        "messages_per_second": MESSAGES / seconds,
                        "cpu_microseconds": clock.microseconds_each(MESSAGES),
                        "load": os.getloadavg()[0],
                    }
                )
                if (found := int(stack.postgres.psql("SELECT count(*) FROM events"))) != rows:
                    raise Missing(f"{rows} events were ACKed, {found} are rows")
    return results


@contextmanager
def bridge(stack: Stack) -> Iterator[Process]:
    """Run the bridge beside the stack."""
    file = stack.folder / "bridge.toml"
    file.write_text(CONFIGURATION)
    environment = stack.environment | {"BRIDGE_STORE": str(stack.folder / "bridge")}
    arguments = ("-m", "devices.bridge", str(file))
    process = Ingester(environment, stack.folder / "bridge.log", arguments=arguments)
    process.start()
    try:
        process.wait_for_log("MQTT in: ")
        yield process
    finally:
        process.stop()


def publishes(first: int, count: int, readings: str) -> list[Publish]:
    """Return so many messages; of another `first` all of them, and their events, are others."""
    translator = Translator(Sources([Source(SourceSettings("zigbee2mqtt", UTC))]))
    return [_publish(translator, number, readings) for number in range(first, first + count)]


def _publish(translator: Translator, number: int, readings: str) -> Publish:
    device = number % DEVICES
    topic = f"zigbee2mqtt/esp32-{device:02}"
    fields = readings.format(15 + number % 200 / 10)
    payload = f'{{"last_seen":{FIRST_MILLISECONDS + number},{fields}}}'.encode()
    events = translator.translate(Incoming(topic, payload)).events
    ids = [(event.event_id or "").encode() for event in events]
    packet_id = number // DEVICES % PACKET_ID_MAX + 1
    return Publish(device, packet(topic, packet_id, payload), ids)
