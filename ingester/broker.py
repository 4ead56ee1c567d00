"""The one MQTT session, and everything that knows paho.

What it does: keeps the session connected, hands out the messages that have arrived, and
publishes replies before it settles the messages: by a PUBACK, or a PUBREC where an earlier
subscription had QoS 2. What it does not: look into a message.

Invariant: a message is settled at most once, after its replies were handed to the socket,
and on the very connection that brought it. Packet ids begin again at 1 after a broker's
restart: PUBACKing an id kept from an earlier connection deletes other messages unseen.
"""

import inspect
import logging
import os
import select
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from paho.mqtt import __version__
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from ingester import mqtt
from ingester.mqtt import MalformedPacket, OtherPacket, PacketReader, Puback, Publish
from ingester.outage import REMINDER_SECONDS, Outage
from ingester.reply import Reply
from ingester.settings import Settings
from ingester.tls import explain

log = logging.getLogger(__name__)

# The broker cuts the session after one and a half times this without a packet. We give up a
# silent broker after twice this: within the 30 s that the healthcheck allows.
KEEPALIVE_SECONDS = 15
CONNECT_SECONDS_MAX = 3.0
# A connection that lasts less than this, several times in a row, while the broker is there
# each time: somebody else takes the session over.
SHORT_LIVED_SECONDS = 10.0
SHORT_LIVED_MAX = 3
UNANSWERED = (
    "{where} ends the connection without an answer: it may want TLS (MQTT_TLS), or a client"
    " certificate (MQTT_CERT_FILE), or not take ours"
)
SILENT = (
    "{where} takes the connection, and has sent no CONNACK in {seconds:.0f} s: it hangs or is"
    " overloaded, or MQTT_PORT is not that of an MQTT listener"
)
SESSION_LOST = (
    "the broker had lost this session: the events that it had queued are gone. Devices send"
    " again what they have heard no ACK for"
)
DROPPED_TOPIC = "$SYS/broker/publish/messages/dropped"
# More digits than any count has: int() refuses thousands of them.
DROPPED_DIGITS_MAX = 20
# What is still to be written at the end may take this long.
CLOSE_SECONDS_MAX = 1.0
# Bytes of payloads that one batch holds, but always at least one message.
BATCH_BYTES_MAX = 1_048_576
# What is held unsettled at most. The broker's window (mosquitto.conf) is smaller, but 2.0.11
# lets each PUBACK open a whole one: it then sends all that it has queued. 25 MB with small
# events; with a fifth of it, a long backlog is sent and read five times over.
UNSETTLED_MESSAGES_MAX = 50_000
UNSETTLED_BYTES_MAX = 16_777_216
# Replies that the broker has not PUBACKed: there are 65,535 packet ids.
REPLIES_OUTSTANDING_MAX = 5_000
# Bytes taken from the socket at once.
READ_AHEAD_BYTES = 65_536


class Message(NamedTuple):
    """A topic and bytes off the wire; not trusted."""

    topic: str
    payload: bytes
    received_at: datetime
    mid: int
    qos: int
    connection: int  # the number of the connection that brought it
    retain: bool = False  # the broker had kept it, and hands it out again at each subscribe
    arrived_at: float = 0.0  # the same moment as received_at, by the monotonic clock


class UnknownPaho(Exception):
    """The paho that is installed is not one that this module knows; the text is one line."""


