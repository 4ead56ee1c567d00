"""Every option of .env at another value than its default, at once: in Compose, in the overlay,
without Docker.

What it does: takes the default ports, writes the .env of somebody who likes nothing as it comes,
with a password that has everything in it, and publishes an event. What it does not: try each
option by itself (test_settings.py), or what is wrong (test_compose.py, test_tls.py).

Invariant: the three stacks have the same .env; the default ports stay somebody else's.
"""

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from dotenv import dotenv_values

from tests.support import compose
from tests.support.certificates import Authority
from tests.support.compose import Compose
from tests.support.device import event
from tests.support.pipeline import wait_until
from tests.support.secure import OVERLAY, PASSWORD_FILES, SecureStack, missing_rights
from tools.process import CHECKOUT, free_port
from tools.stack import Stack

pytestmark = [pytest.mark.compose, pytest.mark.timeout(300)]

PASSWORD = r"""a $b ${c} #d 'e' \f "g'"""
# As .env says that it is written.
WRITTEN = r"""'a $b ${c} #d \'e\' \f "g\''"""
TAKEN = (1883, 8883, 9001, 5432)
EVENTS = "my home/{}/says"
ACKS = "to/device-{}-here/answer"
# As .env has them, but for the ports on this machine.
OPTIONS = {
    "POSTGRES_DB": "tele-metry",
    "POSTGRES_USER": "the-owner",
    "POSTGRES_PASSWORD": WRITTEN,
    "POSTGRES_PASSWORD_FILE": "/run/given/password",
    "READER_PASSWORD": WRITTEN,
    "POSTGRES_HOST": "database.lan",
    "MQTT_HOST": "broker.lan",
    "MQTT_PORT": "8885",
    "MQTT_USERNAME": "someone",
    "MQTT_PASSWORD": WRITTEN,
    "MQTT_PASSWORD_FILE": "/run/given/password",
    "MQTT_TLS": "true",
    "MQTT_CA_FILE": "/run/given/ca.crt",
    "MQTT_CERT_FILE": "/run/given/client.crt",
    "MQTT_KEY_FILE": "/run/given/client.key",
    "MQTT_CLIENT_ID": "another-ingester",
    "MQTT_EVENTS_TOPIC": "'my home/+/says'",
    "ACK_TEMPLATE": "to/device-{device_id}-here/answer",
    "MQTT_DEADLETTER_TOPIC": "lost/property",
    "MQTT_STATUS_TOPIC": "how/it/is",
    "DEVICE_DEFAULT_TZ": "America/Los_Angeles",
    "LOG_LEVEL": "DEBUG",
    "BATCH_MAX": "7",
    "RETENTION_DAYS": "3650",
}
PORTS = (
    "POSTGRES_PORT",
    "MQTT_PORT_PUBLISHED",
    "MQTT_TLS_PORT_PUBLISHED",
    "MQTT_WEBSOCKET_PORT",
)
# What the options name, and .env cannot bring: names in the network, files in containers.
GIVEN = """
services:
  mosquitto:
    networks: {default: {aliases: [broker.lan]}}
  postgres:
    networks: {default: {aliases: [database.lan]}}
  ingester:
    volumes: ["./given/ingester:/run/given:ro"]
"""
BROKER_GIVEN = """
services:
  mosquitto:
    volumes:
      - ./given/mosquitto.conf:/mosquitto/config/mosquitto.conf:ro
      - ./given/broker:/given:ro
"""
BROKERS_TLS = """
password_file /given/password
listener 8885
cafile /given/ca.crt
certfile /given/server.crt
keyfile /given/server.key
require_certificate true
"""


def write_options(folder: Path, **others: str) -> dict[str, str]:
    """Write each option into .env, where its default stands; return them as they are read."""
    options = OPTIONS | others
    lines = (CHECKOUT / ".env").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if line and line[0] != "#"]
    assert sorted(options) == sorted(names)
    for number, line in enumerate(lines):
        if (name := line.partition("=")[0]) in options:
            lines[number] = f"{name}={options[name]}"
    (folder / ".env").write_text("\n".join(lines) + "\n")
    return read(folder / ".env")


def read(settings: Path) -> dict[str, str]:
    """What python-dotenv makes of a file, as the ingester calls it."""
    return {name: text or "" for name, text in dotenv_values(settings, interpolate=False).items()}


