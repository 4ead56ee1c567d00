"""What the ingester answers: from the bytes of an ACK to event ids.

What it does: finds what each answer says. What it does not: know which events there are.

Invariant: any bytes give answers or none, never an exception; what is not clearly one of
ours is none.
"""

from json import loads


def answers(device_id: str, payload: bytes) -> list[tuple[str, str | None]]:
    """Return (event id, None) for what is stored, (event id, reason) for what is rejected.

    Only what is said to `device_id` counts.
    """
    try:
        document = loads(payload)
    except (ValueError, RuntimeError, MemoryError):  # RuntimeError: nested too deep
        return []
    found: list[tuple[str, str | None]] = []
    for item in document if isinstance(document, list) else [document]:
        if not isinstance(item, dict) or item.get("schema") != 1:
            continue
        event_id = item.get("event_id")
        if not isinstance(event_id, str) or item.get("device_id") != device_id:
            continue
        if item.get("status") == "stored":
            found.append((event_id, None))
        elif item.get("status") == "rejected":
            found.append((event_id, str(item.get("reason", ""))))
    return found
