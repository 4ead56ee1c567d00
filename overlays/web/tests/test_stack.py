"""The page in its container, with the default stack and with overlays/secure.

What it does: brings each stack up once, as the README does, from a copy of the checkout under
umask 077, and looks at the page in a browser. What it does not: repeat what the page does by
itself (the other tests).

Invariant: with overlays/secure nothing is read that does not come in over this machine.
"""

import json
import os
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect
from support_page import Tab

from tests.support import compose
from tests.support.checkout import files_of
from tests.support.compose import CONTAINERS, Compose
from tests.support.device import event
from tests.support.pipeline import wait_until
from tests.support.secure import OVERLAY, SecureStack, environment_of, missing_rights
from tools.process import CHECKOUT

pytestmark = [pytest.mark.compose, pytest.mark.timeout(300)]

BASE = "docker-compose.yml"
WEB = "overlays/web/docker-compose.yml"
SECURE_WEB = "overlays/web/secure.yml"
ORIGIN = "http://localhost:8080"
PUBLISH = (
    'echo \'{"schema": 1, "event_id": "test-001", "device_id": "test-device", "event_type":'
    ' "temperature", "value": 21.5, "unit": "C"}\' | docker compose exec -T mosquitto'
    " mosquitto_pub -q 1 -t qs/v1/test-device/events -s"
)


