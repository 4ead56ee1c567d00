"""What goes wrong again and again: counted, and logged once a minute.

What it does: logs the first of a kind at once, and how many more there were a minute later. What it
does not: lose the count.

Invariant: at most one line per kind and minute, whatever comes in.
"""

import logging
from collections.abc import Callable

PAUSE_SECONDS = 60.0
KINDS_MAX = 1_000

log = logging.getLogger(__name__)


class Complaints:
    """Counts by kind."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # when it was logged, how many since

    def add(self, kind: str, example: str) -> bool:
        """Count one; log it with its example if none of its kind was logged for a minute."""
        now = self._clock()
        if kind not in self._kinds and len(self._kinds) >= KINDS_MAX:
            kind = "others"
        logged_at, count = self._kinds.get(kind, (-PAUSE_SECONDS, 0))
        if now - logged_at < PAUSE_SECONDS:
            self._kinds[kind] = logged_at, count + 1
            return False
        more = f" ({count} more since)" if count else ""
        log.warning("%s: %s%s", kind, example, more)
        self._kinds[kind] = now, 0
        return True
