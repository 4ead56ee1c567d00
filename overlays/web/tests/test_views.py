"""The views in a browser: the list of devices, dead letters and health.

Each test's tab may log no error, break no policy and ask no other host (conftest.py). The charts
are in test_charts.py, outages in test_database_away.py, hostile strings in test_hostile.py.
"""

import re
import shlex
import subprocess
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from conftest import OpenTab
from playwright.sync_api import expect
from support_page import Page, Tab, ago, insert, readings

from tests.support.device import event
from tests.support.pipeline import Pipeline
from tools.process import search_path

VIEWS = ("/", "/device?id=device-1&id=device-2", "/deadletters", "/health")


# --- the first event -----------------------------------------------------------------


def test_the_first_event_goes_by_the_command_shown_and_is_drawn_without_a_reload(
    live: Pipeline, tab: Tab
) -> None:
    page = tab.page
    expect(page.locator(".empty")).to_contain_text("There are no events yet")
    page.evaluate("window.isSame = true")
    command = shlex.split(page.locator(".empty code").first.inner_text())
    assert command[:5] == ["docker", "compose", "exec", "mosquitto", "mosquitto_pub"]
    client = [*command[4:], "-h", "127.0.0.1", "-p", str(live.mosquitto.port)]
    subprocess.run(client, env={"PATH": search_path()}, check=True, timeout=15)
    row = page.locator('tr[data-device="test-device"]')
    expect(row).to_contain_text("temperature")
    expect(row.locator(".value")).to_have_text("21.5 C")
    expect(row.locator("svg path")).to_have_count(1)
    assert page.evaluate("window.isSame"), "it was loaded again"

    row.get_by_role("link", name="test-device").click()
    chart = page.locator("section.chart")
    expect(chart.locator("figcaption")).to_have_text("1 reading")
    page.evaluate("window.isSame = true")
    with live.device("test-device") as device:
        device.ask(event(2, "test-device", value=22.25, unit="C"))
        # A type that was not there before has its chart too.
        device.ask(event(3, "test-device", event_type="humidity", value=41, unit="%"))
    expect(chart.first).to_have_attribute("data-type", "humidity")
    expect(page.locator('[data-type="temperature"] figcaption')).to_have_text("2 readings")
    expect(page.locator('[data-type="humidity"] figcaption')).to_have_text("1 reading")
    expect(page.locator('[data-type="temperature"] .last')).to_have_text("22.25 C")
    assert page.evaluate("window.isSame"), "it was loaded again"


def test_it_names_the_topic_that_is_set(page: Page, open_tab: OpenTab) -> None:
    page.stop()
    page.environment["MQTT_EVENTS_TOPIC"] = "home/+/up"
    page.start()
    page.wait_ready()
    code = open_tab().page.locator(".empty code").first
    expect(code).to_contain_text("-t home/test-device/up -m")


# --- the list ------------------------------------------------------------------------


def test_250_devices_are_searched_while_typing_and_turned_over(
    page: Page, open_tab: OpenTab
) -> None:
    page.database.query(
        "INSERT INTO events (event_id, device_id, schema, event_type, value_num)"
        " SELECT 'e' || n, 'device-' || lpad(n::text, 3, '0'), 1, 'temperature', n"
        " FROM generate_series(1, 250) AS n"
    )
    tab = open_tab()
    browser = tab.page
    rows = browser.locator("tr[data-device]")
    count = browser.locator("#count")
    expect(count).to_have_text("1 to 100 of 250")
    assert rows.count() == 100
    browser.get_by_role("link", name="Next").click()
    expect(count).to_have_text("101 to 200 of 250")
    browser.get_by_role("link", name="Next").click()
    expect(count).to_have_text("201 to 250 of 250")
    expect(rows.last).to_contain_text("device-250")
    assert browser.get_by_role("link", name="Next").count() == 0
    browser.reload()
    expect(count).to_have_text("201 to 250 of 250")
    browser.get_by_role("link", name="Previous").click()
    expect(count).to_have_text("101 to 200 of 250")

    browser.keyboard.press("/")
    expect(browser.locator("#search")).to_be_focused()
    browser.keyboard.type("ICE-24")
    expect(count).to_have_text("1 to 10 of 10")
    expect(browser.locator("#search")).to_be_focused()
    assert browser.url.endswith("/?q=ICE-24")
    browser.keyboard.type("7")
    expect(rows).to_have_count(1)
    browser.reload()
    expect(rows).to_have_count(1)
    expect(browser.locator("#search")).to_have_value("ICE-247")
    browser.locator("#search").fill("nobody")
    expect(count).to_have_text("None of 250")
    browser.locator("#search").fill("")
    expect(count).to_have_text("1 to 100 of 250")


