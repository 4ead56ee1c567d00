"""`tools/stack`, as someone without Docker runs it: the real command, with the shipped .env.

What it does: runs it on free ports with its data in a folder of the test's own, types the
commands that the documents have for it, takes its ports away, moves data of earlier releases.
What it does not: touch the folder that a stack of this machine's owner uses; look at the units
(test_systemd.py does).

Invariant: nothing that was started or made here is left.
"""

import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from dotenv import dotenv_values

from tests.support import documents
from tests.support.compose import copy_checkout
from tests.support.device import Device, event
from tools import storage
from tools.process import CHECKOUT, LOOPBACK, OPEN_FILES, Process, SetupError, free_port, run
from tools.stack import MQTT_CONNECT, Mosquitto
from tools.up import LogPrinter

# One worker starts the stack that most tests look at, and no other has to.
pytestmark = [pytest.mark.services, pytest.mark.xdist_group("stack")]

PORTS = ("MQTT_PORT", "MQTT_WEBSOCKET_PORT", "POSTGRES_PORT")
CONNACK = b"\x20\x02\x00\x00"
DISCONNECT = b"\xe0\x00"
PINGREQ, PINGRESP = b"\xc0\x00", b"\xd0\x00"


@contextmanager
def reachable_by_all() -> Iterator[Path]:
    """A folder of the test's own that the servers' accounts can reach; pytest's are closed."""
    with tempfile.TemporaryDirectory(prefix="homelab-stack-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


class Up(Process):
    """`tools/stack up`, in the environment of a unit of systemd: that is where it can be told."""

    stop_seconds = 60.0

    def __init__(self, folder: Path, checkout: Path = CHECKOUT, **variables: str) -> None:
        self.folder = folder
        self.checkout = checkout
        # Of the calling shell nothing that would win over .env.
        settings = {**dotenv_values(CHECKOUT / ".env")}
        self.environment = {key: text for key, text in os.environ.items() if key not in settings}
        self.environment |= {variable: str(free_port()) for variable in PORTS}
        self.environment |= {"STATE_DIRECTORY": str(folder / "data")} | variables
        self.command = [str(checkout / "tools/stack"), "up"]
        super().__init__("tools/stack", folder / "up.log")

    @property
    def mqtt_port(self) -> int:
        return int(self.environment["MQTT_PORT"])

    def start(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(f"\0{self.folder}")
            systemd.settimeout(0.05)
            environment = self.environment | {"NOTIFY_SOCKET": f"@{self.folder}"}
            # As it usually is: 1,024 files, and more for who asks.
            files = ["prlimit", f"--nofile=1024:{resource.getrlimit(resource.RLIMIT_NOFILE)[1]}"]
            self._spawn([*files, *self.command], environment, self.folder)

            def is_ready() -> bool:
                try:
                    return systemd.recv(100) == b"READY=1"
                except TimeoutError:
                    return False

            self.wait_until(is_ready, "ready", 90)

    def execute(self, *command: str) -> str:
        """What `tools/stack exec` prints."""
        words = [str(self.checkout / "tools/stack"), "exec", *command]
        return run(words, self.environment, cwd=self.folder)


def ends(*words: str, environment: Mapping[str, str], files: int = 1024) -> tuple[int, str]:
    """Run `tools/stack` where it ends by itself; return its exit code and all that it said."""
    done = subprocess.run(
        ["prlimit", f"--nofile={files}:{files}", CHECKOUT / "tools/stack", *words],
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    """One that runs, for all that only look at it."""
    with reachable_by_all() as folder:
        process = Up(folder)
        try:
            process.start()
            yield process
            assert process.stop() == 0, process.log()
            assert "Stopping the ingester" in process.log()
        finally:
            process.kill()


@pytest.fixture
def other(up: Up) -> Iterator[dict[str, str]]:
    """The variables of a stack with the same ports and data of its own."""
    with reachable_by_all() as folder:
        yield up.environment | {"STATE_DIRECTORY": str(folder / "data")}


# --- what the documents say to type ---------------------------------------------------


def commands() -> list[str]:
    """Those for it, and all that have `docker compose exec`, as it says to type them."""
    own = documents.to_type(documents.WITHOUT_DOCKER)
    assert len(own) > 5
    in_service = r"docker compose exec (-T )?(mosquitto|postgres|ingester) "
    typed = [
        re.sub(in_service, "tools/stack exec ", command.text)
        for command in documents.commands()
        if command.block == "sh"
        and documents.stack_of(command) == documents.DEFAULT
        and re.match(in_service, command.text)
        and "/mosquitto/" not in command.text
    ]
    assert len(typed) > 10
    # Where there is no terminal.
    return [re.sub(r"ingester\.top$", "ingester.top --once", line) for line in own + typed]


def type_command(up: Up, command: str) -> str | None:
    """Return what is wrong, if something is. One that listens is ended after a while."""
    process = subprocess.Popen(
        ["bash", "-c", command.replace("-f backup.dump", f"-f {up.folder}/backup.dump")],
        cwd=up.checkout,
        env=up.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    listens = documents.GOES_ON.search(command)
    try:
        said, errors = process.communicate(timeout=3 if listens else 60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, errors = process.communicate()
        return None if listens and not errors else f"{command}\nended by us:\n{said}{errors}"
    return f"{command}\nexit {process.returncode}:\n{said}{errors}" if process.returncode else None


def test_every_command_of_the_documents_works_with_the_shipped_settings(up: Up) -> None:
    with ThreadPoolExecutor(8) as pool:
        wrong = [text for text in pool.map(lambda line: type_command(up, line), commands()) if text]
    assert not wrong, "\n\n".join(wrong)
    with Device(up.mqtt_port) as device:  # behind it in the queue
        device.ask(event("after"))
    query = "SELECT count(*) FROM events WHERE event_id = 'test-101'"
    assert up.execute("psql", "-XAtc", query) == "1"


def test_what_it_says_to_type_works(up: Up) -> None:
    lines = re.findall(r"(?m)^  (?:publish|query): +(tools/stack exec .*)", up.log())
    assert len(lines) == 2
    for line in lines:
        assert type_command(up, line) is None
    with Device(up.mqtt_port) as device:
        device.ask(event("behind"))
    query = "SELECT count(*) FROM events WHERE event_id = 'test-1'"
    assert up.execute("psql", "-XAtc", query) == "1"


def test_it_is_for_the_callers_folder_and_says_what_is_wrong(up: Up, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/__init__.py").write_text("raise SystemExit('the wrong one')")
    command = [str(CHECKOUT / "tools/stack"), "exec", "sh", "-c", "pwd; echo $PGDATABASE"]
    assert run(command, up.environment, cwd=tmp_path) == f"{tmp_path}\nqs"
    words = ("--port-offset", "7", "sh", "-c", "echo $MQTT_PORT $PGPORT")
    moved = [int(up.environment[variable]) + 7 for variable in ("MQTT_PORT", "POSTGRES_PORT")]
    assert up.execute(*words) == "{} {}".format(*moved)
    code, said = ends("exec", "no-such-program", environment=up.environment)
    assert (code, said) == (2, "tools/stack: no-such-program is not installed\n")
    assert ends("exec", environment=up.environment)[0] == 2


# --- ports, open files ---------------------------------------------------------------


def test_ports_that_are_taken_are_named_with_the_variables_and_nothing_is_started(
    up: Up, other: dict[str, str]
) -> None:
    code, said = ends("up", environment=other)
    assert code == 2
    for variable in PORTS:
        assert f"port {other[variable]} (" in said
        assert f"{variable}=" in said
    assert "--port-offset 10000" in said
    # Neither other ports, nor anything made.
    assert "Ready" not in said
    assert os.listdir(other["STATE_DIRECTORY"]) == ["lock"]


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, LOOPBACK), (socket.AF_INET6, "::1")])
def test_one_port_that_is_taken_on_one_address_is_enough(
    other: dict[str, str], family: socket.AddressFamily, host: str
) -> None:
    free = {variable: str(free_port()) for variable in PORTS}
    with socket.create_server((host, int(free["POSTGRES_PORT"])), family=family):
        code, said = ends("up", environment=other | free)
    assert code == 2
    assert f"port {free['POSTGRES_PORT']} (PostgreSQL) is taken." in said
    assert "POSTGRES_PORT=" in said
    assert "MQTT_PORT=" not in said


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MQTT_PORT": "http"}, "MQTT_PORT: http "),
        ({"POSTGRES_PORT": "65536"}, "POSTGRES_PORT: 65536 "),
        ({"MQTT_PORT": "5", "POSTGRES_PORT": "5"}, "one port stands twice"),
    ],
)
def test_what_is_no_port_is_named(
    other: dict[str, str], variables: dict[str, str], expected: str
) -> None:
    code, said = ends("up", environment=other | variables)
    assert code == 2
    assert expected in said


def test_a_second_one_on_the_same_data_says_that_it_is_running_already(up: Up) -> None:
    for words in (("up",), ("restore", "/dev/null")):
        code, said = ends(*words, environment=up.environment)
        assert code == 2
        assert f"it is running already, with its data in {up.folder}/data" in said


def test_more_devices_than_a_process_usually_opens_files_are_all_answered(up: Up) -> None:
    number = 1_200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * number)), hard))
    try:
        # The device first, as its library asks select(), which knows of 1,024 files.
        with Device(up.mqtt_port, "among-many") as device, ExitStack() as connections:
            clients = [
                connections.enter_context(socket.create_connection((LOOPBACK, up.mqtt_port), 15))
                for _ in range(number)
            ]
            for client in clients:
                client.sendall(MQTT_CONNECT.removesuffix(DISCONNECT))
            assert [client.recv(4) for client in clients] == [CONNACK] * number
            assert device.ask(event(1, "among-many"))["status"] == "stored"
            for client in clients:
                client.sendall(PINGREQ)
            assert [client.recv(2) for client in clients] == [PINGRESP] * number
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_it_says_how_many_devices_there_can_be_where_the_system_allows_few(
    other: dict[str, str],
) -> None:
    assert "At most about 1014 devices" in ends("up", environment=other)[1]
    assert "At most" not in ends("up", environment=other, files=OPEN_FILES)[1]


