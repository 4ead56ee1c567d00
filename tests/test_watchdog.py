"""A loop that hangs, in a name lookup: the process ends itself; by default none hangs so long.

What it does: gives the real process resolvers that hear and never answer, in a mount namespace
of its own; so it needs root, as CI has. What it does not: test that Compose starts a process
again that SIGALRM has ended (test_compose.py).

Invariant: /etc/resolv.conf of this machine stays as it is.
"""

import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.pipeline import Pipeline, wait_until
from tools.stack import Ingester

# Nobody else's, and nothing leaves this machine. Two, and a domain to search, are what takes
# the longest.
RESOLVERS = ("127.0.53.53", "127.0.53.54")
NAME = "mqtt.homelab.example"
# The mount ends with the process; `exec` keeps its pid.
IN_NAMESPACE = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'


# The resolvers have one address each on this machine.
pytestmark = pytest.mark.xdist_group("resolvers")


@pytest.fixture
def questions() -> Iterator[socket.socket]:
    """What the first of the resolvers is asked."""
    if os.geteuid() != 0:
        pytest.skip("needs a mount namespace and port 53: run as root")
    with ExitStack() as cleanup:
        mute = [
            cleanup.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            for _ in RESOLVERS
        ]
        for resolver, address in zip(mute, RESOLVERS, strict=True):
            resolver.bind((address, 53))
        mute[0].settimeout(15)
        yield mute[0]


@pytest.fixture
def start(
    pipeline: Pipeline, questions: socket.socket, tmp_path: Path
) -> Iterator[Callable[..., Ingester]]:
    """Start an ingester, with these variables, which asks those resolvers for its broker."""
    configuration = tmp_path / "resolv.conf"
    servers = "".join(f"nameserver {address}\n" for address in RESOLVERS)
    configuration.write_text(f"{servers}search homelab.example\n")
    arguments = ("--mount", "sh", "-c", IN_NAMESPACE, str(configuration))
    started: list[Ingester] = []

    def start_one(**variables: str) -> Ingester:
        ingester = Ingester(
            pipeline.environment | {"MQTT_HOST": NAME} | variables,
            tmp_path / "ingester.log",
            python="unshare",
            arguments=(*arguments, sys.executable, "-m", "ingester.app"),
        )
        started.append(ingester)
        ingester.start()
        return ingester

    yield start_one
    for ingester in started:
        ingester.kill()


def drain(questions: socket.socket) -> None:
    """Forget what was asked up to now."""
    while select.select([questions], [], [], 0)[0]:
        questions.recv(512)


def is_asked_for(question: bytes) -> bool:
    """Whether a packet of DNS asks for NAME."""
    return b"".join(bytes([len(label)]) + label.encode() for label in NAME.split(".")) in question


@pytest.mark.faults
def test_a_loop_that_hangs_ends_the_process_with_a_traceback_of_where(
    questions: socket.socket, start: Callable[..., Ingester]
) -> None:
    # For minutes, in place of the seconds that the ingester allows.
    ingester = start(RES_OPTIONS="timeout:30 attempts:5")
    while not is_asked_for(questions.recv(512)):
        pass
    wait_until(lambda: not ingester.running, "the process to end itself", 60)
    assert ingester.returncode == -signal.SIGALRM
    _, _, traceback = ingester.log().partition("most recent call first")
    assert "getaddrinfo" in traceback
    assert "ingester/app.py" in traceback


@pytest.mark.faults
def test_a_name_that_nobody_answers_for_is_logged_and_the_process_goes_on(
    questions: socket.socket, start: Callable[..., Ingester]
) -> None:
    ingester = start()
    ingester.wait_for_log(f"cannot connect to {NAME}", 25)
    drain(questions)
    assert is_asked_for(questions.recv(512))  # it tries again
    assert ingester.stop() == 0
