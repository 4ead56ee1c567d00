"""The disk of PostgreSQL is full: a real one, a small tmpfs that holds its data.

What it does: fills it under load, makes room again, and checks the promise at the sender.
What it does not: run without the right to mount; it fails to be set up then, and says so.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg2
import pytest

from tests.support.findings import Finding
from tests.support.pipeline import Pipeline, wait_until
from tests.support.trial import under_load
from tools.process import StackError
from tools.stack import Stack

Report = Callable[[Finding], None]

DISK_MEGABYTES = 160


@contextmanager
def tmpfs(folder: Path, megabytes: int) -> Iterator[None]:
    """Mount a small disk there; needs root."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk, which needs root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def servers() -> Iterator[Stack]:
    """A PostgreSQL whose folder is a small disk, of which it uses less than half."""
    stack = Stack(
        with_ingester=False, postgres_settings={"max_wal_size": "64MB", "min_wal_size": "32MB"}
    )
    try:
        with tmpfs(stack.postgres.folder, DISK_MEGABYTES), stack:
            yield stack
    finally:
        shutil.rmtree(stack.folder, ignore_errors=True)


def fill(folder: Path) -> Path:
    """Write until no byte fits any more."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast


def test_a_full_disk_is_waited_out_and_no_event_is_blamed(
    running: Pipeline, report: Report
) -> None:
    postgres = running.database.postgres
    with under_load(running) as trial:
        ballast = fill(postgres.folder)
        try:
            trial.warned()
            trial.lasts(1)
        finally:
            ballast.unlink()
        trial.fixed()
        trial.flows()
    assert "SQLSTATE 53100" in running.ingester.log()
    report(trial.finding_after_outage("disk of the database full"))


@pytest.mark.faults
def test_a_database_that_crashed_because_its_disk_was_full_is_waited_for(
    running: Pipeline, report: Report
) -> None:
    """No room for the next WAL segment: a PANIC, and not one statement that fails."""
    postgres = running.database.postgres
    with under_load(running) as trial:
        ballast = fill(postgres.folder)
        try:
            fill_wal(running)
            trial.warned()
            # It may have no room to say in its log that it crashed and why it cannot start.
            wait_until(lambda: not postgres.running, "PostgreSQL to end", 60)
        finally:
            ballast.unlink()
            if not postgres.running:
                postgres.start()
            postgres.wait_ready()
        trial.fixed()
    report(trial.finding_after_outage("disk full, database crashed and started again"))


def fill_wal(pipeline: Pipeline) -> None:
    """Write more WAL than the disk can hold as one record.

    Not segment by segment: a checkpoint in between recycles what lies behind it, and a slow
    client never uses up the last. During one record no checkpoint can begin.
    """
    with suppress(psycopg2.Error, StackError):  # the connection ends with the server
        pipeline.database.query(
            f"SELECT pg_logical_emit_message(false, 'fill', repeat('x', {DISK_MEGABYTES} << 20))"
        )
