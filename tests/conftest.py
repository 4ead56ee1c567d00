"""Real servers for the tests: which fixtures a test asks for decides its tier.

What it does: one PostgreSQL for the whole run, a database cloned from a template for each
test, a broker of its own for each test, and the real ingester between them. What it does
not: replace anything by a mock.

Invariant: nothing that a test started is running after it.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT))

from tests.support.device import event  # noqa: E402
from tests.support.findings import Finding, table, write_into  # noqa: E402
from tests.support.pipeline import Database, Pipeline, new_database, new_pipeline  # noqa: E402
from tools import process  # noqa: E402
from tools.stack import Stack  # noqa: E402

# A shell has the commands that it runs in the background ignore Ctrl-C, and they pass that on
# to what they start; a test that sends it would wait in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Each worker of a parallel run has ports of its own: one that is free now is taken a moment later.
_worker, _workers = (os.environ.get(f"PYTEST_XDIST_{name}") for name in ("WORKER", "WORKER_COUNT"))
if _worker and _workers:
    process.PORTS = process.PORTS[int(_worker.removeprefix("gw")) :: int(_workers)]

# Each test has a database made for it, and waiting for the disk is most of that. The data ends
# with the run, and what a killed server has written, the kernel keeps all the same.
NO_WAIT_FOR_DISK = {"fsync": "off"}

_findings: list[tuple[str, int, int, Finding]] = []  # with the file, line and turn, to sort by


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare what tests/run takes beyond pytest's own options."""
    parser.addoption("--faults", action="store_true", help="all faults, not the quick ones alone")
    parser.addoption(
        "--write-faults", action="store_true", help="put the table of faults into FAULTS.md"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs servers; with --faults leave out what is marked `brief`, else `faults`."""
    for item in items:
        if "servers" in getattr(item, "fixturenames", ()):
            item.add_marker("services")
        if item.get_closest_marker("compose"):  # names and ports are fixed: one worker has all
            item.add_marker(pytest.mark.xdist_group("compose"))
    not_this_time = "brief" if config.getoption("--faults") else "faults"
    left_out = [item for item in items if item.get_closest_marker(not_this_time)]
    items[:] = [item for item in items if not item.get_closest_marker(not_this_time)]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Finding], None]:
    """Add a finding to the table at the end of the run."""
    properties = request.node.user_properties  # what a worker's report takes along
    return lambda finding: properties.append(("finding", dataclasses.astuple(finding)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the findings of a test that has run, here or in a worker."""
    if report.when == "call":
        file, line, _ = report.location
        for turn, (name, value) in enumerate(report.user_properties):
            if name == "finding" and isinstance(value, tuple):
                _findings.append((file, line or 0, turn, Finding(*value)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of faults, and keep it if that was asked for."""
    if _findings:
        text = table(finding for *_, finding in sorted(_findings, key=lambda found: found[:3]))
        terminalreporter.section("faults: what was sent, and what was found")
        terminalreporter.line(text)
        if terminalreporter.config.getoption("--write-faults"):
            write_into(CHECKOUT / "tests/FAULTS.md", text)


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """PostgreSQL with the schema in its database `qs`, which serves as the template."""
    # Where times are compared or written down, a commit takes as long as it does for an owner.
    measures = request.config.getoption("--write-faults") or any(
        item.get_closest_marker("alone") for item in request.session.items
    )
    settings = {} if measures else NO_WAIT_FOR_DISK
    with Stack(with_ingester=False, postgres_settings=settings) as stack:
        yield stack


@pytest.fixture
def database(servers: Stack) -> Iterator[Database]:
    """A database of the test's own, with the schema."""
    with new_database(servers) as database:
        yield database


@pytest.fixture
def pipeline(servers: Stack, database: Database) -> Iterator[Pipeline]:
    """A broker of the test's own, its database, and an ingester that is not started yet."""
    with new_pipeline(servers, database) as pipeline:
        yield pipeline


@pytest.fixture
def running(pipeline: Pipeline) -> Pipeline:
    """The same with the ingester running and connected to both."""
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    return pipeline


@pytest.fixture(scope="session")
def lasting_pipeline(servers: Stack) -> Iterator[Pipeline]:
    """One that runs to the end, for `lasting`."""
    with new_database(servers) as database, new_pipeline(servers, database) as pipeline:
        pipeline.ingester.start()
        pipeline.ingester.wait_ready()
        yield pipeline


@pytest.fixture
def lasting(lasting_pipeline: Pipeline) -> Iterator[Pipeline]:
    """As `running`, with empty tables, for a test that does no more than send, hear and look.

    To start an ingester and a broker would take longer than most of these tests.
    """
    yield lasting_pipeline
    with lasting_pipeline.device("last") as device:
        assert device.ask(event(1, "last"))["status"] == "stored"  # so all before it is settled
    lasting_pipeline.database.query("TRUNCATE events, dead_letters RESTART IDENTITY")
