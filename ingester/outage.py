"""A fault that lasts: when to try again, and when to say so.

What it does: backs off between tries and keeps the log readable: one line when a fault
begins, one a minute while it lasts, one when it ends. What it does not: try.

Invariant: whatever fails, however fast, and however often it seems to be fixed, its tries
back off, and after its first two lines there are at most two a minute.
"""

import logging
import random
import time

log = logging.getLogger(__name__)

BACKOFF_SECONDS_MIN = 0.1
# Low enough that work goes on within 5 s of the other side being back.
BACKOFF_SECONDS_MAX = 2.0
REMINDER_SECONDS = 60.0
# What fails again sooner than this after it was back has not been fixed.
CALM_SECONDS = 10.0


class Outage:
    """The outage of one thing, whether or not there is one at the moment."""

    def __init__(self, name: str) -> None:
        """`name` is what failed, as the log shall call it."""
        self._name = name
        self.is_ongoing = False  # whether the last try failed
        self._is_said = False  # whether the log has the beginning of the present one
        self._tries = 0
        self._began_at = self._said_at = self._ended_at = float("-inf")
        self._next_try_at = 0.0

    def pause_seconds(self) -> float:
        """Return how long to wait before the next try; 0 when it may be now."""
        return max(0.0, self._next_try_at - time.monotonic()) if self.is_ongoing else 0.0

    def failed(self, error: str, level: int = logging.WARNING) -> None:
        """Note a failed try: say so if it is time to, and set the time of the next one."""
        now = time.monotonic()
        if not self.is_ongoing and now - self._ended_at >= CALM_SECONDS:
            self._tries = 0
            self._began_at = now
        if self._tries == 0:
            self._say(level, "%s: %s; trying again until it works", self._name, error)
        elif now - self._said_at >= REMINDER_SECONDS:
            lasted = now - self._began_at
            self._say(level, "%s: still failing after %.0f s: %s", self._name, lasted, error)
        backoff = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_MIN * 2 ** min(self._tries, 10))
        self._next_try_at = now + backoff * random.uniform(0.75, 1.0)
        self._tries += 1
        self.is_ongoing = True

    def recovered(self) -> None:
        """Note that all is well; says so if the log has it otherwise."""
        if not self.is_ongoing:
            return
        self.is_ongoing = False
        self._ended_at = time.monotonic()
        if self._is_said:
            log.info("%s: back after %.1f s", self._name, self._ended_at - self._began_at)
            self._is_said = False

    def _say(self, level: int, line: str, *values: object) -> None:
        log.log(level, line, *values)
        self._said_at = time.monotonic()
        self._is_said = True
