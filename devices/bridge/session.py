"""One MQTT session at the other side's broker: messages in, PUBACKs out.

What it does: connects, subscribes, reads what has arrived, and PUBACKs what it is told to. What it
does not: look into a message, or PUBACK by itself.

Invariant: a message is PUBACKed at most once, and only on the connection that brought it: packet
ids begin again after a broker's restart, so an old one would delete other messages unseen.
"""

import inspect
import logging
import random
import select
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from paho.mqtt import __version__
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from devices.bridge.config import BrokerSettings

CONNECT_SECONDS = 3.0
KEEPALIVE_SECONDS = 15
RETRY_SECONDS_MIN = 1.0
RETRY_SECONDS_MAX = 5.0  # what is published meanwhile may have nobody who takes it
# Read in one turn, so that the other sessions have theirs.
BATCH_MESSAGES_MAX = 2_000
BATCH_BYTES_MAX = 4_194_304

log = logging.getLogger(__name__)


class Arrived(NamedTuple):
    """A message off the wire, not PUBACKed yet."""

    topic: str
    payload: bytes
    mid: int
    qos: int
    is_redelivered: bool
    retained: bool
    connection: int


class UnknownPaho(Exception):
    """The paho that is installed is not one that this module knows; the text is one line."""


class _Client(paho.Client):
    """One connection of paho, which takes half of the bridge's CPU time if it reads by itself.

    It asks the kernel three times for each packet, makes an object with a lock for each message,
    and looks for the callback by its topic. Here all is read at once, messages are taken apart
    before paho sees them, and PUBACKs are written together.
    """

    READ_BYTES_MAX = 65_536
    # What paho's methods take beside self.
    PRIVATE_METHODS = {
        "_packet_read": [],  # one packet: what is before it is taken here
        "_sock_recv": ["bufsize"],  # what paho reads by: replaced
        "_packet_queue": ["command", "packet", "mid", "qos", "info"],
    }

    def __init__(self, client_id: str, is_kept: bool, connection: int) -> None:
        """Raises UnknownPaho."""
        for name, wanted in self.PRIVATE_METHODS.items():
            method = getattr(paho.Client, name, None)
            if method is None or list(inspect.signature(method).parameters)[1:] != wanted:
                raise UnknownPaho(
                    f"paho-mqtt {__version__} is installed, which has no"
                    f" {name}({', '.join(wanted)}): install that of devices/bridge/requirements.txt"
                )
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=not is_kept,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self._unread = b""
        self._is_within_packet = False  # paho has read a part of one
        self._connection = connection
        self.arrived: list[Arrived] = []
        self.arrived_bytes = 0
        self.on_message = self._note_message

    @property
    def has_unread(self) -> bool:
        """Whether something was read that paho has not taken."""
        return len(self._unread) > 0

    def puback(self, mids: Sequence[int]) -> None:
        """PUBACK all of them, by one call to the kernel."""
        packets = b"".join(b"\x40\x02" + mid.to_bytes(2, "big") for mid in mids)
        self._packet_queue(paho.PUBACK, packets, 0, 1)

    def _packet_read(self) -> MQTTErrorCode:
        if not self._is_within_packet and self._unread:
            self._unread = self._unread[self._take_messages(self._unread) :]
            if not self._unread:
                return MQTTErrorCode.MQTT_ERR_SUCCESS
        self._is_within_packet = True
        code = super()._packet_read()
        self._is_within_packet = code == MQTTErrorCode.MQTT_ERR_AGAIN
        return code

    def _sock_recv(self, bufsize: int) -> bytes:
        if not self._unread:
            self._unread = super()._sock_recv(self.READ_BYTES_MAX)
        part, self._unread = self._unread[:bufsize], self._unread[bufsize:]
        return part

    def _take_messages(self, data: bytes) -> int:
        """Take each message from the beginning on; return where there is something for paho.

        That is another packet, a message of QoS 2 or of 16 KB and more, or one that is cut off or
        malformed (MQTT 3.1.1, 2.2 and 3.3).
        """
        size, position = len(data), 0
        while position + 3 < size and data[position] & 0b1111_0100 == 0b0011_0000:
            first, length, body = data[position], data[position + 1], position + 2
            if length > 0x7F:
                length, body = length & 0x7F | data[body] << 7, body + 1
            end = body + length
            topic_end = body + 2 + int.from_bytes(data[body : body + 2], "big")
            qos = first >> 1 & 1
            payload_begin = topic_end + 2 * qos
            if length > 0x3FFF or not payload_begin <= end <= size:
                break
            mid = int.from_bytes(data[topic_end:payload_begin], "big")
            topic = data[body + 2 : topic_end]
            self._note(topic, data[payload_begin:end], mid, qos, first & 8 != 0, first & 1 != 0)
            position = end
        return position

    def _note(
        self, topic: bytes, payload: bytes, mid: int, qos: int, dup: bool, retain: bool
    ) -> None:
        try:
            name = topic.decode("utf-8")
        except UnicodeDecodeError:  # which MQTT forbids, and some brokers let through
            name = "\N{REPLACEMENT CHARACTER}"
        self.arrived_bytes += len(payload)
        self.arrived.append(Arrived(name, payload, mid, qos, dup, retain, self._connection))

    def _note_message(self, _client: paho.Client, _user: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic.encode("utf-8")
        except UnicodeDecodeError:
            topic = b"\xff"
        payload = bytes(message.payload)
        self._note(topic, payload, message.mid, message.qos, message.dup, message.retain)


class Session:
    """One session, over all of its connections."""

    def __init__(
        self,
        broker: BrokerSettings,
        client_id: str,
        filters: Sequence[str],
        is_kept: bool = True,
        former: Sequence[str] = (),
    ) -> None:
        """`former`: filters that the kept session may still have from another configuration."""
        self._broker = broker
        self._client_id = client_id
        self._filters = list(filters)
        self._former = [each for each in former if each not in filters]
        self._is_kept = is_kept  # the broker keeps the session while we are away
        self._client: _Client | None = None
        self._connect_at = 0.0
        self._retry_seconds = RETRY_SECONDS_MIN
        self._trouble = ""
        self.connection = 0
        self.is_up = False  # the broker has granted the subscriptions
        self.is_fresh = False  # the broker knew no session: nothing is delivered again

    @property
    def socket(self) -> Any:
        """The socket of the present connection; None if there is none."""
        return self._client.socket() if self._client else None

    @property
    def has_unread(self) -> bool:
        """Whether something was read from the socket that read() has not returned yet."""
        return self._client is not None and self._client.has_unread

    @property
    def wants_to_write(self) -> bool:
        """Whether something waits to be written."""
        return self._client is not None and self._client.want_write()

    def read(self) -> list[Arrived]:
        """Connect if need be, read what is there, and return it; it does not wait."""
        if self._client is None:
            if time.monotonic() >= self._connect_at:
                self._connect()
            return []
        client = self._client
        while self._is_readable():
            if not self._is_fine(client.loop_read()):
                return []
            if len(client.arrived) >= BATCH_MESSAGES_MAX or client.arrived_bytes >= BATCH_BYTES_MAX:
                break
        self.keep_alive()
        if self._client is None:
            return []
        arrived, client.arrived, client.arrived_bytes = client.arrived, [], 0
        return arrived

    def keep_alive(self) -> None:
        """Write what is to be written, a ping when it is due among it; read nothing."""
        if self._client is None:
            return
        if self._client.want_write() and not self._is_fine(self._client.loop_write()):
            return
        self._is_fine(self._client.loop_misc())

    def settle(self, arrived: Sequence[Arrived]) -> None:
        """PUBACK the messages of one read(), unless the connection that brought them is gone."""
        if self._client is None or not arrived or arrived[0].connection != self.connection:
            return
        # To PUBACK a message of QoS 0 makes the broker disconnect us.
        mids = [message.mid for message in arrived if message.qos == 1]
        if mids:
            self._client.puback(mids)
        for message in arrived:
            if message.qos == 2:  # of an earlier subscription under our name
                self._client.ack(message.mid, 2)

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 0, if there is a connection."""
        if self._client is not None and self.is_up:
            self._client.publish(topic, payload)

    def close(self) -> None:
        """Disconnect when the broker has taken what we wrote; the session stays."""
        if self._client is None:
            return
        until = time.monotonic() + 1.0
        self._client.disconnect()
        while self._client.want_write() and self._client.socket() and time.monotonic() < until:
            self._client.loop_write()
        self._client, self.is_up = None, False

    # --- the connection -------------------------------------------------------------------

    def _connect(self) -> None:
        # A random part of it, or all sessions come at once when the broker is back.
        self._connect_at = time.monotonic() + self._retry_seconds * random.uniform(0.5, 1)
        self._retry_seconds = min(self._retry_seconds * 2, RETRY_SECONDS_MAX)
        self.connection += 1
        client = _Client(self._client_id, self._is_kept, self.connection)
        client.connect_timeout = CONNECT_SECONDS
        client.on_socket_open = _without_delay
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        broker = self._broker
        try:
            if broker.tls:
                client.tls_set(broker.ca_file)
            if broker.username:
                client.username_pw_set(broker.username, broker.password)
            client.connect(broker.host, broker.port, KEEPALIVE_SECONDS)
        except (OSError, ValueError) as error:
            self._lost(str(error))
            return
        self._client = client

    def _is_fine(self, code: MQTTErrorCode) -> bool:
        if code == MQTTErrorCode.MQTT_ERR_SUCCESS:
            return True
        self._lost(self._trouble or paho.error_string(code))
        return False

    def _lost(self, trouble: str) -> None:
        broker = self._broker
        if self.is_up or trouble != self._trouble:
            log.warning("MQTT in: %s:%s: %s; trying again", broker.host, broker.port, trouble)
        self._trouble = trouble
        # What has arrived goes with it: it is not PUBACKed, so the broker delivers it again.
        self._client, self.is_up = None, False

    def _is_readable(self) -> bool:
        sock = self.socket
        if sock is None:
            return False
        if self._client is not None and self._client.has_unread:
            return True
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return True
        return bool(select.select([sock], [], [], 0)[0])

    # --- paho's callbacks, which only note ----------------------------------------------------

    def _on_connect(
        self, client: paho.Client, _user: Any, flags: Any, code: Any, _props: Any
    ) -> None:
        if code.is_failure:
            self._trouble = f"the broker refuses us: {code}"
            return
        self.is_fresh = not flags.session_present
        if self._former:
            # With them the broker would deliver some messages twice.
            client.unsubscribe(self._former)
        if not self._filters:
            self.is_up = True
            return
        client.subscribe([(each, 1 if self._is_kept else 0) for each in self._filters])

    def _on_subscribe(
        self, client: paho.Client, _user: Any, _mid: int, codes: list[Any], _props: Any
    ) -> None:
        refused = [f for f, code in zip(self._filters, codes, strict=False) if code.is_failure]
        if refused:
            log.error("MQTT in: the broker does not let us read %s", ", ".join(refused))
        self.is_up = True
        self._trouble = ""
        self._retry_seconds = RETRY_SECONDS_MIN
        log.info("MQTT in: %s:%s: subscribed", self._broker.host, self._broker.port)


def _without_delay(_client: Any, _user: Any, sock: Any) -> None:
    # Else a PUBACK behind another packet waits up to 40 ms for the broker's TCP ACK.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
