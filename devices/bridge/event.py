"""Events of the contract, from readings.

What it does: gives each reading its id and writes it as JSON. What it does not: keep or send it.

Invariant: the same reading with the same id always gives the same bytes.
"""

import json
from typing import Any

from devices.bridge.translate import Incoming, Reading

# Characters of a payload that a dead letter shows; the message itself is the firmware's.
SHOWN_CHARS_MAX = 2_000

_TO_JSON = json.JSONEncoder(separators=(",", ":"))


def event_of(reading: Reading, made_id: str) -> dict[str, Any]:
    """Return the event. `made_id` is its id if the message has no time of its own."""
    event: dict[str, Any] = {
        "schema": 1,
        "event_id": made_id if reading.key is None else f"bridge-{reading.key}",
        "device_id": reading.device_id,
        "event_type": reading.event_type,
        "value": reading.value,
    }
    if reading.unit is not None:
        event["unit"] = reading.unit
    if reading.ts_device is not None:
        event["ts_device"] = reading.ts_device
    event["meta"] = reading.meta
    return event


def dead_end_of(message: Incoming, why: str, device_id: str, event_id: str) -> dict[str, Any]:
    """Return what the ingester refuses, and so keeps as a dead letter: its value is an object.

    Thus what looks like a reading and cannot become one is found where all the others are.
    """
    return {
        "schema": 1,
        "event_id": event_id,
        "device_id": device_id,
        "event_type": "bridge.dead_end",
        "value": {
            "why": why,
            "topic": message.topic[:1_000],
            "bytes": len(message.payload),
            "payload": message.payload[:SHOWN_CHARS_MAX].decode("utf-8", "backslashreplace"),
        },
    }


def as_bytes(event: dict[str, Any]) -> bytes:
    """Return the event as JSON; what is not ASCII is escaped, so it is always UTF-8."""
    return _TO_JSON.encode(event).encode("ascii")
