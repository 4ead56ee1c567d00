"""Devices to try the pipeline with, and a pattern for firmware: class Device, read it first.

What it does: each device measures, keeps every event in its outbox until it hears an ACK, and
sends again what it hears nothing of. Below: many devices, each a thread and a MQTT connection
of its own, a display, a verdict. What it does not: look into the database (it counts at the
sender), or keep the outbox over a power cut, for which firmware has flash.

Invariant: made == stored + rejected + dropped + len(outbox), between two turns of loop().

Exit codes: 0 if every event is stored, 1 if one is not, 2 for wrong options, or a broker that
cannot be reached at the start. Ctrl-C and SIGTERM end the measuring; the verdict follows.
"""

import argparse
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NoReturn

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

OUTBOX_MAX = 1_000  # events; an ESP32 has room for some hundred in RAM, and for more in flash
IN_FLIGHT_MAX = 100  # events without an ACK; after an outage the others follow as ACKs come
RESEND_FACTOR_MAX = 8  # the wait doubles up to this: an absent ingester's broker keeps each copy
RETRY_SECONDS_MIN = 1.0  # to the next attempt to connect; doubled after each, up to ..._MAX
RETRY_SECONDS_MAX = 10.0
KEEPALIVE_SECONDS = 15  # a broker that is silent for twice this is gone; PubSubClient's default
TURN_SECONDS_MAX = 0.25
DEVICES_MAX = 300  # paho waits with select(): descriptors up to 1,023, and a client has three


def option(default: Any, text: str, *limits: float, variable: str = "") -> Any:
    return field(default=default, metadata={"text": text, "limits": limits, "variable": variable})


@dataclass
class Settings:
    """What firmware has as constants; here each is an option of the command line."""

    devices: int = option(5, "how many devices", 1, DEVICES_MAX)
    name: str = option("sim", "the id of one device; of more the beginning of their ids")
    rate: float = option(0.5, "events per second of each device", 0.001, 1000)
    count: int = option(0, "events of each device; 0: until Ctrl-C", 0, 10**9)
    qos: int = option(1, "MQTT's QoS of the events", 0, 1)
    resend: float = option(10.0, "seconds without an ACK, then an event is sent again", 0.1, 3600)
    loss: float = option(0.0, "the part of the ACKs that is thrown away on purpose", 0, 1)
    patience: float = option(30.0, "seconds to wait for ACKs after the last event", 0, 86400)
    host: str = option("localhost", "the broker", variable="MQTT_HOST")
    port: int = option(1883, "the broker's port", 1, 65535, variable="MQTT_PORT")
    username: str = option("", "the user at the broker", variable="MQTT_USERNAME")
    password: str = option("", "better as a variable: an option is seen", variable="MQTT_PASSWORD")
    ca: str = option("", "PEM file of the broker's CA; turns TLS on", variable="MQTT_CA_FILE")
    events_topic: str = option("qs/v1/+/events", "", variable="MQTT_EVENTS_TOPIC")
    ack_template: str = option("qs/v1/{device_id}/acks", "", variable="ACK_TEMPLATE")


@dataclass
class Waiting:
    """An event that has no ACK yet."""

    payload: bytes
    due_at: float = 0.0  # when to send it, or send it again
    first_sent_at: float = 0.0
    times_sent: int = 0


