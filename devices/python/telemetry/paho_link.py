"""The way to the broker over paho-mqtt, for programs with a loop of their own.

What it does: connects, subscribes to the ACKs, sends what the outbox gives, reads what comes,
and begins again when the connection is gone. What it does not: run a thread; or wait longer
than it is told to, apart from the name lookup and at most CONNECT_SECONDS for the broker.

Invariant: events are sent only on a connection on which the ACKs are subscribed.
"""

import logging
import random
import socket
import time
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from .outbox import Outbox

CONNECT_SECONDS = 5.0
KEEPALIVE_SECONDS = 15
RETRY_SECONDS = 1.0  # doubled after each attempt, up to ..._MAX
RETRY_SECONDS_MAX = 60.0
READS_MAX = 50  # packets in one turn; the program wants its turn too

log = logging.getLogger(__name__)


class PahoLink:
    """One outbox's connection.

    `tls`: with the certificates that the system trusts; `ca_file`: TLS with these alone.
    `client_id`: the outbox's by default.
    """

    def __init__(
        self,
        outbox: Outbox,
        host: str,
        port: int = 1883,
        username: str | None = None,
        password: str | None = None,
        ca_file: str | None = None,
        tls: bool = False,
        client_id: str | None = None,
    ) -> None:
        self._outbox = outbox
        self._host, self._port = host, port
        self._username, self._password = username, password
        self._ca_file, self._tls = ca_file, tls
        self._client_id = client_id or outbox.client_id
        self._client: paho.Client | None = None  # None between two attempts to connect
        self._is_up = False  # the broker has taken us, and the ACKs are subscribed
        self._heard: list[tuple[str, bytes]] = []
        self._connect_at = 0.0
        self._retry_seconds = RETRY_SECONDS
        self.trouble = ""  # why it is not connected
        self._told = ""

    def is_connected(self) -> bool:
        return self._is_up

    def socket(self) -> Any:
        """Return what a program of several sockets can select() on, None without a connection."""
        return self._client.socket() if self._client is not None else None

    def loop(self, seconds: float = 0.0) -> None:
        """Connect, send and hear for so long, in place of sleep(); 0: do what is due and return.

        Raises what Outbox.due() and Outbox.on_message() raise, and nothing of the network.
        """
        end = time.monotonic() + seconds
        while True:
            left = end - time.monotonic()
            self._turn(max(0.0, min(left, 0.5)))
            if left <= 0:
                return

    def close(self) -> None:
        """Say good-bye to the broker. What is in the outbox stays there."""
        self._told = "closed"  # which is no trouble
        self._lost("closed")

    # --- one turn -----------------------------------------------------------------------

    def _turn(self, seconds_max: float) -> None:
        if self._client is None and time.monotonic() >= self._connect_at:
            self._connect()
        if self._client is None:
            time.sleep(seconds_max)
            return
        self._send()
        for _ in range(READS_MAX):
            if self._client is None:
                return
            code = self._client.loop(seconds_max)
            if code != MQTTErrorCode.MQTT_ERR_SUCCESS:
                self._lost(self.trouble or paho.error_string(code))
                return
            if not self._heard:
                break
            seconds_max = 0.0
            self._hear()
        self._send()

    def _send(self) -> None:
        for topic, payload in self._outbox.due():
            # QoS 1, so that the broker keeps it while the ingester restarts. Its PUBACK is
            # not looked at: the ACK alone counts.
            assert self._client is not None
            info = self._client.publish(topic, payload, qos=1)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                self._lost(paho.error_string(info.rc))
                return
        if self._outbox.reconnect_wanted():
            self._lost("no answer")

    def _hear(self) -> None:
        while self._heard:
            if self._outbox.on_message(*self._heard.pop(0)):
                self._retry_seconds = RETRY_SECONDS

    # --- the connection -----------------------------------------------------------------

    def _connect(self) -> None:
        """Begin to connect; if it fails, there is a pause before the next attempt."""
        # A random part of it, or all devices come at once when the broker is back.
        self._connect_at = time.monotonic() + self._retry_seconds * random.uniform(0.5, 1.5)
        self._retry_seconds = min(2 * self._retry_seconds, RETRY_SECONDS_MAX)
        # A new client and a clean session: what has to be sent again is in the outbox alone.
        client = paho.Client(CallbackAPIVersion.VERSION2, self._client_id, clean_session=True)
        client.connect_timeout = CONNECT_SECONDS
        client.max_inflight_messages_set(0)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_socket_open = self._on_socket_open
        if self._username:
            client.username_pw_set(self._username, self._password)
        self.trouble = ""
        try:
            if self._tls or self._ca_file:
                client.tls_set(self._ca_file)
            client.connect(self._host, self._port, KEEPALIVE_SECONDS)
        except (OSError, ValueError) as error:  # ValueError: a name that is none
            self._lost(str(error))
            return
        self._client = client

    def _on_socket_open(self, _client: paho.Client, _user: Any, sock: Any) -> None:
        # Else an event right behind a PUBACK waits 40 ms for the other side's TCP ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, client: paho.Client, _u: Any, _f: Any, code: ReasonCode, _: Any) -> None:
        if code.is_failure:
            self.trouble = str(code)
            return
        client.subscribe([(topic, 1) for topic in self._outbox.subscriptions()])

    def _on_subscribe(
        self, client: paho.Client, _u: Any, _mid: int, codes: list[ReasonCode], _: Any
    ) -> None:
        # One of several may be refused: that of an earlier device id, say.
        if all(code.is_failure for code in codes):
            self.trouble = "the broker refuses to let the ACKs be read"
            client.disconnect()
            return
        self.trouble = self._told = ""
        self._is_up = True
        self._outbox.connected()

    def _on_message(self, _client: paho.Client, _user: Any, message: paho.MQTTMessage) -> None:
        # What raises in a callback of paho would come again and again.
        self._heard.append((message.topic, bytes(message.payload)))

    def _lost(self, trouble: str) -> None:
        if trouble != self._told:  # once, however often it is tried
            log.warning("%s:%s: %s", self._host, self._port, trouble)
        self.trouble = self._told = trouble
        client, self._client, self._is_up = self._client, None, False
        if client is not None:
            client.disconnect()
        self._outbox.disconnected()
