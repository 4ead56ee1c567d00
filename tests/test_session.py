"""The MQTT session, on a real broker and a real database: what is read and written, and when.

What it does: holds what is used of paho's private parts to one place, counts calls to the
kernel, cuts what is read and what is written in one piece at any place, and sees that MQTT is
served while the database works. What it does not: measure time; that is the benchmark. What
the broker grants, forgets or sends that it should not: test_faults_session.py.
"""

import inspect
import json
import random
import re
import select
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import tzinfo
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import __version__, _packet
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from ingester import broker as broker_module
from ingester import decoder as decoder_module
from ingester import event as event_module
from ingester import message as message_module
from ingester.app import Daemon
from ingester.broker import Broker
from ingester.client import Client
from ingester.event import Event
from ingester.message import Message
from ingester.reply import Reply
from ingester.settings import Settings
from ingester.store import Outcome, Store
from tests.support.device import Device, event
from tests.support.each import first_or_all
from tests.support.findings import find
from tests.support.load import connects, load
from tests.support.pipeline import Database, Pipeline, insert, restart_from, saved, wait_until
from tests.support.tap import PUBACK, PUBLISH, Tap
from tests.test_mqtt import MALFORMED
from tools.process import CHECKOUT

# --- what is used of paho's private parts ------------------------------------------------


def test_paho_is_pinned_and_the_pinned_one_is_installed() -> None:
    pins = (CHECKOUT / "ingester/requirements.txt").read_text()
    assert re.findall(r"(?m)^paho-mqtt==(\S+)", pins) == [__version__]


def test_no_private_parts_of_paho_are_used_but_those_that_are_checked() -> None:
    client = paho.Client(CallbackAPIVersion.VERSION2)
    of_paho = {name for name in dir(client) if re.match("_[^_]", name)}
    used = set(re.findall(r"(?:\.|def )(_[a-z]\w*)", inspect.getsource(Client)))
    assert used & of_paho == {*Client.PRIVATE_METHODS, *Client.PRIVATE_ATTRIBUTES}
    assert not re.findall(r"_client\._\w+", inspect.getsource(broker_module))


UNKNOWN_PAHOS = {
    "_mid_generate()": "del Client._mid_generate",
    "_packet_queue(command, packet, mid, qos, info)": (
        "Client._packet_queue = lambda self, command, packet: None"
    ),
    "_ping_t": (
        "init = Client.__init__;"
        " Client.__init__ = lambda self, *given, **named:"
        " init(self, *given, **named) or delattr(self, '_ping_t')"
    ),
}


@pytest.mark.parametrize("part", UNKNOWN_PAHOS)
def test_a_paho_without_what_is_used_of_it_is_refused_at_the_start_in_one_line(part: str) -> None:
    program = (
        "import sys; from paho.mqtt.client import Client;"
        f" {UNKNOWN_PAHOS[part]};"
        " from ingester import app; sys.exit(app.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"ingester: paho-mqtt {__version__} is installed, which has no {part}: install the version"
        " in ingester/requirements.txt\n"
    )


# --- in this process ---------------------------------------------------------------------


@contextmanager
def session(pipeline: Pipeline, **variables: str) -> Iterator[Broker]:
    """A Broker in this process, which has its subscription."""
    broker = Broker(Settings.from_env(pipeline.environment | variables), last_will=b"{}")
    try:
        wait_until(lambda: broker.connected or bool(broker.receive(500, 0.1)), "a subscription")
        yield broker
    finally:
        broker.close(b"{}")


def publish(device: Device, numbers: range, **fields: Any) -> None:
    """Publish these events; the broker has them all when it returns."""
    for number in numbers:
        device.send(event(number, device.device_id, value=number, **fields))
    device.wait_taken()


def receive(broker: Broker, number: int) -> list[Message]:
    """Return a batch of so many messages."""
    batch: list[Message] = []

    def all_there() -> bool:
        batch[:] = broker.receive(number, 0.1)
        return len(batch) == number

    wait_until(all_there, f"{number} messages")
    return batch


def acks_for(batch: list[Message], padding: int = 0) -> list[Reply]:
    """Return an ACK for each message, as ingest() would."""
    return [
        Reply(
            message.topic.replace("/events", "/acks"),
            json.dumps(
                {
                    "event_id": json.loads(message.payload)["event_id"],
                    "status": "stored",
                    "padding": "x" * padding,
                }
            ).encode(),
        )
        for message in batch
    ]


