"""What the tests of the page stand on: its process, a browser's tab, and rows to look at.

What it does: starts `python -m page` with the environment that its overlay gives it, and notes
what a tab complains of. What it does not: know what a view ought to show.
"""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Request
from playwright.sync_api import Page as PlaywrightPage

from tests.support.pipeline import Database
from tools.process import CHECKOUT, Process, clean_environment, free_port

PASSWORD = "reader"
WEB = CHECKOUT / "overlays/web"


class Answer:
    """What the page answered to one request."""

    def __init__(self, status: int, headers: Message, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.text = body.decode()

    def json(self) -> Any:
        return json.loads(self.text)


class Page(Process):
    """One process of the page, over one database."""

    stop_seconds = 5.0

    def __init__(self, folder: Path, database: Database, **environment: str) -> None:
        self.database = database
        self.port = free_port()
        self.origin = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(database.conninfo["port"]),
            "PGDATABASE": database.name,
            "PGUSER": "reader",
            "PGPASSWORD": PASSWORD,
            "WEB_LISTEN": f"127.0.0.1:{self.port}",
        } | environment
        super().__init__("page", folder / f"page-{self.port}.log")

    def start(self) -> None:
        environment = clean_environment() | {"PYTHONUNBUFFERED": "1"} | self.environment
        self._spawn([sys.executable, "-m", "page"], environment, WEB)

    def wait_ready(self, timeout: float = 30) -> None:
        self.wait_until(self._is_alive, f"answering on port {self.port}", timeout)

    def _is_alive(self) -> bool:
        try:
            return self.get("/alive").status == 200
        except OSError:
            return False

    def get(self, path: str, pairs: Any = (), **headers: str) -> Answer:
        """Ask without a browser. `pairs` are the parameters."""
        query = urlencode(pairs)
        request = urllib.request.Request(
            f"{self.origin}{path}{'?' if query else ''}{query}", headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.headers, error.read())

    def chart(self, device: str, event_type: str, **period: str) -> Any:
        """Return chart.json of one device."""
        answer = self.get("/chart.json", {"id": device, "type": event_type, **period})
        assert answer.status == 200, answer.text
        return answer.json()


class Tab:
    """One tab, in a profile of its own, and what it complained of."""

    def __init__(self, browser: Browser, origin: str, **options: Any) -> None:
        self.origin = origin
        # What a test brings about itself: `Failed to load resource` when the database is away.
        self.expected: list[str] = []
        self._complaints: list[str] = []
        options.setdefault("viewport", {"width": 1200, "height": 800})
        self._context = browser.new_context(**options)
        self._context.set_default_timeout(15_000)
        self.page: PlaywrightPage = self._context.new_page()
        self.page.on("console", self._note_console)
        self.page.on("pageerror", lambda error: self._complaints.append(f"error: {error}"))
        self.page.on("request", self._note_request)
        self.page.on("dialog", lambda dialog: self._complaints.append(f"dialog: {dialog.message}"))
        self.page.on("crash", lambda _: self._complaints.append("the tab crashed"))

    def goto(self, path: str) -> None:
        self.page.goto(self.origin + path)

    def close(self) -> list[str]:
        """Close it; return what it complained of, beyond what was expected."""
        self._context.close()
        return [
            complaint
            for complaint in self._complaints
            if not any(expected in complaint for expected in self.expected)
        ]

    def _note_console(self, message: ConsoleMessage) -> None:
        # A violation of the policy is an error here too.
        if message.type in ("error", "warning"):
            self._complaints.append(f"console {message.type}: {message.text} {message.location}")

    def _note_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if f"{parts.scheme}://{parts.netloc}" != self.origin and parts.scheme != "blob":
            self._complaints.append(f"asked elsewhere: {request.url}")


def ago(**interval: float) -> datetime:
    """A time so long before now."""
    return datetime.now(UTC) - timedelta(**interval)


def insert(database: Database, events: Iterable[dict[str, Any]]) -> None:
    """Put rows into the database as the ingester would; what it takes from nobody, too."""
    rows = [
        {
            "event_id": f"seed-{number}",
            "device_id": "device-1",
            "event_type": "temperature",
            "value_num": None,
            "value_text": None,
            "unit": None,
            "ts_device": None,
            "ts_server": datetime.now(UTC),
        }
        | event
        for number, event in enumerate(events)
    ]
    columns = ", ".join(rows[0])
    places = ", ".join(f"%({name})s" for name in rows[0])
    connection = database.connect()
    try:
        with connection, connection.cursor() as cursor:
            cursor.executemany(f"INSERT INTO events ({columns}, schema) VALUES ({places}, 1)", rows)
    finally:
        connection.close()


def readings(
    device: str, values: Sequence[float | str], every_seconds: float, end: datetime, **fields: Any
) -> list[dict[str, Any]]:
    """Events of one type at equal pauses, the last of them at `end`."""
    first = end - timedelta(seconds=every_seconds * (len(values) - 1))
    kind = fields.get("event_type", "temperature")
    return [
        {
            "event_id": f"{device}-{kind}-{number}",
            "device_id": device,
            "value_num": None if isinstance(value, str) else value,
            "value_text": value if isinstance(value, str) else None,
            "ts_server": first + timedelta(seconds=every_seconds * number),
        }
        | fields
        for number, value in enumerate(values)
    ]
