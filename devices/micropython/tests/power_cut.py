"""The power goes at every single operation of the flash: nothing that was kept is lost.

What it does: runs a life of a device (add, save, send, ACK, overflow, three boots) on real
littlefs, and cuts it off at operation 1, 2, 3 and so on, with nothing, half or all of the
write done; then it boots the device again and lets it send all it has. Likewise with a flash
that refuses each operation in turn. What it does not: MQTT.

Invariant, checked each time: what was kept is stored or told as dropped; nothing is stored
that was not added, or differs; no id is given twice.
"""

import gc
import json

from flash import Flash, PowerCut
from telemetry import FolderStore, Telemetry

BLOCKS = 32
STORE_BYTES = 8192  # two segments: the third drops the first
PADDING = "x" * 480
ACK = {"schema": 1, "device_id": "dev-1", "status": "stored"}


class Server:
    """The ingester, as far as the device sees it."""

    def __init__(self):
        self.stored = {}
        self.inbox = []

    def publish(self, topic, payload):
        self.inbox.append(payload)
        return True

    def answer(self, device, count=1000):
        """Store and answer the first events of what has come."""
        acks = []
        for payload in self.inbox:
            events = json.loads(payload)
            for event in events if isinstance(events, list) else [events]:
                if len(acks) < count:
                    event_id = event["event_id"]
                    text = json.dumps(event["value"]) + json.dumps(event.get("meta"))
                    same = self.stored.get(event_id)
                    assert same is None or same[0] == text, "altered: " + event_id
                    self.stored[event_id] = (text, event)
                    acks.append(dict(ACK, event_id=event_id))
        self.inbox = []
        device.on_message(device.acks_topic, json.dumps(acks).encode())


class World:
    """What happened so far, over all boots: what the device itself said."""

    def __init__(self, refuse_newest):
        self.refuse_newest = refuse_newest
        self.server = Server()
        self.added = {}
        self.kept = set()
        self.dropped = set()
        self.now = 0
        self.value = 0

    def boot(self):
        store = FolderStore("/flash/outbox", STORE_BYTES)
        device = Telemetry(
            "dev-1",
            store,
            1000,
            4096,
            self.refuse_newest,
            clock=lambda: 1770681600000,
            ticks=lambda: self.now,
        )
        device.on_kept = self.kept.add
        device.on_dropped = self.dropped.add
        device.begin()
        return device

    def add(self, device, count):
        for _ in range(count):
            self.value += 1
            event_id = device.add("test", self.value, None, None, {"n": self.value, "p": PADDING})
            assert event_id not in self.added, "given twice: " + event_id
            if event_id is not None:
                self.added[event_id] = self.value

    def loop(self, device, passed_ms=0):
        self.now += passed_ms
        device.loop(self.server.publish)

    def drain(self, device):
        device.connected()
        for _ in range(100):
            self.loop(device, 10_000)
            self.server.answer(device)
            if not device.waiting():
                self.loop(device)  # it may have to tell of what it dropped
                if not device.waiting():
                    return
        raise AssertionError("it does not become empty: %d wait" % device.waiting())

    def check(self):
        told = set()
        for event_id, (_, event) in self.server.stored.items():
            if event["event_type"] == "outbox_dropped":
                meta = event["meta"]
                run = range(meta["from"], meta["to"] + 1)
                assert event["value"] == len(run)
                told.update("dev-1-%s-%d-%d" % (meta["salt"], meta["boot"], n) for n in run)
            else:
                assert event_id in self.added, "invented: " + event_id
                assert event["value"] == event["meta"]["n"] == self.added[event_id]
        assert told <= self.dropped, "told as dropped without having been"
        for event_id in self.kept:
            assert event_id in self.server.stored or event_id in told, "lost: " + event_id


def life(world):
    """Do once whatever a device does."""
    device = world.boot()
    world.add(device, 3)
    world.loop(device, 1000)  # they were held long enough, and are kept
    world.add(device, 2)
    device.connected()
    world.loop(device)
    world.server.answer(device, 2)  # one ACK is lost with the connection
    device.disconnected()
    world.loop(device, 1000)
    world.add(device, 1)
    device.save()

    device = world.boot()
    world.add(device, 9)
    world.loop(device, 1000)
    world.add(device, 8)
    world.loop(device, 1000)  # more than there is room for
    device.connected()
    world.loop(device)
    world.server.answer(device)
    world.loop(device)  # it tells of what it dropped
    world.server.answer(device)
    world.add(device, 2)
    device.save()

    world.drain(world.boot())


def once(empty, refuse_newest=False, **trouble):
    """Run a life with this trouble, then more boots without; return how it went."""
    world = World(refuse_newest)
    flash = Flash(BLOCKS, bytearray(empty), **trouble)
    flash.mount()
    try:
        life(world)
    except PowerCut:
        pass
    operations = flash.operations
    after = Flash(BLOCKS, flash.unmount())
    after.mount()
    world.drain(world.boot())
    device = world.boot()
    world.add(device, 1)
    device.save()
    world.drain(world.boot())
    after.unmount()
    world.check()
    return operations, world


def every_operation(empty, refuse_newest, torn, refused):
    count, world = once(empty, refuse_newest)
    assert world.dropped
    assert len(world.server.stored) > 10
    print(
        "a life of %d operations, %d events, %d dropped, the %s"
        % (count, len(world.added), len(world.dropped), "newest" if refuse_newest else "oldest")
    )
    troubles = [{"cut_at": k, "torn": part} for part in torn for k in range(1, count + 1)]
    troubles += [{"refuses": range(k, k + n)} for n in refused for k in range(1, count + 1)]
    for trouble in troubles:
        try:
            once(empty, refuse_newest, **trouble)
        except BaseException:
            print(trouble)
            raise
        gc.collect()
    print("ok: the power cut at each, with %s quarters of a write done" % (torn,))
    print("ok: each refused, %s at a time" % (refused,))


def main():
    empty = Flash(BLOCKS)
    empty.format()
    every_operation(empty.data, False, (0, 2, 4), (1, 12))
    every_operation(empty.data, True, (2,), (12,))


if __name__ == "__main__":
    main()
