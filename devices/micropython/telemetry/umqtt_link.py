"""The way to the broker over umqtt.simple, for programs with a loop of their own.

What it does: connects, subscribes to the ACKs, sends what Telemetry gives, reads what comes,
and begins again when the connection is gone. What it does not: Wi-Fi; or wait, apart from
what umqtt.simple waits for: name lookup, connecting, and the rest of a packet that began.

Invariant: events are sent only on a connection on which the ACKs are subscribed.
"""

from time import ticks_add, ticks_diff, ticks_ms

from umqtt.simple import MQTTException

from telemetry.outbox import Telemetry, random_bits

ETIMEDOUT = 110
RETRY_MS = 1_000
RETRY_MS_MAX = 60_000


class _Socket:
    """A socket that ends every wait: umqtt.simple sets it to block for ever after each packet."""

    def __init__(self, sock, seconds):
        self._sock = sock
        self._seconds = seconds
        self._waits = True
        self.heard_ms = ticks_ms()
        self.setblocking(True)

    def setblocking(self, waits):
        self._waits = waits
        if hasattr(self._sock, "settimeout"):
            self._sock.settimeout(self._seconds if waits else 0)
        else:  # TLS
            self._sock.setblocking(waits)

    def read(self, count):
        data = self._sock.read(count)
        if data:
            self.heard_ms = ticks_ms()
        if self._waits and (data is None or 0 < len(data) < count):
            raise OSError(ETIMEDOUT)
        return data

    def write(self, data, length=None):
        if length is not None:
            data = memoryview(data)[:length]
        if self._sock.write(data) != len(data):
            raise OSError(ETIMEDOUT)

    def close(self):
        self._sock.close()


class UmqttLink:
    """`client` is a umqtt.simple MQTTClient that is not connected; what it hears comes here.

    What is not an ACK is handed to `on_message(topic, payload)`, and `on_connect()` is called
    after each connect, for subscriptions of the program's own.
    """

    def __init__(self, telemetry: Telemetry, client, timeout_seconds: int = 5) -> None:
        self._telemetry = telemetry
        self._client = client
        self._timeout_seconds = timeout_seconds
        self._socket = None
        self._retry_ms = RETRY_MS
        self._next_connect: int | None = None  # None: at once
        self._pinged_ms = 0
        self.on_message = None
        self.on_connect = None
        self._heard: list[tuple[bytes, bytes]] = []
        client.set_callback(self._on_message)

    def is_connected(self) -> bool:
        return self._socket is not None

    def loop(self) -> None:
        """Do what is due; call it often."""
        if self._socket is None:
            self._connect_if_due()
        if self._socket is not None:
            self._guarded(self._read)
        while self._heard:
            self._take(*self._heard.pop(0))
        self._telemetry.loop(self._publish)
        if self._telemetry.reconnect_wanted():
            self._lost()

    def close(self) -> None:
        """Say good-bye to the broker."""
        if self._socket is not None:
            self._guarded(self._client.disconnect)
            self._lost()

    def _connect_if_due(self) -> None:
        now = ticks_ms()
        if self._next_connect is not None and ticks_diff(self._next_connect, now) > 0:
            return
        self._guarded(self._connect)
        wait = self._retry_ms // 2 + random_bits(16) * self._retry_ms // 65_536
        self._next_connect = ticks_add(ticks_ms(), wait)
        self._retry_ms = min(2 * self._retry_ms, RETRY_MS_MAX)

    def _connect(self) -> None:
        try:
            self._client.connect(True, self._timeout_seconds)
        except TypeError:  # before version 1.4 it has no timeout
            self._client.connect()
        self._client.sock = self._socket = _Socket(self._client.sock, self._timeout_seconds)
        self._client.subscribe(self._telemetry.acks_topic.encode(), 1)
        if self.on_connect is not None:
            self.on_connect()
        self._telemetry.connected()

    def _read(self) -> None:
        client = self._client
        for _ in range(8):  # messages; the program wants its turn too
            heard_ms = self._socket.heard_ms
            client.check_msg()
            if self._socket is None or self._socket.heard_ms == heard_ms:
                break
        if client.keepalive:
            now = ticks_ms()
            if ticks_diff(now, self._socket.heard_ms) > client.keepalive * 1500:
                raise OSError(ETIMEDOUT)
            if ticks_diff(now, self._pinged_ms) > client.keepalive * 500:
                self._pinged_ms = now
                client.ping()

    def _publish(self, topic: str, payload: bytes) -> bool:
        # QoS 0: umqtt.simple would wait for a PUBACK, which proves nothing. The ACK does.
        return self._guarded(lambda: self._client.publish(topic.encode(), payload))

    def _on_message(self, topic: bytes, payload: bytes) -> None:
        self._heard.append((topic, payload))  # what the program does with it is not guarded

    def _take(self, topic: bytes, payload: bytes) -> None:
        if self._telemetry.on_message(topic.decode(), payload):
            self._retry_ms = RETRY_MS
        elif self.on_message is not None:
            self.on_message(topic, payload)

    def _guarded(self, action) -> bool:
        """Do something with the client; tell whether the connection lived through it."""
        try:
            action()
            return True
        # umqtt.simple checks little: what a broken connection gives it ends in any of these.
        except (OSError, IndexError, TypeError, ValueError, AssertionError, MQTTException):
            self._lost()
            return False

    def _lost(self) -> None:
        self._telemetry.disconnected()
        self._socket = None
        try:
            if self._client.sock is not None:
                self._client.sock.close()
        except OSError:
            pass
