"""What the ingester answers: from the bytes of an ACK to event ids.

What it does: finds what each answer says. What it does not: know which events there are.

Invariant: any bytes give answers or none, never an exception; what is not clearly one of
ours is none.
"""

import json
from typing import NamedTuple


class Answer(NamedTuple):
    """Of one event: it is stored if there is no reason."""

    event_id: str
    reason: str | None = None
    error: str = ""


def answers(device_id: str, payload: bytes) -> list[Answer]:
    """Return what is said to `device_id`."""
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError):
        return []
    found = []
    for item in document if isinstance(document, list) else [document]:
        if not isinstance(item, dict) or item.get("schema") != 1:
            continue
        event_id = item.get("event_id")
        if not isinstance(event_id, str) or item.get("device_id") != device_id:
            continue
        if item.get("status") == "stored":
            found.append(Answer(event_id))
        elif item.get("status") == "rejected":
            reason, error = str(item.get("reason", "")), str(item.get("error", ""))
            found.append(Answer(event_id, reason, error))
    return found
