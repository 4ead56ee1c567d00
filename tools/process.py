"""One process on this machine, and what it takes to run it: ports, accounts, folders, programs.

What it does: starts a process, reads its log, waits for what is in it, pauses, stops and kills
it with its children. What it does not: know which programs there are (tools/stack.py does), or
install any (tools/bootstrap does). It finds child processes in /proc, so it is for Linux only.

Invariant: a process that was stopped or killed here is gone, and its children with it.
"""

import errno
import functools
import glob
import hashlib
import itertools
import os
import pwd
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
# For the broker. Usual is 1,024, and a connection takes one. Not without a limit: its websockets
# allocate some bytes for each that is allowed, and some systems allow a thousand million.
OPEN_FILES = 16_384
Account = pwd.struct_passwd


class StackError(Exception):
    """A process did not do what it should; the text says what, with the end of its log."""


class SetupError(StackError):
    """Something on this machine is to be changed first; nothing was started."""


# --- the machine ---------------------------------------------------------------------


def port_problem(port: int, host: str = "") -> str:
    """Why no server can listen there, or nothing; without a host: on all addresses, IPv6 too."""
    for family in [socket.AF_INET] if host else [socket.AF_INET, socket.AF_INET6]:
        try:
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is taken"
            if family == socket.AF_INET or error.errno == errno.EACCES:
                return f"cannot be used ({error.strerror})"
            # Else there is no IPv6 here.
    return ""


def port_is_free(port: int, host: str = "") -> bool:
    return not port_problem(port, host)


# From below the range of outgoing connections: in there, a client that keeps trying to reach a
# stopped server sooner or later connects to itself and takes the port away.
PORTS = range(20_000, 32_000)
_port_numbers = itertools.count(random.randrange(len(PORTS)))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and another one at each call."""
    for _ in PORTS:
        port = PORTS[next(_port_numbers) % len(PORTS)]
        if port_is_free(port, LOOPBACK):
            return port
    raise StackError(f"no free port between {PORTS[0]} and {PORTS[-1]}")


def open_files_max() -> int:
    """How many files a process may be allowed to open, of OPEN_FILES."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)


@contextmanager
def many_open_files() -> Iterator[None]:
    """Lets what is started in the block open so many; it also holds, if more were allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files_max(), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def search_path(postgres_version: str = "[0-9]*") -> str:
    """PATH, and what Debian keeps off it: mosquitto, and PostgreSQL's server, newest first."""
    folders = glob.glob(f"/usr/lib/postgresql/{postgres_version}/bin")
    folders.sort(key=lambda folder: float(Path(folder).parent.name), reverse=True)
    return ":".join([*folders, os.environ.get("PATH", os.defpath), "/usr/local/sbin:/usr/sbin"])


def require(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name, path=search_path()) is None]
    if missing:
        raise SetupError(
            f"not installed: {', '.join(missing)}. On Debian or Ubuntu tools/bootstrap installs "
            "what is missing (mosquitto mosquitto-clients postgresql pgbouncer); or use Docker"
        )


def clean_environment() -> dict[str, str]:
    """Without what could steer libpq, the ingester or a server from outside."""
    kept = ("HOME", "LANG", "LC_ALL", "TMPDIR", "TZ")
    return {"PATH": search_path()} | {key: os.environ[key] for key in kept if key in os.environ}


def service_account(name: str) -> Account | None:
    """Whom a server runs as, if we are root: PostgreSQL refuses to be root. Else as us."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return pwd.getpwnam("nobody")


def run_as(account: Account | None) -> dict[str, Any]:
    """The arguments of subprocess for it."""
    if account is None:
        return {}
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


def give_access(folder: Path, account: Account | None) -> bool:
    """Lets everybody into `folder`; says whether `account` gets there now."""
    if account is None:
        return True
    folder.chmod(0o755)
    test = ["test", "-x", str(folder)]
    return subprocess.run(test, check=False, **run_as(account)).returncode == 0


def instead_of(folder: Path) -> Path:
    """The folder in /var/tmp that stands for one which a server's account cannot reach."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    return Path("/var/tmp", f"homelab-stack-{digest}")


def reachable_folder(folder: Path, account: Account | None) -> Path:
    """Makes `folder`; or one in /var/tmp, if `account` cannot get there (below /root)."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if give_access(folder, account) or account is None:
        return folder
    instead = instead_of(folder)
    instead.mkdir(mode=0o755, exist_ok=True)
    # Anyone may make a folder there, and we are about to give away files in it.
    if instead.is_symlink() or instead.stat().st_uid not in (0, account.pw_uid):
        raise StackError(f"{instead} belongs to somebody else")
    return instead


def chown_tree(folder: Path, account: Account | None) -> None:
    if account is not None:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    cwd: Path = CHECKOUT,
    account: Account | None = None,
    stdin: str = "",
) -> str:
    """Runs a command to its end; returns what it prints, raises if it fails."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command,
        cwd=cwd,
        env=dict(environment),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        **run_as(account),
    )
    if done.returncode != 0:
        name = " ".join(command[:2])
        raise StackError(f"{name}: exit code {done.returncode}\n{done.stderr.strip()}")
    return done.stdout.rstrip("\n")


