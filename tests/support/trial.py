"""One fault under load: what goes on before, during and after it, and what must hold then.

What it does: lets devices of three kinds publish through the fault, measures how soon the
ingester works again, and checks what a fault of the database must not do to the ingester.
What it does not: make the fault; that is the test's.

Invariant: a device that sends each event once counts on the broker, which stays up: so an
event that is PUBACKed too early is lost for good, and found missing. One that resends could
not tell.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmark.machine import memory_peak_mb
from tests.support.device import Device, event
from tests.support.findings import Finding, find
from tests.support.load import connects, devices, hear_all, load, wait_for_acks
from tests.support.pipeline import Pipeline, wait_until

RECOVERY_SECONDS_MAX = 5.0
PEAK_MEGABYTES_MAX = 100.0


class Trial:
    """The devices of one fault, and the ingester as it was before the fault."""

    def __init__(self, pipeline: Pipeline, publishers: list[Device]) -> None:
        self.pipeline = pipeline
        self.publishers = publishers
        self.once, self.patient, self.faulty = publishers[:-2], publishers[-2], publishers[-1]
        self.recovery_seconds = 0.0
        self._pid = pipeline.ingester.pid
        self._connects = connects(pipeline)
        self._log_start = pipeline.ingester.log_end
        self._began_at = time.monotonic()

    def warned(self, timeout: float = 30) -> None:
        """Wait until the log says that the database does not work."""
        self.pipeline.ingester.wait_for_log("WARNING Postgres: ", timeout, self._log_start)

    def lasts(self, seconds: float) -> None:
        """Let the fault last so long, and see that the ingester does."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.pipeline.ingester.running, self.pipeline.ingester.log_tail()
            time.sleep(0.05)

    def flows(self, number: int = 100) -> None:
        """Wait until so many more events have been stored and their ACKs heard."""
        wait_for_acks(self.publishers, number)

    def fixed(self, seconds_max: float = RECOVERY_SECONDS_MAX) -> None:
        """Note that the fault is fixed just now: the next ACK must come soon."""
        began_at, before = time.monotonic(), self._acks()
        wait_until(lambda: self._acks() > before, "the first ACK after the fault", 30)
        self.recovery_seconds = time.monotonic() - began_at
        log = self.pipeline.ingester.log_tail()
        assert self.recovery_seconds < seconds_max, (self.recovery_seconds, log)

    def finding(self, case: str, note: str = "") -> Finding:
        """Check the promise, and that what was refused and kept are the faulty events alone."""
        database = self.pipeline.database
        finding = find(case, self.publishers, database, note=note)
        faulty = self.faulty.sent.keys()
        for device in self.publishers:
            refused = {ack["event_id"] for ack in device.acks if ack["status"] == "rejected"}
            assert refused == (faulty if device is self.faulty else set()), case
        kept = {row[0] for row in database.query("SELECT DISTINCT event_id FROM dead_letters")}
        assert kept == faulty, case
        return finding

    def finding_after_outage(self, case: str) -> Finding:
        """Check this too: the ingester lived, kept its MQTT session, was small and terse."""
        ingester = self.pipeline.ingester
        assert ingester.running, ingester.log_tail()
        assert ingester.pid == self._pid
        peak = memory_peak_mb(ingester)
        assert peak < PEAK_MEGABYTES_MAX, f"{case}: {peak:.0f} MB"
        log = ingester.log(self._log_start)
        assert connects(self.pipeline) == self._connects, log
        assert "WARNING MQTT" not in log
        assert "Traceback" not in log
        seconds = time.monotonic() - self._began_at
        began = re.findall(r"WARNING Postgres: .*", log)
        ended = re.findall(r"INFO Postgres: back after .*", log)
        assert 1 <= len(began) <= 1 + seconds / 60, began
        assert len(ended) == 1, (began, ended)
        assert log.index(began[-1]) < log.index(ended[0])
        lines = [line for line in log.splitlines() if " DEBUG " not in line]
        assert len(lines) <= 6 + seconds / 10 + seconds / 60, lines
        note = f"first ACK after {self.recovery_seconds:.1f} s, {peak:.0f} MB"
        return self.finding(case, note)

    def _acks(self) -> int:
        return sum(len(device.acks) for device in self.publishers)


@contextmanager
def under_load(pipeline: Pipeline, per_second: int = 50) -> Iterator[Trial]:
    """Let devices publish while the block runs; behind it, wait until all is answered.

    Two send each event once, one sends each again until it is answered, and one sends what
    cannot be stored.
    """
    with devices(pipeline, 4) as publishers:
        trial = Trial(pipeline, publishers)
        with (
            load(trial.once, per_second),
            _thread(lambda over: _deliver(trial.patient, over)),
            _thread(lambda over: _err(trial.faulty, over)),
        ):
            trial.flows(50)
            yield trial
        hear_all([*trial.once, trial.patient])
        trial.faulty.wait(
            lambda: {ack["event_id"] for ack in trial.faulty.acks} >= trial.faulty.sent.keys(),
            "an ACK for each faulty event",
        )


@contextmanager
def _thread(target: Callable[[threading.Event], None]) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=target, args=[over])
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _deliver(device: Device, over: threading.Event) -> None:
    """Send 20 events, again every 2 s until each has its ACK; then the next 20."""
    number = 0
    while not over.is_set():
        batch = [event(i, device.device_id, value=i) for i in range(number, number + 20)]
        wanted = {str(item["event_id"]) for item in batch}
        sent_at = float("-inf")
        while not (device.heard_at.keys() >= wanted or over.is_set()):
            if time.monotonic() - sent_at > 2:
                sent_at = time.monotonic()
                for item in batch:
                    device.send(item)
            over.wait(0.01)
        number += 20


def _err(device: Device, over: threading.Event) -> None:
    """Send what the event contract forbids, ten times a second."""
    number = 0
    while not over.wait(0.1):
        device.send(event(number, device.device_id, value=[]))
        number += 1