# --- backup and restore, and data of an earlier release ---------------------------------


def test_a_backup_is_restored_once_and_what_an_earlier_release_kept_is_moved(
    up: Up, other: dict[str, str], tmp_path: Path
) -> None:
    with Device(up.mqtt_port) as device:
        assert device.ask(event("saved"))["status"] == "stored"
    backup = str(tmp_path / "backup.dump")
    up.execute("pg_dump", "-Fc", "-f", backup)
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"PGDMP, and no more")
    assert ends("restore", str(garbage), environment=other)[0] == 1
    data = Path(other["STATE_DIRECTORY"])
    assert os.listdir(data) == ["lock"]
    assert ends("restore", backup, environment=other)[0] == 0
    code, said = ends("restore", backup, environment=other)
    assert code == 2
    assert f"move {data}/postgres away first" in said

    checkout = copy_checkout(tmp_path / "checkout")
    (checkout / ".venv").symlink_to(CHECKOUT / ".venv")
    data.rename(checkout / ".stack")
    process = Up(data.parent, checkout)
    try:
        process.start()
        query = "SELECT value_num FROM events WHERE event_id = 'device-1-saved'"
        assert process.execute("psql", "-XAtc", query) == "21.5"
        assert f"Moved: the data is in {data}." in process.log()
        assert not (checkout / ".stack").exists()
        assert process.stop() == 0
    finally:
        process.kill()


