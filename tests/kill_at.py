"""The real ingester, which kills itself by SIGKILL at a named step: for the fault tests.

    python -m tests.kill_at STEP N

What it does: puts the kill around a method of Store, of Broker or of paho's client, from
outside, and runs ingester.app. What it does not: change what those do, or ask shipped code
for a hook.

Invariant: it dies at the N-th time that the step is reached, and at no other moment.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from paho.mqtt import client as paho

from ingester import app
from ingester.broker import Broker
from ingester.store import Store

Method = Callable[..., Any]


class Kill:
    """Counts how often the step is reached."""

    def __init__(self, number: int) -> None:
        self._left = number

    def reached(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, method: Method) -> Method:
        def killed_before(*arguments: Any, **named: Any) -> Any:
            self.reached()
            return method(*arguments, **named)

        return killed_before

    def after(self, method: Method) -> Method:
        def killed_after(*arguments: Any, **named: Any) -> Any:
            result = method(*arguments, **named)
            self.reached()
            return result

        return killed_after


def before_insert(kill: Kill) -> None:
    """A batch was received, nothing else."""
    Store.insert = kill.before(Store.insert)  # type: ignore[method-assign]


def after_commit(kill: Kill) -> None:
    """The events are rows, and nobody knows."""
    Store.insert = kill.after(Store.insert)  # type: ignore[method-assign]


def after_replies(kill: Kill) -> None:
    """All replies of the batch are with the socket, and none of its messages is PUBACKed."""
    settle, ack = Broker.settle, paho.Client.ack
    first = False

    def settle_noting_the_first(*arguments: Any, **named: Any) -> Any:
        nonlocal first
        first = True
        return settle(*arguments, **named)

    def ack_killed_before_the_first(*arguments: Any, **named: Any) -> Any:
        nonlocal first
        if first:
            first = False
            kill.reached()
        return ack(*arguments, **named)

    Broker.settle = settle_noting_the_first  # type: ignore[method-assign]
    paho.Client.ack = ack_killed_before_the_first  # type: ignore[method-assign]


def amid_pubacks(kill: Kill) -> None:
    """Some messages of the batch are PUBACKed."""
    paho.Client.ack = kill.after(paho.Client.ack)  # type: ignore[method-assign]


def after_puback(kill: Kill) -> None:
    """The whole batch is PUBACKed."""
    Broker.settle = kill.after(Broker.settle)  # type: ignore[method-assign]


STEPS: dict[str, Callable[[Kill], None]] = {
    "before-insert": before_insert,
    "after-commit": after_commit,
    "after-replies": after_replies,
    "amid-pubacks": amid_pubacks,
    "after-puback": after_puback,
}


if __name__ == "__main__":
    STEPS[sys.argv[1]](Kill(int(sys.argv[2])))
    sys.exit(app.main())
