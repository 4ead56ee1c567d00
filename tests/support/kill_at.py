"""The real ingester, which kills itself by SIGKILL at a named step: for the fault tests.

    python -m tests.support.kill_at STEP N

What it does: puts the kill around a method of Store or of Broker, from outside, and runs
ingester.app. What it does not: change what those do, or ask shipped code for a hook.

Invariant: it dies at the N-th time that the step is reached, and at no other moment.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from ingester import app
from ingester.broker import Broker
from ingester.store import Store

Method = Callable[..., Any]


class Kill:
    """Counts how often the step is reached."""

    def __init__(self, number: int) -> None:
        self._left = number

    def reached(self) -> None:
        if self.is_within(1) is not None:
            die()

    def is_within(self, times: int) -> int | None:
        """Return at which of the next so many times to die; None if at a later one."""
        self._left -= times
        return times + self._left if self._left <= 0 else None

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


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_insert(kill: Kill) -> None:
    """A batch was received, nothing else."""
    Store.begin_insert = kill.before(Store.begin_insert)  # type: ignore[method-assign]


def after_commit(kill: Kill) -> None:
    """The events are rows, and nobody knows."""
    Store.finish_insert = kill.after(Store.finish_insert)  # type: ignore[method-assign]


def after_replies(kill: Kill) -> None:
    """All replies of the batch are with the socket, and none of its messages is PUBACKed.

    As if the one send for all of it had been cut there.
    """
    answer = Broker._answer

    def answer_without_pubacks(broker: Broker, replies: Any, messages: Any) -> Any:
        if kill.is_within(1) is None:
            return answer(broker, replies, messages)
        answer(broker, replies, [])
        return die()

    Broker._answer = answer_without_pubacks  # type: ignore[assignment, method-assign]


def amid_pubacks(kill: Kill) -> None:
    """Some messages of the batch are PUBACKed; the number is that of the PUBACK.

    As if the one send for all of it had been cut there.
    """
    answer = Broker._answer

    def answer_in_part(broker: Broker, replies: Any, messages: Any) -> Any:
        to_puback = [message for message in messages if message.qos > 0]
        if (last := kill.is_within(len(to_puback))) is None:
            return answer(broker, replies, messages)
        answer(broker, replies, to_puback[:last])
        return die()

    Broker._answer = answer_in_part  # type: ignore[assignment, method-assign]


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
