"""The boundaries of this checkout, held by a machine so that nobody needs to argue.

What it does: reads the source, the documents and the settings' files, and runs ruff and mypy.
What it does not: run the ingester. It looks at what git tracks or would track.

Invariant: a rule is one test, which names every file that breaks it.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from dotenv import dotenv_values

from ingester.rejection import Reason
from tests.support.checkout import files_of
from tests.support.documents import chapter
from tests.support.each import each
from tools.process import CHECKOUT

# One worker reads the source, and no other has to.
pytestmark = pytest.mark.xdist_group("rules")

THIRD_PARTY = {"paho": "paho-mqtt", "psycopg2": "psycopg2-binary", "dotenv": "python-dotenv"}
FUNCTION_LINES_MAX = 70
COLUMNS_MAX = 100


@cache
def files(*folders: str) -> dict[str, Path]:
    """Return the files that git tracks, or would after `git add`, by their names here."""
    inside = tuple(f"{folder}/" for folder in folders) or ("",)
    return {name: path for name, path in files_of(CHECKOUT).items() if name.startswith(inside)}


def modules(*folders: str) -> dict[str, ast.Module]:
    return {name: parsed(name) for name in files(*folders) if name.endswith(".py")}


@cache
def parsed(name: str) -> ast.Module:
    module = ast.parse(files()[name].read_text("utf-8"), name)
    if name.startswith("devices/python/telemetry/"):
        # People copy it beside their scripts, so it alone does not know its full name.
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                node.level, node.module = 0, f"telemetry.{node.module}"
    return module


def ingester() -> list[str]:
    return sorted(modules("ingester"))


def imports(module: ast.Module) -> Iterator[str]:
    """Yield the dotted name of every module that is imported, wherever it is."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield str(node.module)


def packages(module: ast.Module) -> set[str]:
    return {name.split(".")[0] for name in imports(module)}


def reached_from(name: str) -> set[str]:
    """Return the ingester's modules that running this one imports, itself among them."""
    reached: set[str] = set()
    waiting = {name}
    while waiting:
        reached |= waiting
        imported = {
            dotted.replace(".", "/") + ending
            for name in waiting
            for dotted in imports(parsed(name))
            for ending in (".py", "/__init__.py")
        }
        waiting = imported & set(ingester()) - reached
    return reached


def is_program(module: ast.Module) -> bool:
    """Tell whether it ends as what `python -m` runs does."""
    return isinstance(module.body[-1], ast.If) and "__main__" in ast.unparse(module.body[-1].test)


@cache
def programs() -> set[str]:
    """Return the daemon and the tools beside it, each run by `python -m`."""
    return {name for name, module in modules("ingester").items() if is_program(module)}


# --- who imports what ----------------------------------------------------------------


def test_there_are_files_to_look_at() -> None:
    assert {"ingester/app.py", "ingester/event.py", "ingester/store.py"} <= set(ingester())
    daemon = reached_from("ingester/app.py")
    assert {"ingester/app.py", "ingester/event.py", "ingester/store.py"} <= daemon
    assert "ingester/app.py" in programs()
    assert "tests/test_rules.py" in modules()
    assert "docker-compose.yml" in files()


def importers(package: str) -> set[str]:
    return {name for name, module in modules("ingester").items() if package in packages(module)}


def test_only_the_client_and_the_tools_session_import_paho() -> None:
    assert importers("paho") == {"ingester/client.py", "ingester/tool_session.py"}


def test_only_the_connection_imports_psycopg2() -> None:
    assert importers("psycopg2") == {"ingester/connection.py"}


def test_only_a_program_imports_dotenv() -> None:
    assert importers("dotenv") == programs()


def test_nothing_imports_a_program_and_the_daemon_needs_nothing_of_the_tools() -> None:
    imported = {name for module in modules("ingester").values() for name in imports(module)}
    assert not {name.removesuffix(".py").replace("/", ".") for name in programs()} & imported
    assert "ingester/tool_session.py" not in reached_from("ingester/app.py")


# What a board has, what its MQTT client is, and what is one of its own folder's modules.
MICROPYTHON = {"ffi", "machine", "micropython", "mqtt_as", "network", "ntptime", "umqtt", "vfs"}


@each(lambda: sorted(modules("devices")))
def test_what_runs_as_a_device_imports_paho_the_standard_library_and_nothing_of_ours(
    name: str,
) -> None:
    imported = packages(parsed(name)) - sys.stdlib_module_names
    if name.startswith("devices/micropython/"):
        assert imported - MICROPYTHON <= {"telemetry", "flash"}
    elif name.startswith("devices/python/"):
        # Of ours the package alone, under either of its names.
        assert imported <= {"paho", "telemetry", "devices"}
        named = {dotted for dotted in imports(parsed(name)) if "devices" in dotted}
        assert named <= {"devices.python.telemetry"}
        assert ("paho" in imported) == (name == "devices/python/telemetry/paho_link.py")
    elif name.startswith("devices/bridge/"):
        assert imported <= {"paho", "devices"}
        assert ("paho" in imported) == (name == "devices/bridge/session.py")
    else:
        assert imported <= {"paho"}


