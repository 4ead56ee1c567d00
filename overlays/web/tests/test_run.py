"""overlays/web/run: the page without Docker, beside what tools/stack starts."""

import os
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from support_page import PASSWORD, WEB, insert

from tests.support.pipeline import Database, wait_until
from tests.support.terminal import CTRL_C, Terminal
from tools.process import clean_environment, free_port


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what `run` needs, with the packages that are installed already."""
    folder = tmp_path / "checkout"
    shutil.copytree(
        WEB, folder / "overlays/web", ignore=shutil.ignore_patterns(".venv", "__pycache__")
    )
    (folder / "overlays/web/.venv").symlink_to(WEB / ".venv")
    shutil.copy2(WEB.parent.parent / ".env", folder / ".env")
    return folder


def variables(database: Database, port: int, **more: str) -> dict[str, str]:
    """What stands in the shell, and wins over .env."""
    return clean_environment() | {
        "POSTGRES_PORT": str(database.conninfo["port"]),
        "POSTGRES_DB": database.name,
        "WEB_PORT": str(port),
        **more,
    }


def test_without_a_password_it_says_which_setting_is_missing(checkout: Path) -> None:
    done = subprocess.run(
        [checkout / "overlays/web/run"],
        env=clean_environment(),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("overlays/web/run: set READER_PASSWORD in .env")
    assert done.stdout == ""


@pytest.mark.usefixtures("servers_with_reader")
@pytest.mark.parametrize("given", ["in the shell", "in .env"])
def test_it_shows_what_is_stored_and_ends_by_ctrl_c(
    checkout: Path, database: Database, given: str
) -> None:
    insert(database, [{"device_id": "cellar", "value_num": 21.5}])
    shell = {"READER_PASSWORD": PASSWORD}
    if given == "in .env":
        settings = checkout / ".env"
        text = settings.read_text()
        assert "\nREADER_PASSWORD=\n" in text
        settings.write_text(text.replace("\nREADER_PASSWORD=\n", f"\nREADER_PASSWORD={PASSWORD}\n"))
        shell = {}
    port = free_port()
    with Terminal("overlays/web/run", checkout, variables(database, port, **shell)) as terminal:
        terminal.wait_for(f"http://127.0.0.1:{port}")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            assert b'<tr data-key="cellar"' in answer.read()
        terminal.press(CTRL_C)
        assert terminal.wait_end(10) in (0, 130)
    assert "Traceback" not in terminal.output, terminal


@pytest.mark.usefixtures("servers_with_reader")
def test_it_ends_by_sigterm(checkout: Path, database: Database) -> None:
    port = free_port()
    process = subprocess.Popen(
        [checkout / "overlays/web/run"],
        env=variables(database, port, READER_PASSWORD=PASSWORD),
    )
    try:
        wait_until(lambda: port_answers(port), "the page to answer")
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not port_answers(port), "the port to be free")


def port_answers(port: int) -> bool:
    """Whether the page is still there."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/alive", timeout=5).close()
    except OSError:
        return False
    return True