class Client(paho.Client):
    """paho, and all that is needed of its private parts.

    paho connects, subscribes, pings and disconnects. It asks the kernel three times for each
    packet that it reads and once for each that it writes, and makes a lock for each message:
    so the bytes are read and written here, and the Broker hands it the packets that are its
    own. An event costs less than half of the CPU time that way.
    """

    # What paho's methods take beside self, and attributes of its clients.
    PRIVATE_METHODS = {
        "_sock_recv": ["bufsize"],  # what paho reads by: replaced
        "_packet_queue": ["command", "packet", "mid", "qos", "info"],
        "_mid_generate": [],
        "_loop_rc_handle": ["rc"],
    }
    PRIVATE_ATTRIBUTES = ("_last_bytes_received", "_ping_t")

    def __init__(self, settings: Settings, last_will: bytes) -> None:
        """Raises UnknownPaho."""
        # MQTT 3.1.1: its session has no expiry to set, and its packets have no properties to parse.
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=settings.mqtt_client_id,
            clean_session=False,
            reconnect_on_failure=False,
        )
        self._check_private_parts()
        self._packet = b""  # what paho has not read yet of the packet that is its own
        self.connect_timeout = CONNECT_SECONDS_MAX
        if settings.mqtt_tls is not None:
            self.tls_set_context(settings.mqtt_tls)
            # paho allows it twice: for the TCP connection, and for the handshake.
            self.connect_timeout = CONNECT_SECONDS_MAX / 2
        if settings.mqtt_username is not None:
            self.username_pw_set(settings.mqtt_username, settings.mqtt_password)
        self.will_set(settings.topics.status, last_will, qos=1, retain=True)
        self.on_socket_open = _without_delay

    def wait(self, seconds_max: float) -> tuple[bool, bool]:
        """Wait until there is something to read, or what is to be written can be; tell which."""
        # paho's own loop() does it by way of a pair of sockets, so that another thread can
        # wake it: three system calls for each batch, one of them before its ACKs are written.
        sock: Any = self.socket()
        # What TLS has decrypted already, select() does not see.
        is_decrypted = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
        writing = [sock] if self.want_write() else []
        seconds_max = 0 if is_decrypted else seconds_max
        readable, writable, _ = select.select([sock], writing, [], seconds_max)
        return is_decrypted or bool(readable), bool(writable)

    def read(self) -> bytes:
        """Return what there is to read, up to READ_AHEAD_BYTES; b"" if there is nothing.

        There is nothing either when the connection has just been found lost.
        """
        sock: Any = self.socket()
        try:
            data: bytes = sock.recv(READ_AHEAD_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return b""
        except OSError:
            data = b""
        if not data:
            self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        return data

    def handle(self, packet: bytes) -> None:
        """Let paho handle a packet; it may close the connection."""
        self._packet = packet
        self.loop_read()
        if self.want_write():  # what a callback sends, as SUBSCRIBE, is only queued by paho
            self.loop_write()

    def send(self, packets: bytes) -> None:
        """Write packets by one call to the kernel; what it does not take is written later."""
        # Once written, paho does something about some packets; not about a PUBACK.
        self._packet_queue(paho.PUBACK, packets, 0, 1)

    def new_packet_id(self) -> int:
        """Return a packet id that paho does not use either."""
        return self._mid_generate()

    def note_broker_alive(self) -> None:
        """Take it that the broker is alive: paho counts its silence from now on."""
        self._last_bytes_received = time.monotonic()
        self._ping_t = 0.0

    def end(self) -> None:
        """Close the connection at once, without a DISCONNECT."""
        self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_PROTOCOL)

    def _sock_recv(self, bufsize: int) -> bytes:
        """Give paho its packet, and no more."""
        if not self._packet:
            raise BlockingIOError
        part, self._packet = self._packet[:bufsize], self._packet[bufsize:]
        return part

    def _check_private_parts(self) -> None:
        missing = [name for name in self.PRIVATE_ATTRIBUTES if not hasattr(self, name)]
        for name, wanted in self.PRIVATE_METHODS.items():
            method = getattr(paho.Client, name, None)
            if method is None or list(inspect.signature(method).parameters)[1:] != wanted:
                missing.append(f"{name}({', '.join(wanted)})")
        if missing:
            raise UnknownPaho(
                f"paho-mqtt {__version__} is installed, which has no {', '.join(missing)}:"
                " install the version in ingester/requirements.txt"
            )


