"""A board with mqtt_as: the same in asyncio, where other tasks run beside it.

Copy it to the board as main.py, and mqtt_as and this library beside it.
"""

import asyncio

from mqtt_as import MQTTClient, config
from telemetry import FolderStore, Telemetry
from telemetry.mqtt_as_link import MqttAsLink

config["ssid"] = "my-network"
config["wifi_pw"] = "its-password"
config["server"] = "192.168.1.10"


async def main():
    telemetry = Telemetry("esp32-01", FolderStore("/outbox"))
    telemetry.on_rejected = lambda event_id, reason: print("rejected", event_id, reason)
    telemetry.begin()
    link = MqttAsLink(telemetry, config)
    asyncio.create_task(link.run(MQTTClient(config)))
    while True:
        telemetry.add("temperature", read_temperature(), "C")
        await asyncio.sleep(30)


def read_temperature():
    return 21.5  # your sensor


asyncio.run(main())
