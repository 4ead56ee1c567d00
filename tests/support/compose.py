"""The stack of docker-compose.yml, driven as a person drives it, by `docker compose`.

What it does: copies the checkout, as a fresh clone under umask 077 would be, runs the compose
file there, with an older broker or earlier health checks where a test asks for them and otherwise
unchanged, and takes everything away.
What it does not: touch the project `homelab`, whose volume holds somebody's events: the copy
runs under a project name of its own.

Invariant: nothing of a stack that somebody else runs is stopped, removed or written to.
"""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from dotenv import dotenv_values

from tests.support.checkout import files_of
from tests.support.pipeline import wait_until
from tools.process import CHECKOUT, port_is_free

# The broker's image as the checkout names it, and the one from before: many machines have it.
BROKER, BROKER_2_0 = "eclipse-mosquitto:2", "eclipse-mosquitto:2.0"
NAME_THE_BROKER = ("docker-compose.yml", "overlays/secure/common.sh")
PROJECT = "homelab-test"
VOLUME = f"{PROJECT}_postgres_data"
# Names and ports are the same in every copy, so one stack runs on a machine.
CONTAINERS = {
    "mosquitto": "mosquitto",
    "postgres": "homelab-postgres",
    "ingester": "homelab-ingester",
}
# The first version of Docker that has `start_interval`.
START_INTERVAL_ENGINE_MIN = 25
# Who has the copies: neither root nor a user of a container.
OWNER = 65_533
# Another run of these tests on this machine waits for this name; it goes with the process.
LOCK = f"\0{PROJECT}-compose"


class Compose:
    """One copy of the checkout, and its stack once up() was called.

    `files` are what stands behind `-f`, from the checkout; none is what Compose finds itself.
    """

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder = folder
        self.broker = BROKER
        self._volumes_seen = {VOLUME}
        self.settings = dotenv_values(folder / ".env")
        # Variables of the calling shell would win over .env.
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name not in self.settings and not name.startswith("COMPOSE_")
        } | {"COMPOSE_PROJECT_NAME": PROJECT}
        if files:
            self.environment["COMPOSE_FILE"] = os.pathsep.join(files)

    def use_broker(self, image: str) -> None:
        """From the next up() on: name another image wherever the copy names the broker's."""
        for path in (self.folder / name for name in NAME_THE_BROKER):
            text, count = re.subn(rf"{self.broker}$", image, path.read_text(), flags=re.MULTILINE)
            assert count == 1, f"{path} names {self.broker} {count} times"
            path.write_text(text)
        self.broker = image

    def look_often(self) -> None:
        """From the next up() on: have Docker check a starting service twice a second.

        Otherwise the first check comes after 3 or 5 seconds, and these tests would spend most of
        their time waiting for it. Once a service is healthy, it is checked as before. Upgrades,
        backups and the bridge are tested with the files as they are.
        """
        asked = ("docker", "version", "--format", "{{.Server.Version}}")
        if int(self.run(*asked).stdout.partition(".")[0]) < START_INTERVAL_ENGINE_MIN:
            return
        for path in self.folder.rglob("docker-compose.yml"):
            text = re.sub(
                r"^( +)start_period: .*\n",
                r"\g<0>\1start_interval: 500ms\n",
                path.read_text(),
                flags=re.MULTILINE,
            )
            path.write_text(text)

    def run(
        self,
        *command: str,
        expected: int = 0,
        seconds: float = 90,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the copy, with these variables in the shell; check its exit code."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == expected, (
            f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def compose(self, *arguments: str) -> str:
        """Run `docker compose ...`; return what it printed."""
        return self.run("docker", "compose", *arguments).stdout

    def up(self, *arguments: str, **variables: str) -> None:
        """Bring up what is not, wait until all is healthy."""
        # The first time an image is built, with packages from the network.
        command = ("docker", "compose", "up", "-d", "--wait", *arguments)
        self.run(*command, seconds=240, variables=variables)

    def down(self, *arguments: str) -> None:
        """Remove the containers, having noted their volumes."""
        self._volumes_seen |= self.volumes_mounted()
        self.compose("down", *arguments)

    def psql(self, sql: str) -> str:
        """Return the result of one statement, without headings."""
        user, name = self.settings["POSTGRES_USER"], self.settings["POSTGRES_DB"]
        psql = ("psql", f"--username={user}", f"--dbname={name}", "-XAtc", sql)
        # Not by `docker compose exec`, which takes four times as much CPU: this is called often.
        return self.run("docker", "exec", CONTAINERS["postgres"], *psql).stdout.strip()

    def schema(self) -> str:
        """The schema of the database, as pg_dump writes it."""
        user, name = self.settings["POSTGRES_USER"], self.settings["POSTGRES_DB"]
        dump = self.compose("exec", "postgres", "pg_dump", f"-U{user}", f"-d{name}", "-s")
        # \restrict and \unrestrict carry a key that is another each time.
        return "\n".join(line for line in dump.splitlines() if "restrict " not in line)

    def event_ids(self, device_id: str) -> set[str]:
        """The ids of the events of one device that are rows."""
        return set(
            self.psql(f"SELECT event_id FROM events WHERE device_id = '{device_id}'").split()
        )

    def inspect(self, service: str) -> dict[str, Any]:
        """Everything that the engine says of a service's container."""
        name = CONTAINERS.get(service) or self.compose("ps", "-aq", service).strip()
        found: dict[str, Any] = json.loads(self.run("docker", "inspect", name).stdout)[0]
        return found

    def health(self, service: str) -> str:
        """`starting`, `healthy` or `unhealthy`."""
        return str(self.inspect(service)["State"]["Health"]["Status"])

    def wait_health(self, service: str, health: str, timeout: float = 60) -> None:
        """Wait for what health() is to say."""
        # Each look costs 20 ms of CPU, and Docker checks at most twice a second.
        wait_until(lambda: self.health(service) == health, f"{health} {service}", timeout, 0.2)

    def wait_healthy(self) -> None:
        """Wait for all three services; a restart begins their checks anew."""
        for service in CONTAINERS:
            self.wait_health(service, "healthy")

    def log(self, service: str) -> str:
        """What a service's container wrote since it was made."""
        container = CONTAINERS.get(service) or self.compose("ps", "-aq", service).strip()
        done = self.run("docker", "logs", container)
        return done.stdout + done.stderr

    def ports_published(self) -> list[int]:
        """The ports that the stack takes on this machine."""
        config = json.loads(self.compose("config", "--format", "json"))
        services = config["services"].values()
        return [int(port["published"]) for service in services for port in service.get("ports", ())]

    def volumes_mounted(self) -> set[str]:
        """The volumes, named and anonymous, of all containers, ended ones included."""
        ids = self.compose("ps", "-aq").split()
        if not ids:
            return set()
        containers = json.loads(self.run("docker", "inspect", *ids).stdout)
        mounts = [mount for container in containers for mount in container["Mounts"]]
        return {mount["Name"] for mount in mounts if mount["Type"] == "volume"}

    def volumes_left(self) -> set[str]:
        """Which of the volumes that were ever mounted exist."""
        existing = self.run("docker", "volume", "ls", "-q").stdout.split()
        return self._volumes_seen & set(existing)

    def trouble(self) -> str:
        """For a test that failed: what runs, and the end of what it said."""
        commands = (["ps", "-a"], ["logs", "--no-color", "--timestamps", "--tail", "40"])
        return "\n".join(self.compose(*command) for command in commands)

    def tear_down(self) -> None:
        """Remove everything; fail if something of it is left."""
        self.down("--volumes", "--remove-orphans")
        # The broker's files belong to its user, not to the one who runs the tests.
        mount = f"{self.folder / 'mosquitto'}:/copy"
        self.run("docker", "run", "--rm", "-v", mount, BROKER,
                 "rm", "-rf", "/copy/data", "/copy/log")  # fmt: skip
        left = self.volumes_left()
        label = ["--filter", f"label=com.docker.compose.project={PROJECT}"]
        for kind in (["ps", "-a"], ["network", "ls"], ["volume", "ls"]):
            left |= set(self.run("docker", *kind, "-q", *label).stdout.split())
        shutil.rmtree(self.folder)
        assert not left, f"left behind by the stack: {left}"


def copy_checkout(folder: Path) -> Path:
    """Copy what a clone would have, with what is not committed yet; return the folder.

    As a user has it who is not root and whose umask is 077: so each test of a copy shows, too,
    that no container needs more rights to the checkout than that leaves.
    """
    for name, source in files_of(CHECKOUT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, folder / name)
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & 0o700)
        if os.geteuid() == 0:
            os.chown(path, OWNER, OWNER)
    return folder


