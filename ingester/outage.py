"""A fault that lasts: when to try again, and when to say so.

What it does: backs off between tries and keeps the log readable: one line when a fault
begins, one a minute while it lasts, one when it ends. What it does not: try.

Invariant: whatever fails, however fast, there are at most two lines a minute about it
and at most ten tries in the first second.
"""

import logging
import random
import time

log = logging.getLogger(__name__)

BACKOFF_SECONDS_MIN = 0.1
# Low enough that work goes on within 5 s of the other side being back.
BACKOFF_SECONDS_MAX = 2.0
REMINDER_SECONDS = 60.0


class Outage:
    """The outage of one thing, whether or not there is one at the moment."""

    def __init__(self, name: str) -> None:
        """`name` is what failed, as the log shall call it."""
        self._name = name
        self._tries = 0
        self._began_at = 0.0
        self._said_at = 0.0
        self._next_try_at = 0.0

    @property
    def lasts(self) -> bool:
        """Whether the last try failed."""
        return self._tries > 0

    def pause_seconds(self) -> float:
        """Return how long to wait before the next try; 0 when it may be now."""
        return max(0.0, self._next_try_at - time.monotonic()) if self._tries else 0.0

    def failed(self, error: str) -> None:
        """Note a failed try: say so if it is time to, and set the time of the next one."""
        now = time.monotonic()
        if not self._tries:
            self._began_at = self._said_at = now
            log.warning("%s: %s; trying again until it works", self._name, error)
        elif now - self._said_at >= REMINDER_SECONDS:
            self._said_at = now
            lasted = now - self._began_at
            log.warning("%s: still failing after %.0f s: %s", self._name, lasted, error)
        backoff = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2 ** min(self._tries, 10))
        self._next_try_at = now + backoff * random.uniform(0.75, 1.0)
        self._tries += 1

    def over(self) -> None:
        """Note that a try succeeded; says so if there was an outage."""
        if self._tries:
            log.info("%s: back after %.1f s", self._name, time.monotonic() - self._began_at)
            self._tries = 0
