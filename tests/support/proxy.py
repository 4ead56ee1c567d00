"""A TCP proxy that is a bad network: it freezes, forgets and cuts, at a precise moment if asked.

What it does: forwards the bytes of each connection to one server on this machine, in a
thread of its own, until a test tells it otherwise. What it does not: change a byte, or know
a protocol; a test says which bytes it waits for.

Invariant: after a call returns, what it asks for holds. After the `with` block nothing is
left: no thread, no socket.
"""

import contextlib
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

LOOPBACK = "127.0.0.1"
CHUNK = 65_536
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST
Direction = Literal["to_server", "to_client"]


@dataclass(eq=False)
class Flow:
    """One direction of one connection."""

    direction: Direction
    source: socket.socket
    sink: socket.socket
    buffer: bytearray = field(default_factory=bytearray)
    tail: bytes = b""  # the last bytes that passed: a pattern may lie across two reads
    ended: bool = False  # the source has no more to say


@dataclass(eq=False)
class Connection:
    """A client, the server, and whether what they say is still forwarded."""

    to_server: Flow
    to_client: Flow
    forgotten: bool = False
    trap: "Trap | None" = None  # the one that cuts it when the answer begins

    def flows(self) -> tuple[Flow, Flow]:
        return self.to_server, self.to_client


@dataclass(eq=False)
class Trap:
    """What cut_after() waits for."""

    pattern: bytes
    direction: Direction
    sprung: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Listens on `port` of 127.0.0.1 for as long as a `with` block lasts."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener: socket.socket | None = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        self._connections: list[Connection] = []
        self._frozen: set[Direction] = set()
        self._traps: list[Trap] = []
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_here, self._wake_there = socket.socketpair()
        self._over = False
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._call(self._end)
        self._thread.join(10)
        assert not self._thread.is_alive(), "the proxy's thread did not end"
        self._wake_here.close()
        self._wake_there.close()

    # --- what a test can do -----------------------------------------------------------

    @property
    def connections(self) -> int:
        """How many connections there are, forgotten ones left out."""
        return sum(not connection.forgotten for connection in self._connections)

    def freeze(self, to_client: bool = True, to_server: bool = True) -> None:
        """Forward nothing more in these directions, new connections included."""
        wanted: set[Direction] = set()
        if to_client:
            wanted.add("to_client")
        if to_server:
            wanted.add("to_server")
        self._call(lambda: self._frozen.update(wanted))

    def thaw(self) -> None:
        """Forward again, first of all what was held back."""
        self._call(self._frozen.clear)

    def forget(self) -> None:
        """Lose the present connections as a router does: neither side is told; new ones work."""

        def forget() -> None:
            for connection in self._connections:
                connection.forgotten = True

        self._call(forget)

    def cut(self, reset: bool = True) -> None:
        """Close all connections, by RST or by FIN."""
        self._call(lambda: self._close_all(reset))

    def refuse(self) -> None:
        """Take no new connections: they are refused, as if nobody listened."""
        self._call(self._close_listener)

    def accept(self) -> None:
        """Take new connections again, on the same port."""
        self._call(self._open_listener)

    def cut_after(self, pattern: bytes, direction: Direction) -> threading.Event:
        """Cut the next connection on which the pattern passes; the event tells that it did.

        Towards the server: the pattern is forwarded, and the cut comes in place of the first
        byte of the answer. Towards the client: the cut comes in place of the pattern.
        """
        trap = Trap(pattern, direction)
        self._call(lambda: self._traps.append(trap))
        return trap.sprung

    # --- the thread -------------------------------------------------------------------

    def _call(self, action: Callable[[], object]) -> None:
        """Do something in the thread, between two turns, and wait until it is done."""
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        self._calls.append(act)
        self._wake_there.send(b"!")
        assert done.wait(10), "the proxy's thread does not answer"

    def _run(self) -> None:
        while not self._over:
            for key, ready in self._select():
                action: Callable[[int], None] = key.data
                action(ready)
            while self._calls:
                self._calls.popleft()()

    def _select(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait until something can be done; who waits for what changes at every turn."""
        with selectors.PollSelector() as selector:
            wake = self._wake_here
            selector.register(wake, selectors.EVENT_READ, lambda _: wake.recv(CHUNK))
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ, self._on_client)
            for connection in self._connections:
                if connection.forgotten:
                    continue
                events: dict[socket.socket, int] = {}
                for flow in connection.flows():
                    if flow.direction in self._frozen:
                        continue
                    if flow.buffer:
                        events[flow.sink] = events.get(flow.sink, 0) | selectors.EVENT_WRITE
                    elif not flow.ended:
                        events[flow.source] = events.get(flow.source, 0) | selectors.EVENT_READ
                for sock, wanted in events.items():
                    selector.register(sock, wanted, self._on_ready(connection, sock))
            return selector.select()

    def _on_client(self, _: int) -> None:
        assert self._listener is not None
        client, _address = self._listener.accept()
        try:
            server = socket.create_connection((LOOPBACK, self._server_port), timeout=5)
        except OSError:  # the server is gone: the client gets a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.close()
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there, back = Flow("to_server", client, server), Flow("to_client", server, client)
        self._connections.append(Connection(there, back))

    def _on_ready(self, connection: Connection, sock: socket.socket) -> Callable[[int], None]:
        def act(ready: int) -> None:
            for flow in connection.flows():
                if connection not in self._connections:
                    return
                if flow.direction in self._frozen:
                    continue  # the other one still flows
                try:
                    if flow.sink is sock and ready & selectors.EVENT_WRITE and flow.buffer:
                        self._write(flow)
                    elif flow.source is sock and ready & selectors.EVENT_READ and not flow.buffer:
                        self._read(connection, flow)
                except BlockingIOError:
                    pass
                except OSError:
                    self._close(connection, reset=True)

        return act

    def _read(self, connection: Connection, flow: Flow) -> None:
        chunk = flow.source.recv(CHUNK)
        if connection.trap and flow.direction == "to_client":
            self._spring(connection, connection.trap)
            return
        if not chunk:
            flow.ended = True
            with contextlib.suppress(OSError):
                flow.sink.shutdown(socket.SHUT_WR)
            if all(flow.ended for flow in connection.flows()):
                self._close(connection, reset=False)
            return
        seen = flow.tail + chunk
        for trap in self._traps:
            if trap.direction == flow.direction and trap.pattern in seen:
                self._traps.remove(trap)
                if trap.direction == "to_client":
                    self._spring(connection, trap)
                    return
                connection.trap = trap
                break
        # Shorter than any pattern, or one would be found twice.
        length = max((len(trap.pattern) for trap in self._traps), default=1) - 1
        flow.tail = seen[len(seen) - length :] if length < len(seen) else seen
        flow.buffer += chunk
        self._write(flow)

    def _spring(self, connection: Connection, trap: Trap) -> None:
        self._close(connection, reset=True)
        trap.sprung.set()

    def _write(self, flow: Flow) -> None:
        del flow.buffer[: flow.sink.send(flow.buffer)]

    def _close(self, connection: Connection, reset: bool) -> None:
        self._connections.remove(connection)
        for sock in (connection.to_server.source, connection.to_server.sink):
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()

    def _close_all(self, reset: bool) -> None:
        for connection in self._connections[:]:
            self._close(connection, reset)

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _open_listener(self) -> None:
        if self._listener is None:
            self._listener = socket.create_server((LOOPBACK, self.port))

    def _end(self) -> None:
        self._over = True
        self._close_listener()
        self._close_all(reset=True)
