"""The broker, the database and the ingester as plain processes, without Docker.

What it does: `Mosquitto`, `Postgres` and `Ingester` each run one process; `Stack` runs all
three for as long as a `with` block lasts. They use the files that Compose uses:
mosquitto/config/mosquitto.conf, postgres/apply-schema.sh and .env.

What it does not: install anything, or leave anything running in the background.

Invariant: what was started here is stopped here, in reverse order, whatever happens. Only
the broker of `tools/stack up` can be reached from another machine.
"""

import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple, Self

from tools.process import (
    CHECKOUT,
    LOOPBACK,
    Process,
    StackError,
    catches,
    chown_tree,
    clean_environment,
    free_port,
    many_open_files,
    reachable_folder,
    require,
    run,
    search_path,
    service_account,
)

DATABASE = {"POSTGRES_DB": "qs", "POSTGRES_USER": "qs", "POSTGRES_PASSWORD": "qs_password"}
PROGRAMS = ("mosquitto", "postgres", "initdb", "psql")
# MQTT 3.1.1: CONNECT with no client id and a clean session, DISCONNECT.
MQTT_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00\xe0\x00"


# --- the three -----------------------------------------------------------------------


class Mosquitto(Process):
    """The broker with the project's configuration; its data and its log are in `folder`."""

    stop_seconds = 60.0  # it writes down its queue, which may be 1 GB

    def __init__(
        self,
        folder: Path,
        port: int,
        websocket_port: int,
        extra_config: str = "",
        *,
        host: str = LOOPBACK,
        checkout: Path = CHECKOUT,
    ) -> None:
        account = service_account("mosquitto")
        self.folder = reachable_folder(folder, account)
        self.port = port
        self.websocket_port = websocket_port
        self.extra_config = extra_config
        self.host = host  # "": as the configuration has it, which is every address
        self.checkout = checkout
        super().__init__("mosquitto", self.folder / "log/mosquitto.log", account)

    def start(self) -> None:
        require("mosquitto")
        for name in ("data", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.log_file.touch()
        config_file = self.folder / "mosquitto.conf"
        config_file.write_text(self._config())
        chown_tree(self.folder, self.account)
        with many_open_files():
            self._spawn(["mosquitto", "-c", str(config_file)], clean_environment(), self.folder)

    def wait_ready(self, timeout: float = 120.0) -> None:
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
        text = (self.checkout / "mosquitto/config/mosquitto.conf").read_text()
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
    stop_seconds = 90.0  # it writes out what it holds, on a memory card slowly

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

    def wait_ready(self, timeout: float = 300.0) -> None:
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

    def apply_schema(
        self, dbname: str | None = None, checkout: Path = CHECKOUT, reader_password: str = ""
    ) -> None:
        """Brings a database up to date; without a password `reader` cannot log in."""
        script = ["sh", f"{checkout}/postgres/apply-schema.sh"]
        try:
            self._client(script, dbname, {"READER_PASSWORD": reader_password})
        except StackError as error:
            hint = "(The database's name, user and password are those it was first made with.)"
            raise StackError(f"{error}\n{hint}") from None

    def restore(self, file: Path) -> None:
        """Fills the empty database from a backup, with the roles that it names; all or nothing."""
        self.psql("CREATE ROLE ingester; CREATE ROLE reader")
        options = ["--single-transaction", "--dbname", self.dbname]
        self._client(["pg_restore", *options, str(file.absolute())], None)

    def create_database(self, name: str, template: str | None = None) -> None:
        self.psql(self.create_database_sql(name, template), "postgres")

    def create_database_sql(self, name: str, template: str | None = None) -> str:
        clause = f" TEMPLATE {_quoted(template)}" if template else ""
        # Before 15 it was the only way. The other one writes each block into the WAL as well.
        if template and int((self.data / "PG_VERSION").read_text()) >= 15:
            clause += " STRATEGY FILE_COPY"
        return f"CREATE DATABASE {_quoted(name)}{clause}"

    def drop_database(self, name: str) -> None:
        self.psql(self.drop_database_sql(name), "postgres")

    def drop_database_sql(self, name: str) -> str:
        return f"DROP DATABASE IF EXISTS {_quoted(name)} WITH (FORCE)"

    def _environment(self) -> dict[str, str]:
        """With the programs of the version that the data is of."""
        version = self.data / "PG_VERSION"
        path = search_path(version.read_text().strip()) if version.exists() else search_path()
        return clean_environment() | {"PATH": path}

    def _client(
        self,
        command: Sequence[str],
        dbname: str | None,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> str:
        libpq = {
            "PGHOST": LOOPBACK,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGPASSWORD": self.password,
            "PGDATABASE": dbname or self.dbname,
            "PGCONNECT_TIMEOUT": "5",
        }
        return run(command, {**self._environment(), **libpq, **variables})

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
        checkout: Path = CHECKOUT,
    ) -> None:
        self.environment = dict(environment)
        self.checkout = checkout
        self.command = [python, *arguments]
        super().__init__("ingester", log_file)

    def start(self) -> None:
        environment = clean_environment() | {"PYTHONUNBUFFERED": "1"} | self.environment
        self._spawn(self.command, environment, self.checkout)

    def ask_to_stop(self) -> None:
        # While it loads, the signal would end it as if it had failed.
        with suppress(StackError):  # it has ended by itself, or is something that never listens
            self.wait_until(lambda: catches(self.pid, self.stop_signal), "a handler", 5)
        super().ask_to_stop()

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
    The database's name, user and passwords are those of `environment`, which goes to the
    ingester as a whole. Code, schema and configuration are those of `checkout`.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        checkout: Path = CHECKOUT,
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
        self.checkout = checkout
        self.mosquitto = Mosquitto(
            broker_folder, *broker_ports, mosquitto_config, host=host, checkout=checkout
        )
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
        log_file = self.folder / "ingester.log"
        self.ingester = Ingester(self.environment, log_file, checkout=checkout)
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
            reader_password = self.environment.get("READER_PASSWORD", "")
            self.postgres.apply_schema(checkout=self.checkout, reader_password=reader_password)
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
