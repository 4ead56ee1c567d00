"""Every vector of devices/contract.json, against the MicroPython library.

What it does: builds, sends and hears what the vectors say, through Telemetry itself. What it
does not: ask the ingester; the same vectors are run against it elsewhere.

Invariant: a section, a vector or a key that is not looked at fails.
"""

import json
import random
import sys

from telemetry import Telemetry
from telemetry.ack import answers
from telemetry.event import event_bytes, timestamp_text
from telemetry.outbox import NO_TIME, payload_of

ANY_BYTES = 20_000
PARTS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\u",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"-",
    b"1e999",
)


def device(device_id, salt, boot, sequence=0, **options):
    """Return a device that is at this point of its life."""
    made = Telemetry(device_id, clock=lambda: NO_TIME, **options)
    made.begin()
    made._salt, made._boot, made._sequence = salt, boot, sequence
    return made


def keys(vector, *known):
    assert not set(vector) - set(known), "unknown keys: %s" % (set(vector) - set(known))


def check_topics(vector):
    keys(vector, "events", "acks", "device_id")
    made = Telemetry(vector["device_id"])
    assert made.events_topic == vector["events"]
    assert made.acks_topic == vector["acks"]


def check_id(vector):
    keys(vector, "name", "device_id", "salt", "boot", "sequence", "event_id")
    try:
        made = device(vector["device_id"], vector["salt"], vector["boot"], vector["sequence"] - 1)
    except ValueError:
        assert vector["event_id"] is None
        return
    assert made.add("t") == vector["event_id"]


def add(made, given):
    keys(given, "type", "value", "unit", "unix_ms", "meta")
    return made.add(
        given["type"],
        given.get("value"),
        given.get("unit"),
        given.get("unix_ms"),
        given.get("meta"),
    )


def sent(made):
    """Return what the device sends, until it is silent."""
    found = []

    def publish(topic, payload):
        assert topic == made.events_topic
        found.append(payload)
        return True

    made.connected()
    made.loop(publish)
    made.loop(publish)
    return found


def check_event(vector, of):
    keys(vector, "name", "given", "json", "stored")
    made = device(of["device_id"], of["salt"], of["boot"], of["sequence"] - 1)
    event_id = add(made, vector["given"])
    if vector["json"] is None:
        assert event_id is None
        assert not made.waiting()
        assert not sent(made)
        event_id = made.add("t")  # the sequence number is not used up
    else:
        assert sent(made) == [vector["json"].encode()], sent(made)
    assert event_id == "%s-%s-%d-%d" % (of["device_id"], of["salt"], of["boot"], of["sequence"])


def check_no_number(text, of):
    check_event({"given": {"type": "t", "value": float(text)}, "json": None}, of)
    check_event({"given": {"type": "t", "meta": {"a": [float(text)]}}, "json": None}, of)


def check_clock(vector):
    keys(vector, "name", "unix_ms", "ts_device")
    assert timestamp_text(vector["unix_ms"]) == vector["ts_device"]


def check_batch(vector):
    keys(vector, "name", "events", "payload")
    assert payload_of([event.encode() for event in vector["events"]]) == vector["payload"].encode()


def check_limit(vector):
    keys(vector, "name", "device_id", "event_id", "receive_bytes", "events")
    start, salt, boot, sequence = vector["event_id"].rsplit("-", 3)
    assert start == vector["device_id"]
    made = device(
        start, salt, int(boot), int(sequence) - 1, receive_bytes_max=vector["receive_bytes"]
    )
    for _ in range(vector["events"] + 1):
        made.add("t")
    (payload,) = sent(made)
    assert payload.count(b'"event_id"') == vector["events"], payload


