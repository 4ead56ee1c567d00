"""Whatever comes in: payloads for the database, packets for the broker. Bounded, and seeded.

What it does: gives the database every event that decode() lets through, from documents with
the most unusual values there are; and throws mutated MQTT packets, and random payloads on
random topics, at the real broker with the real ingester behind it. What it does not: fuzz
decode() alone; test_event.py does.

Invariant: what the broker accepted is a row or a dead letter, counted at the senders and by
an observer of the broker's, not by the ingester.
"""

import itertools
import json
import random
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingester.event import Event, decode
from ingester.rejection import Rejection
from ingester.store import Outcome, Store
from tests.support.device import event
from tests.support.load import connects
from tests.support.pipeline import Database, Pipeline, insert, wait_until
from tools.process import clean_environment

_number = itertools.count()
SEED = 20261123
LOOPBACK = "127.0.0.1"

# --- events, for the database ------------------------------------------------------------

NUMBERS = st.sampled_from(
    [
        *("0", "-0", "-0.0", "1e308", "-1.7976931348623157e308", "5e-324", "1e-400", "1e23"),
        *("9007199254740993", "1" * 300, "0.1", "1E+2", "1e-0", "1" * 4_000),
        "0." + "0" * 20_000 + "1",
    ]
) | st.floats(allow_nan=False, allow_infinity=False).map(repr)
# Without halves of surrogate pairs and U+0000, which are refused.
CHARS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
PLAIN = st.characters(exclude_categories=["Cs", "Cc"])
NAMES = st.text(PLAIN, min_size=1, max_size=50).map(json.dumps)
TEXTS = st.text(CHARS, max_size=30).map(json.dumps) | st.sampled_from(
    ['""', '"\\ud83d\\ude00"', '"\\\\u0000"', '"\\u2028"', '"\ufeff"']
)
REFUSED = st.sampled_from(['"\\u0000"', '"\\ud800"', "1e400", "null"])  # the last one is not
SCALARS = NUMBERS | TEXTS | st.sampled_from(["null", "true", "false"])
MEMBERS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(TEXTS, inner), max_size=4).map(
            lambda items: "{" + ",".join(f"{key}:{value}" for key, value in items) + "}"
        )
    ),
    max_leaves=12,
)
DEEP = st.integers(1, 33).map(lambda depth: '{"":' * depth + "1" + "}" * depth)
METAS = st.lists(st.tuples(TEXTS, MEMBERS), max_size=5).map(
    lambda items: "{" + ",".join(f"{key}:{value}" for key, value in items) + "}"
)
MOMENTS = st.sampled_from(
    [
        *("0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", "0001-01-01T00:00:00-14:00"),
        *("9999-12-31T23:59:59+14:00", "1883-11-18T12:03:58", "2026-03-29T02:30:00", "2026-02-30T"),
        *("1969-12-31T23:59:59.9999999Z", "2016-12-31T23:59:60Z", "infinity", "now"),
    ]
).map(json.dumps) | st.datetimes().map(lambda moment: json.dumps(moment.isoformat()))


