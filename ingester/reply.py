"""What the ingester publishes: ACKs to devices, dead letters to whoever listens.

What it does: builds topic and bytes from results. What it does not: publish, or keep; the
whole of a refused payload is a row of dead_letters, and the published one is cut short.

Invariant: a reply is small enough for the broker, whatever the device sent. A packet
larger than the broker takes would disconnect the ingester, again and again.
"""

import base64
import json
from datetime import UTC, datetime
from json.encoder import encode_basestring as _quoted
from typing import NamedTuple

from ingester.event import SCHEMA
from ingester.rejection import DeadLetter, Rejection

# Characters of a payload in a published dead letter. The row has all of it.
PAYLOAD_CHARS_MAX = 2_000
# Made once: json.dumps() makes one at every call that is not to escape what is not ASCII.
_TO_JSON = json.JSONEncoder(ensure_ascii=False)


class Reply(NamedTuple):
    """A topic and bytes to publish, with QoS 1 and not retained."""

    topic: str
    payload: bytes


def timestamp(moment: datetime) -> str:
    """Return the moment as everything published writes it: UTC, with milliseconds and a Z."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def ack(device_id: str, event_id: str | None, rejection: Rejection | None) -> str:
    """Return the answer to one event, in JSON: stored, or rejected if there is a rejection."""
    # By hand, as an encoder takes several times as long.
    own = (
        f'{{"schema": {SCHEMA}, "event_id": {"null" if event_id is None else _quoted(event_id)}, '
        f'"device_id": {_quoted(device_id)}, "status": '
    )
    if rejection is None:
        return f'{own}"stored"}}'
    return f'{own}"rejected", "reason": "{rejection.reason}", "error": {_quoted(rejection.error)}}}'


def ack_for(topic: str, answers: list[str], *, is_array: bool) -> Reply:
    """Return the ACK of one message: an object, or an array if an array was sent."""
    text = f"[{', '.join(answers)}]" if is_array else answers[0]
    return Reply(topic, text.encode("utf-8"))


def dead_letter_for(topic: str, letter_id: int, letter: DeadLetter) -> Reply:
    """Return what is published of the row `letter_id` of dead_letters."""
    try:
        payload, encoding = letter.payload.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        # As many bytes as fill the limit once each three of them are four characters.
        head = letter.payload[: PAYLOAD_CHARS_MAX // 4 * 3]
        payload, encoding = base64.b64encode(head).decode("ascii"), "base64"
        truncated = len(head) < len(letter.payload)
    else:
        truncated = len(payload) > PAYLOAD_CHARS_MAX
    body = {
        "schema": SCHEMA,
        "id": letter_id,
        "reason": letter.reason,
        "error": letter.error,
        "topic": letter.topic,
        "device_id": letter.device_id,
        "event_id": letter.event_id,
        "payload": payload[:PAYLOAD_CHARS_MAX],
        "payload_encoding": encoding,
        "truncated": truncated,
        "received_at": timestamp(letter.received_at),
    }
    return Reply(topic, _TO_JSON.encode(body).encode("utf-8"))