def _without_delay(_client: Any, _user: Any, sock: Any) -> None:
    # Else a PUBACK right behind an ACK waits up to 40 ms for the broker's TCP ACK.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class InFlight:
    """The messages that have arrived over one connection and are not settled."""

    def __init__(self, connection: int) -> None:
        self._connection = connection
        self.messages: list[Message] = []  # in their order
        self.overflowed = False  # something arrived that was not kept
        self._bytes = 0
        self._by_mid: dict[int, Message] = {}

    def add(self, publish: Publish, received_at: datetime, arrived_at: float) -> None:
        """Keep a message, unless it is there already, or there is no room for it.

        A broker may send what waits for its PUBACK again over the same connection (NATS).
        """
        topic, payload, mid, qos, retain = publish
        known = self._by_mid.get(mid) if qos else None
        # Not by the packet id alone: Mosquitto 2.0 counts on when all of them are in use.
        if known is not None and known.payload == payload and known.topic == topic:
            return
        if len(self.messages) >= UNSETTLED_MESSAGES_MAX or self._bytes >= UNSETTLED_BYTES_MAX:
            self.overflowed = True
            return
        topic = sys.intern(topic)  # each device's once, not once a message
        message = Message(
            topic, payload, received_at, mid, qos, self._connection, retain, arrived_at
        )
        if qos:
            self._by_mid[mid] = message
        self._bytes += len(payload)
        self.messages.append(message)

    def batch(self, messages_max: int) -> list[Message]:
        """Return the oldest messages, up to a batch."""
        batch: list[Message] = []
        bytes_total = 0
        for message in self.messages[:messages_max]:
            bytes_total += len(message.payload)
            if batch and bytes_total > BATCH_BYTES_MAX:
                break
            batch.append(message)
        return batch

    def settled(self, batch: Sequence[Message]) -> None:
        """Forget a batch, which is made of the oldest messages."""
        del self.messages[: len(batch)]
        for message in batch:
            self._bytes -= len(message.payload)
            self._by_mid.pop(message.mid, None)


class DroppedCount:
    """How many messages the broker has dropped since it started, for whatever client."""

    def __init__(self) -> None:
        self.messages: int | None = None  # None until the broker says so
        self._said_at = float("-inf")

    def update(self, payload: bytes) -> None:
        """Note what the broker says; warn of more, at most once a minute."""
        if not payload.isdigit() or len(payload) > DROPPED_DIGITS_MAX:
            return
        before, self.messages = self.messages or 0, int(payload)
        now = time.monotonic()
        if self.messages > before and now - self._said_at >= REMINDER_SECONDS:
            self._said_at = now
            log.warning(
                "MQTT: the broker has dropped %d messages since it started: a queue is full, of"
                " this or another client (README, Troubleshooting)",
                self.messages,
            )


class Availability:
    """Whether the session is up, why it is not, and when to try again."""

    def __init__(self, client_id: str) -> None:
        self._client_id = client_id
        self._outage = Outage("MQTT")
        self._began_at = 0.0
        self._short_lived = 0
        self.connected = False
        # Why we ended the connection, or the broker did; MQTT 3.1.1 has no words for it.
        self.error = ""
        self.error_level = logging.WARNING

    def pause_seconds(self) -> float:
        """Return how long to wait before the next try; 0 when it may be now."""
        return self._outage.pause_seconds()

    def connecting(self, error: str) -> None:
        """Note a try, and what is to be said if it is ended before it is accepted."""
        self.error, self.error_level = error, logging.WARNING

    def accepted(self) -> None:
        """Note that the broker takes the connection."""
        self.error = "connection lost"
        self._began_at = time.monotonic()

    def subscribed(self) -> None:
        """Note that the session is up."""
        self.connected = True
        self._outage.recovered()

    def unreachable(self, error: str) -> None:
        """Note that there is no connection at all."""
        self._short_lived = 0
        self._outage.failed(error)

    def disconnected(self, *, is_intended: bool) -> None:
        """Note that the connection has ended."""
        was_connected, self.connected = self.connected, False
        if is_intended:
            return
        if was_connected and time.monotonic() - self._began_at < SHORT_LIVED_SECONDS:
            self._short_lived += 1
        elif was_connected:
            self._short_lived = 0
        if self._short_lived >= SHORT_LIVED_MAX:
            self.error = (
                "the connection is lost soon after it is made, again and again: another client"
                f" with the client id {self._client_id} takes the session over, or the broker, or"
                " the line to it, comes and goes"
            )
            if self._short_lived == SHORT_LIVED_MAX:
                log.warning("MQTT: %s", self.error)
        self._outage.failed(self.error, self.error_level)


def right_to_read(settings: Settings, topic: str) -> str:
    """Say what the broker must allow for a subscription."""
    name = settings.mqtt_username
    who = f"the user {name}" if name is not None else "clients without a user name"
    return f"its access list (ACL) must give {who} the right to subscribe to and read {topic}"