def test_a_silent_device_has_a_warning_and_can_be_listed_alone(
    page: Page, open_tab: OpenTab
) -> None:
    insert(page.database, readings("silent", [20.0] * 20, 60, ago(hours=2)))
    insert(page.database, readings("talks", [20.0] * 20, 60, ago(seconds=5)))
    insert(page.database, readings("later", [20.0], 60, ago(seconds=1)))
    browser = open_tab().page
    silent = browser.locator('tr[data-device="silent"]')
    expect(silent.locator(".warning")).to_have_text("silent; usually every 60 s")
    expect(silent.locator("time")).to_contain_text("2 h ago")
    assert browser.locator(".warning:visible").count() == 1
    browser.get_by_role("link", name="last heard").click()
    expect(browser.locator("tr[data-device] th")).to_have_text(["later", "talks", "silent"])
    browser.get_by_role("link", name="1 silent").click()
    expect(browser.locator("tr[data-device] th")).to_have_text(["silent"])
    browser.goto(page.origin + "/device?id=silent")
    expect(browser.locator(".summary .warning")).to_have_text("silent")
    browser.goto(page.origin + "/health")
    expect(browser.locator("ul.columns")).to_contain_text("silent")


def test_values_are_written_as_they_were_measured(page: Page, open_tab: OpenTab) -> None:
    values = {
        "a": (21.399999618530273, "°C", "21.4 °C"),
        "b": (123456789, None, "123456789"),
        "c": ("open", None, "open"),
        "d": (None, None, "empty"),
    }
    insert(
        page.database,
        [
            {
                "event_type": name,
                "unit": unit,
                "value_num": None if isinstance(value, str) else value,
                "value_text": value if isinstance(value, str) else None,
            }
            for name, (value, unit, _) in values.items()
        ],
    )
    shown = open_tab().page.locator(".readings .value")
    expect(shown).to_have_text([written for *_, written in values.values()])


# --- dead letters and health ---------------------------------------------------------


def test_dead_letters_are_shown_and_chosen_by_device_and_reason(
    live: Pipeline, open_tab: OpenTab
) -> None:
    browser = open_tab("/deadletters").page
    expect(browser.locator("main")).to_contain_text("There are none.")
    with live.device("cellar") as cellar, live.device("attic") as attic:
        cellar.ask({"schema": 1, "event_id": "cellar-1", "device_id": "cellar", "value": 1})
        cellar.ask({"schema": 1, "event_id": "cellar-1", "device_id": "cellar", "value": 1})
        attic.ask(event(1, "attic", value=[1]))
        attic.publish(b'{"event_id": "attic-2", \x00\xff\xe2\x80\xae')
        attic.wait(lambda: len(attic.acks) >= 4, "an ACK for each")
    letters = browser.locator("article.letter")
    expect(letters).to_have_count(3)
    groups = browser.locator("tbody tr")
    expect(groups).to_have_count(3)
    expect(groups.filter(has_text="missing_field")).to_contain_text("2")
    payload = letters.filter(has_text="not_utf8").locator(".payload")
    expect(payload).to_have_text('{"event_id": "attic-2", \\x00\\xff\\u202e')

    browser.get_by_role("link", name="attic").first.click()
    expect(letters).to_have_count(2)
    browser.get_by_role("link", name="invalid_field").click()
    expect(letters).to_have_count(1)
    expect(letters).to_contain_text("value: expected a number or a string, got an array")
    expect(browser.locator("main")).to_contain_text("Only of attic with invalid_field")
    browser.reload()
    expect(letters).to_have_count(1)
    browser.get_by_role("link", name="All of them").click()
    expect(letters).to_have_count(3)


def test_health_of_an_empty_database(open_tab: OpenTab) -> None:
    browser = open_tab("/health").page
    expect(browser.locator("#newest")).to_have_text("There are no rows yet.")
    expect(browser.locator("#rate")).to_contain_text("0 in all")
    expect(browser.locator("#latency")).to_contain_text("No event of the last 24 hours")
    expect(browser.locator("#missing")).to_contain_text("None: no device")


def test_health_shows_rate_latency_and_what_is_missing(page: Page, open_tab: OpenTab) -> None:
    rows = readings("device-1", [20.0] * 90, 60, ago(minutes=2), unit="C")
    for number, row in enumerate(rows, 1):
        row["event_id"] = f"device-1-0123abcd-1-{number}"
        row["ts_device"] = row["ts_server"] - timedelta(milliseconds=250 if number % 2 else 750)
    del rows[40:43]
    insert(page.database, rows)
    browser = open_tab("/health").page
    expect(browser.locator("#newest time")).to_contain_text("2 min ago")
    expect(browser.locator("#rate")).to_contain_text("87 in all, at most 1 in a minute")
    expect(browser.locator("#rate canvas")).to_have_count(1)
    expect(browser.locator("#latency tbody tr").first).to_contain_text("0.500 s")
    expect(browser.locator("#missing")).to_contain_text("3 missing in 1 gap")
    expect(browser.locator("#missing tbody td")).to_have_text(["device-1", "1", "41", "43"])


