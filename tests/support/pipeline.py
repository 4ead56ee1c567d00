"""What the service tests stand on: one test's database, broker and ingester.

What it does: puts them together, and looks into the database by a connection of its own.
What it does not: start the ingester; tests differ in when.
"""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg2

from ingester.event import Event
from ingester.rejection import Rejection
from ingester.store import Outcome, Store
from tests.support.device import Device
from tools.process import free_port
from tools.stack import Ingester, Mosquitto, Postgres, Stack

_number = itertools.count()  # for names that no other has


class Database:
    """A database of the test's own, to look into."""

    def __init__(self, postgres: Postgres, name: str) -> None:
        self.postgres = postgres
        self.name = name
        self.conninfo: dict[str, Any] = {**postgres.conninfo(name)}

    def connect(self) -> Any:
        """Return a connection of its own into the database."""
        return psycopg2.connect(**self.conninfo)

    def query(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run one statement on a connection made for it; return its rows, if it has any."""
        connection = self.connect()
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql, parameters or None)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def count(self, table: str = "events") -> int:
        return int(self.query(f"SELECT count(*) FROM {table}")[0][0])

    def wait_count(self, table: str, number: int, timeout: float = 30) -> None:
        wait_until(lambda: self.count(table) >= number, f"{number} rows in {table}", timeout)
        assert self.count(table) == number

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let nobody else read or write the table `events` while the block runs."""
        connection = self.connect()
        try:
            with connection.cursor() as cursor:
                cursor.execute("LOCK TABLE events")
            yield
        finally:
            connection.close()

    def wait_blocked(self) -> None:
        """Wait until a statement in this database waits for a lock, as behind locked()."""
        waiting = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        wait_until(lambda: self.query(waiting) != [(0,)], "a statement to wait for a lock")


class Pipeline:
    """One test's broker, database and ingester."""

    def __init__(self, mosquitto: Mosquitto, database: Database, folder: Path) -> None:
        self.mosquitto = mosquitto
        self.database = database
        self.environment = {
            "MQTT_HOST": "127.0.0.1",
            "MQTT_PORT": str(mosquitto.port),
            "POSTGRES_HOST": "127.0.0.1",
            "POSTGRES_PORT": str(database.conninfo["port"]),
            "POSTGRES_DB": database.name,
            "POSTGRES_USER": str(database.conninfo["user"]),
            "POSTGRES_PASSWORD": str(database.conninfo["password"]),
            "LOG_LEVEL": "DEBUG",
        }
        self.ingester = Ingester(self.environment, folder / "ingester.log")

    def device(self, device_id: str = "device-1", **options: Any) -> Device:
        return Device(self.mosquitto.port, device_id, **options)

    def close(self) -> None:
        """Stop ingester and broker; a test whose ingester ended by itself fails here."""
        self.ingester.ask_to_stop()
        self.mosquitto.stop()  # which wakes it: else it looks for a signal twice a second
        code = self.ingester.stop()
        assert code in (0, -signal.SIGKILL), f"exit code {code}\n{self.ingester.log_tail()}"


@contextmanager
def new_database(servers: Stack) -> Iterator[Database]:
    """A new database with the schema."""
    name = f"test_{next(_number)}"
    # By one connection each: a psql for each of the two takes longer than the server does.
    server = Database(servers.postgres, "postgres")
    server.query(servers.postgres.create_database_sql(name, template="qs"))
    yield Database(servers.postgres, name)
    server.query(servers.postgres.drop_database_sql(name))


@contextmanager
def new_pipeline(servers: Stack, database: Database) -> Iterator[Pipeline]:
    """A new broker, and an ingester between it and the database that is not started yet."""
    with ExitStack() as cleanup:
        folder = servers.folder / f"pipeline-{next(_number)}"
        mosquitto = Mosquitto(folder, free_port(), free_port())
        cleanup.callback(mosquitto.stop)
        mosquitto.start()
        mosquitto.wait_ready()
        pipeline = Pipeline(mosquitto, database, folder)
        cleanup.callback(pipeline.close)
        yield pipeline


def insert(store: Store, events: Sequence[Event]) -> list[Outcome | Rejection]:
    """Insert the events and commit, as ingest() does with the dead letters it makes of them."""
    store.begin_insert(events)
    outcomes = store.finish_insert()
    store.insert_dead_letters([])
    return outcomes


def saved(mosquitto: Mosquitto) -> bytes:
    """Make the broker save its state now; return it."""
    file = mosquitto.folder / "data/mosquitto.db"
    before = file.stat().st_mtime_ns if file.exists() else 0
    os.kill(mosquitto.pid, signal.SIGUSR1)
    wait_until(lambda: file.exists() and file.stat().st_mtime_ns > before, "the broker to save")
    return file.read_bytes()


def restart_from(mosquitto: Mosquitto, state: bytes) -> None:
    """Let the broker begin again with what saved() returned: packet ids begin again too."""
    mosquitto.stop()
    (mosquitto.folder / "data/mosquitto.db").write_bytes(state)
    mosquitto.start()
    mosquitto.wait_ready()


def wait_until(
    condition: Callable[[], bool], what: str, timeout: float = 15, pause_seconds: float = 0.02
) -> None:
    """Poll for what no event tells of."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {what}"
        time.sleep(pause_seconds)
