"""The page of charts with many rows: how long its addresses take.

What it does: runs the page of overlays/web as a real process beside a database that
benchmark/queries.py has filled, with the settings that Compose gives PostgreSQL, and asks for
each address over HTTP. What it does not: draw anything, which browsers do in time of their own.

Invariant: an answer that is not the whole of what was asked for is an error, not a fast one.
"""

import re
import statistics
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode

from tools.process import CHECKOUT, LOOPBACK, Process, StackError, clean_environment, free_port
from tools.stack import Postgres

WEB = CHECKOUT / "overlays/web"
ROUNDS = 5
LIST = "the list of devices"
DEVICE = "a device"
YEAR = "its chart of 1 year"
# What people wait for most.
LIMITED = (LIST, DEVICE, YEAR)
MILLISECONDS_MAX = 1_000
# The first start may install the packages.
START_SECONDS_MAX = 120.0
ANSWER_SECONDS_MAX = 60.0
PASSWORD = "reader"


def available() -> bool:
    """Whether the page is there; deleting its folder removes it whole."""
    return (WEB / "run").exists()


class Page(Process):
    """The page as a person runs it without Docker, on a port of its own."""

    def __init__(self, folder: Path, postgres: Postgres) -> None:
        self.port = free_port()
        self.environment = {
            "POSTGRES_DB": postgres.dbname,
            "POSTGRES_PORT": str(postgres.port),
            "READER_PASSWORD": PASSWORD,
            "WEB_PORT": str(self.port),
        }
        super().__init__("page", folder / "page.log")

    def start(self) -> None:
        self._spawn([str(WEB / "run")], clean_environment() | self.environment, CHECKOUT)

    def wait_ready(self) -> None:
        self.wait_until(self._answers, f"answering on port {self.port}", START_SECONDS_MAX)

    def get(self, address: str) -> float:
        """Return how many seconds it took to answer. Raises StackError if that was a refusal."""
        url = f"http://{LOOPBACK}:{self.port}{address}"
        began_at = time.perf_counter()
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_SECONDS_MAX) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise StackError(f"the page answers {error.code} to {address}:\n{text}") from None
        return time.perf_counter() - began_at

    def _answers(self) -> bool:
        try:
            self.get("/alive")
        except OSError:
            return False
        return True


def measure(folder: Path, postgres: Postgres, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median time of each address of so many, in milliseconds.

    PostgreSQL, which holds the rows, is started again with the settings that Compose gives it.
    """
    postgres.stop()
    postgres.settings |= _compose_settings()
    postgres.start()
    postgres.wait_ready()
    postgres.psql(f"ALTER ROLE reader LOGIN PASSWORD '{PASSWORD}'")
    page = Page(folder, postgres)
    try:
        page.start()
        page.wait_ready()
        return {
            what: _milliseconds(page, address, rounds) for what, address in _addresses().items()
        }
    finally:
        page.stop()


def too_slow(page_ms: dict[str, float]) -> list[str]:
    """Return those of LIMITED that took longer than they may."""
    return [what for what in LIMITED if page_ms[what] > MILLISECONDS_MAX]


def _milliseconds(page: Page, address: str, rounds: int) -> float:
    page.get(address)  # what it reads is in memory then, as far as that is large enough
    return statistics.median(page.get(address) for _ in range(rounds)) * 1e3


def _compose_settings() -> dict[str, str]:
    text = (CHECKOUT / "docker-compose.yml").read_text()
    command = re.search(r"(?m)^ +postgres (-c .+\n(?: +-c .+\n)*)", text)
    if command is None:
        raise StackError("docker-compose.yml: expected a command 'postgres -c ...'")
    return dict(re.findall(r"-c (\w+)=(\S+)", command[1]))


def _addresses() -> dict[str, str]:
    """Return each address, by what it shows."""
    now = datetime.now(UTC)
    middle = {
        name: (now - timedelta(days=days)).isoformat(timespec="seconds")
        for name, days in (("from", 200), ("to", 110))
    }

    def chart(devices: int, path: str = "/chart.json", **period: str) -> str:
        return _address(path, devices, type="temperature", **period)

    return {
        LIST: "/",
        "the devices with 77 in their names": "/?q=77",
        "the silent devices": "/?silent=1",
        "25 sparklines of the list": _address("/sparklines.json", 25),
        "the names for a comparison": "/devices.json",
        DEVICE: _address("/device", 1, range="1y"),
        "its chart of 1 hour": chart(1, range="1h"),
        "its chart of 24 hours": chart(1, range="24h"),
        "its chart of 7 days": chart(1, range="7d"),
        "its chart of 30 days": chart(1, range="30d"),
        YEAR: chart(1, range="1y"),
        "its chart of 90 days in the middle of the year": chart(1, **middle),
        "the chart of 1 year of 2 devices": chart(2, range="1y"),
        "the chart of 1 year of 8 devices": chart(8, range="1y"),
        "the year of one as CSV": chart(1, "/chart.csv", range="1y"),
        "dead letters": "/deadletters",
        "health": "/health",
        "health: events per minute": "/rate.json",
        "health: latency": "/latency.json",
        "health: missing events": "/missing.json",
    }


def _address(path: str, devices: int, **others: str) -> str:
    ids = [("id", f"device-{number}") for number in range(7, 7 + devices)]
    return f"{path}?{urlencode([*ids, *others.items()])}"
