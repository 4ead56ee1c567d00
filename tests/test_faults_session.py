"""What the broker grants, forgets, repeats, or sends that it should not: it costs no event.

What it does: lets a real broker keep messages of QoS 2, lose the session or refuse the
subscription, and puts other bytes in place of some of its own. What it does not: stop, kill or
cut off the broker (tests/test_faults_broker.py), or count calls (tests/test_session.py).
"""

import datetime
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from ingester import broker as broker_module
from ingester import mqtt
from ingester.broker import DROPPED_TOPIC
from ingester.client import Client
from tests.support.device import Device, event
from tests.support.findings import find
from tests.support.load import connects, hear_all
from tests.support.pipeline import Pipeline, wait_until
from tests.support.proxy import Flow, Proxy
from tests.support.tap import PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, Tap
from tests.test_session import acks_for, publish, receive, session, start, tapped
from tools.process import clean_environment, run

CLIENT_ID = "homelab-ingester"
TOPIC = "qs/v1/device-1/events"
# MQTT 3.1.1, section 3.2: accepted, and the broker has no session.
CONNACK = b"\x20\x02\x00\x00"


class Forger(Proxy):
    """A proxy that puts other bytes in place of what a broker sends."""

    def __init__(self, server_port: int, replacements: Mapping[bytes, bytes]) -> None:
        super().__init__(server_port)
        self._replacements = replacements

    def _write(self, flow: Flow) -> None:
        if flow.direction == "to_client":
            for sent, forged in self._replacements.items():
                flow.buffer[:] = flow.buffer.replace(sent, forged)
        super()._write(flow)


@contextmanager
def forged(pipeline: Pipeline, replacements: Mapping[bytes, bytes]) -> Iterator[None]:
    """Put a Forger between broker and ingester; the ingester is gone when the block is left."""
    with Forger(pipeline.mosquitto.port, replacements) as forger:
        pipeline.ingester.environment["MQTT_PORT"] = str(forger.port)
        pipeline.environment["MQTT_PORT"] = str(forger.port)
        yield
        pipeline.ingester.stop()
    assert "Traceback" not in pipeline.ingester.log()


# --- what comes with a message -----------------------------------------------------------


