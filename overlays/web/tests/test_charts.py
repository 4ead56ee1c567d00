"""A device's charts in a browser: what is drawn, which period, and how it is moved.

Each test's tab may log no error, break no policy and ask no other host (conftest.py).
"""

import re
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import OpenTab
from playwright.sync_api import Page as BrowserPage
from playwright.sync_api import expect
from support_page import Page, ago, insert, readings

from tests.support.pipeline import Database, wait_until

RANGES = {"1h": 3_600, "24h": 86_400, "7d": 7 * 86_400, "30d": 30 * 86_400, "1y": 365 * 86_400}


@pytest.fixture
def seeded(page: Page) -> Database:
    """One reading in each of the ranges, so that each shows one more; and a second device."""
    for number, hours in enumerate((0.5, 12, 72, 480, 4_800)):
        row = readings("device-1", [20.0 + number], 60, ago(hours=hours), unit="C")
        insert(page.database, [row[0] | {"event_id": f"range-{number}"}])
    insert(page.database, readings("device-2", [25.0, 26.0], 60, ago(minutes=10), unit="C"))
    return page.database


def shown_period(browser: BrowserPage) -> tuple[datetime, datetime]:
    """What the address says."""
    given = parse_qs(urlsplit(browser.url).query)
    return datetime.fromisoformat(given["from"][0]), datetime.fromisoformat(given["to"][0])


def colors(browser: BrowserPage) -> list[str]:
    """The colours that the first chart is drawn in, as #rrggbb, without what is half clear."""
    found: list[str] = browser.locator("canvas").first.evaluate(
        """canvas => {
            const { width, height } = canvas;
            const copy = new OffscreenCanvas(width, height);
            const drawing = copy.getContext("2d", { willReadFrequently: true });
            drawing.drawImage(canvas, 0, 0);
            const { data } = drawing.getImageData(0, 0, width, height);
            const found = new Set();
            for (let at = 0; at < data.length; at += 4) {
                if (data[at + 3] < 255) continue;
                const parts = [data[at], data[at + 1], data[at + 2]];
                found.add("#" + parts.map((part) => part.toString(16).padStart(2, "0")).join(""));
            }
            return [...found];
        }"""
    )
    return found


def variable(browser: BrowserPage, name: str) -> str:
    return str(
        browser.evaluate(
            "name => getComputedStyle(document.documentElement).getPropertyValue(name)", name
        )
    ).strip()


@pytest.mark.usefixtures("seeded")
def test_each_range_has_a_button_an_address_and_a_way_back(open_tab: OpenTab) -> None:
    browser = open_tab("/device?id=device-1").page
    expect(browser.locator("[data-range][aria-current]")).to_have_text("24 h")
    expect(browser.locator("figcaption")).to_have_text("2 readings")
    for number, name in enumerate(RANGES, 1):
        browser.locator(f'[data-range="{name}"]').click()
        text = f"{number} reading{'s' if number > 1 else ''}"
        expect(browser.locator("figcaption")).to_have_text(text)
        expect(browser.locator("[data-range][aria-current]")).to_have_attribute("data-range", name)
        assert parse_qs(urlsplit(browser.url).query) == {"id": ["device-1"], "range": [name]}
        assert f"range={name}" in str(browser.locator("a.csv").get_attribute("href"))
    browser.reload()
    expect(browser.locator("figcaption")).to_have_text("5 readings")
    browser.go_back()
    expect(browser.locator("figcaption")).to_have_text("4 readings")
    expect(browser.locator("[data-range][aria-current]")).to_have_text("30 d")
    browser.go_back()
    expect(browser.locator("figcaption")).to_have_text("3 readings")
    browser.go_forward()
    expect(browser.locator("figcaption")).to_have_text("4 readings")


@pytest.mark.usefixtures("seeded")
def test_a_period_of_ones_own_is_of_the_viewers_zone(open_tab: OpenTab) -> None:
    browser = open_tab("/device?id=device-1", timezone_id="America/New_York").page
    form = browser.get_by_role("form", name="A period of your own")
    form.get_by_label("from").fill("2026-01-02T03:00:00")
    form.get_by_label("to").fill("2026-01-02T02:00:00")
    form.get_by_role("button").click()
    assert "from=" not in browser.url  # it says what is wrong with it
    form.get_by_label("to").fill("2026-01-02T04:00:00")
    form.get_by_role("button").click()
    expect(browser.locator(".plots")).to_have_text("Nothing in this period.")
    since = datetime(2026, 1, 2, 8, tzinfo=UTC)
    assert shown_period(browser) == (since, since + timedelta(hours=1))
    expect(browser.locator("[data-range][aria-current]")).to_have_count(0)
    browser.reload()
    expect(form.get_by_label("from")).to_have_value(re.compile("^2026-01-02T03:00"))
    expect(form.get_by_label("to")).to_have_value(re.compile("^2026-01-02T04:00"))
    expect(browser.locator(".plots")).to_have_text("Nothing in this period.")


