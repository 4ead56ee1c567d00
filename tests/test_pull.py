"""An upgrade of the checkout itself, by git: what its owner has edited, and what is new, stay.

What it does: types the commands of the documents' chapter "Upgrade", as far as they are git's, in
clones that stand where each earlier version ended. What it does not: run the stack, whose half
of an upgrade is in test_upgrade.py and test_backup.py.

Invariant: nothing but clones in a temporary folder is written to, and nobody's settings of git
count.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from dotenv import dotenv_values

from tests.support.compose import copy_checkout
from tests.support.each import first_or_all
from tools.process import CHECKOUT

pytestmark = pytest.mark.slow

VERSION_FILE = "ingester/__init__.py"
# As .env says that such a value is written.
PASSWORD, WRITTEN = r"it's $5 #1", r"'it\'s $5 #1'"
ALSO_THEIRS = "COMPOSE_FILE=docker-compose.yml:mine.yml"


class Clone:
    """A clone, and git in it, as its owner types it."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        # Another user may own what is cloned, as in a container.
        config = "[safe]\ndirectory = *\n[user]\nname = Owner\nemail = owner@example.com\n"
        (home / ".gitconfig").write_text(config)
        self._environment = {
            name: text for name, text in os.environ.items() if not name.startswith("GIT_")
        } | {
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_EDITOR": "true",
        }

    def type(self, line: str, expected: int = 0) -> str:
        """Type a line in a shell; check its exit code, and return what was said."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == expected, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def git(self, *arguments: str) -> str:
        """Run git; return what it prints, without the last newline."""
        return self.type(" ".join(["git", *map(_quoted, arguments)])).rstrip("\n")

    @property
    def settings(self) -> Path:
        return self.folder / ".env"


def _quoted(argument: str) -> str:
    return "'" + argument.replace("'", r"'\''") + "'"


@cache
def last_commits() -> dict[str, str]:
    """The last commit of each earlier version; fewer where git or history is missing."""
    if not shutil.which("git"):
        return {}
    git = ("git", "-c", "safe.directory=*", "-C", str(CHECKOUT))

    def ask(*arguments: str) -> Sequence[str]:
        done = subprocess.run([*git, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.splitlines()

    found = {}
    for commit in ask("log", "--format=%H", "-G^__version__ = ", "--", VERSION_FILE):
        # This one begins a version. Of the first of all, and where a clone is shallow, there is
        # none before it.
        for line in ask("show", f"{commit}~1:{VERSION_FILE}"):
            if version := re.match('__version__ = "(.+)"', line):
                found[version[1]] = f"{commit}~1"
    return found


def earlier_versions() -> list[str]:
    """Every version of the changelog but the newest."""
    text = (CHECKOUT / "CHANGELOG.md").read_text("utf-8")
    return re.findall(r"^## (\d\S+)", text, re.MULTILINE)[1:]


def commit_of(version: str) -> str:
    if version not in last_commits():
        pytest.skip("git or the history is missing: a ZIP, or a shallow clone")
    return last_commits()[version]


def documents() -> dict[str, str]:
    """What a user reads, but for the changelog, which speaks of what was."""
    paths = [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("overlays/*/*.md")]
    return {str(path): path.read_text("utf-8") for path in paths if path.name != "CHANGELOG.md"}


def chapter() -> str:
    """The documents' chapter "Upgrade"."""
    (text,) = re.findall(
        r"^#+ Upgrade\n(.*?)(?=^#|\Z)", "\n".join(documents().values()), re.MULTILINE | re.DOTALL
    )
    return str(text)


def command(start: str) -> str:
    """The chapter's line that starts so, without what Docker does in the end."""
    (line,) = re.findall(rf"^{re.escape(start)}.*$", chapter(), re.MULTILINE)
    gits, docker, rest = str(line).partition(" && docker compose ")
    assert docker
    assert rest == "up -d --build --wait"
    return gits


@pytest.fixture
def origin(tmp_path: Path) -> Clone:
    """A repository whose newest commit is this checkout, with what is not committed here."""
    commit_of(earlier_versions()[-1])
    origin = Clone(tmp_path / "origin", tmp_path)
    here = Clone(tmp_path, tmp_path)
    here.git("clone", "--no-checkout", str(CHECKOUT), "origin")
    origin.git("checkout", "-B", "main", "HEAD", "--no-progress")
    for path in origin.folder.iterdir():
        if path.name != ".git":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(copy_checkout(tmp_path / "now"), origin.folder, dirs_exist_ok=True)
    origin.git("add", "--all")
    origin.git("commit", "--allow-empty", "-m", "now")
    return origin


@pytest.fixture
def owner(origin: Clone, tmp_path: Path) -> Clone:
    """A clone of it, in which a user's life begins at some commit."""
    Clone(tmp_path, tmp_path).git("clone", str(origin.folder), "owner")
    return Clone(tmp_path / "owner", tmp_path)