def unread_bytes(server_port: int) -> int:
    """Return how much waits in the kernel for the one client that is connected to this port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    remote = f"0100007F:{server_port:04X}"
    (queues,) = [row[4] for row in rows if row[2] == remote and row[3] == "01"]  # established
    return int(queues.split(":")[1], 16)


def wait_confirmed(broker: Broker) -> None:
    """Read on until the broker has PUBACKed every reply."""

    def confirmed() -> bool:
        broker.wait(0.02)
        broker.receive(1, 0.02)
        return not broker._session.unconfirmed

    wait_until(confirmed, "a PUBACK for each reply")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the ingester has read from or written to the socket by now.

    Each of the two methods makes one call to the kernel. Beside them the PUBACKs that were
    decoded into objects, of this and of every other client.
    """
    counter: Counter[str] = Counter()

    def count(owner: Any, name: str, counts: Callable[[Any], bool]) -> None:
        original = getattr(owner, name)

        def counted(first: Any, *others: Any) -> Any:
            counter[name] += counts(first)
            return original(first, *others)

        monkeypatch.setattr(owner, name, counted)

    count(Client, "read", lambda _: True)
    count(paho.Client, "_sock_send", lambda client: isinstance(client, Client))
    count(_packet, "decode_puback", lambda _: True)
    return counter


def test_a_batch_is_settled_by_one_send_and_read_by_far_fewer_calls_than_it_has_packets(
    pipeline: Pipeline, calls: Counter[str]
) -> None:
    number = 200
    with session(pipeline) as broker:
        with pipeline.device() as device:
            publish(device, range(number))
        calls.clear()
        batch = receive(broker, number)
        assert calls["read"] * 10 < number
        calls.clear()
        broker.settle(batch, acks_for(batch))
        assert calls["_sock_send"] == 1
        assert broker.unsettled == 0
        calls.clear()
        # MQTT 3.1.1, section 3.4: a PUBACK is four bytes.
        port = pipeline.mosquitto.port
        wait_until(lambda: unread_bytes(port) >= 4 * number, f"{number} PUBACKs to be there")
        wait_confirmed(broker)
        assert calls["read"] * 10 < number
        assert calls["decode_puback"] == 0


def prepare(pipeline: Pipeline, statement: str) -> None:
    """Let the ingester do this before anything else."""
    lines = ("import sys", "from ingester import app, broker", statement, "sys.exit(app.main())")
    pipeline.ingester.command[1:] = ["-c", "\n".join(lines)]


def start(pipeline: Pipeline, **environment: str) -> None:
    pipeline.ingester.environment |= environment
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()


def send_mixture(device: Device, numbers: range) -> tuple[int, int]:
    """Send single events, repeats, arrays and bad ones; return how many ACKs and dead letters."""
    acks = letters = 0
    for number in numbers:
        good = event(number, value=number)
        device.send(good, qos=1 if number % 7 else 0)
        acks += 1
        if number % 10 == 0:
            device.send(good)
            acks += 1
        if number % 25 == 0:
            device.send(b'{"schema": 1,')
            acks, letters = acks + 1, letters + 1
        if number % 40 == 0:
            pair = [event(f"{number}-{name}", value=number) for name in "ab"]
            device.send([pair[0], event(number, value=[]), pair[1]])
            device.sent |= {str(item["event_id"]): item for item in pair}
            acks, letters = acks + 3, letters + 1
    return acks, letters


def test_a_mixture_and_a_backlog_of_it_are_stored_and_answered(pipeline: Pipeline) -> None:
    start(pipeline)
    with pipeline.device() as device:
        acks, letters = send_mixture(device, range(500))
        device.wait(lambda: len(device.acks) == acks, f"{acks} ACKs")
        pipeline.ingester.stop()
        more_acks, more_letters = send_mixture(device, range(500, 4000))  # a backlog
        device.wait_taken()
        pipeline.ingester.start()
        device.wait(lambda: len(device.acks) == acks + more_acks, "an ACK for each", 60)
        letters += more_letters
        device.wait(lambda: len(device.dead_letters) == letters, f"{letters} dead letters")
    finding = find("mixture", [device], pipeline.database)
    assert finding.sent == 4000 + 2 * 100
    assert finding.rows == finding.heard_stored == finding.sent
    assert finding.dead_letters == letters
    assert connects(pipeline) == 2


