"""Devices that publish at a steady rate, whatever happens to what they publish to.

What it does: keeps every event until it hears that it is stored, sends it again until then, and
notes how long no ACK came. What it does not: look into the database.

Invariant: `sent` has every event that was ever handed to MQTT, and `heard` those whose ACK said
`stored`. An ACK that says anything else is in `refused`.
"""

import json
import secrets
import threading
import time
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

TURN_SECONDS = 0.02
# An event that has had no ACK for so long is sent again, if there is a connection: sooner, it
# would multiply the load in a long outage.
AGAIN_SECONDS = 10.0
# Of one device in one turn.
AGAIN_MAX = 5
KEEPALIVE_SECONDS = 10


class Sender:
    """So many devices, and what they have sent and heard."""

    def __init__(self, port: int, devices: int = 50, per_second: int = 100) -> None:
        self.per_second = per_second
        self.sent: set[str] = set()
        self.heard: set[str] = set()
        self.refused: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self._devices = [_Device(self, port, f"device-{index}") for index in range(devices)]
        self._over = threading.Event()
        self._is_publishing = True
        self._thread = threading.Thread(target=self._run)
        self._last_ack_at = self._longest_seconds = 0.0

    def __enter__(self) -> "Sender":
        for device in self._devices:
            device.connect()
        self.begin_window()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for device in self._devices:
            device.disconnect()

    def begin_window(self) -> None:
        """Note from now on the longest times without an ACK."""
        now = time.monotonic()
        with self.lock:
            self._last_ack_at, self._longest_seconds = now, 0.0
            for device in self._devices:
                device.last_ack_at, device.longest_seconds = now, 0.0

    def gaps(self) -> tuple[float, float]:
        """Return the longest time without any ACK, and the longest of any one device."""
        with self.lock:
            return self._longest_seconds, max(device.longest_seconds for device in self._devices)

    def all_heard_since(self, moment: float) -> bool:
        """Tell whether each device has heard an ACK since that moment of the monotonic clock."""
        with self.lock:
            return all(device.last_ack_at > moment for device in self._devices)

    def pause(self) -> None:
        """Publish no new event; what was not answered is still sent again."""
        self._is_publishing = False

    def go_on(self) -> None:
        """Publish again."""
        self._is_publishing = True

    @property
    def unanswered(self) -> int:
        """How many events wait for their ACK."""
        with self.lock:
            return sum(len(device.waiting) for device in self._devices)

    def take(self, device: "_Device", ack: dict[str, Any]) -> None:
        """Note an ACK."""
        now = time.monotonic()
        event_id = ack["event_id"]
        with self.lock:
            if ack["status"] != "stored":
                self.refused.append(ack)
                return
            self.heard.add(event_id)
            if device.waiting.pop(event_id, None) is None:
                return  # sent again, and answered twice
            self._longest_seconds = max(self._longest_seconds, now - self._last_ack_at)
            device.longest_seconds = max(device.longest_seconds, now - device.last_ack_at)
            self._last_ack_at = device.last_ack_at = now

    def _run(self) -> None:
        due, last_at, turn = 0.0, time.monotonic(), 0
        while not self._over.wait(TURN_SECONDS):
            now = time.monotonic()
            due, last_at = due + (now - last_at) * self.per_second, now
            while due >= 1 and self._is_publishing:
                turn, due = turn + 1, due - 1
                self._devices[turn % len(self._devices)].publish_next(now)
            due = min(due, 1)
            for device in self._devices:
                device.publish_again(now)


class _Device:
    def __init__(self, sender: Sender, port: int, name: str) -> None:
        self.waiting: dict[str, list[Any]] = {}  # by event_id: when it was sent last, and what
        self.last_ack_at = self.longest_seconds = 0.0
        self._sender, self._port, self._name = sender, port, name
        # Ids never repeat: what another Sender has sent is no news to the database.
        self._boot, self._number = secrets.token_hex(4), 0
        self._looked_at = 0.0
        self._subscribed = threading.Event()
        # Always the same: NATS keeps what it has of another id for ever, if its node is killed.
        self._client = paho.Client(CallbackAPIVersion.VERSION2, f"{name}-sender")
        self._client.max_inflight_messages_set(0)
        self._client.reconnect_delay_set(1, 2)
        self._client.connect_timeout = 3.0
        self._client.on_connect = self._subscribe
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message

    def connect(self) -> None:
        self._client.connect("127.0.0.1", self._port, KEEPALIVE_SECONDS)
        self._client.loop_start()
        assert self._subscribed.wait(30), "the broker granted no subscription"

    def disconnect(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish_next(self, now: float) -> None:
        self._number += 1
        event_id = f"{self._name}-{self._boot}-{self._number}"
        payload = json.dumps(
            {
                "schema": 1,
                "event_id": event_id,
                "device_id": self._name,
                "event_type": "temperature",
                "value": self._number,
            }
        ).encode()
        with self._sender.lock:
            self._sender.sent.add(event_id)
            self.waiting[event_id] = [now, payload]
        # Without a connection paho keeps it, and sends it after the next one.
        self._publish(payload)

    def publish_again(self, now: float) -> None:
        if now - self._looked_at < 1 or not self._client.is_connected():
            return
        self._looked_at = now
        again: list[bytes] = []
        with self._sender.lock:
            for item in self.waiting.values():
                if now - item[0] > AGAIN_SECONDS and len(again) < AGAIN_MAX:
                    item[0] = now
                    again.append(item[1])
        for payload in again:
            self._publish(payload)

    def _publish(self, payload: bytes) -> None:
        self._client.publish(f"qs/v1/{self._name}/events", payload, qos=1)

    def _subscribe(self, client: paho.Client, *_: Any) -> None:
        # As the libraries for devices do: QoS 1.
        client.subscribe(f"qs/v1/{self._name}/acks", 1)

    def _on_subscribe(
        self, client: paho.Client, _user: Any, _mid: int, codes: list[Any], _: Any
    ) -> None:
        # NATS refuses it while it has no leader for what it has to keep of it.
        if codes[0].is_failure:
            self._subscribe(client)
        else:
            self._subscribed.set()

    def _on_message(self, _client: Any, _user: Any, message: paho.MQTTMessage) -> None:
        body = json.loads(message.payload)
        for ack in body if isinstance(body, list) else [body]:
            self._sender.take(self, ack)