def edit(settings: Path) -> dict[str, str]:
    """Give each setting another value, and add a line; return what stands there now."""
    text = re.sub(r"^(\w+)=.*", r"\1=of-the-owner-\1", settings.read_text(), flags=re.MULTILINE)
    text = text.replace("of-the-owner-POSTGRES_PASSWORD\n", f"{WRITTEN}\n")
    settings.write_text(f"{text}{ALSO_THEIRS}\n")
    return read(settings)


def read(settings: Path) -> dict[str, str]:
    return {name: text or "" for name, text in dotenv_values(settings, interpolate=False).items()}


def comments(settings: Path) -> set[str]:
    return {line for line in settings.read_text().splitlines() if line.startswith("#")}


@pytest.mark.parametrize("how", ["edited", "committed"])
@pytest.mark.parametrize("version", first_or_all(earlier_versions()))
def test_an_upgrade_keeps_every_edited_setting_and_brings_the_new_ones_with_their_comments(
    origin: Clone, owner: Clone, version: str, how: str
) -> None:
    owner.git("reset", "--hard", commit_of(version))
    edited = edit(owner.settings)
    assert edited["POSTGRES_PASSWORD"] == PASSWORD
    assert all(text.startswith(("of-the-owner", PASSWORD)) for text in list(edited.values())[:-1])
    if how == "committed":
        owner.git("commit", "-am", "Ours")
    owner.type(command("git pull "))
    assert read(owner.settings) == read(origin.settings) | edited
    assert comments(owner.settings) >= comments(origin.settings)
    # Nothing else differs, and nothing waits to be settled.
    assert owner.git("diff", "--name-only", origin.git("rev-parse", "HEAD")) == ".env"
    assert owner.git("stash", "list") == owner.git("ls-files", "--unmerged") == ""
    before = owner.settings.read_text()
    owner.type(command("git pull "))
    assert owner.settings.read_text() == before


@pytest.fixture
def both_changed(origin: Clone, owner: Clone) -> tuple[str, str]:
    """A line of the compose file, as its owner and as the newest release have changed it."""
    changed = []
    for clone, image in ((owner, "mine"), (origin, "postgres:99")):
        file = clone.folder / "docker-compose.yml"
        text = file.read_text()
        assert text.count("    image: postgres:16\n    container_name:") == 1
        file.write_text(text.replace("image: postgres:16\n    con", f"image: {image}\n    con"))
        changed.append(f"    image: {image}\n")
    origin.git("commit", "-am", "The newest")
    edit(owner.settings)
    return changed[0], changed[1]


def settle(owner: Clone, mine: str, theirs: str) -> None:
    """Edit the file as the documents say; keep the owner's line."""
    file = owner.folder / "docker-compose.yml"
    marked = rf"^<<<<<<< .*\n{theirs}=======\n{mine}>>>>>>> .*\n"
    text, count = re.subn(marked, mine, file.read_text(), flags=re.MULTILINE)
    assert count == 1, file.read_text()
    file.write_text(text)


def test_a_conflict_is_settled_by_what_the_documents_say_and_the_next_upgrade_works(
    origin: Clone, owner: Clone, both_changed: tuple[str, str]
) -> None:
    mine, theirs = both_changed
    said = owner.type(command("git pull "))
    (message,) = re.findall(r"\*\*`(Applying autostash .*?)`\*\*", chapter())
    assert message in said
    settle(owner, mine, theirs)
    owner.type(command("git reset "))
    changed = owner.git("diff", "--name-only", origin.git("rev-parse", "HEAD"))
    assert changed == ".env\ndocker-compose.yml"
    assert mine in (owner.folder / "docker-compose.yml").read_text()
    assert read(owner.settings)["POSTGRES_PASSWORD"] == PASSWORD
    assert owner.git("stash", "list") == owner.git("ls-files", "--unmerged") == ""
    (origin.folder / "new").touch()
    origin.git("add", "new")
    origin.git("commit", "-m", "Newer still")
    owner.type(command("git pull "))
    assert (owner.folder / "new").exists()
    assert mine in (owner.folder / "docker-compose.yml").read_text()


def test_a_conflict_with_what_its_owner_has_committed_is_settled_as_the_documents_say(
    origin: Clone, owner: Clone, both_changed: tuple[str, str]
) -> None:
    mine, theirs = both_changed
    owner.git("commit", "-am", "Ours")
    said = owner.type(command("git pull "), expected=1)
    for message in ("CONFLICT", "Resolve all conflicts manually"):
        assert f"`{message}`" in chapter()
        assert message in said
    settle(owner, mine, theirs)
    for line in ("git add docker-compose.yml", "git rebase --continue"):
        assert f"`{line.replace('docker-compose.yml', 'FILE')}`" in chapter()
        owner.type(line)
    owner.type(command("git pull "))
    changed = owner.git("diff", "--name-only", origin.git("rev-parse", "HEAD"))
    assert changed == ".env\ndocker-compose.yml"


def test_no_document_speaks_of_a_tag_that_is_not_there() -> None:
    for name, text in documents().items():
        assert not re.findall(r"\bgit tags?\b|--tags\b|\bcheckout v\d", text), name
