"""Whether the session with the broker is up, and if not, why and what to do about it.

What it does: tells a lost connection from a refused one, a session that is taken over and a
subscription without the right to it, and counts what the broker says that it drops. What it does
not: connect (broker.py).

Invariant: each cause is logged in words that name the setting or the broker's option to look at,
and no more often than Outage allows.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

from ingester.outage import REMINDER_SECONDS, Outage
from ingester.settings import Settings

log = logging.getLogger(__name__)

# A connection that lasts less than this, several times in a row, while the broker is there
# each time: somebody else takes the session over.
SHORT_LIVED_SECONDS = 10.0
SHORT_LIVED_MAX = 3
UNANSWERED = (
    "{where} ends the connection without an answer: it may want TLS (MQTT_TLS), or a client"
    " certificate (MQTT_CERT_FILE), or not take ours"
)
SILENT = (
    "{where} takes the connection, and has sent no CONNACK in {seconds:.0f} s: it hangs or is"
    " overloaded, or MQTT_PORT is not that of an MQTT listener"
)
SESSION_LOST = (
    "the broker had lost this session: the events that it had queued are gone. Devices send"
    " again what they have heard no ACK for"
)
# More digits than any count has: int() refuses thousands of them.
DROPPED_DIGITS_MAX = 20


class Availability:
    """Whether the session is up, why it is not, and when to try again."""

    def __init__(self, client_id: str) -> None:
        self._client_id = client_id
        self._outage = Outage("MQTT")
        self._began_at = 0.0
        self._short_lived = 0
        self.connected = False
        # Why we ended the connection, or the broker did; MQTT 3.1.1 has no words for it.
        self.error = ""
        self.error_level = logging.WARNING

    def pause_seconds(self) -> float:
        """Return how long to wait before the next try; 0 when it may be now."""
        return self._outage.pause_seconds()

    def connecting(self, error: str) -> None:
        """Note a try, and what is to be said if it is ended before it is accepted."""
        self.error, self.error_level = error, logging.WARNING

    def accepted(self) -> None:
        """Note that the broker takes the connection."""
        self.error = "connection lost"
        self._began_at = time.monotonic()

    def subscribed(self) -> None:
        """Note that the session is up."""
        self.connected = True
        self._outage.recovered()

    def unreachable(self, error: str) -> None:
        """Note that there is no connection at all."""
        self._short_lived = 0
        self._outage.failed(error)

    def disconnected(self, *, is_intended: bool) -> None:
        """Note that the connection has ended."""
        was_connected, self.connected = self.connected, False
        if is_intended:
            return
        if was_connected and time.monotonic() - self._began_at < SHORT_LIVED_SECONDS:
            self._short_lived += 1
        elif was_connected:
            self._short_lived = 0
        if self._short_lived >= SHORT_LIVED_MAX:
            self.error = (
                "the connection is lost soon after it is made, again and again: another client"
                f" with the client id {self._client_id} takes the session over, or the broker, or"
                " the line to it, comes and goes"
            )
            if self._short_lived == SHORT_LIVED_MAX:
                log.warning("MQTT: %s", self.error)
        self._outage.failed(self.error, self.error_level)


class DroppedCount:
    """How many messages the broker has dropped since it started, for whatever client."""

    def __init__(self) -> None:
        self.messages: int | None = None  # None until the broker says so
        self._said_at = float("-inf")

    def update(self, payload: bytes) -> None:
        """Note what the broker says; warn of more, at most once a minute."""
        if not payload.isdigit() or len(payload) > DROPPED_DIGITS_MAX:
            return
        before, self.messages = self.messages or 0, int(payload)
        now = time.monotonic()
        if self.messages > before and now - self._said_at >= REMINDER_SECONDS:
            self._said_at = now
            log.warning(
                "MQTT: the broker has dropped %d messages since it started: a queue is full, of"
                " this or another client (docs/troubleshooting.md)",
                self.messages,
            )


def right_to_read(settings: Settings, topic: str) -> str:
    """Say what the broker must allow for a subscription."""
    name = settings.mqtt_username
    who = f"the user {name}" if name is not None else "clients without a user name"
    return f"its access list (ACL) must give {who} the right to subscribe to and read {topic}"


def grant_problem(settings: Settings, codes: Sequence[Any]) -> str:
    """Say what is wrong with a SUBACK's code for the events; nothing if it is good."""
    topic = settings.topics.events
    if not codes or codes[0].is_failure:
        problem = f"the broker refuses the subscription to {topic}"
    elif codes[0].value == 0:
        problem = (
            f"the broker grants {topic} with QoS 0 alone, with which events are lost: it must"
            " allow QoS 1 (max_qos in mosquitto.conf)"
        )
    else:
        return ""
    return f"{problem}: {right_to_read(settings, topic)}"