@functools.cache
def ended_with_parent(number: signal.Signals) -> tuple[str, ...]:
    """A prefix for a command: if we are killed the kernel sends it this signal, if it can."""
    prefix = ("setpriv", "--pdeathsig", number.name.removeprefix("SIG"))
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ()
    return prefix


def process_status(pid: int) -> tuple[str, int]:
    """Its state and its parent's pid; Z, for a process that ended, also when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return fields[0], int(fields[1])


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal (proc(5), SigCgt); a gone one has none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = re.search(r"(?m)^SigCgt:\s*([0-9a-f]+)$", status)
    return caught is not None and bool(int(caught[1], 16) >> number - 1 & 1)


# --- one process ---------------------------------------------------------------------


class Process:
    """One child process and its log file: what each of the stack is."""

    stop_signal = signal.SIGTERM
    stop_seconds = 15.0  # then it is killed

    def __init__(self, name: str, log_file: Path, account: Account | None = None) -> None:
        self.name = name
        self.log_file = log_file
        self.account = account
        self.log_start = 0  # where in the log the latest start begins, in bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._was_asked = False  # to stop

    @property
    def pid(self) -> int:
        if self._process is None:
            raise StackError(f"{self.name} was never started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._process.poll() if self._process else None

    @property
    def log_end(self) -> int:
        """The size of the log now: an `after` for what is written from here on."""
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def log_bytes(self, after: int) -> bytes:
        if not self.log_file.exists():
            return b""
        with self.log_file.open("rb") as file:
            file.seek(after)
            return file.read()

    def log(self, after: int = 0) -> str:
        return self.log_bytes(after).decode(errors="replace")

    def log_tail(self) -> str:
        lines = self.log(self.log_start).splitlines()[-20:] or ["(nothing in its log)"]
        return "\n".join(f"    {line}" for line in lines)

    def ask_to_stop(self) -> None:
        """Sends it the signal, once: a second one would cut short what it does about the first."""
        if self.running and not self._was_asked:
            self._was_asked = True
            self._send([self.pid], self.stop_signal)
            if process_status(self.pid)[0] in "Tt":  # paused, it does not see the signal
                self.resume()

    def stop(self, timeout: float | None = None) -> int:
        """Ends it politely, after `timeout` seconds by force; returns the exit code."""
        if self._process is None:
            return 0
        try:
            self.ask_to_stop()
            return self._process.wait(self.stop_seconds if timeout is None else timeout)
        except subprocess.TimeoutExpired:
            return self.kill()
        finally:
            self.kill()  # also if a second Ctrl-C cut the waiting short

    def kill(self) -> int:
        """Ends it and its children by SIGKILL; returns the exit code."""
        if self._process is None:
            return 0
        if self.running:
            with suppress(StackError):
                self.pause()  # so that it makes no child meanwhile
            pids = self._pids()
            self._send(pids, signal.SIGKILL)
            self._process.wait()
            # A child of PostgreSQL that is still there would prevent a new start.
            self._wait_for_states(pids, "Z", "to be gone")
        return self._process.wait()

    def pause(self) -> None:
        for pids in (self._pids()[:1], self._pids()):  # itself first: no further child then
            self._send(pids, signal.SIGSTOP)
            self._wait_for_states(pids, "TtZ", "to be paused")

    def resume(self) -> None:
        self._send(self._pids()[::-1], signal.SIGCONT)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            running = self.running  # before the condition: its last words count
            if condition():
                return
            if not running:
                problem = f"exited with code {self.returncode} instead of {what}"
            elif time.monotonic() > deadline:
                problem = f"waited {timeout:.1f} s in vain for {what}"
            else:
                time.sleep(0.02)
                continue
            raise StackError(f"{self.name}: {problem}. The end of its log:\n{self.log_tail()}")

    def wait_for_log(self, text: str, timeout: float = 15.0, after: int | None = None) -> int:
        """Waits for `text` behind `after` (or the latest start); returns where it ends."""
        start = self.log_start if after is None else after
        wanted = text.encode()
        self.wait_until(lambda: wanted in self.log_bytes(start), f"the line {text!r}", timeout)
        return start + self.log_bytes(start).index(wanted) + len(wanted)

    def _pids(self) -> list[int]:
        """Itself, then its children: each of PostgreSQL's has a process group of its own."""
        if not self.running:
            return []
        others = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [self.pid, *(pid for pid in others if process_status(pid)[1] == self.pid)]

    def _wait_for_states(self, pids: Sequence[int], states: str, what: str) -> None:
        deadline = time.monotonic() + 5
        while any(process_status(pid)[0] not in states for pid in pids):
            if time.monotonic() > deadline:
                raise StackError(f"{self.name}: waited 5 s in vain for processes {pids} {what}")
            time.sleep(0.005)

    def _send(self, pids: Sequence[int], number: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path) -> None:
        if self.running:
            raise StackError(f"{self.name} is running already")
        self.log_start = self.log_end
        self._was_asked = False
        # Only from the main thread: the kernel takes a thread's end for the parent's.
        is_main = threading.current_thread() is threading.main_thread()
        prefix = ended_with_parent(self.stop_signal) if is_main else ()
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*prefix, *command],
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is ours, to stop in order
                **run_as(self.account),
            )
