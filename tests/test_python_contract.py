"""The vectors of devices/contract.json against the Python library.

What it does: builds, sends and hears what the vectors say, through Outbox itself. What it does
not: ask the ingester; test_device_contract.py holds it to the same file.

Invariant: a section, a vector or a key of the file that is not known here fails.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.python.telemetry import NO_TIME, Event, EventRefused, Message, Outbox, Rejected
from devices.python.telemetry.ack import answers
from devices.python.telemetry.event import timestamp_text
from devices.python.telemetry.outbox import payload_of
from tools.process import CHECKOUT

CONTRACT: dict[str, Any] = json.loads((CHECKOUT / "devices/contract.json").read_text("utf-8"))
KEYS = {
    "ids": {"name", "device_id", "salt", "boot", "sequence", "event_id"},
    "events": {"name", "given", "json"},
    "clock": {"name", "unix_ms", "ts_device"},
    "batches": {"name", "events", "payload"},
    "limits": {"name", "device_id", "event_id", "receive_bytes", "events"},
    "dropped": {"name", "salt", "boot", "from", "to", "json"},
    "acks": {"name", "sent", "stored_before", "payloads", "stored", "rejected", "waiting"},
}
OTHERS = {"about", "topics", "events_device", "numbers_that_are_none", "acks_device"}
TOPICS = CONTRACT["topics"]
DEVICE = CONTRACT["events_device"]
ACKS_DEVICE = CONTRACT["acks_device"]
GIVEN = {"type", "value", "unit", "unix_ms", "meta"}
PARTS = [
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
]


class Devices:
    """Makes outboxes that are at a point of their life."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: list[Outbox] = []

    def at(self, device_id: str, salt: str, boot: int, sequence: int, **options: Any) -> Outbox:
        """Return one whose next event has the sequence."""
        folder = self._folder / str(len(self._opened))
        outbox = Outbox(folder, device_id, clock=lambda: NO_TIME, **options)
        self._opened.append(outbox)
        outbox._store.salt, outbox._store.boot = salt, boot
        outbox._sequences[device_id] = sequence - 1
        return outbox

    def close(self) -> None:
        for outbox in self._opened:
            outbox.close()


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Devices]:
    made = Devices(tmp_path)
    yield made
    made.close()


def named(section: str) -> pytest.MarkDecorator:
    vectors = CONTRACT[section]
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def add(outbox: Outbox, given: dict[str, Any]) -> str:
    assert set(given) <= GIVEN
    unix_ms = given.get("unix_ms")
    timestamp = None if unix_ms is None else unix_ms / 1000
    return outbox.add(
        given["type"], given.get("value"), given.get("unit"), timestamp, given.get("meta")
    )


def sent(outbox: Outbox) -> list[bytes]:
    outbox.connected()
    messages = outbox.due()
    assert outbox.due() == []
    assert {message.topic for message in messages} <= {TOPICS["events"]}
    return [message.payload for message in messages]


def check_event(devices: Devices, given: dict[str, Any], expected: str | None) -> None:
    outbox = devices.at(**DEVICE)
    if expected is None:
        with pytest.raises(EventRefused):
            add(outbox, given)
        assert outbox.refused() == 1
        assert outbox.waiting() == 0
        assert sent(outbox) == []
        event_id = outbox.add("t")  # the sequence number is not used up
    else:
        event_id = add(outbox, given)
        assert sent(outbox) == [expected.encode()]
    ending = f"{DEVICE['salt']}-{DEVICE['boot']}-{DEVICE['sequence']}"
    assert event_id == f"{DEVICE['device_id']}-{ending}"


def test_every_section_and_every_key_is_known_here() -> None:
    assert set(CONTRACT) == OTHERS | set(KEYS)
    assert set(TOPICS) == {"events", "acks", "device_id"}
    for section, keys in KEYS.items():
        assert CONTRACT[section], section
        for vector in CONTRACT[section]:
            assert set(vector) <= keys, vector["name"]


def test_the_topics_are_those_of_the_contract(devices: Devices) -> None:
    outbox = devices.at(TOPICS["device_id"], "00000000", 1, 1)
    outbox.add("t")
    outbox.connected()
    assert [message.topic for message in outbox.due()] == [TOPICS["events"]]
    assert outbox.subscriptions() == [TOPICS["acks"]]


@named("ids")
def test_an_id_is_as_the_contract_has_it(devices: Devices, vector: dict[str, Any]) -> None:
    at = {name: vector[name] for name in ("device_id", "salt", "boot", "sequence")}
    if vector["event_id"] is None:
        with pytest.raises(EventRefused):
            devices.at(**at)
        with pytest.raises(EventRefused):
            refused(devices, Event("t", device_id=vector["device_id"]))
    else:
        assert devices.at(**at).add("t") == vector["event_id"]


