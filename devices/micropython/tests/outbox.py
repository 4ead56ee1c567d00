"""What the outbox does where something is wrong: silence, no room, a flash that does not work.

What it does: one function for each case, on real littlefs where there is a flash. What it
does not: cut the power, or ask what the contract says; see power_cut.py and contract.py.

Invariant: every function here that begins with `test_` is run.
"""

import json
import os
from time import ticks_add

from flash import Flash
from telemetry import FolderStore, Telemetry

TICKS_LAST = ticks_add(0, -1)  # one more, and ticks_ms() begins at 0 again


class Bench:
    """A device, its flash, its clock, and what it said and sent."""

    number = 0

    def __init__(self, blocks=64, store_bytes=131072, folder="outbox", start=0, **options):
        Bench.number += 1
        self.path = "/bench%d" % Bench.number
        self.flash = Flash(blocks)
        self.flash.format()
        self.flash.mount(self.path)
        self.folder = self.path + "/" + folder
        self.store_bytes = store_bytes
        self.options = options
        self.now = start
        self.sent, self.kept, self.stored, self.dropped = [], [], [], []
        self.boot()

    def boot(self):
        store = FolderStore(self.folder, self.store_bytes) if self.folder else None
        self.device = Telemetry("esp32-01", store, ticks=lambda: self.now, **self.options)
        self.device.on_kept = self.kept.append
        self.device.on_stored = self.stored.append
        self.device.on_dropped = self.dropped.append
        self.device.begin()

    def add(self, count, size=150):
        return [self.device.add("t", n, None, 0, {"p": "x" * size}) for n in range(count)]

    def loop(self, passed_ms=0):
        self.now = ticks_add(self.now, passed_ms)
        self.device.loop(lambda topic, payload: self.sent.append(payload) or True)

    def answer(self, count=100):
        events = json.loads(self.sent[-1])
        for event in (events if isinstance(events, list) else [events])[:count]:
            ack = {"schema": 1, "event_id": event["event_id"], "device_id": "esp32-01"}
            ack["status"] = "stored"
            self.device.on_message(self.device.acks_topic, json.dumps(ack).encode())

    def drain(self):
        self.device.connected()
        for _ in range(200):
            self.loop(400_000)
            if not self.device.waiting():
                return
            self.answer()
        raise AssertionError("%d wait" % self.device.waiting())

    def files(self):
        return sorted(name for name in os.listdir(self.folder) if name.isdigit())

    def close(self):
        self.flash.unmount(self.path)


def silence(bench):
    """Return after how many seconds each message came, for 30 minutes without an answer."""
    bench.add(4)
    bench.device.connected()
    seconds, wanted = [], 0
    for second in range(1800):
        bench.loop(1000)
        if len(bench.sent) > len(seconds):
            seconds.append(second)
        if bench.device.reconnect_wanted():
            wanted += 1
            bench.device.disconnected()
            bench.device.connected()
    return seconds, wanted


def test_what_is_not_answered_is_sent_again_the_same_and_less_and_less_often():
    bench = Bench()
    seconds, wanted = silence(bench)
    gaps = [seconds[n + 1] - seconds[n] for n in range(len(seconds) - 1)]
    assert 5 <= gaps[0] <= 16, gaps
    assert max(gaps) > 100, gaps
    assert len(seconds) < 25, gaps
    assert wanted >= 2, "half-open connections are never given up"
    first = json.loads(bench.sent[0])
    for payload in bench.sent:  # fewer at a time, but byte for byte
        assert payload.strip(b"[]") in bench.sent[0]
    assert len(json.loads(bench.sent[0])) == 4
    assert b"[" not in bench.sent[-1]
    bench.answer()
    bench.loop()
    assert len(json.loads(bench.sent[-1])) == 3, "after an answer they go together again"
    bench.answer()
    assert bench.stored == [event["event_id"] for event in first]
    bench.close()


def test_it_goes_on_where_the_milliseconds_begin_at_0_again():
    expected = Bench()
    bench = Bench(start=ticks_add(TICKS_LAST, -100_000))
    count, count_expected = len(silence(bench)[0]), len(silence(expected)[0])
    assert abs(count - count_expected) < 8, (count, count_expected)
    bench.add(1)
    bench.loop(60_000)
    assert len(bench.kept) == 5
    bench.close()
    expected.close()


def test_nothing_is_sent_before_there_is_a_connection_or_after_it():
    bench = Bench()
    bench.add(1)
    bench.loop(1000)
    assert not bench.sent
    bench.device.connected()
    bench.loop()
    bench.device.disconnected()
    bench.loop(400_000)
    assert len(bench.sent) == 1
    bench.close()


def test_the_oldest_give_way_on_a_full_flash_but_not_what_is_answered():
    bench = Bench(store_bytes=8192)
    ids = bench.add(10)
    bench.device.save()
    bench.device.connected()
    bench.loop()
    bench.answer(3)
    bench.device.disconnected()
    for _ in range(40):
        ids += bench.add(1)
        bench.device.save()
    assert bench.stored == ids[:3]
    assert bench.dropped == ids[3 : 3 + len(bench.dropped)], bench.dropped
    assert len(bench.files()) == 2
    bench.drain()
    told = [json.loads(payload) for payload in bench.sent if b"outbox_dropped" in payload]
    (note,) = [
        event
        for events in told
        for event in (events if isinstance(events, list) else [events])
        if event["event_type"] == "outbox_dropped"
    ]
    assert note["value"] == len(bench.dropped)
    assert note["meta"]["from"] == 4
    assert note["meta"]["to"] == 3 + len(bench.dropped)
    assert bench.stored[3:-1] == ids[3 + len(bench.dropped) :]
    bench.close()