@pytest.mark.usefixtures("seeded")
def test_dragging_across_a_chart_looks_closer_and_a_double_click_from_further_away(
    open_tab: OpenTab,
) -> None:
    browser = open_tab("/device?id=device-1&range=24h").page
    expect(browser.locator("figcaption")).to_have_text("2 readings")
    box = browser.locator(".u-over").bounding_box()
    assert box
    middle = box["y"] + box["height"] / 2
    now = datetime.now(UTC)
    browser.mouse.move(box["x"] + box["width"] / 4, middle)
    browser.mouse.down()
    browser.mouse.move(box["x"] + box["width"] / 2, middle, steps=4)
    browser.mouse.move(box["x"] + box["width"] * 3 / 4, middle, steps=4)
    browser.mouse.up()
    expect(browser.locator("[data-range][aria-current]")).to_have_count(0)
    since, until = shown_period(browser)
    tolerance = timedelta(minutes=15)
    assert abs(since - (now - timedelta(hours=18))) < tolerance
    assert abs(until - (now - timedelta(hours=6))) < tolerance
    expect(browser.locator("figure")).to_have_attribute("aria-label", "1 reading")
    browser.mouse.dblclick(box["x"] + box["width"] / 2, middle)
    browser.wait_for_function(f"!location.search.includes({since.isoformat()[:13]!r})")
    wider = shown_period(browser)
    assert wider[1] - wider[0] == 2 * (until - since)
    browser.go_back()
    wait_until(lambda: shown_period(browser) == (since, until), "the period before")


@pytest.mark.parametrize("by", ["buttons", "keys"])
@pytest.mark.usefixtures("seeded")
def test_a_period_is_moved_by_buttons_and_keys(open_tab: OpenTab, by: str) -> None:
    browser = open_tab("/device?id=device-1&range=24h").page
    expect(browser.locator("figcaption")).to_have_text("2 readings")
    keys = {"earlier": "ArrowLeft", "later": "ArrowRight", "in": "+", "out": "-"}

    def move(how: str) -> None:
        if by == "buttons":
            browser.locator(f'[data-move="{how}"]').click()
        else:
            browser.keyboard.press(keys[how])

    now = datetime.now(UTC)
    close = timedelta(seconds=30)
    half = timedelta(hours=12)
    move("earlier")
    since, until = shown_period(browser)
    assert abs(since - (now - 3 * half)) < close
    assert until - since == 2 * half
    expect(browser.locator("figcaption").first).to_contain_text("1 reading")
    move("earlier")
    assert shown_period(browser) == (since - half, until - half)
    move("later")
    assert shown_period(browser) == (since, until)
    move("in")
    assert shown_period(browser) == (since + half / 2, until - half / 2)
    move("out")
    wider = shown_period(browser)
    assert wider[1] - wider[0] == 2 * half
    # Back at the end, the period follows the time again.
    for _ in range(3):
        if "from=" in browser.url:
            move("later")
    expect(browser.locator("[data-range][aria-current]")).to_have_text("24 h")
    expect(browser.locator("figcaption")).to_have_text("2 readings")


@pytest.mark.usefixtures("seeded")
def test_no_key_leads_to_a_period_that_cannot_be(open_tab: OpenTab) -> None:
    browser = open_tab("/device?id=device-1&range=24h").page
    for key, times, length in (
        ("-", 16, timedelta(days=20 * 365)),
        ("+", 32, timedelta(seconds=10)),
    ):
        for _ in range(times):
            browser.keyboard.press(key)
        since, until = shown_period(browser)
        assert until - since == length
        expect(browser.locator("section.chart .plots")).not_to_have_text("loading")
    browser.keyboard.press("-")
    for _ in range(3):
        browser.keyboard.press("ArrowLeft")
    expect(browser.locator(".plots")).to_have_text("Nothing in this period.")


@pytest.mark.usefixtures("seeded")
def test_charts_follow_the_viewers_scheme(open_tab: OpenTab) -> None:
    browser = open_tab("/device?id=device-2&range=1h", color_scheme="light").page
    expect(browser.locator("figcaption")).to_have_text("2 readings")
    light = variable(browser, "--series-0")
    assert light in colors(browser)
    browser.emulate_media(color_scheme="dark")
    dark = variable(browser, "--series-0")
    wait_until(lambda: dark in colors(browser), "the chart in dark colours")
    assert light not in colors(browser)


