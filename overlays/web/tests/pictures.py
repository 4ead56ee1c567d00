"""Makes the two pictures of the documents anew: ../pictures/devices.png and device.png.

    PYTHONPATH=overlays/web:. overlays/web/.venv/bin/python overlays/web/tests/pictures.py

from the checkout's folder, after overlays/web/test has installed what it needs.

What it does: starts the page over a database of its own with a week of a home's data, and takes
the pictures. What it does not: look at them; whoever ran it does.
"""

import math
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from playwright.sync_api import ViewportSize, expect, sync_playwright
from support_page import PASSWORD, WEB, Page, Tab, ago, insert, readings

from tests.support.pipeline import Database
from tools.stack import Stack

SIZE = ViewportSize(width=1200, height=640)
CHARTS_SIZE = ViewportSize(width=1200, height=790)
PICTURES = WEB / "pictures"
MINUTE = 60.0
WEEK_MINUTES = 7 * 24 * 60


def swing(
    dice: random.Random, minutes: int, every: int, low: float, high: float, noise: float
) -> list[float]:
    """A value that goes up and down with the day, and wanders a little, as rooms do."""
    values: list[float] = []
    wander = 0.0
    for minute in range(0, minutes, every):
        wander = 0.995 * wander + dice.gauss(0, noise / 4)
        day = math.sin((minute / 1440 - 0.4) * 2 * math.pi)
        middle, reach = (low + high) / 2, (high - low) / 2
        values.append(round(middle + reach * day + wander + dice.gauss(0, noise / 3), 1))
    return values


def doors(dice: random.Random, device: str, event_type: str, end: datetime) -> list[dict[str, Any]]:
    """A week of a door that is opened now and then, and left open some nights."""
    rows: list[dict[str, Any]] = []
    at = end - timedelta(days=7)
    open_next = True
    while at < end:
        row = readings(device, ["open" if open_next else "closed"], MINUTE, at)[0]
        rows.append(row | {"event_id": f"{device}-{len(rows)}", "event_type": event_type})
        pause = dice.choice((0.3, 0.8, 1.5, 7)) if open_next else dice.choice((3, 6, 9, 14))
        at += timedelta(hours=pause * dice.uniform(0.7, 1.3))
        open_next = not open_next
    return rows


def seed(database: Database) -> None:
    """A home: rooms, a greenhouse, a meter, and a sensor whose battery is empty."""
    dice = random.Random(17)
    now = ago(seconds=12)

    def measure(device: str, kind: str, unit: str, *swinging: float, **options: Any) -> None:
        minutes, every = options.get("minutes", 1_500), options.get("every", 5)
        low, high, noise = swinging
        values = swing(dice, minutes, every, low, high, noise)
        end = options.get("end", now - timedelta(seconds=dice.uniform(0, 200)))
        insert(database, readings(device, values, every * MINUTE, end, event_type=kind, unit=unit))

    measure("cellar", "temperature", "°C", 10.5, 14.4, 0.2, minutes=WEEK_MINUTES, every=1)
    insert(database, doors(dice, "cellar", "door", now))
    for room, low, high in (("bathroom", 20, 23), ("bedroom", 17, 19.5), ("living-room", 19.5, 22)):
        measure(room, "temperature", "°C", low, high, 0.4)
        measure(room, "humidity", "%", 44, 58, 1.5)
    measure("living-room", "co2", "ppm", 480, 1_050, 60)
    measure("greenhouse", "temperature", "°C", 4, 19, 0.8)
    measure("greenhouse", "soil_moisture", "%", 31, 38, 0.5)
    measure("house-meter", "power", "W", 180, 900, 150, every=2)
    measure("freezer", "temperature", "°C", -19.5, -17.8, 0.5)
    measure("attic", "temperature", "°C", 9, 14, 0.4, end=ago(hours=7))
    insert(
        database,
        readings("mailbox", ["open", "closed"] * 3, 9_000, ago(hours=2), event_type="flap"),
    )


def take(tab: Tab, path: str, file: Path) -> None:
    """Show an address and take a picture of it."""
    tab.goto(path)
    tab.page.wait_for_load_state("networkidle")
    tab.page.screenshot(path=file)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Take both."""
    with Stack(with_ingester=False, environment={"READER_PASSWORD": PASSWORD}) as stack:
        database = Database(stack.postgres, "qs")
        seed(database)
        page = Page(stack.folder, database)
        page.start()
        try:
            page.wait_ready()
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path="/usr/bin/chromium", args=["--no-sandbox"]
                )
                tab = Tab(browser, page.origin, viewport=SIZE, timezone_id="Europe/Berlin")
                take(tab, "/", PICTURES / "devices.png")
                tab.page.set_viewport_size(CHARTS_SIZE)
                tab.goto("/device?id=cellar&range=7d")
                expect(tab.page.locator("figcaption")).to_have_count(2)
                take(tab, "/device?id=cellar&range=7d", PICTURES / "device.png")
                browser.close()
        finally:
            page.stop()


if __name__ == "__main__":
    main()
