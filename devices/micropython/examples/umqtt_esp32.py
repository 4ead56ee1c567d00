"""A board with umqtt.simple: a reading every 30 seconds, kept on the flash if no answer comes.

Copy it to the board as main.py. It needs, once, on the board or by mpremote:

    mip.install("umqtt.simple")
    mip.install("http://YOUR-COMPUTER:8000/package.json")   # see docs/devices-micropython.md
"""

import time

import network
import ntptime
from machine import WDT
from telemetry import FolderStore, Telemetry
from telemetry.umqtt_link import UmqttLink
from umqtt.simple import MQTTClient

WIFI = ("my-network", "its-password")
BROKER = "192.168.1.10"
DEVICE = "esp32-01"


def main():
    wifi = network.WLAN(network.STA_IF)
    wifi.active(True)
    wifi.connect(*WIFI)  # from here on it connects again by itself

    telemetry = Telemetry(DEVICE, FolderStore("/outbox"))
    telemetry.on_rejected = lambda event_id, reason: print("rejected", event_id, reason)
    telemetry.begin()
    link = UmqttLink(telemetry, MQTTClient(telemetry.client_id, BROKER, keepalive=30))

    watchdog = WDT(timeout=60_000)  # umqtt.simple may wait for ever while it connects
    next_reading = next_clock = time.ticks_ms()
    while True:
        watchdog.feed()
        if time.ticks_diff(time.ticks_ms(), next_reading) >= 0:
            next_reading = time.ticks_add(next_reading, 30_000)
            telemetry.add("temperature", read_temperature(), "C")
        if wifi.isconnected() and time.ticks_diff(time.ticks_ms(), next_clock) >= 0:
            next_clock = time.ticks_add(time.ticks_ms(), 3_600_000 if set_clock() else 60_000)
        link.loop()  # without Wi-Fi too: it keeps what waits too long
        time.sleep_ms(20)


def set_clock():
    """Set the clock from the internet; until then events carry no time of their own."""
    try:
        ntptime.settime()
        return True
    except OSError:
        return False


def read_temperature():
    return 21.5  # your sensor


main()
