"""How much memory an event takes: allocated on its way, and held while it waits.

What it does: counts what add(), loop() and on_message() allocate, with the garbage collector off,
and what is still held after 1,000 events were answered. What it does not: run on a board; on
this computer a word has 8 bytes, on a board 4, so a board takes about half.

Invariant: the bounds below hold, and nothing is held of an event that was answered.
"""

import gc
import json

from flash import Flash
from telemetry import FolderStore, Telemetry
from telemetry.ack import answers

WAITING_BYTES_MAX = 500
ADD_BYTES_MAX = 2_000
SEND_BYTES_MAX = 1_500
READ_BYTES_MAX = 3_000
ACK_BYTES_MAX = 2_000
KEEP_BYTES_MAX = 1_000
IDLE_BYTES_MAX = 100
LEAK_BYTES_MAX = 200
EVENTS = 20


def allocated(action):
    """Return how many bytes the action allocates, garbage included."""
    gc.collect()
    gc.disable()
    before = gc.mem_alloc()
    action()
    after = gc.mem_alloc()
    gc.enable()
    return after - before


def held():
    gc.collect()
    return gc.mem_alloc()


class Wire:
    """What takes the messages, and answers as the ingester does."""

    def __init__(self, device):
        self.device = device
        self.payload = b""

    def publish(self, topic, payload):
        self.payload = payload
        return True

    def send(self):
        self.device.loop(self.publish)

    def ack(self):
        events = json.loads(self.payload)
        found = [
            {
                "schema": 1,
                "event_id": event["event_id"],
                "device_id": "esp32-01",
                "status": "stored",
            }
            for event in (events if isinstance(events, list) else [events])
        ]
        return json.dumps(found).encode()

    def answer_all(self):
        while self.device.waiting():
            self.send()
            self.device.on_message(self.device.acks_topic, self.ack())


def report(name, size, bytes_max):
    print("%-34s %5d bytes for each event (at most %d)" % (name, size, bytes_max))
    assert size <= bytes_max, name


def measure(name, action, count, bytes_max):
    report(name, allocated(action) // count, bytes_max)


def main():
    flash = Flash(64)
    flash.format()
    flash.mount()
    device = Telemetry("esp32-01", FolderStore("/flash/outbox"), 60_000)
    device.begin()
    wire = Wire(device)
    device.connected()

    def add():
        for number in range(EVENTS):
            device.add("temperature", 20.5 + number, "C")

    add()
    wire.answer_all()  # what is loaded only once is there now

    before = held()
    add()
    report("held while it waits", (held() - before) // EVENTS, WAITING_BYTES_MAX)
    wire.answer_all()

    measure("add()", add, EVENTS, ADD_BYTES_MAX)
    size = allocated(wire.send)
    ack = wire.ack()
    count = len(answers("esp32-01", ack))
    report("loop() that sends from memory", size // count, SEND_BYTES_MAX)
    measure("on_message()", lambda: device.on_message(device.acks_topic, ack), count, ACK_BYTES_MAX)
    wire.answer_all()

    add()
    measure("save()", device.save, EVENTS, KEEP_BYTES_MAX)
    size = allocated(wire.send)
    count = len(device._sent)
    report("loop() that reads from the flash", size // count, READ_BYTES_MAX)
    wire.answer_all()

    size = allocated(lambda: [wire.send() for _ in range(100)]) // 100
    print("%-34s %5d bytes" % ("loop() with nothing to do", size))
    assert size <= IDLE_BYTES_MAX

    before = held()
    for number in range(1_000):
        device.add("temperature", 20.5 + number, "C")
        if number % EVENTS == 0:
            device.save()
        wire.answer_all()
    size = held() - before
    print("%-34s %5d bytes" % ("held after 1,000 more events", size))
    assert size <= LEAK_BYTES_MAX


if __name__ == "__main__":
    main()
