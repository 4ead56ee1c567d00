"""The database away, frozen, restarted or slow: the page says so, and comes back by itself.

The only times asserted are the deadlines that page/database.py promises, with room.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import OpenTab, new_page
from page.database import ANSWER_SECONDS, CONNECT_SECONDS, FREE_SECONDS
from playwright.sync_api import expect
from support_page import PASSWORD, Page, Tab, ago, insert, readings

from tests.support.pipeline import Database, wait_until
from tools.stack import Postgres, Stack

# What the browser itself logs when an answer is 503 or 504.
UNAVAILABLE = "Failed to load resource: the server responded with a status of 50"
AGAIN = "Trying again; what is below may be old."
# A refresh's pause, which is longer on a machine with other work, and the deadline.
NOTICED_MS = 100_000

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def page(servers_with_reader: Stack) -> Iterator[Page]:
    """A page of the test's own, over a database that it may change."""
    with new_page(servers_with_reader) as page:
        yield page


@pytest.fixture
def postgres(servers: Stack) -> Iterator[Postgres]:
    """The server, which a test may stop and freeze: this process runs one test at a time."""
    yield servers.postgres
    servers.postgres.resume()
    if not servers.postgres.running:
        servers.postgres.start()
    servers.postgres.wait_ready()


def open_expecting(open_tab: OpenTab, path: str = "/") -> Tab:
    tab = open_tab(path)
    tab.expected.append(UNAVAILABLE)
    return tab


def seed(database: Database, value: float, event_id: str) -> None:
    rows = readings("device-1", [value], 60, ago(seconds=1), unit="C")
    insert(database, [rows[0] | {"event_id": event_id}])


def test_stopped_and_started_again(page: Page, postgres: Postgres, open_tab: OpenTab) -> None:
    seed(page.database, 20, "before")
    tabs = {
        path: open_expecting(open_tab, path) for path in ("/", "/device?id=device-1", "/health")
    }
    expect(tabs["/device?id=device-1"].page.locator("figcaption")).to_have_text("1 reading")
    for tab in tabs.values():
        tab.page.evaluate("window.isSame = true")
    postgres.stop()
    for tab in tabs.values():
        trouble = tab.page.locator("#trouble")
        expect(trouble).to_contain_text("The database cannot be reached", timeout=NOTICED_MS)
        expect(trouble).to_contain_text(AGAIN)
    # What was there is still there, as far as it is not asked for anew.
    expect(tabs["/"].page.locator(".readings .value")).to_have_text("20 C")
    # And a first look says so, too, and comes back too.
    late = open_expecting(open_tab, "/device?id=device-1")
    expect(late.page.locator("h1")).to_have_text("Not available now")
    assert page.get("/").status == 503
    assert page.get("/rate.json").status == 503
    assert page.get("/alive").status == 200

    postgres.start()
    postgres.wait_ready()
    seed(page.database, 21, "after")
    expect(tabs["/"].page.locator(".readings .value")).to_have_text("21 C", timeout=NOTICED_MS)
    charts = tabs["/device?id=device-1"].page
    expect(charts.locator("figcaption")).to_have_text("2 readings", timeout=NOTICED_MS)
    expect(tabs["/health"].page.locator("#rate")).to_contain_text("in all", timeout=NOTICED_MS)
    for tab in tabs.values():
        expect(tab.page.locator("#trouble")).to_be_hidden(timeout=NOTICED_MS)
        assert tab.page.evaluate("window.isSame"), "it was loaded again"
    expect(late.page.locator("figcaption")).to_have_text("2 readings", timeout=NOTICED_MS)


