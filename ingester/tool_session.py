"""A tool's own session at the broker, beside the ingester's, gone when the tool ends.

What it does: connects with the ingester's settings, subscribes, publishes, hears. What it
does not: connect again, or keep anything at the broker for later.

Invariant: it takes nothing from the ingester's session. Where the broker knows clients
by their user names, a clean session would delete that one with the events queued in it.
"""

import secrets
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from ingester.availability import UNANSWERED, right_to_read
from ingester.client import CONNECT_SECONDS_MAX
from ingester.settings import Settings
from ingester.tls import explain

# A broker at work on a backlog answers a publish late.
ANSWER_SECONDS_MAX = 10.0
# The time that a tool may spend on other things: one and a half times as much.
KEEPALIVE_SECONDS = 60
# What one receive() returns at most, so that a flood does not keep it from returning.
RECEIVED_MAX = 5_000
NAMED_BY_USER = (
    "{where} knows clients by their user names, so that a tool takes over the ingester's"
    " session: take use_username_as_clientid out of this listener, and restart the broker"
)


class BrokerUnavailable(Exception):
    """The broker cannot be used; the text is one line that says why."""


class Received(NamedTuple):
    """A message that was heard; `received_at` is of the monotonic clock."""

    topic: str
    payload: bytes
    retain: bool
    received_at: float


class ToolSession:
    """One session, for as long as a `with` lasts. Methods raise BrokerUnavailable."""

    def __init__(self, settings: Settings, subscriptions: Sequence[str] = ()) -> None:
        self._settings = settings
        self._subscriptions = subscriptions
        self._where = f"{settings.mqtt_host}:{settings.mqtt_port}"
        # Nobody else's, and of the form that every broker takes (MQTT 3.1.1, section 3.1.3.1).
        self._client_id = "tool" + secrets.token_hex(8)
        self._client = self._new_client(clean_session=True)
        self._error = ""  # why there is no connection
        self._session_present = False
        self._granted: list[ReasonCode] | None = None
        self._received: list[Received] = []

    def __enter__(self) -> Self:
        try:
            # Under its own id no session can be there. One that is there is another client's,
            # and only a session that is not clean leaves it as it is.
            self._connect(clean_session=False)
            if self._session_present:
                raise BrokerUnavailable(f"MQTT: {NAMED_BY_USER.format(where=self._where)}")
            self._disconnect()
            self._connect(clean_session=True)
            self._subscribe()
        except BrokerUnavailable:
            self._disconnect()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._disconnect()

    @property
    def connected(self) -> bool:
        """Whether the connection stands, as far as is known."""
        return self._client.is_connected()

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 1; return when the broker has PUBACKed."""
        info = self._client.publish(topic, payload, qos=1)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise BrokerUnavailable(f"MQTT: {self._where}: {paho.error_string(info.rc)}")
        self._wait(info.is_published, "PUBACK")

    def receive(self, seconds_max: float) -> list[Received]:
        """Return what has arrived, in its order; wait at most so long for the first.

        Raises only when there is nothing left to return.
        """
        until = time.monotonic() + seconds_max
        while not self._received and (left_seconds := until - time.monotonic()) > 0:
            self._loop(left_seconds)
        while len(self._received) < RECEIVED_MAX and self._has_input():
            self._client.loop(0)
        received, self._received = self._received, []
        if not received and not self.connected:
            raise BrokerUnavailable(f"MQTT: {self._error}")
        return received

    def _new_client(self, *, clean_session: bool) -> paho.Client:
        settings = self._settings
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=clean_session,
            # What a session that is not ours may hold must stay there.
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_SECONDS_MAX
        if settings.mqtt_tls is not None:
            client.tls_set_context(settings.mqtt_tls)
        if settings.mqtt_username is not None:
            client.username_pw_set(settings.mqtt_username, settings.mqtt_password)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        return client

    def _connect(self, *, clean_session: bool) -> None:
        self._client = self._new_client(clean_session=clean_session)
        self._error = UNANSWERED.format(where=self._where)  # until there is a CONNACK
        host, port = self._settings.mqtt_host, self._settings.mqtt_port
        try:
            self._client.connect(host, port, KEEPALIVE_SECONDS)
        except OSError as error:
            raise BrokerUnavailable(f"MQTT: {explain(error, host, port)}") from None
        self._wait(self._client.is_connected, "CONNACK")

    def _subscribe(self) -> None:
        if not self._subscriptions:
            return
        # QoS 0: the broker holds nothing for a tool that does not keep up.
        self._client.subscribe([(topic, 0) for topic in self._subscriptions])
        self._wait(lambda: self._granted is not None, "SUBACK")
        for topic, granted in zip(self._subscriptions, self._granted or (), strict=True):
            if granted.is_failure:
                raise BrokerUnavailable(
                    f"MQTT: {self._where} refuses the subscription to {topic}:"
                    f" {right_to_read(self._settings, topic)}"
                )

    def _wait(self, condition: Callable[[], bool], answer: str) -> None:
        until = time.monotonic() + ANSWER_SECONDS_MAX
        while not condition():
            if time.monotonic() > until:
                raise BrokerUnavailable(f"MQTT: {self._where}: no {answer} in time")
            self._loop(0.1)

    def _loop(self, seconds_max: float) -> None:
        if self._client.socket() is None:
            raise BrokerUnavailable(f"MQTT: {self._error}")
        self._client.loop(seconds_max)

    def _has_input(self) -> bool:
        sock = self._client.socket()
        if sock is None:
            return False
        # What TLS has decrypted already, select() does not see.
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return True
        return bool(select.select([sock], [], [], 0)[0])

    def _disconnect(self) -> None:
        self._client.disconnect()
        until = time.monotonic() + CONNECT_SECONDS_MAX
        while self._client.socket() is not None and time.monotonic() < until:
            self._client.loop(0.1)

    def _on_socket_open(self, _client: Any, _user: Any, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(
        self, _client: Any, _user: Any, flags: Any, reason_code: ReasonCode, _props: Any
    ) -> None:
        if reason_code.is_failure:
            self._error = f"{self._where} refuses the connection: {reason_code}"
            return
        self._error = f"{self._where}: connection lost"
        self._session_present = flags.session_present

    def _on_subscribe(
        self, _client: Any, _user: Any, _mid: int, reason_codes: list[ReasonCode], _props: Any
    ) -> None:
        self._granted = reason_codes

    def _on_message(self, _client: Any, _user: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            return  # not one of ours, which are all of UTF-8
        self._received.append(
            Received(topic, bytes(message.payload), message.retain, time.monotonic())
        )
