"""The commands that the documents show, and why some are not typed by a test.

What it does: finds each command in each document, in fenced blocks and between backticks, and
the documents' headings and links. What it does not: type a command, or judge a document.
test_secure.py types the commands for the overlay, test_stack.py those without Docker,
test_compose.py all others, and the tests named in BLOCKS what has to be typed as a whole.

Invariant: a command that is not in NOT_TYPED is typed by a test, so a new one is as well.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from tools.process import CHECKOUT

# The stacks in which commands are typed.
DEFAULT, SECURE, WITHOUT_DOCKER = STACKS = ("default", "secure", "without Docker")
ON_SECURITY = ("SECURITY.md", "overlays/secure/README.md")
# What a release has changed, and figures of a day: not for typing.
HISTORY = ("CHANGELOG.md", "benchmark/results/")

# A ```shell block needs a state of its own. It is typed as a whole, by one test for each chapter.
BLOCKS = {
    "As `reader`": "tests/test_compose.py",
    "Backup and restore": "tests/test_backup.py",
    "The broker does not start": "tests/test_compose.py",
    "Moving in and back": "overlays/cluster/tests/test_cluster.py",
}

_ANOTHER_MACHINE = "is for another machine"
_ITSELF = "runs these tests"
_NAMED = "is only named; the whole command stands elsewhere and is typed there"
_MACHINE = "changes the machine; test_systemd.py has systemd read the units"
_STACK = "test_stack.py runs it, on ports and with data of its own"
_ASKS = "asks for a new password, with which the later ones would not work"
_RELEASE = "needs a newer release; test_pull.py makes one, and types it"
_NETWORK = "asks a registry for what is newest today"
_SERVICE = "homelab-telemetry.service"
_UNIT = 'sed "s|^WorkingDirectory=.*|WorkingDirectory=$PWD|"'
_PIP_COMPILE = (
    ".pip-tools/bin/pip-compile --upgrade --strip-extras --generate-hashes --no-emit-index-url"
    " --no-emit-find-links"
)
_COMPOSE = "docker compose -f docker-compose.yml"
_WEB = "overlays/web/tests types it"
_BRIDGE_STACK = "test_bridge_stack.py runs the bridge's container"
_BRIDGE = "test_bridge.py runs the bridge, with a configuration of its own"
_GRAFANA = "needs Grafana's image; test_grafana.py has Compose read the files"
_WITH_GRAFANA = f"{_COMPOSE} -f overlays/grafana/docker-compose.yml"
_CLUSTER = "overlays/cluster/tests types it"
_SUDO = "becomes root, and changes files of the machine"
NOT_TYPED = {
    "tools/stack up": _STACK,
    "tools/stack up --port-offset 10000": _STACK,
    "tools/stack exec": _NAMED,
    "tools/stack exec --port-offset 10000 ...": _NAMED,
    "tools/stack exec python -m ingester.deadletters ...": _NAMED,
    "tools/stack restore backup.dump": _STACK,
    "docker compose exec SERVICE": _NAMED,
    "sudo systemctl disable --now mosquitto postgresql": _MACHINE,
    "useradd --system --no-create-home --shell /usr/sbin/nologin homelab-telemetry": _MACHINE,
    f"{_UNIT} tools/systemd/system/{_SERVICE} > /etc/systemd/system/{_SERVICE}": _MACHINE,
    "systemctl daemon-reload && systemctl enable --now homelab-telemetry": _MACHINE,
    "tools/bootstrap && mkdir -p ~/.config/systemd/user": _MACHINE,
    f"{_UNIT} tools/systemd/user/{_SERVICE} > ~/.config/systemd/user/{_SERVICE}": _MACHINE,
    "systemctl --user daemon-reload && systemctl --user enable --now homelab-telemetry": _MACHINE,
    "loginctl enable-linger": _MACHINE,
    "journalctl -fu homelab-telemetry": _MACHINE,
    "journalctl --user -fu homelab-telemetry": _MACHINE,
    "tools/bootstrap && systemctl restart homelab-telemetry": _MACHINE,
    "systemctl --user": _NAMED,
    "truncate -s 0": _NAMED,
    "sudo -u homelab-telemetry STATE_DIRECTORY=/var/lib/homelab-telemetry"
    " tools/stack restore FILE": _MACHINE,
    "git pull --autostash --rebase && docker compose up -d --build --wait": _RELEASE,
    "git reset -q && git stash drop && docker compose up -d --build --wait": _RELEASE,
    "git checkout HEAD -- FILE": _RELEASE,
    "git add FILE": _RELEASE,
    "git rebase --continue": _RELEASE,
    "git rebase --abort": _RELEASE,
    "git pull": _NAMED,
    "docker compose up": "is only named: without -d it stays in the foreground",
    "python -m ingester.app": _NAMED,
    "python -m ingester.top": _NAMED,
    "DOCKER_HOST=unix:///run/podman/podman.sock DOCKER_BUILDKIT=0 docker compose up -d --wait": (
        "needs Podman; the same with Docker is typed"
    ),
    "pg_restore --list": _NAMED,
    "psql -v database=qs -f": _NAMED,
    r'docker compose exec postgres psql -U qs -d qs -c "\password"': _ASKS,
    "mosquitto_pub -l": _NAMED,
    "sudo tar -czf ../homelab.tar.gz .": _SUDO,
    "sudo tar -xzf homelab.tar.gz -C FOLDER": _ANOTHER_MACHINE,
    "sudo ss -ltnp": _SUDO,
    "netstat -ano": "is for Windows",
    "mosquitto_sub -p 1884": "needs another port; test_options.py tries others",
    "psql -p 5433": "the same",
    "pip install -r ingester/requirements.txt": "is what the image's build does",
    "tests/run": _ITSELF,
    "tests/run --faults": _ITSELF,
    "tests/run --faults --write-faults": _ITSELF,
    "tests/run --fast": _ITSELF,
    "tests/run tests/test_store.py -k conflict": _ITSELF,
    "tests/run --faults tests/test_device_programs.py": _ITSELF,
    "tests/run --fast tests/test_python_contract.py tests/test_python_outbox.py"
    " tests/test_python_store.py": _ITSELF,
    "python3 -m venv thermometer/.venv": _ANOTHER_MACHINE,
    "python3 -m http.server 8000": "serves files to a board",
    "python3 -m venv .pip-tools": _NETWORK,
    ".pip-tools/bin/pip install pip-tools": _NETWORK,
    f"{_PIP_COMPILE} ingester/requirements.in": _NETWORK,
    f"{_PIP_COMPILE} tests/requirements.in": _NETWORK,
    f"{_PIP_COMPILE} overlays/web/requirements.in": _NETWORK,
    f"{_PIP_COMPILE} overlays/web/tests/requirements.in": _NETWORK,
    "overlays/web/test": _ITSELF,
    "rm -r .pip-tools": _NETWORK,
    "git diff": "only looks, at what the commands above it have changed",
    "git rev-parse HEAD": "needs a clone; the tests run in what was unpacked from a ZIP, too",
    "docker compose pull": _NETWORK,
    "docker compose pull mosquitto": _NETWORK,
    "docker compose build --pull": _NETWORK,
    "tools/bootstrap": "is what tests/run begins with",
    ".venv/bin/python -m benchmark.run": "takes 20 minutes; test_benchmark.py types --short",
    ".venv/bin/python -m benchmark.run --short": "test_benchmark.py types it",
    ".venv/bin/python -m benchmark.run --page": "takes 10 minutes",
    ".venv/bin/python -m benchmark.run --bridge": "takes 2 minutes",
    ".venv/bin/python -m benchmark.run --small": "takes 2 minutes",
    ".venv/bin/python -m benchmark.run --profile": "takes 2 minutes, and needs perf",
    ".venv/bin/python -m benchmark.run --growth": "takes 25 minutes",
    ".venv/bin/python -m benchmark.run --growth devices elements": "takes 8 minutes",
    "tools/bootstrap --packages gnuplot-nox fonts-dejavu-core linux-perf": _NETWORK,
    ".venv/bin/python -m benchmark.run --peers --rounds 3": "takes 25 minutes",
    ".venv/bin/python -m benchmark.run --promise": "takes 7 minutes; test_benchmark.py calls it",
    ".venv/bin/python -m benchmark.run --against FOLDER": "takes 8 minutes",
    ".venv/bin/python -m benchmark.run --against ../before": "takes 8 minutes",
    ".venv/bin/python -m benchmark.run --against ../before --rounds 10": "takes longer",
    "docker compose": _NAMED,
    "sudo install -d -m 755 /etc/homelab-ingester": _SUDO,
    "sudo install -o 10001 -m 400 mqtt_password database_password ca.crt"
    " /etc/homelab-ingester/": _SUDO,
    "sudo chmod 400 overlays/secure/secrets/database/server.key": _SUDO,
    f"{_COMPOSE} -f overlays/web/docker-compose.yml up -d --build --wait": _WEB,
    f"{_COMPOSE} -f overlays/secure/docker-compose.yml -f overlays/web/docker-compose.yml"
    " -f overlays/web/secure.yml up -d --build --wait": _WEB,
    "overlays/web/run": _WEB,
    f"{_COMPOSE} -f overlays/bridge/docker-compose.yml up -d --build --wait": _BRIDGE_STACK,
    "docker logs homelab-bridge": _BRIDGE_STACK,
    "BRIDGE_STORE=/var/lib/bridge python3 -m devices.bridge bridge.toml": _BRIDGE,
    "python3 -m devices.bridge bridge.toml --dry-run": _BRIDGE,
    "overlays/secure/device add homelab-bridge": _BRIDGE_STACK,
    f"{_WITH_GRAFANA} up -d --wait": _GRAFANA,
    f"{_WITH_GRAFANA} exec grafana cat /telemetry/admin_password": _GRAFANA,
    f"{_WITH_GRAFANA} exec grafana grafana cli admin reset-admin-password"
    " --password-from-stdin": _GRAFANA,
    f"{_COMPOSE} -f overlays/secure/docker-compose.yml -f overlays/grafana/docker-compose.yml"
    " -f overlays/grafana/secure.yml up -d --wait": _GRAFANA,
    f"{_COMPOSE} -f overlays/cluster/docker-compose.yml up -d --build --wait": (
        "overlays/cluster/tests types it with COMPOSE_FILE"
    ),
    "docker compose run --rm --no-deps -T schema psql -P pager=off -c"
    ' "SELECT device_id, count(*) FROM events GROUP BY device_id"': _CLUSTER,
    "docker compose exec postgres-1 patronictl -c /cluster/patroni.yml list": _CLUSTER,
    "docker compose exec postgres-1 patronictl -c /cluster/patroni.yml reinit homelab postgres-2": (
        "asks, and copies a node anew"
    ),
    "docker compose exec ingester-0 python -m ingester.top": _CLUSTER,
    "overlays/cluster/partitions 3": _CLUSTER,
    "overlays/cluster/test": _ITSELF,
    "git worktree add ../before COMMIT": "needs a clone with its history",
}

# What listens until it is interrupted.
GOES_ON = re.compile(r"mosquitto_sub(?!.* -C )|logs.* -f\b")
_FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_CODE = re.compile(r"`([^`]+)`")
# [text](target) and ![text](target), with or without a title; [name]: target; and HTML's own.
_LINK = re.compile(
    r"""(?:\]\(|^ {0,3}\[[^]]+\]: +|<(?:a|img) [^>]*(?:href|src)=")<?([^)\s>"]+)""", re.MULTILINE
)
# What a line of a block without a language, or code between backticks, begins with if it is a
# command. With nothing behind it, it is only the program's name.
_COMMAND = re.compile(
    r"(sudo |[A-Z_]+=\S* )*(docker|git|psql|pg_\w+|mosquitto_\w+|python3?|\.\S+/bin/\w+|pip|npm"
    r"|tools/\w+|tests/run|overlays/secure/(setup|device)|sudo|du|ss|netstat|systemctl|journalctl"
    r"|loginctl|openssl|curl|tail|truncate|podman) \S"
)


class Command(NamedTuple):
    """A command as it is typed; `block` is the fence's word, or "inline"."""

    document: str
    chapter: str
    block: str
    text: str


