"""A device, as the tests need it: it publishes, and hears what comes back.

What it does: keeps everything that it hears, and waits for it. What it does not: know what
is in the database; what it counts, it counts at the sender.

Invariant: `acks` has each ACK in the order it came, arrays taken apart; `sent` has every
event that was ever handed to MQTT, whatever became of it.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode


def event(number: int | str, device_id: str = "device-1", **fields: Any) -> dict[str, Any]:
    """A valid event; `fields` replace or add."""
    return {
        "schema": 1,
        "event_id": f"{device_id}-{number}",
        "device_id": device_id,
        "event_type": "temperature",
        "value": 21.5,
    } | fields


class Device:
    """A connected MQTT client that hears all ACKs and dead letters."""

    def __init__(
        self,
        port: int,
        device_id: str = "device-1",
        *,
        host: str = "127.0.0.1",
        transport: Literal["tcp", "websockets"] = "tcp",
        root: str = "qs/v1",
        hears: str = "+",
    ) -> None:
        """`hears` is whose ACKs: each device's, or those of one id (for when there are many)."""
        self.device_id = device_id
        self.hears = hears
        self.root = root
        self.messages: list[tuple[str, bytes]] = []
        self.acks: list[dict[str, Any]] = []
        self.dead_letters: list[dict[str, Any]] = []
        self.sent: dict[str, dict[str, Any]] = {}
        self.heard_at: dict[str, float] = {}  # when each was first heard to be stored
        self._publishes: list[tuple[str, paho.MQTTMessageInfo]] = []
        self._address = (host, port)
        self._changed = threading.Condition()
        self._subscribed = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, transport=transport)
        self._client.max_inflight_messages_set(0)
        self._client.on_socket_open = self._on_socket_open
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 15
        while True:
            try:
                self._client.connect(*self._address)
                break
            except OSError:  # the broker is being restarted
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._client.loop_start()
        assert self._subscribed.wait(15), "the broker granted no subscription"
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(
        self, payload: object, *, topic: str | None = None, qos: int = 1, retain: bool = False
    ) -> None:
        """Publish bytes as they are, anything else as JSON; wait until the broker has it."""
        self.send(payload, topic=topic, qos=qos, retain=retain).wait_for_publish(15)

    def send(
        self, payload: object, *, topic: str | None = None, qos: int = 1, retain: bool = False
    ) -> paho.MQTTMessageInfo:
        """Publish and wait for nothing."""
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        topic = topic or f"{self.root}/{self.device_id}/events"
        info = self._client.publish(topic, body, qos=qos, retain=retain)
        if qos > 0 and info.rc == MQTTErrorCode.MQTT_ERR_NO_CONN:
            # paho keeps it and sends it after the next connect, and yet waits for no PUBACK.
            info.rc = MQTTErrorCode.MQTT_ERR_SUCCESS
        if isinstance(payload, dict) and "event_id" in payload:
            self.sent[payload["event_id"]] = payload
            if qos > 0:
                self._publishes.append((payload["event_id"], info))
        return info

    @property
    def taken(self) -> set[str]:
        """The ids of the QoS 1 events that the broker has PUBACKed."""
        return {event_id for event_id, info in self._publishes if info.is_published()}

    def all_taken(self) -> bool:
        """Whether the broker has PUBACKed every QoS 1 event, as often as it was sent."""
        return all(info.is_published() for _, info in reversed(self._publishes))

    def ask(self, payload: object, *, qos: int = 1, topic: str | None = None) -> dict[str, Any]:
        """Publish one event; return its ACK."""
        before = len(self.acks)
        self.publish(payload, qos=qos, topic=topic)
        self.wait(lambda: len(self.acks) > before, "an ACK")
        return self.acks[before]

    def deliver(self, events: Iterable[dict[str, Any]], timeout: float = 60) -> None:
        """Send events, again every 2 s, until each has its ACK: what a real device does."""
        waiting = {str(item["event_id"]): item for item in events}
        wanted = set(waiting)
        deadline = time.monotonic() + timeout
        while waiting:
            assert time.monotonic() < deadline, f"no ACK for {len(waiting)} events"
            for item in waiting.values():
                self.send(item)
            self._wait(lambda: self.heard_at.keys() >= wanted, 2)
            waiting = {k: item for k, item in waiting.items() if k not in self.heard_at}

    def wait(self, condition: Callable[[], bool], what: str, timeout: float = 15) -> None:
        """Wait until the condition holds; it is looked at after each message."""
        if not self._wait(condition, timeout):
            heard = f"heard {len(self.acks)} ACKs and {len(self.dead_letters)} dead letters"
            raise AssertionError(
                f"waited {timeout} s for {what}; {heard}, the last: {self.messages[-3:]}"
            )

    def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def _on_socket_open(self, _client: Any, _user: Any, sock: Any) -> None:
        if isinstance(sock, socket.socket):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        acks = f"{self.root}/{self.hears}/acks"
        client.subscribe([(acks, 1), (f"{self.root}/deadletter", 1)])

    def _on_message(self, _client: Any, _user: Any, message: paho.MQTTMessage) -> None:
        now = time.perf_counter()
        with self._changed:
            self.messages.append((message.topic, bytes(message.payload)))
            body = json.loads(message.payload)
            if message.topic.endswith("/deadletter"):
                self.dead_letters.append(body)
            else:
                for ack in body if isinstance(body, list) else [body]:
                    self.acks.append(ack)
                    if ack["status"] == "stored":
                        self.heard_at.setdefault(ack["event_id"], now)
            self._changed.notify_all()
