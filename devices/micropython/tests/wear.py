"""What an event costs the flash: erases, and bytes programmed, on real littlefs.

What it does: counts them in a good network, in an outage, and for each boot. What it does
not: measure time; this flash is memory.

Invariant: the bounds below hold. In a good network events do not touch the flash.
"""

import json

from flash import Flash
from telemetry import FolderStore, Telemetry

EVENTS = 400


class Device:
    """A device with a flash of 256 KiB of its own; no path is used twice."""

    number = 0

    def __init__(self, hold_ms):
        Device.number += 1
        self.path = "/flash%d" % Device.number
        self.flash = Flash(64)
        self.flash.format()
        self.flash.mount(self.path)
        self.now = 0
        self.hold_ms = hold_ms
        self.payload = b""
        self.boot()

    def boot(self):
        store = FolderStore(self.path + "/outbox", 1 << 20)
        self.outbox = Telemetry("esp32-01", store, self.hold_ms, ticks=lambda: self.now)
        self.outbox.begin()
        self.outbox.connected()

    def publish(self, topic, payload):
        self.payload = payload
        return True

    def loop(self):
        self.now += 100
        self.outbox.loop(self.publish)

    def answer(self):
        events = json.loads(self.payload)
        for event in events if isinstance(events, list) else [events]:
            ack = {
                "schema": 1,
                "event_id": event["event_id"],
                "device_id": "esp32-01",
                "status": "stored",
            }
            self.outbox.on_message(self.outbox.acks_topic, json.dumps(ack).encode())

    def count(self, name, action, count, erases_max):
        erases, programmed = self.flash.erases, self.flash.programmed
        action()
        erases = (self.flash.erases - erases) / count
        programmed = (self.flash.programmed - programmed) / count
        print("%-44s %6.3f erases %6.0f bytes" % (name, erases, programmed))
        assert erases <= erases_max, name


def add(device):
    device.outbox.add("temperature", 21.5, "C", None, {"room": "cellar", "note": "x" * 50})


def good(device):
    for _ in range(EVENTS):
        add(device)
        device.loop()
        device.answer()
        device.loop()
    assert not device.outbox.waiting()


def outage(device, at_once):
    device.outbox.disconnected()
    for number in range(EVENTS):
        add(device)
        if number % at_once == at_once - 1:
            device.now += device.hold_ms
            device.loop()
    assert device.outbox.kept() == EVENTS
    assert not device.outbox.dropped()


def main():
    device = Device(30_000)
    device.count("answered within hold_ms, each event", lambda: good(device), EVENTS, 0)
    device = Device(0)
    device.count("hold_ms 0, good network, each event", lambda: good(device), EVENTS, 1.5)
    for at_once in (1, 2, 10):
        device = Device(30_000)
        name = "no network, %d at each write, each event" % at_once
        erases_max = 1.2 / at_once + 0.1
        device.count(name, lambda: outage(device, at_once), EVENTS, erases_max)  # noqa: B023
    device = Device(0)
    device.count("each boot", lambda: [device.boot() for _ in range(100)], 100, 0.5)


if __name__ == "__main__":
    main()