def check_dropped(vector, of):
    keys(vector, "name", "salt", "boot", "from", "to", "json")
    made = device(of["device_id"], of["salt"], of["boot"], of["sequence"] - 1)
    for sequence in range(vector["from"], vector["to"] + 1):
        event_id = "%s-%s-%d-%d" % (of["device_id"], vector["salt"], vector["boot"], sequence)
        made._drop(event_id, event_bytes(event_id, of["device_id"], "t", 1, None, 0, None))
    made._answered = True  # what is lost is told once there are answers
    made._connected = True
    found = []
    made.loop(lambda topic, payload: found.append(payload) or True)
    assert found == [vector["json"].encode()], found
    assert made.dropped() == vector["to"] - vector["from"] + 1


def check_ack(vector, of):
    # `sent` and `stored_before` say what the ingester is given for this answer.
    keys(vector, "name", "sent", "stored_before", "payloads", "stored", "rejected", "waiting")
    keys(of, "device_id", "salt", "boot", "added")
    made = device(of["device_id"], of["salt"], of["boot"])
    ids = [add(made, given) for given in of["added"]]
    (payload,) = sent(made)
    assert [event["event_id"] for event in json.loads(payload)] == ids
    stored, rejected = [], []
    made.on_stored = lambda event_id: stored.append(ids.index(event_id) + 1)
    made.on_rejected = lambda event_id, reason: rejected.append([ids.index(event_id) + 1, reason])
    for answer in vector["payloads"]:
        made.on_message(made.acks_topic, answer.encode())
    assert stored == vector["stored"], stored
    assert rejected == vector["rejected"], rejected
    waiting = [
        number
        for number in range(1, 4)
        if number not in stored and number not in [refused for refused, _ in rejected]
    ]
    assert waiting == vector["waiting"]
    assert made.waiting() == len(waiting)
    made.connected()
    again = b"".join(sent(made))
    for number, event_id in enumerate(ids, 1):
        assert (event_id.encode() in again) == (number in waiting)


def check_any_bytes(vectors):
    """Damage the answers at random: each gives answers or none, and never an exception."""
    random.seed(20260210)
    payloads = [payload.encode() for vector in vectors for payload in vector["payloads"]]
    for _ in range(ANY_BYTES):
        damaged = bytearray(random.choice(payloads))
        for _ in range(random.randint(1, 5)):
            place = random.randint(0, len(damaged))
            other = random.randint(0, len(damaged))
            way = random.randint(0, 2)
            if way == 0:
                damaged = damaged[:place] + damaged[min(place, other) :]
            elif way == 1:
                damaged = damaged[:place] + random.choice(PARTS) + damaged[place:]
            elif place < len(damaged):
                damaged[place] = random.getrandbits(8)
        for event_id, _ in answers("esp32-01", bytes(damaged)):
            assert isinstance(event_id, str)
    print("%d damaged answers harm nobody" % ANY_BYTES)


def main():
    with open(sys.argv[1]) as file:
        contract = json.load(file)
    of = contract["events_device"]
    keys(of, "device_id", "salt", "boot", "sequence")
    checks = {
        "ids": check_id,
        "events": lambda vector: check_event(vector, of),
        "numbers_that_are_none": lambda text: check_no_number(text, of),
        "clock": check_clock,
        "batches": check_batch,
        "limits": check_limit,
        "dropped": lambda vector: check_dropped(vector, of),
        "acks": lambda vector: check_ack(vector, contract["acks_device"]),
    }
    keys(contract, "about", "topics", "events_device", "acks_device", *checks)
    check_topics(contract["topics"])
    count, failed = 0, 0
    for section, check in checks.items():
        assert contract[section], "no vectors: " + section
        for vector in contract[section]:
            count += 1
            try:
                check(vector)
            except (AssertionError, KeyError, TypeError, ValueError) as error:
                failed += 1
                print("FAILED", section, vector["name"] if isinstance(vector, dict) else vector)
                sys.print_exception(error)
    print("%d of %d vectors hold" % (count - failed, count))
    check_any_bytes(contract["acks"])
    sys.exit(1 if failed or not count else 0)


if __name__ == "__main__":
    main()
