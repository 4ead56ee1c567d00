"""The results as tables.

What it does: turns what benchmark/run.py measured into Markdown, medians over the rounds. What
it does not: measure, or judge; where a goal was missed the figures say so.

Invariant: each figure comes from the results given, which are kept beside it as JSON.
"""

import statistics
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from typing import Any

Results = dict[str, list[Any]]
# How much slower than another checkout this one may be, in percent.
SLOWER_PERCENT_MAX = 5


def median(results: Results, name: str, *, path: Sequence[str]) -> float:
    """Return the median over the rounds of what stands at the path."""
    return float(statistics.median(reduce(getitem, path, each) for each in results[name]))


def comparison(systems: Results) -> str:
    """Return the table that has a column for each system."""
    columns = [_figures(systems, name) for name in systems]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    return _table(["", *systems], rows)


def _figures(systems: Results, name: str) -> dict[str, str]:
    def figure(*path: str) -> float:
        return median(systems, name, path=path)

    rows = {}
    for what in ("singles", "arrays"):
        rows[f"{what}: events/s stored and ACKed"] = f"{figure(what, 'events_per_second'):,.0f}"
        cpu = [figure(what, "cpu_microseconds", part) for part in ("system", "broker", "database")]
        rows[f"{what}: CPU us per event, system / broker / database"] = " / ".join(
            f"{value:.1f}" for value in cpu
        )
    for per_second in systems[name][0]["latency"]:
        at = [figure("latency", per_second, key) for key in ("p50_ms", "p99_ms", "max_ms")]
        rows[f"ACK at {int(per_second):,}/s: p50 / p99 / max, ms"] = " / ".join(
            f"{value:.2f}" for value in at
        )
    rows["memory at most, MB"] = f"{figure('memory_mb'):.0f}"
    return rows


def against(name: str, results: dict[str, Any]) -> tuple[str, bool]:
    """Return the comparison with another checkout as Markdown, and whether this keeps up.

    A round of each makes a pair: they were measured one right after the other.
    """
    systems = results["systems"]
    rows, verdicts, is_within = [], [], True
    for label, path in {
        "singles: events/s": ("singles", "events_per_second"),
        "arrays: events/s": ("arrays", "events_per_second"),
        "ACK at 200/s: p50, ms": ("latency", "200", "p50_ms"),
    }.items():
        this, other = (median(systems, key, path=path) for key in ("this", "other"))
        pairs = [
            reduce(getitem, path, ours) / reduce(getitem, path, theirs)
            for ours, theirs in zip(systems["this"], systems["other"], strict=True)
        ]
        ratios = " ".join(f"{ratio:.2f}" for ratio in pairs)
        digits = 2 if "ms" in label else 0
        medians = [f"{value:,.{digits}f}" for value in (this, other)]
        rows.append([label, *medians, f"{this / other:.3f}", ratios])
        if "events_per_second" in path:
            keeps_up = this >= other * (1 - SLOWER_PERCENT_MAX / 100)
            is_within &= keeps_up
            verdict = "within" if keeps_up else "slower by more than"
            verdicts.append(f"{path[0].capitalize()}: {verdict} {SLOWER_PERCENT_MAX} %.")
    head = ["", "this", "other", "ratio", "ratios of the pairs"]
    parts = [
        f"# Benchmark of {name}",
        "Medians of the rounds. What the figures mean, and what they do not: ../README.md.",
        _table(["", ""], list(results["machine"].items())),
        _table(head, rows),
        " ".join(verdicts),
        comparison(systems),
    ]
    return "\n\n".join(parts) + "\n", is_within


def growth(name: str, machine: dict[str, str], parts: dict[str, Results]) -> str:
    """Return the growth as Markdown: for each part a plot, and a table with a row for each size."""
    figures: dict[str, Sequence[str]] = {
        "events/s": ("events_per_second",),
        "CPU us: ingester": ("cpu_microseconds", "system"),
        "broker": ("cpu_microseconds", "broker"),
        "database": ("cpu_microseconds", "database"),
        "the devices": ("cpu_microseconds", "devices"),
        "p50 at 200/s, ms": ("p50_ms",),
        "p99, ms": ("p99_ms",),
        "events a commit": ("events_per_commit",),
        "WAL bytes an event": ("wal_bytes",),
        "MB: ingester": ("memory_mb", "ingester"),
        "MB: broker": ("memory_mb", "broker"),
    }
    texts = [
        f"# Benchmark of {name}",
        "Medians of the rounds. What the figures mean: ../README.md.",
        _table(["", ""], list(machine.items())),
    ]
    for part, results in parts.items():
        first = next(iter(results.values()))[0]
        shown = {label: path for label, path in figures.items() if path[0] in first}
        rows = [
            [
                f"{int(size):,}",
                *(_figure(median(results, size, path=path)) for path in shown.values()),
            ]
            for size in results
        ]
        texts += [f"## {part}", f"![{part}]({name}-{part}.png)", _table([part, *shown], rows)]
    return "\n\n".join(texts) + "\n"


