"""The page as its viewers have it: a real process of it, before a real browser.

What it does: one browser and one page for the whole run, over a database that is empty when a test
begins, and a tab that notes everything which no test may cause. What it does not: replace a server
by a mock; broker, database and ingester are those of the checkout's own tests.

Invariant: a test whose tab logged an error, broke the policy or asked another host fails.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Playwright, expect, sync_playwright
from support_page import PASSWORD, Page, Tab

from tests.support.pipeline import Database, Pipeline, new_database
from tools.stack import Stack

# Servers, a database and an ingester for each test.
pytest_plugins = ["tests.conftest"]

# A view asks again after 5 s, and later where answers take long, as on a busy machine.
expect.set_options(timeout=45_000)

OpenTab = Callable[..., Tab]


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    """The library that drives the browser."""
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="session")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """Debian's Chromium."""
    # Without its sandbox, which needs rights that root in a container has not.
    browser = playwright.chromium.launch(
        executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-dev-shm-usage"]
    )
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def servers_with_reader(servers: Stack) -> Stack:
    """The servers, where `reader` can log in, into each database."""
    servers.postgres.apply_schema(reader_password=PASSWORD)
    return servers


@contextlib.contextmanager
def new_page(servers: Stack) -> Iterator[Page]:
    """A page over a new database, ready."""
    with new_database(servers) as database, contextlib.ExitStack() as cleanup:
        page = Page(servers.folder, database)
        cleanup.callback(page.stop)
        page.start()
        page.wait_ready()
        yield page


@pytest.fixture(scope="session")
def lasting_page(servers_with_reader: Stack) -> Iterator[Page]:
    """The page that all tests have which leave the database as it is."""
    with new_page(servers_with_reader) as page:
        yield page


@pytest.fixture
def page(lasting_page: Page) -> Page:
    """The page, running, over an empty database."""
    assert lasting_page.running, lasting_page.log_tail()
    lasting_page.database.query("TRUNCATE events, dead_letters RESTART IDENTITY")
    return lasting_page


@pytest.fixture
def database(page: Page) -> Database:
    """That of the page."""
    return page.database


@pytest.fixture
def live(page: Page, running: Pipeline) -> Pipeline:
    """A broker and an ingester that store into the page's database."""
    assert running.database is page.database
    return running


@pytest.fixture
def open_tab(browser: Browser, page: Page) -> Iterator[OpenTab]:
    """Open tabs with whatever Browser.new_context takes; none of them may have complained."""
    tabs: list[Tab] = []

    def open_one(path: str = "/", **options: object) -> Tab:
        tabs.append(tab := Tab(browser, page.origin, **options))
        tab.goto(path)
        return tab

    yield open_one
    complaints = [complaint for tab in tabs for complaint in tab.close()]
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def tab(open_tab: OpenTab) -> Tab:
    """A tab of a computer's size that shows the list of devices."""
    return open_tab()
