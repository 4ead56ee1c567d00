"""The broker, the database and the ingester as plain processes, without Docker.

What it does: `Mosquitto`, `Postgres` and `Ingester` each run one process; `Stack` runs all
three for as long as a `with` block lasts (tests, benchmark); `tools/stack up` runs them in
the foreground for a person. They use the files that Compose uses:
mosquitto/config/mosquitto.conf, postgres/apply-schema.sh and .env.

What it does not: install anything (tools/bootstrap does), or leave anything running in the
background. It finds child processes in /proc, so it is for Linux only.

Invariant: what was started here is stopped here, in reverse order, whatever happens. Only
the broker of `tools/stack up` can be reached from another machine.
"""

import argparse
import fcntl
import functools
import glob
import hashlib
import os
import pwd
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from dotenv import dotenv_values

CHECKOUT = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
DATABASE = {"POSTGRES_DB": "qs", "POSTGRES_USER": "qs", "POSTGRES_PASSWORD": "qs_password"}
PROGRAMS = ("mosquitto", "postgres", "initdb", "psql")
# MQTT 3.1.1: CONNECT with no client id and a clean session, DISCONNECT.
MQTT_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00\xe0\x00"
Account = pwd.struct_passwd


class StackError(Exception):
    """A process did not do what it should; the text says what, with the end of its log."""


class MissingProgramError(StackError):
    """A program that is needed is not installed."""


# --- the machine ---------------------------------------------------------------------


def port_is_free(port: int, host: str = "") -> bool:
    try:
        socket.create_server((host, port)).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    # From below the range of outgoing connections: in there, a client that keeps trying to
    # reach a stopped server sooner or later connects to itself and takes the port away.
    for port in random.sample(range(20_000, 32_000), 500):
        if port_is_free(port, LOOPBACK):
            return port
    raise StackError("no free port between 20000 and 32000")


def search_path(postgres_version: str = "[0-9]*") -> str:
    """PATH, and what Debian keeps off it: mosquitto, and PostgreSQL's server, newest first."""
    folders = glob.glob(f"/usr/lib/postgresql/{postgres_version}/bin")
    folders.sort(key=lambda folder: float(Path(folder).parent.name), reverse=True)
    return ":".join([*folders, os.environ.get("PATH", os.defpath), "/usr/local/sbin:/usr/sbin"])


def require(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name, path=search_path()) is None]
    if missing:
        raise MissingProgramError(
            f"not installed: {', '.join(missing)}. On Debian or Ubuntu tools/bootstrap installs "
            "what is missing (mosquitto mosquitto-clients postgresql); or use Docker"
        )


def clean_environment() -> dict[str, str]:
    """Without what could steer libpq, the ingester or a server from outside."""
    kept = ("HOME", "LANG", "LC_ALL", "TMPDIR", "TZ")
    return {"PATH": search_path()} | {key: os.environ[key] for key in kept if key in os.environ}


def service_account(name: str) -> Account | None:
    """Whom a server runs as, if we are root: PostgreSQL refuses to be root. Else as us."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return pwd.getpwnam("nobody")


def run_as(account: Account | None) -> dict[str, Any]:
    """The arguments of subprocess for it."""
    if account is None:
        return {}
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def reachable_folder(folder: Path, account: Account | None) -> Path:
    """Makes `folder`; or one in /var/tmp, if `account` cannot get there (below /root)."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if account is None:
        return folder
    folder.chmod(0o755)
    test = ["test", "-x", str(folder)]
    if subprocess.run(test, check=False, **run_as(account)).returncode == 0:
        return folder
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    instead = Path("/var/tmp", f"homelab-stack-{digest}")
    instead.mkdir(mode=0o755, exist_ok=True)
    # Anyone may make a folder there, and we are about to give away files in it.
    if instead.is_symlink() or instead.stat().st_uid not in (0, account.pw_uid):
        raise StackError(f"{instead} belongs to somebody else")
    return instead