def grant_problem(settings: Settings, codes: Sequence[ReasonCode]) -> str:
    """Say what is wrong with a SUBACK's code for the events; nothing if it is good."""
    topic = settings.topics.events
    if not codes or codes[0].is_failure:
        problem = f"the broker refuses the subscription to {topic}"
    elif codes[0].value == 0:
        problem = (
            f"the broker grants {topic} with QoS 0 alone, with which events are lost: it must"
            " allow QoS 1 (max_qos in mosquitto.conf)"
        )
    else:
        return ""
    return f"{problem}: {right_to_read(settings, topic)}"


class Session:
    """One session, over all of its connections: it connects, reads and writes.

    `connection` is the number of the present connection, `in_flight` what has come over it.
    """

    def __init__(self, settings: Settings, last_will: bytes) -> None:
        """Raises UnknownPaho."""
        self._settings = settings
        self._where = f"{settings.mqtt_host}:{settings.mqtt_port}"
        self._client = Client(settings, last_will)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_disconnect = self._on_disconnect
        self._reader = PacketReader()
        self._connack_by = float("inf")
        self._is_leaving = False  # we disconnect because we want to
        self.connection = 0
        self.in_flight = InFlight(0)
        self.unconfirmed: set[int] = set()  # packet ids of what we published, not PUBACKed yet
        self.dropped = DroppedCount()
        self.availability = Availability(settings.mqtt_client_id)

    @property
    def is_connected(self) -> bool:
        """Whether the broker has accepted the present connection."""
        return self._client.is_connected()

    @property
    def socket(self) -> Any:
        """The socket of the present connection, accepted or not; None if there is none."""
        return self._client.socket()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bytes:
        """Return a packet to send, under a packet id of its own."""
        packet_id = self._client.new_packet_id()
        self.unconfirmed.add(packet_id)
        return mqtt.publish(topic, payload, packet_id, retain=retain)

    def send(self, packets: bytes) -> bool:
        """Write packets, and later what is not taken now; tell whether the connection stands."""
        self._client.send(packets)
        return self.is_connected

    def loop(self, seconds_max: float) -> bool:
        """Read and write once, and tell whether there may be more to read.

        (Re)connects if there is no connection.
        """
        if self.socket is None:
            pause_seconds = self.availability.pause_seconds()
            if pause_seconds > 0:
                time.sleep(min(pause_seconds, seconds_max))
                return False
            if not self._connect():
                return False
        may_have_more = self._read_and_write(seconds_max)
        if time.monotonic() > self._connack_by:
            self._connack_by = float("inf")
            self._drop(SILENT.format(where=self._where, seconds=CONNECT_SECONDS_MAX))
        return may_have_more

    def read_available(self) -> bool:
        """Read if there is something to read; tell whether there may be more."""
        return self.socket is not None and self.loop(0)

    def keep_alive(self) -> None:
        """Write what is to be written, a ping when it is due among it, and read nothing."""
        if self.socket is not None:
            # The broker's answers are among what is not read, so its silence means nothing.
            self._client.note_broker_alive()
            self._client.loop_write()
            self._client.loop_misc()

    def disconnect(self) -> None:
        """Disconnect when the broker has taken all that we have written.

        A connection that is closed with input unread is reset, and what the broker has not read
        by then is lost: PUBACKs, and with them their messages would come again.
        """
        if (sock := self.socket) is None:
            return
        self._is_leaving = True
        until = time.monotonic() + CLOSE_SECONDS_MAX
        line = socket.socket(fileno=os.dup(sock.fileno()))
        self._client.disconnect()
        while self._client.want_write() and self.socket and time.monotonic() < until:
            self._read_and_write(0.1)
        with line, suppress(OSError):
            line.settimeout(CLOSE_SECONDS_MAX)
            while time.monotonic() < until and line.recv(READ_AHEAD_BYTES):
                pass

    def _read_and_write(self, seconds_max: float) -> bool:
        readable, writable = self._client.wait(seconds_max)
        may_have_more = readable and self._read()
        if writable:
            self._client.loop_write()
        self._client.loop_misc()
        return may_have_more

    def _read(self) -> bool:
        """Read once, take what has come, and tell whether there may be more."""
        if not (data := self._client.read()):
            return False
        self._client.note_broker_alive()
        received_at, arrived_at = datetime.now(UTC), time.monotonic()
        pubcomps = []
        try:
            for packet in self._reader.packets(data):
                if isinstance(packet, Publish):
                    if packet.topic == DROPPED_TOPIC:
                        self.dropped.update(packet.payload)
                    else:
                        self.in_flight.add(packet, received_at, arrived_at)
                elif isinstance(packet, Puback):
                    self.unconfirmed.discard(packet.packet_id)
                elif isinstance(packet, OtherPacket):
                    self._client.handle(packet.data)
                    if self.socket is None:
                        return False
                else:
                    # A PUBREL, also for a message that somebody else has answered under this
                    # client id: without a PUBCOMP it would stay in flight for ever.
                    pubcomps.append(mqtt.pubcomp(packet.packet_id))
        except MalformedPacket as error:
            self.availability.error = f"{self._where} sends what is not MQTT: {error}"
            self._client.end()
            return False
        if pubcomps and self.is_connected:
            self.send(b"".join(pubcomps))
        # TLS gives a record at a time.
        is_full = len(data) == READ_AHEAD_BYTES
        return is_full or isinstance(self.socket, ssl.SSLSocket)

    def _connect(self) -> bool:
        self.availability.connecting(UNANSWERED.format(where=self._where))
        self._reader = PacketReader()
        self.unconfirmed.clear()
        host, port = self._settings.mqtt_host, self._settings.mqtt_port
        try:
            self._client.connect(host, port, KEEPALIVE_SECONDS)
        except OSError as error:
            self.availability.unreachable(explain(error, host, port))
            return False
        if self.socket is None:
            return False  # lost by now: CONNECT is written at once
        self._connack_by = time.monotonic() + CONNECT_SECONDS_MAX
        return True

    def _drop(self, error: str, level: int = logging.WARNING) -> None:
        """Give up a connection that is of no use."""
        self.availability.error, self.availability.error_level = error, level
        self._client.disconnect()

    def _on_connect(
        self, client: paho.Client, _user: Any, flags: Any, reason_code: ReasonCode, _props: Any
    ) -> None:
        self._connack_by = float("inf")
        if reason_code.is_failure:
            self.availability.error = f"the broker refuses the connection: {reason_code}"
            return
        self.availability.accepted()
        if self.connection > 0 and not flags.session_present:
            log.warning("MQTT: %s", SESSION_LOST)
        self.connection += 1
        self.in_flight = InFlight(self.connection)
        # At every connect: a kept session would hide that the topic was changed. QoS 1, not
        # 2, which costs two packets more for each event and keeps no more of them.
        client.subscribe([(self._settings.topics.events, 1), (DROPPED_TOPIC, 0)])

    def _on_subscribe(
        self, _client: Any, _user: Any, _mid: int, reason_codes: list[ReasonCode], _props: Any
    ) -> None:
        # The other code is of a topic that is for information alone.
        if error := grant_problem(self._settings, reason_codes[:1]):
            self._drop(error, logging.ERROR)
            return
        # Only now: who reads this may publish, and nothing of it is lost.
        log.info("MQTT connected rc=Success; subscribing %s", self._settings.topics.events)
        self.availability.subscribed()

    def _on_disconnect(
        self, _client: Any, _user: Any, _flags: Any, _reason_code: Any, _props: Any
    ) -> None:
        # Not settled, so the broker will send them again.
        self.in_flight = InFlight(self.connection)
        self._connack_by = float("inf")
        self.availability.disconnected(is_intended=self._is_leaving)
        self._is_leaving = False


