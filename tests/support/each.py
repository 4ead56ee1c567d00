"""Which values a test runs for: each of many, or one that fits the time there is.

What it does: gives the test one value after the other, where a test of its own for each would cost
more than what it does, and fails with each that it failed for, and why; or has a test run long with
--faults, and briefly without. What it does not: fixtures. Where a value needs one, or takes long,
it is parametrised.

Invariant: every value is tried, whatever happened to those before it; with none at all it fails.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def short_or_long(short: int, long: int) -> list[Any]:
    """Return what to parametrise with: the short one, or with --faults the long one instead."""
    return [
        pytest.param(short, marks=pytest.mark.brief),
        pytest.param(long, marks=pytest.mark.faults),
    ]


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
