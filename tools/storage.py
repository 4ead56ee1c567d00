"""Where `tools/stack` keeps its data, and how what releases up to 0.4.0 kept elsewhere gets there.

What it does: names the folder, makes it, locks it for one stack, moves the data of an earlier
release into it. What it does not: look into the data, or run anything on it (tools/stack.py does).

Invariant: whatever ends a move, each part of the data is whole in one of the two places, and
the next start goes on from there.
"""

import errno
import fcntl
import os
import pwd
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.process import (
    CHECKOUT,
    SetupError,
    StackError,
    clean_environment,
    give_access,
    instead_of,
    run,
    service_account,
)

NAME = "homelab-telemetry"
# The database last: as long as it is in the old place, the move is not over.
PARTS = ("ingester.log", "mosquitto", "postgres")


def data_folder() -> Path:
    """What systemd names, else /var/lib for root, the user's own data folder for others."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib", NAME)
    base = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local/share") / NAME


@contextmanager
def opened(say: Callable[[str], None], checkout: Path = CHECKOUT) -> Iterator[Path]:
    """Gives the folder with all the data in it, held for this process alone."""
    folder = data_folder()
    _make(folder)
    with _locked(folder):
        for earlier in earlier_folders(checkout):
            move(earlier, folder, say)
        yield folder


def _make(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat().st_uid
    if owner != os.geteuid():
        name = _user_name(owner)
        raise SetupError(
            f"{folder} belongs to {name}, as which the stack has run here. Do it as that user: "
            f"sudo -u {name} STATE_DIRECTORY={folder} tools/stack ..."
        )
    account = service_account("postgres")
    if not give_access(folder, account):
        raise SetupError(f"{folder} cannot be reached by the user {account and account.pw_name}")


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"  # which sudo -u takes


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(f"it is running already, with its data in {folder}") from None
        yield


# --- from where releases up to 0.4.0 kept it ------------------------------------------------


def earlier_folders(checkout: Path = CHECKOUT) -> list[Path]:
    """Those that are ours: .stack/, and for root the one in /var/tmp in the place of it."""
    in_checkout = checkout / ".stack"
    folders = [in_checkout, instead_of(in_checkout)]
    # Anyone may make a folder in /var/tmp, and one in a user's checkout is the user's.
    return [path for path in folders if path.is_dir() and path.lstat().st_uid == os.geteuid()]


def move(old: Path, new: Path, say: Callable[[str], None]) -> None:
    """Moves the data from `old` to `new`, unless both have some; then it says so."""
    if old.resolve() == new.resolve():
        return
    with _locked(old):
        if user := _server_in(old):
            raise SetupError(f"{user} still runs on the data in {old}; stop it first")
        for part in PARTS:
            _recover(old / part, new / part)
        parts = [part for part in PARTS if (old / part).exists()]
        if any((new / part).exists() for part in parts):
            say(
                f"There is data of an earlier release in {old}, and newer data in {new}, which is "
                "used. Delete the old, or with all stopped put it in the place of the new."
            )
            return
        if old.is_symlink() and parts:
            raise SetupError(
                f"{old} is a symbolic link, and the place of the data is {new} now. "
                f"To keep it where it is: rm -r {new}; ln -s {old.resolve()} {new}; rm {old}"
            )
        if parts:
            say(f"Moving the data of an earlier release from {old} to {new}.")
        for part in parts:
            _move_part(old / part, new / part)
        if parts:
            say(f"Moved: the data is in {new}.")
    if not old.is_symlink():
        (old / "lock").unlink()
        with suppress(OSError):  # what is not ours stays
            old.rmdir()


def _server_in(folder: Path) -> str | None:
    """A server that outlived its tools/stack, which was killed: each runs in its folder."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name = (process / "comm").read_text().strip()
            cwd = (process / "cwd").readlink()
            if name in ("mosquitto", "postgres") and cwd.is_relative_to(folder.resolve()):
                return f"{name} (process {process.name})"
    return None


def _beside(source: Path, target: Path) -> tuple[Path, Path]:
    """What `source` is called once its copy is whole, and the copy until it is in its place."""
    return source.with_name(f"{source.name}.moved"), target.with_name(f"{target.name}.copy")


def _move_part(source: Path, target: Path) -> None:
    moved, copy = _beside(source, target)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    else:
        return
    try:
        run(["cp", "-a", "--", str(source), str(copy)], clean_environment())
    except StackError as error:
        _delete(copy)
        raise StackError(f"{error}\nThe data is still in {source.parent}.") from None
    # Each step is on the disk before the next: a power cut must find what _recover() knows.
    _sync_tree(copy)
    _rename(source, moved)
    _rename(copy, target)
    _delete(moved)


def _recover(source: Path, target: Path) -> None:
    """Ends what an interrupted _move_part() left: forward if the copy is whole, else back."""
    moved, copy = _beside(source, target)
    if moved.exists():
        if copy.exists() and not target.exists():
            _rename(copy, target)
        if target.exists():
            _delete(moved)
        else:
            moved.rename(source)
    elif copy.exists():
        _delete(copy)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(path: Path) -> None:
    if path.is_file():
        _sync(path)
    for folder, _, names in os.walk(path):
        for file in (os.path.join(folder, name) for name in names):
            if not os.path.islink(file):
                _sync(file)
        _sync(folder)
    _sync(path.parent)


def _rename(source: Path, target: Path) -> None:
    source.rename(target)
    _sync(target.parent)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
