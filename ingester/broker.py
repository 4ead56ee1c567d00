"""The one MQTT session.

What it does: keeps the session connected, hands out the messages that have arrived, and
publishes replies before it settles the messages: by a PUBACK, or a PUBREC where an earlier
subscription had QoS 2. What it does not: look into a message.

Invariant: a message is settled at most once, after its replies were handed to the socket,
and on the very connection that brought it. Packet ids begin again at 1 after a broker's
restart: PUBACKing an id kept from an earlier connection deletes other messages unseen.
"""

import logging
import os
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from ingester import mqtt
from ingester.availability import (
    SESSION_LOST,
    SILENT,
    UNANSWERED,
    Availability,
    DroppedCount,
    grant_problem,
)
from ingester.client import CONNECT_SECONDS_MAX, Client
from ingester.message import InFlight, Message
from ingester.mqtt import MalformedPacket, OtherPacket, PacketReader, Puback, Publish
from ingester.reply import Reply
from ingester.settings import Settings
from ingester.tls import explain

log = logging.getLogger(__name__)

# The broker cuts the session after one and a half times this without a packet. We give up a
# silent broker after twice this: within the 30 s that the healthcheck allows.
KEEPALIVE_SECONDS = 15
DROPPED_TOPIC = "$SYS/broker/publish/messages/dropped"
# What is still to be written at the end may take this long.
CLOSE_SECONDS_MAX = 1.0
# Replies that the broker has not PUBACKed: there are 65,535 packet ids.
REPLIES_OUTSTANDING_MAX = 5_000


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
            while time.monotonic() < until and line.recv(self._client.READ_BYTES_MAX):
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
        is_full = len(data) == self._client.READ_BYTES_MAX
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
        self, _client: Any, _user: Any, flags: Any, reason_code: Any, _props: Any
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
        self._client.subscribe([(self._settings.topics.events, 1), (DROPPED_TOPIC, 0)])

    def _on_subscribe(
        self, _client: Any, _user: Any, _mid: int, reason_codes: list[Any], _props: Any
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
        there is no more room: the last read may bring more, up to READ_BYTES_MAX. Does not
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
