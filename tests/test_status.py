"""The status topic: what the ingester says of itself, and what the broker says in its place.

What it does: listens as mosquitto_sub would, while the ingester starts, works, waits, stops
and dies. What it does not: know how it finds out what it says.

Invariant: what is compared with the status was counted by devices, or timed here.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Self

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.device import event
from tests.support.load import database_down
from tests.support.pipeline import Pipeline

TOPIC = "qs/v1/ingester/status"
FIELDS = {
    "state": str,
    "since": str,
    "version": str,
    "uptime_seconds": int,
    "counters": dict,
    "batches": int,
    "in_hand": int,
    "oldest_in_hand_seconds": float,
    "last_commit_at": str,
    "database_round_trip_ms": float,
    "broker_dropped": int,
}
COUNTERS = {"received", "stored", "duplicates", "rejected", "dead_lettered"}


class Watcher:
    """Hears every status, and when."""

    def __init__(self, port: int) -> None:
        self.heard: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.retained: list[bool] = []
        self._port = port
        self._changed = threading.Condition()
        self._client = paho.Client(CallbackAPIVersion.VERSION2)
        self._client.on_connect = lambda client, *_: client.subscribe(TOPIC, 1)
        self._client.on_message = self._on_message

    def __enter__(self) -> Self:
        self._client.connect("127.0.0.1", self._port)
        self._client.loop_start()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def wait(
        self, condition: Callable[[dict[str, Any]], bool], what: str, timeout: float = 5
    ) -> dict[str, Any]:
        """Wait until the latest status is such; return it."""
        with self._changed:
            fits = self._changed.wait_for(
                lambda: bool(self.heard) and condition(self.heard[-1]), timeout
            )
            assert fits, f"waited {timeout} s for {what}; the last: {self.heard[-2:]}"
            return self.heard[-1]

    def wait_state(self, state: str, timeout: float = 5) -> dict[str, Any]:
        return self.wait(lambda status: status["state"] == state, state, timeout)

    def wait_next(self, timeout: float) -> None:
        number = len(self.heard)
        self.wait(lambda _: len(self.heard) > number, "the next status", timeout)

    def _on_message(self, _client: Any, _user: Any, message: paho.MQTTMessage) -> None:
        with self._changed:
            self.heard.append(json.loads(message.payload))
            self.times.append(time.monotonic())
            self.retained.append(message.retain)
            self._changed.notify_all()


@pytest.fixture
def watcher(running: Pipeline) -> Iterator[Watcher]:
    with Watcher(running.mosquitto.port) as watcher:
        yield watcher


def age_seconds(moment: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()


def test_the_status_has_every_documented_field_for_whoever_comes_later(
    running: Pipeline,
) -> None:
    with running.device() as device, Watcher(running.mosquitto.port) as early:
        early.wait_state("online")
        device.ask(event(1))
        with database_down(running.database):
            device.send(event(2))  # so that the state changes, and the status is said again
            early.wait_state("waiting_for_database")
        device.wait(lambda: len(device.acks) == 2, "an ACK")
        early.wait_state("online")
    with Watcher(running.mosquitto.port) as late:
        status = late.wait_state("online")
        assert late.retained == [True]
    for name, kind in FIELDS.items():
        accepted = (int, float) if kind is float else kind
        assert isinstance(status[name], accepted), (name, status)
    assert status["counters"].keys() == COUNTERS
    assert 0 <= age_seconds(status["since"]) < 15
    assert 0 <= age_seconds(status["last_commit_at"]) < 15
    assert status["uptime_seconds"] < 30


def test_the_status_is_offline_after_a_kill_and_after_a_stop_and_online_afterwards(
    running: Pipeline, watcher: Watcher
) -> None:
    watcher.wait_state("online")
    for end in (running.ingester.kill, running.ingester.stop):
        end()
        watcher.wait_state("offline")
        with Watcher(running.mosquitto.port) as late:
            assert late.wait_state("offline") == {"state": "offline"}
            assert late.retained == [True]
        running.ingester.start()
        assert watcher.wait_state("online")["uptime_seconds"] < 5


def test_the_status_says_what_waits_while_the_database_is_down(
    running: Pipeline, watcher: Watcher
) -> None:
    before = watcher.wait_state("online")
    with running.device() as device:
        device.ask(event(0))
        with database_down(running.database):
            for number in range(1, 8):
                device.publish(event(number))
            waiting = watcher.wait_state("waiting_for_database")
            assert waiting["in_hand"] >= 1
            assert 0 <= waiting["oldest_in_hand_seconds"] < 5
            assert age_seconds(waiting["since"]) < 5
            assert waiting["since"] > before["since"]
            log_end = running.ingester.log_end
        device.wait(lambda: len(device.heard_at) == 8, "the ACKs")
        after = watcher.wait_state("online")
        assert after["since"] > waiting["since"]
        running.ingester.wait_for_log("Connected to Postgres", after=log_end)


@pytest.mark.faults
def test_the_status_goes_on_every_10_s_while_the_database_is_down(
    running: Pipeline, watcher: Watcher
) -> None:
    watcher.wait_state("online")
    with running.device() as device, database_down(running.database):
        for number in range(7):
            device.publish(event(number))
        watcher.wait_state("waiting_for_database")
        waiting = watcher.wait(
            lambda status: status["in_hand"] == 7 and status["oldest_in_hand_seconds"] > 8,
            "a status with 7 events in hand, the oldest more than 8 s old",
            12,
        )
    assert waiting["state"] == "waiting_for_database"


@pytest.mark.faults
def test_the_status_comes_every_10_s_in_quiet_and_under_load(
    running: Pipeline, watcher: Watcher
) -> None:
    watcher.wait_state("online")
    with running.device() as device:
        for _ in range(2):
            number = len(watcher.heard)
            watcher.wait_next(11)
            for index in range(100):
                device.ask(event(f"{number}-{index}"))
    gaps = [later - earlier for earlier, later in pairwise(watcher.times)]
    assert max(gaps) < 11, gaps


def test_the_counters_agree_with_what_devices_heard(running: Pipeline, watcher: Watcher) -> None:
    with running.device() as device:
        for number in range(20):
            assert device.ask(event(number))["status"] == "stored"
        for number in range(5):
            assert device.ask(event(number))["status"] == "stored"  # again: a duplicate
        for payload in (b"junk", b"[]", event(1, value="other")):
            assert device.ask(payload)["status"] == "rejected"
        device.publish([event("a"), event("b"), {}])
        device.wait(lambda: len(device.acks) == 31, "3 ACKs")
        device.wait(lambda: len(device.dead_letters) == 4, "the dead letters")
        assert len(device.heard_at) == 22
        with database_down(running.database):
            device.send(event("last"))  # so that the state changes, and the status is said again
            status = watcher.wait_state("waiting_for_database")
    assert status["counters"] == {
        "received": 31,
        "stored": 22,
        "duplicates": 5,
        "rejected": 4,
        "dead_lettered": 4,
    }
    assert 1 <= status["batches"] <= 29


def test_the_status_says_how_many_messages_the_broker_has_dropped(running: Pipeline) -> None:
    running.ingester.stop()
    running.mosquitto.stop()
    running.mosquitto.extra_config = "sys_interval 1\nmax_queued_messages 100"
    running.mosquitto.start()
    running.mosquitto.wait_ready()
    with running.device() as device:
        for number in range(300):
            device.send(event(number))
        device.publish(event("last"))
        running.ingester.start()
        running.ingester.wait_for_log("WARNING MQTT: the broker has dropped ")
        with (
            Watcher(running.mosquitto.port) as watcher,
            database_down(running.database),
        ):
            device.send(event("more"))
            status = watcher.wait_state("waiting_for_database")
    assert status["broker_dropped"] == 201
