"""The library on a computer, to try it and to prove it: adds events, and says what became of each.

    micropython devices/micropython/host.py --host H --port P --device ID --store DIR
        --count N --interval-ms M --hold-ms T [--username U --password-file F --cafile C]

What it does: adds N events, one every M ms, while sending; prints a line at once for each
that was kept, stored, rejected or dropped; ends with 0 when N are added and nothing waits.
--count 0 only sends what an earlier run left in DIR. What it does not: measure anything.

Invariant: SIGTERM and Ctrl-C save what is in memory, and end with 0. MicroPython has no
signals, so SIGTERM is blocked and looked for: by itself where it has `ffi`, otherwise by who
started it (devices/micropython/setup makes such a `micropython`). Where it is not blocked it
ends the program as a power cut would.
"""

import sys
from time import sleep_ms, ticks_add, ticks_diff, ticks_ms

HERE = __file__.rsplit("/", 1)[0] if "/" in __file__ else "."
sys.path[:0] = [HERE, HERE + "/.tools/lib"]  # the library, and umqtt.simple

from telemetry import FolderStore, Telemetry
from telemetry.umqtt_link import UmqttLink
from umqtt.simple import MQTTClient

STORE_BYTES_MAX = 4 * 1024 * 1024
SIGTERM = 15
SIGTERM_BIT = 1 << (SIGTERM - 1)
REQUIRED = ("host", "port", "device", "store", "count", "interval-ms", "hold-ms")
OPTIONAL = ("username", "password-file", "cafile")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")  # in one write, so that a kill leaves no half of it


def options() -> dict[str, str]:
    given = dict.fromkeys(OPTIONAL, "")
    words = sys.argv[1:]
    while len(words) > 1 and words[0][:2] == "--" and words[0][2:] in REQUIRED + OPTIONAL:
        given[words[0][2:]] = words[1]
        words = words[2:]
    if words or not all(name in given for name in REQUIRED):
        sys.stderr.write("expected: --%s VALUE\n" % " VALUE --".join(REQUIRED))
        sys.stderr.write("perhaps: --%s VALUE\n" % " VALUE --".join(OPTIONAL))
        sys.exit(2)
    return given


def block_sigterm() -> None:
    try:
        import ffi

        sigprocmask = ffi.open("libc.so.6").func("i", "sigprocmask", "ipp")
    except (ImportError, OSError):
        return
    mask = bytearray(128)
    mask[1] = SIGTERM_BIT >> 8
    sigprocmask(0, mask, None)


def sigterm_came() -> bool:
    """Tell whether a blocked SIGTERM is pending for this process."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("ShdPnd:"):
                    return bool(int(line[7:].strip(), 16) & SIGTERM_BIT)
    except OSError:
        pass
    return False


def der(path: str) -> bytes:
    """Return the certificate of a PEM file as the ssl module wants it."""
    from binascii import a2b_base64

    with open(path) as file:
        text = file.read()
    return a2b_base64(text.split("-----BEGIN CERTIFICATE-----")[1].split("-----END")[0])


def client_for(given: dict[str, str], client_id: str) -> MQTTClient:
    password = None
    if given["password-file"]:
        with open(given["password-file"]) as file:
            password = file.read().rstrip("\r\n")
    tls = {}
    if given["cafile"]:
        import ssl

        sys.modules["ussl"] = ssl  # as umqtt.simple 1.3 calls it
        tls = {"cert_reqs": ssl.CERT_REQUIRED, "cadata": der(given["cafile"])}
        tls["server_hostname"] = given["host"]
    return MQTTClient(
        client_id,
        given["host"],
        int(given["port"]),
        user=given["username"] or None,
        password=password,
        keepalive=15,
        ssl=bool(tls),
        ssl_params=tls,
    )


def run(telemetry: Telemetry, link: UmqttLink, count: int, interval_ms: int) -> None:
    next_add = ticks_ms()
    next_look = ticks_ms()
    added = 0
    while added < count or telemetry.waiting():
        now = ticks_ms()
        if added < count and ticks_diff(now, next_add) >= 0:
            next_add = ticks_add(next_add, interval_ms)
            added += 1
            telemetry.add("test", added)
        link.loop()
        if ticks_diff(now, next_look) >= 0:
            next_look = ticks_add(now, 100)
            if sigterm_came():
                return
        sleep_ms(min(10, interval_ms))


def main() -> None:
    given = options()
    block_sigterm()
    store = FolderStore(given["store"], STORE_BYTES_MAX)
    telemetry = Telemetry(
        given["device"],
        store,
        int(given["hold-ms"]),
        memory_bytes_max=65_536,
        receive_bytes_max=16_384,
        send_bytes_max=16_384,
    )
    telemetry.on_kept = lambda event_id: say("kept " + event_id)
    telemetry.on_stored = lambda event_id: say("stored " + event_id)
    telemetry.on_rejected = lambda event_id, reason: say("rejected %s %s" % (event_id, reason))
    telemetry.on_dropped = lambda event_id: say("dropped " + event_id)
    telemetry.begin()
    link = UmqttLink(telemetry, client_for(given, telemetry.client_id))
    try:
        run(telemetry, link, int(given["count"]), int(given["interval-ms"]))
    except KeyboardInterrupt:
        pass
    is_safe = telemetry.save()
    link.close()
    sys.exit(0 if is_safe else 1)


if __name__ == "__main__":
    main()
