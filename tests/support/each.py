"""One test for many values, where a test of its own for each would cost more than what it does.

What it does: gives the test one value after the other, and fails with each that it failed for, and
why. What it does not: fixtures. Where a value needs one, or takes long, it is parametrised.

Invariant: every value is tried, whatever happened to those before it; with none at all it fails.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def each(
    values: Callable[[], Iterable[Any]], called: Callable[[Any], str] = str
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Let a test run for each of the values, which are found when it runs."""

    def decorate(test: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            tried, faults = 0, []
            for value in values():
                tried += 1
                try:
                    test(value)
                except Exception as error:  # noqa: BLE001  none is swallowed
                    error.add_note(f"for {called(value)}")
                    faults.append(error)
            assert tried, "there is nothing to try"
            if faults:
                names = ", ".join(error.__notes__[-1] for error in faults)
                raise ExceptionGroup(f"{len(faults)} of {tried}: {names}", faults)

        run.__signature__ = inspect.Signature()  # type: ignore[attr-defined]  # no fixtures
        return run

    return decorate