def with_each_broker(metafunc: pytest.Metafunc) -> None:
    """Run a test with the images of its mark `brokers`; with the checkout's own, if it has none.

    For a module's pytest_generate_tests, where the fixture `whole_stack` takes the image.
    """
    if "whole_stack" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("brokers")
        images = mark.args if mark else (BROKER,)
        metafunc.parametrize("whole_stack", images, indirect=True, scope="module", ids=image_id)


def image_id(image: str) -> str:
    """The version alone, for the names of tests."""
    return image.rpartition(":")[2]


@contextmanager
def only_run() -> Iterator[None]:
    """Have this machine's one right to run a stack; skip without an engine, or beside another."""
    if reason := missing_engine():
        pytest.skip(reason)
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(LOCK)
        except OSError:
            pytest.skip("another run of these tests is under way on this machine")
        yield


@contextmanager
def cleared(stack: Compose) -> Iterator[None]:
    """Nothing of the stack before and after; skip if another is in the way.

    If something fails in between, print what the stack said.
    """
    stack.compose("down", "--volumes", "--remove-orphans")  # what a killed run left
    if reason := in_the_way(stack):
        pytest.skip(reason)
    try:
        yield
    except BaseException:
        print(stack.trouble())
        raise
    finally:
        stack.tear_down()


def missing_engine() -> str | None:
    """Why no stack can be run on this machine at all; None if one can."""
    if not shutil.which("docker"):
        return "Docker is not installed"
    for command in (["docker", "version"], ["docker", "compose", "version"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            return f"`{' '.join(command)}`: {done.stderr.strip() or done.stdout.strip()}"
    return None


def in_the_way(stack: Compose) -> str | None:
    """What else runs here under the same names or on the same ports; None if nothing does."""
    names = stack.run("docker", "ps", "-a", "--format", "{{.Names}}").stdout.split()
    if taken := sorted(set(names) & set(CONTAINERS.values())):
        return f"a stack is up already, with the containers {', '.join(taken)}"
    if busy := [port for port in stack.ports_published() if not port_is_free(port)]:
        return f"something listens on port {', '.join(map(str, busy))}"
    return None
