"""A tool's own session, at real brokers: it receives, and takes nothing away.

What it does: connects, beside an ingester or in its absence, brokers that are open, behind
TLS and a password, or that know clients by their user names. What it does not: the tools.
"""

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ingester.settings import Settings
from ingester.tool_session import BrokerUnavailable, ToolSession
from tests.support.certificates import Authority
from tests.support.device import event
from tests.support.load import connects
from tests.support.pipeline import Pipeline
from tests.support.proxy import Flow, Proxy
from tools.process import clean_environment, free_port, run
from tools.stack import Mosquitto, Stack

_number = itertools.count()
NAMED_BY_USER = "use_username_as_clientid true"
PASSWORD = "a-password"


def settings(pipeline: Pipeline, **variables: str) -> Settings:
    return Settings.from_env(pipeline.environment | pipeline.ingester.environment | variables)


def log_of(broker: Mosquitto) -> str:
    return (broker.folder / "log/mosquitto.log").read_text()


MakePipeline = Callable[[str], Pipeline]


@pytest.fixture
def guarded(servers: Stack, pipeline: Pipeline, tmp_path: Path) -> Iterator[MakePipeline]:
    """Make a broker whose second listener asks for TLS and a password, for the ingester."""
    with ExitStack() as cleanup:

        def make(options: str) -> Pipeline:
            folder = servers.folder / f"session-{next(_number)}"
            folder.mkdir()
            ca = Authority(tmp_path / "ca")
            cert, key = ca.issue("broker")
            given = {"cafile": ca.cert, "certfile": cert, "keyfile": key}
            for name, source in given.items():
                shutil.copy(source, folder / name)
            passwords = folder / "passwords"
            for user in ("the-ingester", "another"):
                create = ["-c"] if not passwords.exists() else []
                run(["mosquitto_passwd", *create, "-b", str(passwords), user, PASSWORD],
                    clean_environment())  # fmt: skip
            port = free_port()
            lines = [f"password_file {passwords}", f"listener {port} 127.0.0.1"]
            lines += ["socket_domain ipv4", options]
            lines += [f"{name} {folder}/{name}" for name in given]
            mosquitto = Mosquitto(folder, free_port(), free_port(), "\n".join(lines))
            cleanup.callback(mosquitto.stop)
            mosquitto.start()
            mosquitto.wait_ready()
            made = Pipeline(mosquitto, pipeline.database, folder)
            cleanup.callback(made.close)
            made.ingester.environment |= {
                "MQTT_HOST": "localhost",
                "MQTT_PORT": str(port),
                "MQTT_CA_FILE": str(ca.cert),
                "MQTT_USERNAME": "the-ingester",
                "MQTT_PASSWORD": PASSWORD,
            }
            return made

        yield make


def test_it_publishes_and_hears_and_leaves_nothing_behind(pipeline: Pipeline) -> None:
    with pipeline.device() as device:
        device.publish(b"kept", topic="qs/v1/kept", retain=True)
        with ToolSession(settings(pipeline), ["qs/v1/#"]) as session:
            assert session.connected
            (kept,) = session.receive(10)
            assert kept[:3] == ("qs/v1/kept", b"kept", True)
            session.publish("qs/v1/device-1/acks", b'{"status": "stored", "event_id": "x"}')
            device.wait(lambda: len(device.acks) == 1, "what it published")
            (own,) = session.receive(10)
            assert own.topic == "qs/v1/device-1/acks"
            assert kept.received_at <= own.received_at <= time.monotonic()
            assert session.receive(0) == []
            for number in range(300):
                device.send(event(number))
            heard = 0
            while heard < 300:
                part = session.receive(10)
                assert part
                heard += len(part)
        assert not session.connected
    # What a session leaves behind is written with its client id.
    pipeline.mosquitto.stop()
    assert b"session" not in (pipeline.mosquitto.folder / "data/mosquitto.db").read_bytes()


class NotUtf8(Proxy):
    """A proxy that spoils a topic."""

    def _write(self, flow: Flow) -> None:
        if flow.direction == "to_client":
            flow.buffer[:] = flow.buffer.replace(b"device-1/events", b"devi\xffe-1/events")
        super()._write(flow)


def test_a_topic_that_is_not_utf_8_is_not_heard(pipeline: Pipeline) -> None:
    with NotUtf8(pipeline.mosquitto.port) as proxy, pipeline.device() as device:
        given = settings(pipeline, MQTT_PORT=str(proxy.port))
        with ToolSession(given, ["qs/v1/+/events"]) as session:
            device.publish(event(1))
            device.publish(event(1, "device-2"), topic="qs/v1/device-2/events")
            (heard,) = session.receive(10)
            assert heard.topic == "qs/v1/device-2/events"