def get(origin: str, path: str, host: str | None = None) -> tuple[int, str]:
    """Return the status and the text that the page answers, to another host name if given."""
    request = urllib.request.Request(origin + path, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def status_of(stack: Compose) -> dict[str, str]:
    """What the kernel says of the page's process, which is not the container's first."""
    look = "grep -l '^Name:.python' /proc/[0-9]*/status | head -1 | xargs cat"
    lines = stack.compose("exec", "-T", "web", "sh", "-c", look).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def published(stack: Compose) -> set[tuple[str, str]]:
    """The addresses and ports of this machine that lead to the page."""
    ports = stack.inspect("web")["NetworkSettings"]["Ports"]
    assert set(ports) == {"8080/tcp"}
    return {(binding["HostIp"], binding["HostPort"]) for binding in ports["8080/tcp"]}


@pytest.fixture(scope="module")
def locked() -> Iterator[None]:
    """One stack at a time on this machine."""
    with compose.only_run():
        yield


def run_stack(stack: Compose) -> Iterator[Compose]:
    stack.look_often()
    with compose.cleared(stack):
        stack.up("--build")
        yield stack


# --- with the default stack ----------------------------------------------------------


@pytest.fixture(scope="class")
def stack(locked: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """The default stack with the page."""
    del locked
    yield from run_stack(Compose(compose.copy_checkout(tmp_path_factory.mktemp("web")), BASE, WEB))


class TestWithTheDefaultStack:
    """In this order: the last tests change the stack."""

    def test_two_commands_from_a_clone_to_the_first_chart(
        self, stack: Compose, browser: Browser
    ) -> None:
        services = {*CONTAINERS, "web"}
        assert {stack.health(service) for service in services} == {"healthy"}
        tab = Tab(browser, ORIGIN)
        tab.goto("/")
        expect(tab.page.locator(".empty code").first).to_contain_text("mosquitto_pub")
        stack.run("bash", "-c", PUBLISH)
        expect(tab.page.locator('[data-device="test-device"] .value')).to_have_text("21.5 C")
        tab.goto("/device?id=test-device")
        expect(tab.page.locator("figcaption")).to_have_text("1 reading")
        expect(tab.page.locator("canvas")).to_be_visible()
        tab.goto("/health")
        expect(tab.page.locator("#newest time")).to_be_visible()
        assert not tab.close()

    def test_its_process_has_no_rights_and_little_memory(self, stack: Compose) -> None:
        paths = ("/", "/device?id=test-device", "/deadletters", "/health", "/rate.json",
                 "/latency.json", "/missing.json", "/static/page.js", "/uplot/uPlot.iife.js",
                 "/chart.json?id=test-device&type=temperature&range=1y")  # fmt: skip
        stack.psql(
            "INSERT INTO events (event_id, device_id, schema, event_type, value_num, ts_server)"
            " SELECT 'm' || n, 'device-' || n % 1000, 1, 'type-' || n % 7, n,"
            " now() - n * INTERVAL '10 s' FROM generate_series(1, 50000) AS n"
        )
        for path in (*paths, *paths):
            assert get(ORIGIN, path)[0] == 200, path
        status = status_of(stack)
        assert status["Uid"].split() == status["Gid"].split() == ["10002"] * 4
        assert {status[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Groups"]) in {("1", ""), ("1", "10002")}
        host = stack.inspect("web")["HostConfig"]
        assert host["ReadonlyRootfs"]
        done = stack.run("docker", "compose", "exec", "-T", "web", "touch", "/app/x", expected=1)
        assert "Read-only file system" in done.stderr
        resident = int(status["VmHWM"].split()[0]) * 1024
        print(f"the most that it had resident: {resident / 2**20:.0f} MiB")
        assert resident < host["Memory"] * 3 / 4

    def test_it_survives_the_database_made_anew(self, stack: Compose) -> None:
        stack.compose("restart", "postgres")
        wait_until(lambda: get(ORIGIN, "/")[0] == 200, "the page to come back", 60)

    def test_it_moves_to_another_port_and_ends_when_told(self, stack: Compose) -> None:
        stack.up("web", WEB_PORT="8081")
        assert {port for _, port in published(stack)} == {"8081"}
        assert get("http://localhost:8081", "/")[0] == 200
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("localhost", 8080), timeout=5)
        started = time.monotonic()
        stack.compose("stop", "web")
        assert time.monotonic() - started < 8  # after 10 s it would be killed
        assert stack.inspect("web")["State"]["ExitCode"] == 0

    def test_without_its_folder_the_stack_is_as_before(self, stack: Compose) -> None:
        shutil.rmtree(stack.folder / "overlays/web")
        del stack.environment["COMPOSE_FILE"]
        stack.up("--remove-orphans")
        assert set(stack.compose("ps", "--services").split()) >= set(CONTAINERS)
        assert "web" not in stack.compose("ps", "-a", "--services").split()
        stack.run("bash", "-c", PUBLISH.replace("test-001", "test-002"))
        wait_until(lambda: "test-002" in stack.event_ids("test-device"), "the event to be a row")


def test_nothing_that_runs_knows_of_the_folder() -> None:
    named = [
        name
        for name, path in files_of(CHECKOUT).items()
        # The benchmark leaves the page out where there is none.
        if not name.startswith(("overlays/web/", "tests/", "benchmark/", ".ci/"))
        and path.suffix not in (".md", ".png")
        and b"overlays/web" in path.read_bytes()
    ]
    assert named == []


# --- with overlays/secure ------------------------------------------------------------


@pytest.fixture(scope="class")
def secure(locked: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureStack]:
    """The stack with both overlays, set up as theirs READMEs say."""
    del locked
    if reason := missing_rights():
        pytest.skip(reason)
    stack = SecureStack(compose.copy_checkout(tmp_path_factory.mktemp("secure-web")))
    stack.setup("telemetry.lan")
    stack.add_device("alpha")
    use_files(stack, *OVERLAY, WEB, SECURE_WEB)
    for running in run_stack(stack):
        assert isinstance(running, SecureStack)
        yield running


def use_files(stack: Compose, *files: str) -> None:
    stack.environment["COMPOSE_FILE"] = os.pathsep.join(files)


class TestWithOverlaysSecure:
    """In this order: the last test changes the stack."""

    def test_it_is_shown_on_this_machine_over_tls(
        self, secure: SecureStack, browser: Browser
    ) -> None:
        assert published(secure) == {("127.0.0.1", "8080")}
        with secure.client("alpha") as device:
            assert device.ask(event(1, "alpha", unit="C"))["status"] == "stored"
        tab = Tab(browser, ORIGIN)
        tab.goto("/device?id=alpha")
        expect(tab.page.locator("figcaption")).to_have_text("1 reading")
        assert not tab.close()
        found = secure.psql(
            "SELECT DISTINCT usename, ssl FROM pg_stat_activity JOIN pg_stat_ssl USING (pid)"
            " WHERE application_name = 'web'"
        )
        assert found == "reader|t"

    def test_it_answers_to_no_other_host(self, secure: SecureStack) -> None:
        del secure
        for host in ("localhost", "localhost:8080", "127.0.0.1", "127.0.0.1:8080"):
            assert get(ORIGIN, "/", host)[0] == 200
        for host in ("telemetry.lan", "evil.example:8080"):
            status, text = get(ORIGIN, "/", host)
            assert status == 400
            assert "alpha" not in text

    def test_its_password_is_in_no_environment_and_its_rights_are_gone(
        self, secure: SecureStack
    ) -> None:
        password = secure.secret("database_reader_password")
        assert password not in json.dumps(secure.inspect("web"))
        assert "PGPASSWORD" not in environment_of(secure, "web")
        status = status_of(secure)
        assert status["Uid"].split() == status["Gid"].split() == ["10002"] * 4
        assert {status[name] for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Groups"]) == ("1", "")
        environments = secure.run(
            *("docker", "compose", "exec", "-T", "-u", "10002", "web", "sh", "-c"),
            "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'; exit 0",
        ).stdout
        assert "PGPASSFILE=/tmp/pgpass" in environments
        assert password not in environments
        assert password not in secure.log("web")

    def test_without_its_own_file_it_shows_nothing(self, secure: SecureStack) -> None:
        """Whichever of the overlays comes last, and whatever password .env has."""
        for files, password in (
            ((*OVERLAY, WEB), ""),
            ((*OVERLAY, WEB), "something"),
            ((BASE, WEB, OVERLAY[1]), "something"),
        ):
            use_files(secure, *files)
            secure.up("web", READER_PASSWORD=password)
            for path in ("/", "/device?id=alpha", "/chart.json?id=alpha&type=temperature"):
                status, text = get(ORIGIN, path)
                assert status == 503
                assert re.search(
                    "database cannot be reached: .*(password|pg_hba|no encryption)", text
                )
                assert "21.5" not in text