def chown_tree(folder: Path, account: Account | None) -> None:
    if account is not None:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    cwd: Path = CHECKOUT,
    account: Account | None = None,
    stdin: str = "",
) -> str:
    """Runs a command to its end; returns what it prints, raises if it fails."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command,
        cwd=cwd,
        env=dict(environment),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        **run_as(account),
    )
    if done.returncode != 0:
        name = " ".join(command[:2])
        raise StackError(f"{name}: exit code {done.returncode}\n{done.stderr.strip()}")
    return done.stdout.rstrip("\n")


@functools.cache
def ended_with_parent(number: signal.Signals) -> tuple[str, ...]:
    """A prefix for a command: if we are killed the kernel sends it this signal, if it can."""
    prefix = ("setpriv", "--pdeathsig", number.name.removeprefix("SIG"))
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return prefix


def process_status(pid: int) -> tuple[str, int]:
    """Its state and its parent's pid; Z, for a process that ended, also when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return fields[0], int(fields[1])


# --- one process ---------------------------------------------------------------------


class Process:
    """One child process and its log file: what the three below have in common."""

    stop_signal = signal.SIGTERM

    def __init__(self, name: str, log_file: Path, account: Account | None = None) -> None:
        self.name = name
        self.log_file = log_file
        self.account = account
        self.log_start = 0  # where in the log the latest start begins, in bytes
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise StackError(f"{self.name} was never started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._process.poll() if self._process else None

    @property
    def log_end(self) -> int:
        """The size of the log now: an `after` for what is written from here on."""
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def log_bytes(self, after: int) -> bytes:
        if not self.log_file.exists():
            return b""
        with self.log_file.open("rb") as file:
            file.seek(after)
            return file.read()

    def log(self, after: int = 0) -> str:
        return self.log_bytes(after).decode(errors="replace")

    def log_tail(self) -> str:
        lines = self.log(self.log_start).splitlines()[-20:] or ["(nothing in its log)"]
        return "\n".join(f"    {line}" for line in lines)

    def stop(self, timeout: float = 15.0) -> int:
        """Ends it politely, after `timeout` seconds by force; returns the exit code."""
        if self._process is None:
            return 0
        try:
            if self.running:
                self._send([self.pid], self.stop_signal)
                self.resume()  # a paused process does not see the signal otherwise
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return self.kill()
        finally:
            self.kill()  # also if a second Ctrl-C cut the waiting short

    def kill(self) -> int:
        """Ends it and its children by SIGKILL; returns the exit code."""
        if self._process is None:
            return 0
        if self.running:
            with suppress(StackError):
                self.pause()  # so that it makes no child meanwhile
            pids = self._pids()
            self._send(pids, signal.SIGKILL)
            self._process.wait()
            # A child of PostgreSQL that is still there would prevent a new start.
            self._wait_for_states(pids, "Z", "to be gone")
        return self._process.wait()

    def pause(self) -> None:
        for pids in (self._pids()[:1], self._pids()):  # itself first: no further child then
            self._send(pids, signal.SIGSTOP)
            self._wait_for_states(pids, "TtZ", "to be paused")

    def resume(self) -> None:
        self._send(self._pids()[::-1], signal.SIGCONT)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            running = self.running  # before the condition: its last words count
            if condition():
                return
            if not running:
                problem = f"exited with code {self.returncode} instead of {what}"
            elif time.monotonic() > deadline:
                problem = f"waited {timeout:.1f} s in vain for {what}"
            else:
                time.sleep(0.02)
                continue
            raise StackError(f"{self.name}: {problem}. The end of its log:\n{self.log_tail()}")

    def wait_for_log(self, text: str, timeout: float = 15.0, after: int | None = None) -> int:
        """Waits for `text` behind `after` (or the latest start); returns where it ends."""
        start = self.log_start if after is None else after
        wanted = text.encode()
        self.wait_until(lambda: wanted in self.log_bytes(start), f"the line {text!r}", timeout)
        return start + self.log_bytes(start).index(wanted) + len(wanted)

    def _pids(self) -> list[int]:
        """Itself, then its children: each of PostgreSQL's has a process group of its own."""
        if not self.running:
            return []
        others = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [self.pid, *(pid for pid in others if process_status(pid)[1] == self.pid)]

    def _wait_for_states(self, pids: Sequence[int], states: str, what: str) -> None:
        deadline = time.monotonic() + 5
        while any(process_status(pid)[0] not in states for pid in pids):
            if time.monotonic() > deadline:
                raise StackError(f"{self.name}: waited 5 s in vain for processes {pids} {what}")
            time.sleep(0.005)

    def _send(self, pids: Sequence[int], number: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
        if self.running:
            raise StackError(f"{self.name} is running already")
        self.log_start = self.log_end
        # Only from the main thread: the kernel takes a thread's end for the parent's.
        is_main = threading.current_thread() is threading.main_thread()
        prefix = ended_with_parent(self.stop_signal) if is_main else ()
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*prefix, *command],
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is ours, to stop in order
                **run_as(self.account),
            )


