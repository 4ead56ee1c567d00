"""What the broker queues for the ingester: many events, big ones, retained ones, too many.

What it does: fills the queue of an absent or waiting ingester, floods it, sends what is as
large as the broker takes, and checks the promise (tests/support/findings.py) and the memory. What
it does not: harm the broker (tests/test_faults_broker.py).

Invariant: no device sends an event again before the check, except what the broker said it
dropped.
"""

import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from benchmark.machine import memory_peak_mb
from tests.support.device import Device, event
from tests.support.each import short_or_long
from tests.support.findings import Finding, find
from tests.support.load import (
    broker_dropped,
    check_log,
    connects,
    database_down,
    deliver_rest,
    devices,
    hear_all,
    load,
    wait_for_load,
)
from tests.support.pipeline import Pipeline, wait_until
from tools.process import CHECKOUT

Report = Callable[[Finding], None]
MEGABYTES_MAX = 100


@pytest.fixture
def steady(pipeline: Pipeline) -> Iterator[Pipeline]:
    """A running pipeline whose broker counts every second, and in which nothing may end."""
    restart_with(pipeline, "sys_interval 1")
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    yield pipeline
    assert pipeline.ingester.running, pipeline.ingester.log_tail()
    assert "Traceback" not in pipeline.ingester.log()


def restart_with(pipeline: Pipeline, extra_config: str) -> None:
    """Start the broker again with lines that win over those of mosquitto.conf."""
    pipeline.mosquitto.stop()
    pipeline.mosquitto.extra_config = extra_config
    pipeline.mosquitto.start()
    pipeline.mosquitto.wait_ready()


def wait_until_taken(publishers: list[Device]) -> None:
    """Wait until the broker has PUBACKed the QoS 1 events of each."""
    for device in publishers:
        device.wait_taken(60)


