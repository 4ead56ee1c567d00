"""The vectors of devices/contract.json against the real ingester: what it accepts, and answers.

What it does: sends each event of the contract as a device library would, and compares the row and
the ACK, byte for byte. What it does not: run a library; devices/arduino/test and
devices/micropython/test hold each to the same file.

Invariant: no section and no key of the file is passed over; one that is not known here fails.
"""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from ingester.event import Event, decode
from ingester.rejection import Reason, Rejection
from ingester.reply import ack
from tests.support.device import Device
from tests.support.pipeline import Pipeline
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
DEVICE = CONTRACT["topics"]["device_id"]
SALT = CONTRACT["acks_device"]["salt"]


def named(section: str) -> pytest.MarkDecorator:
    vectors = CONTRACT[section]
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def only(device_id: str, payload: str) -> Event | Rejection:
    (result,) = decode(device_id, payload.encode(), UTC).results
    return result


def moment(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms / 1000, UTC)


def written(given: dict[str, Any]) -> str:
    """Return the event that a library without any check would write."""
    names = {"type": "event_type", "unix_ms": "ts_device"}
    fields = {names.get(name, name): value for name, value in given.items()}
    return json.dumps({"schema": 1, "event_id": "x", "device_id": DEVICE} | fields)


def test_every_section_and_every_key_is_known_here() -> None:
    assert set(CONTRACT) == OTHERS | set(KEYS)
    for section, keys in KEYS.items():
        assert CONTRACT[section], section
        for vector in CONTRACT[section]:
            assert set(vector) <= keys, vector["name"]
        assert len({vector["name"] for vector in CONTRACT[section]}) == len(CONTRACT[section])


@named("ids")
def test_an_id_of_the_contract_is_taken_and_what_is_refused_would_be(
    vector: dict[str, Any],
) -> None:
    device_id = vector["device_id"]
    event_id = vector["event_id"] or f"{device_id}-{vector['salt']}-1-1"
    event = {"schema": 1, "event_id": event_id, "device_id": device_id, "event_type": "t"}
    result = only(device_id, json.dumps(event))
    assert isinstance(result, Event if vector["event_id"] else Rejection)
    if vector["event_id"]:
        parts = (vector["salt"], str(vector["boot"]), str(vector["sequence"]))
        assert event_id == "-".join((device_id, *parts))


@named("events")
def test_an_event_of_the_contract_is_decoded_to_what_was_given(vector: dict[str, Any]) -> None:
    given = vector["given"]
    if vector["json"] is None:
        result = only(DEVICE, written(given))
        assert isinstance(result, Rejection)
        assert result.reason == Reason.INVALID_FIELD
        return
    result = only(DEVICE, vector["json"])
    assert isinstance(result, Event), result
    value = given.get("value")
    unix_ms = given.get("unix_ms", 0)
    is_plausible = unix_ms > 1_000_000_000_000
    assert result.event_type == given["type"]
    assert result.value_num == (None if isinstance(value, str) or value is None else float(value))
    assert result.value_text == (value if isinstance(value, str) else None)
    assert result.unit == given.get("unit")
    assert result.ts_device == (moment(unix_ms) if is_plausible else None)
    assert json.loads(result.meta) == given.get("meta", {})
    device = CONTRACT["events_device"]
    key = f"{device['salt']}-{device['boot']}-{device['sequence']}"
    assert result.event_id == f"{device['device_id']}-{key}"


@pytest.mark.parametrize("number", CONTRACT["numbers_that_are_none"])
def test_a_number_that_is_none_would_be_rejected(number: str) -> None:
    payload = (
        f'{{"schema":1,"event_id":"x","device_id":"{DEVICE}","event_type":"t","value":{number}}}'
    )
    result = only(DEVICE, payload)
    assert isinstance(result, Rejection)
    assert result.reason == Reason.INVALID_FIELD


