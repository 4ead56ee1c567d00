"""Recorded messages: what each would become, without a broker.

What it does: reads one JSON object a line (`topic`, `payload` or `payload_b64`; `delivered`:
"retained" for a stored copy, `tz` for its zone) and prints one a line. What it does not: learn in
the order of a broker, which hands out what is retained first; so it does here.

Invariant: nothing is stored or sent.
"""

import base64
import json
from collections.abc import Iterator
from typing import Any, TextIO
from zoneinfo import ZoneInfo

from devices.bridge.source import Sources
from devices.bridge.translate import Incoming, Translation, Translator
from devices.python.telemetry.event import event_bytes


class RecordError(Exception):
    """A line is no recorded message; the text is one line, with the place."""


def messages(file: TextIO, name: str) -> Iterator[Incoming]:
    """Yield the messages of a file. Raises RecordError."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            payload = given.get("payload", "")
            if "payload_b64" in given:
                data = base64.b64decode(given["payload_b64"])
            else:
                data = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
            zone = ZoneInfo(given["tz"]) if given.get("tz") else None
            is_retained = given.get("delivered") == "retained"
            message = Incoming(str(given["topic"]), data, is_retained, zone=zone)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
            raise RecordError(f"{name}: line {number}: no recorded message: {error}") from None
        yield message
        if given.get("repeat"):
            yield message


def as_line(message: Incoming, translation: Translation, number: int) -> str:
    """Return what a message becomes, as one line of JSON; its events are what would be sent."""
    events = [
        event_bytes(
            event.event_id or f"made-by-the-outbox-{number}-{index}",
            event.device_id or "",
            event,
            None,
        ).decode()
        for index, event in enumerate(translation.events)
    ]
    line: dict[str, Any] = {"topic": message.topic, "preset": translation.source, "events": []}
    if translation.skipped:
        line["not_stored"] = dict(translation.skipped)
    if translation.dead_end:
        line["dead_end"] = translation.dead_end
    text = json.dumps(line, ensure_ascii=False)
    return text.replace('"events": []', f'"events": [{",".join(events)}]', 1)


def tried(recorded: list[Incoming], sources: Sources) -> Iterator[str]:
    """Yield a line for each message; names and units of all of them are known before."""
    first = Translator(sources)
    for message in recorded:
        first.translate(message)
    again = Translator(sources, first.names, units=first.units)
    for number, message in enumerate(recorded, 1):
        yield as_line(message, again.translate(message), number)
