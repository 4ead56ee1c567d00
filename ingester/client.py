"""paho's client, and all that is needed of its private parts.

What it does: connects, reads and writes for one session. What it does not: keep the session, or
understand a packet that paho does not handle (broker.py, mqtt.py).

Invariant: what it needs of paho's private parts is checked before the first connection, so another
version of paho ends the start with one line.
"""

import inspect
import select
import socket
import ssl
import time
from typing import Any

from paho.mqtt import __version__
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from ingester.settings import Settings

CONNECT_SECONDS_MAX = 3.0


class UnknownPaho(Exception):
    """The paho that is installed is not one that this module knows; the text is one line."""


class Client(paho.Client):
    """paho, and all that is needed of its private parts.

    paho connects, subscribes, pings and disconnects. It asks the kernel three times for each
    packet that it reads and once for each that it writes, and makes a lock for each message:
    so the bytes are read and written here, and the Broker hands it the packets that are its
    own. An event costs less than half of the CPU time that way.
    """

    # Taken from the socket at once.
    READ_BYTES_MAX = 65_536
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
        """Return what there is to read, up to READ_BYTES_MAX; b"" if there is nothing.

        There is nothing either when the connection has just been found lost.
        """
        sock: Any = self.socket()
        try:
            data: bytes = sock.recv(self.READ_BYTES_MAX)
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
