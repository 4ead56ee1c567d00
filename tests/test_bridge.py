"""The bridge as a program: its options, what it stores, and what it keeps through every fault.

What it does: runs it between real brokers, with the real ingester and database behind it. What it
does not: look at formats; test_bridge_translate.py does.

Invariant: what is lost or double is counted at the sender and on the wire.
"""

import itertools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import client as paho
from paho.mqtt import publish
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.bridge import Bridge, Firmware, numbers_pubacked
from tests.support.certificates import Authority
from tests.support.findings import Finding
from tests.support.pipeline import Pipeline, wait_until
from tests.support.tap import PUBACK, Tap
from tools.process import CHECKOUT, clean_environment, free_port
from tools.stack import Mosquitto

ZIGBEE = '[[source]]\npreset = "zigbee2mqtt"\n'


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "devices.bridge", *arguments],
        cwd=CHECKOUT,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def send(mosquitto: Mosquitto, topic: str, payload: str | bytes, **how: Any) -> None:
    publish.single(topic, payload, **{"qos": 1, **how}, port=mosquitto.port)


# --- the command line -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[[source]\n", "not TOML: "),
        ("", "no [[source]]"),
        ('[[source]]\npreset = "tasmote"\n', "source 1: preset: 'tasmote' is none of zigbee2mqtt"),
        (ZIGBEE + '[[source]]\nprest = "x"\n', "source 2: prest: unknown; known are preset"),
        (ZIGBEE + 'timezone = "Berlin"\n', "source 1: timezone: 'Berlin' is no IANA time zone"),
        (ZIGBEE + "leave = 3\n", "source 1: leave: expected a list of texts, got 3"),
        (ZIGBEE + 'prefix = "a/#"\n', "source 1: prefix: expected levels of a topic"),
        (ZIGBEE + 'topic = "a/b"\n', "source 1: topic: no {device} in it"),
        (ZIGBEE + 'topic = "a/{x"\n', "source 1: topic: '{x'"),
        (ZIGBEE + "[broker]\nport = 1\n", "broker: host: missing"),
        (ZIGBEE + '[broker]\nhost = "h"\nport = 0\n', "broker: port: expected a whole number"),
        # A loop: what it reads would be what the stack writes.
        (ZIGBEE + 'prefix = "qs"\n', "source 1: it would read qs/v1/+/events"),
        (
            '[[source]]\ntopic = "{a}/v1/{device}/{b...}"\n',
            "source 1: it would read qs/v1/+/events",
        ),
        ('[[source]]\ntopic = "qs/v1/{device}/acks"\n', "source 1: it would read qs/v1/+/acks"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text(text)
    ended = run(str(file))
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"bridge: {file}: {line}")
    assert ended.stderr.count("\n") == 1


def test_a_loop_at_another_broker_is_none(tmp_path: Path) -> None:
    file = tmp_path / "bridge.toml"
    file.write_text('[broker]\nhost = "elsewhere"\n' + ZIGBEE + 'prefix = "qs"\n')
    assert run(str(file), "--try", "/dev/null").returncode == 0


def test_all_presets_together_are_no_loop(tmp_path: Path) -> None:
    from devices.bridge.presets import PRESETS

    file = tmp_path / "bridge.toml"
    file.write_text("".join(f'[[source]]\npreset = "{name}"\n' for name in PRESETS))
    assert run(str(file), "--try", "/dev/null").stderr == ""


def test_the_shipped_configuration_can_be_run() -> None:
    ended = run("--try", str(CHECKOUT / "tests/data/foreign.jsonl"))
    assert ended.stderr == ""
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(lines) == 55
    assert lines[0]["events"][0]["device_id"] == "living_room_climate"
    assert sum(bool(line["events"]) for line in lines) > 10


def test_a_line_that_is_no_recorded_message_is_told(tmp_path: Path) -> None:
    file = tmp_path / "recorded.jsonl"
    file.write_text('{"topic":"a"}\nnothing\n')
    ended = run("--try", str(file))
    assert ended.returncode == 2
    assert f"{file}: line 2: no recorded message" in ended.stderr


# --- messages in, rows out ----------------------------------------------------------------


@pytest.fixture
def theirs(servers: Any) -> Iterator[Mosquitto]:
    """The broker that the other firmware publishes to."""
    mosquitto = Mosquitto(servers.folder / f"theirs-{free_port()}", free_port(), free_port())
    mosquitto.start()
    mosquitto.wait_ready()
    yield mosquitto
    mosquitto.stop()


@pytest.fixture
def bridges() -> Iterator[ExitStack]:
    with ExitStack() as cleanup:
        yield cleanup