class Broker:
    """The session as the loop uses it: batches in, replies out.

    The broker keeps the session under a fixed client id while we are away.
    """

    def __init__(self, settings: Settings, *, last_will: bytes) -> None:
        """Raises UnknownPaho."""
        self._settings = settings
        self._session = Session(settings, last_will)

    @property
    def connected(self) -> bool:
        """Whether the session is up and the broker has granted the subscription."""
        return self._session.availability.connected

    @property
    def connection(self) -> int:
        """The number of the connection, another one at each connect."""
        return self._session.connection

    @property
    def dropped(self) -> int | None:
        """How many messages the broker has dropped since it started; None until it says so."""
        return self._session.dropped.messages

    @property
    def unsettled(self) -> int:
        """How many messages have arrived and are not settled."""
        return len(self.messages)

    @property
    def messages(self) -> Sequence[Message]:
        """What has arrived and is not settled, in its order."""
        return self._session.in_flight.messages

    @property
    def oldest_unsettled_seconds(self) -> float:
        """How long ago the oldest of them arrived."""
        return time.monotonic() - self.messages[0].arrived_at if self.messages else 0.0

    def receive(self, messages_max: int, seconds_max: float) -> list[Message]:
        """Return the oldest unsettled messages, up to a batch; wait only if there is none.

        They stay unsettled, and come again with the next call, until settle() or until the
        connection is lost.
        """
        session = self._session
        may_have_more = True
        if not self.unsettled or len(session.unconfirmed) > REPLIES_OUTSTANDING_MAX:
            may_have_more = session.loop(seconds_max)
        while may_have_more and self.unsettled < messages_max:
            may_have_more = session.read_available()
        if len(session.unconfirmed) > REPLIES_OUTSTANDING_MAX:
            return []  # what would confirm them may come behind much else: read on first
        return session.in_flight.batch(messages_max)

    @property
    def sockets(self) -> list[Any]:
        """What to look at for more, if there is room for it while a batch is being stored."""
        room = 2 * self._settings.batch_max - self.unsettled
        has_room = room > 0 and not self._session.in_flight.overflowed
        return [sock] if has_room and (sock := self._session.socket) else []

    def serve(self) -> None:
        """Keep the session alive, without waiting: for while the database works.

        To be called when one of `sockets` is readable, and at least once a second. Reads until
        there is no more room: the last read may bring more, up to READ_AHEAD_BYTES. Does not
        connect again.
        """
        while self.sockets and self._session.read_available():
            pass
        if not self.sockets:
            self._session.keep_alive()

    def wait(self, seconds: float) -> None:
        """Keep the session alive for that long, whatever arrives."""
        until = time.monotonic() + seconds
        while (left_seconds := until - time.monotonic()) > 0:
            self._session.loop(left_seconds)

    def settle(self, batch: Sequence[Message], replies: Sequence[Reply]) -> None:
        """Publish the replies, then PUBACK the batch that receive() gave, in its order.

        If the connection that brought the batch is lost, the rest is left undone: the broker
        will deliver the batch again.
        """
        session = self._session
        # Not self.connected: the SUBACK may come behind a backlog that waits to be settled.
        if not session.is_connected or batch[0].connection != self.connection:
            return
        if not self._answer(replies, batch):
            return
        session.in_flight.settled(batch)
        if session.in_flight.overflowed and not self.unsettled:
            log.info("MQTT: reconnecting, so that the broker sends again what was too much to hold")
            session.disconnect()

    def publish_status(self, status: bytes) -> None:
        """Publish the status, retained; not at all if there is no connection."""
        if self._session.is_connected:
            topic = self._settings.topics.status
            self._session.send(self._session.publish(topic, status, retain=True))

    def close(self, last_status: bytes) -> None:
        """Publish the last status, write what is left, and disconnect; the session stays."""
        if self._session.is_connected:
            self.publish_status(last_status)
            self._session.disconnect()

    def _answer(self, replies: Sequence[Reply], messages: Sequence[Message]) -> bool:
        """Publish the replies and settle the messages, by one call to the kernel.

        Tell whether the connection is still good. A reply is not published again after a
        reconnect. It need not be: the PUBACKs of its batch are behind it in the same stream,
        so where it is lost they are, and the batch comes again.
        """
        packets = [self._session.publish(reply.topic, reply.payload) for reply in replies]
        for message in messages:
            # An answer to a message of QoS 0 makes the broker disconnect us.
            if message.qos == 1:
                packets.append(mqtt.puback(message.mid))
            elif message.qos == 2:
                packets.append(mqtt.pubrec(message.mid))
        return self._session.send(b"".join(packets))