# --- whoever looks -------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Kolkata"])
def test_times_are_in_the_viewers_zone(page: Page, open_tab: OpenTab, zone: str) -> None:
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(days=2)
    insert(page.database, readings("device-1", [20.0], 60, at))
    browser = open_tab(timezone_id=zone).page
    local = at.astimezone(ZoneInfo(zone))
    expect(browser.locator("td.heard time")).to_have_text(f"2 days ago, {local:%Y-%m-%d %H:%M}")
    browser.goto(page.origin + "/device?id=device-1&range=7d")
    expect(browser.locator("figcaption")).to_have_text("1 reading")
    browser.locator(".u-over").hover()
    expect(browser.locator("figcaption")).to_contain_text(f"{local:%Y-%m-%d %H:%M}")
    shown = browser.locator('input[name="to"]').input_value()
    now = datetime.now(ZoneInfo(zone)).replace(tzinfo=None)
    assert abs(datetime.fromisoformat(shown) - now) < timedelta(minutes=2)


def brightness(color: str) -> float:
    """Of a colour as CSS writes it, from 0 to 1."""
    return sum(float(part) for part in re.findall(r"[\d.]+", color)[:3]) / 3 / 255


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page: Page, open_tab: OpenTab, scheme: str) -> None:
    insert(page.database, readings("device-1", [20.0, 21.0] * 9, 60, ago(minutes=1), unit="C"))
    insert(page.database, readings("device-2", ["open", "shut"], 60, ago(minutes=1)))
    tab = open_tab(color_scheme=scheme)
    for path in VIEWS:
        tab.goto(path)
        for element in ("body", "input", "section.chart"):
            if not (found := tab.page.locator(f"{element}:visible").first).count():
                continue
            back, text = found.evaluate(
                "element => {"
                " const { backgroundColor, color } = getComputedStyle(element);"
                " return [backgroundColor, color]; }"
            )
            if scheme == "dark":
                assert brightness(back) < 0.2 < 0.8 < brightness(text), (path, element)
            else:
                assert brightness(text) < 0.2 < 0.9 < brightness(back), (path, element)


def test_nothing_is_wider_than_a_phone(page: Page, open_tab: OpenTab) -> None:
    long = "x" * 64
    insert(page.database, readings("device-1", [20.0, 21.0] * 9, 60, ago(minutes=1), unit="C"))
    insert(page.database, readings("device-2", ["open" * 100, long], 60, ago(minutes=1)))
    insert(
        page.database,
        readings(long, [1e300, -1e-300], 60, ago(hours=1), event_type=long, unit="u" * 50),
    )
    missing = {"event_id": f"{long}-0123abcd-1-9", "device_id": long}
    insert(page.database, [missing | {"ts_device": ago(seconds=20), "value_text": "x" * 300}])
    page.database.query(
        "INSERT INTO dead_letters (received_at, last_received_at, reason, error, topic, device_id,"
        " payload) VALUES (now(), now(), 'not_json', repeat('e', 300), repeat('t', 300), %s, %s)",
        long,
        b"{" * 2_500,
    )
    tab = open_tab(viewport={"width": 390, "height": 800}, is_mobile=True, has_touch=True)
    for path in (*VIEWS, f"/device?id={long}", f"/device?id={long}&id=device-1"):
        tab.goto(path)
        tab.page.wait_for_load_state("networkidle")
        width = tab.page.evaluate("document.scrollingElement.scrollWidth")
        assert width <= 390, f"{path}: {width} px"


def test_a_refresh_moves_nothing(page: Page, open_tab: OpenTab) -> None:
    for number in range(60):
        insert(page.database, readings(f"device-{number:02}", [20.0], 60, ago(minutes=1)))
    browser = open_tab().page
    link = browser.get_by_role("link", name="device-30")
    link.scroll_into_view_if_needed()
    link.focus()
    browser.evaluate(
        "getSelection().selectAllChildren(document.querySelector('[data-device=device-31] th'))"
    )
    before = browser.evaluate("scrollY")
    assert before > 100
    # Above it one comes, and one changes.
    insert(page.database, readings("device-29", [25.0], 60, ago(seconds=1), event_type="other"))
    insert(page.database, readings("device-00", [26.0], 60, ago(seconds=1), event_id="later"))
    expect(browser.locator('[data-device="device-00"] .value')).to_have_text("26")
    expect(browser.locator('[data-device="device-29"] .value')).to_have_text(["25", "20"])
    expect(link).to_be_focused()
    assert browser.evaluate("String(getSelection())").strip() == "device-31"
    place = link.bounding_box()
    assert place
    assert 0 < place["y"] < 800
    assert abs(browser.evaluate("scrollY") - before) < 60  # as far as a row has grown


def test_what_is_typed_stays_while_charts_come(page: Page, open_tab: OpenTab) -> None:
    insert(page.database, readings("device-1", [20.0], 60, ago(minutes=1)))
    insert(page.database, readings("device-2", [20.0], 60, ago(minutes=1)))
    browser = open_tab("/device?id=device-1").page
    other = browser.get_by_label("beside")
    other.fill("devi")
    insert(page.database, readings("device-1", [20.0] * 2, 60, ago(seconds=1), event_type="new"))
    expect(browser.locator('[data-type="new"]')).to_be_visible()
    expect(other).to_have_value("devi")
    expect(other).to_be_focused()
