"""The simulated devices against the real broker, ingester and database.

What it does: runs devices/simulator.py as a person does, breaks something meanwhile, and
compares what it says with the rows. What it does not: run it in Compose (test_compose.py).
"""

import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from devices.simulator import IN_FLIGHT_MAX, OUTBOX_MAX, Parser, measure, read_settings
from tests.support.certificates import Authority
from tests.support.each import first_or_all
from tests.support.load import database_down
from tests.support.pipeline import Database, Pipeline, wait_until
from tests.support.tap import PUBLISH, Tap
from tools.process import CHECKOUT, clean_environment, free_port, run
from tools.stack import Mosquitto, Stack

# MQTT 3.1.1, section 2.2.1.
CONNECT, SUBSCRIBE = 1, 8
SIMULATOR = CHECKOUT / "devices/simulator.py"
PASSWORD = "the device's own"
SENSORS = {("temperature", "C"), ("humidity", "%"), ("door", None), ("button", None)}


class Result(NamedTuple):
    """How a simulator ended: its exit code, what it counted, what it said."""

    code: int
    counts: dict[str, int]
    output: str
    errors: str


@contextmanager
def started(*options: object, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a simulator; it has ended when the block is left."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(SIMULATOR), *map(str, options)],
        env=clean_environment() | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> Result:
    """Wait for the end of a simulator."""
    output, errors = process.communicate(timeout=60)
    last = output.splitlines()[-2] if output else ""
    words = {"events": "made", "sent again": "resent", "ACKs lost": "lost"}
    found = re.findall(
        r"(\d+) (events|stored|rejected|waiting|dropped|sent again|ACKs lost|of)", last
    )
    counts = {words.get(name, name): int(number) for number, name in found}
    return Result(process.returncode, counts, output, errors)


def simulate(*options: object, **variables: str) -> Result:
    with started(*options, **variables) as process:
        return ended(process)


@pytest.fixture
def broker(pipeline: Pipeline) -> list[object]:
    """The options that lead to the pipeline's broker."""
    return ["--host", "127.0.0.1", "--port", pipeline.mosquitto.port]


def duplicates(pipeline: Pipeline) -> int:
    """How often the ingester says that it found an event that was a row already."""
    counts = re.findall(r"DEBUG batch: .*duplicates (\d+)", pipeline.ingester.log())
    return sum(map(int, counts))


def ids(pipeline: Pipeline) -> list[str]:
    return [row[0] for row in pipeline.database.query("SELECT event_id FROM events")]


def per_device(pipeline: Pipeline) -> dict[str, int]:
    return dict(pipeline.database.query("SELECT device_id, count(*) FROM events GROUP BY 1"))


# --- the promise ---------------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1])
def test_with_a_third_of_the_acks_lost_every_event_is_one_row(
    running: Pipeline, broker: list[object], qos: int
) -> None:
    options = ["--devices", 3, "--count", 25, "--rate", 100, "--loss", 0.3, "--resend", 0.1]
    result = simulate(*broker, *options, "--qos", qos)
    assert result.code == 0, result
    assert result.output.endswith("every event is stored\n")
    assert per_device(running) == {"sim-001": 25, "sim-002": 25, "sim-003": 25}
    assert running.database.count("dead_letters") == 0
    assert result.counts["made"] == result.counts["stored"] == 75
    assert result.counts["waiting"] == result.counts["rejected"] == result.counts["dropped"] == 0
    # For each lost ACK the event was sent again, and what was sent again was a duplicate.
    assert 0 < result.counts["lost"] <= result.counts["resent"]
    assert 0 < result.counts["resent"] == duplicates(running)


@pytest.mark.parametrize("qos", [0, 1])
def test_a_device_asks_for_its_acks_first_and_sends_the_very_same_bytes_again(
    pipeline: Pipeline, qos: int
) -> None:
    with Tap(pipeline.mosquitto.port) as tap:
        where = ["--host", "127.0.0.1", "--port", tap.port, "--devices", 1]
        options = ["--count", 2, "--rate", 100, "--resend", 0.2, "--patience", 2, "--qos", qos]
        result = simulate(*where, *options)
    # After 0.2, 0.6 and 1.4 s; it would be 8 or 10 times if the wait did not grow.
    assert 2 <= result.counts["resent"] / 2 <= 5
    assert len(tap.lines) == 1
    kinds = [item.kind for item in tap.lines[0].packets if item.direction == "to_server"]
    assert kinds[:3] == [CONNECT, SUBSCRIBE, PUBLISH]
    events = tap.lines[0].passed("to_server", PUBLISH)
    assert len(events) == 2 + result.counts["resent"]
    assert {item.topic for item in events} == {"qs/v1/sim/events"}
    assert len({item.payload for item in events}) == 2
    assert [item.mid > 0 for item in events] == [qos == 1] * len(events)


def test_without_trouble_nothing_is_sent_twice(running: Pipeline, broker: list[object]) -> None:
    result = simulate(*broker, "--devices", 20, "--count", 20, "--rate", 20)
    assert result.code == 0, result
    assert result.counts["resent"] == duplicates(running) == 0
    assert running.database.count() == 400
    assert "20 of 20 connected" in result.output


def restart_broker(pipeline: Pipeline) -> None:
    pipeline.mosquitto.stop()
    pipeline.mosquitto.start()
    pipeline.mosquitto.wait_ready()


def restart_database(pipeline: Pipeline) -> None:
    with database_down(pipeline.database):
        pass


def kill_broker(pipeline: Pipeline) -> None:
    pipeline.mosquitto.kill()  # with all that it had in memory
    pipeline.mosquitto.start()
    pipeline.mosquitto.wait_ready()


def kill_ingester(pipeline: Pipeline) -> None:
    pipeline.ingester.kill()
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()


@pytest.mark.parametrize(
    ("fault", "qos"),
    first_or_all(
        [(kill_ingester, 1), (restart_broker, 1), (kill_broker, 0), (restart_database, 0)]
    ),
)
def test_every_event_is_one_row_although(
    running: Pipeline, broker: list[object], fault: Callable[[Pipeline], None], qos: int
) -> None:
    options = ["--devices", 4, "--count", 150, "--rate", 100, "--resend", 0.5, "--qos", qos]
    with started(*broker, *options) as process:
        wait_until(lambda: running.database.count() >= 60, "60 rows")
        fault(running)
        assert process.poll() is None, "all was over before the fault"
        result = ended(process)
    assert result.code == 0, result
    assert result.counts["made"] == result.counts["stored"] == 600
    assert set(per_device(running).values()) == {150}
    assert running.database.count() == 600
    assert running.database.count("dead_letters") == 0


def test_two_simulators_with_the_same_names_do_not_disturb_each_other(
    running: Pipeline, broker: list[object]
) -> None:
    options = [*broker, "--devices", 2, "--count", 50, "--rate", 50]
    with started(*options) as one, started(*options) as other:
        for result in (ended(one), ended(other)):
            assert result.code == 0, result
            assert result.counts["resent"] == 0, result
    assert per_device(running) == {"sim-001": 100, "sim-002": 100}
    assert running.database.count("dead_letters") == 0


# --- when it is not kept -------------------------------------------------------------


def test_without_an_ingester_nothing_is_stored_and_it_says_so(
    pipeline: Pipeline, broker: list[object]
) -> None:
    result = simulate(*broker, "--devices", 2, "--count", 3, "--rate", 50, "--patience", 1)
    assert result.code == 1
    assert result.output.endswith("NOT STORED: 6 events\n")
    assert (result.counts["made"], result.counts["waiting"], result.counts["stored"]) == (6, 6, 0)


def test_when_the_broker_stays_away_it_goes_on_measuring_and_says_what_is_wrong(
    running: Pipeline, broker: list[object]
) -> None:
    options = ["--devices", 2, "--count", 200, "--rate", 100, "--patience", 1]
    with started(*broker, *options) as process:
        wait_until(lambda: running.database.count() > 0, "a row")
        running.mosquitto.stop()
        result = ended(process)
    assert result.code == 1
    assert result.counts["made"] == 400
    assert result.counts["waiting"] == 400 - result.counts["stored"] > 0
    assert result.output.splitlines()[-2].endswith(
        "; 0 of 2 connected ([Errno 111] Connection refused)"
    )


def test_with_all_acks_lost_no_event_counts_as_stored(
    running: Pipeline, broker: list[object]
) -> None:
    options = ["--name", "deaf", "--devices", 1, "--count", 5, "--rate", 50, "--loss", 1]
    result = simulate(*broker, *options, "--patience", 1)
    assert (result.code, result.counts["waiting"], result.counts["lost"]) == (1, 5, 5)
    assert per_device(running) == {"deaf": 5}  # one device has the very name


def test_what_is_refused_is_counted_and_shown(running: Pipeline, broker: list[object]) -> None:
    running.database.query("ALTER TABLE events ADD CHECK (event_type <> 'temperature')")
    result = simulate(*broker, "--devices", 2, "--count", 30, "--rate", 200)
    refused = running.database.count("dead_letters")
    assert result.code == 1
    assert 0 < refused == result.counts["rejected"] == 60 - running.database.count()
    assert result.counts["stored"] == running.database.count()
    assert result.counts["waiting"] == 0  # what is refused is not kept for ever
    said = [json.loads(line.removeprefix("rejected: ")) for line in result.errors.splitlines()]
    assert [ack["reason"] for ack in said] == ["not_storable"] * refused


def test_a_full_outbox_drops_what_is_new_and_the_oldest_are_sent_first_not_all_at_once(
    running: Pipeline, broker: list[object]
) -> None:
    running.ingester.stop()
    options = ["--devices", 1, "--count", OUTBOX_MAX + 200, "--rate", 1000, "--patience", 0]
    result = simulate(*broker, *options)
    assert (result.code, result.counts["made"]) == (1, OUTBOX_MAX + 200)
    assert (result.counts["waiting"], result.counts["dropped"]) == (OUTBOX_MAX, 200)
    assert result.counts["resent"] == 0
    running.ingester.start()
    running.database.wait_count("events", IN_FLIGHT_MAX)  # what the broker has kept for it
    numbers = sorted(int(event_id.rsplit("-", 1)[1]) for event_id in ids(running))
    assert numbers == list(range(1, IN_FLIGHT_MAX + 1))


def test_what_waited_for_the_ingester_is_stored_when_it_is_there(
    running: Pipeline, broker: list[object]
) -> None:
    running.ingester.stop()
    count = OUTBOX_MAX - 100
    with started(*broker, "--devices", 1, "--count", count, "--rate", 1000) as process:
        seen = running.mosquitto.log
        wait_until(lambda: " as sim-" in seen(), "the device to connect")
        running.ingester.start()
        result = ended(process)
    assert result.code == 0, result
    assert result.counts["made"] == result.counts["stored"] == running.database.count() == count


def test_sigterm_ends_the_measuring_and_brings_the_verdict(
    running: Pipeline, broker: list[object]
) -> None:
    with started(*broker, "--devices", 2, "--rate", 50) as process:
        wait_until(lambda: running.database.count() >= 20, "20 rows")
        process.terminate()
        result = ended(process)
    assert result.code == 0, result
    assert result.output.endswith("every event is stored\n")
    assert result.counts["made"] == result.counts["stored"] == running.database.count()


def test_ctrl_c_while_nothing_answers_waits_less_than_the_patience(
    pipeline: Pipeline, broker: list[object]
) -> None:
    with started(*broker, "--rate", 50, "--patience", 3600) as process:
        listen = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(pipeline.mosquitto.port)]
        run([*listen, "-t", "qs/v1/+/events", "-C", "5", "-W", "15"], clean_environment())
        process.send_signal(signal.SIGINT)
        result = ended(process)
    assert result.code == 1, result
    assert result.counts["waiting"] == result.counts["made"]


