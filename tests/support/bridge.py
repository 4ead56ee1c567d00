"""The bridge as a process, and a sender that other firmware is for it.

What it does: starts `python -m devices.bridge` with a configuration of the test's own, and counts
at the line between it and the broker which messages it has PUBACKed. What it does not: look into
the bridge.

Invariant: what counts as PUBACKed was seen on the wire, behind the message itself.
"""

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from tests.support.tap import PUBACK, PUBLISH, Tap
from tools.stack import Ingester


class Bridge(Ingester):
    """The bridge; `their_port` is that of the broker that it reads from."""

    def __init__(
        self, folder: Path, our_port: int, configuration: str, their_port: int | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "bridge.toml"
        broker = f'[broker]\nhost = "127.0.0.1"\nport = {their_port}\n' if their_port else ""
        file.write_text(broker + configuration)
        environment = {
            "MQTT_HOST": "127.0.0.1",
            "MQTT_PORT": str(our_port),
            "BRIDGE_STORE": str(folder / "store"),
        }
        arguments = ("-m", "devices.bridge", str(file))
        super().__init__(environment, folder / "bridge.log", arguments=arguments)

    def wait_ready(self, timeout: float = 15.0) -> None:
        self.wait_for_log("MQTT in: 127.0.0.1", timeout)


class Firmware:
    """Publishes numbered readings with QoS 1, at a rate, until it is told to stop."""

    def __init__(self, port: int, per_second: float, timed: bool = False) -> None:
        self.sent = 0
        self._timed = timed
        self._pause_seconds = 1 / per_second
        self._over = threading.Event()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, f"firmware-{port}", clean_session=False
        )
        self._client.max_inflight_messages_set(0)
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Publish no more, and wait until the broker has what was published."""
        self._over.set()
        self._thread.join()

    def close(self) -> None:
        self.stop()
        self._client.disconnect()
        self._client.loop_stop()

    def _run(self) -> None:
        while not self._over.wait(self._pause_seconds):
            self.sent += 1
            document: dict[str, Any] = {"n": self.sent}
            if self._timed:
                document["last_seen"] = time.time_ns() // 1_000_000
            topic = f"zigbee2mqtt/room {self.sent % 7}"
            self._client.publish(topic, json.dumps(document), qos=1)


def numbers_pubacked(taps: Iterable[Tap]) -> list[int]:
    """Return the numbers of the readings that the bridge has PUBACKed, each time that it did."""
    found = []
    for tap in taps:
        for line in tap.lines:
            delivered: dict[int, bytes] = {}
            for packet in list(line.packets):
                if packet.kind == PUBLISH and packet.direction == "to_client" and packet.mid:
                    delivered[packet.mid] = packet.payload
                elif packet.kind == PUBACK and packet.direction == "to_server":
                    found.append(int(json.loads(delivered[packet.mid])["n"]))
    return found
