"""`python -m ingester.top`: what was seen, one frame of it, and the terminal.

What it does: gives the frame every kind of payload and size, runs the command with the real
stack, in files and on real terminals (pty), and ends it in every way. What it does not: look
at it as a person does; docs/operating.md shows a frame.

Invariant: what a view should have counted was counted by devices, or here.
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingester.tool_session import Received
from ingester.top.frame import ASCII, UNICODE, Style, frame
from ingester.top.traffic import PARTITIONS_MAX, PENDING_MAX, ROWS_MAX, Traffic
from ingester.topic import Topics
from tests.support.device import Device, event
from tests.support.load import database_down, load, wait_for_acks
from tests.support.pipeline import Pipeline, wait_until
from tools.process import CHECKOUT, clean_environment, free_port

TOPICS = Topics(
    "qs/v1/+/events", "qs/v1/{device_id}/acks", "qs/v1/deadletter", "qs/v1/ingester/status"
)
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
COMMAND = (sys.executable, "-m", "ingester.top")


class Watched(Traffic):
    """A Traffic whose time the test sets, in seconds since noon."""

    def __init__(self, topics: Topics = TOPICS) -> None:
        super().__init__(topics, "broker:1883")
        self.pass_to(0)
        self.connected()

    def pass_to(self, seconds: float) -> None:
        self.tick(1_000 + seconds, NOON + timedelta(seconds=seconds))

    def hear(self, topic: str, body: object, *, retain: bool = False) -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.take([Received(topic, payload, retain, self.now)])

    def text(self, columns: int = 80, rows: int = 24, style: Style = UNICODE) -> str:
        return "\n".join(frame(self, columns, rows, style))


def status(state: str = "online", **fields: Any) -> dict[str, Any]:
    return {
        "state": state,
        "since": "2026-11-23T10:58:30.000Z",
        "version": "9.8.7",
        "counters": {"received": 0, "stored": 12345, "duplicates": 67, "rejected": 8},
        "in_hand": 21,
        "database_round_trip_ms": 0.8,
        "broker_dropped": 43,
    } | fields


# --- what is seen --------------------------------------------------------------------


def test_events_and_acks_are_counted_one_by_one_in_arrays_too() -> None:
    traffic = Watched()
    for second in range(3):
        traffic.pass_to(second)
        traffic.hear("qs/v1/a/events", event(1))
        traffic.hear("qs/v1/b/events", [event(1), {}, 7])
        traffic.hear("qs/v1/b/events", b"junk")
        traffic.hear("qs/v1/b/acks", [{"event_id": "1"}, {"event_id": None}])
        traffic.hear("qs/v1/a/acks", {"event_id": "1"})
    traffic.pass_to(3)
    assert traffic.events.history(traffic.now) == [5, 5, 5]
    assert traffic.acks.per_second(traffic.now) == 3
    traffic.pass_to(6)
    assert traffic.events.per_second(traffic.now) == 10 / 5  # of the last 5 s, 3 were quiet
    traffic.pass_to(100)
    assert traffic.events.history(traffic.now) == [0] * 60
    traffic.hear("qs/v1/a/events", event(1))
    traffic.pass_to(101)
    assert traffic.events.history(traffic.now) == [0] * 59 + [1]


def test_the_latency_is_from_the_first_time_an_event_is_seen_to_its_ack() -> None:
    traffic = Watched()
    for number in range(100):
        traffic.hear("qs/v1/a/events", event(number, "a"))
        traffic.hear("qs/v1/b/events", event(number, "a"))  # the same id, of another device
        traffic.pass_to(traffic.now - 1_000 + (5 if number == 98 else 0.010))
        traffic.hear("qs/v1/a/events", event(number, "a"))  # sent again
        traffic.pass_to(traffic.now - 1_000 + 0.010)
        traffic.hear("qs/v1/a/acks", {"event_id": f"a-{number}", "status": "stored"})
        traffic.hear("qs/v1/a/acks", {"event_id": f"a-{number}", "status": "stored"})
    assert len(traffic.latencies_ms) == 100
    assert traffic.latency_ms(0.5) == pytest.approx(20)
    assert traffic.latency_ms(0.99) == pytest.approx(20)
    assert traffic.latency_ms(1.0) == pytest.approx(5010)
    assert traffic.pending == 100
    assert "p50 20 ms  p99 20 ms  of the last 100" in traffic.text()


def test_what_was_retained_is_not_taken_for_news_but_the_status_is() -> None:
    traffic = Watched()
    traffic.hear("qs/v1/a/events", event(1), retain=True)
    traffic.hear("qs/v1/a/acks", {"event_id": "device-1-1"}, retain=True)
    traffic.hear("qs/v1/deadletter", {"id": 1}, retain=True)
    traffic.hear("qs/v1/ingester/status", status(), retain=True)
    traffic.pass_to(1)
    assert traffic.events.history(traffic.now) == [0]
    assert not traffic.last_events
    assert not traffic.last_dead_letters
    assert "online since 10:58:30 (1 h 1 min)" in traffic.text()


def test_topics_of_ones_own_are_heard_and_told_apart() -> None:
    topics = Topics("site/+/up", "site/dev-{device_id}/down/x", "dead", "site/ingester/status")
    traffic = Watched(topics)
    assert traffic.subscriptions() == [
        "site/+/up", "site/+/down/x", "dead", "site/ingester/status"
    ]  # fmt: skip
    traffic.hear("site/a/up", event(1, "a"))
    traffic.hear("site/other/down/x", {"event_id": "a-1"})
    assert traffic.pending == 1
    traffic.hear("site/dev-a/down/x", {"event_id": "a-1"})
    assert traffic.pending == 0


def test_what_waits_for_its_ack_is_bounded_and_the_oldest_is_forgotten() -> None:
    traffic = Watched()
    for number in range(PENDING_MAX + 5_000):
        traffic.hear("qs/v1/a/events", event(number, "a"))
    assert traffic.pending == PENDING_MAX
    traffic.hear("qs/v1/a/acks", {"event_id": "a-4999"})
    traffic.hear("qs/v1/a/acks", {"event_id": "a-5000"})
    assert traffic.pending == PENDING_MAX - 1


def test_a_flood_of_the_largest_payloads_is_kept_in_bounded_memory() -> None:
    traffic = Watched()
    long = "x" * 60_000
    payloads = (
        ("qs/v1/a/events", event(long, value=long, event_type="t")),
        ("qs/v1/a/events", event(1, value=1, event_type=long, unit=long)),
        ("qs/v1/" + "y" * 60_000 + "/events", event(2, value=[[]] * 1_000)),
        ("qs/v1/a/events", b"\xff" * 250_000),
        ("qs/v1/deadletter", {"id": long, "reason": long, "error": long}),
        ("qs/v1/ingester/status", status(version=long)),
    )
    encoded = [
        (topic, body if isinstance(body, bytes) else json.dumps(body).encode())
        for topic, body in payloads
    ]
    tracemalloc.start()
    for _ in range(ROWS_MAX):
        for topic, payload in encoded:
            traffic.hear(topic, payload)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(traffic.last_events) == len(traffic.last_dead_letters) == ROWS_MAX
    assert kept < len(long) * ROWS_MAX / 10
    traffic.hear("qs/v1/a/events", [event(1, value="x" * 300_000)])
    assert traffic.last_events[-1].value.startswith("too large: 300")


# --- one frame -----------------------------------------------------------------------


def columns_of(line: str) -> int:
    """How many columns a terminal needs for the line."""
    return sum(
        0 if unicodedata.category(character) in ("Mn", "Me") else
        2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
        for character in line
    )  # fmt: skip


HOSTILE = st.text(
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from(
        "\x1b\x9b\x07\r\n\x08\u200f\u202e\u0301\u20dd\uaa43温度\uff46😀\ufeff\u2028\U0010ffff"
    ),
    max_size=60,
)
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("event_id", "event_type", "value", "unit", "id", "reason"), VALUES),
        **dict.fromkeys(("error", "device_id", "since", "version", "counters"), VALUES),
        **dict.fromkeys(("in_hand", "database_round_trip_ms", "broker_dropped"), VALUES),
    }
    | {"state": st.sampled_from(["online", "offline", "waiting_for_database", 1, []])},
)
PAYLOADS = (
    st.binary(max_size=60)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | FIELDS.map(lambda value: json.dumps(value).encode())
    | st.lists(FIELDS, max_size=3).map(lambda value: json.dumps(value).encode())
    | st.sampled_from([b"[" * 100_000, b"9" * 5_000, b"x" * 300_000, b"NaN", b"-1e999"])
)
HEARD = st.tuples(
    st.sampled_from([TOPICS.status, TOPICS.deadletter, "qs/v1/a/events", "qs/v1/a/acks", "?"])
    | HOSTILE.map(lambda name: f"qs/v1/{name}/events"),
    PAYLOADS,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.lists(HEARD, max_size=12),
    st.integers(0, 130),
    st.integers(0, 40),
    st.sampled_from([UNICODE, ASCII]),
    st.booleans(),
)
def test_no_frame_is_larger_than_the_terminal_or_controls_it(
    heard: list[tuple[str, bytes]], columns: int, rows: int, style: Style, is_lost: bool
) -> None:
    traffic = Watched()
    for number, (topic, payload) in enumerate(heard):
        traffic.pass_to(number * 0.7)
        traffic.hear(topic, payload)
    traffic.pass_to(20)
    if is_lost:
        traffic.lost("MQTT: \x1b[31m" + "x" * 200)
    lines = frame(traffic, columns, rows, style)
    assert len(lines) <= rows
    for line in lines:
        assert columns_of(line) <= columns
        assert line.isprintable()
        assert style is UNICODE or line.isascii()


def test_each_kind_of_line_is_where_one_looks_for_it() -> None:
    traffic = Watched()
    traffic.hear(TOPICS.status, status())
    for number in range(30):
        traffic.pass_to(number)
        traffic.hear("qs/v1/esp/events", event(number, "esp", value=number, unit="C"))
    traffic.hear("qs/v1/esp/events", b'{"cut": ')
    traffic.hear(TOPICS.deadletter, {"id": 17, "reason": "not_json", "device_id": "esp",
                                  "error": "line 1"})  # fmt: skip
    traffic.hear(TOPICS.deadletter, b"not one of ours")
    traffic.hear(TOPICS.status, status())
    lines = frame(traffic, 80, 24)
    assert lines[0] == "homelab ingester 9.8.7".ljust(68) + "12:00:29 UTC"
    assert lines[1:7] == [
        "ingester  online since 10:58:30 (1 h 1 min)",
        "broker    ingester: connected  view: connected  (broker:1883)",
        "database  ingester: connected  answers in 0.8 ms",
        "in all    stored 12,345  duplicates 67  rejected 8",
        "queues    in hand 21  dropped by the broker 43",
        "ACKs      none yet for an event that was seen",
    ]
    assert lines[7] == "events/s       1.0  " + "█" * 29
    assert lines[11:14] == [
        '12:00:29  esp  ?            not JSON: {"cut":',
        "12:00:29  esp  temperature  29 C",
        "12:00:28  esp  temperature  28 C",
    ]
    assert lines[-3:] == [
        "LAST DEAD LETTERS",
        "12:00:29  ?   ?         ?    not JSON: not one of ours",
        "12:00:29  17  not_json  esp  line 1",
    ]
    assert len(lines) == 24
    assert traffic.text(80, 24, ASCII).count("#") == 29


def test_a_small_terminal_shows_what_matters_most() -> None:
    traffic = Watched()
    traffic.hear(TOPICS.status, status())
    traffic.hear("qs/v1/esp/events", [event(1, "esp"), event(2, "esp"), event(3, "esp")])
    traffic.hear(TOPICS.deadletter, {"id": 17})
    lines = frame(traffic, 40, 10)
    assert len(lines) == 10
    assert [line.split()[0] for line in lines[:5]] == [
        "ingester", "broker", "database", "ACKs", "events/s"
    ]  # fmt: skip
    assert lines[5] == "LAST EVENTS"
    assert lines[6].startswith("12:00:00  esp  ")
    assert lines[8] == "LAST DEAD LETTERS"
    assert lines[9].startswith("12:00:00  17 ")


def test_a_wide_character_takes_two_columns_and_one_on_top_of_another_none() -> None:
    traffic = Watched()
    for value in ("温" * 100, "a\u0301" * 100, "温b" * 100):
        traffic.hear("qs/v1/度/events", event(1, value=value, event_type="温度計"))
    traffic.hear("qs/v1/esp/events", event(1, event_type="door"))
    lines = frame(traffic, 40, 24)
    begin = lines.index("LAST EVENTS") + 1
    assert lines[begin : begin + 4] == [
        "12:00:00  esp  door    21.5",
        "12:00:00  度   温度計  温b温b温b温b温b…",
        "12:00:00  度   温度計  " + "a\u0301" * 16 + "…",
        "12:00:00  度   温度計  温温温温温温温温…",
    ]


def test_every_line_of_the_terminal_is_used_and_no_table_is_left_without_one() -> None:
    traffic = Watched()
    for number in range(100):
        traffic.hear("qs/v1/esp/events", event(number))
        traffic.hear(TOPICS.deadletter, {"id": number})
    for rows in range(60):
        lines = frame(traffic, 80, rows)
        assert len(lines) == rows
        assert "none yet" not in lines
        assert ("LAST DEAD LETTERS" in lines) == (rows >= 9)
        assert not lines or not lines[-1].startswith("LAST D")


def test_a_status_of_nonsense_is_shown_as_not_known() -> None:
    traffic = Watched()
    nonsense: list[Any] = [True, "7", [], -1, 1e300, float("nan"), None]
    for number in nonsense:
        traffic.hear(
            TOPICS.status,
            status(
                in_hand=number,
                database_round_trip_ms=number,
                broker_dropped=number,
                counters={"stored": 1, "rejected": number},
                since=number,
            ),
        )
        assert "queues    in hand ?  dropped by the broker ?" in traffic.text()
        assert "answers in ?" in traffic.text()
        assert "stored 1  duplicates ?  rejected ?" in traffic.text()
    traffic.hear(TOPICS.status, [status()])
    assert "unknown: its status cannot be read" in traffic.text()


def test_the_state_is_told_from_the_last_status_and_from_its_absence() -> None:
    traffic = Watched()
    assert "ingester  unknown: no status has been heard" in traffic.text()
    traffic.hear(TOPICS.status, status("waiting_for_database"))
    assert "ingester  waiting_for_database since 10:58:30" in traffic.text()
    assert "database  ingester: not connected  events wait in the broker" in traffic.text()
    traffic.pass_to(24)
    assert "silent" not in traffic.text()
    traffic.pass_to(26)
    assert "ingester  silent for 26 s; was waiting_for_database since" in traffic.text()
    traffic.hear(TOPICS.status, {"state": "offline"})
    assert "ingester  offline since 12:00:26 (0 s)\n" in traffic.text()
    traffic.hear(TOPICS.status, {"state": "offline"}, retain=True)
    assert "ingester  offline\n" in traffic.text()
    assert "broker    ingester: not connected  view: connected" in traffic.text()
    assert "database  ingester: unknown" in traffic.text()
    assert "stored 12,345" in traffic.text()  # the last that it said
    traffic.pass_to(600)
    assert "silent" not in traffic.text()
    traffic.hear(TOPICS.status, b"{")
    assert "ingester  unknown: its status cannot be read" in traffic.text()
    traffic.hear(TOPICS.status, status(since="2026-11-21T10:00:00.000Z"))
    assert "ingester  online since 2026-11-21 10:00 (2 d 2 h)" in traffic.text()
    traffic.lost("MQTT: broker:1883: gone")
    traffic.pass_to(601)
    traffic.lost("MQTT: broker:1883: still gone")
    assert "ingester  unknown; was online since" in traffic.text()
    assert "view: not connected since 12:10:00, trying again\n" in traffic.text()
    assert "\nMQTT: broker:1883: still gone\n" in traffic.text()
    assert "database" not in traffic.text()
    traffic.connected()
    assert "ingester  unknown: no status has been heard" in traffic.text()


# --- several partitions ----------------------------------------------------------------

SECOND = Topics(
    "qs/v1/part/1/+/events", "qs/v1/{device_id}/acks", "qs/v1/deadletter", "qs/v1/ingester/1/status"
)


def test_the_view_of_one_partition_hears_and_shows_all_of_them() -> None:
    traffic = Watched(SECOND)
    assert traffic.subscriptions() == [
        "qs/v1/part/+/+/events", "qs/v1/+/acks", "qs/v1/deadletter", "qs/v1/ingester/+/status"
    ]  # fmt: skip
    for number in range(3):
        traffic.hear(f"qs/v1/ingester/{number}/status", status())
        traffic.hear(f"qs/v1/part/{number}/esp-{number}/events", event(number))
        traffic.hear(f"qs/v1/esp-{number}/acks", {"event_id": f"device-1-{number}"})
    assert [seen.device_id for seen in traffic.last_events] == ["esp-0", "esp-1", "esp-2"]
    assert traffic.pending == 0
    lines = frame(traffic, 160, 24)
    assert lines[1:6] == [
        "ingester  3 online",
        "broker    ingester 0: connected  view: connected  (broker:1883)",
        "database  ingester 0: connected  answers in 0.8 ms",
        "in all    stored 37,035  duplicates 201  rejected 24",
        "queues    in hand 63  dropped by the broker 43",
    ]
    traffic.pass_to(20)
    for number in range(2):
        traffic.hear(f"qs/v1/ingester/{number}/status", status())
    traffic.pass_to(26)
    traffic.hear("qs/v1/ingester/0/status", status("waiting_for_database"))
    lines = frame(traffic, 160, 24)
    assert lines[1].startswith("ingester  2: silent for 26 s; was online since 10:58:30")
    assert lines[1].endswith("  0: waiting_for_database since 10:58:30 (1 h 1 min)  1 online")
    traffic.lost("MQTT: gone")
    assert "0: unknown; was waiting_for_database" in traffic.text(columns=200)
    traffic.connected()
    for number in range(2):
        traffic.hear(f"qs/v1/ingester/{number}/status", status("waiting_for_database"))
    traffic.hear("qs/v1/ingester/2/status", status())
    assert "database  ingester 0: not connected  events wait in the broker" in traffic.text()


def test_the_partitions_that_anybody_may_name_are_bounded() -> None:
    traffic = Watched(SECOND)
    for number in range(2 * PARTITIONS_MAX):
        traffic.hear(f"qs/v1/ingester/{number}/status", status())
    for name in ("x", "12345", "٣", "", "1/2"):
        traffic.hear(f"qs/v1/ingester/{name}/status", status())
    assert len(traffic.ingesters) == PARTITIONS_MAX


def test_a_number_in_one_of_the_topics_alone_is_no_partition() -> None:
    alone = Topics("home/2/+/events", TOPICS.ack_template, TOPICS.deadletter, TOPICS.status)
    assert Watched(alone).subscriptions() == [
        "home/2/+/events", "qs/v1/+/acks", "qs/v1/deadletter", "qs/v1/ingester/status"
    ]  # fmt: skip


# --- the command, without a terminal ---------------------------------------------------


def run(
    arguments: Sequence[str], variables: dict[str, str], *, command: Sequence[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments],
        cwd=CHECKOUT,
        env=clean_environment() | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@contextlib.contextmanager
def traffic(device: Device) -> Iterator[None]:
    """Events, what is refused, and so dead letters, about 50 a second while the block runs."""
    over = threading.Event()

    def publish() -> None:
        number = 0
        while not over.wait(0.02):
            number += 1
            device.send(event(number, value="\x1b[2Jblinking" if number % 7 == 0 else number))
            if number % 5 == 0:
                device.send(b"\x1b[31mjunk")

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_once_prints_one_frame_as_plain_text_and_leaves_nothing(running: Pipeline) -> None:
    narrow = {"PYTHONIOENCODING": "latin-1", "COLUMNS": "50", "LINES": "12"}
    enough = ["bash", "-c", f"{' '.join(COMMAND)} --once | true; exit ${{PIPESTATUS[0]}}"]
    with running.device() as device, traffic(device), ThreadPoolExecutor(3) as pool:
        in_unicode = pool.submit(run, ["--once"], running.environment)
        in_ascii = pool.submit(run, ["--once"], running.environment | narrow)
        unread = pool.submit(run, [], running.environment, command=enough)
    done = in_unicode.result()
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search(r"[^ -~\n▁▂▃▄▅▆▇█…]", done.stdout), done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 24
    assert max(map(len, lines)) <= 80
    assert re.search(r"(?m)^ingester  online since \d\d:\d\d:\d\d \(\d+ s\)$", done.stdout)
    assert f"ingester: connected  view: connected  (127.0.0.1:{running.mosquitto.port})" in lines[2]
    assert re.search(r"(?m)^ACKs      p50 [\d.]+ ms  p99 [\d.]+ ms  of the last \d+$", done.stdout)
    for what in ("events/s", "ACKs/s"):
        rate = re.search(rf"(?m)^{what} +([\d.]+)  [▁-█]+$", done.stdout)
        assert rate, done.stdout
        assert 0 < float(rate[1]) < 70  # the device is told to send 60 at most
    assert re.search(r"(?m)^\d\d:\d\d:\d\d  device-1  temperature  \d+$", done.stdout)
    assert re.search(r"(?m)^\d\d:\d\d:\d\d  device-1  \?  +not JSON: \?\[31mjunk$", done.stdout)
    assert re.search(r"(?m)^\d\d:\d\d:\d\d  \d+  not_json  device-1  \S.*$", done.stdout)
    log = running.mosquitto.log()
    assert log.count("as homelab-ingester ") == 1  # the ingester kept its connection
    done = in_ascii.result()
    assert done.stdout.isascii()
    assert len(done.stdout.splitlines()) == 12
    assert max(map(len, done.stdout.splitlines())) <= 50
    assert re.search(r"(?m)^events/s +[\d.]+  [_.:=+*#-]+$", done.stdout)
    done = unread.result()
    assert (done.returncode, done.stderr) == (0, "")


NOWHERE = {
    "MQTT_HOST": "127.0.0.1",
    "POSTGRES_HOST": "x",
    "POSTGRES_DB": "x",
    "POSTGRES_USER": "x",
}


def test_an_unreachable_broker_is_one_line_and_exit_code_2() -> None:
    port = free_port()
    done = run(["--once"], NOWHERE | {"MQTT_PORT": str(port)})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"top: MQTT: .*127\.0\.0\.1:{port}.*refused\n", done.stderr)


def test_without_a_terminal_or_with_wrong_settings_it_says_what_to_do() -> None:
    done = run([], NOWHERE)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, "", "top: standard output is not a terminal; use --once\n"
    )  # fmt: skip
    done = run(["--once"], NOWHERE | {"MQTT_PORT": "x"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "MQTT_PORT: expected a whole number" in done.stderr
    done = run(["--twice"], NOWHERE)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("unrecognized arguments: --twice")


# --- on a terminal ---------------------------------------------------------------------

# A line of a frame, cleared before it is drawn: behind a full one that would take its last
# character. And the alternate screen, the cursor and the wrapping of lines: as xterm's "Control
# Sequences" has them, DECSET and DECRST of 1049, 25 and 7.
FRAME = b"\x1b[1H"
# "Are you there?", and "yes" (DSR).
ASK, ANSWER = "\x1b[5n", "\x1b[0n"
LINE = re.compile(r"\x1b\[(\d+)H\x1b\[K([^\x1b]*)")
BEGIN = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
END = "\x1b[?7h\x1b[?25h\x1b[?1049l"


class Terminal:
    """A pseudoterminal with the command in it; `lines` is what stands on it.

    It takes each frame for what the view draws, line by line, and fails at anything else.
    """

    def __init__(
        self,
        variables: dict[str, str],
        *,
        is_controlling: bool = True,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """If not `is_controlling`, it sends no signals, and the command reads no keys from it."""
        self._master, self.slave = pty.openpty()
        self.lines: list[str] = []
        self.written = b""
        self._drawn = 0  # so many bytes of it are on the screen
        self.resize(80, 24)
        self.mode_before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=clean_environment() | variables,
            stdin=self.slave if is_controlling else subprocess.DEVNULL,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0) if is_controlling else None,
        )
        os.set_blocking(self._master, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        with contextlib.suppress(OSError):
            os.close(self.slave)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def hang_up(self) -> None:
        os.close(self.slave)
        os.close(self._master)
        self._master, self.slave = pty.openpty()  # so that there is something to close
        os.set_blocking(self._master, False)

    def read(self) -> None:
        """Take what has been drawn, until there is no more."""
        with contextlib.suppress(OSError):  # no more for now, or for ever
            while data := os.read(self._master, 65_536):
                self.written += data
        # The last one may not be whole yet.
        *frames, _ = self.written[self._drawn :].split(FRAME)
        for drawn in frames:
            self._drawn += len(drawn) + len(FRAME)
            self._draw(drawn.decode("utf-8"))

    def _draw(self, drawn: str) -> None:
        if drawn == BEGIN:
            return
        drawn = drawn.removesuffix(ASK)
        lines = LINE.findall(FRAME.decode() + drawn)
        assert LINE.sub("", FRAME.decode() + drawn) == "", repr(drawn)
        assert [int(number) for number, _ in lines] == list(range(1, len(lines) + 1))
        self.lines = [line for _, line in lines]
        assert all(line.isprintable() for line in self.lines), self.lines

    @property
    def all(self) -> str:
        """All that was ever written."""
        return self.written.decode("utf-8")

    @property
    def frames(self) -> int:
        """How often something was drawn."""
        return self.written.count(FRAME)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until the condition holds of what has been read."""

        def look() -> bool:
            self.read()
            return condition()

        try:
            wait_until(look, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; there stands:\n" + "\n".join(self.lines)) from None

    def wait(self, pattern: str) -> None:
        """Wait until the pattern is on the screen."""

        def is_there() -> bool:
            if re.search(pattern, "\n".join(self.lines), re.MULTILINE):
                return True
            assert self.process.poll() is None, self.all
            return False

        self.wait_until(is_there, repr(pattern))

    def wait_exit(self) -> int:
        """Wait until the view ends; return its exit code."""
        self.wait_until(lambda: self.process.poll() is not None, "the view to end")
        self.read()
        return self.process.wait()

    def check_restored(self) -> None:
        """Check that the terminal is as it was before."""
        assert self.all.startswith(BEGIN)
        assert self.all.endswith(END)
        assert self.all.count(END) == 1
        assert termios.tcgetattr(self.slave) == self.mode_before


def fits(terminal: Terminal, columns: int, rows: int) -> bool:
    """Whether what is on the terminal is as large as it, and no larger."""
    widths = [columns_of(line) for line in terminal.lines]
    is_full = rows < 24 or widths[0] == columns  # the title, with the time at its right end
    return is_full and len(widths) <= rows and max(widths) <= columns


@pytest.fixture
def terminal(running: Pipeline) -> Iterator[Terminal]:
    with Terminal(running.environment) as terminal:
        terminal.wait("^ingester  online")
        yield terminal


def test_the_view_goes_with_events_states_and_sizes_and_ends_with_ctrl_c(
    running: Pipeline, terminal: Terminal
) -> None:
    with running.device() as device:
        with traffic(device):
            terminal.wait(r"^events/s +[1-9][\d.]*  [▁-█]+$")
            terminal.wait(r"^ACKs      p50 ")
            terminal.wait(r"device-1  temperature  \d+$")
            terminal.wait(r"  not_json  device-1  ")
            began_at, frames = time.monotonic(), terminal.frames
            for columns, rows in ((40, 10), (200, 60), (1, 1), (80, 24)):
                terminal.resize(columns, rows)
                terminal.wait_until(partial(fits, terminal, columns, rows), "to fit")
            # Twice a second, however much happens.
            assert terminal.frames - frames <= (time.monotonic() - began_at) / 0.5 + 2
        with database_down(running.database):
            device.send(event("a"))
            terminal.wait("^ingester  waiting_for_database")
            terminal.wait("^database  ingester: not connected")
        terminal.wait("^ingester  online")
    running.ingester.stop()
    terminal.wait("^ingester  offline")
    terminal.wait("^broker    ingester: not connected  view: connected")
    terminal.type("\x03")
    assert terminal.wait_exit() == 0
    terminal.check_restored()


def test_a_restart_of_the_broker_is_said_and_survived(
    running: Pipeline, terminal: Terminal
) -> None:
    running.mosquitto.stop()
    terminal.wait(r"^broker    view: not connected since [\d:]+, trying again$")
    terminal.wait(r"^MQTT: .*127\.0\.0\.1.*refused$")
    terminal.wait(r"^ingester  unknown; was o")
    running.mosquitto.start()
    terminal.wait(r"^broker    ingester: connected  view: connected")
    with running.device() as device, load([device], 20):
        wait_for_acks([device])
        terminal.wait(r"^ACKs      p50 ")
    terminal.type("q")
    assert terminal.wait_exit() == 0
    terminal.check_restored()


def test_whatever_ends_it_leaves_the_terminal_as_it_was(running: Pipeline) -> None:
    signals = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    with ExitStack() as stack:
        terminals = [stack.enter_context(Terminal(running.environment)) for _ in range(6)]
        unsignalled = Terminal(running.environment, is_controlling=False)
        terminals.append(stack.enter_context(unsignalled))
        for terminal in terminals:
            terminal.wait("^ingester  online")
        for terminal, number in zip(terminals, signals, strict=False):
            terminal.process.send_signal(signal.SIGSTOP)
            terminal.type("late\n")  # as an answer of the terminal's may come
            terminal.process.send_signal(number)
            terminal.process.send_signal(signal.SIGCONT)
            assert terminal.wait_exit() == 0
            terminal.check_restored()
            waiting = struct.unpack("i", fcntl.ioctl(terminal.slave, termios.FIONREAD, b"1234"))
            assert waiting == (0,)  # it is not for the shell
        keys, gone, left, _ = terminals[len(signals) :]
        keys.type("abc")
        # Ctrl-Z. The kernel would ignore it as well here, where no shell waits for us.
        ignored = re.search(
            r"(?m)^SigIgn:\s+(\w+)$", Path(f"/proc/{keys.process.pid}/status").read_text()
        )
        assert ignored
        assert int(ignored[1], 16) & 1 << (signal.SIGTSTP - 1)
        before = keys.frames
        keys.wait_until(lambda: keys.frames >= before + 3, "more frames")
        assert "abc" not in keys.all
        keys.type("q")
        assert keys.wait_exit() == 0
        keys.check_restored()
        for terminal in (gone, unsignalled):
            terminal.hang_up()
            assert terminal.wait_exit() == 0
        running.mosquitto.stop()
        left.wait("^broker    view: not connected")
        left.type("\x03")
        assert left.wait_exit() == 0
        left.check_restored()


DESERTED = """
import select, sys
from datetime import UTC, datetime
from ingester.top.traffic import Traffic
from ingester.settings import Settings
from ingester.top.__main__ import Screen

kind, *names = sys.argv[1:]
traffic = Traffic(Settings.from_env({name: "x" for name in names}).topics, "broker:1883")
with Screen().taken() as screen:
    for seconds in range(0, 1000, 10):
        traffic.tick(seconds, datetime.now(UTC))
        if not screen.turn(traffic):
            break
        if kind == "answering" and seconds == 0:
            select.select([0], [], [])
sys.exit(seconds // 10)
"""


def test_a_terminal_that_answers_no_more_has_left_and_one_that_never_did_may_be_there() -> None:
    # Docker keeps the terminal of an `exec` whose client was killed, and takes all output.
    python = (sys.executable, "-c", DESERTED)
    with Terminal({}, command=(*python, "answering", *NOWHERE)) as answering:
        answering.wait_until(lambda: ASK in answering.all, "to be asked")
        answering.type(ANSWER)
        assert answering.wait_exit() == 10  # 90 s, by its clock, after it saw the answer
        assert answering.all.count(ASK) == 4
        answering.check_restored()
    with Terminal({}, command=(*python, "silent", *NOWHERE)) as silent:
        assert silent.wait_exit() == 99


def test_a_broker_that_is_not_there_is_said_before_the_terminal_is_touched() -> None:
    port = free_port()
    with Terminal(NOWHERE | {"MQTT_PORT": str(port)}) as terminal:
        assert terminal.wait_exit() == 2
        assert re.fullmatch(rf"top: MQTT: .*127\.0\.0\.1:{port}.*refused\r\n", terminal.all)