# --- many --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", short_or_long(5_000, 20_000))
def test_what_is_published_while_the_ingester_is_away_is_stored_when_it_is_back(
    steady: Pipeline, report: Report, number: int
) -> None:
    assert steady.ingester.stop() == 0
    with devices(steady, 5) as publishers:
        for device in publishers:
            for index in range(number // 5):
                item = event(index, device.device_id, value=index)
                device.send(item, qos=index % 2)  # the last one with QoS 1: it comes last
        wait_until_taken(publishers)
        steady.ingester.start()
        began_at = time.monotonic()
        steady.database.wait_count("events", number, 90)
        seconds = time.monotonic() - began_at
        hear_all(publishers, 60)
        peak = memory_peak_mb(steady.ingester)
        dropped = broker_dropped(steady)
        note = f"half of them QoS 0; stored within {seconds:.1f} s, memory {peak:.0f} MB"
        case = f"ingester away while {number:,} events are published"
        report(find(case, publishers, steady.database, note=note))
    assert peak < MEGABYTES_MAX
    assert dropped == 0


@pytest.mark.parametrize("seconds", short_or_long(1, 5))
def test_a_device_that_floods_does_not_keep_another_from_its_acks(
    steady: Pipeline, report: Report, seconds: int
) -> None:
    times: list[float] = []
    with devices(steady, 2) as publishers:
        flooding, other = publishers
        with load([flooding], per_second=5_000):
            wait_for_load([flooding], 500)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                began_at = time.perf_counter()
                item = event(len(times), other.device_id)
                other.ask(item)
                times.append(other.heard_at[item["event_id"]] - began_at)
        hear_all(publishers, 60)
        note = f"the other's ACKs after {statistics.median(times):.2f} s, at most {max(times):.2f}"
        report(find("one device floods", publishers, steady.database, note=note))
    assert max(times) < 5
    assert connects(steady) == 1


@pytest.mark.parametrize("qos", [0, 1])
def test_a_device_that_publishes_and_leaves_at_once_is_heard_all_the_same(
    steady: Pipeline, report: Report, qos: int
) -> None:
    with steady.device("listener") as listener:
        gone = []
        for index in range(20):
            # It hears its own ACKs alone: a socket closed with another's unread would be reset,
            # and the reset may overtake what was sent.
            name = f"brief-{index}"
            with steady.device(name, hears=name) as device:
                device.send(event(0, device.device_id), qos=qos)
            gone.append(device)
        wanted = {key for device in gone for key in device.sent}
        listener.wait(lambda: listener.heard_at.keys() >= wanted, "all ACKs")
        report(find(f"devices leave at once, QoS {qos}", [*gone, listener], steady.database))


# --- big ---------------------------------------------------------------------------------


def test_a_byte_more_than_the_broker_takes_costs_its_sender_the_connection_alone(
    steady: Pipeline, report: Report
) -> None:
    conf = (CHECKOUT / "mosquitto/config/mosquitto.conf").read_text()
    match = re.search(r"(?m)^max_packet_size (\d+)$", conf)
    assert match
    with devices(steady, 2) as publishers:
        device, bystander = publishers
        # The versions differ by some bytes in what of the header they count.
        smallest = int(match[1]) - 2 - len(f"qs/v1/{device.device_id}/events") - 5
        log_end = steady.mosquitto.log_end

        def refused() -> bool:
            return "oversize packet" in steady.mosquitto.log(log_end)

        def settled(number: int) -> bool:
            return len(device.acks) == number or refused()

        number = 0
        with load([bystander]):
            while not refused():
                # With QoS 1, paho would send what is refused for ever.
                device.send(b"[" * (smallest + number), qos=0)
                number += 1
                wait_until(partial(settled, number), "an ACK, or to be disconnected")
            device.deliver([event("after", device.device_id)])
        hear_all(publishers)
        largest = smallest + number - 2
        note = f"{largest:,} bytes are answered, one more disconnects"
        report(find("largest payload", publishers, steady.database, note=note))
    assert {ack.get("reason") for ack in device.acks} == {"payload_too_large", None}
    kept = steady.database.query("SELECT max(length(payload)), count(*) FROM dead_letters")
    assert kept == [(largest, len(device.acks) - 1)]
    assert largest > 2_000_000
    assert connects(steady) == 1


# The broker queues up to 100 MiB (mosquitto.conf).
@pytest.mark.parametrize("number", short_or_long(100, 350))
def test_big_events_for_a_waiting_ingester_do_not_fill_its_memory(
    steady: Pipeline, report: Report, number: int
) -> None:
    with devices(steady, 2) as publishers:
        began_at = time.monotonic()
        with database_down(steady.database):
            for index in range(number):
                device = publishers[index % 2]
                device.send(event(index, device.device_id, value=f"{index:06}" + "x" * 250_000))
            wait_until_taken(publishers)
            steady.ingester.wait_for_log("WARNING Postgres: ")
            waiting = memory_peak_mb(steady.ingester)
            assert connects(steady) == 1  # the MQTT session stayed
        hear_all(publishers, 60)
        peak = memory_peak_mb(steady.ingester)
        seconds = time.monotonic() - began_at
        note = f"memory {waiting:.0f} MB while waiting, {peak:.0f} MB in all"
        case = f"{number} events of 250 kB while the database is down"
        report(find(case, publishers, steady.database, note=note))
    check_log(steady, "Postgres", seconds)
    assert peak < MEGABYTES_MAX
    assert broker_dropped(steady) == 0


# --- retained ----------------------------------------------------------------------------


def test_a_retained_event_that_comes_again_at_every_subscribe_stays_one_row(
    steady: Pipeline, report: Report
) -> None:
    with devices(steady, 1) as publishers:
        device = publishers[0]

        def heard(number: int) -> bool:
            return len(device.acks) == number

        device.publish(event(1, device.device_id), retain=True)
        device.wait(lambda: len(device.acks) == 1, "an ACK")
        for restarts in (2, 3):
            steady.ingester.stop()
            steady.ingester.start()
            wait_until(partial(heard, restarts), "its ACK again")
        device.publish(b"", retain=True)
        device.wait(lambda: len(device.dead_letters) == 1, "a dead letter for an empty payload")
        steady.ingester.stop()
        steady.ingester.start()
        assert device.ask(event(2, device.device_id))["status"] == "stored"
        note = "came 3 times; deleted by an empty payload"
        report(find("a retained event", publishers, steady.database, note=note))
    assert [ack["status"] for ack in device.acks].count("rejected") == 1
    assert len(device.acks) == 5


# --- too many ----------------------------------------------------------------------------


def test_what_the_broker_drops_from_a_full_queue_is_said(steady: Pipeline, report: Report) -> None:
    restart_with(steady, "sys_interval 1\nmax_queued_messages 100")
    steady.ingester.wait_for_log("INFO MQTT: back after")
    steady.ingester.stop()
    with devices(steady, 1) as publishers:
        for index in range(500):
            publishers[0].send(event(index, publishers[0].device_id))
        wait_until_taken(publishers)  # the device hears success
        dropped = 500 - 100
        # It says so once a second, and may be in the middle of it.
        wait_until(lambda: broker_dropped(steady) == dropped, "the broker to count all it dropped")
        steady.ingester.start()
        steady.ingester.wait_for_log(f"WARNING MQTT: the broker has dropped {dropped} messages")
        steady.database.wait_count("events", 500 - dropped)
        deliver_rest(publishers)
        note = f"{dropped} dropped, said in the log, sent again"
        report(find("queue of 100, 500 published", publishers, steady.database, note=note))
    assert len(re.findall("WARNING.* dropped", steady.ingester.log(steady.ingester.log_start))) == 1