def start(
    bridges: ExitStack, pipeline: Pipeline, text: str, their_port: int | None = None
) -> Bridge:
    folder = pipeline.ingester.log_file.parent / "bridge"
    bridge = Bridge(folder, pipeline.mosquitto.port, text, their_port)
    bridges.callback(bridge.kill)
    bridge.start()
    bridge.wait_ready()
    return bridge


def rows(pipeline: Pipeline) -> list[tuple[Any, ...]]:
    return pipeline.database.query(
        "SELECT device_id, event_type, value_num, value_text, unit, ts_device::text"
        " FROM events ORDER BY device_id, event_type, value_num"
    )


def test_a_message_becomes_rows(running: Pipeline, bridges: ExitStack) -> None:
    bridge = start(bridges, running, ZIGBEE)
    text = '{"temperature":21.34,"state":"ON","last_seen":"2026-02-10T08:15:42.117Z"}'
    for _ in range(2):  # sent twice
        send(running.mosquitto, "zigbee2mqtt/living room", text)
    send(running.mosquitto, "zigbee2mqtt/living room", '{"temperature":null}')
    send(running.mosquitto, "zigbee2mqtt/living room/set", '{"state":"OFF"}')
    send(running.mosquitto, "zigbee2mqtt/x", '{"action":"single"}')
    send(running.mosquitto, "zigbee2mqtt/x", '{"action":"single"}')  # pressed twice
    running.database.wait_count("events", 4)
    time_text = "2026-02-10 08:15:42.117+00"
    assert rows(running) == [
        ("living_room", "state", None, "ON", None, time_text),
        ("living_room", "temperature", 21.34, None, "°C", time_text),
        ("x", "action", None, "single", None, None),
        ("x", "action", None, "single", None, None),
    ]
    assert bridge.stop() == 0
    assert "messages 6" in bridge.log()
    assert running.database.count("events") == 4


def test_try_prints_the_bytes_that_are_sent(
    running: Pipeline, bridges: ExitStack, tmp_path: Path
) -> None:
    topic = "zigbee2mqtt/K\u00fcche"
    text = '{"temperature":21.34,"state":"\u201eAn\u201c","last_seen":"2026-02-10T08:15:42.117Z"}'
    heard: list[bytes] = []
    listener = paho.Client(CallbackAPIVersion.VERSION2)
    listener.on_message = lambda _client, _user, message: heard.append(bytes(message.payload))
    listener.connect("127.0.0.1", running.mosquitto.port)
    listener.subscribe("qs/v1/+/events", 1)
    listener.loop_start()
    bridges.callback(listener.loop_stop)
    start(bridges, running, ZIGBEE)
    send(running.mosquitto, topic, text)
    wait_until(lambda: bool(heard), "the events")
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text(json.dumps({"topic": topic, "payload": text}))
    (line,) = run("--try", str(recorded)).stdout.splitlines()
    assert f'"events": {heard[0].decode()}' in line


def test_messages_of_all_lengths_are_read_wherever_they_are_cut(
    running: Pipeline, theirs: Mosquitto, bridges: ExitStack
) -> None:
    randomness = random.Random(18)
    sizes = itertools.chain(range(1, 400), iter(lambda: randomness.choice((1, 3, 900, 20_000)), 0))
    tap = bridges.enter_context(Tap(theirs.port, pieces=sizes))
    bridge = start(bridges, running, ZIGBEE, tap.port)
    # One, two and three bytes of length; the topic and the packet id count, too.
    lengths = [9, *range(90, 130), *range(16_345, 16_385, 3), 60_000]
    for number, length in enumerate(lengths):
        text = f'{{"n":{number}}}'.ljust(length)
        send(theirs, "zigbee2mqtt/K\u00fcche", text)
    running.database.wait_count("events", len(lengths))
    assert [row[2] for row in rows(running)] == list(range(len(lengths)))
    wait_until(lambda: len(pubacked_ids(tap)) == len(lengths), "each to be PUBACKed")
    assert bridge.stop() == 0


def test_stored_copies_are_skipped_and_teach_units(running: Pipeline, bridges: ExitStack) -> None:
    listed = [{"friendly_name": "a", "definition": {"exposes": [{"property": "v", "unit": "mV"}]}}]
    send(running.mosquitto, "zigbee2mqtt/bridge/devices", json.dumps(listed), retain=True)
    send(running.mosquitto, "zigbee2mqtt/a", '{"v":1}', retain=True)
    start(bridges, running, ZIGBEE)
    send(running.mosquitto, "zigbee2mqtt/a", '{"v":2}')
    running.database.wait_count("events", 1)
    assert [(row[2], row[4]) for row in rows(running)] == [(2.0, "mV")]


