"""What happens to events when the broker dies, hangs, forgets, or is shared by mistake.

What it does: devices publish while a real broker is stopped, killed, frozen, cut off or put
back to an older state; then the promise is checked (tests/support/findings.py). What it does not:
harm the ingester or the database (tests/test_faults.py), or fill queues
(tests/test_faults_queue.py).

Invariant: where the broker kept what it had taken, no device sends an event again before
the check: sending again would hide that the ingester lost it.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ingester.broker import Broker
from ingester.message import Message
from ingester.settings import Settings
from tests.support.device import Device, event
from tests.support.each import short_or_long
from tests.support.findings import Finding, find
from tests.support.load import (
    check_log,
    connects,
    deliver_rest,
    devices,
    events_sent,
    hear_all,
    load,
    wait_for_acks,
    wait_for_load,
)
from tests.support.pipeline import Database, Pipeline, restart_from, saved, wait_until
from tests.support.proxy import Proxy
from tools.stack import Ingester

Report = Callable[[Finding], None]


@pytest.fixture
def steady(running: Pipeline) -> Iterator[Pipeline]:
    """A running pipeline, in which the ingester may not end, whatever the test does."""
    pid = running.ingester.pid
    yield running
    assert running.ingester.running, running.ingester.log_tail()
    assert running.ingester.pid == pid


def all_are_rows(publishers: list[Device], database: Database) -> None:
    """Wait until every event is a row, without any being sent again by its device."""
    sent = events_sent(publishers)
    wait_until(lambda: database.count() >= sent, f"{sent} rows, not {database.count()}", 30)


# --- stopped, killed, frozen -------------------------------------------------------------


@pytest.mark.parametrize("times", short_or_long(1, 4))
def test_what_a_stopped_broker_had_taken_becomes_a_row(
    steady: Pipeline, report: Report, times: int
) -> None:
    with devices(steady, 2) as publishers:
        began_at = time.monotonic()
        with load(publishers):
            for _ in range(times):
                wait_for_acks(publishers)
                steady.mosquitto.stop()
                wait_for_load(publishers, 400)
                steady.mosquitto.start()
                steady.mosquitto.wait_ready()
            wait_for_acks(publishers)
        all_are_rows(publishers, steady.database)
        deliver_rest(publishers)  # some ACKs were published while their device was away
        case = "broker stopped" + (f", {times} times" if times > 1 else "")
        report(find(case, publishers, steady.database))
    check_log(steady, "MQTT", time.monotonic() - began_at, times)
    assert connects(steady) == times + 1


@pytest.mark.parametrize("times", short_or_long(1, 4))
def test_a_killed_broker_costs_nothing_that_a_device_heard_as_stored(
    steady: Pipeline, report: Report, times: int
) -> None:
    with devices(steady, 2) as publishers:
        began_at = time.monotonic()
        with load(publishers):
            for _ in range(times):
                wait_for_acks(publishers)
                steady.mosquitto.kill()
                wait_for_load(publishers)
                steady.mosquitto.start()
                steady.mosquitto.wait_ready()
            wait_for_acks(publishers)
        find("before anything is sent again", publishers, steady.database, complete=False)
        deliver_rest(publishers)
        case = "broker killed" + (f", {times} times" if times > 1 else "")
        report(find(case, publishers, steady.database))
    check_log(steady, "MQTT", time.monotonic() - began_at, times)
    assert connects(steady) == times + 1


@pytest.mark.parametrize("times", short_or_long(1, 5))
def test_a_broker_restarted_at_once_loses_nothing(
    steady: Pipeline, report: Report, times: int
) -> None:
    with devices(steady, 2) as publishers:
        began_at = time.monotonic()
        with load(publishers):
            for _ in range(times):
                wait_for_acks(publishers)
                steady.mosquitto.stop()
                steady.mosquitto.start()
                steady.mosquitto.wait_ready()
            wait_for_acks(publishers)
        all_are_rows(publishers, steady.database)
        deliver_rest(publishers)
        case = "broker restarted" + (f", {times} times" if times > 1 else "")
        report(find(case, publishers, steady.database))
    check_log(steady, "MQTT", time.monotonic() - began_at, times)


@pytest.mark.parametrize("seconds", short_or_long(2, 15))
def test_a_frozen_broker_that_thaws_goes_on_where_it_was(
    steady: Pipeline, report: Report, seconds: int
) -> None:
    with devices(steady, 2) as publishers:
        with load(publishers, per_second=100):
            wait_for_acks(publishers)
            steady.mosquitto.pause()
            try:
                wait_for_load(publishers, seconds * 2 * 100)
            finally:
                steady.mosquitto.resume()
            wait_for_acks(publishers)
        hear_all(publishers)  # nobody lost the connection, so nothing needs sending again
        report(find(f"broker frozen for {seconds} s", publishers, steady.database))
    assert connects(steady) == 1
    assert "WARNING" not in steady.ingester.log()


def test_qos_2_across_a_restart_of_the_broker_is_stored_once(
    steady: Pipeline, report: Report
) -> None:
    with devices(steady, 2) as publishers:
        with load(publishers, qos=2):
            wait_for_acks(publishers)
            steady.mosquitto.stop()
            wait_for_load(publishers)
            steady.mosquitto.start()
            wait_for_acks(publishers)
        all_are_rows(publishers, steady.database)
        deliver_rest(publishers)
        report(find("broker restarted, QoS 2", publishers, steady.database))


# --- cut off -----------------------------------------------------------------------------


@pytest.fixture
def proxy(pipeline: Pipeline) -> Iterator[Proxy]:
    """What lies between ingester and broker; the devices are connected directly."""
    with Proxy(pipeline.mosquitto.port) as proxy:
        pipeline.ingester.environment["MQTT_PORT"] = str(proxy.port)
        yield proxy
        pipeline.ingester.stop()


@pytest.mark.parametrize("times", short_or_long(1, 5))
@pytest.mark.parametrize("reset", [True, False], ids=["RST", "FIN"])
def test_a_cut_line_to_the_broker_loses_nothing(
    proxy: Proxy, steady: Pipeline, report: Report, times: int, reset: bool
) -> None:
    with devices(steady, 2) as publishers:
        began_at = time.monotonic()
        with load(publishers):
            for _ in range(times):
                wait_for_acks(publishers)
                proxy.cut(reset)
            wait_for_acks(publishers)
        hear_all(publishers)  # the broker was there all the time: nothing is sent again
        how = "RST" if reset else "FIN"
        case = f"line to the broker cut by {how}" + (f", {times} times" if times > 1 else "")
        report(find(case, publishers, steady.database))
    check_log(steady, "MQTT", time.monotonic() - began_at, times)


FROZEN = {
    "from the broker": {"to_client": True, "to_server": False},
    "to the broker": {"to_client": False, "to_server": True},
    "from and to the broker": {"to_client": True, "to_server": True},
}


@pytest.mark.parametrize(
    "direction",
    [
        "from the broker",
        "to the broker",
        pytest.param("from and to the broker", marks=pytest.mark.faults),
    ],
)
def test_a_line_that_is_frozen_and_then_cut_loses_nothing(
    proxy: Proxy, steady: Pipeline, report: Report, direction: str
) -> None:
    with devices(steady, 2) as publishers:
        with load(publishers):
            wait_for_acks(publishers)
            proxy.freeze(**FROZEN[direction])
            wait_for_load(publishers, 200)
            proxy.cut()
            proxy.thaw()
            wait_for_acks(publishers)
        hear_all(publishers)
        report(find(f"line {direction} frozen, then cut", publishers, steady.database))
    assert connects(steady) == 2


@pytest.mark.faults
@pytest.mark.parametrize("direction", FROZEN)
def test_a_line_that_thaws_after_a_while_goes_on_where_it_was(
    proxy: Proxy, steady: Pipeline, report: Report, direction: str
) -> None:
    with devices(steady, 2) as publishers:
        with load(publishers, per_second=100):
            wait_for_acks(publishers)
            proxy.freeze(**FROZEN[direction])
            wait_for_load(publishers, 10 * 2 * 100)
            proxy.thaw()
            wait_for_acks(publishers)
        hear_all(publishers)
        report(find(f"line {direction} frozen for 10 s", publishers, steady.database))
    assert connects(steady) == 1


@pytest.mark.faults
def test_a_line_that_is_lost_without_a_word_is_noticed_by_itself(
    proxy: Proxy, steady: Pipeline, report: Report
) -> None:
    """What a router does that forgets a connection: neither side is told."""
    with devices(steady, 2) as publishers:
        with load(publishers, per_second=50):
            wait_for_acks(publishers)
            proxy.forget()
            began_at = time.monotonic()
            wait_until(lambda: connects(steady) == 2, "the next connection", 60)
            seconds = time.monotonic() - began_at
            wait_for_acks(publishers)
        hear_all(publishers)
        note = f"noticed after {seconds:.0f} s"
        case = "line to the broker lost without a word"
        report(find(case, publishers, steady.database, note=note))
    check_log(steady, "MQTT", seconds)


# --- an older state of the broker: packet ids begin again --------------------------------


@contextmanager
def held_back(database: Database, device: Device, number: int) -> Iterator[None]:
    """Let nobody else store that event of the device, nor a batch with it."""
    connection = database.connect()
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO events (event_id, device_id, schema, event_type)"
                " VALUES (%s, 'nobody', 1, 'nothing')",
                (f"{device.device_id}-{number}",),
            )
        yield
        connection.rollback()
    finally:
        connection.close()


def wait_until_stuck(database: Database, device: Device) -> None:
    """Wait until the ingester's INSERT of an event of this device waits for another's."""
    stuck = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
        " AND query LIKE %s"
    )
    wanted = f'EXECUTE insert_events%"{device.device_id}-%'
    wait_until(
        lambda: database.query(stuck, database.name, wanted) == [(1,)],
        f"an INSERT for {device.device_id} that waits",
    )


def test_a_broker_put_back_to_an_older_state_loses_no_event_after_it(
    steady: Pipeline, report: Report
) -> None:
    with devices(steady, 1) as publishers:
        with load(publishers):
            wait_for_acks(publishers)
            state = saved(steady.mosquitto)
            wait_for_acks(publishers, 200)
        restart_from(steady.mosquitto, state)
        with steady.device("device-new", hears="device-new") as new:
            with load([new]):
                wait_for_acks([new])
            hear_all([new])
            deliver_rest(publishers)  # what the older state did not know of
            case = "broker put back to an older state"
            report(find(case, [*publishers, new], steady.database))


def test_a_batch_whose_connection_is_gone_when_it_is_stored_pubacks_nothing(
    steady: Pipeline, report: Report
) -> None:
    """The ingester finds out about the restart only when it has stored the batch."""
    with devices(steady, 2) as publishers:
        old, new = publishers
        state = saved(steady.mosquitto)
        with held_back(steady.database, old, 0):
            for number in range(50):
                old.publish(event(number, old.device_id))
            wait_until_stuck(steady.database, old)
            restart_from(steady.mosquitto, state)
            for number in range(50):
                new.publish(event(number, new.device_id))
        hear_all([new])
        deliver_rest([old])
        case = "packet ids begin again while a batch is being stored"
        report(find(case, publishers, steady.database))


@pytest.mark.faults
def test_a_batch_of_an_earlier_connection_is_given_up_and_pubacks_nothing(
    running: Pipeline, report: Report
) -> None:
    """The deadly one: what is in hand has the packet ids of what the broker sends next.

    The ingester is killed at a moment when a PUBACK for the old batch would already have
    made the broker forget the new one.
    """
    pipeline = running
    pipeline.ingester.stop()
    pipeline.database.query(f"ALTER DATABASE {pipeline.database.name} SET lock_timeout = '300ms'")
    pipeline.ingester.environment["BATCH_MAX"] = "50"
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    with devices(pipeline, 2) as publishers:
        old, new = publishers
        state = saved(pipeline.mosquitto)
        with held_back(pipeline.database, new, 0):
            with held_back(pipeline.database, old, 0):
                for number in range(50):
                    old.publish(event(number, old.device_id))
                wait_until_stuck(pipeline.database, old)
                restart_from(pipeline.mosquitto, state)
                pipeline.ingester.wait_for_log("INFO MQTT: back after")
                for number in range(50):
                    new.publish(event(number, new.device_id))
            wait_until_stuck(pipeline.database, new)
            pipeline.ingester.kill()
        pipeline.ingester.start()
        hear_all([new])
        deliver_rest([old])
        case = "packet ids begin again, and the ingester is killed"
        report(find(case, publishers, pipeline.database))


def test_the_broker_module_pubacks_no_packet_id_of_an_earlier_connection(
    pipeline: Pipeline,
) -> None:
    """The same without the rest of the ingester, which never even tries to."""
    broker = Broker(Settings.from_env(pipeline.environment), last_will=b"{}")

    def receive(number: int) -> list[Message]:
        batch: list[Message] = []

        def all_there() -> bool:
            batch[:] = broker.receive(500, 0.1)
            return len(batch) == number

        wait_until(all_there, f"{number} messages")
        return batch

    wait_until(lambda: broker.connected or bool(broker.receive(500, 0.1)), "a subscription")
    state = saved(pipeline.mosquitto)
    with pipeline.device() as device:
        for number in range(10):
            device.publish(event(f"old-{number}"))
        old = receive(10)
    restart_from(pipeline.mosquitto, state)
    broker.wait(0.2)
    with pipeline.device() as device:
        for number in range(10):
            device.publish(event(f"new-{number}"))
        new = receive(10)
    assert {message.mid for message in new} == {message.mid for message in old}
    assert not {message.payload for message in new} & {message.payload for message in old}
    broker.settle(old, [])
    broker.close(b"{}")
    broker = Broker(Settings.from_env(pipeline.environment), last_will=b"{}")
    again = receive(10)
    assert [message.payload for message in again] == [message.payload for message in new]
    broker.close(b"{}")


# --- shared by mistake -------------------------------------------------------------------


@pytest.mark.parametrize("seconds", short_or_long(4, 20))
def test_two_ingesters_with_one_client_id_lose_nothing_and_do_not_fight(
    steady: Pipeline, report: Report, tmp_path: Path, seconds: int
) -> None:
    second = Ingester(steady.ingester.environment, tmp_path / "second.log")
    with devices(steady, 2) as publishers:
        try:
            with load(publishers, per_second=100):
                wait_for_acks(publishers)
                began_at = time.monotonic()
                second.start()
                second.wait_ready()
                wait_for_load(publishers, 2 * 100 * seconds)
            lasted = time.monotonic() - began_at
            assert second.running
        finally:
            second.stop()
        hear_all(publishers)  # the broker was there all the time: nothing is sent again
        both = steady.ingester.log() + second.log()
        number = both.count("MQTT connected rc=Success")
        note = f"{number} connects in {lasted:.0f} s"
        case = f"two ingesters with one client id, {seconds} s"
        report(find(case, publishers, steady.database, note=note))
    assert 3 <= number <= 12 + lasted
    assert re.search("WARNING MQTT: .*another client.* homelab-ingester", both), both
    assert len(re.findall("WARNING", both)) <= 2 * (3 + lasted / 60), both
