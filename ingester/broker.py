"""The one MQTT session, and everything that knows paho.

What it does: keeps the session connected, hands out the messages that have arrived, and
publishes replies before it PUBACKs. What it does not: look into a message.

Invariant: a message is PUBACKed at most once, after its replies were handed to the socket,
and on the very connection that brought it. Packet ids begin again at 1 after a broker's
restart: PUBACKing an id kept from an earlier connection deletes other messages unseen.
"""

import logging
import os
import select
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from paho.mqtt import __version__
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from ingester import packet
from ingester.outage import REMINDER_SECONDS, Outage
from ingester.packet import Publish
from ingester.reply import Reply
from ingester.settings import Settings
from ingester.tls import explain

log = logging.getLogger(__name__)

# The broker cuts the session after one and a half times this without a packet: more than the
# longest wait for the database (15 s). We give up a silent broker after twice this: within
# the 30 s that the healthcheck allows.
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
DROPPED_TOPIC = "$SYS/broker/publish/messages/dropped"
# What is still to be written at the end may take this long.
CLOSE_SECONDS_MAX = 1.0
# Bytes of payloads that one batch holds, but always at least one message.
BATCH_BYTES_MAX = 1_048_576
# What is held unsettled at most. The broker's window (mosquitto.conf) is smaller, but 2.0.11
# lets each PUBACK open a whole one: it then sends all that it has queued. 25 MB with small
# events; with a fifth of it, a long backlog is sent and read five times over.
IN_HAND_MESSAGES_MAX = 50_000
IN_HAND_BYTES_MAX = 16_777_216
# Replies that the broker has not PUBACKed. There are 65,535 packet ids, and Plain keeps each
# reply until then, at 1.2 kB.
REPLIES_OUTSTANDING_MAX = 5_000
# The paho whose private methods FewerCalls knows. With another one, Plain does the same.
PAHO_VERSION = "2.2.0"
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


class Plain(paho.Client):
    """paho as it comes, and how the Broker uses it."""

    # Whether there may be more to read at once, after a read that brought something.
    may_have_more = True

    def __init__(self, client_id: str, take: Callable[[Publish], None]) -> None:
        """`take` is called with each message that arrives, and neither publishes nor raises."""
        # MQTT 3.1.1: its session has no expiry to set, and its packets have no properties to parse.
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=False,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        # Past its default limit of 20, publishes would queue in paho while PUBACKs do not,
        # and a PUBACK would overtake its ACK.
        self.max_inflight_messages_set(0)
        self._take = take
        self.on_message = lambda _client, _user, message: take(
            Publish(message.topic, bytes(message.payload), message.mid, message.qos)
        )
        self._replies: deque[paho.MQTTMessageInfo] = deque()

    @property
    def unconfirmed(self) -> int:
        """How many replies the broker has not PUBACKed."""
        while self._replies and self._replies[0].is_published():
            self._replies.popleft()
        return len(self._replies)

    def settle(self, replies: Sequence[Reply], messages: Sequence[Message]) -> MQTTErrorCode:
        """Publish the replies; if that can be done, PUBACK the messages."""
        for reply in replies:
            info = self.publish(reply.topic, reply.payload, qos=1)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return info.rc
            self._replies.append(info)
        for message in messages:
            # A PUBACK for a QoS 0 message makes the broker disconnect us.
            if message.qos > 0:
                self.ack(message.mid, message.qos)
        return MQTTErrorCode.MQTT_ERR_SUCCESS