def refused(devices: Devices, event: Event) -> None:
    """Raise what an outbox of many devices says of the event."""
    outbox = devices.at("x", "00000000", 1, 1)
    outbox.device_id = None
    (result,) = outbox.add_all([event])
    assert isinstance(result, EventRefused)
    raise result


@named("events")
def test_an_event_has_the_bytes_of_the_contract(devices: Devices, vector: dict[str, Any]) -> None:
    check_event(devices, vector["given"], vector["json"])


@pytest.mark.parametrize("number", CONTRACT["numbers_that_are_none"])
def test_a_number_that_is_none_is_refused(devices: Devices, number: str) -> None:
    check_event(devices, {"type": "t", "value": float(number)}, None)
    check_event(devices, {"type": "t", "meta": {"a": [float(number)]}}, None)


@named("clock")
def test_a_clock_that_was_not_set_gives_no_time(vector: dict[str, Any]) -> None:
    assert timestamp_text(vector["unix_ms"] / 1000) == vector["ts_device"]


@named("batches")
def test_a_batch_is_the_packet_of_the_contract(vector: dict[str, Any]) -> None:
    events = [event.encode() for event in vector["events"]]
    assert payload_of(events) == vector["payload"].encode()


@named("limits")
def test_no_more_is_sent_than_can_be_answered(devices: Devices, vector: dict[str, Any]) -> None:
    device_id, salt, boot, sequence = vector["event_id"].rsplit("-", 3)
    assert device_id == vector["device_id"]
    options = {"receive_bytes_max": vector["receive_bytes"]}
    outbox = devices.at(device_id, salt, int(boot), int(sequence), **options)
    for _ in range(vector["events"] + 1):
        outbox.add("t")
    (payload,) = sent(outbox)
    assert payload.count(b'"event_id"') == vector["events"]


@named("dropped")
def test_what_was_dropped_is_told_in_the_bytes_of_the_contract(
    devices: Devices, vector: dict[str, Any]
) -> None:
    number = vector["to"] - vector["from"] + 1
    outbox = devices.at(
        DEVICE["device_id"], vector["salt"], vector["boot"], vector["from"], events_max=2
    )
    for _ in range(number + 2):
        outbox.add("t")
    assert outbox.dropped() == number
    outbox._store.salt, outbox._store.boot = DEVICE["salt"], DEVICE["boot"]
    outbox._sequences[DEVICE["device_id"]] = DEVICE["sequence"] - 1
    (payload,) = sent(outbox)
    assert b"outbox_dropped" not in payload  # what is lost is told once there are answers
    for event in json.loads(payload):
        ack = {"schema": 1, "event_id": event["event_id"], "status": "stored"}
        ack["device_id"] = DEVICE["device_id"]
        outbox.on_message(TOPICS["acks"], json.dumps(ack).encode())
    assert outbox.due() == [Message(TOPICS["events"], vector["json"].encode())]


@named("acks")
def test_an_ack_does_what_the_contract_says(devices: Devices, vector: dict[str, Any]) -> None:
    assert set(ACKS_DEVICE) == {"device_id", "salt", "boot", "added"}
    outbox = devices.at(ACKS_DEVICE["device_id"], ACKS_DEVICE["salt"], ACKS_DEVICE["boot"], 1)
    ids = [add(outbox, given) for given in ACKS_DEVICE["added"]]
    (payload,) = sent(outbox)
    assert [event["event_id"] for event in json.loads(payload)] == ids
    stored: list[int] = []
    rejected: list[list[object]] = []

    def on_rejected(event: Rejected) -> None:
        assert json.loads(event.payload)["event_id"] == event.event_id
        rejected.append([ids.index(event.event_id) + 1, event.reason])

    outbox.on_stored = lambda event_id: stored.append(ids.index(event_id) + 1)
    outbox.on_rejected = on_rejected
    for answer in vector["payloads"]:
        assert outbox.on_message(TOPICS["acks"], answer.encode())
    assert stored == vector["stored"]
    assert rejected == vector["rejected"]
    assert outbox.waiting() == len(vector["waiting"])
    again = b"".join(sent(outbox))
    left = [number for number, each in enumerate(ids, 1) if each.encode() in again]
    assert left == vector["waiting"]


def test_any_bytes_are_answers_or_none() -> None:
    randomness = random.Random(20260210)
    payloads = [text.encode() for vector in CONTRACT["acks"] for text in vector["payloads"]]
    for _ in range(20_000):
        damaged = bytearray(randomness.choice(payloads))
        for _ in range(randomness.randint(1, 5)):
            place, other = (randomness.randint(0, len(damaged)) for _ in range(2))
            way = randomness.randint(0, 2)
            if way == 0:
                del damaged[place:other]
            elif way == 1:
                damaged[place:place] = randomness.choice(PARTS)
            elif place < len(damaged):
                damaged[place] = randomness.getrandbits(8)
        for answer in answers("esp32-01", bytes(damaged)):
            assert isinstance(answer.event_id, str)
