"""What has been done so far, and telling people and the healthcheck of it.

What it does: adds up the counts of batches, writes a summary into the log, and keeps the
heartbeat. What it does not: judge; it is told when all is well.

Invariant: never one log line per event at INFO, and a heartbeat only while every message
that has arrived gets settled.
"""

import logging
import time
from collections import Counter
from pathlib import Path

log = logging.getLogger(__name__)

SUMMARY_SECONDS = 10.0
BEAT_SECONDS = 1.0


class Progress:
    """Counts since the last summary, and the heartbeat file (None: nobody looks at it)."""

    def __init__(self, heartbeat_file: str | None) -> None:
        self._heartbeat_file = Path(heartbeat_file) if heartbeat_file else None
        self._counts: Counter[str] = Counter()
        self._summary_at = 0.0
        self._beat_at = 0.0

    def settled(self, counts: Counter[str], seconds: float) -> None:
        """Note a settled batch, which took so many seconds."""
        self._counts += counts
        log.debug("batch: %s in %.1f ms", _text(counts), seconds * 1000)

    def all_is_well(self) -> None:
        """Note that both connections are up and nothing waits; called at every turn."""
        now = time.monotonic()
        if self._heartbeat_file and now - self._beat_at >= BEAT_SECONDS:
            self._heartbeat_file.touch()
            self._beat_at = now

    def summarise(self) -> None:
        """Log what has been done since the last summary, unless that was a moment ago.

        So the first event after a quiet time is seen at once, and a flood every 10 s.
        """
        now = time.monotonic()
        if self._counts and now - self._summary_at >= SUMMARY_SECONDS:
            log.info("%s", _text(self._counts))
            self._counts.clear()
            self._summary_at = now


def _text(counts: Counter[str]) -> str:
    names = ("messages", "stored", "duplicates", "rejected")
    return ", ".join(f"{name} {counts[name]}" for name in names)
