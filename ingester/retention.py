"""Retention: what is older than RETENTION_DAYS is deleted, a little at a time.

What it does: begins a pass at the start and an hour after the one before, deletes one batch
when it is asked to and it is time, and says at the end of a pass how many rows went. What it
does not: know SQL, wait, or stand in the way of what arrives.

Invariant: it is at work for at most a fifth of the time, one batch between two turns of the
loop, and whatever fails is said, ends this pass and nothing else.
"""

import logging
import time
from collections import Counter
from collections.abc import Generator

from ingester.connection import StoreUnavailable
from ingester.store import Store, Table

log = logging.getLogger(__name__)

# The pause between two passes: rows live at most that much longer than they should.
PASS_SECONDS = 3600.0
# A pause of so many times as long as the batch before it took. So at most one event in five
# arrives while a batch is deleted, on a slow disk too.
PAUSE_FACTOR = 4.0


class Retention:
    """The passes, one after the other; without `days` there is none."""

    def __init__(self, store: Store, days: int | None) -> None:
        self._store = store
        self._days = days or 0
        self._pass = self._batches()
        self._next_at = time.monotonic() if days else float("inf")

    def pause_seconds(self) -> float:
        """Return how long it is until there is something to do."""
        return max(0.0, self._next_at - time.monotonic())

    def turn(self) -> None:
        """Delete one batch, if it is time to."""
        began_at = time.monotonic()
        if began_at < self._next_at:
            return
        is_over = next(self._pass, 0) == 0
        ended_at = time.monotonic()
        if is_over:
            self._pass = self._batches()
            self._next_at = ended_at + PASS_SECONDS
        else:
            self._next_at = ended_at + PAUSE_FACTOR * (ended_at - began_at)

    def close(self) -> None:
        """End the pass that is under way, if there is one, and say what it has done."""
        self._pass.close()

    def _batches(self) -> Generator[int, None, None]:
        """One pass: delete a batch, yield how many rows it had, until nothing is left."""
        deleted: Counter[Table] = Counter()
        try:
            for table in Table:
                since = "-infinity"
                while True:
                    rows, since = self._store.delete_old(table, self._days, since)
                    if not rows:
                        break
                    deleted[table] += rows
                    yield rows
        except StoreUnavailable as error:
            # Events can still be stored, it may be: that is for the next turn to find out.
            log.warning("Retention: %s; trying again in an hour", error)
        finally:
            if deleted:
                counts = [deleted[table] for table in Table]
                line = "Retention: deleted %d events and %d dead letters older than %d days"
                log.info(line, *counts, self._days)
