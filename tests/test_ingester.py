"""The real ingester between a real broker and a real database, one event or many.

What it does: looks at what a device hears, what a row holds, and what the log says. What it
does not: kill or cut anything in the middle of a batch.
"""

import csv
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.support.device import Device, event
from tests.support.json_corpus import DOCUMENTS
from tests.support.pipeline import Pipeline, wait_until
from tools.process import CHECKOUT

VALID = b'{"schema": 1, "event_id": "device-1-1", "device_id": "device-1", "event_type": "t"}'


def connects(pipeline: Pipeline) -> int:
    return pipeline.ingester.log().count("MQTT connected rc=Success")


# --- what a device hears, and what a row holds -----------------------------------------


def test_an_event_becomes_a_row_and_its_device_hears_so(lasting: Pipeline) -> None:
    sent = {
        "schema": 1,
        "event_id": "esp32-01-42",
        "device_id": "esp32-01",
        "event_type": "temperature",
        "value": 23.5,
        "unit": "C",
        "ts_device": "2026-02-10T02:00:00.250+02:00",
        "meta": {"sensor": "dht22", "rooms": ["living room", "Küche"]},
        "firmware": "ignored",
    }
    with lasting.device("esp32-01") as device:
        device.publish(sent)
        device.wait(lambda: bool(device.messages), "an ACK")
    assert device.messages == [
        (
            "qs/v1/esp32-01/acks",
            b'{"schema": 1, "event_id": "esp32-01-42", "device_id": "esp32-01",'
            b' "status": "stored"}',
        )
    ]
    columns = "event_id, device_id, schema, event_type, value_num, value_text, unit, ts_device"
    assert lasting.database.query(f"SELECT {columns}, meta FROM events") == [
        (
            "esp32-01-42",
            "esp32-01",
            1,
            "temperature",
            23.5,
            None,
            "C",
            datetime(2026, 2, 10, 0, 0, 0, 250_000, tzinfo=UTC),
            {"sensor": "dht22", "rooms": ["living room", "Küche"]},
        )
    ]


def test_an_event_sent_again_gets_the_very_same_ack_and_no_second_row(lasting: Pipeline) -> None:
    with lasting.device() as device:
        for _ in range(3):
            device.ask(event(1))
    assert len(set(device.messages)) == 1
    assert len(device.messages) == 3
    assert lasting.database.count() == 1
    assert lasting.database.count("dead_letters") == 0


def test_the_same_id_with_other_content_is_refused_and_kept(lasting: Pipeline) -> None:
    with lasting.device() as device:
        device.ask(event(1, value=1))
        ack = device.ask(event(1, value=2))
        device.wait(lambda: bool(device.dead_letters), "a dead letter")
    assert (ack["status"], ack["reason"]) == ("rejected", "event_id_conflict")
    assert lasting.database.query("SELECT value_num FROM events") == [(1.0,)]
    letter = device.dead_letters[0]
    assert json.loads(letter["payload"])["value"] == 2
    rows = lasting.database.query("SELECT id, reason, event_id FROM dead_letters")
    assert rows == [(letter["id"], "event_id_conflict", "device-1-1")]


def test_an_array_is_answered_by_one_array_in_its_order(lasting: Pipeline) -> None:
    sent = [event(1), event(2, value=[]), 7, event(1), event(1, value=0), event(3)]
    with lasting.device() as device:
        device.publish(sent)
        device.wait(lambda: len(device.dead_letters) == 3, "three dead letters")
    assert len([topic for topic, _ in device.messages if topic.endswith("/acks")]) == 1
    heard = [(ack["event_id"], ack["status"], ack.get("reason")) for ack in device.acks]
    assert heard == [
        ("device-1-1", "stored", None),
        ("device-1-2", "rejected", "invalid_field"),
        (None, "rejected", "not_an_object"),
        ("device-1-1", "stored", None),
        ("device-1-1", "rejected", "event_id_conflict"),
        ("device-1-3", "stored", None),
    ]
    assert lasting.database.count() == 2
    kept = dict(lasting.database.query("SELECT id, payload FROM dead_letters"))
    of_each = [kept[letter["id"]] for letter in device.dead_letters]
    assert [json.loads(bytes(payload)) for payload in of_each] == [sent[1], 7, sent[4]]
    assert [json.loads(letter["payload"]) for letter in device.dead_letters] == [
        sent[1],
        7,
        sent[4],
    ]