def test_sources_whose_topics_overlap_store_each_message_once(
    running: Pipeline, bridges: ExitStack
) -> None:
    text = ZIGBEE + '[[source]]\npreset = "esphome"\n[[source]]\npreset = "ha-statestream"\n'
    start(bridges, running, text)
    send(running.mosquitto, "statestream/sensor/kitchen/state", "1")
    send(running.mosquitto, "node/sensor/kitchen/state", "2")
    send(running.mosquitto, "zigbee2mqtt/sensor/kitchen/state", "3")
    running.database.wait_count("events", 3)
    send(running.mosquitto, "node/sensor/kitchen/state", "4")
    running.database.wait_count("events", 4)


def test_another_configuration_leaves_no_subscription_behind(
    running: Pipeline, bridges: ExitStack
) -> None:
    esphome = '[[source]]\npreset = "esphome"\n'
    bridge = start(bridges, running, ZIGBEE + esphome)
    assert bridge.stop() == 0
    bridge = start(bridges, running, esphome)
    send(running.mosquitto, "zigbee2mqtt/kitchen", '{"v":1}')
    send(running.mosquitto, "node/sensor/kitchen/state", "2")
    running.database.wait_count("events", 1)
    assert bridge.stop() == 0
    assert "messages 1;" in bridge.log()


def test_the_other_broker_is_read_over_tls(
    running: Pipeline, servers: Any, bridges: ExitStack, tmp_path: Path
) -> None:
    port = free_port()
    theirs = Mosquitto(servers.folder / f"theirs-{port}", free_port(), free_port())
    authority = Authority(theirs.folder / "ca")
    own = authority.issue("broker")
    theirs.extra_config = (
        f"listener {port} 127.0.0.1\ncertfile {own.cert}\nkeyfile {own.key}\nallow_anonymous true"
    )
    bridges.callback(theirs.stop)
    theirs.start()
    theirs.wait_ready()
    ca_file = tmp_path / "ca.crt"  # the broker's folder is its own
    ca_file.write_bytes(authority.cert.read_bytes())
    start(bridges, running, f'ca_file = "{ca_file}"\n{ZIGBEE}', port)
    # More than a record of TLS, and than is read at once.
    messages: list[Any] = [("zigbee2mqtt/a", f'{{"n":{n}}}'.ljust(900), 1) for n in range(400)]
    publish.multiple(messages, port=theirs.port)
    running.database.wait_count("events", len(messages))
    assert [row[2] for row in rows(running)] == list(range(len(messages)))


def test_garbage_stops_nothing(running: Pipeline, bridges: ExitStack) -> None:
    bridge = start(bridges, running, ZIGBEE + '[[source]]\npreset = "tasmota"\n')
    randomness = random.Random(20261126)
    for topic in ("zigbee2mqtt/x", "tele/x/SENSOR", "zigbee2mqtt/bridge/devices"):
        for payload in (
            randomness.randbytes(1_000),
            b'{"a":' + b"[" * 100_000,
            json.dumps({str(key): key for key in range(10_000)}).encode(),
            b'{"a":"' + b"x" * 1_000_000 + b'"}',
            b"\xff\xfe{",
            b"",
        ):
            send(running.mosquitto, topic, payload)
    send(running.mosquitto, "zigbee2mqtt/y", '{"v":1}')
    running.database.wait_count("events", 1)
    assert bridge.running
    assert bridge.log().count("not JSON") <= 2


def test_what_cannot_become_a_reading_is_a_dead_letter(
    running: Pipeline, bridges: ExitStack
) -> None:
    bridge = start(bridges, running, '[[source]]\npreset = "tasmota"\n')
    running.ingester.kill()
    for _ in range(3):
        send(running.mosquitto, "tele/plug/SENSOR", '{"Time":"2026-02-10T08:00:00","ENERGY":{"P')
    bridge.wait_for_log("not JSON: tele/plug/SENSOR")
    bridge.kill()
    bridge.start()
    running.ingester.start()
    running.database.wait_count("dead_letters", 1)
    ((device_id, text),) = running.database.query(
        "SELECT device_id, convert_from(payload, 'UTF8') FROM dead_letters"
    )
    assert device_id == "plug"
    assert json.loads(text)["value"]["payload"].endswith('"ENERGY":{"P')
    assert running.database.count("events") == 0


def test_victron_is_asked_to_publish(running: Pipeline, bridges: ExitStack) -> None:
    text = '[[source]]\npreset = "victron"\nportal = "0200c0ffee05"\n'
    heard: list[str] = []
    listener = paho.Client(CallbackAPIVersion.VERSION2)
    listener.on_message = lambda _client, _user, message: heard.append(message.topic)
    listener.connect("127.0.0.1", running.mosquitto.port)
    listener.subscribe("R/#")
    listener.loop_start()
    bridges.callback(listener.loop_stop)
    start(bridges, running, text)
    wait_until(lambda: heard == ["R/0200c0ffee05/keepalive"], "a keep-alive")