FRESH = "<fresh>"  # where a new id goes, each time that the payload is used


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Make an event with unusual values; one in four is damaged as well."""
    fields = {
        "schema": "1",
        "event_id": draw(st.just(f'"{FRESH}"') | st.just(f'"{FRESH}"') | NAMES),
        "device_id": '"device-1"',
        "event_type": draw(NAMES),
        "value": draw(NUMBERS | TEXTS | REFUSED),
        "unit": draw(NAMES),
        "ts_device": draw(st.just("null") | MOMENTS),
        "meta": draw(METAS | METAS | DEEP | REFUSED.map(lambda text: f'{{"a": [{text}]}}')),
    }
    text = ",".join(f'"{name}":{value}' for name, value in fields.items())
    payload = bytearray(f"{{{text}}}".encode("utf-8", "surrogatepass"))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(payload) - 1))
        payload[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(payload)


@pytest.fixture
def store(database: Database) -> Iterator[Store]:
    store = Store(database.conninfo)
    store.connect()
    yield store
    store.close()


@pytest.mark.faults
@given(st.lists(payloads(), min_size=10, max_size=40), st.sampled_from(["UTC", "Asia/Kolkata"]))
@settings(
    deadline=None,
    max_examples=150,
    derandomize=True,
    suppress_health_check=[*HealthCheck],  # one database for all examples is as meant
)
def test_whatever_is_accepted_the_database_takes_and_gives_back_as_it_was(
    store: Store, batch: list[bytes], zone: str
) -> None:
    events = []
    for payload in batch:
        payload = payload.replace(FRESH.encode(), b"fuzz-%d" % next(_number))
        results = decode("device-1", payload, ZoneInfo(zone)).results
        events += [result for result in results if isinstance(result, Event)]
    first = insert(store, events)
    refused = [item for item in zip(first, events, strict=True) if isinstance(item[0], Rejection)]
    assert not refused
    # Compared with its row, each is what it was: nothing was rounded, cut or changed.
    second = [Outcome.DUPLICATE if item is Outcome.STORED else item for item in first]
    assert insert(store, events) == second


# --- packets, for the broker -------------------------------------------------------------


def packet(first_byte: int, body: bytes) -> bytes:
    """MQTT 3.1.1, section 2.2: the type and flags, the length in 7-bit groups, the rest."""
    length, groups = len(body), bytearray()
    while True:
        length, group = divmod(length, 128)
        groups.append(group | (0x80 if length else 0))
        if not length:
            return bytes([first_byte]) + bytes(groups) + body


def string(text: bytes) -> bytes:
    return len(text).to_bytes(2, "big") + text


def connect(client_id: bytes, level: int = 4) -> bytes:
    properties = b"\0" if level == 5 else b""
    return packet(0x10, string(b"MQTT") + bytes([level, 2, 0, 60]) + properties + string(client_id))


def publish(topic: bytes, payload: bytes, mid: int) -> bytes:
    return packet(0x32, string(topic) + mid.to_bytes(2, "big") + payload)  # QoS 1


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Damage one to four places."""
    mutable = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(mutable) + 1)
        cut = rng.choice([0, 0, 1, 1, 2, 20])
        junk = rng.choice([b"\0", b"\xff", b"\xff\xff\xff\x7f", b"\x80" * 4, b"+", b"#", b"\xc0"])
        mutable[at : at + cut] = rng.choice([junk, rng.randbytes(rng.randrange(4)), b""])
    return bytes(mutable)


def valid(number: int | str, device_id: str = "device-1") -> bytes:
    return json.dumps(event(number, device_id, value=1, meta={"a": [1, "\u00fc"]})).encode()


def some_publish(rng: random.Random, number: int) -> bytes:
    topic = rng.choice([b"qs/v1/device-1/events", b"qs/v1/x/events", b"qs/v1/\xff/events", b"x"])
    payload = rng.choice([valid(f"p{number}"), rng.randbytes(rng.randrange(40))])
    flags = rng.choice([0x30, 0x31, 0x32, 0x33, 0x34, 0x3A, 0x3B])  # QoS, DUP, retain
    return packet(flags, string(topic) + b"\0\x07" + payload)


def some_packet(rng: random.Random) -> bytes:
    topics = [b"#", b"qs/#", b"a/+/b", b"qs/v1/x/events", b"$SYS/#"]
    return rng.choice(
        [
            packet(0x82, b"\0\x01" + string(rng.choice(topics)) + b"\1"),
            packet(0xA2, b"\0\x02" + string(b"#")),
            packet(rng.choice([0x40, 0x50, 0x62, 0x70, 0x90, 0xB0, 0xC0, 0xD0]), b"\0\x01"),
            packet(rng.randrange(256), rng.randbytes(rng.randrange(30))),
            connect(b"again"),
        ]
    )


def throw_packets(rng: random.Random, port: int, number: int) -> None:
    """Make a connection, publish a little, and then send damaged packets until it is ended."""
    with socket.create_connection((LOOPBACK, port), timeout=15) as sock, suppress(OSError):
        opening = connect(f"fuzz-{number}".encode(), rng.choice([4] * 8 + [5, 3, 0xFF]))
        sock.sendall(mutated(rng, opening) if rng.random() < 0.2 else opening)
        sock.settimeout(0.1)
        for _ in range(rng.randrange(5)):
            sock.sendall(some_publish(rng, number))
        sock.recv(65_536)
        for _ in range(rng.randrange(8)):
            one = rng.choice([some_publish(rng, number), some_packet(rng)])
            sock.sendall(mutated(rng, one) if rng.random() < 0.6 else one)
        if rng.random() < 0.5:
            sock.sendall(packet(0xE0, b""))  # DISCONNECT
            while sock.recv(65_536):
                pass


