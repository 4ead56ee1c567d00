"""The bridge in its container, with the default stack and with overlays/secure.

What it does: brings each stack up once, from a copy of the checkout under umask 077, and follows
one message of other firmware to its row. What it does not: repeat what the bridge does by itself
(test_bridge.py).

Invariant: with overlays/secure the bridge comes in as its own user, over TLS.
"""

from collections.abc import Iterator

import pytest

from tests.support import compose
from tests.support.compose import BROKER, PROJECT, Compose
from tests.support.device import event
from tests.support.pipeline import wait_until
from tests.support.secure import OVERLAY, SecureStack, missing_rights

pytestmark = [pytest.mark.compose, pytest.mark.timeout(300)]

BRIDGE = "overlays/bridge/docker-compose.yml"
TOPIC = "zigbee2mqtt/living room"
# A broker that other firmware publishes to, in the stack's network.
OTHER = f"{PROJECT}-other-broker"
OTHERS_CONFIGURATION = f"""
[broker]
host = "{OTHER}"

[[source]]
preset = "zigbee2mqtt"
"""


@pytest.fixture(scope="module", autouse=True)
def only_run() -> Iterator[None]:
    """One stack at a time on this machine."""
    with compose.only_run():
        yield


def values(stack: Compose) -> list[str]:
    return stack.psql(
        "SELECT event_type || '=' || value_num FROM events WHERE device_id = 'living_room'"
        " ORDER BY event_type, ts_server"
    ).splitlines()


def test_a_message_of_other_firmware_becomes_rows_also_if_the_bridge_was_away(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    copy = compose.copy_checkout(tmp_path_factory.mktemp("bridge"))
    stack = Compose(copy, "docker-compose.yml", BRIDGE)

    def send(temperature: float) -> None:
        stack.compose(
            "exec", "-T", "mosquitto", "mosquitto_pub", "-q", "1", "-t", TOPIC,
            "-m", f'{{"temperature": {temperature}, "humidity": 44}}',
        )  # fmt: skip

    with compose.cleared(stack):
        stack.up("--build")
        assert stack.health("bridge") == "healthy"
        send(21.5)
        wait_until(lambda: values(stack) == ["humidity=44", "temperature=21.5"], "the rows")
        # The broker has its session, and its volume what was not answered.
        stack.compose("rm", "--stop", "--force", "bridge")
        send(22.5)
        stack.up()
        wait_until(lambda: "temperature=22.5" in values(stack), "what came meanwhile")
        assert len(values(stack)) == 4


def speaks_for_all_and_reads_their_acks_alone(stack: SecureStack) -> None:
    stack.add_device("alpha")
    with stack.client("homelab-bridge") as bridge, stack.client("alpha") as alpha:
        for topic in ("qs/v1/+/acks", "qs/v1/+/events", "qs/v1/deadletter"):
            bridge.subscribe(topic)  # granted or not
        assert alpha.ask(event(1, "alpha"))["status"] == "stored"
        alpha.send("qs/v1/alpha/events", b"{}")  # makes a dead letter
        alpha.messages.get(timeout=15)
        bridge.send("qs/v1/beta/events", event(1, "beta"))
        topics = set()
        while "qs/v1/beta/acks" not in topics:  # what came before it is heard as well
            topics.add(bridge.messages.get(timeout=15)[0])
        assert topics == {"qs/v1/alpha/acks", "qs/v1/beta/acks"}
        assert stack.event_ids("beta") == {event(1, "beta")["event_id"]}


def test_with_the_secure_overlay_it_is_a_user_of_its_own_and_reads_another_broker(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if reason := missing_rights():
        pytest.skip(reason)
    stack = SecureStack(compose.copy_checkout(tmp_path_factory.mktemp("bridge")))
    with compose.cleared(stack):
        stack.setup()
        stack.up("--build")
        password = stack.secrets / "mqtt_bridge_password"
        password.write_text(stack.add_device("homelab-bridge"))
        password.chmod(0o400)
        configuration = stack.folder / "bridge.toml"
        configuration.write_text(OTHERS_CONFIGURATION)
        configuration.chmod(0o600)
        stack.run(
            "docker", "run", "-d", "--name", OTHER, "--network", f"{PROJECT}_default", BROKER,
            "mosquitto", "-c", "/mosquitto-no-auth.conf",
        )  # fmt: skip
        try:
            stack.environment["COMPOSE_FILE"] = ":".join(
                (*OVERLAY, BRIDGE, "overlays/bridge/secure.yml")
            )
            stack.up("--build", BRIDGE_CONFIG="./bridge.toml")
            assert stack.health("bridge") == "healthy"
            stack.run(
                "docker", "exec", OTHER, "mosquitto_pub", "-q", "1", "-t", TOPIC,
                "-m", '{"temperature": 21.5}',
            )  # fmt: skip
            wait_until(lambda: values(stack) == ["temperature=21.5"], "the row")
            speaks_for_all_and_reads_their_acks_alone(stack)
        finally:
            stack.run("docker", "rm", "--force", "--volumes", OTHER)