def test_frozen_it_is_given_up_in_time_and_used_again(
    page: Page, postgres: Postgres, open_tab: OpenTab
) -> None:
    seed(page.database, 20, "before")
    tab = open_expecting(open_tab)
    expect(tab.page.locator(".readings .value")).to_have_text("20 C")
    postgres.pause()
    started = time.monotonic()
    answer = page.get("/")
    assert answer.status == 503
    assert "does not answer" in answer.text
    assert time.monotonic() - started < ANSWER_SECONDS + CONNECT_SECONDS + FREE_SECONDS + 10
    # Meanwhile what needs no database is answered, and others are told at once or in time.
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(page.get, "/rate.json") for _ in range(6)]
        alive = page.get("/alive")
        assert alive.status == 200
        assert not all(answer.done() for answer in asked) or page.get("/alive").status == 200
        assert {answer.result().status for answer in asked} == {503}
    expect(tab.page.locator("#trouble")).to_contain_text("does not answer", timeout=NOTICED_MS)
    postgres.resume()
    seed(page.database, 21, "after")
    expect(tab.page.locator(".readings .value")).to_have_text("21 C", timeout=NOTICED_MS)
    expect(tab.page.locator("#trouble")).to_be_hidden(timeout=NOTICED_MS)


def test_sessions_that_the_server_ends_are_not_noticed(page: Page) -> None:
    seed(page.database, 20, "before")
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            asked = [*pool.map(page.get, ["/", "/health", "/rate.json", "/missing.json"] * 4)]
        assert {answer.status for answer in asked} == {200}
        ended = page.database.query(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name = 'web'"
        )
        assert ended[0][0] > 0
        wait_until(
            lambda: page.database.query(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'web'"
            ) == [(0,)],
            "the sessions to end",
        )  # fmt: skip
        assert page.get("/").status == 200


def test_what_takes_too_long_costs_its_own_panel_alone(page: Page, open_tab: OpenTab) -> None:
    insert(page.database, readings("device-1", [20.0], 60, ago(minutes=3)))
    # A view of somebody's own that never ends, in the place of ours.
    page.database.query("ALTER VIEW ingest_latency RENAME TO ingest_latency_as_it_was")
    page.database.query(
        "CREATE VIEW ingest_latency AS SELECT as_it_was.* FROM pg_sleep(100)"
        " LEFT JOIN ingest_latency_as_it_was AS as_it_was ON TRUE"
    )
    page.database.query("GRANT SELECT ON ingest_latency TO reader")
    tab = open_expecting(open_tab, "/health")
    expect(tab.page.locator("#rate")).to_contain_text("1 in all")
    expect(tab.page.locator("#latency")).to_have_text("loading")
    # While that one hangs the others answer.
    for path in ("/", "/device?id=device-1", "/deadletters", "/missing.json"):
        assert page.get(path).status == 200
    latency = tab.page.locator("#latency .warning")
    expect(latency).to_contain_text("longer than 10 s", timeout=NOTICED_MS)
    expect(tab.page.locator("#trouble")).to_be_hidden()
    expect(tab.page.locator("#newest time")).to_be_visible()


def test_a_table_that_is_locked_hangs_no_more_than_its_own(page: Page) -> None:
    connection = page.database.connect()
    try:
        with connection.cursor() as cursor:
            cursor.execute("LOCK TABLE dead_letters")
        with ThreadPoolExecutor(4) as pool:
            hanging = pool.submit(page.get, "/deadletters")
            page.database.wait_blocked()
            assert page.get("/").status == 200
            assert page.get("/alive").status == 200
            connection.rollback()
            assert hanging.result().status == 200
    finally:
        connection.close()


def test_without_a_right_or_a_password_the_page_says_so(page: Page) -> None:
    postgres = page.database.postgres
    page.database.query("REVOKE SELECT ON dead_letters FROM reader")
    answer = page.get("/deadletters")
    assert answer.status == 503
    assert "permission denied for table dead_letters" in answer.text
    assert page.get("/").status == 200
    try:
        postgres.apply_schema(page.database.name)  # without READER_PASSWORD: no login
        answer = page.get("/")
        assert answer.status == 503
        assert "The database cannot be reached: " in answer.text
    finally:
        postgres.apply_schema(page.database.name, reader_password=PASSWORD)
    wait_until(lambda: page.get("/").status == 200, "the page to come back")