DEVICE_IDS = ["device-1", "x" * 65, "ü", "😀", " ", "", "%s", "{device_id}", "a.b:c_d", "'", "$x"]


def publish_counted(rng: random.Random, port: int, begin: int, count: int) -> list[bytes]:
    """Publish well-formed packets with whatever in them; return the payloads PUBACKed."""
    sent = []
    with socket.create_connection((LOOPBACK, port), timeout=15) as sock:
        sock.sendall(connect(f"counted-{begin}".encode()))
        for number in range(begin, begin + count):
            device_id = rng.choice(["device-1", rng.choice(DEVICE_IDS)])
            good = valid(number, device_id)
            payload = rng.choice(
                [
                    good,
                    mutated(rng, good),
                    good[: rng.randrange(99)],
                    rng.randbytes(rng.randrange(60)),
                    b"%d" % number,
                ]
            )
            topic = f"qs/v1/{device_id}/events".encode()
            sock.sendall(publish(topic, payload, number - begin + 1))
            sent.append(payload)
        # MQTT 3.1.1, sections 3.2 and 3.4: each answer, CONNACK and PUBACK, has four bytes.
        answers = b""
        while len(answers) < 4 * (1 + count):
            chunk = sock.recv(65_536)
            assert chunk, "the broker has ended an honest connection"
            answers += chunk
    acked = {int.from_bytes(answers[at + 2 : at + 4], "big") for at in range(4, len(answers), 4)}
    assert acked == set(range(1, count + 1))
    return sent


@contextmanager
def observer(port: int, log_file: Path) -> Iterator[Path]:
    """Let mosquitto_sub write down the payload of each event the broker hands on, in hex."""
    command = [
        "stdbuf",
        "-oL",
        "mosquitto_sub",
        "-h",
        LOOPBACK,
        "-p",
        str(port),
        "-q",
        "1",
        "-F",
        "%x",
    ]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "-d", "-F", "%x", "-t", "qs/v1/+/events"],
            env=clean_environment(),
            stdout=log,
        )
    try:
        wait_until(lambda: "SUBACK" in log_file.read_text(), "the observer to subscribe")
        yield log_file
    finally:
        process.terminate()
        process.wait(15)


def observed(log_file: Path) -> Counter[bytes]:
    lines = log_file.read_text().splitlines()
    return Counter(bytes.fromhex(line) for line in lines if set(line) <= set("0123456789abcdef"))


def event_id_of(payload: bytes) -> Any:
    with suppress(ValueError):
        document = json.loads(payload)
        return document.get("event_id") if isinstance(document, dict) else None
    return None


def test_after_damaged_packets_and_payloads_all_that_the_broker_took_is_kept(
    running: Pipeline, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    port, database = running.mosquitto.port, running.database
    counted: Counter[bytes] = Counter()
    with observer(port, tmp_path / "observed") as log_file:
        for number in range(400):
            throw_packets(rng, port, number)
            if number % 20 == 0:
                counted.update(publish_counted(rng, port, 1_000 * (number + 1), 100))
        with running.device("honest", hears="honest") as device:
            assert device.ask(event(1, "honest"))["status"] == "stored"

        def kept() -> Counter[bytes]:
            rows = database.query("SELECT payload, times FROM dead_letters")
            found: Counter[bytes] = Counter()
            for payload, times in rows:
                found[bytes(payload)] += times
            return found

        def missing() -> Counter[bytes]:
            """What the broker handed on, and is neither a dead letter nor a row."""
            ids = {row[0] for row in database.query("SELECT event_id FROM events")}
            left = observed(log_file) - kept()
            return Counter(p for p in left.elements() if event_id_of(p) not in ids)

        wait_until(lambda: not counted - observed(log_file), "the observer", 30)
        wait_until(lambda: not missing(), "all to be kept", 30)
        # And nothing was kept that nobody sent.
        assert not kept() - observed(log_file)
        assert sum(observed(log_file).values()) > sum(counted.values())
    assert sum(counted.values()) == 2_000
    assert running.ingester.running, running.ingester.log_tail()
    assert running.mosquitto.running, running.mosquitto.log_tail()
    assert connects(running) == 1, running.ingester.log_tail()
    assert "WARNING" not in running.ingester.log()
