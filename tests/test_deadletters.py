"""Dead letters at the command line: looked at, replayed, purged, beside the running daemon.

What it does: runs `python -m ingester.deadletters` as its own process, with the rights of the
role `ingester` alone, against a real broker and database. What it does not: the broker's
side of a session (test_tool_session.py).
"""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2
import pytest

from ingester.deadletters.__main__ import main
from ingester.deadletters.table import PURGE_ROWS_MAX
from tests.support.device import event
from tests.support.load import devices, events_sent, hear_all, load, wait_for_load
from tests.support.pipeline import Database, Pipeline, wait_until
from tools.process import CHECKOUT, clean_environment, free_port, run
from tools.stack import Stack

TOOL = (sys.executable, "-m", "ingester.deadletters")
# An event's own value decides whether it is stored.
CONSTRAINT = "ALTER TABLE events ADD CONSTRAINT cool CHECK (value_num::int % 10 <> 3)"
STEERS = "\x1b[2J\x1b]0;x\x07\r\x9b31m\u202e"
NOON = datetime(2026, 2, 10, 12, tzinfo=UTC)
LONG_AGO = datetime(2025, 12, 31, tzinfo=UTC)


def environment(pipeline: Pipeline, **variables: str) -> dict[str, str]:
    # The owner's password, and the rights of the ingester's role.
    rights = {"PGOPTIONS": "-c role=ingester"}
    return clean_environment() | pipeline.environment | rights | variables