class Device:
    """One device: what its firmware does in loop(), and some counters."""

    def __init__(self, device_id: str, settings: Settings) -> None:
        self.outbox: dict[str, Waiting] = {}  # by event id, the oldest first
        self.measuring = True
        self.client: paho.Client | None = None  # None between two attempts to connect
        self.connected = False
        self.trouble = ""  # why it is not connected
        self.made = self.stored = self.rejected = self.dropped = self.resent = self.lost = 0
        self.latencies_ms: deque[float] = deque(maxlen=1_000)  # from first sent to ACK
        self._device_id = device_id
        self._settings = settings
        self._events_topic = settings.events_topic.replace("+", device_id)
        self._acks_topic = settings.ack_template.replace("{device_id}", device_id)
        # An event id must never come again, after a reboot either: firmware has a boot counter
        # in flash for it, this a random number.
        self._boot = secrets.token_hex(4)
        self._measure_at = time.monotonic() + random.random() / settings.rate
        self._connect_at = 0.0
        self._retry_seconds = RETRY_SECONDS_MIN

    def loop(self) -> None:
        """Do what is due, then wait until something arrives or is due; to be called for ever."""
        now = time.monotonic()
        if self.client is None and now >= self._connect_at:
            self._connect()
        if self.measuring and now >= self._measure_at:
            self._measure()
        if self.connected:
            self._send_what_is_due()
        idle_seconds = TURN_SECONDS_MAX
        if self.measuring:
            idle_seconds = min(max(0.0, self._measure_at - time.monotonic()), TURN_SECONDS_MAX)
        if self.client is None:
            time.sleep(idle_seconds)
        elif self.client.loop(idle_seconds) != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self.client, self.connected = None, False

    def _measure(self) -> None:
        """Put a measurement into the outbox, whether there is a connection or not."""
        self._measure_at = max(self._measure_at + 1 / self._settings.rate, time.monotonic())
        self.made += 1
        if self.made == self._settings.count:
            self.measuring = False
        if len(self.outbox) == OUTBOX_MAX:
            self.dropped += 1
            return
        now = datetime.now(UTC)
        event_id = f"{self._device_id}-{self._boot}-{self.made}"
        event_type, value, unit = measure(now)
        event = {
            "schema": 1,
            "event_id": event_id,
            "device_id": self._device_id,
            "event_type": event_type,
            "value": value,
            "unit": unit,
            # Firmware leaves it out until its clock is set.
            "ts_device": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "meta": {"firmware": "simulator", "rssi": random.randint(-80, -50)},
        }
        # The payload is made once: the same id with other content would be refused.
        self.outbox[event_id] = Waiting(json.dumps(event).encode())

    def _send_what_is_due(self) -> None:
        """Send the oldest events: at once, and again each time that the ACK is overdue."""
        assert self.client is not None
        now = time.monotonic()
        for event in islice(self.outbox.values(), IN_FLIGHT_MAX):
            if event.due_at > now:
                continue
            # Nobody looks whether this works, nor at QoS 1's PUBACK: the ACK alone counts.
            self.client.publish(self._events_topic, event.payload, qos=self._settings.qos)
            self.resent += event.times_sent > 0
            event.first_sent_at = event.first_sent_at or now
            factor = min(2**event.times_sent, RESEND_FACTOR_MAX)
            event.due_at = now + factor * self._settings.resend
            event.times_sent += 1

    def _on_message(self, _client: paho.Client, _user: Any, message: paho.MQTTMessage) -> None:
        """Take an ACK: forget its event."""
        try:
            ack = json.loads(message.payload)
            status, event_id = str(ack["status"]), str(ack["event_id"])
        except (ValueError, TypeError, LookupError, RecursionError):
            return  # not an ACK
        if status not in ("stored", "rejected") or event_id not in self.outbox:
            return  # the second ACK of an event that was sent twice is not in it
        if random.random() < self._settings.loss:
            self.lost += 1  # as if the radio had failed; no firmware has this
            return
        event = self.outbox.pop(event_id)
        self.latencies_ms.append((time.monotonic() - event.first_sent_at) * 1000)
        if status == "stored":
            self.stored += 1
        else:  # It will never be stored as it is, and is kept as a dead letter.
            self.rejected += 1
            sys.stderr.write(f"rejected: {json.dumps(ack)}\n")  # print() would write in two pieces

    def _connect(self) -> None:
        """Begin to connect; if it fails, there is a pause before the next attempt."""
        # A random part of it, or all devices come at once when the broker is back.
        self._connect_at = time.monotonic() + self._retry_seconds * random.uniform(0.5, 1)
        self._retry_seconds = min(self._retry_seconds * 2, RETRY_SECONDS_MAX)
        # A new client and a clean session: what has to be sent again is in the outbox alone.
        # With the boot in its id, two simulators do not end each other's sessions.
        client_id = f"{self._device_id}-{self._boot}"
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id, clean_session=True)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        if self._settings.username:
            client.username_pw_set(self._settings.username, self._settings.password)
        self.trouble = "connection lost, or no answer"
        try:
            if self._settings.ca:
                client.tls_set(self._settings.ca)
            client.connect(self._settings.host, self._settings.port, KEEPALIVE_SECONDS)
        except (OSError, UnicodeError) as error:
            self.trouble = str(error)
            return
        self.client = client

    def _on_socket_open(self, _client: paho.Client, _user: Any, sock: Any) -> None:
        # Else an event right behind a PUBACK waits 40 ms for the other side's TCP ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, client: paho.Client, _u: Any, _f: Any, code: ReasonCode, _: Any) -> None:
        """Ask for the ACKs first; then all that was on its way before is due again."""
        if code.is_failure:
            self.trouble = str(code)
            return
        client.subscribe(self._acks_topic, qos=1)
        self.connected = True
        self._retry_seconds = RETRY_SECONDS_MIN
        for event in self.outbox.values():
            event.due_at = 0.0


def measure(now: datetime) -> tuple[str, float | str, str | None]:
    """Return an event's type, value and unit: mostly the climate, at times a door or a button."""
    warmth = math.sin((now.hour + now.minute / 60 - 9) / 24 * math.tau)  # -1 at 3, 1 at 15 o'clock
    readings: list[tuple[str, float | str, str | None]] = [
        ("temperature", round(20 + 4 * warmth + random.gauss(0, 0.2), 2), "C"),
        ("humidity", round(55 - 10 * warmth + random.gauss(0, 1), 1), "%"),
        ("door", random.choice(("open", "closed")), None),
        ("button", "pressed", None),
    ]
    return random.choices(readings, (10, 7, 2, 1))[0]


# --- many devices, and what becomes of their events ----------------------------------