class FewerCalls(Plain):
    """paho that leaves PUBLISH and PUBACK to packet.py, and writes a batch in one piece.

    paho asks the kernel three times for each packet that it reads and once for each that it
    writes, and makes a lock for each message: with Plain, the ingester takes 67 us of CPU time
    for a single event, with this 25. All other packets stay with paho. It uses five private
    names of paho, and so PAHO_VERSION alone.

    A reply is not published again after a reconnect. It need not be: the PUBACKs of its batch
    are behind it in the same stream, so where it is lost they are, and the batch comes again.
    """

    def __init__(self, client_id: str, take: Callable[[Publish], None]) -> None:
        super().__init__(client_id, take)
        self._begun = b""  # the beginning of a packet whose end has not been read
        self._packet = b""  # what paho has not read yet of the packet that is its own
        self._mids: set[int] = set()  # of the replies that the broker has not PUBACKed

    @property
    def unconfirmed(self) -> int:
        """How many replies the broker has not PUBACKed."""
        return len(self._mids)

    def reconnect(self) -> MQTTErrorCode:
        """Connect again, and forget what was of the connection before."""
        self._begun = b""
        self._mids.clear()
        return super().reconnect()

    def settle(self, replies: Sequence[Reply], messages: Sequence[Message]) -> MQTTErrorCode:
        """Publish the replies, then PUBACK the messages, by one call to the kernel."""
        packets = []
        for reply in replies:
            mid = self._mid_generate()
            self._mids.add(mid)
            packets.append(packet.publish(reply.topic, reply.payload, mid))
        packets += [packet.puback(message.mid) for message in messages if message.qos > 0]
        # Once written, paho does something about some packets; not about a PUBACK.
        return self._packet_queue(paho.PUBACK, b"".join(packets), 0, 1)

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """Take in all that there is to read, up to READ_AHEAD_BYTES."""
        try:
            data = super()._sock_recv(READ_AHEAD_BYTES)
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        except OSError:
            data = b""
        if not data:
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        # TLS gives a record at a time.
        is_full = len(data) == READ_AHEAD_BYTES
        self.may_have_more = is_full or isinstance(self.socket(), ssl.SSLSocket)
        self._last_bytes_received = time.monotonic()  # for paho's keepalive
        try:
            return self._take_packets(self._begun + data, max_packets)
        except packet.MalformedPacket:
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_PROTOCOL)

    def _take_packets(self, data: bytes, max_packets: int) -> MQTTErrorCode:
        position = 0
        while (found := packet.packet_at(data, position)) is not None:
            item, end = found
            if isinstance(item, Publish):
                self._take(item)
            elif item and item.mid in self._mids:
                self._mids.remove(item.mid)
            else:
                self._packet = data[position:end]
                rc = super().loop_read(max_packets)
                if self.socket() is None:
                    return rc
            position = end
        self._begun = data[position:]
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _sock_recv(self, bufsize: int) -> bytes:
        """Give paho its packet, and no more."""
        if not self._packet:
            raise BlockingIOError
        part, self._packet = self._packet[:bufsize], self._packet[bufsize:]
        return part


