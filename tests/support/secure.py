"""The stack with overlays/secure, and a client that comes in over TLS.

What it does: sets up a copy of the checkout by the overlay's own commands, and lets a test
be a device, honest or not. What it does not: know what ought to be refused.

Invariant: a Client says what the broker said, refusals included, and hides none.
"""

import json
import os
import queue
import re
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal, Self

import psycopg2
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from psycopg2.extensions import make_dsn

from tests.support.compose import Compose

OVERLAY = ("docker-compose.yml", "overlays/secure/docker-compose.yml")
SECRETS = "overlays/secure/secrets"
# Each file that holds a password alone.
PASSWORD_FILES = (
    "postgres_password",
    "database_ingester_password",
    "database_reader_password",
    "mqtt_ingester_password",
)


class SecureStack(Compose):
    """One copy of the checkout with the overlay."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, *OVERLAY)
        self.passwords: dict[str, str] = {}  # of the devices, by id

    @property
    def secrets(self) -> Path:
        return self.folder / SECRETS

    @property
    def ca(self) -> Path:
        return self.secrets / "ca.crt"

    def setup(self, *arguments: str, expected: int = 0) -> str:
        """Run overlays/secure/setup; return what it said."""
        done = self.run("overlays/secure/setup", *arguments, expected=expected)
        return (done.stdout + done.stderr).strip()

    def device(self, *arguments: str, expected: int = 0) -> str:
        """Run overlays/secure/device; return what it said."""
        done = self.run("overlays/secure/device", *arguments, expected=expected)
        return (done.stdout + done.stderr).strip()

    def add_device(self, device_id: str) -> str:
        """Let a device in; return its password."""
        said = self.device("add", device_id)
        password = re.search(r"^password +(\w{48})$", said, re.MULTILINE)
        assert password, said
        self.passwords[device_id] = password[1]
        return password[1]

    def secret(self, name: str) -> str:
        """What stands in a file of secrets/."""
        return (self.secrets / name).read_text().strip()

    def broker_memory(self) -> int:
        """How many bytes the broker may take."""
        text = (self.folder / "overlays/secure/mosquitto.conf").read_text()
        limit = re.search(r"^memory_limit (\d+)$", text, re.MULTILINE)
        assert limit, text
        return int(limit[1])

    def client(self, device_id: str, **options: Any) -> "Client":
        """A device that was added, or the operator, not connected yet."""
        options.setdefault("password", self.passwords.get(device_id))
        return Client(self.ca, device_id, **options)

    def connect_database(self, role: str, password: str, **options: str) -> Any:
        """Connect to the database as a client on this machine does."""
        options = {
            "host": "localhost",
            "port": str(self.settings["POSTGRES_PORT"]),
            "dbname": str(self.settings["POSTGRES_DB"]),
            "user": role,
            "password": password,
            "sslmode": "verify-full",
            "sslrootcert": str(self.ca),
        } | options
        connection: Any = psycopg2.connect(make_dsn(**options))
        connection.autocommit = True
        return connection

    def query_as(self, role: str, sql: str, **options: str) -> list[tuple[Any, ...]]:
        """Run one statement as a role; return its rows. `options` are those of the connection."""
        password = self.secret(f"database_{role}_password")
        with (
            closing(self.connect_database(role, password, **options)) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []


class Client:
    """An MQTT client over TLS; of MQTT 5, because there the broker says what it refuses.

    `user` None is anonymous. Use as a context manager: connects, and fails if that is refused.
    """

    def __init__(
        self,
        ca: Path | None,
        user: str | None,
        *,
        password: str | None = None,
        port: int = 8883,
        host: str = "localhost",
        client_id: str = "",
        transport: Literal["tcp", "websockets"] = "tcp",
        will: tuple[str, object] | None = None,
        session_seconds: int = 0,
        protocol: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv5,
    ) -> None:
        """`ca` None is plain text; `will` is a topic and an event. MQTT 3.1.1 keeps its session."""
        self.user = user
        self.session_present: bool | None = None  # as the broker said when we connected
        self.messages: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.ended = threading.Event()  # by the broker, or by us
        self._address = (host, port)
        self._connecting: dict[str, Any] = {}
        older: dict[str, Any] = {}
        if protocol == MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = session_seconds
            self._connecting = {"clean_start": False, "properties": properties}
        else:
            client_id, older = client_id or str(user), {"clean_session": False}
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=protocol,
            transport=transport,
            reconnect_on_failure=False,
            **older,
        )
        self._client.max_inflight_messages_set(0)
        if ca:
            self._client.tls_set(str(ca), tls_version=ssl.PROTOCOL_TLS_CLIENT)
        if user is not None:
            self._client.username_pw_set(user.replace(":", "="), password)
        if will:
            self._client.will_set(will[0], json.dumps(will[1]), qos=1)
        answers = self.answers
        self._client.on_connect = lambda *a: answers.put(("CONNACK", (a[2], str(a[3]))))
        self._client.on_subscribe = lambda *a: answers.put(("SUBACK", str(a[3][0])))
        self._client.on_publish = lambda *a: answers.put(("PUBACK", (a[2], str(a[3]))))
        self._client.on_message = lambda _c, _u, m: self.messages.put((m.topic, bytes(m.payload)))
        self._client.on_disconnect = lambda *_: self.ended.set()

    def connect(self) -> str:
        """Connect; return the broker's answer. TLS that fails raises ssl.SSLError."""
        self._client.connect(*self._address, **self._connecting)
        self._client.loop_start()
        flags, reason = self._answer("CONNACK")
        self.session_present = flags.session_present
        return str(reason)

    def subscribe(self, topic: str) -> str:
        """Subscribe; return the broker's answer."""
        self._client.subscribe(topic, qos=1)
        return str(self._answer("SUBACK"))

    def subscribe_many(self, topics: list[str]) -> None:
        """Subscribe to each, in a packet of its own; wait for all answers, or to be thrown out."""
        answered = self.answers
        for topic in topics:
            self._client.subscribe(topic)
        open_requests = len(topics)
        while open_requests and not self.ended.is_set():
            try:
                kind, _ = answered.get(timeout=0.1)
            except queue.Empty:
                continue
            open_requests -= kind == "SUBACK"

    def publish(self, topic: str, payload: object, *, retain: bool = False) -> str:
        """Publish at QoS 1; return the broker's answer."""
        mid = self.send(topic, payload, retain=retain)
        while True:
            answered, reason = self._answer("PUBACK")
            if answered == mid:
                return str(reason)

    def send(self, topic: str, payload: object, *, qos: int = 1, retain: bool = False) -> int:
        """Publish and wait for nothing."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        return self._client.publish(topic, body, qos=qos, retain=retain).mid

    def ask(self, payload: Any, *, seconds: float = 15) -> dict[str, Any]:
        """Publish an event of this device's own; return the ACK for it."""
        self.send(f"qs/v1/{self.user}/events", payload)
        while True:
            topic, body = self.messages.get(timeout=seconds)
            answer: dict[str, Any] = json.loads(body)
            if topic == f"qs/v1/{self.user}/acks" and answer["event_id"] == payload["event_id"]:
                return answer

    def cut(self) -> None:
        """Break the connection without a word, as a power cut does."""
        sock: Any = self._client.socket()
        with suppress(OSError):  # once TLS is off, paho's thread may close it first
            sock.shutdown(socket.SHUT_RDWR)
        assert self.ended.wait(15)

    def heard(self) -> list[tuple[str, bytes]]:
        """All messages that have come and were not looked at."""
        messages = []
        while not self.messages.empty():
            messages.append(self.messages.get())
        return messages

    def _answer(self, kind: str) -> Any:
        while True:
            answered, what = self.answers.get(timeout=15)
            if answered == kind:
                return what

    def __enter__(self) -> Self:
        assert self.connect() == "Success"
        assert self.subscribe(f"qs/v1/{self.user}/acks") == "Granted QoS 1"
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Processes(threading.Thread):
    """Notes the command line of every process on this machine, while it runs.

    A process that lives for less than a turn may be missed: a test looks for one that it
    knows of.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.command_lines: set[str] = set()
        self._stop_asked = threading.Event()

    def run(self) -> None:
        while not self._stop_asked.is_set():
            for name in os.listdir("/proc"):
                if name.isdigit():
                    self._note(name)

    def _note(self, name: str) -> None:
        try:
            line = Path("/proc", name, "cmdline").read_bytes()
        except OSError:  # it has ended
            return
        self.command_lines.add(line.replace(b"\0", b" ").decode("utf-8", "replace"))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_asked.set()
        self.join()


def environment_of(stack: Compose, service: str) -> Mapping[str, str]:
    """The environment that the engine keeps for a service's container."""
    pairs = stack.inspect(service)["Config"]["Env"]
    return dict(pair.split("=", 1) for pair in pairs)


def missing_rights() -> str | None:
    """Why a test cannot look at the secrets of all containers' users; None if it can."""
    return None if os.geteuid() == 0 else "the secrets belong to other users: run as root"
