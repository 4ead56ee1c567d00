"""The device libraries against the real stack, through every outage and their own death.

What it does: runs the host programs, in C++, MicroPython and Python, while broker, ingester and
database restart or are killed, and while they are killed themselves; then it compares what
they said with the rows. What it does not: look into the libraries; devices/*/test does.

Invariant: what a program called kept or stored is a row, once, with its value; none of it is
in conflict or a dead letter. What it had only in memory when it was killed may be lost.
"""

import fcntl
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices.python.telemetry import Outbox, PahoLink
from tests.support.certificates import Authority
from tests.support.each import first_or_all
from tests.support.pipeline import Database, Pipeline, wait_until
from tests.support.proxy import Proxy
from tools.process import CHECKOUT, Process, clean_environment, free_port, run
from tools.stack import Mosquitto, Stack

LANGUAGES = {
    "python": [sys.executable, "-m", "devices.python.host"],
    "arduino": ["devices/arduino/host/telemetry"],
    "micropython": ["devices/micropython/.tools/bin/micropython", "devices/micropython/host.py"],
}
MAKE = {
    "arduino": ["make", "-C", "devices/arduino/host"],
    "micropython": ["devices/micropython/setup"],
    "python": ["true"],
}
# On a computer nothing is held in memory: each event is kept before it is sent.
KEEP_AT_ONCE = {"python"}
HEADER = Path("/usr/include/mosquitto.h")
LINE = re.compile(r"(kept|stored|dropped) (\S+)|(rejected) (\S+) \S+")
NEVER_KEPT_MS = 600_000
ENDLESS = 100_000


