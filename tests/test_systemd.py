"""The units of tools/systemd, as systemd itself reads them.

What it does: has systemd-analyze look for mistakes and for what they leave open, and holds them
to what they start. What it does not: run them: that takes a machine that systemd runs.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.process import CHECKOUT, OPEN_FILES
from tools.stack import Ingester, Mosquitto, Postgres

SYSTEM, USER = (
    CHECKOUT / f"tools/systemd/{whose}/homelab-telemetry.service" for whose in ("system", "user")
)
# Of 100, where systemd's own words are: 0 to 50 OK, 51 to 75 medium.
EXPOSURE_MAX = 30


@pytest.fixture(scope="module")
def analyze(tmp_path_factory: pytest.TempPathFactory):
    """Run systemd-analyze; return its exit code and all that it said."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd is not installed (on Debian or Ubuntu: apt-get install systemd)")
    folder = tmp_path_factory.mktemp("run")

    def run(*arguments: str | Path) -> tuple[int, str]:
        environment = os.environ | {"XDG_RUNTIME_DIR": str(folder), "SYSTEMD_PAGER": "cat"}
        done = subprocess.run(
            ["systemd-analyze", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("unit", [SYSTEM, USER], ids=["system", "user"])
def test_systemd_finds_no_mistake(analyze, unit: Path, tmp_path: Path) -> None:
    manager = ["--user"] if unit == USER else ["--system"]
    assert analyze(*manager, "verify", unit) == (0, "")
    wrong = tmp_path / unit.name  # or it would find none in anything
    wrong.write_text(unit.read_text().replace("\nKillMode=", "\nKilMode="))
    assert "KilMode" in analyze(*manager, "verify", wrong)[1]


def test_the_systems_unit_leaves_little_open(analyze) -> None:
    threshold = f"--threshold={EXPOSURE_MAX}"
    code, said = analyze("security", "--offline=true", threshold, SYSTEM)
    assert code == 0, said


def setting(unit: Path, name: str) -> str:
    (value,) = re.findall(rf"(?m)^{name}=(.*)$", unit.read_text())
    return str(value)


def test_the_units_give_the_stack_what_it_needs() -> None:
    seconds = sum(kind.stop_seconds for kind in (Ingester, Postgres, Mosquitto))
    assert int(setting(SYSTEM, "TimeoutStopSec")) > seconds
    assert int(setting(SYSTEM, "LimitNOFILE")) == OPEN_FILES
    for unit in (SYSTEM, USER):
        start = setting(unit, "ExecStart").removeprefix("/usr/bin/env ").split()[0]
        assert os.access(CHECKOUT / start, os.X_OK)
        assert setting(unit, "RestartPreventExitStatus") == "2"
        assert setting(unit, "KillMode") == "mixed"