@pytest.fixture(params=["the same file system", "another"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An old folder with data, and a new one that is empty."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        old = (
            tmp_path / "old" if request.param == "the same file system" else Path(elsewhere, "old")
        )
        new = tmp_path / "new"
        new.mkdir()
        for name in ("postgres/data/PG_VERSION", "postgres/data/base/1", "mosquitto/data/queue"):
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).write_text(f"the contents of {name}")
        (old / "ingester.log").write_text("a line\n")
        (old / "postgres/data").chmod(0o700)
        assert (old.stat().st_dev == new.stat().st_dev) == (request.param != "another")
        yield old, new


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): f"{path.stat().st_mode:o} {path.read_text()}"
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_data_is_moved_with_a_message_and_only_once(places: tuple[Path, Path]) -> None:
    old, new = places
    before = contents(old)
    said: list[str] = []
    storage.move(old, new, said.append)
    assert contents(new) == before
    assert not old.exists()
    assert said[-1] == f"Moved: the data is in {new}."


# Ends itself, as if killed, before the Nth thing that changes a file or starts a program.
KILLED = """
import os, sys
from pathlib import Path
from tools.storage import move
left = int(sys.argv[1])
def count(event, arguments):
    global left
    if event in ("os.rename", "os.remove", "os.rmdir", "subprocess.Popen"):
        left -= 1
        if left < 0:
            os._exit(9)
sys.addaudithook(count)
move(Path(sys.argv[2]), Path(sys.argv[3]), lambda text: None)
"""


def test_a_move_that_is_killed_at_any_step_is_ended_by_the_next_start(
    places: tuple[Path, Path],
) -> None:
    old, new = places
    before = contents(old)
    for step in range(100):
        if step:  # back to where it began
            old.mkdir()
            storage.move(new, old, lambda text: None)
            new.mkdir()
        assert contents(old) == before
        command = [sys.executable, "-c", KILLED, str(step), str(old), str(new)]
        done = subprocess.run(command, cwd=CHECKOUT, check=False)
        if old.exists():
            storage.move(old, new, lambda text: None)
        assert contents(new) == before, f"killed at step {step}"
        assert not old.exists()
        if done.returncode == 0:
            break
        assert done.returncode == 9
    assert step >= 3