# --- cut at any place --------------------------------------------------------------------


@contextmanager
def tapped(
    pipeline: Pipeline,
    pieces: Iterator[int] | None = None,
    limits: Sequence[int] = (),
) -> Iterator[Tap]:
    """Put a Tap between broker and ingester; the ingester is gone when the block is left."""
    with Tap(pipeline.mosquitto.port, pieces, limits) as tap:
        pipeline.ingester.environment["MQTT_PORT"] = str(tap.port)
        pipeline.environment["MQTT_PORT"] = str(tap.port)
        yield tap
        pipeline.ingester.stop()
    tap.check()


def all_stored(devices: list[Device], pipeline: Pipeline) -> None:
    """Check that all that was sent is stored once and answered, and that nothing was refused."""
    finding = find("", devices, pipeline.database)
    assert finding.rows == finding.heard_stored == finding.sent
    assert finding.dead_letters == 0


def deliver_with_large_ones(pipeline: Pipeline, device: Device, number: int, large: int) -> None:
    """Deliver events in one flood; every so often one whose payload is large, in bytes."""
    for i in range(number):
        text = "x" * (large if i % 100 == 50 else i % 300)
        device.send(event(i, value=i, meta={"text": text}))
    device.wait(lambda: device.heard_at.keys() >= device.sent.keys(), "an ACK for each", 60)
    all_stored([device], pipeline)


