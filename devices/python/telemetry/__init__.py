"""Events that reach the database, whatever happens to this computer: see Outbox and PahoLink.

What it does: names what programs import. What it does not: anything else.
"""

from .errors import (
    EventRefused,
    OutboxError,
    StoreDamaged,
    StoreFailed,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
)
from .event import NO_TIME, Event
from .outbox import Message, Outbox, Rejected
from .paho_link import PahoLink

__all__ = [
    "NO_TIME",
    "Event",
    "EventRefused",
    "Message",
    "Outbox",
    "OutboxError",
    "PahoLink",
    "Rejected",
    "StoreDamaged",
    "StoreFailed",
    "StoreFull",
    "StoreLocked",
    "StoreReadOnly",
]
