"""What the store holds: events as they were kept, and the note of those that were dropped.

What it does: names their fields. What it does not: anything else.
"""

from typing import NamedTuple


class Kept(NamedTuple):
    """One event; its bytes are never written anew."""

    event_id: str
    device_id: str
    payload: bytes


class Run(NamedTuple):
    """Lost events of one device with numbers in a row; without salt: any, only counted."""

    device_id: str
    salt: str
    boot: int
    first: int
    last: int
