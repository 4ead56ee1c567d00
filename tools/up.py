"""`tools/stack up`: the stack in the foreground, for people without Docker.

What it does: takes the settings of .env, finds free ports, says how to publish, listen and
query, and shows the logs until Ctrl-C. What it does not: run anything by itself
(tools/stack.py does), or install anything (tools/bootstrap does).

Invariant: it leaves its data behind, in .stack/, and nothing else.
"""

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Mapping

from dotenv import dotenv_values

from tools.process import (
    CHECKOUT,
    LOOPBACK,
    MissingProgramError,
    Process,
    StackError,
    free_port,
    port_is_free,
    reachable_folder,
    require,
    service_account,
)
from tools.stack import DATABASE, PROGRAMS, Ports, Stack


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


class LogPrinter:
    """Prints what is new in the logs, each line behind the name of its process."""

    def __init__(self, *processes: Process) -> None:
        self._read_to = {process: process.log_start for process in processes}

    def print_new(self) -> None:
        for process, start in self._read_to.items():
            lines, newline, _ = process.log_bytes(start).rpartition(b"\n")
            self._read_to[process] += len(lines + newline)
            for line in lines.decode(errors="replace").splitlines():
                print(f"{process.name:<9} | {line}")
        sys.stdout.flush()


def read_settings() -> dict[str, str]:
    """The variables of .env; as for Compose, one of the calling shell wins."""
    in_file = {key: value or "" for key, value in dotenv_values(CHECKOUT / ".env").items()}
    settings = DATABASE | {"POSTGRES_PORT": "5432"} | in_file
    return settings | {key: os.environ[key] for key in settings if key in os.environ}


def choose_port(standard: str, offset: int, what: str) -> int:
    if not standard.isdecimal() or not 0 < (wanted := int(standard) + offset) < 65536:
        raise StackError(f"{standard} with an offset of {offset} is no port for {what}")
    if port_is_free(wanted):
        return wanted
    port = free_port()
    say(f"Port {wanted} is taken: {what} is on port {port} instead.")
    return port


def describe(stack: Stack, settings: Mapping[str, str]) -> None:
    device = "test-device"
    events = settings.get("MQTT_EVENTS_TOPIC", "qs/v1/+/events").replace("+", device)
    acks = settings.get("ACK_TEMPLATE", "qs/v1/{device_id}/acks").replace("{device_id}", device)
    event = (
        '{"schema": 1, "event_id": "test-1", "device_id": "test-device", '
        '"event_type": "temperature", "value": 21.5, "unit": "C"}'
    )
    broker = f"-h {LOOPBACK} -p {stack.ports.mqtt}"
    database = stack.postgres
    query = "SELECT * FROM events ORDER BY ts_server DESC LIMIT 10"
    say(
        "",
        f"Ready: MQTT on port {stack.ports.mqtt}, MQTT over websockets on "
        f"{stack.ports.websocket}, PostgreSQL on {stack.ports.postgres} (this machine only).",
        "",
        "  hear ACKs:  " + f"mosquitto_sub {broker} -v -t {shlex.quote(acks)}",
        "  publish:    " + f"mosquitto_pub {broker} -q 1 -t {shlex.quote(events)} -m '{event}'",
        "  query:      " + f"PGPASSWORD={shlex.quote(database.password)} psql -h {LOOPBACK} "
        f"-p {database.port} -U {database.user} -d {database.dbname} -c '{query}'",
        f"  logs:       {stack.ingester.log_file}",
        f"              {stack.mosquitto.log_file}",
        f"              {stack.postgres.log_file}",
        "",
        "Ctrl-C stops all three; the data stays.",
        "",
    )


def follow(stack: Stack, logs: LogPrinter) -> None:
    """Prints the logs until something is wrong or Ctrl-C arrives."""
    while True:
        logs.print_new()
        for server in (stack.mosquitto, stack.postgres):
            if not server.running:
                raise StackError(
                    f"{server.name} ended with code {server.returncode}, so the rest is stopped. "
                    f"The end of its log:\n{server.log_tail()}"
                )
        if stack.ingester.running:
            time.sleep(0.2)
        else:
            say(f"ingester ended with code {stack.ingester.returncode}; it starts again in 1 s.")
            time.sleep(1)
            stack.ingester.start()


def up(port_offset: int, fresh: bool) -> None:
    settings = read_settings()
    require(*PROGRAMS)
    wanted = CHECKOUT / ".stack"
    folder = reachable_folder(wanted, service_account("postgres"))
    if folder != wanted:
        say(f"The user of PostgreSQL cannot reach {wanted}: data and logs are in {folder}.")
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"it is running already, with its data in {folder}") from None
        if fresh:
            for path in (folder / "mosquitto", folder / "postgres"):
                if path.exists():
                    shutil.rmtree(path)
            (folder / "ingester.log").unlink(missing_ok=True)
        ports = Ports(
            choose_port("1883", port_offset, "MQTT"),
            choose_port("9001", port_offset, "MQTT over websockets"),
            choose_port(settings["POSTGRES_PORT"], port_offset, "PostgreSQL"),
        )
        with Stack(folder, ports=ports, host="", environment=settings) as stack:
            logs = LogPrinter(stack.mosquitto, stack.postgres, stack.ingester)
            logs.print_new()
            describe(stack, settings)
            try:
                follow(stack, logs)
            except KeyboardInterrupt:
                say("", "Stopping the ingester, PostgreSQL and Mosquitto.")
                stack.stop()
                logs.print_new()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/stack", description="See tools/stack --help.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("up", help="run all three in the foreground")
    command.add_argument("--port-offset", type=int, default=0, metavar="N")
    command.add_argument("--fresh", action="store_true", help="delete the data first")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    try:
        up(arguments.port_offset, arguments.fresh)
    except KeyboardInterrupt:
        return 0
    except (StackError, OSError) as error:
        hint = " (was it made by another user?)" if isinstance(error, PermissionError) else ""
        print(f"tools/stack: {error}{hint}", file=sys.stderr)
        return 2 if isinstance(error, MissingProgramError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
