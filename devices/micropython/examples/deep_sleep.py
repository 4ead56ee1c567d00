"""A board that sleeps between its readings: awake for some seconds, and only with cause.

Every wake-up is a boot, with ids of its own. What is not answered before it sleeps is on the
flash, and is sent at a later wake-up. Copy it to the board as main.py.
"""

import time

import machine
import network
from telemetry import FolderStore, Telemetry
from telemetry.umqtt_link import UmqttLink
from umqtt.simple import MQTTClient

WIFI = ("my-network", "its-password")
BROKER = "192.168.1.10"
DEVICE = "esp32-01"
AWAKE_MS_MAX = 15_000
SLEEP_MS = 300_000


def main():
    telemetry = Telemetry(DEVICE, FolderStore("/outbox"))
    telemetry.begin()
    telemetry.add("temperature", read_temperature(), "C")

    wifi = network.WLAN(network.STA_IF)
    wifi.active(True)
    wifi.connect(*WIFI)
    link = UmqttLink(telemetry, MQTTClient(telemetry.client_id, BROKER, keepalive=30))
    machine.WDT(timeout=AWAKE_MS_MAX + 15_000)  # if umqtt.simple waits for ever
    begun = time.ticks_ms()
    while telemetry.waiting() and time.ticks_diff(time.ticks_ms(), begun) < AWAKE_MS_MAX:
        link.loop()
        time.sleep_ms(20)
    link.close()
    telemetry.save()
    if not telemetry.sleep_allowed():
        print("the flash does not work: the reading is lost")
    machine.deepsleep(SLEEP_MS)


def read_temperature():
    return 21.5  # your sensor


main()