@named("clock")
def test_a_time_of_the_contract_is_the_moment_that_was_meant(vector: dict[str, Any]) -> None:
    if vector["ts_device"] is None:
        return
    event = {"schema": 1, "event_id": "x", "device_id": DEVICE, "event_type": "t"}
    result = only(DEVICE, json.dumps(event | {"ts_device": vector["ts_device"]}))
    assert isinstance(result, Event)
    assert result.ts_device == moment(vector["unix_ms"])


@named("batches")
def test_a_packet_of_the_contract_holds_its_events(vector: dict[str, Any]) -> None:
    decoded = decode(DEVICE, vector["payload"].encode(), UTC)
    assert decoded.is_array == (len(vector["events"]) > 1)
    assert list(decoded.results) == [only(DEVICE, event) for event in vector["events"]]


@named("limits")
def test_the_answer_to_as_many_events_as_the_contract_allows_fits(vector: dict[str, Any]) -> None:
    # The longest text that the ingester has for an event whose JSON is right.
    error = "event_id: was stored before with other content, which stays"
    rejection = Rejection(Reason.EVENT_ID_CONFLICT, error)
    answer = ack(vector["device_id"], vector["event_id"], rejection)
    number = vector["events"]
    assert (
        len(f"[{', '.join([answer] * number)}]".encode()) <= vector["receive_bytes"] or number == 1
    )
    # And as many as that: what is allowed for one is 200 bytes and the two ids.
    one = len(vector["event_id"]) + len(vector["device_id"]) + 200
    assert number == max(1, (vector["receive_bytes"] - 2) // one)


@named("dropped")
def test_an_event_that_tells_of_lost_ones_is_decoded(vector: dict[str, Any]) -> None:
    result = only(DEVICE, vector["json"])
    assert isinstance(result, Event)
    assert result.event_type == "outbox_dropped"
    assert result.value_num == vector["to"] - vector["from"] + 1
    told = {name: vector[name] for name in ("salt", "boot", "from", "to")}
    assert json.loads(result.meta) == told


def test_every_event_of_the_contract_becomes_a_row(running: Pipeline) -> None:
    device_id = CONTRACT["events_device"]["device_id"]
    events = [vector["json"] for vector in CONTRACT["events"] + CONTRACT["dropped"]]
    payloads = [
        payload.replace("-17-42", f"-17-{number}").encode()
        for number, payload in enumerate((text for text in events if text), 100)
    ]
    with running.device(device_id) as device:
        for payload in payloads:
            device.publish(payload)
        device.wait(lambda: len(device.acks) == len(payloads), "an ACK each")
        assert {item["status"] for item in device.acks} == {"stored"}
    assert running.database.count() == len(payloads)
    assert running.database.count("dead_letters") == 0


def salted(text: str, number: int) -> str:
    """Return the text with a salt of the vector's own, as the table is the same for all."""
    return text.replace(SALT, f"{number:08x}")


def test_every_ack_of_the_contract_is_what_the_ingester_writes(running: Pipeline) -> None:
    vectors = [vector for vector in CONTRACT["acks"] if vector["sent"] is not None]
    assert len(vectors) >= 9
    topic = CONTRACT["topics"]["acks"]
    with running.device(DEVICE) as device:
        for number, vector in enumerate(vectors):
            for before in vector.get("stored_before", []):
                assert published(device, salted(before, number), topic)
            got = published(device, salted(vector["sent"], number), topic)
            assert got == salted(vector["payloads"][0], number), vector["name"]
    # What no ingester sends is for the libraries alone.
    assert len(CONTRACT["acks"]) > len(vectors)


def published(device: Device, payload: str, topic: str) -> str:
    """Publish on the topic of the contract; return the ACK as it came."""

    def answers() -> list[bytes]:
        return [body for heard, body in device.messages if heard == topic]

    before = len(answers())
    device.publish(payload.encode(), topic=CONTRACT["topics"]["events"])
    device.wait(lambda: len(answers()) > before, "an ACK")
    return answers()[before].decode()
