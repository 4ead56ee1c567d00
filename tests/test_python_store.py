"""The Python library's store: power cuts, kill -9 at every step, damage, a full disk.

What it does: cuts, flips and fills the real files of real outboxes, and compares what is read then
with what add() had promised. What it does not: send anything.

Invariant: what was kept is there, byte for byte, wherever SQLite's own guarantee holds; elsewhere
the file is set aside, counted and told, and the next start works. Nothing is ever invented.
"""

import errno
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from devices.python.telemetry import (
    Event,
    Outbox,
    OutboxError,
    StoreDamaged,
    StoreFailed,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
)
from devices.python.telemetry.errors import BY_CODE, file_error, store_error
from tests.support.each import first_or_all
from tests.test_faults_disk import tmpfs
from tools.process import CHECKOUT

SECTOR_BYTES = 512


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where there is such a folder: some thousand times a disk is waited for here."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


def content_of(outbox: Outbox) -> dict[str, bytes]:
    devices = list(outbox._store.counts())
    return {it.event_id: it.payload for each in devices for it in outbox._store.oldest_of(each)}


def stored(outbox: Outbox, *event_ids: str) -> None:
    """Answer as the ingester would."""
    answers = [
        {"schema": 1, "event_id": it, "device_id": "pi", "status": "stored"} for it in event_ids
    ]
    outbox.on_message("qs/v1/pi/acks", json.dumps(answers).encode())
    outbox.due()  # deletes them


def opened(folder: Path) -> tuple[dict[str, bytes], int]:
    """Open the store as the next start does; return what is in it, and what was set aside."""
    outbox = Outbox(folder, "pi")
    found = content_of(outbox), outbox.damaged()
    outbox.add("it works again")
    outbox.close()
    outbox = Outbox(folder, "pi")  # and what is wrong is found once
    assert outbox.damaged() == 0
    assert outbox.waiting() == len(found[0]) + 1
    outbox.close()
    return found


class Taken:
    """A folder as a kill leaves it, what was kept then, and what of it had been answered."""

    def __init__(self, outbox: Outbox, source: Path, folder: Path, answered: set[str]) -> None:
        shutil.copytree(source, folder)
        self.folder = folder
        self.kept = content_of(outbox)
        self.answered = set(answered)


def grow(outbox: Outbox, transactions: int, randomness: random.Random) -> None:
    for _ in range(transactions):
        text = "y" * randomness.randint(0, 300)
        outbox.add_all([Event("t", randomness.random(), meta={"x": text}) for _ in range(5)])


# --- power cuts ----------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_kept_is_there_wherever_the_wal_ends(tmp_path: Path) -> None:
    """As if power went between any two sectors, with what was in the last one torn."""
    randomness = random.Random(1)
    source = tmp_path / "source"
    outbox = Outbox(source, "pi")
    wal = source / "outbox/events.db-wal"
    last = source / "outbox/last"
    promised: list[tuple[int, bytes, dict[str, bytes]]] = []
    answered: list[str] = []
    for number in range(8):
        if number == 4:
            answered = list(content_of(outbox))[:2]
            stored(outbox, *answered)  # deleted, and not synced
        outbox.add("t", "x" * randomness.randint(0, 6_000))
        promised.append((wal.stat().st_size, last.read_bytes(), content_of(outbox)))
    whole = wal.read_bytes()
    known = {name: data for _, _, content in promised for name, data in content.items()}
    for cut in range(promised[0][0], len(whole), SECTOR_BYTES):
        before = [it for it in promised if it[0] <= cut][-1]
        folder = tmp_path / "cut"
        shutil.copytree(source, folder)
        tail = randomness.choice((b"", bytes(SECTOR_BYTES), randomness.randbytes(SECTOR_BYTES)))
        (folder / "outbox/events.db-wal").write_bytes(whole[:cut] + tail)
        (folder / "outbox/last").write_bytes(before[1])
        found, damaged = opened(folder)
        assert damaged == 0
        # What was answered may be there again.
        assert set(before[2]) - set(answered) <= set(found) <= set(known)
        assert found.items() <= known.items()
        shutil.rmtree(folder)
    outbox.close()


