"""The temperature of a Raspberry Pi's processor, twice a minute, through kill -9 and power cuts.

What it does: reads a sensor, keeps what it read, sends it until it is stored. What it does
not: end; `systemctl stop` or kill -9 end it, and nothing that was read is lost.
"""

import sys
from pathlib import Path

from telemetry import Outbox, PahoLink

outbox = Outbox(Path.home() / "telemetry", device_id="pi-attic")
link = PahoLink(outbox, host=sys.argv[1])
while True:
    millidegrees = int(Path("/sys/class/thermal/thermal_zone0/temp").read_text())
    outbox.add("temperature", millidegrees / 1000, "C")  # from here on it survives a power cut
    link.loop(30)  # sends and hears for so many seconds, in place of time.sleep()