# --- what it is said -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "variables", "said"),
    [
        (["--devices", "0"], {}, "--devices: expected 1 to 300"),
        (["--devices", "301"], {}, "--devices: expected 1 to 300"),
        (["--devices", "x"], {}, "--devices: invalid int value: 'x'"),
        (["--rate", "0"], {}, "--rate: expected 0.001 to 1000"),
        (["--rate", "nan"], {}, "--rate: expected 0.001 to 1000"),
        (["--count", "-1"], {}, "--count: expected 0 to "),
        (["--loss", "1.1"], {}, "--loss: expected 0 to 1"),
        (["--qos", "2"], {}, "--qos: expected 0 to 1"),
        (["--resend", "0"], {}, "--resend: expected 0.1 to 3600"),
        (["--patience", "inf"], {}, "--patience: expected 0 to 86400"),
        (["--port", "0"], {}, "--port: expected 1 to 65535"),
        (["--name", "a/b"], {}, "--name: expected 1 to 60 of"),
        (["--name", "a" * 61], {}, "--name: expected 1 to 60 of"),
        (["--ca", "/nowhere/ca.crt"], {}, "--ca: /nowhere/ca.crt cannot be read"),
        (["nonsense"], {}, "unrecognized arguments: nonsense"),
        ([], {"MQTT_PORT": "mqtt"}, "--port: invalid int value: 'mqtt'"),
        ([], {"MQTT_EVENTS_TOPIC": "qs/v1/events"}, "--events-topic: expected one +"),
        ([], {"MQTT_EVENTS_TOPIC": "qs/+/#"}, "--events-topic: expected one +"),
        ([], {"ACK_TEMPLATE": "qs/v1/acks"}, "--ack-template: expected {device_id}"),
        ([], {"ACK_TEMPLATE": "qs/+/{device_id}"}, "--ack-template: expected {device_id}"),
    ],
)
def test_a_wrong_option_is_one_clear_line_and_exit_code_2(
    options: list[str],
    variables: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulator", *options])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        read_settings(Parser("simulator"))
    output, errors = capsys.readouterr()
    assert (end.value.code, output) == (2, "")
    assert re.fullmatch(r"simulator: [^\n]+\n", errors), errors
    assert said in errors


@pytest.mark.parametrize(
    ("options", "variables", "said"),
    [
        (["--devices", "0"], {}, "--devices: expected 1 to 300"),
        ([], {}, "localhost:1: [Errno 111] Connection refused"),
        (["--ca", str(SIMULATOR)], {}, "localhost:1: [X509"),
        (["--host", "a..b"], {}, "a..b:1: "),
        ([], {"MQTT_HOST": "127.0.0.2"}, "127.0.0.2:1: "),
    ],
)
def test_a_start_that_fails_says_why_in_one_line_and_ends_with_2(
    options: list[str], variables: dict[str, str], said: str
) -> None:
    result = simulate(*options, **({"MQTT_PORT": "1"} | variables))
    assert (result.code, result.output) == (2, "")
    assert re.fullmatch(r"simulator: [^\n]+\n", result.errors), result.errors
    assert said in result.errors


@pytest.fixture
def secured(servers: Stack, database: Database, tmp_path: Path) -> Iterator[tuple[Pipeline, Path]]:
    """A pipeline whose devices need TLS and a password, and the file of the broker's CA."""
    authority = Authority(tmp_path / "ca")
    folder = servers.folder / "simulator-tls"
    folder.mkdir()
    for name, source in authority.issue("broker")._asdict().items():
        shutil.copy(source, folder / name)
    add_user = ["mosquitto_passwd", "-c", "-b", str(folder / "users"), "door", PASSWORD]
    run(add_user, clean_environment())
    lines = [f"listener {free_port()} 127.0.0.1", "socket_domain ipv4"]
    lines += [f"{name}file {folder}/{name}" for name in ("cert", "key")]
    lines += [f"password_file {folder}/users"]
    with ExitStack() as cleanup:
        mosquitto = Mosquitto(folder, free_port(), free_port(), "\n".join(lines))
        cleanup.callback(mosquitto.stop)
        mosquitto.start()
        mosquitto.wait_ready()
        pipeline = Pipeline(mosquitto, database, folder)
        cleanup.callback(pipeline.close)
        pipeline.ingester.start()
        pipeline.ingester.wait_ready()
        yield pipeline, authority.cert


def test_with_tls_and_a_password_events_are_stored_and_without_it_says_why(
    secured: tuple[Pipeline, Path], tmp_path: Path
) -> None:
    pipeline, ca = secured
    port = re.findall(r"listener (\d+)", pipeline.mosquitto.extra_config)[0]
    where = {"MQTT_HOST": "localhost", "MQTT_PORT": port}
    options = ["--devices", 1, "--name", "door", "--username", "door", "--count", 5, "--rate", 50]

    result = simulate(*options, "--ca", ca, **where, MQTT_PASSWORD=PASSWORD)
    assert result.code == 0, result
    assert per_device(pipeline) == {"door": 5}

    wrong = simulate(*options, **where, MQTT_CA_FILE=str(ca), MQTT_PASSWORD="guessed")
    assert wrong.errors == f"simulator: localhost:{port}: Not authorized\n"
    other = Authority(tmp_path / "other").cert
    foreign = simulate(*options, "--ca", other, **where, MQTT_PASSWORD=PASSWORD)
    assert re.fullmatch(r"simulator: .*certificate verify failed.*\n", foreign.errors)
    plain = simulate(*options, **where, MQTT_PASSWORD=PASSWORD)
    assert re.fullmatch(r"simulator: .*no answer\n", plain.errors)
    assert {wrong.code, foreign.code, plain.code} == {2}
    assert pipeline.database.count() == 5


# --- what it measures ----------------------------------------------------------------


def test_the_sensors_are_plausible() -> None:
    random.seed(1)
    days = [datetime(2026, 2, 10, hour, tzinfo=UTC) for hour in range(24)]
    found: dict[str, dict[int, list[float | str]]] = {}
    for now in days * 200:
        event_type, value, unit = measure(now)
        found.setdefault(event_type, {}).setdefault(now.hour, []).append(value)
        assert (event_type, unit) in SENSORS
    assert found.keys() == {event_type for event_type, _ in SENSORS}
    assert {value for values in found["door"].values() for value in values} == {"open", "closed"}

    def mean(event_type: str, hour: int) -> float:
        return statistics.mean(float(value) for value in found[event_type][hour])

    assert mean("temperature", 3) < mean("temperature", 9) < mean("temperature", 15)
    assert mean("humidity", 3) > mean("humidity", 9) > mean("humidity", 15)


def test_an_events_row_holds_what_the_device_said(running: Pipeline, broker: list[object]) -> None:
    assert simulate(*broker, "--count", 40, "--rate", 200).code == 0
    rows = running.database.query(
        "SELECT event_id, device_id, event_type, value_num, value_text, unit,"
        " ts_device <= ts_server AND ts_server - ts_device < interval '1 hour', meta FROM events"
    )
    assert len(rows) == 200
    boots = set()
    for event_id, device_id, event_type, number, text, unit, on_time, meta in rows:
        boot = re.fullmatch(rf"{device_id}-([0-9a-f]{{8}})-\d+", event_id)
        assert boot, event_id
        boots.add(boot[1])
        assert (event_type, unit) in SENSORS
        assert (number is None) == (event_type in ("door", "button")) == (text is not None)
        assert on_time
        assert meta["firmware"] == "simulator"
        assert -80 <= meta["rssi"] <= -50
    assert len(boots) == 5
