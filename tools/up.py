"""`tools/stack`: the stack in the foreground, for people and systemd units without Docker.

What it does: takes the settings of .env, says how to publish, listen and query, and shows the
logs until Ctrl-C; runs a command as beside it; restores a backup. What it does not: run a
server by itself (tools/stack.py does), know where the data is (tools/storage.py does), or
install anything (tools/bootstrap does).

Invariant: it leaves nothing behind but its data. A port that is taken ends it; no other is
taken instead, as devices would not find it.
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dotenv import dotenv_values

from tools import storage
from tools.process import (
    CHECKOUT,
    LOOPBACK,
    OPEN_FILES,
    Process,
    SetupError,
    StackError,
    free_port,
    open_files_max,
    port_problem,
    require,
    search_path,
)
from tools.stack import DATABASE, PROGRAMS, Ports, Postgres, Stack

# What listens where, the variable that says so, and its default: as in Ports.
LISTENERS = (
    ("MQTT", "MQTT_PORT", "1883"),
    ("MQTT over WebSocket", "MQTT_WEBSOCKET_PORT", "9001"),
    ("PostgreSQL", "POSTGRES_PORT", "5432"),
)
# What the broker's own files and sockets take of those that it may open.
BROKER_FILES = 10


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


class LogPrinter:
    """Prints what is new in the logs, each line behind the name of its process."""

    def __init__(self, *processes: Process) -> None:
        self._read_to = {process: process.log_start for process in processes}

    def print_new(self) -> None:
        for process, start in self._read_to.items():
            start = min(start, process.log_end)  # somebody may have emptied it
            self._read_to[process] = start
            lines, newline, _ = process.log_bytes(start).rpartition(b"\n")
            self._read_to[process] += len(lines + newline)
            for line in lines.decode(errors="replace").splitlines():
                print(f"{process.name:<9} | {line}")
        sys.stdout.flush()


def read_settings() -> dict[str, str]:
    """The variables of .env; as for Compose, one of the calling shell wins."""
    defaults = DATABASE | {variable: standard for _, variable, standard in LISTENERS}
    file = dotenv_values(CHECKOUT / ".env", interpolate=False)
    settings = defaults | {key: value or "" for key, value in file.items()}
    settings |= {key: os.environ[key] for key in settings if key in os.environ}
    return settings | {key: value for key, value in defaults.items() if not settings[key]}


def read_ports(settings: Mapping[str, str], offset: int) -> Ports:
    numbers = []
    for what, variable, _ in LISTENERS:
        text = settings[variable]
        if not text.isdecimal() or not 0 < int(text) + offset < 65_536:
            raise SetupError(f"{variable}: {text} with an offset of {offset} is no port for {what}")
        numbers.append(int(text) + offset)
    if len(set(numbers)) < len(numbers):
        raise SetupError(f"{', '.join(name for _, name, _ in LISTENERS)}: one port stands twice")
    return Ports(*numbers)


def check_ports(ports: Ports, offset: int) -> None:
    problems, others = [], []
    for port, (what, variable, _) in zip(ports, LISTENERS, strict=True):
        if problem := port_problem(port):
            problems.append(f"port {port} ({what}) {problem}")
            others.append(f"{variable}={port - offset + 10_000}")
    if problems:
        raise SetupError(
            f"{'; '.join(problems)}. `sudo ss -ltnp` shows what listens there. A service of this "
            "system that nothing else needs is ended by `sudo systemctl disable --now mosquitto "
            f"postgresql`. Or choose another port, in .env or before the command: "
            f"{' '.join(others)}; or move all: --port-offset {offset + 10_000}."
        )


def check_open_files() -> None:
    if (number := open_files_max()) < OPEN_FILES:
        say(
            f"At most about {number - BROKER_FILES} devices can be connected: the broker may open "
            f"{number} files here (`ulimit -Hn`), and would take {OPEN_FILES}."
        )


def describe(stack: Stack, settings: Mapping[str, str], offset: int) -> None:
    device = "test-device"
    events = settings.get("MQTT_EVENTS_TOPIC", "qs/v1/+/events").replace("+", device)
    acks = settings.get("ACK_TEMPLATE", "qs/v1/{device_id}/acks").replace("{device_id}", device)
    event = (
        '{"schema": 1, "event_id": "test-1", "device_id": "test-device", '
        '"event_type": "temperature", "value": 21.5, "unit": "C"}'
    )
    beside = "tools/stack exec" + (f" --port-offset {offset}" if offset else "")
    query = "SELECT * FROM events ORDER BY ts_server DESC LIMIT 10"
    say(
        "",
        f"Ready: MQTT on port {stack.ports.mqtt}, MQTT over WebSocket on "
        f"{stack.ports.websocket}, PostgreSQL on {stack.ports.postgres} (this machine only).",
        "",
        f"  hear ACKs:  {beside} mosquitto_sub -v -t {shlex.quote(acks)}",
        f"  publish:    {beside} mosquitto_pub -q 1 -t {shlex.quote(events)} -m '{event}'",
        f"  query:      {beside} psql -P pager=off -c '{query}'",
        f"  data, logs: {stack.folder}",
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


def tell_systemd() -> None:
    """Tells a unit of systemd, if one runs this, that it is ready (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.connect("\0" + address[1:] if address.startswith("@") else address)
            systemd.sendall(b"READY=1")


# --- the commands --------------------------------------------------------------------


def up(offset: int, fresh: bool) -> None:
    settings = read_settings()
    ports = read_ports(settings, offset)
    require(*PROGRAMS)
    with storage.opened(say) as folder:
        check_open_files()
        check_ports(ports, offset)
        if fresh:
            for path in (folder / "mosquitto", folder / "postgres"):
                if path.exists():
                    shutil.rmtree(path)
            (folder / "ingester.log").unlink(missing_ok=True)
        with Stack(folder, ports=ports, host="", environment=settings) as stack:
            logs = LogPrinter(stack.mosquitto, stack.postgres, stack.ingester)
            logs.print_new()
            describe(stack, settings, offset)
            tell_systemd()
            try:
                follow(stack, logs)
            except KeyboardInterrupt:
                say("", "Stopping the ingester, PostgreSQL and Mosquitto.")
                stack.stop()
                logs.print_new()


def execute(offset: int, command: Sequence[str]) -> None:
    """Becomes `command`, with the variables and the PATH that make it find the stack."""
    settings = read_settings()
    ports = read_ports(settings, offset)
    environment = os.environ | {
        "PGHOST": LOOPBACK,
        "PGPORT": str(ports.postgres),
        "PGDATABASE": settings["POSTGRES_DB"],
        "PGUSER": settings["POSTGRES_USER"],
        "PGPASSWORD": settings["POSTGRES_PASSWORD"],
    }
    environment |= settings
    environment |= {
        "MQTT_HOST": LOOPBACK,
        "MQTT_PORT": str(ports.mqtt),
        "POSTGRES_HOST": LOOPBACK,
        "POSTGRES_PORT": str(ports.postgres),
        "PATH": f"{CHECKOUT}/.venv/bin:{search_path()}",
        "PYTHONPATH": str(CHECKOUT),
    }
    program, *arguments = command
    if program in ("mosquitto_pub", "mosquitto_sub", "mosquitto_rr"):
        arguments = ["-h", LOOPBACK, "-p", str(ports.mqtt), *arguments]
    try:
        os.execvpe(program, [program, *arguments], environment)
    except FileNotFoundError:
        raise SetupError(f"{program} is not installed") from None


def restore(file: Path) -> None:
    """Makes the database of a backup, or none."""
    settings = read_settings()
    require(*PROGRAMS)
    with file.open("rb"):  # now, rather than after a minute
        pass
    with storage.opened(say) as folder:
        # Under another name first, or a half-made one would be taken for good.
        made, wanted = folder / "postgres.new", folder / "postgres"
        if wanted.exists():
            raise SetupError(
                "there is a database already, and a backup goes into an empty stack: "
                f"move {wanted} away first"
            )
        shutil.rmtree(made, ignore_errors=True)
        postgres = Postgres(
            made,
            free_port(),
            user=settings["POSTGRES_USER"],
            password=settings["POSTGRES_PASSWORD"],
            dbname=settings["POSTGRES_DB"],
        )
        try:
            postgres.start()
            postgres.wait_ready()
            postgres.restore(file)
            postgres.apply_schema()
            postgres.stop()
            made.rename(wanted)
        finally:
            postgres.kill()
            shutil.rmtree(made, ignore_errors=True)
    say("Restored. Start it: tools/stack up")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/stack", description="See tools/stack --help.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("up", "run all three in the foreground"),
        ("exec", "run a command that finds them"),
        ("restore", "make the database of a backup"),
    ):
        command = commands.add_parser(name, help=text)
        if name == "restore":
            command.add_argument("file", type=Path)
            continue
        command.add_argument("--port-offset", type=int, default=0, metavar="N")
        if name == "up":
            command.add_argument("--fresh", action="store_true", help="delete the data first")
        else:
            command.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    try:
        if arguments.command == "up":
            up(arguments.port_offset, arguments.fresh)
        elif arguments.command == "restore":
            restore(arguments.file)
        elif arguments.words:
            execute(arguments.port_offset, arguments.words)
        else:
            raise SetupError("exec: which command?")
    except KeyboardInterrupt:
        return 0
    except (StackError, OSError) as error:
        hint = " (was it made by another user?)" if isinstance(error, PermissionError) else ""
        print(f"tools/stack: {error}{hint}", file=sys.stderr)
        return 2 if isinstance(error, SetupError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