def make_given(stack: Compose) -> None:
    """Make the files that the options name, and those of a broker that asks for them."""
    given = stack.folder / "given"
    authority = Authority(given / "ca")
    files = {"ca.crt": authority.cert.read_text(), "password": PASSWORD}
    for name, service in (("client", "ingester"), ("server", "broker")):
        certificate = authority.issue(name, "DNS:broker.lan")
        files |= {
            f"{service}/{name}.crt": certificate.cert.read_text(),
            f"{service}/{name}.key": certificate.key.read_text(),
        }
    for service, user in (("ingester", 10_001), ("broker", 1883)):
        folder = given / service
        folder.mkdir()
        for name, text in files.items():
            owner, _, own = name.rpartition("/")
            if owner in ("", service):
                (folder / own).write_text(text)
        for path in (folder, *folder.iterdir()):
            path.chmod(0o700 if path.is_dir() else 0o600)
            os.chown(path, user, user)
    (given / "broker/password").write_text("")
    mount = f"{given}/broker:/given"
    stack.run("docker", "run", "--rm", "--user", "1883", "-v", mount, stack.broker,
              "mosquitto_passwd", "-b", "/given/password", "someone", PASSWORD)  # fmt: skip
    base = (stack.folder / "mosquitto/config/mosquitto.conf").read_text()
    (given / "mosquitto.conf").write_text(base + BROKERS_TLS)
    (stack.folder / "given.yml").write_text(GIVEN)
    (stack.folder / "broker.yml").write_text(BROKER_GIVEN)
    for path in (given, given / "mosquitto.conf"):
        path.chmod(0o755)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureStack]:
    """A fresh copy, with its own .env yet, on a machine where every default port is taken."""
    if reason := missing_rights():
        pytest.skip(reason)
    with compose.only_run(), ExitStack() as cleanup:
        stack = SecureStack(compose.copy_checkout(tmp_path_factory.mktemp("options")))
        stack.look_often()
        del stack.environment["COMPOSE_FILE"]
        with compose.cleared(stack):
            for port in TAKEN:
                cleanup.enter_context(socket.create_server(("", port)))
            yield stack


@pytest.fixture
def shown(stack: SecureStack, request: pytest.FixtureRequest) -> Iterator[SecureStack]:
    """The same; of a test that failed, pytest shows what is printed here."""
    failed_before = request.session.testsfailed
    yield stack
    if request.session.testsfailed > failed_before:
        print(stack.trouble())


def close(stack: Compose) -> None:
    """Close to others what git has in the broker's folders, as umask 077 does."""
    for name in ("data", "log"):
        folder = stack.folder / "mosquitto" / name
        (folder / ".gitignore").chmod(0o600)
        folder.chmod(0o700)


def git_sees_its_files(stack: Compose) -> bool:
    """Whether the checkout's owner, who is not the broker's user, may see and read them."""
    folders = [stack.folder / "mosquitto" / name for name in ("data", "log")]
    return all(
        folder.stat().st_mode & 0o055 == 0o055
        and (folder / ".gitignore").stat().st_mode & 0o044 == 0o044
        for folder in folders
    )


# --- what is the same in all of them ----------------------------------------------------