def test_it_is_there_beside_the_ingester(running: Pipeline) -> None:
    with (
        ToolSession(settings(running), ["qs/v1/+/acks"]) as one,
        ToolSession(settings(running), ["qs/v1/+/acks"]) as another,
        running.device() as device,
    ):
        assert device.ask(event(1))["status"] == "stored"
        for session in (one, another):
            assert [message.topic for message in session.receive(10)] == ["qs/v1/device-1/acks"]
    assert connects(running) == 1


def hear_for_ever(session: ToolSession) -> None:
    while True:
        session.receive(10)


def test_what_is_wrong_with_the_broker_is_one_line(pipeline: Pipeline) -> None:
    nobody = str(free_port())
    with pytest.raises(BrokerUnavailable, match=f"^MQTT: cannot connect to 127.0.0.1:{nobody}: "):
        ToolSession(settings(pipeline, MQTT_PORT=nobody)).__enter__()
    with ToolSession(settings(pipeline), ["qs/v1/#"]) as session:
        pipeline.mosquitto.stop()
        with pytest.raises(BrokerUnavailable, match=r"^MQTT: 127.0.0.1:\d+: connection lost$"):
            hear_for_ever(session)
        assert not session.connected
        with pytest.raises(BrokerUnavailable, match=r"^MQTT: .*$"):
            session.publish("qs/v1/device-1/acks", b"{}")


def test_a_frozen_broker_is_given_up(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingester.tool_session.ANSWER_SECONDS_MAX", 0.3)
    with ToolSession(settings(pipeline)) as session:
        pipeline.mosquitto.pause()
        with pytest.raises(BrokerUnavailable, match="no PUBACK in time"):
            session.publish("qs/v1/device-1/acks", b"{}")
        with pytest.raises(BrokerUnavailable, match="no CONNACK in time"):
            ToolSession(settings(pipeline)).__enter__()
        pipeline.mosquitto.resume()


def test_it_goes_in_by_tls_with_a_password(guarded: MakePipeline) -> None:
    pipeline = guarded("")
    with pipeline.device() as device:
        with ToolSession(settings(pipeline)) as session:
            session.publish("qs/v1/device-1/acks", b'{"status": "stored", "event_id": "x"}')
        device.wait(lambda: len(device.acks) == 1, "what it published")
    with pytest.raises(BrokerUnavailable, match="refuses the connection: Not authorized"):
        ToolSession(settings(pipeline, MQTT_PASSWORD="wrong")).__enter__()


def test_a_subscription_that_is_refused_is_named(pipeline: Pipeline) -> None:
    # Its access lists let everybody subscribe, and hear nothing; its plugin does not.
    folders = (*Path("/usr").glob("lib*"), *Path("/usr/lib").glob("*-linux-*"))
    plugins = [folder / "mosquitto_dynamic_security.so" for folder in folders]
    (plugin,) = (path for path in plugins if path.exists())  # Debian: package mosquitto
    rights = pipeline.mosquitto.folder / "rights.json"
    rights.write_text(json.dumps({"defaultACLAccess": {"subscribe": False}}))
    pipeline.mosquitto.extra_config = f"""plugin {plugin}
        plugin_opt_config_file {rights}""".replace("    ", "")
    pipeline.mosquitto.stop()
    pipeline.mosquitto.start()
    pipeline.mosquitto.wait_ready()
    with pytest.raises(BrokerUnavailable, match=r"refuses the subscription to qs/v1/\+/acks: "):
        ToolSession(settings(pipeline), ["qs/v1/+/acks"]).__enter__()


def test_a_broker_that_knows_clients_by_user_keeps_the_ingesters_session(
    guarded: MakePipeline,
) -> None:
    pipeline = guarded(NAMED_BY_USER)
    pipeline.ingester.start()
    pipeline.ingester.wait_ready()
    with pipeline.device() as device:
        assert device.ask(event("first"))["status"] == "stored"
        with pytest.raises(BrokerUnavailable, match="take use_username_as_clientid out"):
            ToolSession(settings(pipeline), ["qs/v1/#"]).__enter__()
        # The ingester is back, and nothing of what was sent meanwhile is gone.
        assert device.ask(event("second"))["status"] == "stored"
        assert pipeline.ingester.stop() == 0
        for number in range(100):
            device.publish(event(number))
        with pytest.raises(BrokerUnavailable, match="take use_username_as_clientid out"):
            ToolSession(settings(pipeline)).__enter__()
        pipeline.ingester.start()
        device.wait(lambda: len(device.heard_at) == 102, "an ACK for each")
    assert pipeline.database.count() == 102
