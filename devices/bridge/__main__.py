"""`python -m devices.bridge FILE`: the bridge, and two ways to try a configuration.

What it does: reads options, the configuration and the environment, and runs the bridge until it is
told to stop. What it does not: read .env by itself; Compose or the shell hands it over.

Invariant: exit code 0 after SIGTERM or Ctrl-C, 2 for a mistake in the configuration with one line
that names its place, 1 for an outbox that cannot be used.
"""

import argparse
import logging
import os
import secrets
import select
import signal
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from devices.bridge.bridge import Bridge
from devices.bridge.config import ConfigError, Configuration, load
from devices.bridge.recorded import RecordError, as_line, messages, tried
from devices.bridge.session import Session, UnknownPaho
from devices.bridge.template import groups
from devices.bridge.translate import Incoming, Translator
from devices.python.telemetry import OutboxError

DEFAULT_FILE = Path(__file__).with_name("bridge.toml")


class Parser(argparse.ArgumentParser):
    """argparse, with one line for what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bridge: {message}\n")


def main() -> int:
    """Run; return the exit code."""
    parser = Parser(prog="bridge", description="Events from what other firmware publishes.")
    parser.add_argument("file", nargs="?", default=str(DEFAULT_FILE), help="TOML: docs/bridge.md")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--try", dest="recorded", metavar="FILE", help="of recorded messages")
    what.add_argument("--dry-run", action="store_true", help="connect and print, store nothing")
    options = parser.parse_args()
    try:
        configuration = load(options.file, os.environ)
        if options.recorded:
            return try_file(options.recorded, configuration)
    except (ConfigError, RecordError) as error:
        print(f"bridge: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=configuration.log_level, format="%(asctime)s %(levelname)s %(message)s"
    )
    if options.dry_run:
        return dry_run(configuration)
    try:
        bridge = Bridge(configuration, os.environ.get("HEARTBEAT_FILE") or None)
    except OutboxError as error:
        print(f"bridge: BRIDGE_STORE: {error}", file=sys.stderr)
        return 1

    def stop(_number: int, _frame: Any) -> None:
        bridge.is_stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        bridge.run()
    except (OutboxError, UnknownPaho) as error:
        print(f"bridge: {error}", file=sys.stderr)
        return 1
    return 0


def try_file(path: str, configuration: Configuration) -> int:
    """Print what each recorded message becomes."""
    try:
        if path == "-":
            recorded = list(messages(sys.stdin, "standard input"))
        else:
            with open(path, encoding="utf-8") as file:
                recorded = list(messages(file, path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from None
    with suppress(BrokenPipeError):  # `| head`
        for line in tried(recorded, configuration.sources):
            print(line, flush=True)
    return 0


def dry_run(configuration: Configuration) -> int:
    """Print what each message becomes as it comes; nothing is stored, and no session kept."""
    translator = Translator(configuration.sources)
    sessions = [
        Session(configuration.theirs, f"bridge-dry-run-{secrets.token_hex(4)}", each, False)
        for each in groups(configuration.sources.filters)
    ]
    number = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            sockets = [each for session in sessions if (each := session.socket) is not None]
            has_unread = any(session.has_unread for session in sessions)
            select.select(sockets, [], [], 0 if has_unread else 0.5)
            for session in sessions:
                for arrived in session.read():
                    number += 1
                    message = Incoming(
                        arrived.topic, arrived.payload, arrived.retained, datetime.now(UTC)
                    )
                    line = as_line(message, translator.translate(message), number)
                    print(line, flush=True)
    except KeyboardInterrupt:
        for session in sessions:
            session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
