"""Why an event was not stored, and what is kept of it.

What it does: names every reason, and carries one refused event from where it was refused
to where it is answered. What it does not: decide; that is done by event.py (the contract)
and store.py (the database).

Invariant: the set of reasons is closed and its codes are stable. Firmware and dashboards
compare them, so a code is never renamed, and docs/contract.md lists each one.
"""

from datetime import datetime
from enum import StrEnum
from typing import NamedTuple


class Reason(StrEnum):
    """Stable code of a rejection, as it stands in ACKs, dead letters and dead_letters."""

    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    INVALID_FIELD = "invalid_field"
    UNSUPPORTED_SCHEMA = "unsupported_schema"
    DEVICE_MISMATCH = "device_mismatch"
    EVENT_ID_CONFLICT = "event_id_conflict"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    NOT_STORABLE = "not_storable"


class Rejection(NamedTuple):
    """Why one event, or one whole payload, is not stored.

    Plain data and not an exception: one that is kept keeps its traceback, and with it the
    payloads of whole batches. `error` names the field and what was expected; it is bounded in
    length, whatever the device sent. `event_id` is the event's own, where it can be read.
    """

    reason: Reason
    error: str
    event_id: str | None = None


class DeadLetter(NamedTuple):
    """A row of dead_letters, field for column; its id is given by the database."""

    received_at: datetime
    reason: Reason
    error: str
    topic: str
    device_id: str | None
    event_id: str | None
    payload: bytes