# --- the three -----------------------------------------------------------------------


class Mosquitto(Process):
    """The broker with the project's configuration; its data and its log are in `folder`."""

    def __init__(
        self,
        folder: Path,
        port: int,
        websocket_port: int,
        extra_config: str = "",
        *,
        host: str = LOOPBACK,
    ) -> None:
        account = service_account("mosquitto")
        self.folder = reachable_folder(folder, account)
        self.port = port
        self.websocket_port = websocket_port
        self.extra_config = extra_config
        self.host = host  # "": as the configuration has it, which is every address
        super().__init__("mosquitto", self.folder / "log/mosquitto.log", account)

    def start(self) -> None:
        require("mosquitto")
        for name in ("data", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.log_file.touch()
        config_file = self.folder / "mosquitto.conf"
        config_file.write_text(self._config())
        chown_tree(self.folder, self.account)
        self._spawn(["mosquitto", "-c", str(config_file)], clean_environment(), self.folder)

    def wait_ready(self, timeout: float = 15.0) -> None:
        self.wait_until(self._answers, f"answering on port {self.port}", timeout)

    def _answers(self) -> bool:
        # Not the connection alone: the kernel accepts it before the broker looks at signals,
        # and one that was stopped then would lose what it should have kept.
        try:
            with socket.create_connection((LOOPBACK, self.port), timeout=2) as connection:
                connection.sendall(MQTT_CONNECT)
                connection.recv(4)  # any answer will do, a refusal too
        except ConnectionResetError:
            return self.running
        except OSError:
            return False
        return self.running

    def _config(self) -> str:
        text = (CHECKOUT / "mosquitto/config/mosquitto.conf").read_text()
        for standard, port in ((1883, self.port), (9001, self.websocket_port)):
            listener = f"listener {port}"
            if self.host:  # without the second line, 2.0.11 ignores it for websockets
                listener += f" {self.host}\nsocket_domain ipv4"
            text, count = re.subn(rf"(?m)^listener {standard}$", listener, text)
            if count != 1:
                raise StackError(f"mosquitto.conf: expected one line 'listener {standard}'")
        # Our log is the file that it writes itself; stdout would bring each line again.
        text = text.replace("log_dest stdout\n", "").replace("/mosquitto/", f"{self.folder}/")
        return f"{text}\n{self.extra_config}\n"


class Postgres(Process):
    """The database server, on 127.0.0.1. `settings` are those of postgresql.conf."""

    stop_signal = signal.SIGINT  # does not wait for clients to leave

    def __init__(
        self,
        folder: Path,
        port: int,
        settings: Mapping[str, str] | None = None,
        *,
        user: str = DATABASE["POSTGRES_USER"],
        password: str = DATABASE["POSTGRES_PASSWORD"],
        dbname: str = DATABASE["POSTGRES_DB"],
    ) -> None:
        account = service_account("postgres")
        self.folder = reachable_folder(folder, account)
        self.data = self.folder / "data"
        self.port = port
        self.settings = dict(settings or {})
        self.user = user
        self.password = password
        self.dbname = dbname
        super().__init__("postgres", self.folder / "postgres.log", account)

    def start(self) -> None:
        """Starts it; when there is no data yet, makes it: the user and an empty database."""
        require("postgres", "initdb", "psql")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.data.exists():
            self._make_data()
        chown_tree(self.folder, self.account)
        settings = {
            "port": str(self.port),
            "listen_addresses": LOOPBACK,
            "unix_socket_directories": "",  # a socket's path may not be longer than 107 bytes
            **self.settings,
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        self._spawn(["postgres", "-D", str(self.data), *options], self._environment(), self.folder)

    def wait_ready(self, timeout: float = 60.0) -> None:
        probe = ["pg_isready", "-q", "-h", LOOPBACK, "-p", str(self.port)]
        environment = self._environment()
        self.wait_until(
            lambda: subprocess.run(probe, env=environment, check=False).returncode == 0,
            f"answering on port {self.port}",
            timeout,
        )

    def conninfo(self, dbname: str | None = None) -> dict[str, str | int]:
        return {
            "host": LOOPBACK,
            "port": self.port,
            "user": self.user,
            "password": self.password,
            "dbname": dbname or self.dbname,
        }

    def psql(self, sql: str, dbname: str | None = None) -> str:
        """Runs SQL; returns the rows, one a line, their columns separated by `|`."""
        return self._client(["psql", "-XqAtw", "-v", "ON_ERROR_STOP=1", "-c", sql], dbname)

    def apply_schema(self, dbname: str | None = None) -> None:
        try:
            self._client(["sh", "postgres/apply-schema.sh"], dbname)
        except StackError as error:
            hint = "(The database's name, user and password are those it was first made with.)"
            raise StackError(f"{error}\n{hint}") from None

    def create_database(self, name: str, template: str | None = None) -> None:
        clause = f" TEMPLATE {_quoted(template)}" if template else ""
        self.psql(f"CREATE DATABASE {_quoted(name)}{clause}", "postgres")

    def drop_database(self, name: str) -> None:
        self.psql(f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)", "postgres")

    def _environment(self) -> dict[str, str]:
        """With the programs of the version that the data is of."""
        version = self.data / "PG_VERSION"
        path = search_path(version.read_text().strip()) if version.exists() else search_path()
        return clean_environment() | {"PATH": path}

    def _client(self, command: Sequence[str], dbname: str | None) -> str:
        libpq = {
            "PGHOST": LOOPBACK,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGPASSWORD": self.password,
            "PGDATABASE": dbname or self.dbname,
            "PGCONNECT_TIMEOUT": "5",
        }
        return run(command, self._environment() | libpq)

    def _make_data(self) -> None:
        # Under another name first, or a half-made one would be taken for good next time.
        new, password = self.folder / "data.new", self.folder / "password"
        shutil.rmtree(new, ignore_errors=True)
        password.unlink(missing_ok=True)
        password.touch(mode=0o600)
        password.write_text(self.password)
        chown_tree(self.folder, self.account)

        def run_here(*command: str, stdin: str = "") -> None:
            environment = self._environment()
            run(command, environment, cwd=self.folder, account=self.account, stdin=stdin)

        options = ["--no-locale", "--encoding=UTF8", "--auth=scram-sha-256"]
        run_here("initdb", "-D", str(new), "-U", self.user, f"--pwfile={password}", *options)
        password.unlink()
        if self.dbname != "postgres":
            sql = f"CREATE DATABASE {_quoted(self.dbname)};\n"
            run_here("postgres", "--single", "-D", str(new), "postgres", stdin=sql)
        new.rename(self.data)


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


class Ingester(Process):
    """The ingester with the variables of `environment`, and of .env for the others."""

    def __init__(
        self,
        environment: Mapping[str, str],
        log_file: Path,
        python: str = sys.executable,
        arguments: Sequence[str] = ("-m", "ingester.app"),
    ) -> None:
        self.environment = dict(environment)
        self.command = [python, *arguments]
        super().__init__("ingester", log_file)

    def start(self) -> None:
        environment = clean_environment() | {"PYTHONUNBUFFERED": "1"} | self.environment
        self._spawn(self.command, environment, CHECKOUT)

    def wait_ready(self, timeout: float = 15.0) -> None:
        deadline = time.monotonic() + timeout
        for text in ("Connected to Postgres", "MQTT connected rc=Success; subscribing"):
            self.wait_for_log(text, deadline - time.monotonic())


# --- all three -----------------------------------------------------------------------


class Ports(NamedTuple):
    mqtt: int
    websocket: int
    postgres: int


class Stack:
    """Broker, database with its schema, and ingester, for as long as a `with` lasts.

    Without a folder: in a temporary one, removed in the end. Without ports: on free ones.
    The database's name, user and password are those of `environment`, which goes to the
    ingester as a whole.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        ports: Ports | None = None,
        host: str = LOOPBACK,
        mosquitto_config: str = "",
        postgres_settings: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        with_ingester: bool = True,
    ) -> None:
        self._cleanup = ExitStack()
        base = folder or Path(tempfile.mkdtemp(prefix="homelab-stack-"))
        self.folder = reachable_folder(base, service_account("postgres"))
        if folder is None:
            for path in {base, self.folder}:
                self._cleanup.callback(shutil.rmtree, path, ignore_errors=True)
        self.ports = ports or Ports(free_port(), free_port(), free_port())
        broker_ports = self.ports.mqtt, self.ports.websocket
        broker_folder = self.folder / "mosquitto"
        self.mosquitto = Mosquitto(broker_folder, *broker_ports, mosquitto_config, host=host)
        database = DATABASE | dict(environment or {})
        self.postgres = Postgres(
            self.folder / "postgres",
            self.ports.postgres,
            postgres_settings,
            user=database["POSTGRES_USER"],
            password=database["POSTGRES_PASSWORD"],
            dbname=database["POSTGRES_DB"],
        )
        self.environment = database | {
            "POSTGRES_HOST": LOOPBACK,
            "POSTGRES_PORT": str(self.ports.postgres),
            "MQTT_HOST": LOOPBACK,
            "MQTT_PORT": str(self.ports.mqtt),
        }
        self.ingester = Ingester(self.environment, self.folder / "ingester.log")
        self.with_ingester = with_ingester

    def start(self) -> None:
        """Starts all and waits until they are ready; if one fails, none is left running."""
        require(*PROGRAMS)
        try:
            for server in (self.mosquitto, self.postgres):
                self._cleanup.callback(server.stop)
                server.start()
            self.mosquitto.wait_ready()
            self.postgres.wait_ready()
            self.postgres.apply_schema()
            if self.with_ingester:
                self._cleanup.callback(self.ingester.stop)
                self.ingester.start()
                self.ingester.wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._cleanup.close()  # each callback runs, even if an earlier one raises

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


# --- tools/stack up ------------------------------------------------------------------


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


class LogPrinter:
    """Prints what is new in the logs, each line behind the name of its process."""

    def __init__(self, *processes: Process) -> None:
        self._read_to = {process: process.log_start for process in processes}

    def print_new(self) -> None:
        for process, start in self._read_to.items():
            lines, newline, _ = process.log_bytes(start).rpartition(b"\n")
            self._read_to[process] += len(lines + newline)
            for line in lines.decode(errors="replace").splitlines():
                print(f"{process.name:<9} | {line}")
        sys.stdout.flush()


def read_settings() -> dict[str, str]:
    """The variables of .env; as for Compose, one of the calling shell wins."""
    in_file = {key: value or "" for key, value in dotenv_values(CHECKOUT / ".env").items()}
    settings = DATABASE | {"POSTGRES_PORT": "5432"} | in_file
    return settings | {key: os.environ[key] for key in settings if key in os.environ}


def choose_port(standard: str, offset: int, what: str) -> int:
    if not standard.isdecimal() or not 0 < (wanted := int(standard) + offset) < 65536:
        raise StackError(f"{standard} with an offset of {offset} is no port for {what}")
    if port_is_free(wanted):
        return wanted
    port = free_port()
    say(f"Port {wanted} is taken: {what} is on port {port} instead.")
    return port


def describe(stack: Stack, settings: Mapping[str, str]) -> None:
    device = "test-device"
    events = settings.get("MQTT_EVENTS_TOPIC", "qs/v1/+/events").replace("+", device)
    acks = settings.get("ACK_TEMPLATE", "qs/v1/{device_id}/acks").replace("{device_id}", device)
    event = (
        '{"schema": 1, "event_id": "test-1", "device_id": "test-device", '
        '"event_type": "temperature", "value": 21.5, "unit": "C"}'
    )
    broker = f"-h {LOOPBACK} -p {stack.ports.mqtt}"
    database = stack.postgres
    query = "SELECT * FROM events ORDER BY ts_server DESC LIMIT 10"
    say(
        "",
        f"Ready: MQTT on port {stack.ports.mqtt}, MQTT over websockets on "
        f"{stack.ports.websocket}, PostgreSQL on {stack.ports.postgres} (this machine only).",
        "",
        "  hear ACKs:  " + f"mosquitto_sub {broker} -v -t {shlex.quote(acks)}",
        "  publish:    " + f"mosquitto_pub {broker} -q 1 -t {shlex.quote(events)} -m '{event}'",
        "  query:      " + f"PGPASSWORD={shlex.quote(database.password)} psql -h {LOOPBACK} "
        f"-p {database.port} -U {database.user} -d {database.dbname} -c '{query}'",
        f"  logs:       {stack.ingester.log_file}",
        f"              {stack.mosquitto.log_file}",
        f"              {stack.postgres.log_file}",
        "",
        "Ctrl-C stops all three; the data stays.",
        "",
    )


def follow(stack: Stack, logs: LogPrinter) -> None:
    """Prints the logs until something is wrong or Ctrl-C arrives."""
    while True:
        logs.print_new()
        for server in (stack.mosquitto, stack.postgres):
            if not server.running:
                raise StackError(
                    f"{server.name} ended with code {server.returncode}, so the rest is stopped. "
                    f"The end of its log:\n{server.log_tail()}"
                )
        if stack.ingester.running:
            time.sleep(0.2)
        else:
            say(f"ingester ended with code {stack.ingester.returncode}; it starts again in 1 s.")
            time.sleep(1)
            stack.ingester.start()


def up(port_offset: int, fresh: bool) -> None:
    settings = read_settings()
    require(*PROGRAMS)
    wanted = CHECKOUT / ".stack"
    folder = reachable_folder(wanted, service_account("postgres"))
    if folder != wanted:
        say(f"The user of PostgreSQL cannot reach {wanted}: data and logs are in {folder}.")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"it is running already, with its data in {folder}") from None
        if fresh:
            for path in (folder / "mosquitto", folder / "postgres"):
                if path.exists():
                    shutil.rmtree(path)
            (folder / "ingester.log").unlink(missing_ok=True)
        ports = Ports(
            choose_port("1883", port_offset, "MQTT"),
            choose_port("9001", port_offset, "MQTT over websockets"),
            choose_port(settings["POSTGRES_PORT"], port_offset, "PostgreSQL"),
        )
        with Stack(folder, ports=ports, host="", environment=settings) as stack:
            logs = LogPrinter(stack.mosquitto, stack.postgres, stack.ingester)
            logs.print_new()
            describe(stack, settings)
            try:
                follow(stack, logs)
            except KeyboardInterrupt:
                say("", "Stopping the ingester, PostgreSQL and Mosquitto.")
                stack.stop()
                logs.print_new()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/stack", description="See tools/stack --help.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("up", help="run all three in the foreground")
    command.add_argument("--port-offset", type=int, default=0, metavar="N")
    command.add_argument("--fresh", action="store_true", help="delete the data first")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    try:
        up(arguments.port_offset, arguments.fresh)
    except KeyboardInterrupt:
        return 0
    except (StackError, OSError) as error:
        hint = " (was it made by another user?)" if isinstance(error, PermissionError) else ""
        print(f"tools/stack: {error}{hint}", file=sys.stderr)
        return 2 if isinstance(error, MissingProgramError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