@each(ingester)
def test_the_ingester_imports_itself_the_standard_library_and_three_packages(name: str) -> None:
    own = {"ingester"}
    others = packages(parsed(name)) - sys.stdlib_module_names - own
    assert others <= set(THIRD_PARTY)


@each(ingester)
def test_nothing_is_imported_by_name_at_run_time(name: str) -> None:
    assert "importlib" not in packages(parsed(name))
    called = {
        node.func.id
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"__import__", "exec", "eval", "compile"}


PURE = {
    "ingester/event.py": {"ingester.pattern", "ingester.payload", "ingester.rejection"},
    "ingester/mqtt.py": set(),
    "ingester/pattern.py": set(),
    "ingester/payload.py": set(),
    "ingester/rejection.py": set(),
    "ingester/reply.py": {"ingester.event", "ingester.rejection"},
    "ingester/topic.py": set(),
}
# Of the standard library, what computes and does nothing else.
COMPUTES = {
    *("array", "base64", "collections", "contextlib", "dataclasses", "datetime", "decimal", "enum"),
    *("functools", "itertools", "json", "math", "operator", "re", "string", "types", "typing"),
}


@each(lambda: PURE)
def test_a_pure_module_imports_nothing_that_does_io(name: str) -> None:
    module = parsed(name)
    assert {name for name in imports(module) if name.startswith("ingester")} <= PURE[name]
    assert packages(module) - {"ingester"} <= COMPUTES


@each(lambda: PURE)
def test_a_pure_module_asks_for_neither_the_time_nor_a_file(name: str) -> None:
    words = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(parsed(name))
        if isinstance(node, (ast.Attribute, ast.Name))
    }
    assert not words & {"now", "utcnow", "today", "open", "print", "input"}