def run(device: Device, over: threading.Event) -> None:
    """Be the processor of one device."""
    while not over.is_set():
        device.loop()
    if device.client is not None:
        device.client.disconnect()


def total(devices: Sequence[Device], counter: str) -> int:
    return sum(getattr(device, counter) for device in devices)


def waiting(devices: Sequence[Device]) -> int:
    return sum(len(device.outbox) for device in devices)


def summary(devices: Sequence[Device]) -> str:
    """Say in one line what the senders have done and heard."""
    latencies = sorted(it for device in devices for it in device.latencies_ms.copy())
    delay = "no ACK"
    if latencies:
        p50, p99 = (latencies[len(latencies) * percent // 100] for percent in (50, 99))
        delay = f"ACK after {p50:.0f} ms (p50) {p99:.0f} ms (p99)"
    trouble = [f" ({device.trouble})" for device in devices if not device.connected]
    return (
        f"{total(devices, 'made')} events: {total(devices, 'stored')} stored,"
        f" {total(devices, 'rejected')} rejected, {waiting(devices)} waiting,"
        f" {total(devices, 'dropped')} dropped; {delay};"
        f" {total(devices, 'resent')} sent again, {total(devices, 'lost')} ACKs lost;"
        f" {total(devices, 'connected')} of {len(devices)} connected{''.join(trouble[:1])}"
    )


def watch(devices: Sequence[Device], over: Callable[[], bool], seconds_max: float) -> None:
    """Show how it is until it is over, or so long: on a terminal in place, else every 10 s."""
    in_place = sys.stdout.isatty()
    began_at = shown_at = time.monotonic()
    while not over() and time.monotonic() - began_at < seconds_max:
        time.sleep(0.1)
        if time.monotonic() - shown_at >= (1 if in_place else 10):
            shown_at = time.monotonic()
            line = summary(devices)
            if in_place:
                line = "\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1]
            print(line, end="\r" if in_place else "\n", flush=True)
    if in_place:
        print("\r\x1b[K", end="")


def simulate(devices: Sequence[Device], patience_seconds: float) -> bool:
    """Let them run to their end or until a signal; return whether every event is stored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # which raises KeyboardInterrupt
    over = threading.Event()
    threads = [threading.Thread(target=run, args=(each, over), daemon=True) for each in devices]
    try:
        for thread in threads:
            thread.start()
        watch(devices, lambda: not any(device.measuring for device in devices), math.inf)
    except KeyboardInterrupt:
        patience_seconds = min(patience_seconds, 5)  # `docker stop` kills after 10
        for device in devices:
            device.measuring = False
    with suppress(KeyboardInterrupt):  # a second one: the verdict at once
        watch(devices, lambda: waiting(devices) == 0, patience_seconds)
    over.set()
    for thread in (thread for thread in threads if thread.ident):  # all, unless interrupted
        thread.join()
    missing = total(devices, "made") - total(devices, "stored")
    print(summary(devices))
    print(f"NOT STORED: {missing} events" if missing else "every event is stored")
    return not missing


# --- the command line ----------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, with one line for what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"simulator: {message}\n")


def read_settings(parser: Parser) -> Settings:
    """Return the settings, or exit with what is wrong with them."""
    for item in fields(Settings):
        variable, name = item.metadata["variable"], "--" + item.name.replace("_", "-")
        default = os.environ.get(variable) or item.default
        text = f"{item.metadata['text']} ({item.default or 'none'}) {variable}"
        parser.add_argument(name, type=item.type, default=default, help=text)
    settings = Settings(**vars(parser.parse_args()))
    for item in fields(Settings):
        limits = item.metadata["limits"]
        if limits and not limits[0] <= getattr(settings, item.name) <= limits[1]:
            parser.error(f"argument --{item.name}: expected {limits[0]} to {limits[1]}")
    # The event contract allows 64 characters; four of them number the devices.
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,60}", settings.name):
        parser.error("argument --name: expected 1 to 60 of A-Z a-z 0-9 _ . : -")
    if settings.events_topic.split("/").count("+") != 1 or "#" in settings.events_topic:
        parser.error("argument --events-topic: expected one + for the device id, no #")
    if "{device_id}" not in settings.ack_template or set("+#") & set(settings.ack_template):
        parser.error("argument --ack-template: expected {device_id}, no + or #")
    if settings.ca and not os.access(settings.ca, os.R_OK):
        parser.error(f"argument --ca: {settings.ca} cannot be read")
    return settings


def main() -> int:
    """Connect the first device, then let all run; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a verdict to give
    parser = Parser("simulator", description="Devices that send each event until it is stored.")
    settings = read_settings(parser)
    ids = [f"{settings.name}-{number:03}" for number in range(1, settings.devices + 1)]
    devices = [Device(each, settings) for each in (ids if len(ids) > 1 else [settings.name])]
    while not devices[0].connected:
        devices[0].loop()
        if devices[0].client is None:
            parser.error(f"{settings.host}:{settings.port}: {devices[0].trouble}")
    return 0 if simulate(devices, settings.patience) else 1


if __name__ == "__main__":
    sys.exit(main())
