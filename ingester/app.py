"""The daemon: wiring, signals, the loop, exit codes. Run by `python -m ingester.app`.

What it does: moves batches from the broker through ingest() and back, waits out the outages
of the database, and lets old rows be deleted in between. What it does not: know SQL, paho or
the event contract.

Invariant: a batch is settled only after ingest() has returned for it. Whatever else
happens it stays unsettled, and stays with the broker, to be tried again.

Exit codes: 0 after SIGTERM or SIGINT, 2 for wrong settings, 1 with a traceback for a bug. A
loop that hangs is ended by SIGALRM, with a traceback of where it hung.
"""

import faulthandler
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from dotenv import load_dotenv

from ingester.broker import Broker
from ingester.client import UnknownPaho
from ingester.connection import LOOK_SECONDS, StoreUnavailable
from ingester.decoder import Decoder
from ingester.ingest import ingest
from ingester.outage import Outage
from ingester.progress import OFFLINE, Progress, State
from ingester.retention import Retention
from ingester.settings import Settings, SettingsError
from ingester.store import Store

# How long the loop waits for something to happen; a signal is noticed at the latest then.
TURN_SECONDS = 0.5
# How long the database may go unasked, so that its absence is noticed in a quiet hour too.
PING_SECONDS = 10.0
# A message that waits longer than this to be settled is a sign that nothing moves. The 20 s
# that the healthcheck allows the heartbeat to be old come on top.
PENDING_SECONDS_MAX = 10.0
# From a signal on, the batch under way may still take this long; the whole stop 5 s.
FINISH_SECONDS = 3.0
# Longer than anything that does not come back to the loop may take: by then the broker has cut
# the session, so that nothing is lost with the process.
HANG_SECONDS_MAX = 30.0
# glibc by default asks a mute resolver for 10 s, two of them with a search domain for 40 s, and
# nothing else is done meanwhile.
RESOLVER_OPTIONS = "timeout:1 attempts:1"
# New objects between two searches for cycles. Python's 700 are one message's, and with messages of
# many brackets two fifths of the time went into searches that found nothing.
GARBAGE_THRESHOLD = 100_000


class Daemon:
    """The loop, and what a signal does to it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = False
        self._broker = Broker(settings, last_will=OFFLINE)
        self._store = Store(settings.database, session=self)
        self._decoder = Decoder(settings.topics, settings.device_default_tz)
        self._database = Outage("Postgres")
        self._retention = Retention(self._store, settings.retention_days)
        self._progress = Progress(settings.heartbeat_file)
        self._answered_at = 0.0

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        """Let the loop end after the batch under way; a signal handler."""
        self._stopping = True
        self._store.give_up_at(time.monotonic() + FINISH_SECONDS)

    @property
    def sockets(self) -> Sequence[Any]:
        """What to look at while the database works; see connection.Session."""
        return self._broker.sockets

    def serve(self) -> None:
        """Serve the broker while the database works; see connection.Session."""
        restart_watchdog()
        self._broker.serve()

    def run(self) -> None:
        """Move batches until stop(), then disconnect."""
        while not self._stopping:
            restart_watchdog()
            if pause_seconds := self._database.pause_seconds():
                self._broker.wait(min(pause_seconds, TURN_SECONDS))
            else:
                try:
                    self._turn()
                    self._retention.turn()
                except StoreUnavailable as error:
                    self._store.roll_back()
                    self._database.failed(str(error))
            self._report()
        self._retention.close()
        self._broker.close(OFFLINE)
        self._store.close()
        logging.info("stopped")

    def _turn(self) -> None:
        """Settle what has arrived, or wait a moment for something to arrive."""
        self._store.connect()
        seconds_max = min(TURN_SECONDS, self._retention.pause_seconds())
        batch = self._broker.receive(self._settings.batch_max, seconds_max)
        began_at = time.monotonic()
        if batch:
            done = ingest(batch, self._store, self._decoder, self._decode_ahead)
            self._broker.settle(batch[: done.messages], done.replies)
            self._progress.settled(done.counts(), time.monotonic() - began_at)
            self._answered_at = began_at
        elif began_at - self._answered_at > PING_SECONDS:
            self._store.ping()
            self._answered_at = began_at
        self._database.recovered()

    def _decode_ahead(self) -> None:
        """Decode what comes next, until the database has answered."""
        has_more = True
        while not self._store.is_answered(0 if has_more else LOOK_SECONDS):
            has_more = self._decoder.decode_ahead(self._broker.messages)

    def _report(self) -> None:
        """Tell log, healthcheck and status topic how it is, as far as it is time to."""
        broker = self._broker
        waiting = self._database.is_ongoing or not self._store.connected
        state = State.WAITING_FOR_DATABASE if waiting else State.ONLINE
        pending = broker.oldest_unsettled_seconds > PENDING_SECONDS_MAX
        self._progress.update(state, healthy=broker.connected and not waiting and not pending)
        if not broker.connected:
            return
        status = self._progress.status(
            broker.connection,
            in_hand=broker.unsettled,
            oldest_in_hand_seconds=round(broker.oldest_unsettled_seconds, 1),
            database_round_trip_ms=round(self._store.round_trip_seconds * 1000, 1),
            broker_dropped=broker.dropped,
        )
        if status is not None:
            broker.publish_status(status)


def main() -> int:
    """Run the daemon until a signal; return the exit code."""
    load_dotenv(".env", interpolate=False)
    try:
        settings = Settings.from_env(os.environ)
    except SettingsError as error:
        print(f"ingester: {error}", file=sys.stderr)
        return 2
    _log_to_stdout(settings.log_level)
    os.environ.setdefault("RES_OPTIONS", RESOLVER_OPTIONS)
    # The traceback, then what SIGALRM does by itself. No thread: the kernel counts.
    faulthandler.register(signal.SIGALRM, file=sys.stderr, all_threads=False, chain=True)
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)
    try:
        daemon = Daemon(settings)
    except UnknownPaho as error:
        print(f"ingester: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, daemon.stop)
    signal.signal(signal.SIGINT, daemon.stop)
    daemon.run()
    return 0


def restart_watchdog() -> None:
    """Put off the alarm that ends a process whose loop hangs."""
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS_MAX)


def _log_to_stdout(level: str) -> None:
    handler = logging.StreamHandler(sys.stdout)
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