@pytest.mark.usefixtures("seeded")
def test_keys_that_are_typed_into_a_field_move_nothing(open_tab: OpenTab) -> None:
    browser = open_tab("/device?id=device-1").page
    browser.get_by_label("beside").press_sequentially("a-b+")
    browser.get_by_label("beside").press("ArrowLeft")
    assert "from=" not in browser.url


def test_two_devices_are_compared_and_one_is_taken_away_again(
    page: Page, seeded: Database, open_tab: OpenTab
) -> None:
    del seeded
    browser = open_tab("/device?id=device-1&range=1h").page
    beside = browser.get_by_label("beside")
    options = browser.locator("#others option")
    expect(options).to_have_count(0)  # asked for when they are of use
    beside.focus()
    expect(options).not_to_have_count(0)
    names = [option.get_attribute("value") for option in options.all()]
    assert "device-2" in names
    assert "device-1" not in names
    beside.fill("device-2")
    browser.get_by_role("button", name="Compare").click()
    expect(browser.locator("h1 .chosen")).to_have_count(2)
    expect(browser.locator("figcaption")).to_have_text("3 readings")
    assert parse_qs(urlsplit(browser.url).query)["id"] == ["device-1", "device-2"]
    assert "range=1h" in browser.url
    expect(browser.locator(".last li")).to_have_text(["device-1 20 C", "device-2 26 C"])
    assert {variable(browser, f"--series-{number}") for number in (0, 1)} <= set(colors(browser))
    browser.locator(".u-over").hover()
    expect(browser.locator("figcaption")).to_contain_text("device-1 20 C")
    expect(browser.locator("figcaption")).to_contain_text("device-2 ")
    browser.get_by_role("link", name="without device-1").click()
    expect(browser.locator("figcaption")).to_have_text("2 readings")
    expect(browser.locator("h1")).to_have_text("device-2")
    assert "range=1h" in browser.url
    browser.goto(page.origin + "/device?id=device-2&id=nobody")
    expect(browser.locator("main")).to_contain_text("There is no event of nobody yet.")
    expect(browser.locator("figcaption")).to_have_text("2 readings")


def test_texts_are_drawn_as_states(page: Page, open_tab: OpenTab) -> None:
    rows = readings(
        "door", ["closed", "open", "closed"], 1_200, ago(minutes=1), event_type="contact"
    )
    insert(page.database, rows)
    browser = open_tab("/device?id=door&range=1h").page
    expect(browser.locator("figcaption")).to_have_text("3 states")
    assert {variable(browser, f"--state-{number}") for number in (0, 1)} <= set(colors(browser))
    box = browser.locator(".u-over").bounding_box()
    assert box
    # 41 to 21 minutes ago it was closed; then open.
    for share, text in ((0.45, "closed"), (0.8, "open")):
        browser.mouse.move(box["x"] + box["width"] * share, box["y"] + 10)
        expect(browser.locator("figcaption")).to_contain_text(f"|  {text}")


def test_many_readings_are_a_mean_with_a_band(page: Page, open_tab: OpenTab) -> None:
    values = [20.0, 30.0] * 3_000
    insert(page.database, readings("device-1", values, 14, ago(minutes=1), unit="C"))
    browser = open_tab("/device?id=device-1&range=24h").page
    expect(browser.locator("figcaption")).to_have_text(
        "each point is the mean of 5 min, the band from the least to the greatest"
    )
    browser.locator(".u-over").hover()
    expect(browser.locator("figcaption")).to_contain_text("(20 to 30)")
    # Closer, it is the readings themselves.
    for _ in range(3):
        browser.keyboard.press("+")
    label = re.compile(r"^\d+ readings$")
    expect(browser.locator("figure")).to_have_attribute("aria-label", label)


def test_each_unit_has_a_chart_of_its_own(page: Page, open_tab: OpenTab) -> None:
    insert(page.database, readings("device-1", [20.0, 21.0], 60, ago(minutes=1), unit="C"))
    rows = readings("device-1", [68.0], 60, ago(minutes=1), unit="F")
    insert(page.database, [rows[0] | {"event_id": "f"}])
    browser = open_tab("/device?id=device-1&range=1h").page
    expect(browser.locator("section.chart")).to_have_count(1)
    expect(browser.locator("figcaption")).to_have_text(["2 readings", "1 reading"])


@pytest.mark.usefixtures("seeded")
def test_the_csv_is_downloaded_under_its_name(open_tab: OpenTab) -> None:
    browser = open_tab("/device?id=device-1&range=1h").page
    with browser.expect_download() as download:
        browser.get_by_role("link", name="CSV").click()
    assert download.value.suggested_filename == "chart.csv"
    header, row = download.value.path().read_text().splitlines()
    assert header.startswith("time,device_id,event_type,unit,value")
    assert "Z,device-1,temperature,C,20.0,,," in row
