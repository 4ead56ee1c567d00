"""The benchmark: the ingester beside what one would use instead, on one machine in one run.

    .venv/bin/python -m benchmark.run              everything, about 30 minutes
    .venv/bin/python -m benchmark.run --short      a minute: what CI runs
    .venv/bin/python -m benchmark.run --page       the page of charts alone, with 10 million rows
    .venv/bin/python -m benchmark.run --bridge     the bridge alone, with the stack behind it
    .venv/bin/python -m benchmark.run --small      the ingester with broker and database on one core
    .venv/bin/python -m benchmark.run --profile    where each microsecond of an event goes
    .venv/bin/python -m benchmark.run --growth     what an event costs with more of everything
    .venv/bin/python -m benchmark.run --peers      all systems beside the least that one thread does
    .venv/bin/python -m benchmark.run --promise    all systems: what is lost when one is killed
    .venv/bin/python -m benchmark.run --against FOLDER
                                                   the ingester beside that of another checkout

What it does: runs each system on a fresh stack (tools/stack.py), in turn and several times,
measures, and checks in each measurement that every event sent is ACKed and a row. What it
does not: tune anything. synchronous_commit is on, and the configuration is the project's own.

Invariant: a figure is printed only if nothing was lost or doubled while it was measured.
benchmark/README.md says what the figures mean, and what they do not.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmark import bridge, costs, growth, page, profile, promise, queries, report, small
from benchmark.bench import (
    ARRAY_EVENTS,
    ARRAYS_OUTSTANDING,
    RESULTS,
    SINGLES_OUTSTANDING,
    Bench,
    BenchmarkError,
    Size,
    progress,
    wait_for_rows,
)
from benchmark.fleet import Fleet, FleetError, publishes
from benchmark.least import STEPS
from benchmark.machine import CpuClock, describe, memory_peak_mb
from benchmark.systems import (
    LOG_SUBSCRIPTIONS,
    Start,
    System,
    all_here,
    ingester,
    least,
    plain,
)
from tools.process import CHECKOUT, StackError
from tools.stack import Stack

BACKLOG_EVENTS = 100_000
# What stores event by event is as fast with fewer; of 100,000 the plain script answered none
# in 30 s.
BACKLOG_EVENTS_SLOW = {"plain": 20_000, "node-red": 20_000}
ROWS_BEFORE = (0, 1_000_000, 10_000_000)
# Lines for the broker's configuration, and variables for the ingester.
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "as shipped": ("", {}),
    "window 20": ("max_inflight_messages 20", {}),
    "window 200": ("max_inflight_messages 200", {}),
    "window 5000": ("max_inflight_messages 5000", {}),
    "BATCH_MAX 50": ("", {"BATCH_MAX": "50"}),
    "BATCH_MAX 200": ("", {"BATCH_MAX": "200"}),
    "BATCH_MAX 1000": ("", {"BATCH_MAX": "1000"}),
    "nodelay off": ("set_tcp_nodelay false", {}),
}
# What CI asks for: a slow or busy machine slows both.
SHORT_RATIO_MIN = 3.0


FULL = Size(
    rounds=3,
    singles={
        "ingester": 60_000,
        "plain": 10_000,
        "node-red": 20_000,
        "bento": 40_000,
    }
    | dict.fromkeys(STEPS, 60_000),
    arrays={"ingester": 4_000, "plain": 300, "node-red": 1_200, "bento": 2_000}
    | dict.fromkeys(STEPS, 4_000),
    latency_seconds={1: 30, 200: 15, 1_000: 8},
)
# With rows in the table, and with other settings: of the ingester alone.
ROWS = FULL._replace(latency_seconds={200: 5, 1_000: 5})
OTHER = Size(
    rounds=3,
    singles={"ingester": 30_000},
    arrays={"ingester": 1_000},
    latency_seconds={200: 3},
)
SHORT = Size(
    rounds=1,
    singles={"ingester": 9_000, "plain": 1_500},
    arrays={"ingester": 400, "plain": 30},
    latency_seconds={200: 3},
)
# Of this ingester and another one, by turns: an even number of rounds, so that each is first as
# often as the other.
AGAINST = Size(
    rounds=6,
    singles={"this": 60_000, "other": 60_000},
    arrays={"this": 4_000, "other": 4_000},
    latency_seconds={200: 10},
)


def compare(
    systems: dict[str, Start],
    size: Size,
    checkouts: Mapping[str, Path] | None = None,
) -> dict[str, list[Any]]:
    """Measure each system so many times, in turn, each time on a fresh stack.

    `checkouts`: those that are not of this one. Every other round is in the opposite order
    (A B B A), so that a machine that becomes slower is unfair to nobody.
    """
    results: dict[str, list[Any]] = {name: [] for name in systems}
    for number in range(1, size.rounds + 1):
        for name in list(systems)[:: 1 if number % 2 else -1]:
            checkout = (checkouts or {}).get(name, CHECKOUT)
            with Stack(
                checkout=checkout, with_ingester=False, mosquitto_config=LOG_SUBSCRIPTIONS
            ) as stack:
                process = systems[name](stack)
                try:
                    with Fleet(stack.ports.mqtt) as fleet:
                        label = f"{name} {number}/{size.rounds}"
                        results[name].append(Bench(label, stack, process, fleet).all(size))
                finally:
                    process.stop()
    return results


def drain(systems: dict[str, System], rounds: int) -> dict[str, list[Any]]:
    """Measure how fast each stores, and ACKs, what was queued while it was away."""
    results: dict[str, list[Any]] = {name: [] for name in systems}
    for number in range(1, rounds + 1):
        for name in list(systems)[:: 1 if number % 2 else -1]:
            with (
                Stack(with_ingester=False, mosquitto_config=LOG_SUBSCRIPTIONS) as stack,
                Fleet(stack.ports.mqtt) as fleet,
                progress(f"{name} {number}/{rounds}: a backlog", _backlog(name)) as show,
            ):
                results[name].append(_drain_once(name, systems[name], stack, fleet, show))
    return results


def _backlog(name: str) -> int:
    return min(BACKLOG_EVENTS, BACKLOG_EVENTS_SLOW.get(name, BACKLOG_EVENTS))


def _drain_once(
    name: str, system: System, stack: Stack, fleet: Fleet, show: Callable[[int], None]
) -> dict[str, Any]:
    events = _backlog(name)
    process = system.start(stack)  # it makes its session
    try:
        process.stop()
        packets = publishes("backlog", events)
        fleet.publish_all(packets)
        clock_began = CpuClock(broker=stack.mosquitto, database=stack.postgres)
        after = stack.mosquitto.log_end
        process.start()
        clock = CpuClock(system=process)
        # Not from the start: how long a program takes to load is another question.
        stack.mosquitto.wait_for_log(f" as homelab-{name} (", after=after)
        began_at = time.perf_counter()
        if system.answers:
            seconds = fleet.hear_all(packets, show)
        else:
            wait_for_rows(stack, system.table, events, time.sleep, show)
            seconds = time.perf_counter() - began_at
        cpu = clock.microseconds_each(events)
        cpu |= clock_began.microseconds_each(events)
        memory = memory_peak_mb(process)
    finally:
        process.stop()
    rows = stack.postgres.psql(f"SELECT count(*) FROM {system.table}")
    if rows != str(events):
        raise BenchmarkError(f"{name}: {events} events were queued, {rows} are rows")
    return {
        "events_per_second": events / seconds,
        "cpu_microseconds": cpu,
        "memory_mb": memory,
    }


def with_rows(size: Size) -> dict[str, Any]:
    """Measure the ingester with so many rows in the table already, and the documented queries."""
    results: dict[str, Any] = {}
    with Stack() as stack, Fleet(stack.ports.mqtt) as fleet:
        for rows in ROWS_BEFORE:
            with progress("bulk load", rows):
                queries.load_up_to(stack.postgres, rows)
            bench = Bench(f"ingester with {rows:,} rows", stack, stack.ingester, fleet)
            results[str(rows)] = [bench.all(size) for _ in range(size.rounds)]
        with progress("bulk delete", 1):
            queries.remove_all_others(stack.postgres)
        results["queries_ms"] = queries.measure(stack.postgres, size.rounds)
        stack.ingester.stop()
        results["page_ms"] = page_times(stack)
    return results


def page_times(stack: Stack) -> dict[str, float]:
    """Measure the page of charts with the rows that there are; nothing, where there is no page."""
    if not page.available():
        print("the page is not measured: there is no overlays/web", file=sys.stderr, flush=True)
        return {}
    with progress("the page", 1):
        return page.measure(stack.folder, stack.postgres)


def page_alone() -> int:
    """Measure the page of charts with the most rows; fail if it is too slow."""
    with Stack(with_ingester=False) as stack:
        with progress("bulk load", ROWS_BEFORE[-1]):
            queries.load_up_to(stack.postgres, ROWS_BEFORE[-1])
        page_ms = page_times(stack)
    print(report.page(page_ms))
    return _page_code(page_ms)


def _page_code(page_ms: dict[str, float]) -> int:
    slow = page.too_slow(page_ms) if page_ms else []
    for what in slow:
        print(
            f"benchmark: the page takes {page_ms[what]:.0f} ms for {what!r}, and may take "
            f"{page.MILLISECONDS_MAX}",
            file=sys.stderr,
        )
    return 1 if slow else 0


def other_settings(size: Size) -> dict[str, list[Any]]:
    """Measure the ingester with other values of what was chosen by measurement."""
    results: dict[str, list[Any]] = {label: [] for label in SETTINGS}
    for number in range(1, size.rounds + 1):
        for label, (config, environment) in SETTINGS.items():
            with (
                Stack(mosquitto_config=config, environment=environment) as stack,
                Fleet(stack.ports.mqtt) as fleet,
            ):
                name = f"ingester {number}/{size.rounds}, {label}"
                results[label].append(Bench(name, stack, stack.ingester, fleet).all(size))
    return results


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmark.run", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="what CI runs; keeps no results")
    parser.add_argument("--page", action="store_true", help="the page alone; keeps no results")
    parser.add_argument("--bridge", action="store_true", help="the bridge; keeps no results")
    parser.add_argument("--profile", action="store_true", help="where each microsecond goes")
    parser.add_argument("--small", action="store_true", help="on one core, with 1 GB")
    parser.add_argument(
        "--growth", nargs="*", choices=growth.PARTS, metavar="PART", help=" ".join(growth.PARTS)
    )
    parser.add_argument("--peers", action="store_true", help="the systems side by side alone")
    parser.add_argument("--promise", action="store_true", help="what faults lose; keeps no results")
    parser.add_argument("--name", help="of the files in benchmark/results (default: the date)")
    parser.add_argument(
        "--against", type=_checkout, metavar="FOLDER", help="another checkout, to compare with"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=AGAINST.rounds,
        help="of --against and --peers (default: %(default)s)",
    )
    arguments = parser.parse_args()
    name = arguments.name or time.strftime("%Y-%m-%d", time.gmtime())
    try:
        if arguments.short:
            return short({"ingester": ingester, "plain": plain})
        if arguments.page:
            return page_alone()
        if arguments.bridge:
            print(report.bridge(bridge.measure(progress)))
            return 0
        if arguments.profile:
            print(report.costs(costs.measure()))
            return 0
        if arguments.small:
            print(report.small(small.measure()))
            return 0
        if arguments.growth is not None:
            growth.run(f"{name}-growth", arguments.growth)
            return 0
        if arguments.against:
            size = AGAINST._replace(rounds=arguments.rounds)
            return against(arguments.against, size, f"{name}-against")
        if arguments.promise:
            print(report.promise(promise.measure(all_here(), progress)))
            return 0
        if arguments.peers:
            systems = all_here() | {name: System(least(name)) for name in STEPS}
            return peers(systems, arguments.rounds, f"{name}-peers")
        return full(all_here(), name)
    except (StackError, BenchmarkError, FleetError, bridge.Missing) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1


def _answering(systems: dict[str, System]) -> dict[str, Start]:
    """Return those whose closed loop closes."""
    return {name: system.start for name, system in systems.items() if system.answers}


def peers(systems: dict[str, System], rounds: int, name: str) -> int:
    """Measure all systems side by side, and nothing else."""
    parts: dict[str, Callable[[], Any]] = {
        "machine": describe,
        "systems": partial(compare, _answering(systems), FULL._replace(rounds=rounds)),
        "drain": partial(drain, systems, rounds),
    }
    _measure_and_keep(parts, name, report.peers)
    return 0


def full(systems: dict[str, System], name: str) -> int:
    """Measure everything."""
    parts: dict[str, Callable[[], Any]] = {
        "machine": describe,
        "systems": partial(compare, _answering(systems), FULL),
        "drain": partial(drain, systems, FULL.rounds),
        "rows": partial(with_rows, ROWS),
        "settings": partial(other_settings, OTHER),
        "profile": profiles,
    }
    results = _measure_and_keep(parts, name, report.render)
    return _page_code(results["rows"]["page_ms"])


def _measure_and_keep(
    parts: dict[str, Callable[[], Any]], name: str, render: Callable[[str, dict[str, Any]], str]
) -> dict[str, Any]:
    """Measure the parts; keep after each what there is, and print all of it at the end."""
    results: dict[str, Any] = {}
    RESULTS.mkdir(exist_ok=True)
    for part, measure in parts.items():
        results[part] = measure()
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    text = render(name, results)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
    return results


def _checkout(text: str) -> Path:
    folder = Path(text).resolve()
    if not (folder / "ingester/app.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} has no ingester/app.py")
    return folder


def against(checkout: Path, size: Size, name: str) -> int:
    """Compare this ingester with that of another checkout; fail if it is slower."""
    checkouts = {"this": CHECKOUT, "other": checkout}
    results = {
        "machine": describe() | {key: _version(folder) for key, folder in checkouts.items()},
        "systems": compare({"this": ingester, "other": ingester}, size, checkouts),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    text, is_within = report.against(name, results)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)
    return 0 if is_within else 1


def _version(checkout: Path) -> str:
    """Return what git calls it; the name of its folder, if git does not know it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--tags", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or checkout.name


def profiles() -> dict[str, Any]:
    """Look where the ingester's time goes, for each kind of load."""
    return {
        "singles": profile.measure(90_000, 1, SINGLES_OUTSTANDING),
        "arrays": profile.measure(6_000, ARRAY_EVENTS, ARRAYS_OUTSTANDING),
    }


def short(systems: dict[str, Start]) -> int:
    """Compare briefly; fail only if not all was stored, or the ratio is far off."""
    results = compare(systems, SHORT)
    print(report.comparison(results))
    rate = partial(report.median, results, path=("singles", "events_per_second"))
    ratio = rate("ingester") / rate("plain")
    print(f"ingester to plain: {ratio:.1f} (at least {SHORT_RATIO_MIN:.0f} is asked for)")
    return 0 if ratio >= SHORT_RATIO_MIN else 1


if __name__ == "__main__":
    sys.exit(main())
