"""What a device may send is shown as text: never as HTML, and never so that it misleads.

What it does: sends what the ingester takes through it, and inserts the rest, which somebody's own
SQL may have written. A tab fails of itself where a dialog opens or the policy is broken.
"""

import json
from typing import Any

from conftest import OpenTab
from page.text import visible
from playwright.sync_api import Page as BrowserPage
from playwright.sync_api import expect
from support_page import Page, ago, insert

from tests.support.device import event
from tests.support.pipeline import Pipeline

HOSTILE = (
    "<script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "'><img src=x onerror=alert(1)>",
    "</textarea></title></style></script><iframe src=//evil.example>",
    "{{ 7 * 7 }}${7 * 7}%s%(a)s{0}",
    "javascript:alert(1)",
    "\u202egnp.exe\u202c \u2066\u200b\ufeff",
    "\\x3cscript\\x3e &lt;b&gt; &amp;",
    "../../etc?id=x&type=y#z%00%2F+ ;",
    "x" * 200,
    "__proto__",
    "constructor",
    "  two  spaces ",
)
# What they would leave behind, if one of them were HTML.
MADE = "svg[onload], img, iframe, script:not([src]), main script, textarea, b"


def expect_text(browser: BrowserPage, selector: str, wanted: list[str]) -> None:
    """The elements hold these texts to the character."""
    found = browser.locator(selector)
    expect(found).to_have_count(len(wanted))
    assert sorted(found.evaluate_all("all => all.map((one) => one.textContent)")) == sorted(wanted)
    assert browser.locator(MADE).count() == 0


def test_what_the_ingester_takes_is_text(live: Pipeline, open_tab: OpenTab) -> None:
    """Types, units and values are free; a device's id is letters, digits and `_.:-`."""
    with live.device("a.b:c_d-e") as device:
        for number, text in enumerate(HOSTILE):
            # Controls are refused, and so is a type of more than 100 characters.
            name = {"event_type": text[:100], "value": text, "unit": text[:50]}
            answer = device.ask(event(number, "a.b:c_d-e", **name))
            assert answer["status"] == "stored", answer
    wanted_types = [visible(text[:100]) for text in HOSTILE]
    browser = open_tab().page
    expect_text(browser, ".readings .type bdi", wanted_types)
    expect_text(browser, ".readings .value bdi:first-child", [visible(text) for text in HOSTILE])
    expect_text(browser, ".readings .unit", [visible(text[:50]) for text in HOSTILE])

    browser.get_by_role("link", name="a.b:c_d-e").click()
    expect_text(browser, "section.chart h2 bdi", wanted_types)
    expect_text(browser, ".last .value", [visible(text) for text in HOSTILE])
    # Each has its chart, by its very name.
    for place in range(len(HOSTILE)):
        chart = browser.locator("section.chart").nth(place)
        chart.scroll_into_view_if_needed()
        expect(chart.locator("figcaption")).to_have_text("1 state")
    assert browser.locator(MADE).count() == 0


def test_what_stands_in_the_table_by_other_means_is_text(page: Page, open_tab: OpenTab) -> None:
    devices = [*HOSTILE, "line\nfeed\ttab\x1b[31m\x07", "d" * 1_000]
    for place, device in enumerate(devices):
        values: list[dict[str, Any]] = [{"value_num": 1.5}, {"value_text": device}]
        named = {"device_id": device, "event_type": device, "unit": device}
        insert(
            page.database,
            [
                {"event_id": f"{place}-{number}", "ts_server": ago(minutes=1)} | named | value
                for number, value in enumerate(values)
            ],
        )
    tab = open_tab()
    browser = tab.page
    expect_text(browser, "tbody th bdi", [visible(device) for device in devices])
    expect(browser.locator(".sparkline svg")).to_have_count(0)
    for device in (*HOSTILE[:2], *HOSTILE[6:9], *devices[-2:]):
        link = browser.locator("tbody th a", has_text=visible(device).strip()[:60]).first
        address = str(link.get_attribute("href"))
        tab.goto(address)
        expect_text(browser, "h1 bdi", [visible(device)])
        # A plot for the number and one for the text.
        expect(browser.locator("section.chart figcaption")).to_have_text(["1 reading", "1 state"])
        tab.goto("/")


def test_names_that_each_object_of_a_script_has(page: Page, open_tab: OpenTab) -> None:
    """Of these, all but one have nothing in the last day to draw."""
    old, now = {"ts_server": ago(days=3)}, {"ts_server": ago(minutes=1)}
    insert(
        page.database,
        [
            {"event_id": f"{device} {name}", "device_id": device, "event_type": name,
             "value_num": 1.5} | (now if name == "temperature" else old)
            for device in ("__proto__", "constructor", "z-last")
            for name in ("__proto__", "constructor", "toString", "temperature")
        ],
    )  # fmt: skip
    browser = open_tab().page
    expect(browser.locator('[data-device="z-last"] .sparkline svg')).to_have_count(1)
    expect(browser.locator(".sparkline svg")).to_have_count(3)


def test_dead_letters_are_text(page: Page, open_tab: OpenTab) -> None:
    for number, text in enumerate(HOSTILE):
        page.database.query(
            "INSERT INTO dead_letters (received_at, last_received_at, reason, error, topic,"
            " device_id, event_id, payload) VALUES (now(), now() - %s * INTERVAL '1 s',"
            " %s, %s, %s, %s, %s, %s)",
            number, text, text, text, text, text, text.encode() + b"\x00\xff\r\n<b>",
        )  # fmt: skip
    tab = open_tab("/deadletters")
    shown = [visible(text) for text in HOSTILE]
    expect_text(tab.page, "tbody th bdi", shown)
    expect_text(tab.page, ".payload", [f"{text}\\x00\\xff\\x0d\\x0a<b>" for text in shown])
    expect_text(tab.page, ".letter > p", shown)
    for address in tab.page.locator("tbody td a").evaluate_all("all => all.map(a => a.href)"):
        tab.page.goto(address)
        expect(tab.page.locator("article.letter")).to_have_count(1)


def test_an_address_is_text(page: Page, open_tab: OpenTab) -> None:
    insert(page.database, [{"value_num": 1.0}])
    tab = open_tab()
    for text in (*HOSTILE[:5], *HOSTILE[6:9]):
        query = {"q": text}
        tab.page.goto(page.origin + "/?" + tab.page.evaluate(
            "query => String(new URLSearchParams(query))", query
        ))  # fmt: skip
        expect(tab.page.locator("#search")).to_have_value(text.strip())
        expect_text(tab.page, "#count", ["None of 1"])


def test_no_view_shows_a_line_break_of_a_device_as_one(page: Page) -> None:
    insert(page.database, [{"device_id": "a\u2028b", "event_type": "t\r\n", "value_num": 1.0}])
    answer = page.get("/chart.json", {"id": "a\u2028b", "type": "t\r\n"})
    assert json.loads(answer.text)["plots"][0]["lines"][0]["device"] == "a\\u2028b"
