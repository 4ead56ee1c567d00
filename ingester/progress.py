"""What has been done so far, and telling people and the healthcheck of it.

What it does: adds up the counts of batches, writes a summary into the log, describes the
state for the status topic, and keeps the heartbeat. What it does not: judge; it is told
what the state is.

Invariant: never one log line per event at INFO, and a heartbeat only while both connections
are up and every message that has arrived gets settled.
"""

import json
import logging
import time
from collections import Counter
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from ingester import __version__
from ingester.outage import Outage
from ingester.reply import timestamp

log = logging.getLogger(__name__)

SUMMARY_SECONDS = 10.0
STATUS_SECONDS = 10.0
BEAT_SECONDS = 1.0
COUNTERS = ("received", "stored", "duplicates", "rejected", "dead_lettered")


class State(StrEnum):
    """What the status topic says; OFFLINE is what the broker says in our place."""

    ONLINE = "online"
    WAITING_FOR_DATABASE = "waiting_for_database"
    OFFLINE = "offline"


# The last will, and the last word of an ingester that is told to stop.
OFFLINE = json.dumps({"state": State.OFFLINE}).encode()


class Progress:
    """Counts since the start, and who was told of them when."""

    def __init__(self, heartbeat_file: str | None) -> None:
        self._heartbeat_file = Path(heartbeat_file) if heartbeat_file else None
        self._beats = Outage("Heartbeat")
        self._started_at = time.monotonic()
        self._totals: Counter[str] = Counter()
        self._batches = 0
        self._last_commit_at: datetime | None = None
        self._state: State | None = None
        self._since = datetime.now(UTC)
        # What was summarised, published and touched last, and when.
        self._summarised: Counter[str] = Counter()
        self._summary_at = self._status_at = self._beat_at = float("-inf")
        self._published: tuple[State, int] | None = None

    def settled(self, counts: Counter[str], seconds: float) -> None:
        """Note a settled batch, which took so many seconds."""
        self._totals += counts
        self._batches += 1
        self._last_commit_at = datetime.now(UTC)
        log.debug("batch: %s in %.1f ms", _text(counts), seconds * 1000)

    def update(self, state: State, *, healthy: bool) -> None:
        """Note how it is, at every turn of the loop: beat if all is well, summarise if due."""
        now = time.monotonic()
        if state is not self._state:
            self._state, self._since = state, datetime.now(UTC)
        if healthy and self._heartbeat_file and now - self._beat_at >= BEAT_SECONDS:
            self._beat(self._heartbeat_file)
            self._beat_at = now
        # The first event after a quiet time is seen at once, a flood every 10 s.
        if self._totals != self._summarised and now - self._summary_at >= SUMMARY_SECONDS:
            log.info("%s", _text(self._totals - self._summarised))
            self._summarised = self._totals.copy()
            self._summary_at = now

    def _beat(self, file: Path) -> None:
        try:
            file.touch()
            self._beats.recovered()
        except OSError as error:  # the disk is full, say; events can be stored all the same
            self._beats.failed(f"{file}: {error.strerror}")

    def status(self, connection: int, **facts: Any) -> bytes | None:
        """Return the status to publish, with these facts in it; None if it is not time yet.

        It is time at each new connection, at each change of state, and every 10 s.
        """
        now = time.monotonic()
        if self._state is None or (
            self._published == (self._state, connection) and now - self._status_at < STATUS_SECONDS
        ):
            return None
        self._published, self._status_at = (self._state, connection), now
        body = {
            "state": self._state,
            "since": timestamp(self._since),
            "version": __version__,
            "uptime_seconds": round(now - self._started_at),
            "counters": {name: self._totals[name] for name in COUNTERS},
            "batches": self._batches,
            "last_commit_at": self._last_commit_at and timestamp(self._last_commit_at),
        }
        return json.dumps(body | facts).encode()


def _text(counts: Counter[str]) -> str:
    names = ("messages", "stored", "duplicates", "rejected")
    return ", ".join(f"{name} {counts[name]}" for name in names)