def test_what_was_kept_is_there_however_much_of_a_checkpoint_was_written(tmp_path: Path) -> None:
    randomness = random.Random(2)
    source = tmp_path / "source"
    outbox = Outbox(source, "pi")
    grow(outbox, 60, randomness)
    kept = content_of(outbox)
    shutil.copytree(source, tmp_path / "before")
    assert outbox._store._connection is not None
    outbox._store._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    after = (source / "outbox/events.db").read_bytes()
    before = (tmp_path / "before/outbox/events.db").read_bytes().ljust(len(after), b"\0")
    for _ in range(20):
        folder = tmp_path / "cut"
        shutil.copytree(tmp_path / "before", folder)
        mixed = bytearray(before[: randomness.choice((len(after), len(after) // 2 & ~4095))])
        for start in range(0, len(mixed), SECTOR_BYTES):
            if randomness.random() < 0.5:
                mixed[start : start + SECTOR_BYTES] = after[start : start + SECTOR_BYTES]
        (folder / "outbox/events.db").write_bytes(mixed or after[:SECTOR_BYTES])
        assert opened(folder) == (kept, 0)
        shutil.rmtree(folder)
    outbox.close()


# --- kill -9 at every step ------------------------------------------------------------


def scenario(folder: Path, say: Callable[[str, str], object]) -> None:
    """A life in short: start, keep, answer, drop, tell; and say what was promised."""
    outbox = Outbox(folder, "pi", events_max=6)
    outbox.on_stored = lambda event_id: say("stored", event_id)
    outbox.on_dropped = lambda event_id: say("dropped", event_id)
    for number in range(3):
        say("kept", outbox.add("t", number))
    for event_id in outbox.add_all([Event("t", number) for number in range(5)]):
        say("kept", str(event_id))
    outbox.connected()
    outbox.due()
    stored(outbox, *list(content_of(outbox))[:3])
    outbox.due()  # tells of what was dropped
    say("kept", outbox.add("t", 9))
    outbox.close()


def killed_at(step: int, folder: Path, said: Path) -> bool:
    """Run the scenario in a process that kills itself at a step; tell whether it came to it."""
    child = os.fork()
    if child == 0:
        left = step

        def reached(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*arguments: Any, **named: Any) -> Any:
                reached()
                return call(*arguments, **named)

            return counting

        connect = sqlite3.connect

        def traced(*arguments: Any, **named: Any) -> sqlite3.Connection:
            connection: sqlite3.Connection = connect(*arguments, **named)
            connection.set_trace_callback(reached)
            return connection

        logging.disable()
        sqlite3.connect = traced  # type: ignore[assignment]
        os.fsync, os.pwrite = counted(os.fsync), counted(os.pwrite)
        os.rename, os.open = counted(os.rename), counted(os.open)
        with said.open("ab", buffering=0) as file:
            scenario(folder, lambda word, event_id: file.write(f"{word} {event_id}\n".encode()))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def heard(said: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"kept": [], "stored": [], "dropped": []}
    for line in said.read_text().splitlines():
        word, event_id = line.split()
        found[word].append(event_id)
    return found


@pytest.mark.slow
def test_killed_at_any_step_it_loses_nothing_and_repeats_no_id(tmp_path: Path) -> None:
    source = tmp_path / "source"  # with something in it, and something damaged to take over
    outbox = Outbox(source, "pi")
    old = [outbox.add("old", number) for number in range(4)]
    shutil.copytree(source / "outbox", tmp_path / "outbox")  # as a kill leaves it
    outbox.close()
    shutil.rmtree(source / "outbox")
    (tmp_path / "outbox").rename(source / "outbox")
    wal = source / "outbox/events.db-wal"
    wal.write_bytes(wal.read_bytes()[:-40])
    steps = 0
    for step in range(1, 1000):
        folder, said = tmp_path / f"store-{step}", tmp_path / f"said-{step}"
        shutil.copytree(source, folder)
        said.touch()
        if not killed_at(step, folder, said):
            break
        steps = step
        found = heard(said)
        outbox = Outbox(folder, "pi", events_max=100)
        waiting = set(content_of(outbox))
        told = {
            f"{run.device_id}-{run.salt}-{run.boot}-{number}"
            for run in outbox._store.runs()
            for number in range(run.first, run.last + 1)
        }
        for payload in content_of(outbox).values():
            event = json.loads(payload)
            if event["event_type"] == "outbox_dropped":
                run = event["meta"]
                begin = f"pi-{run['salt']}-{run['boot']}"
                told |= {f"{begin}-{number}" for number in range(run["from"], run["to"] + 1)}
        accounted = waiting | told | set(found["stored"])
        assert set(found["kept"]) <= accounted, step
        # The end of the old file was cut: of the last one nothing is left.
        assert {*old[:3]} <= accounted, step
        assert outbox.add("new") not in {*old, *waiting, *found["kept"]}
        assert not list(folder.glob("aside-*"))
        outbox.close()
        shutil.rmtree(folder)
    assert steps > 100


# --- damage --------------------------------------------------------------------------


DAMAGES: dict[str, Callable[[bytearray, random.Random], object]] = {
    "flipped bits": lambda data, it: [
        data.__setitem__(place, data[place] ^ 1 << it.randrange(8))
        for place in (it.randrange(len(data)) for _ in range(it.randint(1, 3)))
    ],
    "a page of zeros": lambda data, it: data.__setitem__(
        slice(start := it.randrange(0, len(data), 4096), start + 4096), bytes(4096)
    ),
    "cut": lambda data, it: data.__delitem__(slice(it.randrange(len(data)), None)),
    "overwritten": lambda data, it: data.__setitem__(
        slice(start := it.randrange(len(data)), start + 300), it.randbytes(300)
    ),
    "emptied": lambda data, it: data.clear(),
}
TIMES = 12


@pytest.fixture(scope="module")
def takes(tmp_path_factory: pytest.TempPathFactory) -> list[Taken]:
    """The same life, at three moments of a kill and after a clean end."""
    folder = tmp_path_factory.mktemp("takes")
    randomness = random.Random(3)
    outbox = Outbox(folder / "source", "pi")
    made: list[Taken] = []
    answered: set[str] = set()
    for transactions in (3, 40, 250):
        grow(outbox, transactions, randomness)
        first = list(content_of(outbox))[: transactions // 2]
        stored(outbox, *first)
        answered |= set(first)
        made.append(Taken(outbox, folder / "source", folder / str(transactions), answered))
    kept = content_of(outbox)
    outbox.close()
    outbox = Outbox(folder / "source", "pi")
    assert content_of(outbox) == kept
    outbox.close()
    outbox = Outbox(folder / "source", "pi")
    made.append(Taken(outbox, folder / "source", folder / "closed", answered))
    outbox.close()
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["events.db", "events.db-wal", "last"])
@pytest.mark.parametrize("damage", first_or_all(DAMAGES))
def test_damage_is_noticed_and_costs_no_more_than_what_is_damaged(
    takes: list[Taken], tmp_path: Path, name: str, damage: str
) -> None:
    randomness = random.Random(f"{name} {damage}")
    for _ in range(TIMES):
        taken = randomness.choice(takes)
        folder = tmp_path / "damaged"
        shutil.copytree(taken.folder, folder)
        path = folder / "outbox" / name
        if path.exists() and path.stat().st_size:
            data = bytearray(path.read_bytes())
            DAMAGES[damage](data, randomness)
            path.write_bytes(data)
        found, damaged = opened(folder)
        everything = takes[-1].kept | taken.kept
        assert {k: v for k, v in found.items() if k not in taken.answered} == {
            k: everything[k] for k in found if k not in taken.answered
        }, "invented"
        missing = set(taken.kept) - set(found)
        assert damaged or not missing, "silently lost"
        if damage == "flipped bits":
            # A bit costs the event that it is in; and what is in a WAL is there a second time.
            assert len(missing) <= 3
        asides = sorted(it.name for it in folder.iterdir())
        assert asides == ["damaged-1", "lock", "outbox"][1 - damaged :]
        shutil.rmtree(folder)


@pytest.mark.parametrize("foreign", ["text", "zeros", "database", "table", "file", "gone", "empty"])
def test_what_is_not_ours_is_set_aside_as_it_is(
    tmp_path: Path, foreign: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store"
    outbox = Outbox(folder, "pi")
    kept = outbox.add("t")
    path = folder / "outbox/events.db"
    if foreign in ("text", "zeros"):
        outbox.close()
        path.write_bytes({"text": b"hello " * 900, "zeros": bytes(8192)}[foreign])
    elif foreign in ("database", "table"):
        outbox.close()
        path.unlink()
        (folder / "outbox/last").unlink()
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE events (name TEXT)")
            other.execute("INSERT INTO events VALUES ('theirs')")
            if foreign == "table":
                other.execute("PRAGMA application_id = 0x71730001")
        other.close()
    elif foreign == "file":
        outbox.close()
        shutil.rmtree(folder / "outbox")
        (folder / "outbox").write_text("a file")
    else:
        shutil.copytree(folder / "outbox", tmp_path / "outbox")
        outbox.close()
        shutil.rmtree(folder / "outbox")
        (tmp_path / "outbox").rename(folder / "outbox")
        path.write_bytes(b"")
        if foreign == "gone":
            path.unlink()
    outbox = Outbox(folder, "pi")
    assert outbox.damaged() == 1
    assert "set aside" in caplog.text
    # Where the WAL was left, what it holds is read from it.
    has_wal = foreign in ("gone", "empty")
    assert set(content_of(outbox)) == ({kept} if has_wal else set())
    outbox.close()
    aside = folder / "damaged-1"
    if foreign in ("database", "table"):
        with sqlite3.connect(aside / "events.db") as other:
            assert other.execute("SELECT name FROM events").fetchall() == [("theirs",)]
        other.close()
    elif foreign == "file":
        assert aside.read_text() == "a file"
    elif has_wal:
        assert (aside / "events.db-wal").stat().st_size > 0


def test_of_what_was_set_aside_the_newest_four_are_kept(tmp_path: Path) -> None:
    for number in range(7):
        outbox = Outbox(tmp_path, "pi")
        assert outbox.damaged() == (number > 0)
        outbox.add("t")
        outbox.close()
        (tmp_path / "outbox/events.db").write_bytes(b"no database")
    names = sorted(it.name for it in tmp_path.glob("damaged-*"))
    assert names == ["damaged-3", "damaged-4", "damaged-5", "damaged-6"]


def test_damage_that_shows_while_it_runs_is_an_error_and_the_next_start_works(
    tmp_path: Path,
) -> None:
    outbox = Outbox(tmp_path, "pi")
    kept = [outbox.add("t", number) for number in range(50)]
    assert outbox._store._connection is not None
    outbox._store._connection.execute("UPDATE events SET checksum = checksum + 1 WHERE number = 7")
    outbox.connected()
    with pytest.raises(StoreDamaged):
        outbox.due()
    outbox.close()
    outbox = Outbox(tmp_path, "pi")
    assert outbox.damaged() == 1
    assert list(content_of(outbox)) == kept[:6] + kept[7:]
    outbox.close()


# --- what the disk and others do ---------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "pi")
    program = (
        "import sys; from devices.python.telemetry import Outbox, StoreLocked\n"
        "try: Outbox(sys.argv[1], 'pi')\n"
        "except StoreLocked as error: sys.exit(f'locked: {error}')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.stderr == f"locked: {tmp_path}: another process has this outbox\n"
    with pytest.raises(StoreLocked):
        Outbox(tmp_path, "pi")
    outbox.close()
    Outbox(tmp_path, "pi").close()


def test_a_file_that_another_program_holds_is_waited_for_and_no_damage(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "pi")
    outbox.add("t")
    outbox.close()
    other = sqlite3.connect(tmp_path / "outbox/events.db")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreLocked):
        Outbox(tmp_path, "pi")
    other.close()
    outbox = Outbox(tmp_path, "pi")
    assert (outbox.waiting(), outbox.damaged()) == (1, 0)
    outbox.close()


@pytest.mark.parametrize("place", ["/proc/outbox", "/dev/null/outbox", "/sys/outbox"])
def test_a_place_where_nothing_can_be_written_is_a_clear_error(place: str) -> None:
    with pytest.raises((StoreReadOnly, StoreFailed), match=place):
        Outbox(place, "pi")


@pytest.mark.faults
def test_on_a_full_disk_add_says_so_and_nothing_that_was_kept_is_harmed(tmp_path: Path) -> None:
    with tmpfs(tmp_path, 8):
        store = tmp_path / "store"
        outbox = Outbox(store, "pi")
        kept = [outbox.add("t", number) for number in range(20)]
        fill(tmp_path)
        with pytest.raises(StoreFull):  # noqa: PT012
            while True:
                kept.append(outbox.add("t", "x" * 1000))
        assert outbox.waiting() == len(kept)
        # To delete takes room, too: meanwhile it is known that they are answered.
        stored(outbox, *kept[:10])
        outbox.connected()
        (message,) = outbox.due()
        sent = [event["event_id"] for event in json.loads(message.payload)]
        assert sent == kept[10 : 10 + len(sent)]
        assert outbox.waiting() == len(kept) - 10
        outbox.close()
        with suppress(StoreFull):  # the WAL has room left, or has not
            Outbox(store, "pi").close()
        with pytest.raises(StoreFull):
            Outbox(tmp_path / "other", "pi")
        (tmp_path / "ballast").unlink()
        Outbox(tmp_path / "other", "pi").close()
        outbox = Outbox(store, "pi")
        assert set(kept[10:]) <= set(content_of(outbox)) <= set(kept)
        assert outbox.damaged() == 0
        outbox.close()


def fill(folder: Path) -> None:
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def test_every_error_of_sqlite_and_of_files_is_one_of_the_family() -> None:
    for code in range(1, 40):
        error = sqlite3.OperationalError("x")
        error.sqlite_errorcode = code | 5 << 8
        assert isinstance(store_error(error, "there"), BY_CODE.get(code, StoreFailed))
    assert isinstance(store_error(sqlite3.ProgrammingError("a bug"), "there"), StoreFailed)
    for number, kind in ((errno.ENOSPC, StoreFull), (errno.EROFS, StoreReadOnly)):
        assert isinstance(file_error(OSError(number, "x"), "there"), kind)
    assert all(issubclass(kind, OutboxError) for kind in BY_CODE.values())
