"""The dead letters at the command line: `python -m ingester.deadletters`.

What it does: reads the arguments, runs the command, prints what comes of it. What it does
not: know SQL, or decode an event.

Invariant: nothing is changed before all arguments are known to be good and database and
broker answer; and nothing that a device sent reaches the terminal but as printable text.

Exit codes: 0, also if all that was replayed is stored; 1 if something was refused again, or
a command was broken off; 2 for bad arguments or settings, or if a server does not answer.
"""

import argparse
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from dotenv import load_dotenv

from ingester.connection import StoreUnavailable
from ingester.deadletters.table import STORED, Count, DeadLetterTable, Filter, Letter
from ingester.deadletters.terminal import Ticker, columns, payload_lines, printable
from ingester.event import SCHEMA, decode
from ingester.rejection import Reason, Rejection
from ingester.reply import timestamp
from ingester.settings import Settings, SettingsError
from ingester.tool_session import BrokerUnavailable, ToolSession

DEVICE_COLUMNS_MAX = 24
ID_MAX = 2**63 - 1  # PostgreSQL's BIGINT
_AGO = re.compile(r"([0-9]{1,5})([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}
_OUTCOMES = {STORED: STORED, None: "deleted meanwhile"}


class BadArgumentError(Exception):
    """An argument that cannot be meant; the text is one line that names it."""


class Parser(argparse.ArgumentParser):
    """argparse, with one line for what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Say it and end."""
        _say(f"{message} (--help shows more)")
        raise SystemExit(2)


def main() -> int:
    """Run one command; return the exit code."""
    arguments = _parser().parse_args()
    load_dotenv(".env", interpolate=False)
    if isinstance(sys.stdout, io.TextIOWrapper):  # in a locale that lacks a character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        settings = Settings.from_env(os.environ)
        code: int = arguments.run(arguments, settings, _connect(settings))
        sys.stdout.flush()
        return code
    except (SettingsError, BadArgumentError, BrokerUnavailable) as error:
        _say(str(error))
    except StoreUnavailable as error:
        _say(f"Postgres: {error}")
    except KeyboardInterrupt:
        _say("interrupted")
        return 1
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 2


def _connect(settings: Settings) -> DeadLetterTable:
    table = DeadLetterTable(settings.database)
    table.connect()
    return table


def _parser() -> Parser:
    parser = Parser(prog="python -m ingester.deadletters", description="Look after dead letters.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    which = Parser(add_help=False)
    reasons = [str(reason) for reason in Reason]
    which.add_argument("--reason", choices=reasons, metavar="R", help="a code, as in an ACK")
    which.add_argument(
        "--since", type=_moment, metavar="T", help="2026-02-10T12:00:00Z (or without Z: UTC), or 2d"
    )

    command = commands.add_parser(
        "list", parents=[which], help="show those that came last, and how many"
    )
    command.set_defaults(run=_list)
    command.add_argument("--limit", type=_number, default=20, metavar="N", help="default: 20")
    command.add_argument("--json", action="store_true", help="one JSON object, for programs")

    command = commands.add_parser("show", help="show one, with its payload")
    command.set_defaults(run=_show)
    command.add_argument("id", type=_number, metavar="ID")
    command.add_argument("--raw", action="store_true", help="the bytes of the payload alone")

    command = commands.add_parser(
        "replay", parents=[which], help="ingest again what can be stored now, and answer"
    )
    command.set_defaults(run=_replay)
    command.add_argument("ids", type=_number, nargs="*", metavar="ID")
    command.add_argument("--set-device", metavar="ID", help="as if it had come from this device")
    command.add_argument("--dry-run", action="store_true", help="say what would be replayed")

    command = commands.add_parser("purge", help="delete the old ones")
    command.set_defaults(run=_purge)
    command.add_argument(
        "--older-than",
        type=_moment,
        required=True,
        metavar="T",
        help="last received: 30d, 12h, 5m, or a time",
    )
    command.add_argument("--dry-run", action="store_true", help="say how many")
    return parser


def _moment(text: str) -> datetime:
    if ago := _AGO.fullmatch(text):
        return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"expected a time such as 2026-02-10T12:00:00Z, or 2d, 12h or 5m, got {text!r}"
        ) from None


def _number(text: str) -> int:
    # int() takes signs, underscores and digits of other scripts.
    if text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= int(text) <= ID_MAX:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")


# --- the commands --------------------------------------------------------------------


def _list(arguments: argparse.Namespace, _settings: Settings, table: DeadLetterTable) -> int:
    which = _filter(arguments)
    letters, counts = table.newest(which, arguments.limit), table.counts(which)
    if arguments.json:
        document = {
            "counts": {
                c.reason: {"total": c.total, "times": c.times, "stored": c.stored} for c in counts
            },
            "dead_letters": [letter._asdict() for letter in letters],
        }
        print(json.dumps(document, default=timestamp))
    elif letters:
        print("\n".join(_table(letters)), "\n".join(_summary(counts)), sep="\n\n")
    else:
        print("no dead letters")
    return 0


def _show(arguments: argparse.Namespace, _settings: Settings, table: DeadLetterTable) -> int:
    letter = _known([arguments.id], table)[0]
    payload = table.payload(letter)
    if arguments.raw:
        sys.stdout.buffer.write(payload)
        return 0
    for name, value in letter._asdict().items():
        text = timestamp(value) if isinstance(value, datetime) else value
        print(f"{name:<16} {'-' if text is None else printable(str(text))}")
    print(f"{'payload':<16} {len(payload)} bytes", *payload_lines(payload), sep="\n")
    return 0


def _replay(arguments: argparse.Namespace, settings: Settings, table: DeadLetterTable) -> int:
    device_id = arguments.set_device
    if device_id is not None:
        _check_device_id(device_id)
    chosen = _chosen(arguments, table)
    if arguments.dry_run:
        reasons = Counter(chosen.values())
        print(f"would replay {_dead_letters(len(chosen))}{_parts(reasons)}")
        return 0
    if not chosen:
        print("nothing to replay")
        return 0
    outcomes: Counter[str] = Counter()
    ticker = Ticker("replayed")
    with ToolSession(settings) as session:

        def replay() -> None:
            for letter_id in chosen:
                outcome = table.replay(letter_id, settings, device_id, session.publish)
                outcomes[_OUTCOMES.get(outcome, f"refused as {outcome}")] += 1
                ticker.tick(outcomes.total(), len(chosen))

        stopped_by = _run(replay)
    ticker.clear()
    done = f"replayed {outcomes.total()} of {_dead_letters(len(chosen))}{_parts(outcomes)}"
    if stopped_by:
        _say(f"{stopped_by}; {done}; the same command finishes it")
        return 1
    print(done)
    return 0 if outcomes.total() == outcomes[STORED] else 1


def _purge(arguments: argparse.Namespace, _settings: Settings, table: DeadLetterTable) -> int:
    moment = arguments.older_than
    before = f"last received before {timestamp(moment)}"
    if arguments.dry_run:
        print(f"would delete {_dead_letters(table.count_older(moment))} {before}")
        return 0
    counts: Counter[str] = Counter()
    ticker = Ticker("deleted")

    def purge() -> None:
        while deleted := table.purge_some(moment):
            counts["deleted"] += deleted
            ticker.tick(counts["deleted"])

    stopped_by = _run(purge)
    ticker.clear()
    done = f"deleted {_dead_letters(counts['deleted'])} {before}"
    if stopped_by:
        _say(f"{stopped_by}; {done}")
        return 1
    print(done)
    return 0


def _run(work: Callable[[], None]) -> str:
    """Do what takes long; return what has stopped it, nothing if it came to its end."""
    try:
        work()
    except KeyboardInterrupt:
        return "interrupted"
    except StoreUnavailable as error:
        return f"Postgres: {error}"
    except BrokerUnavailable as error:
        return str(error)
    return ""


def _filter(arguments: argparse.Namespace) -> Filter:
    return Filter(arguments.reason, arguments.since or Filter(None).since)


def _known(ids: Sequence[int], table: DeadLetterTable) -> list[Letter]:
    """Return the letters of all the ids, in their order; each must be there."""
    letters = {letter.id: letter for letter in table.letters(ids)}
    if unknown := [str(number) for number in ids if number not in letters]:
        raise BadArgumentError(f"id {', '.join(unknown)}: no such dead letter")
    return [letters[number] for number in ids]


def _chosen(arguments: argparse.Namespace, table: DeadLetterTable) -> dict[int, str]:
    """Return the ids to replay, each with its reason."""
    filtered = arguments.reason is not None or arguments.since is not None
    if filtered == bool(arguments.ids):
        raise BadArgumentError("replay: name ids, or else --reason or --since or both")
    if arguments.ids:
        return {letter.id: letter.reason for letter in _known(arguments.ids, table)}
    return dict(table.unstored(_filter(arguments)))


def _check_device_id(device_id: str) -> None:
    """Let the event contract decide whether it is one."""
    fields = {"schema": SCHEMA, "event_id": "x", "device_id": device_id, "event_type": "x"}
    result = decode(device_id, json.dumps(fields).encode("utf-8"), UTC).results[0]
    if isinstance(result, Rejection):
        raise BadArgumentError(f"--set-device: {result.error}")


# --- what is printed -----------------------------------------------------------------


def _say(text: str) -> None:
    print(f"deadletters: {text}", file=sys.stderr)


def _dead_letters(number: int) -> str:
    return f"{number} dead letter{'' if number == 1 else 's'}"


def _parts(counts: Counter[str]) -> str:
    parts = [f"{number} {name}" for name, number in counts.most_common()]
    return f": {', '.join(parts)}" if parts else ""


def _table(letters: Sequence[Letter]) -> list[str]:
    """Return two lines for each: what it is, and what is wrong with it."""
    # Into a pipe nothing is cut: there is grep behind it, and no width.
    width = shutil.get_terminal_size(fallback=(2**31, 24)).columns
    rows = [("id", "last received (UTC)", "times", "reason", "replay", "device", "event_id")]
    rows += [
        (
            str(letter.id),
            timestamp(letter.last_received_at)[:19].replace("T", " "),
            str(letter.times),
            letter.reason,
            letter.replay_outcome or "-",
            printable(letter.device_id or "-")[:DEVICE_COLUMNS_MAX],
            printable(letter.event_id or "-"),
        )
        for letter in letters
    ]
    lines = columns(rows)
    errors = [f"{'':4}{printable(letter.error)}" for letter in letters]
    lines = [lines[0], *(line for pair in zip(lines[1:], errors, strict=True) for line in pair)]
    return [line[:width] for line in lines]


def _summary(counts: Sequence[Count]) -> list[str]:
    rows = [("reason", "total", "times", "stored by a replay")]
    rows += [(c.reason, str(c.total), str(c.times), str(c.stored)) for c in counts]
    return columns(rows)


if __name__ == "__main__":
    sys.exit(main())