def test_half_a_copy_is_not_taken_for_the_data(places: tuple[Path, Path]) -> None:
    old, new = places
    before = contents(old)
    (new / "postgres.copy/data").mkdir(parents=True)
    (new / "postgres.copy/data/PG_VERSION").write_text("half")
    storage.move(old, new, lambda text: None)
    assert contents(new) == before


def test_where_both_have_data_the_new_is_used_and_the_old_stays(places: tuple[Path, Path]) -> None:
    old, new = places
    (new / "postgres").mkdir()
    before = contents(old)
    said: list[str] = []
    storage.move(old, new, said.append)
    assert before.items() <= contents(old).items()
    assert os.listdir(new) == ["postgres"]
    (text,) = said
    assert str(old) in text
    assert str(new) in text


def test_nothing_is_moved_while_a_stack_or_a_server_runs_there(places: tuple[Path, Path]) -> None:
    old, new = places
    with (old / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SetupError, match=f"running already, with its data in {old}"):
            storage.move(old, new, print)
    with reachable_by_all() as folder:
        mosquitto = Mosquitto(folder / "old/mosquitto", free_port(), free_port())
        try:
            mosquitto.start()
            mosquitto.wait_ready()
            with pytest.raises(SetupError, match=rf"mosquitto \(process {mosquitto.pid}\)"):
                storage.move(folder / "old", new, print)
        finally:
            mosquitto.stop()
    assert os.listdir(new) == []


def test_a_symbolic_link_in_the_old_place_is_left_to_its_owner(places: tuple[Path, Path]) -> None:
    old, new = places
    link = new.with_name("link")
    link.symlink_to(old)
    with pytest.raises(SetupError, match=f"ln -s {old} {new}"):
        storage.move(link, new, print)
    assert os.listdir(new) == []


def test_a_disk_that_is_too_small_leaves_the_data_where_it_is(tmp_path: Path) -> None:
    old, new = Path(tempfile.mkdtemp(dir="/dev/shm")), tmp_path / "new"
    try:
        (old / "postgres").mkdir()
        (old / "postgres/big").write_bytes(bytes(1_000_000))
        new.mkdir()
        # The limit for a file stands for a full disk: cp fails half-way.
        command = [sys.executable, "-c", KILLED, "1000000", str(old), str(new)]
        limited = ["prlimit", "--fsize=500000", *command]
        done = subprocess.run(limited, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        assert f"The data is still in {old}" in done.stderr
        assert (old / "postgres/big").stat().st_size == 1_000_000
        assert os.listdir(new) == []
        storage.move(old, new, lambda text: None)
        assert (new / "postgres/big").stat().st_size == 1_000_000
    finally:
        shutil.rmtree(old, ignore_errors=True)


def test_the_folder_is_of_the_system_for_root_and_of_the_user_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("STATE_DIRECTORY", "XDG_DATA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/users/somebody")
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 0)
        assert storage.data_folder() == Path("/var/lib/homelab-telemetry")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert storage.data_folder() == Path("/users/somebody/.local/share/homelab-telemetry")
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    assert storage.data_folder() == Path("/users/somebody/.local/share/homelab-telemetry")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert storage.data_folder() == Path("/data/homelab-telemetry")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/given")
    assert storage.data_folder() == Path("/var/lib/given")


def test_the_earlier_places_are_those_of_this_checkout_and_of_this_user(tmp_path: Path) -> None:
    assert storage.earlier_folders(tmp_path) == []
    in_checkout = tmp_path / ".stack"
    digest = sha256(str(in_checkout).encode()).hexdigest()[:12]
    in_var_tmp = Path("/var/tmp", f"homelab-stack-{digest}")
    in_checkout.mkdir()
    in_var_tmp.mkdir()
    try:
        assert storage.earlier_folders(tmp_path) == [in_checkout, in_var_tmp]
        if os.geteuid() == 0:
            os.chown(in_var_tmp, 65_534, 65_534)
            assert storage.earlier_folders(tmp_path) == [in_checkout]
    finally:
        in_var_tmp.rmdir()


def test_a_log_that_was_emptied_is_printed_from_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = Process("one", tmp_path / "log")
    logs = LogPrinter(process)
    process.log_file.write_text("a line\n")
    logs.print_new()
    process.log_file.write_text("")
    logs.print_new()
    process.log_file.write_text("new\nhalf of")
    logs.print_new()
    assert capsys.readouterr().out == "one       | a line\none       | new\n"