@pytest.mark.parametrize("size", first_or_all(["random", 1, 2, 3, 7, 65_535, 65_536, 65_537]))
def test_packets_that_come_in_pieces_are_put_together(pipeline: Pipeline, size: int | str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    randomness = random.Random(seed)
    sizes = (int(2 ** randomness.uniform(0, 17)) for _ in repeat(None))
    small = isinstance(size, int) and size < 10
    with tapped(pipeline, repeat(size) if isinstance(size, int) else sizes) as tap:
        start(pipeline)
        with pipeline.device() as device:
            number, large = (200, 70_000) if small else (2000, 200_000)
            deliver_with_large_ones(pipeline, device, number, large)
    assert connects(pipeline) == 1
    assert len(tap.lines) == 1


@pytest.mark.parametrize("size", first_or_all([192, 1, 2, 3, 7, 191, 193, 65_535, 65_537]))
def test_what_is_read_ahead_may_end_at_any_place(pipeline: Pipeline, size: int) -> None:
    """The kernel never gives more than so many bytes; 192 are a whole packet each time."""
    prepare(pipeline, f"broker.READ_AHEAD_BYTES = {size}")
    with tapped(pipeline) as tap:
        start(pipeline)
        with pipeline.device() as device:
            for i in range(500):
                device.send(event(f"pad-{i:03}", value=i % 10, meta={"pad": "x" * 32}))
            device.wait(lambda: len(device.heard_at) == 500, "an ACK for each", 30)
            deliver_with_large_ones(pipeline, device, 300, 70_000)
    packets = [item for item in tap.lines[0].passed("to_client", PUBLISH) if item.mid]
    # MQTT 3.1.1, section 3.3: three bytes of fixed header, topic with its length, packet id.
    sizes = {3 + 2 + len(item.topic) + 2 + len(item.payload) for item in packets[:500]}
    assert sizes == {192}
    assert connects(pipeline) == 1


# Of packets that paho handles.
NOT_FROM_A_BROKER = {
    "a SUBACK without a code": b"\x90\x02\x00\x01",
    "a SUBACK with a code that there is not": b"\x90\x04\x00\x01\x07\x00",
    "a SUBACK of one byte": b"\x90\x01\x00",
    "a CONNACK of one byte": b"\x20\x01\x00",
    "a PINGRESP with something in it": b"\xd0\x01\x00",
    "a CONNECT": b"\x10\x02\x00\x00",
    "a packet type that there is not": b"\xf0\x00",
}


@pytest.mark.parametrize("what", [*MALFORMED, *NOT_FROM_A_BROKER])
def test_a_connection_that_brings_what_is_not_mqtt_is_ended_and_made_anew(
    pipeline: Pipeline, what: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = {"MQTT_PORT": str(server.getsockname()[1])}
        broker = Broker(Settings.from_env(pipeline.environment | port), last_will=b"{}")

        def somebody_connects() -> bool:
            broker.receive(1, 0.05)
            return bool(select.select([server], [], [], 0)[0])

        wait_until(somebody_connects, "a connection")
        line, _ = server.accept()
        with line:
            # MQTT 3.1.1, section 3.2: CONNACK, no session, accepted.
            line.sendall(b"\x20\x02\x00\x00" + (MALFORMED | NOT_FROM_A_BROKER)[what])
            wait_until(somebody_connects, "another connection")
            assert broker.connection == 1
            assert broker.unsettled == 0
            line.settimeout(5)
            while line.recv(4096):  # CONNECT, SUBSCRIBE, and the end
                pass


# --- cut with something in hand, and a packet begun ---------------------------------------


def test_a_packet_that_a_lost_connection_has_begun_is_not_ended_by_the_next(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Client, "READ_BYTES_MAX", 1_001)
    number = 300
    with (
        tapped(pipeline) as tap,
        pipeline.device() as device,
        session(pipeline, BATCH_MAX="10") as broker,
    ):
        publish(device, range(number))
        batch = receive(broker, 10)

        def has_begun() -> bool:
            if not broker._session._reader._begun:  # a read may end where a packet does
                broker._session.read_available()
            return bool(broker._session._reader._begun)

        wait_until(has_begun, "the beginning of a packet")
        tap.cut()
        # Some of them never came over the first connection, so this is reached by the second.
        delivered: set[bytes] = set()

        def settle_and_receive() -> bool:
            broker.settle(batch, acks_for(batch)) if batch else None
            batch[:] = broker.receive(10, 0.1)
            for message in batch:
                assert message.connection == broker.connection
                if message.connection == 2:
                    delivered.add(message.payload)
            return len(delivered) == number and not batch

        wait_until(settle_and_receive, f"{number} messages over the second connection")
        wait_confirmed(broker)
        device.wait(lambda: len(device.heard_at) == number, "an ACK for each")
    assert len(tap.lines[1].passed("to_server", PUBACK)) == number


def test_a_line_cut_again_and_again_after_any_byte_loses_nothing(pipeline: Pipeline) -> None:
    """In small batches, so that of what was read at once most is not handed out yet."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    randomness = random.Random(seed)
    limits = [randomness.randrange(100, 150_000) for _ in range(8)]
    with tapped(pipeline, limits=limits) as tap, pipeline.device() as device:
        start(pipeline, BATCH_MAX="10")
        publish(device, range(3000), meta={"text": "x" * 200})
        device.wait(lambda: len(device.heard_at) == 3000, "an ACK for each", 60)
        all_stored([device], pipeline)
    assert len(tap.lines) == len(limits) + 1
    assert "Traceback" not in pipeline.ingester.log()


def test_with_much_read_ahead_no_packet_id_of_an_earlier_connection_is_pubacked(
    pipeline: Pipeline,
) -> None:
    """The broker comes back in an older state: it gives the same packet ids to other messages."""
    start(pipeline, BATCH_MAX="10")
    with pipeline.device("old") as old, pipeline.device("new") as new:
        state = saved(pipeline.mosquitto)
        with pipeline.database.locked():
            publish(old, range(300))
            pipeline.database.wait_blocked()
            restart_from(pipeline.mosquitto, state)
            publish(new, range(300))
        new.wait(lambda: new.heard_at.keys() >= new.sent.keys(), "an ACK for each", 30)
        old.deliver(old.sent.values())  # what the older state did not know of
        all_stored([old, new], pipeline)


# --- written in part ---------------------------------------------------------------------

# Bytes. More than fits between two sockets whose reader stands still: with the buffer below
# and what the other one has before anyone reads (net.ipv4.tcp_rmem), not 300 kB do.
PADDING = 4_000
SMALL_SEND_BUFFER = 4_096


def settle_in_part(broker: Broker, number: int) -> None:
    """Settle a batch whose ACKs the socket does not take as a whole."""
    sock = broker._session.socket
    assert isinstance(sock, socket.socket)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_SEND_BUFFER)
    batch = receive(broker, number)
    broker.settle(batch, acks_for(batch, PADDING))
    assert broker._session._client.want_write(), "the socket took it all: this tests nothing"
    assert broker.unsettled == 0


def order_of(items: list[tuple[str, bytes]]) -> list[str]:
    return [json.loads(payload)["event_id"] for _, payload in items]


def test_a_batch_that_a_paused_broker_takes_in_part_is_written_on_when_it_goes_on(
    pipeline: Pipeline,
) -> None:
    number = 300
    with pipeline.device() as device:
        with session(pipeline) as broker:
            publish(device, range(number))
            receive(broker, number)
            pipeline.mosquitto.pause()
            try:
                settle_in_part(broker, number)
                broker.wait(0.1)
                assert broker._session._client.want_write()
            finally:
                pipeline.mosquitto.resume()
            wait_confirmed(broker)
        device.wait(lambda: len(device.acks) == number, "an ACK for each")
        assert order_of(device.messages) == list(device.sent)
        with session(pipeline) as broker:  # nothing is left to be sent again
            publish(device, range(number, number + 1))
            assert [json.loads(item.payload)["value"] for item in receive(broker, 1)] == [number]


@pytest.mark.parametrize("cut", [False, True], ids=["thawed", "cut"])
def test_no_puback_overtakes_its_ack_when_a_batch_is_written_in_part(
    pipeline: Pipeline, cut: bool
) -> None:
    number = 300
    with pipeline.device() as device, tapped(pipeline) as tap:
        with session(pipeline) as broker:
            publish(device, range(number))
            receive(broker, number)
            tap.freeze(to_client=False)
            settle_in_part(broker, number)
            if cut:
                tap.cut()
            tap.thaw()
            if cut:
                wait_until(lambda: broker.receive(1, 0.1) != [], "the batch to come again")
                batch = receive(broker, number)
                assert {message.connection for message in batch} == {2}
                broker.settle(batch, acks_for(batch))
            wait_confirmed(broker)
        device.wait(lambda: len(device.heard_at) == number, "an ACK for each")
    lines = [line.passed("to_server", PUBACK) for line in tap.lines]
    assert [len(line) for line in lines] == ([0, number] if cut else [number])
    sent = [item.kind for item in tap.lines[0].packets if item.direction == "to_server"]
    if not cut:
        kinds = [kind for kind in sent if kind in (PUBLISH, PUBACK)]
        assert kinds[: 2 * number] == [PUBLISH] * number + [PUBACK] * number


# --- while the database works ------------------------------------------------------------


def test_while_the_database_works_a_batch_more_is_taken_in_hand_and_no_more(
    pipeline: Pipeline, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is released by what is called meanwhile: without it, no answer comes in time."""
    monkeypatch.setattr(Client, "READ_BYTES_MAX", 100)  # no two packets at once
    seen: list[int] = []
    with (
        ExitStack() as lock,
        pipeline.device() as device,
        session(pipeline, BATCH_MAX="10") as broker,
    ):
        publish(device, range(100))
        batch = receive(broker, 10)

        class Served:
            """The broker, and how much was in hand each time."""

            @property
            def sockets(self) -> list[Any]:
                return broker.sockets

            def serve(self) -> None:
                broker.serve()
                seen.append(broker.unsettled)
                if len(seen) == 3:
                    lock.close()

        store = Store(database.conninfo, Served())
        store.connect()
        seen.clear()
        lock.enter_context(database.locked())
        item = Event("a", "device-1", 1, "temperature", 21.5, None, "C", None, "{}")
        assert insert(store, [item]) == [Outcome.STORED]
        store.close()
        assert max(seen) == broker.unsettled == 20
        assert broker.receive(10, 0) == batch  # the oldest, as before
        assert broker.sockets == []
        broker.settle(batch, acks_for(batch))
        assert broker.unsettled == 10
        for _ in range(9):
            batch = receive(broker, 10)
            broker.settle(batch, acks_for(batch))
        device.wait(lambda: len(device.acks) == 100, "an ACK for each")
    assert order_of(device.messages) == list(device.sent)


def test_while_the_database_works_the_next_batch_is_decoded(
    pipeline: Pipeline, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is released by decoding: without it, no answer comes in time."""
    decoded: list[str] = []
    with ExitStack() as stack, pipeline.device() as device:
        lock = stack.enter_context(ExitStack())

        def decode(device_id: str, payload: bytes, default_tz: tzinfo) -> Any:
            result = event_module.decode(device_id, payload, default_tz)
            decoded.extend(str(item.event_id) for item in result.results)
            if len(decoded) == 20:
                lock.close()
            return result

        monkeypatch.setattr(decoder_module, "decode_payload", decode)
        daemon = Daemon(Settings.from_env(pipeline.environment | {"BATCH_MAX": "10"}))
        stack.callback(daemon._broker.close, b"{}")
        stack.callback(daemon._store.close)

        def turns_until(condition: Callable[[], bool]) -> Callable[[], bool]:
            def turn() -> bool:
                daemon._turn()
                return condition()

            return turn

        wait_until(turns_until(lambda: daemon._broker.connected), "a subscription")
        # In this order: to connect for the lock is a wait for the database too.
        lock.enter_context(database.locked())
        publish(device, range(30))
        wait_until(turns_until(lambda: len(device.acks) == 30), "an ACK for each")
    assert decoded == list(device.sent)  # each once


def test_what_was_too_much_to_hold_is_sent_again_even_if_each_insert_lets_messages_come_in(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_module, "UNSETTLED_MESSAGES_MAX", 20)
    with pipeline.device() as device, session(pipeline, BATCH_MAX="10") as broker:
        publish(device, range(50))

        def too_much() -> bool:
            broker.wait(0.02)
            return broker._session.in_flight.overflowed

        wait_until(too_much, "more messages than may be held")
        for number in range(100, 110):
            batch = receive(broker, min(10, broker.unsettled))
            publish(device, range(number, number + 1))
            broker.serve()  # as the Store does while the insert of the batch waits
            broker.settle(batch, acks_for(batch))
            if not broker.unsettled:
                break
        assert broker.unsettled == 0, "it is never at an end, so it does not reconnect"

        def settle_rest() -> bool:
            batch = broker.receive(10, 0.1)
            broker.settle(batch, acks_for(batch)) if batch else None
            return device.heard_at.keys() >= device.sent.keys()

        wait_until(settle_rest, "an ACK for each")
        assert broker.connection > 1


def wait_forwarded(tap: Tap, number: int) -> None:
    """Wait until so many messages were forwarded to the ingester."""

    def forwarded() -> bool:
        return sum(bool(item.mid) for item in tap.lines[-1].passed("to_client", PUBLISH)) >= number

    wait_until(forwarded, f"{number} messages to pass")


def test_the_ingester_reads_mqtt_while_its_insert_waits(pipeline: Pipeline) -> None:
    with tapped(pipeline) as tap, pipeline.device() as device:
        start(pipeline)
        with pipeline.database.locked():
            publish(device, range(1))
            pipeline.database.wait_blocked()
            publish(device, range(1, 100))
            wait_forwarded(tap, 100)
            wait_until(lambda: unread_bytes(tap.port) == 0, "the ingester to read it all")
            pipeline.database.wait_blocked()
            assert device.acks == []
        device.wait(lambda: len(device.heard_at) == 100, "an ACK for each")
        all_stored([device], pipeline)
    assert "batch: messages 99, stored 99," in pipeline.ingester.log()


def test_a_line_cut_while_an_insert_waits_brings_the_batch_again_and_no_second_row(
    pipeline: Pipeline,
) -> None:
    with tapped(pipeline) as tap, pipeline.device() as device:
        start(pipeline)
        with pipeline.database.locked():
            publish(device, range(1))
            pipeline.database.wait_blocked()
            publish(device, range(1, 50))
            wait_forwarded(tap, 50)
            tap.cut()
            pipeline.database.wait_blocked()
        device.wait(lambda: len(device.heard_at) == 50, "an ACK for each")
        all_stored([device], pipeline)
    assert [len(line.passed("to_server", PUBACK)) for line in tap.lines] == [0, 50]
    assert " duplicates 1, " in pipeline.ingester.log()  # the one that the insert was about


def test_a_sigterm_while_an_insert_waits_and_messages_come_in_ends_it_with_code_0(
    pipeline: Pipeline,
) -> None:
    with tapped(pipeline) as tap, pipeline.device() as device:
        start(pipeline)
        with pipeline.database.locked():
            publish(device, range(1))
            pipeline.database.wait_blocked()
            with load([device]):
                wait_forwarded(tap, 50)
                assert pipeline.ingester.stop(timeout=5) == 0, pipeline.ingester.log_tail()
        assert "Traceback" not in pipeline.ingester.log()
        assert device.acks == []
        start(pipeline)
        device.wait(lambda: device.heard_at.keys() >= device.sent.keys(), "an ACK for each")
        all_stored([device], pipeline)