def test_the_newest_give_way_if_that_is_wanted_and_the_server_is_told():
    bench = Bench(store_bytes=8192, refuse_newest=True)
    taken = 0
    while bench.add(1)[0]:
        taken += 1
        bench.device.save()
    assert bench.device.dropped() == 1
    assert bench.device.refused() == 0
    assert not bench.device.sleep_allowed()  # the memory is full as well
    bench.drain()
    assert len(bench.stored) == taken + 1  # with the note
    bench.close()


def test_without_a_store_the_memory_is_all_there_is():
    bench = Bench(folder="")
    bench.folder = None
    bench.boot()
    ids = bench.add(100)
    assert bench.device.kept() == 0
    assert not bench.device.sleep_allowed()
    assert bench.device.dropped() == 100 - bench.device.waiting() > 0
    assert bench.dropped == ids[: len(bench.dropped)]
    bench.drain()
    assert bench.device.sleep_allowed()
    bench.close()


def test_a_store_that_cannot_be_made_costs_only_what_does_not_fit_in_memory():
    bench = Bench(folder="missing/outbox")
    bench.add(2)
    assert not bench.device.save()
    assert not bench.device.sleep_allowed()
    assert bench.device.store_errors() > 0
    bench.drain()
    assert len(bench.stored) == 2
    first = bench.device.client_id
    bench.boot()
    assert bench.device.client_id != first, "the same salt, though nothing was kept"
    bench.close()


def test_a_file_system_that_others_have_filled_is_survived():
    bench = Bench(blocks=32)
    bench.add(5)
    assert bench.device.save()
    with open(bench.path + "/full", "wb") as file:
        try:
            while True:
                file.write(bytes(512))
                file.flush()
        except OSError:
            pass
    ids = []
    while not bench.device.store_errors():
        ids += bench.add(3)
        bench.device.save()
    assert not bench.device.sleep_allowed()
    assert not set(ids[-3:]) & set(bench.kept)
    bench.drain()
    assert not bench.dropped
    assert set(ids) <= set(bench.stored)
    bench.close()


def test_a_damaged_record_costs_itself_and_is_counted():
    for position, lost in ((30, 1), (-1, 1), (4, 1)):
        bench = Bench()
        bench.add(5)
        bench.device.save()
        path = "%s/%s" % (bench.folder, bench.files()[0])
        with open(path, "rb") as file:
            content = bytearray(file.read())
        content[position] ^= 0x10
        with open(path, "wb") as file:
            file.write(content)
        bench.boot()
        assert bench.device.damaged() == 1
        assert bench.device.kept() == 5 - lost
        bench.add(1)
        bench.device.save()  # not behind a line that may have no end
        bench.boot()
        assert bench.device.kept() == 6 - lost
        bench.drain()
        bench.close()


def test_an_event_larger_than_a_segment_is_kept_too():
    bench = Bench(memory_bytes_max=65536, send_bytes_max=16384, receive_bytes_max=16384)
    bench.add(3, size=9000)
    assert bench.device.save()
    bench.boot()
    assert bench.device.kept() == 3
    assert bench.device.damaged() == 0
    bench.drain()
    assert len(bench.stored) == 3
    bench.close()


def test_a_file_that_is_far_too_large_is_left_alone():
    bench = Bench()
    with open(bench.folder + "/7", "wb") as file:
        for _ in range(70):
            file.write(bytes(1024))
    bench.boot()
    bench.add(1)
    assert bench.device.save()
    bench.drain()
    assert bench.files() == ["7"]
    assert bench.device.damaged() == 1
    bench.close()


def test_what_is_not_ours_is_left_alone_and_an_empty_file_is_none():
    bench = Bench()
    bench.add(1)
    bench.device.save()
    for name, content in (("notes.txt", b"x"), ("99", b"")):
        with open(bench.folder + "/" + name, "wb") as file:
            file.write(content)
    bench.boot()
    assert bench.device.damaged() == 1
    assert bench.device.kept() == 1
    assert "notes.txt" in os.listdir(bench.folder)
    assert "99" not in os.listdir(bench.folder)
    bench.drain()
    assert bench.files() == []
    bench.close()


def test_a_callback_may_use_the_outbox():
    bench = Bench(store_bytes=8192)

    def more(event_id):
        if len(bench.stored) < 30:
            bench.add(3)
            bench.device.save()
        bench.stored.append(event_id)

    bench.device.on_stored = more
    bench.add(5)
    bench.drain()
    assert len(bench.stored) > 30
    bench.close()


def main():
    for name, test in sorted(globals().items()):
        if name.startswith("test_"):
            print(name)
            test()


if __name__ == "__main__":
    main()