REFUSED = {
    "not_utf8": b'{"schema": 1, "event_id": "\xff"}',
    "not_json": b'{"schema": 1,',
    "not_an_object": b'"hello"',
    "missing_field": b'{"schema": 1, "event_id": "e", "device_id": "device-1"}',
    "invalid_field": VALID.replace(b"}", b', "value": [1]}'),
    "unsupported_schema": VALID.replace(b"1,", b"2,", 1),
    "device_mismatch": VALID.replace(b'"device-1"', b'"device-2"'),
    "payload_too_large": VALID.replace(b"}", b', "pad": "' + b"x" * 262_144 + b'"}'),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_stored_is_answered_told_and_kept_whole(
    lasting: Pipeline, reason: str
) -> None:
    payload = REFUSED[reason]
    before = datetime.now(UTC)
    with lasting.device() as device:
        device.publish(payload)
        device.wait(lambda: bool(device.acks and device.dead_letters), "an ACK, a dead letter")
        assert device.ask(event("after"))["status"] == "stored"
    ack, letter = device.acks[0], device.dead_letters[0]
    assert (ack["device_id"], ack["status"], ack["reason"]) == ("device-1", "rejected", reason)
    assert letter["truncated"] is (len(payload) > 2000)
    row = lasting.database.query(
        "SELECT id, reason, error, topic, device_id, event_id, payload, received_at"
        " FROM dead_letters"
    )[0]
    assert row[:6] == tuple(
        letter[name] for name in ("id", "reason", "error", "topic", "device_id", "event_id")
    )
    assert row[1:3] == (ack["reason"], ack["error"])
    assert bytes(row[6]) == payload
    assert before <= row[7] <= datetime.now(UTC)


def test_a_value_that_only_the_database_refuses_is_not_storable(running: Pipeline) -> None:
    running.database.query("ALTER TABLE events ADD CHECK (value_num < 1000)")
    with running.device() as device:
        device.publish([event(1), event(2, value=5000), event(3)])
        device.wait(lambda: bool(device.dead_letters), "a dead letter")
    assert [ack.get("reason") for ack in device.acks] == [None, "not_storable", None]
    assert running.database.count() == 2
    assert "check constraint" in device.dead_letters[0]["error"]


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_events_of_every_qos_are_stored_and_answered(lasting: Pipeline, qos: int) -> None:
    with lasting.device() as device:
        for number in range(20):
            assert device.ask(event(number), qos=qos)["status"] == "stored"
    assert lasting.database.count() == 20
    assert connects(lasting) == 1


def test_a_retained_event_is_stored_once_and_clearing_it_does_no_harm(
    running: Pipeline,
) -> None:
    with running.device() as device:
        device.publish(event(1), retain=True)
        device.wait(lambda: bool(device.acks), "an ACK")
        running.ingester.stop()
        running.ingester.start()
        running.ingester.wait_ready()
        device.wait(lambda: len(device.acks) == 2, "the ACK of the retained one, come again")
        device.publish(b"", retain=True)
        device.wait(lambda: len(device.dead_letters) == 1, "a dead letter for an empty payload")
        assert device.ask(event(2))["status"] == "stored"
    assert device.dead_letters[0]["reason"] == "not_json"
    assert running.database.count() == 2


HOSTILE_DEVICES = ["", " ", "a b", "täst", "😀", "%s", "{device_id}", "'; DROP", "x" * 64_000]


@pytest.mark.parametrize("device_id", HOSTILE_DEVICES, ids=lambda name: name[:9] or "empty")
def test_no_name_of_a_device_makes_the_broker_disconnect_the_ingester(
    lasting: Pipeline, device_id: str
) -> None:
    with lasting.device(device_id) as device:
        device.publish(event(1, device_id))
        device.publish([{}] * 1000)
        device.publish(b"\0")
        lasting.database.wait_count("dead_letters", 3)
    with lasting.device() as other:
        assert other.ask(event(1))["status"] == "stored"
    assert connects(lasting) == 1
    assert lasting.database.query("SELECT DISTINCT device_id FROM dead_letters") == [(device_id,)]


def test_the_longest_answers_do_not_make_the_broker_disconnect_the_ingester(
    lasting: Pipeline,
) -> None:
    names = ["😀" * 56 + f"{number:04}" for number in range(1000)]
    elements = [json.dumps({"event_id": name}, ensure_ascii=False) for name in names]
    with lasting.device() as device:
        device.publish(f"[{','.join(elements)}]".encode())
        device.wait(lambda: len(device.acks) == 1000, "an array of 1,000 ACKs", 30)
    assert connects(lasting) == 1
    assert [ack["event_id"] for ack in device.acks] == names


def test_the_largest_payload_that_the_broker_takes_is_kept(lasting: Pipeline) -> None:
    conf = (CHECKOUT / "mosquitto/config/mosquitto.conf").read_text()
    match = re.search(r"(?m)^max_packet_size (\d+)$", conf)
    assert match
    topic = "qs/v1/device-1/events"
    # MQTT 3.1.1, section 3.3: fixed header of 5 bytes, topic with its length, packet id.
    payload = b"[" * (int(match[1]) - 5 - 2 - len(topic) - 2)
    with lasting.device() as device:
        ack = device.ask(payload)
    assert ack["reason"] == "payload_too_large"
    assert lasting.database.query("SELECT length(payload) FROM dead_letters") == [(len(payload),)]
    assert connects(lasting) == 1


def test_topics_of_an_earlier_setting_are_kept_and_not_lost(pipeline: Pipeline) -> None:
    pipeline.ingester.environment["MQTT_EVENTS_TOPIC"] = "old/+/data"
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    pipeline.ingester.stop()
    with Device(pipeline.mosquitto.port, root="qs/v1") as device:
        device.publish(event(1), topic="old/device-1/data")
        pipeline.ingester.environment["MQTT_EVENTS_TOPIC"] = "qs/v1/+/events"
        pipeline.ingester.start()
        device.wait(lambda: bool(device.dead_letters), "a dead letter")
        assert device.ask(event(2))["status"] == "stored"
    assert device.dead_letters[0]["reason"] == "device_mismatch"
    assert device.dead_letters[0]["device_id"] is None


def test_other_topics_can_be_configured(pipeline: Pipeline) -> None:
    pipeline.ingester.environment |= {
        "MQTT_EVENTS_TOPIC": "home/+/up",
        "ACK_TEMPLATE": "home/down/{device_id}/acks",
        "MQTT_DEADLETTER_TOPIC": "home/down/deadletter",
    }
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    with Device(pipeline.mosquitto.port, root="home/down") as device:
        assert device.ask(event(1), topic="home/device-1/up")["status"] == "stored"
        device.publish(b"?", topic="home/device-1/up")
        device.wait(lambda: bool(device.dead_letters), "a dead letter")


# --- many ------------------------------------------------------------------------------


def test_a_corpus_of_json_documents_ends_as_rows_and_dead_letters_and_nothing_else(
    lasting: Pipeline,
) -> None:
    with lasting.device() as device:
        for number, document in enumerate(DOCUMENTS):
            head = VALID.replace(b"device-1-1", b"corpus-%d" % number)
            device.send(head[:-1] + b', "meta": ' + document.data + b"}")
        device.wait(lambda: len(device.acks) >= len(DOCUMENTS), "an ACK for each", 60)
        device.wait(
            lambda: len(device.dead_letters) + len(device.heard_at) >= len(DOCUMENTS), "the rest"
        )
    stored, kept = lasting.database.count(), lasting.database.count("dead_letters")
    assert stored + kept == len(DOCUMENTS)
    assert (stored, kept) == (len(device.heard_at), len(device.dead_letters))
    assert connects(lasting) == 1


def test_random_bytes_on_random_topics_end_as_dead_letters(lasting: Pipeline) -> None:
    randomness = random.Random(20260210)
    sent = 0
    with lasting.device() as device:
        for _ in range(2000):
            junk = randomness.randbytes(randomness.randrange(60))
            cut = randomness.randrange(len(VALID))
            payload = randomness.choice([junk, VALID[:cut] + junk + VALID[cut + 1 :], VALID[:cut]])
            device.send(payload, topic=f"qs/v1/d{randomness.randrange(50)}/events")
            sent += 1
        device.wait(lambda: len(device.dead_letters) == sent, "each dead letter", 30)
        device.wait(lambda: len(device.acks) == sent, "each ACK")
    # Some are equal.
    assert lasting.database.query("SELECT sum(times) FROM dead_letters") == [(sent,)]
    assert lasting.database.count() == 0


def seattle(path: Path) -> list[tuple[str, float]]:
    with path.open(newline="") as file:
        return [
            (datetime.strptime(row["date"], "%Y/%m/%d %H:%M").isoformat(), float(row["temp"]))
            for row in csv.DictReader(file)
        ]


def test_a_year_of_hourly_readings_in_local_time_comes_out_right(pipeline: Pipeline) -> None:
    readings = seattle(CHECKOUT / "tests/data/seattle-temps.csv")
    assert len(readings) == 8759
    pipeline.ingester.environment["DEVICE_DEFAULT_TZ"] = "America/Los_Angeles"
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    with pipeline.device("seattle") as device:
        device.deliver(
            event(moment, "seattle", value=temperature, unit="F", ts_device=moment)
            for moment, temperature in readings
        )
    rows = pipeline.database.query(
        "SELECT event_id, value_num, ts_device FROM events ORDER BY event_id"
    )
    assert [(row[0], row[1]) for row in rows] == sorted(
        (f"seattle-{moment}", temperature) for moment, temperature in readings
    )
    # Pacific time is 8 hours behind UTC, and 7 from 14 March to 7 November 2010 at 2:00. The
    # hour that is skipped is written 02:00 in the file: 03:00 by the new time, 10:00 UTC.
    summer = datetime(2010, 3, 14, 2, 30), datetime(2010, 11, 7, 2)
    for key, _, ts_device in rows:
        local = datetime.fromisoformat(key.removeprefix("seattle-"))
        offset = 7 if summer[0] <= local < summer[1] else 8
        assert ts_device == (local + timedelta(hours=offset)).replace(tzinfo=UTC), key
    moments = [row[2] for row in rows]
    assert len(set(moments)) == len(moments)
    assert moments[0] == datetime(2010, 1, 1, tzinfo=ZoneInfo("America/Los_Angeles"))


def test_a_flood_is_stored_in_batches_and_said_in_few_lines(pipeline: Pipeline) -> None:
    pipeline.ingester.environment["BATCH_MAX"] = "50"
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    with pipeline.device() as device:
        device.deliver(event(number) for number in range(3000))
    pipeline.database.wait_count("events", 3000)
    log = pipeline.ingester.log()
    sizes = [int(size) for size in re.findall(r"DEBUG batch: messages (\d+)", log)]
    assert sum(sizes) >= 3000
    assert max(sizes) <= 50
    assert len(sizes) < 1500  # not one by one
    duration = time.monotonic()
    assert len(re.findall(r" INFO ", log)) < 12, (duration, log)


@pytest.mark.alone
def test_one_event_is_not_held_back_for_a_batch(running: Pipeline) -> None:
    """Compared with the sum of its parts in the same run: two trips over MQTT, one INSERT."""
    with running.device() as device:
        through = [timed(device, event(number)) for number in range(300)]
    echo = statistics.median(echo_times(running.mosquitto.port))
    insert = statistics.median(insert_times(running))
    median = statistics.median(through)
    print(f"publish to ACK: median {median * 1000:.2f} ms; an echo {echo * 1000:.2f} ms, ", end="")
    print(f"an INSERT {insert * 1000:.2f} ms")
    assert median < 4 * (2 * echo + insert)


def timed(device: Device, item: dict[str, Any]) -> float:
    began_at = time.perf_counter()
    device.ask(item)
    return device.heard_at[item["event_id"]] - began_at


def echo_times(port: int) -> list[float]:
    times = []
    with Device(port, root="echo") as device:
        for number in range(300):
            began_at = time.perf_counter()
            key = str(number)
            device.ask({"event_id": key, "status": "stored"}, topic="echo/x/acks")
            times.append(device.heard_at[key] - began_at)
    return times


def insert_times(pipeline: Pipeline) -> list[float]:
    connection = pipeline.database.connect()
    connection.autocommit = True
    times = []
    with connection.cursor() as cursor:
        for number in range(300):
            began_at = time.perf_counter()
            cursor.execute(
                "INSERT INTO events (event_id, device_id, schema, event_type)"
                " VALUES (%s, 'd', 1, 't') ON CONFLICT DO NOTHING",
                (f"plain-{number}",),
            )
            times.append(time.perf_counter() - began_at)
    connection.close()
    return times


# --- coming, going, waiting ------------------------------------------------------------


def test_it_starts_before_broker_and_database_are_there_and_waits(pipeline: Pipeline) -> None:
    postgres = pipeline.database.postgres
    pipeline.mosquitto.stop()
    postgres.stop()
    try:
        pipeline.ingester.start()
        pipeline.ingester.wait_for_log("Postgres: ")
        pipeline.ingester.wait_for_log("MQTT: cannot connect")
        pipeline.mosquitto.start()
        pipeline.ingester.wait_for_log("MQTT connected rc=Success")
    finally:
        postgres.start()
        postgres.wait_ready()
    pipeline.ingester.wait_for_log("Connected to Postgres")
    with pipeline.device() as device:
        assert device.ask(event(1))["status"] == "stored"


def test_it_outlives_a_restart_of_the_database_and_loses_nothing(running: Pipeline) -> None:
    postgres = running.database.postgres
    with running.device() as device:
        assert device.ask(event(0))["status"] == "stored"
        postgres.stop()
        try:
            for number in range(1, 200):
                device.send(event(number))
            device.send(b"junk")
            running.ingester.wait_for_log("WARNING Postgres: ")
        finally:
            postgres.start()
            postgres.wait_ready()
        device.wait(lambda: len(device.heard_at) == 200, "an ACK for each", 30)
        device.wait(lambda: bool(device.dead_letters), "the dead letter")
    assert running.database.count() == 200
    assert connects(running) == 1  # the MQTT session stayed
    log = running.ingester.log()
    assert len(re.findall(r"WARNING Postgres: ", log)) == 1, log
    assert "INFO Postgres: back after" in log
    assert running.database.query("SELECT reason FROM dead_letters") == [("not_json",)]


def test_it_outlives_a_restart_of_the_broker_and_loses_nothing(running: Pipeline) -> None:
    with running.device() as device:
        device.deliver(event(number) for number in range(100))
    running.mosquitto.stop()
    running.ingester.wait_for_log("WARNING MQTT: connection lost")
    running.mosquitto.start()
    running.mosquitto.wait_ready()
    with running.device() as device:
        device.deliver(event(number) for number in range(50, 200))
    assert running.database.count() == 200
    assert "INFO MQTT: back after" in running.ingester.log()


def test_events_published_while_it_is_away_are_stored_when_it_is_back(running: Pipeline) -> None:
    assert running.ingester.stop() == 0
    with running.device() as device:
        for number in range(3000):  # more than the broker's default queue of 1,000
            device.send(event(number), qos=number % 2)
        device.publish(event("last"))
        running.ingester.start()
        device.wait(lambda: len(device.heard_at) == 3001, "an ACK for each", 60)
    assert running.database.count() == 3001


def test_a_killed_ingester_is_given_the_batch_again(running: Pipeline) -> None:
    """Killed between receiving and committing: nothing was PUBACKed, so nothing is lost."""
    with running.device() as device:
        with running.database.locked():
            for number in range(100):
                device.publish(event(number))
            running.database.wait_blocked()
            running.ingester.kill()
        running.ingester.start()
        device.wait(lambda: len(device.heard_at) == 100, "an ACK for each", 30)
    assert running.database.count() == 100


def test_nobody_hears_stored_before_the_row_is_there(running: Pipeline) -> None:
    with running.device() as device:
        with running.database.locked():
            device.publish(event(1))
            running.database.wait_blocked()
            assert device.messages == []
        device.wait(lambda: bool(device.acks), "an ACK")
    assert running.database.count() == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_under_load_ends_it_in_good_time_with_code_0(
    running: Pipeline, number: signal.Signals
) -> None:
    with running.device() as device:
        for i in range(2000):
            device.send(event(i))
        device.wait(lambda: len(device.acks) > 100, "some ACKs")
        running.ingester.stop_signal = number
        began_at = time.monotonic()
        assert running.ingester.stop() == 0, running.ingester.log_tail()
        assert time.monotonic() - began_at < 5  # the promise that Compose relies on
        assert "Traceback" not in running.ingester.log()
        running.ingester.start()
        device.wait(lambda: len(device.heard_at) == 2000, "an ACK for each", 30)
    assert running.database.count() == 2000


def test_one_that_is_stopped_right_after_its_start_ends_with_code_0(pipeline: Pipeline) -> None:
    pipeline.ingester.start()
    assert pipeline.ingester.stop() == 0


def test_a_bug_ends_it_with_a_traceback_and_nothing_is_lost(pipeline: Pipeline) -> None:
    """Stands for any bug: one in Store, put there from outside."""
    command = pipeline.ingester.command
    bug = "from ingester import app, store; store.Store.insert_dead_letters = None; app.main()"
    pipeline.ingester.command = [command[0], "-c", bug]
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    with pipeline.device() as device:
        device.publish(event(1))
        wait_until(lambda: not pipeline.ingester.running, "the ingester to end")
        assert pipeline.ingester.returncode == 1
        assert "Traceback" in pipeline.ingester.log()
        pipeline.ingester.command = command
        pipeline.ingester.start()
        device.wait(lambda: bool(device.heard_at), "an ACK")
    assert pipeline.database.count() == 1


def test_a_row_that_python_cannot_hold_is_another_content(running: Pipeline) -> None:
    running.database.query(
        "INSERT INTO events (event_id, device_id, schema, event_type, ts_device)"
        " VALUES ('device-1-1', 'device-1', 1, 'temperature', '20000-01-01')"
    )
    with running.device() as device:
        assert device.ask(event(1))["reason"] == "event_id_conflict"


def test_the_log_of_a_quiet_start_is_two_lines(pipeline: Pipeline) -> None:
    pipeline.ingester.environment["LOG_LEVEL"] = "INFO"
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    lines = [line.split(" ", 2)[2] for line in pipeline.ingester.log().splitlines()]
    assert Counter(lines) == Counter(
        ["Connected to Postgres", "MQTT connected rc=Success; subscribing qs/v1/+/events"]
    )


def test_the_heartbeat_beats_only_while_both_connections_are_up(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    heartbeat = tmp_path / "heartbeat"
    pipeline.ingester.environment["HEARTBEAT_FILE"] = str(heartbeat)
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()  # before, it is there for a moment: to see if it can be written
    wait_until(heartbeat.exists, "the first beat")
    pipeline.mosquitto.stop()
    pipeline.ingester.wait_for_log("WARNING MQTT: connection lost")
    last = heartbeat.stat().st_mtime
    pipeline.mosquitto.start()
    pipeline.ingester.wait_for_log("INFO MQTT: back after")
    wait_until(lambda: heartbeat.stat().st_mtime > last, "the next beat")


def test_wrong_settings_end_it_with_code_2_and_one_message(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(CHECKOUT), "MQTT_PORT": "0", "BATCH_MAX": "many"}
    command = [sys.executable, "-m", "ingester.app"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert done.stdout == ""
    named = re.findall(r"(?m)^  ([A-Z_]+): ", done.stderr)
    expected = "BATCH_MAX MQTT_HOST MQTT_PORT POSTGRES_DB POSTGRES_HOST POSTGRES_USER"
    assert sorted(named) == expected.split()