def tool(
    pipeline: Pipeline, *arguments: str | int, expected: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; check its exit code."""
    done = subprocess.run(
        [*TOOL, *map(str, arguments)],
        cwd=CHECKOUT,
        env=environment(pipeline, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@contextmanager
def started(pipeline: Pipeline, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command; afterwards it has ended."""
    process = subprocess.Popen(
        [*TOOL, *arguments],
        cwd=CHECKOUT,
        env=environment(pipeline),
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


def keep(
    database: Database,
    payload: object,
    *,
    reason: str = "not_storable",
    error: str = "it was so",
    device_id: str | None = "device-1",
    event_id: str | None = None,
    topic: str = "",
    received_at: datetime = NOON,
    times: int = 1,
) -> int:
    """Put a dead letter into the table, that came first long ago, and last when it says."""
    sql = (
        "INSERT INTO dead_letters (received_at, last_received_at, times, reason, error, topic,"
        " device_id, event_id, payload) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING id"
    )
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    topic = topic or f"qs/v1/{device_id}/events"
    ids = (topic, device_id, event_id)
    values = (LONG_AGO, received_at, times, reason, error, *ids, body)
    return int(database.query(sql, *values)[0][0])


def keep_many(database: Database, number: int) -> None:
    """Put so many into the table, each with an event that can be stored."""
    database.query(
        "INSERT INTO dead_letters (received_at, last_received_at, reason, error, topic, device_id,"
        " payload) SELECT '2025-12-31', now() - n * interval '1 minute', 'not_storable',"
        " 'it was so', 'qs/v1/device-1/events', 'device-1', convert_to(format("
        """'{"schema":1,"event_id":"late-%%s","device_id":"device-1","event_type":"x"}', n),"""
        " 'UTF8') FROM generate_series(1, %s) AS n",
        number,
    )


def outcomes(database: Database) -> list[tuple[object, ...]]:
    return database.query("SELECT replay_outcome FROM dead_letters ORDER BY id")


def everything(database: Database) -> list[tuple[object, ...]]:
    return database.query(
        "SELECT t::text FROM dead_letters t UNION ALL SELECT e::text FROM events e"
    )


@pytest.fixture
def online(running: Pipeline) -> Pipeline:
    """The same, with the subscription granted: what is published from now on arrives."""
    # It publishes its status only then; the log says that it has connected, a moment before.
    port = str(running.mosquitto.port)
    command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", port, "-t", "qs/v1/ingester/status"]
    run([*command, "-C", "1", "-W", "15"], clean_environment())
    return running


# --- list and show -------------------------------------------------------------------


def test_the_list_has_the_newest_first_and_counts_each_reason(pipeline: Pipeline) -> None:
    database = pipeline.database
    assert tool(pipeline, "list").stdout == "no dead letters\n"
    for number in range(3):
        moment = NOON + timedelta(minutes=-number)
        how = {"reason": "not_json", "error": "expected JSON"}
        keep(database, b"{", received_at=moment, times=10**number, **how)
    keep(database, {}, reason="missing_field", error="schema is required", event_id="e-1")
    database.query("UPDATE dead_letters SET replay_outcome = 'stored' WHERE id = 2")
    lines = tool(pipeline, "list", "--limit", 3).stdout.splitlines()
    assert lines == [
        "id  last received (UTC)  times  reason         replay  device    event_id",
        "4   2026-02-10 12:00:00  1      missing_field  -       device-1  e-1",
        "    schema is required",
        "1   2026-02-10 12:00:00  1      not_json       -       device-1  -",
        "    expected JSON",
        "2   2026-02-10 11:59:00  10     not_json       stored  device-1  -",
        "    expected JSON",
        "",
        "reason         total  times  stored by a replay",
        "not_json       3      111    1",
        "missing_field  1      1      0",
    ]


def test_the_list_is_cut_to_the_terminal_and_not_into_a_pipe(pipeline: Pipeline) -> None:
    keep(pipeline.database, {}, error="long " * 40, device_id="d" * 64, event_id="e" * 200)
    assert max(map(len, tool(pipeline, "list").stdout.splitlines())) > 200
    narrow = tool(pipeline, "list", COLUMNS="80").stdout.splitlines()
    assert max(map(len, narrow)) == 80


def test_the_list_takes_a_reason_and_a_time_and_writes_json(pipeline: Pipeline) -> None:
    database = pipeline.database
    now = datetime.now(UTC)
    for hours in (1, 30, 80):
        moment = now - timedelta(hours=hours)
        keep(database, b"{", reason="not_json", received_at=moment, times=hours)
        keep(database, {}, reason="missing_field", received_at=moment)
    found = json.loads(tool(pipeline, "list", "--json").stdout)
    assert [letter["id"] for letter in found["dead_letters"]] == [2, 1, 4, 3, 6, 5]
    assert found["counts"]["not_json"] == {"total": 3, "times": 111, "stored": 0}
    first = found["dead_letters"][0]
    assert list(first) == [
        *("id", "received_at", "last_received_at", "times", "reason", "error", "topic"),
        *("device_id", "event_id", "replayed_at", "replay_outcome"),
    ]
    assert first["received_at"] == "2025-12-31T00:00:00.000Z"
    assert first["last_received_at"][:19] == f"{now - timedelta(hours=1):%Y-%m-%dT%H:%M:%S}"
    assert first["times"] == 1
    for since, expected in {
        "2d": [1, 3],
        "1h": [],
        "90m": [1],
        (now - timedelta(hours=31)).isoformat(): [1, 3],
        f"{now - timedelta(hours=2):%Y-%m-%d %H:%M}": [1],  # of UTC, without an offset
    }.items():
        options = ("--json", "--reason", "not_json", "--since", since)
        found = json.loads(tool(pipeline, "list", *options).stdout)
        assert [letter["id"] for letter in found["dead_letters"]] == expected, since
        assert [count["total"] for count in found["counts"].values()] == [
            len(expected) for _ in expected[:1]
        ]


def test_one_is_shown_with_all_its_fields(pipeline: Pipeline) -> None:
    number = keep(pipeline.database, {"value": 1.5}, event_id="e-1", error="bad", times=7)
    assert tool(pipeline, "show", number).stdout.splitlines() == [
        "id               1",
        "received_at      2025-12-31T00:00:00.000Z",
        "last_received_at 2026-02-10T12:00:00.000Z",
        "times            7",
        "reason           not_storable",
        "error            bad",
        "topic            qs/v1/device-1/events",
        "device_id        device-1",
        "event_id         e-1",
        "replayed_at      -",
        "replay_outcome   -",
        "payload          14 bytes",
        "{",
        '  "value": 1.5',
        "}",
    ]


PAYLOADS: list[tuple[bytes, list[str]]] = [
    (b'{"a":1,"b":[true]}', ["{", '  "a": 1,', '  "b": [', "    true", "  ]", "}"]),
    # What would say something else when it is written again stays as it came.
    (b'{"a":1,"a":2}', ['{"a":1,"a":2}']),
    (b'{"a":1e400}', ['{"a":1e400}']),
    (b'{"a":0.10}', ['{"a":0.10}']),
    (b"[" * 3000, ["[" * 3000]),
    (b"two\nlines\tand a tab", ["two", r"lines\tand a tab"]),
    (STEERS.encode(), [r"\x1b[2J\x1b]0;x\x07\r\x9b31m\u202e"]),
    (b'"\x7f', [r'"\x7f']),
    (
        b"\xff\x00\x1b[2Jabcdefghijklm",
        [
            "00000000  ff 00 1b 5b 32 4a 61 62 63 64 65 66 67 68 69 6a  ...[2Jabcdefghij",
            "00000010  6b 6c 6d                                         klm",
        ],
    ),
    (b"", [""]),
]


def test_a_payload_is_shown_as_what_it_is(pipeline: Pipeline) -> None:
    for payload, lines in PAYLOADS:
        number = keep(pipeline.database, payload)
        head, shown = tool(pipeline, "show", number).stdout.split(" bytes\n")
        assert head.endswith(str(len(payload)))
        assert shown == "\n".join(lines) + "\n"


def test_the_raw_payload_is_what_was_received_and_nothing_else(pipeline: Pipeline) -> None:
    payload = bytes(range(256)) * 2
    keep(pipeline.database, payload)
    raw = subprocess.run(
        [*TOOL, "show", "1", "--raw"],
        cwd=CHECKOUT,
        env=environment(pipeline),
        capture_output=True,
        check=True,
    )
    assert raw.stdout == payload


def test_nothing_that_a_device_sent_steers_the_terminal(pipeline: Pipeline) -> None:
    keep(pipeline.database, STEERS.encode(), error=STEERS, device_id=STEERS, event_id=STEERS)
    for command in (["list"], ["list", "--json"], ["show", 1]):
        shown = tool(pipeline, *command).stdout
        assert shown.replace("\n", "").isprintable(), repr(shown)
        assert "[2J" in shown


def test_a_reader_that_has_seen_enough_is_no_error(pipeline: Pipeline) -> None:
    keep_many(pipeline.database, 5_000)  # more than a pipe holds
    command = f"{shlex.join(TOOL)} list --limit 5000 | head -1"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=CHECKOUT,
        env=environment(pipeline),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("id ")
    assert done.stderr == ""


# --- bad input -----------------------------------------------------------------------

BAD = {
    "": "the following arguments are required: COMMAND",
    "lsit": "invalid choice: 'lsit'",
    "list --reason nonsense": "argument --reason: invalid choice: 'nonsense'",
    "list --since yesterday": "argument --since: expected a time",
    "list --since 2026-13-01": "got '2026-13-01'",
    "list --since 0001-01-01T00:00:00+14:00": "argument --since: expected a time",
    "list --since 3w": "got '3w'",
    "list --limit 0": "argument --limit: expected a whole number from 1 on, got '0'",
    "list --limit 9223372036854775808": "argument --limit",
    "list --colour": "unrecognized arguments: --colour",
    "show": "the following arguments are required: ID",
    "show one": "argument ID: expected a whole number from 1 on, got 'one'",
    "show +1": "got '+1'",
    "show 99": "id 99: no such dead letter",
    "replay": "replay: name ids, or else --reason or --since or both",
    "replay 1 --reason not_json": "replay: name ids, or else",
    "replay 99": "id 99: no such dead letter",
    "replay 1 99 2 98": "id 99, 98: no such dead letter",
    "replay --dry-run 1 99": "id 99: no such dead letter",
    "replay 1 x": "argument ID: expected a whole number",
    "replay --reason nonsense": "argument --reason: invalid choice: 'nonsense'",
    "replay 1 --set-device a/b": "--set-device: device_id: expected 1 to 64 characters",
    "replay 1 --set-device +": "--set-device: device_id: expected 1 to 64 characters",
    "replay 1 --set-device ''": "--set-device: device_id: expected 1 to 64 characters",
    "purge": "the following arguments are required: --older-than",
    "purge --older-than 30": "argument --older-than: expected a time",
    "purge --older-than -1d": "argument --older-than: expected one argument",
    "purge --older-than 30d 1": "unrecognized arguments: 1",
}


def test_bad_arguments_are_named_in_one_line_and_nothing_is_changed(
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """In this process: as many of their own would do little but start."""
    database = pipeline.database
    keep_many(database, 2)
    before = everything(database)
    for name, value in environment(pipeline).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # where there is no .env
    for arguments, error in BAD.items():
        monkeypatch.setattr("sys.argv", ["deadletters", *shlex.split(arguments)])
        try:
            code: object = main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert code == 2, arguments
        assert line.startswith("deadletters: "), arguments
        assert error in line, arguments
        assert said.out == ""
    assert everything(database) == before


def test_a_database_that_does_not_answer_is_named_in_one_line(pipeline: Pipeline) -> None:
    nobody = str(free_port())
    for command in ("list", "show 1", "replay 1", "purge --older-than 1m"):
        done = tool(pipeline, *command.split(), expected=2, POSTGRES_PORT=nobody)
        (line,) = done.stderr.splitlines()
        assert line == f"deadletters: Postgres: 127.0.0.1:{nobody}: Connection refused"


def test_a_broker_that_does_not_answer_is_named_before_anything_is_changed(
    pipeline: Pipeline,
) -> None:
    keep_many(pipeline.database, 2)
    before = everything(pipeline.database)
    nobody = str(free_port())
    done = tool(pipeline, "replay", 1, 2, expected=2, MQTT_PORT=nobody)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"deadletters: MQTT: cannot connect to 127.0.0.1:{nobody}: ")
    assert everything(pipeline.database) == before
    # What needs no broker does without.
    tool(pipeline, "replay", 1, 2, "--dry-run", MQTT_PORT=nobody)
    tool(pipeline, "list", MQTT_PORT=nobody)


def test_wrong_settings_are_named(pipeline: Pipeline) -> None:
    done = tool(pipeline, "list", expected=2, MQTT_PORT="x")
    assert done.stderr.startswith("deadletters: ")
    assert "MQTT_PORT: expected a whole number" in done.stderr


# --- replay --------------------------------------------------------------------------


def test_what_the_database_refused_is_stored_once_that_is_mended(online: Pipeline) -> None:
    database = online.database
    database.query(CONSTRAINT)
    with online.device() as device:
        events = [event(number, value=number * 10 + 3) for number in range(3)]
        assert [device.ask(item)["reason"] for item in events] == ["not_storable"] * 3
        device.wait(lambda: len(device.dead_letters) == 3, "the dead letters")

        done = tool(online, "replay", "--reason", "not_storable", expected=1)
        assert done.stdout == "replayed 3 of 3 dead letters: 3 refused as not_storable\n"
        assert outcomes(database) == [("not_storable",)] * 3
        device.wait(lambda: len(device.acks) == 6, "the ACKs of what was refused again")
        assert device.acks[3:] == device.acks[:3]

        database.query("ALTER TABLE events DROP CONSTRAINT cool")
        options = ("--reason", "not_storable", "--since", "1h")
        done = tool(online, "replay", *options, "--dry-run")
        assert done.stdout == "would replay 3 dead letters: 3 not_storable\n"
        assert database.count() == 0
        done = tool(online, "replay", *options)
        assert done.stdout == "replayed 3 of 3 dead letters: 3 stored\n"
        device.wait(lambda: len(device.heard_at) == 3, "the ACKs")
        found = database.query("SELECT event_id, device_id, value_num FROM events ORDER BY 1")
        assert found == [(item["event_id"], "device-1", item["value"]) for item in events]
        marks = "SELECT count(*) FROM dead_letters WHERE replay_outcome = 'stored'"
        assert database.query(f"{marks} AND replayed_at <= now()") == [(3,)]

        # Again: a filter leaves them out, and an id does no harm.
        assert tool(online, "replay", *options).stdout == "nothing to replay\n"
        done = tool(online, "replay", 1, 2, 1)
        assert done.stdout == "replayed 2 of 2 dead letters: 2 stored\n"
        device.wait(lambda: len(device.acks) == 11, "the ACKs once more")
        assert (database.count(), database.count("dead_letters")) == (3, 3)
        # The topic of the dead letters has heard of each one once.
        assert device.ask(event("last"))["status"] == "stored"
        assert len(device.dead_letters) == 3


def test_an_event_of_another_device_is_stored_as_that_ones_if_asked_to(online: Pipeline) -> None:
    with online.device("gateway") as gateway:
        item = event(1, "sensor-7")
        assert gateway.ask(item)["reason"] == "device_mismatch"
        tool(online, "replay", 1, expected=1)
        gateway.wait(lambda: len(gateway.acks) == 2, "the ACK of the gateway's replay")
        tool(online, "replay", 1, "--set-device", "sensor-7")
        gateway.wait(lambda: len(gateway.acks) == 3, "the ACK of the sensor")
        topic, payload = gateway.messages[-1]
        assert topic == "qs/v1/sensor-7/acks"
        assert json.loads(payload) == {
            "schema": 1, "event_id": "sensor-7-1", "device_id": "sensor-7", "status": "stored"
        }  # fmt: skip
    assert online.database.query("SELECT device_id FROM events") == [("sensor-7",)]
    # What was received stays as it was.
    kept = "SELECT device_id, topic, replay_outcome FROM dead_letters"
    assert online.database.query(kept) == [("gateway", "qs/v1/gateway/events", "stored")]


def test_a_conflict_stays_one(online: Pipeline) -> None:
    with online.device() as device:
        assert device.ask(event(1))["status"] == "stored"
        refused = device.ask(event(1, value=0))
        assert refused["reason"] == "event_id_conflict"
        done = tool(online, "replay", "--since", "1d", expected=1)
        assert done.stdout == "replayed 1 of 1 dead letter: 1 refused as event_id_conflict\n"
        device.wait(lambda: len(device.acks) == 3, "the ACK")
        assert device.acks[2] == refused
    assert online.database.query("SELECT value_num FROM events") == [(21.5,)]
    assert outcomes(online.database) == [("event_id_conflict",)]


def test_an_array_is_stored_when_each_of_its_events_is(pipeline: Pipeline) -> None:
    database = pipeline.database
    good = [event("a"), event("b")]
    keep(database, good)
    keep(database, [event("c"), event("a", value=0), {}])
    with pipeline.device() as device:
        done = tool(pipeline, "replay", 1, 2, expected=1)
        device.wait(lambda: len(device.acks) == 5, "the ACKs")
        assert [ack["status"] == "stored" for ack in device.acks] == [True] * 3 + [False] * 2
    assert done.stdout == "replayed 2 of 2 dead letters: 1 stored, 1 refused as event_id_conflict\n"
    assert database.query("SELECT event_id FROM events ORDER BY 1") == [
        ("device-1-a",), ("device-1-b",), ("device-1-c",)
    ]  # fmt: skip
    assert database.count("dead_letters") == 2


def test_a_letter_that_came_often_is_replayed_once_and_comes_up_again_when_it_comes_again(
    online: Pipeline,
) -> None:
    database = online.database
    database.query(CONSTRAINT)
    bad = event(1, value=3)
    with online.device() as device:
        for _ in range(3):
            assert device.ask(bad)["reason"] == "not_storable"
        done = tool(online, "replay", "--since", "1h", expected=1)
        assert done.stdout == "replayed 1 of 1 dead letter: 1 refused as not_storable\n"
        device.wait(lambda: len(device.acks) == 4, "the one ACK of the replay")
        state = "SELECT id, times, replay_outcome FROM dead_letters"
        assert database.query(state) == [(1, 3, "not_storable")]
        # A replay that stores it, and then the device is refused again.
        database.query("UPDATE dead_letters SET replayed_at = now(), replay_outcome = 'stored'")
        assert tool(online, "replay", "--since", "1h").stdout == "nothing to replay\n"
        assert device.ask(bad)["reason"] == "not_storable"
        assert database.query(state) == [(1, 4, None)]
        database.query("ALTER TABLE events DROP CONSTRAINT cool")
        assert "1 stored" in tool(online, "replay", "--since", "1h").stdout
        device.wait(lambda: len(device.heard_at) == 1, "the ACK")
    assert database.query(state) == [(1, 4, "stored")]
    assert {letter["id"] for letter in device.dead_letters} == {1}
    assert len(device.dead_letters) == 4


def test_a_whole_array_of_which_many_were_refused_is_replayed_as_one(online: Pipeline) -> None:
    database = online.database
    database.query(CONSTRAINT)
    events = [event(number, value=number) for number in range(300)]
    with online.device() as device:
        device.publish(events)
        device.wait(lambda: bool(device.dead_letters), "the dead letter")
        assert database.count() == 270
        (letter,) = database.query("SELECT error, event_id FROM dead_letters")
        assert letter[0].startswith("30 of 300 events were refused, the first of them (number 4): ")
        assert letter[1] is None
        tool(online, "replay", 1, expected=1)
        assert outcomes(database) == [("not_storable",)]
        database.query("ALTER TABLE events DROP CONSTRAINT cool")
        tool(online, "replay", 1)
        device.wait(lambda: len(device.acks) == 900, "the answers to three times all")
        assert len(device.heard_at) == 300
    assert len(device.dead_letters) == 1
    assert database.query("SELECT event_id, value_num FROM events ORDER BY value_num") == [
        (item["event_id"], item["value"]) for item in events
    ]
    assert outcomes(database) == [("stored",)]


def test_what_is_not_json_is_answered_again_for_each_id_that_it_holds(online: Pipeline) -> None:
    cut = json.dumps([event(1), event(2), event(3)]).encode()[:-2]
    with online.device() as device:
        device.publish(cut)
        device.wait(lambda: len(device.acks) == 3 and bool(device.dead_letters), "the answers")
        tool(online, "replay", 1, expected=1)
        device.wait(lambda: len(device.acks) == 6, "the answers again")
    assert device.acks[3:] == device.acks[:3]
    assert [ack["event_id"] for ack in device.acks[:3]] == [f"device-1-{n}" for n in (1, 2, 3)]
    assert len(device.dead_letters) == 1
    state = "SELECT id, times, replay_outcome FROM dead_letters"
    assert online.database.query(state) == [(1, 1, "not_json")]


def test_a_letter_of_another_partition_is_replayed_as_its_devices(online: Pipeline) -> None:
    # As an ingester with MQTT_EVENTS_TOPIC=qs/v1/part/1/+/events has kept them.
    topic = "qs/v1/part/1/device-1/events"
    keep(online.database, event(1), topic=topic)
    keep(online.database, event(2, "device-2"), topic=topic)
    # No ingester has known whose this is.
    keep(online.database, event(3), topic="elsewhere", device_id=None)
    with online.device() as device:
        done = tool(online, "replay", 1, 2, 3, expected=1)
        device.wait(lambda: len(device.acks) == 2, "the ACKs")
    assert done.stdout == ("replayed 3 of 3 dead letters: 2 refused as device_mismatch, 1 stored\n")
    assert [topic for topic, _ in device.messages] == ["qs/v1/device-1/acks"] * 2
    assert [ack["status"] for ack in device.acks] == ["stored", "rejected"]
    assert outcomes(online.database) == [("stored",), ("device_mismatch",), ("device_mismatch",)]
    kept = online.database.query("SELECT DISTINCT topic FROM dead_letters WHERE id < 3")
    assert kept == [(topic,)]


def test_a_replay_under_load_loses_and_doubles_nothing(online: Pipeline) -> None:
    database = online.database
    database.query(CONSTRAINT)
    with devices(online, 3) as publishers:
        with load(publishers):
            wait_until(lambda: database.count("dead_letters") >= 20, "some to be refused")
            database.query("ALTER TABLE events DROP CONSTRAINT cool")
            tool(online, "replay", "--reason", "not_storable")
            wait_for_load(publishers, 300)
        # Those that arrived between the look at the table and the fix.
        wait_until(
            lambda: (
                sum(len(device.acks) for device in publishers)
                >= events_sent(publishers)
                + database.count("dead_letters WHERE replay_outcome = 'stored'")
            ),
            "the answers to all events, and to the replayed ones again",
        )
        tool(online, "replay", "--since", "1h")
        hear_all(publishers)
        sent = {key for device in publishers for key in device.sent}
        refused = {
            ack["event_id"]
            for device in publishers
            for ack in device.acks
            if ack["status"] == "rejected"
        }
    assert len(refused) >= 20
    assert {row[0] for row in database.query("SELECT event_id FROM events")} == sent
    assert database.count() == len(sent)
    assert database.count("dead_letters") == len(refused)
    assert set(outcomes(database)) == {("stored",)}


def slow_down(database: Database, seconds: float) -> None:
    """Let each event take so long to be stored."""
    database.query(
        f"CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NEW; END $$"
    )
    database.query("CREATE TRIGGER slow BEFORE INSERT ON events EXECUTE FUNCTION slow()")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_a_replay_that_is_broken_off_is_finished_by_another(
    pipeline: Pipeline, number: signal.Signals
) -> None:
    database = pipeline.database
    keep_many(database, 60)
    slow_down(database, 0.05)
    with pipeline.device() as device:
        with started(pipeline, "replay", "--since", "1d") as process:
            wait_until(lambda: database.count() >= 10, "some to be stored")
            process.send_signal(number)
            code = process.wait(15)
            assert process.stderr
            said = process.stderr.read()
        marked = database.count("dead_letters WHERE replay_outcome = 'stored'")
        assert 0 < marked < 60
        if number is signal.SIGINT:
            assert code == 1
            found = re.fullmatch(
                r"deadletters: interrupted; replayed ([0-9]+) of 60 dead letters: \1 stored;"
                r" the same command finishes it\n",
                said,
            )
            assert found, said
            # The last one may have been marked without being counted.
            assert marked - int(found[1]) in (0, 1)
        database.query("DROP TRIGGER slow ON events")
        done = tool(pipeline, "replay", "--since", "1d")
        rest = 60 - marked
        assert done.stdout == f"replayed {rest} of {rest} dead letters: {rest} stored\n"
        device.wait(lambda: len(device.heard_at) == 60, "an ACK for each")
    assert database.count() == 60
    assert outcomes(database) == [("stored",)] * 60


def test_what_stops_a_replay_is_said_with_what_was_done(pipeline: Pipeline) -> None:
    database = pipeline.database
    keep_many(database, 60)
    slow_down(database, 0.05)
    with started(pipeline, "replay", "--since", "1d") as process:
        wait_until(lambda: database.count() >= 5, "some to be stored")
        pipeline.mosquitto.stop()
        assert process.wait(30) == 1
        assert process.stderr
        (line,) = process.stderr.read().splitlines()
    assert re.match(r"deadletters: MQTT: .*: connection lost; replayed [0-9]+ of 60 dead", line)
    marked = database.count("dead_letters WHERE replay_outcome = 'stored'")
    assert f"replayed {marked} of 60" in line
    # The last one is a row and is not marked: its ACK was not PUBACKed.
    assert database.count() == marked + 1


def in_terminal(pipeline: Pipeline, arguments: Sequence[str]) -> str:
    """Run a command in a terminal of 80 columns; return all that it wrote there."""
    ours, its = pty.openpty()
    command = f"stty cols 80 rows 24; exec {shlex.join([*TOOL, *arguments])}"
    variables = {k: v for k, v in environment(pipeline).items() if k != "COLUMNS"}
    with subprocess.Popen(
        ["sh", "-c", command], cwd=CHECKOUT, env=variables, stdin=its, stdout=its, stderr=its
    ) as process:
        os.close(its)
        written = b""
        try:
            while part := os.read(ours, 4096):
                written += part
        except OSError:  # EIO: nobody holds the other end any more
            pass
        os.close(ours)
    assert process.returncode == 0, written
    return written.decode()


def test_a_long_replay_shows_how_far_it_is(pipeline: Pipeline) -> None:
    keep_many(pipeline.database, 8)
    slow_down(pipeline.database, 0.25)  # more than the second after which it is a long one
    written = in_terminal(pipeline, ["replay", "--since", "1d"])
    assert re.search(r"\r\x1b\[Kreplayed [2-8] of 8\r", written), repr(written)
    assert written.endswith("\r\x1b[Kreplayed 8 of 8 dead letters: 8 stored\r\n")
    keep(pipeline.database, {}, error="x" * 200)
    lines = in_terminal(pipeline, ["list"]).splitlines()
    assert max(map(len, lines)) == 80


# --- purge, and the schema -----------------------------------------------------------


def test_a_purge_deletes_what_is_older_and_no_more(pipeline: Pipeline) -> None:
    database = pipeline.database
    number = PURGE_ROWS_MAX * 2 + 500
    keep_many(database, number)  # a minute between each two
    done = tool(pipeline, "purge", "--older-than", "1h", "--dry-run")
    assert re.fullmatch(r"would delete 2441 dead letters last received before \S+Z\n", done.stdout)
    assert database.count("dead_letters") == number
    done = tool(pipeline, "purge", "--older-than", "1h")
    assert re.fullmatch(r"deleted 2441 dead letters last received before \S+Z\n", done.stdout)
    assert database.count("dead_letters") == 59
    assert tool(pipeline, "purge", "--older-than", "1h").stdout.startswith("deleted 0 dead letters")
    done = tool(pipeline, "purge", "--older-than", datetime.now(UTC).isoformat())
    assert done.stdout.startswith("deleted 59 dead letters")


def test_a_table_of_before_gets_the_columns_and_no_writer_waits_later(
    servers: Stack, pipeline: Pipeline
) -> None:
    database = pipeline.database
    columns = ", DROP COLUMN ".join(("replayed_at", "replay_outcome", "times", "digest"))
    database.query(f"ALTER TABLE dead_letters DROP COLUMN {columns}, DROP COLUMN last_received_at")
    database.query(
        "INSERT INTO dead_letters (received_at, reason, error, topic, payload)"
        " VALUES (now(), 'not_json', 'x', 'qs/v1/device-1/events', '{')"
    )
    done = tool(pipeline, "list", expected=2)
    assert re.search('column "[a-z_]+" does not exist', done.stderr)
    servers.postgres.apply_schema(database.name)
    tool(pipeline, "replay", 1, expected=1)
    marked = everything(database)
    writer = database.connect()
    with writer.cursor() as cursor:
        cursor.execute("UPDATE dead_letters SET error = error, digest = digest")
        servers.postgres.apply_schema(database.name)  # waits for nobody
    writer.rollback()
    writer.close()
    assert everything(database) == marked


def test_the_ingesters_role_may_mark_and_delete_but_not_change_what_was_received(
    database: Database,
) -> None:
    keep(database, event(1))
    connection = database.connect()
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SET ROLE ingester")
        for column in ("id", "received_at", "reason", "topic", "device_id", "payload", "digest"):
            with pytest.raises(psycopg2.Error, match="permission denied"):
                cursor.execute(f"UPDATE dead_letters SET {column} = DEFAULT")
        cursor.execute("UPDATE dead_letters SET replayed_at = now(), replay_outcome = 'x'")
        cursor.execute("DELETE FROM dead_letters")
    connection.close()