def costs(results: dict[str, Any]) -> str:
    """Return the table of where each microsecond goes, a column for each load."""
    rows = []
    for program in next(iter(results.values())):
        columns = [stages[program] for stages in results.values()]
        sums = [f"**{sum(column.values()):.1f}**" for column in columns]
        rows.append([f"**{program}**", *sums])
        for stage in dict.fromkeys(stage for column in columns for stage in column):
            rows.append([stage, *(f"{column.get(stage, 0.0):.1f}" for column in columns)])
    return _table(["CPU us an event", *results], rows)


def small(results: Results) -> str:
    """Return the table of the small machine."""
    sums = results["small"][0]["memory_sum_mb"]
    memory = [
        [f"memory, MB: {what}", f"{median(results, 'small', path=('memory_sum_mb', what)):.0f}"]
        for what in sums
    ]
    return f"{comparison(results)}\n{_rows(memory)}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def page(page_ms: dict[str, float]) -> str:
    """Return the table of the page's addresses."""
    return _table(["page", "ms"], [[what, f"{ms:.0f}"] for what, ms in page_ms.items()])


def bridge(results: Results) -> str:
    """Return the table of what the bridge takes, a column for each kind of message."""

    def row(label: str, *path: str, digits: int = 0) -> list[str]:
        return [label, *(f"{median(results, name, path=path):,.{digits}f}" for name in results)]

    rows = [row("messages/s stored and ACKed", "messages_per_second")]
    rows += [
        row(f"CPU us per message, {part}", "cpu_microseconds", part)
        for part in ("bridge", "broker", "ingester", "database")
    ]
    rows.append(row("load of the machine, 1 minute", "load", digits=1))
    return _table(["", *results], rows)


def backlog(drain: Results) -> str:
    """Return the table of what each does with a backlog."""

    def row(label: str, *path: str, digits: int = 0) -> list[str]:
        return [label, *(f"{median(drain, name, path=path):,.{digits}f}" for name in drain)]

    rows = [row("events/s until all are rows", "events_per_second")]
    rows += [
        row(f"CPU us per event, {part}", "cpu_microseconds", part, digits=1)
        for part in ("system", "broker", "database")
    ]
    rows.append(row("memory at most, MB", "memory_mb"))
    return _table(["", *drain], rows)


def peers(name: str, results: dict[str, Any]) -> str:
    """Return the systems side by side as Markdown."""
    parts = [
        f"# Benchmark of {name}",
        "Medians of the rounds. What the figures mean, and what they do not: ../README.md.",
        _table(["", ""], list(results["machine"].items())),
        "## Side by side",
        comparison(results["systems"]),
        _ratios(results["systems"]),
        "## A backlog of queued events",
        backlog(results["drain"]),
    ]
    return "\n\n".join(parts) + "\n"


def promise(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of what each fault did to each system's events."""
    keys = ("events", "lost", "doubled", "false_acks", "unanswered", "starts")
    rows = [
        [name, fault, *("no ACKs" if counts[key] is None else f"{counts[key]:,}" for key in keys)]
        for name, faults in results.items()
        for fault, counts in faults.items()
    ]
    head = ["", "fault", "events", "lost", "doubled", "ACKed, no row", "a row, no ACK"]
    return _table([*head, "had to be started again"], rows)


def render(name: str, results: dict[str, Any]) -> str:
    """Return everything as Markdown."""
    systems, rows = results["systems"], results["rows"]
    queries = rows["queries_ms"]
    at_rows = {
        f"{int(count):,} rows": measured for count, measured in rows.items() if count.isdecimal()
    }
    parts = [
        f"# Benchmark of {name}",
        "Medians of the rounds. What the figures mean, and what they do not: ../README.md.",
        "## The machine",
        _table(["", ""], list(results["machine"].items())),
        "## Side by side",
        comparison(systems),
        _ratios(systems),
        "## Rows in the table before",
        comparison(at_rows),
        "## Other settings",
        comparison(results["settings"]),
        "## A backlog of queued events",
        backlog(results["drain"]),
        "## The documented queries, with the most rows",
        _table(["query", "ms"], [[f"`{sql}`", f"{ms:.0f}"] for sql, ms in queries.items()]),
        "## The page of charts, with the most rows",
        page(rows["page_ms"]) if rows["page_ms"] else "It was not there.",
        "## Where the ingester's time goes",
    ]
    for what, shares in results["profile"].items():
        for kind in ("stages", "functions"):
            share = [[f"`{name}`", f"{percent:.1f}"] for name, percent in shares[kind].items()]
            parts.append(_table([f"{what}: {kind}", "%"], share))
    return "\n\n".join(parts) + "\n"


def _ratios(systems: Results) -> str:
    path = ("singles", "events_per_second")
    ours = median(systems, "ingester", path=path)
    ratios = [
        f"{ours / median(systems, name, path=path):.1f} times the rate of {name}"
        for name in systems
        if name != "ingester"
    ]
    return f"Single events: {', '.join(ratios)}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _rows([head, ["---", *["--:"] * (len(head) - 1)], *rows])


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