@each(ingester)
def test_only_a_program_looks_at_the_environment(name: str) -> None:
    words = {
        word
        for node in ast.walk(parsed(name))
        for word in (
            [node.attr]
            if isinstance(node, ast.Attribute)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    looks = bool(words & {"environ", "environb", "getenv", "getenvb"})
    assert looks == (name in programs())


# --- what is not written -------------------------------------------------------------


def names_in(node: ast.expr | None) -> Iterator[str]:
    if node is None:
        yield "(nothing)"
    elif isinstance(node, ast.Tuple):
        for element in node.elts:
            yield from names_in(element)
    else:
        yield ast.unparse(node).split(".")[-1]


@each(ingester)
def test_no_handler_catches_everything(name: str) -> None:
    # A swallowed error becomes a PUBACK.
    for node in ast.walk(parsed(name)):
        caught: set[str] = set()
        if isinstance(node, ast.ExceptHandler):
            caught = set(names_in(node.type))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            caught = {name for argument in node.args for name in names_in(argument)}
        assert not caught & {"(nothing)", "Exception", "BaseException"}


@each(lambda: sorted(modules()))
def test_every_module_opens_with_a_docstring(name: str) -> None:
    module = parsed(name)
    docstring = ast.get_docstring(module)
    assert docstring
    assert module.body[0].lineno == 1


def scripts() -> list[str]:
    return [name for name, path in files().items() if path.read_bytes()[:2] == b"#!"]


@each(scripts)
def test_every_script_opens_with_what_it_is_for(name: str) -> None:
    second = files()[name].read_text("utf-8").splitlines()[1]
    assert second.startswith(("# ", '"""'))


@each(lambda: sorted(modules("ingester", "devices", "tools", "benchmark")))
def test_no_function_is_longer_than_a_screen(name: str) -> None:
    for node in ast.walk(parsed(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{node.name} has {lines} lines"


@each(lambda: sorted(modules()))
def test_no_line_is_wider_than_100_columns(name: str) -> None:
    for number, line in enumerate(files()[name].read_text("utf-8").splitlines(), 1):
        assert len(line) <= COLUMNS_MAX, f"line {number} has {len(line)} columns"


# --- the files around it -------------------------------------------------------------


def pins(folder: str) -> dict[str, list[str]]:
    """Return what folder/requirements.txt pins, each with its checksums."""
    text = (CHECKOUT / folder / "requirements.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if not re.match(r" *#|$", line)]
    made: dict[str, list[str]] = {}
    for line in lines:
        if pin := re.fullmatch(r"([a-z0-9-]+==[0-9]+(?:\.[0-9]+)+) \\", line):
            made[pin[1]] = []
        else:
            checksum = re.fullmatch(r"    --hash=sha256:([0-9a-f]{64})(?: \\)?", line)
            assert checksum, line
            made[list(made)[-1]].append(checksum[1])
    return made


def wanted(folder: str) -> set[str]:
    lines = (CHECKOUT / folder / "requirements.in").read_text("utf-8").splitlines()
    return {line.split("<")[0] for line in lines if line and not line.startswith("#")}


def test_the_requirements_pin_exactly_three_packages() -> None:
    assert {pin.split("==")[0] for pin in pins("ingester")} == set(THIRD_PARTY.values())
    assert wanted("ingester") == set(THIRD_PARTY.values())


def test_the_tests_requirements_name_what_is_wanted_and_nothing_of_the_ingesters() -> None:
    names = {pin.split("==")[0] for pin in pins("tests")}
    assert wanted("tests") <= names
    assert not names & wanted("ingester")


@pytest.mark.parametrize("folder", ["ingester", "tests"])
def test_every_pin_has_the_checksums_of_wheel_and_source_at_least(folder: str) -> None:
    assert all(len(checksums) >= 2 for checksums in pins(folder).values())


def texts() -> list[str]:
    return [name for name in files() if not name.endswith(".png")]


@each(texts)
def test_a_text_file_is_utf8_with_lf_endings(name: str) -> None:
    content = files()[name].read_bytes()
    assert b"\r" not in content
    content.decode("utf-8")


def test_git_gives_every_text_file_lf_endings_on_windows_too() -> None:
    lines = (CHECKOUT / ".gitattributes").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[:2] == ["* text=auto eol=lf", "*.png binary"]
    assert not re.search(r"\b(text|eol|binary)\b", " ".join(rules[2:]))


IGNORED = "# x\n/top\n/top.d/\n*.log\n!kept.log\nx/\n/deep/*.txt\n"


def test_what_a_clone_would_have_is_what_git_would_take(tmp_path: Path) -> None:
    if not shutil.which("git"):
        pytest.skip("git is not installed, which this alone needs")
    tree = tmp_path / "tree"
    for name in (
        *("top", "y/top", "top.d/a", "y/top.d/a", "x/a", "y/x/a", "z/x", "data/a"),
        *("a.log", "y/a.log", "kept.log", "y/kept.log", "deep/a.txt", "deep/a.py", "y/deep/a.txt"),
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    (tree / "link").symlink_to("kept.log")
    (tree / ".gitignore").write_text(IGNORED)
    (tree / "data/.gitignore").write_text("*\n!.gitignore\n")
    assert set(files_of(tree)) == git_list(tmp_path, tree)
    assert set(files_of(CHECKOUT)) == git_list(tmp_path, CHECKOUT)


def git_list(tmp_path: Path, tree: Path) -> set[str]:
    """What git would take from a folder that it does not know."""
    git = ["git", "-c", "core.excludesFile=/dev/null", f"--git-dir={tmp_path / 'git'}"]
    subprocess.run([*git, "init", "--quiet", "--bare"], check=True)
    command = [*git, f"--work-tree={tree}", "ls-files", "-z", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    return {name for name in done.stdout.split("\0") if (tree / name).is_file()}


# --- the documents -------------------------------------------------------------------


def documents() -> list[str]:
    return [name for name in texts() if name.endswith(".md")]


@each(documents)
def test_no_document_has_a_password_on_a_command_line(name: str) -> None:
    # Everybody on a machine can read those; a file of options and the environment they cannot.
    given = r"mosquitto_\w+ .*(-P|--pw) (?!/)|PASSWORD '|--password[ =]|-e \w*PASSWORD="
    for line in files()[name].read_text("utf-8").splitlines():
        assert not re.search(given, line), line


@each(documents)
def test_what_devices_send_is_shown_as_text(name: str) -> None:
    # Else they could write to the terminal of whoever listens. What the ingester publishes is not
    # theirs: it is JSON, without control characters.
    devices = re.compile(r"^[a-z].*mosquitto_sub .*-t '?qs/v1/(#|\+/events)")
    for line in files()[name].read_text("utf-8").splitlines():
        assert not devices.search(line) or "| cat -v" in line, line
        assert not re.search(r"\bpsql .*(-\w*A|--no-align)", line), line


def first_cells(text: str) -> list[str]:
    """Return what stands in backticks in the first cell of each table row."""
    rows = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row)]


def test_the_contract_lists_exactly_the_reasons() -> None:
    listed = first_cells(chapter("docs/contract.md", "Reasons"))
    assert sorted(listed) == sorted(reason.value for reason in Reason)


def test_the_table_of_settings_names_every_variable_and_no_other() -> None:
    named = first_cells(chapter("docs/configuration.md", "Settings"))
    assert sorted(named) == sorted(dotenv_values(CHECKOUT / ".env"))


# --- ruff and mypy -------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        # Half a minute in a fresh clone.
        pytest.param(
            ("mypy", "--strict", "ingester", "devices", "tools", "tests", "benchmark"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_the_checkers_have_nothing_to_say(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_tests_of_one_group_run_in_one_worker(tmp_path: Path) -> None:
    """Or those that share a port would run side by side; pytest 9.2 and xdist 3.8 let them."""
    (tmp_path / "test_group.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.xdist_group('one')\n"
        "@pytest.mark.parametrize('number', range(6))\n"
        "def test_worker(number):\n"
        "    print('worker:', os.environ['PYTEST_XDIST_WORKER'])\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-rP"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    workers = re.findall(r"worker: (\w+)", done.stdout)
    assert len(workers) == 6, done.stdout
    assert len(set(workers)) == 1
