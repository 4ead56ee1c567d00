"""The overlay as the tests drive it: the stack, what is wrong with it, and one fault at a time.

What it does: brings the overlay up from a copy of the checkout, makes a fault under load, and
counts at the sender what became of every event. What it does not: replace a node by a mock.

Invariant: a Result is of every event that was ever sent, not only of those since the last fault.
"""

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psycopg2
from sender import Sender

from tests.support.compose import PROJECT, Compose
from tests.support.pipeline import wait_until

OVERLAY = ("docker-compose.yml", "overlays/cluster/docker-compose.yml")
SINGLE = {"COMPOSE_FILE": "docker-compose.yml"}
NATS = ("nats-1", "nats-2", "nats-3")
POSTGRES = ("postgres-1", "postgres-2", "postgres-3")
ETCD = ("etcd-1", "etcd-2", "etcd-3")
INGESTERS = ("ingester-0", "ingester-1")
# How long the load runs on after what was broken is back.
AFTER_SECONDS = 5.0
WHOLE_SECONDS_MAX = 180.0
ANSWERED_SECONDS_MAX = 240.0


class Result(NamedTuple):
    """What became of the events, and how long no ACK came during the last fault, in seconds."""

    sent: int
    lost: int  # sent, and at last no row
    false_stored: int  # heard as stored, and no row
    refused: int  # told otherwise, or a dead letter
    gap: float
    gap_of_one: float  # of the device that waited longest

    @property
    def is_kept(self) -> bool:
        """Whether the promise was."""
        return self.lost == self.false_stored == self.refused == 0


class Cluster(Compose):
    """One copy of the checkout with the overlay, and its stack once up() was called."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, *OVERLAY)

    def tear_down(self) -> None:
        """Remove everything, the single stack that moved in and its volume included."""
        self.run("docker", "compose", "down", "--volumes", "--remove-orphans", variables=SINGLE)
        super().tear_down()

    def container(self, service: str) -> str:
        """Return the name of a service's container."""
        if service.startswith("ingester"):
            return f"homelab-{service}"
        return f"{PROJECT}-{service}-1"

    def docker(self, action: str, *services: str) -> None:
        """Do something to the containers of the services: kill, start, pause, ..."""
        self.run("docker", action, *(self.container(service) for service in services))

    def ask(self, service: str, url: str) -> str:
        """Return what a URL answers, asked from within a container; "" for nothing or an error."""
        command = ("docker", "exec", self.container(service), "curl", "-fsm3", url)
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            return done.stdout if done.returncode == 0 else ""
        return ""

    def members(self) -> list[dict[str, Any]]:
        """Return what Patroni says of its nodes; [] if no node answers."""
        for name in POSTGRES:
            if answer := self.ask("gateway", f"http://{name}:8008/cluster"):
                found: list[dict[str, Any]] = json.loads(answer)["members"]
                return found
        return []

    def primary(self) -> str:
        """Return the service whose node takes writes."""
        (name,) = [member["name"] for member in self.members() if member["role"] == "leader"]
        return str(name)

    def standby(self) -> str:
        """Return a service whose node does not."""
        primary = self.primary()
        return next(name for name in POSTGRES if name != primary)

    def trouble_with_nodes(self) -> str:
        """Return what is not as it should be; "" if all nodes are up and equal."""
        members = self.members()
        states = sorted(str(member["state"]) for member in members)
        if states != ["running", "streaming", "streaming"]:
            return f"PostgreSQL: {states}"
        if len([member for member in members if member["role"] == "quorum_standby"]) != 2:
            return f"PostgreSQL: {[member['role'] for member in members]}"
        for name in NATS:
            if '"ok"' not in self.ask("gateway", f"http://{name}:8222/healthz"):
                return f"{name} is not healthy"
        for name in INGESTERS:
            if self.health(name) != "healthy":
                return f"{name} is not healthy"
        return ""

    def wait_whole(self) -> None:
        """Wait until all nodes are up and equal."""
        trouble = ""

        def is_whole() -> bool:
            nonlocal trouble
            trouble = self.trouble_with_nodes()
            return not trouble

        try:
            wait_until(is_whole, "all nodes up", WHOLE_SECONDS_MAX)
        except AssertionError as error:
            raise AssertionError(f"{error}; {trouble}") from None

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of one statement, asked through the gateway."""
        settings = self.settings
        with (
            closing(
                psycopg2.connect(
                    host="127.0.0.1",
                    port=settings["POSTGRES_PORT"],
                    dbname=settings["POSTGRES_DB"],
                    user=settings["POSTGRES_USER"],
                    password=settings["POSTGRES_PASSWORD"],
                    connect_timeout=5,
                )
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(sql)
            return list(cursor.fetchall())


def under_fault(cluster: Cluster, sender: Sender, fault: Callable[[], None]) -> Result:
    """Make a fault, which comes back when it is fixed; wait until all is answered, and count."""
    cluster.wait_whole()
    sender.begin_window()
    sender.go_on()
    fault()
    # New events come until each device hears ACKs again: who has none to send waits for none.
    fixed_at = time.monotonic()
    wait_until(lambda: sender.all_heard_since(fixed_at), "ACKs", ANSWERED_SECONDS_MAX)
    time.sleep(AFTER_SECONDS)
    gap, _ = sender.gaps()
    sender.pause()
    wait_until(lambda: sender.unanswered == 0, "an ACK for each event", ANSWERED_SECONDS_MAX)
    _, gap_of_one = sender.gaps()
    rows = {row[0] for row in cluster.query("SELECT event_id FROM events")}
    of_ours = "WHERE device_id LIKE 'device-%'"
    [[letters]] = cluster.query(f"SELECT count(*) FROM dead_letters {of_ours}")
    with sender.lock:
        return Result(
            sent=len(sender.sent),
            lost=len(sender.sent - rows),
            false_stored=len(sender.heard - rows),
            refused=len(sender.refused) + letters,
            gap=gap,
            gap_of_one=gap_of_one,
        )


def kill(cluster: Cluster, *services: str, seconds: float = 10) -> None:
    """Kill containers (SIGKILL), and start them again later."""
    cluster.docker("kill", *services)
    time.sleep(seconds)
    cluster.docker("start", *services)


def freeze(cluster: Cluster, *services: str, seconds: float = 30) -> None:
    """Let containers do nothing for a while; to others they are there, and silent."""
    signal_all(cluster, "STOP", *services)
    time.sleep(seconds)
    signal_all(cluster, "CONT", *services)


def signal_all(cluster: Cluster, name: str, *services: str) -> None:
    """Send a signal to all that runs in containers.

    Not `docker pause`: the engine may begin a health check just then, and hangs as a whole.
    """
    for service in services:
        if service in NATS:  # there is no shell in it, and one process
            cluster.run("docker", "kill", "-s", name, cluster.container(service))
        else:  # all but init and the shell itself
            command = ("sh", "-c", f"kill -{name} -1")
            cluster.run("docker", "exec", cluster.container(service), *command)


def more_partitions(cluster: Cluster) -> None:
    """Let a third ingester take its part of the devices."""
    cluster.run("overlays/cluster/partitions", "3", seconds=180)
    time.sleep(10)