def documents() -> list[str]:
    """Every document, from the checkout's folder."""
    hidden = re.compile(r"(^|/)(\.|node_modules/)")
    paths = (path.relative_to(CHECKOUT).as_posix() for path in CHECKOUT.rglob("*.md"))
    return sorted(path for path in paths if not hidden.search(path))


def commands() -> list[Command]:
    """Every command of every document, in their order."""
    return [
        command
        for name in documents()
        if not name.startswith(HISTORY)
        for command in find(name, text_of(name))
    ]


def find(document: str, text: str) -> Iterator[Command]:
    """Yield the commands of one document."""
    chapter = ""
    end = 0
    for fence in [*_FENCE.finditer(text), None]:
        prose = text[end : fence.start() if fence else len(text)]
        for part in re.split(r"^(?=#+ )", prose, flags=re.MULTILINE):
            if heading := _HEADING.match(part):
                chapter = heading[1]
            for code in _CODE.findall(part):
                if _COMMAND.match(line := " ".join(code.split())):
                    yield Command(document, chapter, "inline", line)
        if fence:
            for line in _lines(fence[2], textwrap.dedent(fence[3])):
                yield Command(document, chapter, fence[2], line)
            end = fence.end()


def _lines(word: str, block: str) -> Iterator[str]:
    """Yield the commands of one fenced block, each with all its lines and without its comment."""
    lines = iter(block.splitlines())
    for line in lines:
        if word == "console":
            if line.startswith("$ "):
                yield line[2:]
        elif word in ("sh", "shell", "powershell") or (not word and _COMMAND.match(line)):
            while not _is_whole(line):
                line += "\n" + next(lines)
            yield re.sub(r"\s+# .*", "", line)


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:  # a quotation is open, or a backslash ends the line
        return False
    return True