class Program(Process):
    """A host program with a store of its own, over all its runs; its log is what it said."""

    stop_seconds = 30.0

    def __init__(self, language: str, pipeline: Pipeline, folder: Path) -> None:
        super().__init__(language, folder / f"{language}.log")
        self.store = folder / f"{language}-store"
        self.device_id = f"{language}-1"
        self.options: dict[str, object] = {"host": "127.0.0.1", "port": pipeline.mosquitto.port}
        self._command = LANGUAGES[language]

    def start(self, count: int, interval_ms: int = 10, hold_ms: int = 0) -> None:
        options = self.options | {
            "device": self.device_id,
            "store": self.store,
            "count": count,
            "interval-ms": interval_ms,
            "hold-ms": hold_ms,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._spawn([*self._command, *words], clean_environment(), CHECKOUT)

    def said(self, word: str, after: int = 0) -> list[str]:
        """Return the ids in the lines that begin with this word; a line may be half written."""
        text, _, _ = self.log(after).rpartition("\n")
        found = []
        for line in text.splitlines():
            match = LINE.fullmatch(line)
            assert match, f"{line!r}\n{self.log_tail()}"
            if word in (match[1], match[3]):
                found.append(match[2] or match[4])
        return found

    def wait_for(self, word: str, number: int) -> None:
        """Wait until it has said this so many times since it was started."""
        self.wait_until(
            lambda: len(self.said(word, self.log_start)) >= number, f"{number} {word}", 90
        )

    def wait_done(self) -> None:
        """Wait until it ends by itself, with everything answered."""
        wait_until(lambda: not self.running, f"{self.name} to end", 90)
        assert self.returncode == 0, self.log_tail()

    def finish(self) -> None:
        """Let it save what it has, and run it once more, only to send that."""
        assert self.stop() == 0, self.log_tail()
        self.drain()

    def drain(self) -> None:
        """Run it only to send what is left."""
        self.start(0)
        self.wait_done()


@pytest.fixture(scope="module")
def servers() -> Iterator[Stack]:
    """A PostgreSQL of this file's own, as it is restarted."""
    with Stack(with_ingester=False) as stack:
        yield stack


@pytest.fixture(scope="session", params=first_or_all(LANGUAGES))
def language(request: pytest.FixtureRequest) -> str:
    """Build or get what its host program needs, if another worker has not."""
    name = str(request.param)
    has_all = shutil.which("g++") and shutil.which("make") and HEADER.exists()
    if name == "arduino" and not has_all:
        pytest.skip("for C++: apt-get install g++ make libmosquitto-dev")
    with Path(__file__).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        subprocess.run(MAKE[name], cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
    return name


@pytest.fixture
def program(language: str, running: Pipeline, tmp_path: Path) -> Iterator[Program]:
    program = Program(language, running, tmp_path)
    yield program
    program.kill()


def check(program: Program, pipeline: Pipeline, *, was_killed: bool = False) -> None:
    """Compare what the program said with what the database has.

    One that was killed may not have come to say what it had heard, or had sent already.
    """
    kept, stored = program.said("kept"), program.said("stored")
    assert not program.said("dropped")
    assert not program.said("rejected")
    assert len(set(kept)) == len(kept), "kept twice"
    rows = pipeline.database.query("SELECT event_id, event_type, value_num, device_id FROM events")
    ids = {row[0] for row in rows}
    assert set(kept) | set(stored) <= ids
    assert was_killed or set(stored) == ids
    for event_id, event_type, value, device_id in rows:
        begin, salt, boot, sequence = event_id.rsplit("-", 3)
        assert begin == device_id == program.device_id
        assert re.fullmatch("[0-9a-f]{8}", salt)
        assert int(boot) >= 1
        # In each run the values count from 1, as the sequence does.
        assert (event_type, value) == ("test", int(sequence))
    assert pipeline.database.count("dead_letters") == 0


def test_a_program_ends_when_all_its_events_are_rows(running: Pipeline, program: Program) -> None:
    program.start(100, hold_ms=NEVER_KEPT_MS)
    program.wait_done()
    assert len(program.said("stored")) == 100
    if program.name in KEEP_AT_ONCE:
        assert len(program.said("kept")) == 100
    else:
        assert program.said("kept") == []  # in a good network the flash is not touched
    check(program, running)


def test_with_a_hold_of_0_it_keeps_an_event_before_it_sends_it(
    running: Pipeline, program: Program
) -> None:
    program.start(50, hold_ms=0)
    program.wait_done()
    assert sorted(program.said("kept")) == sorted(program.said("stored"))
    lines = program.log().splitlines()
    for event_id in program.said("kept"):
        assert lines.index(f"kept {event_id}") < lines.index(f"stored {event_id}")
    check(program, running)


@pytest.mark.faults
def test_through_broker_restarts_nothing_is_lost(running: Pipeline, program: Program) -> None:
    program.start(ENDLESS, hold_ms=200)
    for number in (50, 200, 350):
        program.wait_for("stored", number)
        running.mosquitto.kill() if number == 200 else running.mosquitto.stop()
        kept = len(program.said("kept"))
        program.wait_for("kept", kept + 5)  # as nothing is answered meanwhile
        running.mosquitto.start()
        running.mosquitto.wait_ready()
    program.finish()
    check(program, running)


@pytest.mark.faults
def test_through_kills_of_the_ingester_nothing_is_lost(running: Pipeline, program: Program) -> None:
    program.start(ENDLESS, hold_ms=200)
    for number in (30, 150, 300, 450):
        program.wait_for("stored", number)
        assert running.ingester.kill() == -9
        kept = len(program.said("kept"))
        program.wait_for("kept", kept + 5)
        running.ingester.start()
    program.finish()
    check(program, running)


@pytest.mark.faults
def test_through_restarts_of_the_database_nothing_is_lost(
    running: Pipeline, program: Program
) -> None:
    program.start(ENDLESS, hold_ms=200)
    for number in (50, 200, 350):
        program.wait_for("stored", number)
        running.database.postgres.kill() if number == 200 else running.database.postgres.stop()
        kept = len(program.said("kept"))
        program.wait_for("kept", kept + 5)
        running.database.postgres.start()
        running.database.postgres.wait_ready()
    program.finish()
    check(program, running)


@pytest.mark.faults
def test_a_connection_that_the_network_forgets_is_given_up(
    running: Pipeline, program: Program
) -> None:
    with Proxy(running.mosquitto.port) as proxy:
        program.options["port"] = proxy.port
        program.start(ENDLESS, interval_ms=50, hold_ms=NEVER_KEPT_MS)
        program.wait_for("stored", 20)
        proxy.forget()  # neither side is told
        stored = len(program.said("stored"))
        program.wait_for("stored", stored + 100)
        program.finish()
    check(program, running)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("language", "hold_ms"),
    [
        (name, hold_ms)
        for name in LANGUAGES
        for hold_ms in ((0,) if name in KEEP_AT_ONCE else (0, 100))
    ],
    indirect=["language"],
)
def test_through_kills_of_its_own_nothing_is_lost_that_was_kept(
    running: Pipeline, program: Program, hold_ms: int
) -> None:
    randomness = random.Random(20260210)
    running.ingester.stop()  # so that there is something to keep
    for _ in range(6):
        program.start(ENDLESS, interval_ms=5, hold_ms=hold_ms)
        program.wait_for("kept", randomness.randint(1, 60))
        assert program.kill() == -9
    running.ingester.start()
    for _ in range(6):
        program.start(ENDLESS, interval_ms=5, hold_ms=hold_ms)
        program.wait_for("stored", randomness.randint(1, 60))
        assert program.kill() == -9
    program.drain()
    assert len(program.said("kept")) > 50
    check(program, running, was_killed=True)


@pytest.mark.faults
def test_through_everything_at_once_nothing_is_lost_that_was_kept(
    running: Pipeline, program: Program
) -> None:
    randomness = random.Random(20260211)

    def restart_broker() -> None:
        randomness.choice((running.mosquitto.stop, running.mosquitto.kill))()
        running.mosquitto.start()
        running.mosquitto.wait_ready()

    def restart_ingester() -> None:
        running.ingester.kill()
        running.ingester.start()
        running.ingester.wait_ready()

    def restart_database() -> None:
        running.database.postgres.stop()
        running.database.postgres.start()
        running.database.postgres.wait_ready()

    def restart_program() -> None:
        randomness.choice((program.stop, program.kill))()
        program.start(ENDLESS)

    troubles: list[Callable[[], None]] = [
        *(restart_broker, restart_ingester, restart_database, restart_program),
    ]
    program.start(ENDLESS)
    for turn in range(12):
        program.wait_for("kept", randomness.randint(5, 50))
        troubles[turn % len(troubles)]()
    program.wait_for("kept", 1)
    program.finish()
    check(program, running, was_killed=True)


def test_sigterm_saves_what_is_in_memory(running: Pipeline, program: Program) -> None:
    running.ingester.stop()
    program.start(ENDLESS, hold_ms=NEVER_KEPT_MS)
    if program.name in KEEP_AT_ONCE:
        program.wait_for("kept", 1)
    else:
        time.sleep(1)
        assert program.said("kept") == []
    assert program.stop() == 0
    kept = program.said("kept")
    assert kept
    running.ingester.start()
    program.drain()
    assert sorted(program.said("stored")) == sorted(kept)
    check(program, running)


def test_after_its_store_was_erased_no_id_comes_again(running: Pipeline, program: Program) -> None:
    for _ in range(3):
        program.start(20)
        program.wait_done()
        shutil.rmtree(program.store)
    assert len(set(program.said("stored"))) == 60
    check(program, running)


@pytest.mark.parametrize("damage", ["emptied", "cut", "overwritten", "foreign"])
def test_a_damaged_store_costs_no_more_than_what_is_damaged(
    running: Pipeline, program: Program, damage: str
) -> None:
    running.ingester.stop()
    program.start(ENDLESS, interval_ms=2)
    program.wait_for("kept", 100)
    assert program.stop() == 0
    files = sorted(path for path in program.store.rglob("*") if path.is_file())
    assert files
    for path in files if damage != "foreign" else []:
        content = path.read_bytes()
        path.write_bytes({"emptied": b"", "cut": content[:-7]}.get(damage, os.urandom(300)))
    (program.store / "lost+found").mkdir()
    (program.store / "notes.txt").write_text("a foreign file")
    running.ingester.start()
    program.start(20)
    program.wait_done()
    program.drain()
    kept, stored = program.said("kept"), program.said("stored")
    assert len(stored) == len(set(stored)) >= 20  # new ids, and the old ones once
    assert set(stored) <= set(kept)
    if damage == "foreign":
        assert set(stored) == set(kept)
    assert not program.said("rejected")
    # What was sent before it was damaged may be a row, though nobody waits for its ACK.
    rows = {row[0] for row in running.database.query("SELECT event_id FROM events")}
    assert set(stored) <= rows <= set(kept)
    assert running.database.count("dead_letters") == 0


@pytest.fixture
def encrypted(
    servers: Stack, database: Database, tmp_path: Path
) -> Iterator[tuple[Pipeline, dict[str, object]]]:
    """A pipeline whose broker has TLS and passwords, and the options that it takes."""
    folder = Path(tempfile.mkdtemp(dir=servers.folder))  # where the broker's user may read
    folder.chmod(0o755)
    authority = Authority(tmp_path / "ca")
    certificate = authority.issue("broker")
    for path in (authority.cert, *certificate):
        shutil.copy(path, folder / path.name)
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    command = ["mosquitto_passwd", "-c", "-b", str(folder / "passwords"), "board", "s3cret"]
    run(command, clean_environment())
    port = free_port()
    lines = [
        *(f"listener {port} 127.0.0.1", "socket_domain ipv4", f"cafile {folder}/ca.crt"),
        *(f"certfile {folder}/broker.crt", f"keyfile {folder}/broker.key"),
        f"password_file {folder}/passwords",
    ]
    mosquitto = Mosquitto(folder, free_port(), free_port(), "\n".join(lines))
    mosquitto.start()
    try:
        mosquitto.wait_ready()
        pipeline = Pipeline(mosquitto, database, folder)
        pipeline.ingester.start()
        pipeline.ingester.wait_ready()
        options = {"host": "localhost", "port": port, "username": "board"}
        yield pipeline, options | {"password-file": secret, "cafile": authority.cert}
        pipeline.close()
    finally:
        mosquitto.stop()


def test_it_takes_tls_and_a_password(
    language: str, encrypted: tuple[Pipeline, dict[str, object]], tmp_path: Path
) -> None:
    pipeline, options = encrypted
    program = Program(language, pipeline, tmp_path)
    program.options = options
    program.start(200)
    program.wait_for("stored", 30)
    pipeline.mosquitto.stop()
    pipeline.mosquitto.start()
    pipeline.mosquitto.wait_ready()
    program.wait_done()
    check(program, pipeline)
    assert len(set(program.said("stored"))) == 200


def test_it_gives_nothing_to_a_broker_whose_certificate_is_not_the_right_one(
    language: str, encrypted: tuple[Pipeline, dict[str, object]], tmp_path: Path
) -> None:
    pipeline, options = encrypted
    other = Authority(tmp_path / "other")
    program = Program(language, pipeline, tmp_path)
    program.options = options | {"cafile": other.cert}
    program.start(20, interval_ms=1)
    pipeline.mosquitto.wait_for_log("OpenSSL Error", 30)
    assert program.stop() == 0
    assert program.said("stored") == []
    assert pipeline.database.count() == 0
    assert program.said("kept")


def test_the_script_for_a_raspberry_pi_loses_no_reading_to_kill_9(
    running: Pipeline, tmp_path: Path
) -> None:
    example = CHECKOUT / "devices/python/examples/thermometer.py"
    sensor = tmp_path / "temp"
    sensor.write_text("47123\n")
    text = example.read_text("utf-8")
    for old, new in (
        ("/sys/class/thermal/thermal_zone0/temp", str(sensor)),
        ("host=sys.argv[1]", f"host=sys.argv[1], port={running.mosquitto.port}"),
        ("link.loop(30)", "link.loop(0.01)"),
    ):
        assert old in text
        text = text.replace(old, new)
    script = tmp_path / "script"
    shutil.copytree(example.parents[1] / "telemetry", script / "telemetry")
    (script / "thermometer.py").write_text(text)
    store = tmp_path / "telemetry"  # in what is its home
    command = [sys.executable, str(script / "thermometer.py"), "127.0.0.1"]
    environment = clean_environment() | {"HOME": str(tmp_path)}

    def kept() -> int:
        last = store / "outbox" / "last"
        return int.from_bytes(last.read_bytes()[:8], "little") if last.exists() else 0

    running.ingester.stop()
    for life in range(1, 7):
        if life == 4:
            running.ingester.start()
        with subprocess.Popen(command, env=environment) as process:
            while kept() < 20 * life and process.poll() is None:
                time.sleep(0.02)
            process.kill()
        assert process.returncode == -9
    outbox = Outbox(store, "pi-attic")
    link = PahoLink(outbox, "127.0.0.1", running.mosquitto.port)
    while outbox.waiting():
        link.loop(0.1)
    link.close()
    outbox.close()
    rows = running.database.query("SELECT event_id, device_id, value_num, unit FROM events")
    # A kill may come between an event and the note of its number.
    assert 120 <= kept() <= len(rows) <= kept() + 6
    assert {row[1:] for row in rows} == {("pi-attic", 47.123, "C")}
    assert running.database.query("SELECT * FROM missing_events") == []
    assert running.database.count("dead_letters") == 0