class Asker:
    """A device that publishes one event and waits for its ACK, by the documented mosquitto_rr."""

    def __init__(self, port: str, device_id: str, *login: str) -> None:
        self.device_id = device_id
        self._command = ("mosquitto_rr", "-V", "mqttv311", "-h", "localhost", "-p", port, *login)

    def ask(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the ACK."""
        topics = ("-t", EVENTS.format(self.device_id), "-e", ACKS.format(self.device_id))
        done = subprocess.run(
            [*self._command, "-q", "1", *topics, "-W", "20", "-m", json.dumps(payload)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


def rows(settings: dict[str, str], **options: str) -> dict[str, str]:
    """The time of each event, as somebody on this machine reads it, who has the password."""
    options = {
        "host": "localhost",
        "port": settings["POSTGRES_PORT"],
        "dbname": settings["POSTGRES_DB"],
        "user": settings["POSTGRES_USER"],
        "password": PASSWORD,
    } | options
    connection: Any = psycopg2.connect(**options)  # type: ignore[call-overload]
    with closing(connection), connection.cursor() as cursor:
        cursor.execute("SELECT event_id, (ts_device AT TIME ZONE 'UTC')::text FROM events")
        return dict(cursor.fetchall())


LOCAL_TIME, UTC_TIME = "2026-07-01T00:00:00", "2026-07-01 07:00:00"


def try_all(stack: SecureStack, device: Asker, number: str) -> None:
    """Publish an event and what is none; look at what an option decides of it."""
    item = event(number, device.device_id, ts_device=LOCAL_TIME)
    assert device.ask(item)["status"] == "stored"
    listener = subprocess.Popen(
        ["docker", "compose", "exec", "-T", "mosquitto",
         "mosquitto_sub", "-t", OPTIONS["MQTT_DEADLETTER_TOPIC"], "-C", "1", "-W", "20"],
        cwd=stack.folder, env=stack.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while listener.poll() is None:  # again and again, as it may not have subscribed yet
        assert device.ask({"schema": 1})["reason"] == "missing_field"
    assert json.loads(listener.communicate()[0])["device_id"] == device.device_id
    listen = ("mosquitto_sub", "-t", OPTIONS["MQTT_STATUS_TOPIC"], "-C", "1", "-W", "15")
    assert json.loads(stack.compose("exec", "-T", "mosquitto", *listen))["state"] == "online"
    assert " DEBUG batch" in stack.log("ingester")
    assert "as another-ingester (" in stack.log("mosquitto")


def arrived(stack: SecureStack, names: Sequence[str]) -> dict[str, str]:
    """Some of the variables in the ingester's container."""
    lines = stack.compose("exec", "-T", "ingester", "env").splitlines()
    return {name: text for name, _, text in (line.partition("=") for line in lines)
            if name in names}  # fmt: skip


# --- the three of them -------------------------------------------------------------------


def test_a_port_that_is_taken_is_named_and_every_other_option_serves_in_compose(
    shown: SecureStack,
) -> None:
    stack = shown
    refused = stack.run("docker", "compose", "up", "-d", "--build", expected=1, seconds=240).stderr
    assert any(f":{port}: bind: address already in use" in refused for port in TAKEN), refused

    ports = {name: str(free_port()) for name in PORTS}
    assert len(set(ports.values())) == len(ports)
    make_given(stack)
    close(stack)
    stack.environment["COMPOSE_FILE"] = "docker-compose.yml:given.yml:broker.yml"
    # Of each password, once the variable and once the file; of both at once, the ingester would
    # take one, or neither.
    for number, unset in enumerate((("MQTT_PASSWORD_FILE", "POSTGRES_PASSWORD_FILE"),
                                    ("MQTT_PASSWORD",))):  # fmt: skip
        settings = write_options(stack.folder, **ports, **dict.fromkeys(unset, ""))
        stack.settings |= settings
        stack.up()
        assert arrived(stack, list(settings)) == settings | {"POSTGRES_PORT": "5432"}
        try_all(stack, Asker(ports["MQTT_PORT_PUBLISHED"], f"plain-{number}"), str(number))
        for role in ("the-owner", "reader"):
            assert rows(settings, user=role)[f"plain-{number}-{number}"] == UTC_TIME
    assert "u'someone')" in stack.log("mosquitto")
    assert git_sees_its_files(stack)


def test_every_option_serves_in_the_overlay_and_the_access_rights_follow(
    shown: SecureStack,
) -> None:
    stack = shown
    stack.down("--volumes")
    settings = write_options(stack.folder, **{name: str(free_port()) for name in PORTS})
    stack.settings |= settings
    stack.environment["COMPOSE_FILE"] = os.pathsep.join([*OVERLAY, "given.yml"])
    stack.setup("broker.lan", "database.lan")
    set_passwords(stack)
    stack.add_device("before")
    close(stack)
    stack.up()
    assert git_sees_its_files(stack)
    stack.add_device("while:up")
    port = settings["MQTT_TLS_PORT_PUBLISHED"]
    for device_id in ("before", "while:up"):
        login = ("-u", device_id.replace(":", "="), "-P", stack.passwords[device_id])
        device = Asker(port, device_id, "--cafile", str(stack.ca), *login)
        try_all(stack, device, "secure")
    expected = dict.fromkeys(("before-secure", "while:up-secure"), UTC_TIME)
    for role in ("the-owner", "ingester", "reader"):
        assert rows(settings, user=role, sslmode="verify-full", sslrootcert=str(stack.ca)) == (
            expected
        )
    frame = stack.compose("exec", "-T", "ingester", "python", "-m", "ingester.top", "--once")
    assert "view: connected" in frame


def set_passwords(stack: SecureStack) -> None:
    """Put the password into each file that holds one alone, and the broker's into its list."""
    for name in PASSWORD_FILES:
        (stack.secrets / name).write_text(f"{PASSWORD}\n")
    users = stack.secrets / "broker/passwords"
    others = [line for line in users.read_text().splitlines() if "homelab-ingester:" not in line]
    users.write_text("\n".join(others) + "\n")
    script = """
        here=$PWD/overlays/secure
        . overlays/secure/common.sh
        users "$secrets/broker" add homelab-ingester <"$secrets/mqtt_ingester_password"
    """
    stack.run("sh", "-ec", script)


def test_the_same_file_serves_without_docker(shown: SecureStack, tmp_path: Path) -> None:
    settings = read(shown.folder / ".env")
    assert settings["POSTGRES_PASSWORD"] == settings["MQTT_PASSWORD"] == PASSWORD
    nothing = {name: "" for name in settings if name.endswith("_FILE") or name == "MQTT_TLS"}
    stack = Stack(checkout=shown.folder, environment=settings | nothing)
    # The ingester reads all but that and its servers' addresses from the file itself.
    given = {"POSTGRES_HOST", "POSTGRES_PORT", "MQTT_HOST", "MQTT_PORT"} | nothing.keys()
    for name in settings.keys() - given:
        del stack.ingester.environment[name]
    with stack:
        device = Asker(str(stack.ports.mqtt), "bare")
        item = event(1, "bare", ts_device=LOCAL_TIME)
        assert device.ask(item)["status"] == "stored"
        port = str(stack.ports.postgres)
        for role in ("the-owner", "reader"):
            assert rows(settings, user=role, port=port) == {"bare-1": UTC_TIME}
        wait_until(lambda: " DEBUG batch" in stack.ingester.log(), "the log")
        assert "as another-ingester (" in stack.mosquitto.log()
        assert "u'someone')" in stack.mosquitto.log()