class Broker:
    """One session, kept by the broker under a fixed client id while we are away.

    `connected`: the session is up and the broker has granted the subscription. `connection`:
    its number, another one at each connect. `dropped`: how many messages the broker has
    dropped since it started, for whatever client; None until it says so.
    """

    def __init__(self, settings: Settings, *, last_will: bytes) -> None:
        self._settings = settings
        self._in_hand: list[Message] = []
        self._in_hand_bytes = 0
        self._overflowed = False  # something arrived that was not taken in hand
        self.connection = 0
        self._connected_at = 0.0
        self._short_lived = 0
        self.connected = False
        self.dropped: int | None = None
        self._dropped_said_at = float("-inf")
        self._connecting_until = 0.0
        self._error: str | None = None  # why we ended the connection, or the broker did
        self._closing = False
        self._outage = Outage("MQTT")
        client_class = FewerCalls if __version__ == PAHO_VERSION else Plain
        self._client = client_class(settings.mqtt_client_id, self._take)
        self._client.connect_timeout = CONNECT_SECONDS_MAX
        if settings.mqtt_tls is not None:
            self._client.tls_set_context(settings.mqtt_tls)
            # paho allows it twice: for the TCP connection, and for the handshake.
            self._client.connect_timeout = CONNECT_SECONDS_MAX / 2
        if settings.mqtt_username is not None:
            self._client.username_pw_set(settings.mqtt_username, settings.mqtt_password)
        self._client.will_set(settings.topics.status, last_will, qos=1, retain=True)
        self._client.on_socket_open = self._on_socket_open
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_disconnect = self._on_disconnect

    @property
    def in_hand(self) -> int:
        """How many messages have arrived and are not settled."""
        return len(self._in_hand)

    @property
    def messages(self) -> Sequence[Message]:
        """What has arrived and is not settled, in its order."""
        return self._in_hand

    @property
    def oldest_in_hand_seconds(self) -> float:
        """How long ago the oldest of them arrived."""
        if not self._in_hand:
            return 0.0
        return (datetime.now(UTC) - self._in_hand[0].received_at).total_seconds()

    def receive(self, messages_max: int, seconds_max: float) -> list[Message]:
        """Return the oldest messages in hand, up to a batch; wait only if there is none.

        They stay in hand, and come again with the next call, until settle() or until the
        connection is lost.
        """
        may_have_more = True
        if not self._in_hand or self._client.unconfirmed > REPLIES_OUTSTANDING_MAX:
            may_have_more = self._loop(seconds_max)
        while may_have_more and len(self._in_hand) < messages_max:
            may_have_more = self._read_more()
        if self._client.unconfirmed > REPLIES_OUTSTANDING_MAX:
            return []  # what would confirm them may come behind much else: read on first
        batch: list[Message] = []
        bytes_total = 0
        for message in self._in_hand[:messages_max]:
            bytes_total += len(message.payload)
            if batch and bytes_total > BATCH_BYTES_MAX:
                break
            batch.append(message)
        return batch

    @property
    def sockets(self) -> list[Any]:
        """What to look at for more, if there is room for it while a batch is being stored."""
        has_room = len(self._in_hand) < 2 * self._settings.batch_max and not self._overflowed
        return [sock] if has_room and (sock := self._client.socket()) else []

    def serve(self) -> None:
        """Take in hand what has arrived, without waiting, until there is no more room.

        The last read may bring more than there was room for, up to READ_AHEAD_BYTES.
        """
        while self.sockets and self._read_more():
            pass

    def wait(self, seconds: float) -> None:
        """Keep the session alive for that long, whatever arrives."""
        until = time.monotonic() + seconds
        while (left_seconds := until - time.monotonic()) > 0:
            self._loop(left_seconds)

    def settle(self, batch: Sequence[Message], replies: Sequence[Reply]) -> None:
        """Publish the replies, then PUBACK the batch that receive() gave, in its order.

        If the connection that brought the batch is lost, the rest is left undone: the broker
        will deliver the batch again.
        """
        # Not self.connected: the SUBACK may come behind a backlog that waits to be settled.
        if not self._client.is_connected() or batch[0].connection != self.connection:
            return
        result = self._client.settle(replies, batch)
        if not self._client.is_connected():
            return  # all in hand was dropped meanwhile
        if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._drop(f"cannot publish: {paho.error_string(result)}")
            return
        del self._in_hand[: len(batch)]
        self._in_hand_bytes -= sum(len(message.payload) for message in batch)
        if self._overflowed and not self._in_hand:
            log.info("MQTT: reconnecting, so that the broker sends again what was too much to hold")
            self._disconnect()

    def publish_status(self, status: bytes) -> None:
        """Publish the status, retained."""
        self._client.publish(self._settings.topics.status, status, qos=1, retain=True)

    def close(self, last_status: bytes) -> None:
        """Publish the last status, write what is left, and disconnect; the session stays."""
        if not self._client.is_connected():
            return
        self._closing = True
        self.publish_status(last_status)
        self._disconnect()

    def _disconnect(self) -> None:
        """Disconnect when the broker has taken all that we have written.

        A connection that is closed with input unread is reset, and what the broker has not read
        by then is lost: PUBACKs, and with them their messages would come again.
        """
        if (sock := self._client.socket()) is None:
            return
        until = time.monotonic() + CLOSE_SECONDS_MAX
        line = socket.socket(fileno=os.dup(sock.fileno()))
        self._client.disconnect()
        while self._client.want_write() and self._client.socket() and time.monotonic() < until:
            self._read_and_write(0.1)
        with line, suppress(OSError):
            line.settimeout(CLOSE_SECONDS_MAX)
            while time.monotonic() < until and line.recv(READ_AHEAD_BYTES):
                pass

    def _read_more(self) -> bool:
        """Read if there is something to read; tell whether there may be more."""
        return self._client.socket() is not None and self._loop(0)

    def _loop(self, seconds_max: float) -> bool:
        """Read and write once, and tell whether there may be more to read.

        (Re)connects if there is no connection.
        """
        if self._client.socket() is None:
            pause_seconds = self._outage.pause_seconds()
            if pause_seconds > 0:
                time.sleep(min(pause_seconds, seconds_max))
                return False
            if not self._connect():
                return False
        may_have_more = self._read_and_write(seconds_max)
        if not self._client.is_connected() and time.monotonic() > self._connecting_until:
            self._drop("no CONNACK in time")
        return may_have_more

    def _read_and_write(self, seconds_max: float) -> bool:
        # paho's own loop() does it by way of a pair of sockets, so that another thread can
        # wake it: three system calls for each batch, one of them before its ACKs are written.
        sock: Any = self._client.socket()
        # What TLS has decrypted already, select() does not see.
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            self._client.loop_read()
            return True
        writing = [sock] if self._client.want_write() else []
        readable, writable, _ = select.select([sock], writing, [], seconds_max)
        if readable:
            self._client.loop_read()
        if writable:
            self._client.loop_write()
        self._client.loop_misc()
        return bool(readable) and self._client.may_have_more

    def _connect(self) -> bool:
        self._connecting_until = time.monotonic() + CONNECT_SECONDS_MAX
        host, port = self._settings.mqtt_host, self._settings.mqtt_port
        self._error = UNANSWERED.format(where=f"{host}:{port}")  # until there is a CONNACK
        try:
            self._client.connect(host, port, KEEPALIVE_SECONDS)
        except OSError as error:
            self._short_lived = 0
            self._outage.failed(explain(error, host, port))
            return False
        # It may be lost by now: CONNECT is written at once.
        return self._client.socket() is not None

    def _drop(self, error: str) -> None:
        """Give up a connection that is of no use."""
        self._error = error
        self._client.disconnect()

    def _on_socket_open(self, _client: Any, _user: Any, sock: Any) -> None:
        # Else a PUBACK right behind an ACK waits up to 40 ms for the broker's TCP ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(
        self, client: paho.Client, _user: Any, _flags: Any, reason_code: ReasonCode, _props: Any
    ) -> None:
        if reason_code.is_failure:
            self._error = f"the broker refuses the connection: {reason_code}"
            return
        self._error = None
        self.connection += 1
        self._connected_at = time.monotonic()
        events = self._settings.topics.events
        log.info("MQTT connected rc=%s; subscribing %s", reason_code, events)
        # At every connect: a kept session would hide that the topic was changed. QoS 1, not
        # 2: at 2 paho answers before it hands the message over.
        client.subscribe([(events, 1), (DROPPED_TOPIC, 0)])

    def _on_subscribe(
        self, _client: Any, _user: Any, _mid: int, reason_codes: list[ReasonCode], _props: Any
    ) -> None:
        if reason_codes[0].is_failure:  # the other one is for information alone
            self._drop(f"the broker refuses the subscription to {self._settings.topics.events}")
            return
        self.connected = True
        self._outage.over()

    def _take(self, publish: Publish) -> None:
        topic = sys.intern(publish.topic)  # each device's once, not once a message
        if topic == DROPPED_TOPIC:
            self._note_dropped(publish.payload)
            return
        if len(self._in_hand) >= IN_HAND_MESSAGES_MAX or self._in_hand_bytes >= IN_HAND_BYTES_MAX:
            self._overflowed = True
            return
        # Append and nothing else: an exception that leaves a callback makes paho hand over
        # the same message again and again.
        self._in_hand_bytes += len(publish.payload)
        self._in_hand.append(
            Message(
                topic,
                publish.payload,
                datetime.now(UTC),
                publish.mid,
                publish.qos,
                self.connection,
            )
        )

    def _note_dropped(self, payload: bytes) -> None:
        if not payload.isdigit():
            return
        before, self.dropped = self.dropped or 0, int(payload)
        now = time.monotonic()
        if self.dropped > before and now - self._dropped_said_at >= REMINDER_SECONDS:
            self._dropped_said_at = now
            log.warning(
                "MQTT: the broker has dropped %d messages since it started: a queue is full, of"
                " this or another client (README, Troubleshooting)",
                self.dropped,
            )

    def _on_disconnect(
        self, _client: Any, _user: Any, _flags: Any, _reason_code: Any, _props: Any
    ) -> None:
        # Not PUBACKed, so the broker will send them again.
        self._in_hand.clear()
        self._in_hand_bytes = 0
        was_connected, self.connected = self.connected, False
        intended = self._closing or (self._overflowed and self._error is None)
        self._overflowed = False
        if intended:
            return
        error = self._error or "connection lost"  # MQTT 3.1.1 says no more
        if was_connected and time.monotonic() - self._connected_at < SHORT_LIVED_SECONDS:
            self._short_lived += 1
        elif was_connected:
            self._short_lived = 0
        if self._short_lived >= SHORT_LIVED_MAX:
            error = (
                "the connection is lost soon after it is made, again and again: another client"
                f" with the client id {self._settings.mqtt_client_id} takes the session over, or"
                " the broker, or the line to it, comes and goes"
            )
            if self._short_lived == SHORT_LIVED_MAX:
                log.warning("MQTT: %s", error)
        self._outage.failed(error)
