"""Which values a test runs for: each of many, or one that fits the time there is.

What it does: gives the test one value after the other, where a test of its own for each would cost
more (10 ms) than what it does, and fails with each that it failed for, and why; or has a test run
long, or for all values, with --faults, and briefly, or for one, without. What it does not: fixtures
for each. Where a value needs one, or takes long, it is parametrised.

Invariant: every value is tried, whatever happened to those before it; with none at all it fails.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def short_or_long(short: int, long: int) -> list[Any]:
    """Return what to parametrise with: the short one, or with --faults the long one instead."""
    return [
        pytest.param(short, marks=pytest.mark.brief),
        pytest.param(long, marks=pytest.mark.faults),
    ]


def first_or_all(values: Iterable[Any]) -> list[Any]:
    """Return what to parametrise with: the first value, or with --faults all.

    With several names a value is a tuple.
    """
    first, *others = (value if isinstance(value, tuple) else (value,) for value in values)
    return [
        pytest.param(*first),
        *(pytest.param(*other, marks=pytest.mark.faults) for other in others),
    ]


def each(
    values: Callable[[], Iterable[Any]], called: Callable[[Any], str] = str
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Let a test run for each of the values, which are found when it runs."""

    def decorate(test: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            _try_all((called(value), functools.partial(test, value)) for value in values())

        run.__signature__ = inspect.Signature()  # type: ignore[attr-defined]  # no fixtures
        return run

    return decorate


def cases(
    names: str | Sequence[str],
    values: Iterable[Any],
    ids: Iterable[str] | Callable[[Any], object] = repr,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a test run for each of the values: as pytest.mark.parametrize, but it is one test.

    With several names a value is a tuple.
    """
    rows = [(value,) if isinstance(names, str) else tuple(value) for value in values]
    names = [names] if isinstance(names, str) else [*names]
    called = [", ".join(str(ids(v)) for v in row) for row in rows] if callable(ids) else [*ids]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**others: Any) -> None:
            _try_all(
                (name, functools.partial(test, **others, **dict(zip(names, row, strict=True))))
                for name, row in zip(called, rows, strict=True)
            )

        own = inspect.signature(test)
        others = [value for name, value in own.parameters.items() if name not in names]
        run.__signature__ = own.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    return decorate


def _try_all(calls: Iterable[tuple[str, Callable[[], None]]]) -> None:
    tried, faults = 0, []
    for name, call in calls:
        tried += 1
        try:
            call()
        except Exception as error:  # noqa: BLE001  none is swallowed
            error.add_note(f"for {name}")
            faults.append(error)
    assert tried, "there is nothing to try"
    if faults:
        failed = ", ".join(error.__notes__[-1] for error in faults)
        raise ExceptionGroup(f"{len(faults)} of {tried}: {failed}", faults)