def to_type(stack: str) -> list[str]:
    """The commands that are typed one by one in one of STACKS, each once."""
    found = [
        command.text
        for command in commands()
        if command.block != "shell" and command.text not in NOT_TYPED and stack_of(command) == stack
    ]
    return list(dict.fromkeys(found))


def stack_of(command: Command) -> str:
    """In which stack it works."""
    if command.text.startswith("tools/stack exec"):
        return WITHOUT_DOCKER
    is_secure = command.document in ON_SECURITY or "overlays/secure" in command.text
    return SECURE if is_secure else DEFAULT


def text_of(document: str) -> str:
    """The text of one document."""
    return (CHECKOUT / document).read_text("utf-8")


def blocks(chapter: str) -> list[str]:
    """The ```shell blocks of a chapter, each whole, wherever it stands."""
    under = re.compile(rf"^#+ {chapter}\n(.*?)(?=^#{{1,3}} |\Z)", re.MULTILINE | re.DOTALL)
    found = [under.search(text_of(name)) for name in documents() if not name.startswith(HISTORY)]
    (text,) = [match[1] for match in found if match]
    return [textwrap.dedent(fence[3]) for fence in _FENCE.finditer(text) if fence[2] == "shell"]


def chapter(document: str, heading: str) -> str:
    """The text under one heading of a document, up to the next heading."""
    in_code, found, chapters = False, False, []
    for line in text_of(document).splitlines():
        in_code ^= line.lstrip().startswith("```")
        if line.startswith("#") and not in_code:
            if found := line.lstrip("#").strip() == heading:
                chapters.append("")
        elif found:
            chapters[-1] += f"{line}\n"
    assert len(chapters) == 1, f"{len(chapters)} headings of {document} are {heading!r}"
    return chapters[0]


def anchors(text: str) -> set[str]:
    """What a link may name behind `#`, as GitHub makes it of each heading."""
    found: list[str] = []
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.append(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    # GitHub numbers the second heading of a name.
    return {
        name if not (before := found[:i].count(name)) else f"{name}-{before}"
        for i, name in enumerate(found)
    }


def links(text: str) -> list[str]:
    """Where the links and images of a document lead, in their order."""
    return _LINK.findall(_CODE.sub("", _FENCE.sub("", text)))
