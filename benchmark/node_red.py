"""Node-RED with a flow that stores events: what the benchmark compares the ingester with.

What it does: installs Node-RED and its PostgreSQL driver beside the flow (node_red/), as the
lock file there has them, and runs it as one process. What it does not: install Node.js, open
a port, or write to the flow's own folder; or keep the ingester's promise: Node-RED PUBACKs
an event when it arrives, so what is not yet stored when it ends is lost.

Invariant: the versions that run are those of the lock file.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tools.process import Process, StackError, clean_environment, search_path

FOLDER = Path(__file__).resolve().parent / "node_red"
MODULES = FOLDER / "node_modules"
# Written last, so that an installation that was cut short is made again.
STAMP = MODULES / ".installed-lock"
INSTALL_SECONDS_MAX = 300.0
# What the flow says of the birth message, which it gets back through its subscription.
READY = "not stored: not an event on qs/v1/node-red/events"


def available() -> bool:
    """Whether Node.js is here, so that Node-RED can be installed and run."""
    return all(shutil.which(program, path=search_path()) for program in ("node", "npm"))


def install() -> None:
    """Install what the lock file names, unless it is installed already."""
    digest = hashlib.sha256((FOLDER / "package-lock.json").read_bytes()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == digest:
        return
    # The user's own environment: it may say where their registry is, or their proxy.
    environment = os.environ | {"PATH": search_path()}
    try:
        subprocess.run(
            ["npm", "ci"],
            cwd=FOLDER,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=INSTALL_SECONDS_MAX,
        )
    except subprocess.TimeoutExpired:
        raise StackError(f"npm ci: not done after {INSTALL_SECONDS_MAX:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise StackError(f"npm ci: exit code {error.returncode}\n{error.stdout}") from None
    STAMP.write_text(digest)


class NodeRed(Process):
    """Node-RED with the flow; what it writes, its log too, is in `folder`."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self.environment = dict(environment)
        self.folder = folder.absolute()
        super().__init__("node-red", self.folder / "node-red.log")

    def start(self) -> None:
        user_folder = self.folder / "user"
        user_folder.mkdir(parents=True, exist_ok=True)
        # A copy: Node-RED writes to the flow's folder, and may write to the flow.
        shutil.copy(FOLDER / "flows.json", user_folder)
        options = ["--userDir", str(user_folder), "--settings", str(FOLDER / "settings.js")]
        command = ["node", str(MODULES / "node-red/red.js"), *options]
        self._spawn(command, clean_environment() | self.environment, user_folder)

    def wait_ready(self, timeout: float = 30.0) -> None:
        self.wait_for_log(READY, timeout)