def pubacked_ids(tap: Tap) -> set[int]:
    return {packet.mid for line in tap.lines for packet in line.passed("to_server", PUBACK)}


# --- faults ---------------------------------------------------------------------------------


def check(pipeline: Pipeline, tap: Tap) -> tuple[int, int]:
    """Check that what was PUBACKed is one row each; return how many were, and how many are rows."""
    wanted = set(numbers_pubacked([tap]))

    def stored() -> Counter[int]:
        found = pipeline.database.query("SELECT value_num::int FROM events WHERE event_type = 'n'")
        return Counter(number for (number,) in found)

    wait_until(lambda: wanted <= stored().keys(), "each PUBACKed message to be a row", 100)
    double = [number for number, count in stored().items() if count > 1]
    assert not double, f"{len(double)} of {len(wanted)} are two rows: {double[:10]}"
    assert len(wanted) > 100
    return len(wanted), len(stored())


FAULTS = {
    "bridge": "bridge killed",
    "bridge politely": "bridge stopped",
    "ingester": "ingester killed",
    "database": "database killed",
    "our broker": "broker of the stack killed",
    "their broker": "broker of the firmware killed",
    "line": "line to the firmware's broker cut",
}
TIMES = 4


@pytest.mark.parametrize("is_killed", [False, True], ids=["cut off", "killed"])
def test_what_was_kept_and_not_pubacked_is_known_when_it_is_delivered_again(
    running: Pipeline, theirs: Mosquitto, bridges: ExitStack, is_killed: bool
) -> None:
    tap = bridges.enter_context(Tap(theirs.port))
    bridge = start(bridges, running, ZIGBEE, tap.port)
    tap.freeze(to_client=False)  # no PUBACK comes through
    for _ in range(3):
        send(theirs, "zigbee2mqtt/button", '{"action":"single"}')
    running.database.wait_count("events", 3)
    if is_killed:
        bridge.kill()
    tap.cut()
    tap.thaw()
    if is_killed:
        bridge.start()
    wait_until(lambda: len(pubacked_ids(tap)) == 3, "three PUBACKs")
    send(theirs, "zigbee2mqtt/button", '{"action":"double"}')
    running.database.wait_count("events", 4)
    assert bridge.stop() == 0
    assert "delivered again 3" in bridge.log()


@pytest.mark.faults
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("fault", "timed"),
    [*((fault, False) for fault in FAULTS), ("bridge", True), ("their broker", True)],
)
def test_what_was_pubacked_is_stored_once_through(
    running: Pipeline,
    theirs: Mosquitto,
    bridges: ExitStack,
    fault: str,
    timed: bool,
    report: Callable[[Finding], None],
) -> None:
    randomness = random.Random(fault)
    tap = bridges.enter_context(Tap(theirs.port))
    bridge = start(bridges, running, ZIGBEE, tap.port)
    firmware = Firmware(theirs.port, per_second=300, timed=timed)
    bridges.callback(firmware.close)
    for _ in range(TIMES):
        time.sleep(randomness.uniform(0.3, 1.2))
        if fault == "bridge":
            bridge.kill()
            bridge.start()
            bridge.wait_ready()
        elif fault == "bridge politely":
            assert bridge.stop() == 0
            bridge.start()
            bridge.wait_ready()
        elif fault == "ingester":
            running.ingester.kill()
            running.ingester.start()
        elif fault == "database":
            running.database.postgres.kill()
            running.database.postgres.start()
            running.database.postgres.wait_ready()
        elif fault == "our broker":
            running.mosquitto.kill()
            running.mosquitto.start()
            running.mosquitto.wait_ready()
        elif fault == "their broker":
            theirs.kill()
            theirs.start()
            theirs.wait_ready()
        else:
            tap.cut()
    # What their broker loses when it is killed, it has never handed out: wait until it hands out
    # what was sent after the last fault.
    after = firmware.sent
    wait_until(lambda: max(numbers_pubacked([tap])) > after, "a later one to be PUBACKed", 60)
    firmware.stop()
    last = firmware.sent
    wait_until(lambda: last in numbers_pubacked([tap]), "the last one to be PUBACKed", 60)
    pubacked, stored = check(running, tap)
    assert fault == "their broker" or pubacked == firmware.sent
    case = f"bridge: {FAULTS[fault]}, {TIMES} times{', messages with a time' if timed else ''}"
    report(Finding(case, firmware.sent, pubacked, stored, 0))