def test_a_message_says_whether_it_was_retained_and_when_it_came(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EarlyClock(datetime.datetime):
        """A clock that is an hour slow, until somebody sets it."""

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.now(tz) - datetime.timedelta(hours=1)

    with pipeline.device() as device:
        device.publish(event("old"), retain=True)
        began_at = time.monotonic()
        monkeypatch.setattr(broker_module, "datetime", EarlyClock)
        with session(pipeline) as broker:
            device.publish(event("new"), retain=True)
            old, new = receive(broker, 2)
            monkeypatch.setattr(broker_module, "datetime", datetime.datetime)
            assert [old.retain, new.retain] == [True, False]  # the second one came at once
            assert began_at < old.arrived_at <= new.arrived_at < time.monotonic()
            assert 0 < broker.oldest_unsettled_seconds < 60


# --- QoS 2 -------------------------------------------------------------------------------


def subscribe_with_qos_2(pipeline: Pipeline) -> None:
    """Do as a script of an earlier time did: leave a session behind, whose QoS is 2."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=CLIENT_ID, clean_session=False)
    granted: list[int] = []

    def on_connect(*_: Any) -> None:
        client.subscribe("qs/v1/+/events", 2)

    client.on_connect = on_connect
    client.on_subscribe = lambda _c, _u, _mid, codes, _props: granted.append(codes[0].value)
    client.connect("127.0.0.1", pipeline.mosquitto.port)

    def is_granted() -> bool:
        client.loop(0.1)
        return granted == [2]

    wait_until(is_granted, "a subscription with QoS 2")
    client.disconnect()
    while client.socket() is not None:
        client.loop(0.1)


def send_with_qos_2(device: Device, number: int) -> None:
    """Publish so many events with QoS 2; the broker has them all when it returns."""
    for begin in range(0, number, 100):  # of many at once, 2.0.11 leaves some unanswered
        for index in range(begin, min(begin + 100, number)):
            device.send(event(index, value=index), qos=2)
        device.wait_taken()


def check_all_settled(pipeline: Pipeline, tap: Tap, device: Device, number: int) -> None:
    """Check that each event is a row and answered, and that nothing is in flight any more."""
    hear_all([device])

    def completed() -> bool:
        answers = [tap.lines[-1].passed("to_server", kind) for kind in (PUBREC, PUBCOMP)]
        return len(answers[1]) >= len(tap.lines[-1].passed("to_client", PUBREL)) >= len(answers[0])

    wait_until(completed, "a PUBCOMP for each")
    pipeline.ingester.stop()
    finding = find("QoS 2", [device], pipeline.database)
    assert finding.rows == finding.heard_stored == finding.sent == number
    assert pipeline.database.count("dead_letters") == 0
    start(pipeline)
    assert device.ask(event("after"), qos=1)["status"] == "stored"
    last = tap.lines[-1]
    assert [item.topic for item in last.passed("to_client", PUBLISH) if item.mid] == [TOPIC]
    assert not last.passed("to_client", PUBREL)


def test_what_waits_for_an_old_session_with_qos_2_is_settled_by_its_rules(
    pipeline: Pipeline,
) -> None:
    number = 1_500  # more than the broker has in flight at once
    subscribe_with_qos_2(pipeline)
    with tapped(pipeline) as tap, pipeline.device() as device:
        send_with_qos_2(device, number)
        start(pipeline)
        check_all_settled(pipeline, tap, device, number)
        first = tap.lines[0]
        for kind in (PUBREC, PUBCOMP):
            assert len(first.passed("to_server", kind)) == number
        assert not first.passed("to_server", PUBACK)
    assert connects(pipeline) == 2
    assert "WARNING" not in pipeline.ingester.log()


@contextmanager
def received_and_locked(pipeline: Pipeline, tap: Tap) -> Iterator[None]:
    """Start the ingester, and let it store what it receives when the block is left."""
    tap.freeze()
    pipeline.ingester.start()
    pipeline.ingester.wait_for_log("Connected to Postgres")
    with pipeline.database.locked():
        tap.thaw()
        pipeline.database.wait_blocked()
        yield


def test_messages_of_qos_2_that_are_redelivered_before_their_pubrec_are_the_same(
    pipeline: Pipeline,
) -> None:
    number = 300
    subscribe_with_qos_2(pipeline)
    with tapped(pipeline) as tap, pipeline.device() as device:
        send_with_qos_2(device, number)
        with received_and_locked(pipeline, tap):
            tap.freeze(to_client=False)
        wait_until(lambda: pipeline.database.count() > 0, "the first rows")
        tap.cut()
        tap.thaw()
        check_all_settled(pipeline, tap, device, number)
        assert not tap.lines[0].passed("to_server", PUBREC)
        # The ingester may have tried before the line was thawed.
        assert sum(len(line.passed("to_server", PUBREC)) for line in tap.lines) == number


def test_a_pubrel_of_an_earlier_connection_is_answered(pipeline: Pipeline) -> None:
    number = 300
    subscribe_with_qos_2(pipeline)
    with tapped(pipeline) as tap, pipeline.device() as device:
        send_with_qos_2(device, number)
        with received_and_locked(pipeline, tap):
            tap.freeze(to_server=False)
        wait_until(lambda: len(tap.lines[0].passed("to_server", PUBREC)) > 0, "a PUBREC")
        hear_all([device])  # the broker has read the ACKs, and so what is behind them
        tap.cut()
        tap.thaw()

        def released_again() -> bool:  # all are answered already, so that says nothing here
            later = tap.lines[1:]
            return sum(len(line.passed("to_client", PUBREL)) for line in later) > number / 2

        wait_until(released_again, "PUBRELs over the next connection")
        check_all_settled(pipeline, tap, device, number)
        assert not tap.lines[0].passed("to_client", PUBREL)
        later = tap.lines[1:]
        released = {item.mid for line in later for item in line.passed("to_client", PUBREL)}
        delivered = {item.mid for line in later for item in line.passed("to_client", PUBLISH)}
        assert len(released - delivered) > number / 2  # known to the broker alone
        completed = {item.mid for line in later for item in line.passed("to_server", PUBCOMP)}
        assert completed == released


# --- sent again over the same connection -------------------------------------------------


def test_what_is_sent_again_over_the_same_connection_is_in_hand_once(pipeline: Pipeline) -> None:
    """As NATS does after 30 s; here each message comes five times at once."""
    number = 50
    replacements = {}
    for n in range(number):
        payload = json.dumps(event(n, value=n)).encode()
        packet = mqtt.publish(TOPIC, payload, n + 1)
        again = bytes((packet[0] | 0x08,)) + packet[1:]  # DUP
        replacements[packet] = packet + 4 * again
    with forged(pipeline, replacements), pipeline.device() as device, session(pipeline) as broker:
        publish(device, range(number))
        publish(device, range(number, number + 1))  # is not sent again, and so is the last
        last = json.dumps(event(number, value=number)).encode()

        def last_is_in_hand() -> bool:
            broker.receive(500, 0.1)
            return any(message.payload == last for message in broker.messages)

        wait_until(last_is_in_hand, "the last one")
        assert [message.mid for message in broker.messages] == list(range(1, number + 2))
        batch = receive(broker, number + 1)
        broker.settle(batch, acks_for(batch))
        assert broker.unsettled == 0
        device.wait(lambda: len(device.acks) == number + 1, "an ACK for each")
        assert len(device.acks) == number + 1


def test_a_packet_id_that_is_given_to_another_message_hides_neither(pipeline: Pipeline) -> None:
    """Mosquitto 2.0 counts packet ids on, whether or not they are in use."""
    packets = [mqtt.publish(TOPIC, json.dumps(event(n, value=n)).encode(), 1 + n) for n in range(2)]
    same_id = mqtt.publish(TOPIC, json.dumps(event(1, value=1)).encode(), 1)
    with (
        forged(pipeline, {packets[1]: same_id}),
        pipeline.device() as device,
        session(pipeline) as broker,
    ):
        publish(device, range(2))
        batch = receive(broker, 2)
        assert [message.mid for message in batch] == [1, 1]
        broker.settle(batch, acks_for(batch))
        device.wait(lambda: len(device.acks) == 2, "an ACK for each")


# --- a session that is lost --------------------------------------------------------------

LOST = "WARNING MQTT: the broker had lost this session: the events that it had queued are gone."


def test_a_broker_that_forgot_the_session_is_warned_of_once(running: Pipeline) -> None:
    mosquitto, ingester = running.mosquitto, running.ingester

    def restart(forget: bool) -> None:
        log_end = ingester.log_end
        mosquitto.stop()
        if forget:
            (mosquitto.folder / "data/mosquitto.db").unlink()
        mosquitto.start()
        ingester.wait_for_log("INFO MQTT connected", after=log_end)

    restart(forget=False)
    assert LOST not in ingester.log()
    restart(forget=True)
    assert ingester.log().count(LOST) == 1
    restart(forget=False)
    assert ingester.log().count(LOST) == 1
    with running.device() as device:
        assert device.ask(event(1))["status"] == "stored"


# --- a subscription that is not granted --------------------------------------------------


def restart_with(pipeline: Pipeline, config: str) -> None:
    pipeline.mosquitto.stop()
    pipeline.mosquitto.extra_config = config
    pipeline.mosquitto.start()
    pipeline.mosquitto.wait_ready()


@pytest.mark.parametrize("user", ["the-ingester", ""])
def test_a_subscription_that_is_refused_is_an_error_that_names_topic_and_right(
    pipeline: Pipeline, user: str
) -> None:
    # Its access lists let everybody subscribe, and hear nothing; its plugin does not.
    folders = (*Path("/usr").glob("lib*"), *Path("/usr/lib").glob("*-linux-*"))
    plugins = [folder / "mosquitto_dynamic_security.so" for folder in folders]
    (plugin,) = (path for path in plugins if path.exists())  # Debian: package mosquitto
    rights = pipeline.mosquitto.folder / "rights.json"
    rights.write_text(json.dumps({"defaultACLAccess": {"subscribe": False}}))
    config = f"plugin {plugin}\nplugin_opt_config_file {rights}"
    ingester = pipeline.ingester
    if user:
        # 2.0.11: whoever gives a name is refused there, unless the plugin knows him.
        passwords = pipeline.mosquitto.folder / "passwords"
        run(["mosquitto_passwd", "-c", "-b", str(passwords), user, "pw"], clean_environment())
        ingester.environment |= {"MQTT_USERNAME": user, "MQTT_PASSWORD": "pw"}
        config += f"\npassword_file {passwords}"
    restart_with(pipeline, config)
    ingester.start()
    who = f"the user {user}" if user else "clients without a user name"
    ingester.wait_for_log(
        "ERROR MQTT: the broker refuses the subscription to qs/v1/+/events: its access list (ACL)"
        f" must give {who} the right to subscribe to and read qs/v1/+/events; trying again"
    )
    check_retried_with_backoff(pipeline)
    restart_with(pipeline, "")
    ingester.wait_for_log("INFO MQTT: back after")
    with pipeline.device() as device:
        assert device.ask(event(1))["status"] == "stored"


def check_retried_with_backoff(pipeline: Pipeline) -> None:
    """Check that it tries again, and that the log is short."""
    broker = pipeline.mosquitto

    def tries() -> int:
        return len(
            re.findall("New client connected .* as homelab-ingester", broker.log(broker.log_start))
        )

    wait_until(lambda: tries() >= 4, "the fourth try")
    assert connects(pipeline) == 0
    log = pipeline.ingester.log()
    assert log.count("ERROR MQTT") == 1
    assert "WARNING MQTT" not in log
    assert "back after" not in log
    assert "Traceback" not in log


def test_a_subscription_with_qos_0_alone_is_an_error_and_not_used(pipeline: Pipeline) -> None:
    # A SUBACK (section 3.9) for two topics: a packet id, and a code for each.
    sent = {number: b"\x90\x04" + number.to_bytes(2, "big") for number in range(1, 100)}
    replacements = {head + b"\x01\x00": head + b"\x00\x00" for head in sent.values()}
    with forged(pipeline, replacements), pipeline.device() as device:
        pipeline.ingester.start()
        pipeline.ingester.wait_for_log(
            "ERROR MQTT: the broker grants qs/v1/+/events with QoS 0 alone, with which events are"
            " lost: it must allow QoS 1 (max_qos in mosquitto.conf): its access list (ACL) must"
        )
        check_retried_with_backoff(pipeline)
        assert device.messages == []


# --- what it should not send -------------------------------------------------------------


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("wrong", [b"\0", b"\xff", b"\xed"], ids=["NUL", "0xff", "a surrogate's"])
def test_a_message_whose_topic_mqtt_forbids_is_a_dead_letter_and_blocks_nobody(
    pipeline: Pipeline, wrong: bytes, qos: int
) -> None:
    with forged(pipeline, {b"/device-1/events": b"/devi" + wrong + b"e-1/events"}):
        with session(pipeline):
            pass  # the subscription stands from here on
        start(pipeline)
        with pipeline.device() as device, pipeline.device("device-2", hears="device-2") as other:
            device.send(event(1), qos=qos)
            device.wait(lambda: len(device.dead_letters) == 1, "a dead letter")
            assert device.dead_letters[0]["topic"] == "qs/v1/devi\ufffde-1/events"
            assert device.dead_letters[0]["reason"] == "device_mismatch"
            assert other.ask(event(1, "device-2"))["status"] == "stored"
            assert connects(pipeline) == 1
            # It was PUBACKed: it does not come again.
            pipeline.ingester.stop()
            start(pipeline)
            assert other.ask(event(2, "device-2"))["status"] == "stored"
    assert pipeline.database.query("SELECT topic FROM dead_letters") == [
        ("qs/v1/devi\ufffde-1/events",)
    ]
    assert "WARNING" not in pipeline.ingester.log()


@pytest.mark.parametrize("digits", [21, 5_000])
def test_a_count_of_dropped_messages_with_endless_digits_is_ignored(
    pipeline: Pipeline, digits: int
) -> None:
    packet = b"\x30" + mqtt.publish(DROPPED_TOPIC, b"9" * digits, 0)[1:]
    packet = packet.replace(DROPPED_TOPIC.encode() + b"\0\0", DROPPED_TOPIC.encode())
    head = 3 if digits > 100 else 2
    size = len(packet) - head
    length = bytes((size & 0x7F | 0x80, size >> 7)) if head == 3 else bytes((size,))
    packet = b"\x30" + length + packet[head:]
    with forged(pipeline, {CONNACK: CONNACK + packet}), pipeline.device() as device:
        start(pipeline)
        assert device.ask(event(1))["status"] == "stored"
        assert connects(pipeline) == 1
        assert "has dropped" not in pipeline.ingester.log()


# --- a broker that does not answer -------------------------------------------------------


@contextmanager
def listener() -> Iterator[socket.socket]:
    """A port on which the kernel takes connections, and nobody reads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(15)
        yield server


def test_a_port_that_takes_the_connection_and_says_nothing_is_told_as_that(
    pipeline: Pipeline,
) -> None:
    with listener() as silent:
        port = silent.getsockname()[1]
        pipeline.ingester.environment["MQTT_PORT"] = str(port)
        pipeline.ingester.start()
        pipeline.ingester.wait_for_log(
            f"WARNING MQTT: 127.0.0.1:{port} takes the connection, and has sent no CONNACK in 3 s:"
            " it hangs or is overloaded, or MQTT_PORT is not that of an MQTT listener; trying"
        )
        assert pipeline.ingester.stop(timeout=5) == 0
    assert "Traceback" not in pipeline.ingester.log()


# --- while the database works ------------------------------------------------------------


@pytest.mark.faults
def test_a_session_that_is_not_read_for_long_is_kept(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a keepalive of 1 s, after which the broker waits for 0.5 s more."""
    monkeypatch.setattr(broker_module, "KEEPALIVE_SECONDS", 1)
    monkeypatch.setattr(Client, "READ_BYTES_MAX", 300)
    number = 500
    with (
        tapped(pipeline) as tap,
        pipeline.device() as device,
        session(pipeline, BATCH_MAX="5") as broker,
    ):
        publish(device, range(number))
        batch = receive(broker, 5)

        def serve_for(seconds: float) -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                broker.serve()
                time.sleep(0.05)

        serve_for(4)
        assert 10 <= broker.unsettled <= 12
        settled = 0
        while settled < number:
            if settled == 50:
                serve_for(4)  # the answers to the pings of before are not read yet
            if batch:
                broker.settle(batch, acks_for(batch))
                settled += len(batch)
            assert broker.connection == 1
            batch = broker.receive(5, 0.1)
        device.wait(lambda: len(device.acks) == number, "an ACK for each")
        assert broker.connection == 1
    assert len(tap.lines) == 1


@pytest.mark.faults
def test_a_database_that_is_locked_for_40_s_with_the_hand_full_costs_no_connection(
    pipeline: Pipeline,
) -> None:
    start(pipeline, BATCH_MAX="5")
    with pipeline.device() as device:
        with pipeline.database.locked():
            publish(device, range(1))
            pipeline.database.wait_blocked()
            publish(device, range(1, 1_000))
            until = time.monotonic() + 40
            while time.monotonic() < until:
                assert pipeline.ingester.running
                time.sleep(0.5)
        hear_all([device], 60)
        finding = find("locked", [device], pipeline.database)
    assert finding.rows == finding.heard_stored == finding.sent == 1_000
    assert connects(pipeline) == 1
    assert "WARNING MQTT" not in pipeline.ingester.log()
