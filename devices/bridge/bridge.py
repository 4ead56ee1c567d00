"""The bridge at work: messages in, events into the outbox, PUBACK; and the outbox's way out.

What it does: one loop over the sessions of the other side and the link of ours. What it does not:
understand a message (translate.py), or keep an event (the outbox).

Invariant: a message is PUBACKed after its events are committed to the outbox, never before; and
one that is delivered again after that makes no second event.
"""

import logging
import os
import select
import sqlite3
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from devices.bridge.complaints import Complaints
from devices.bridge.config import Configuration
from devices.bridge.deadends import ID_BEGIN, DeadEnds
from devices.bridge.names import DeviceNames
from devices.bridge.received import Received
from devices.bridge.session import Arrived, Session
from devices.bridge.template import groups, overlap
from devices.bridge.translate import Incoming, Translator
from devices.python.telemetry import (
    Event,
    EventRefused,
    Outbox,
    PahoLink,
    Rejected,
    StoreFull,
)

TURN_SECONDS_MAX = 0.5
COUNTS_SECONDS = 60.0
VICTRON_SECONDS = 50.0
# In the outbox: about 300 MB. Above it the oldest are dropped, and the gap is told.
EVENTS_MAX = 1_000_000
BYTES_MAX = 512 * 1024 * 1024
# Of a topic in a line of the log.
SHOWN_CHARS_MAX = 120

log = logging.getLogger("bridge")


class Bridge:
    """Both sides, and what is between them. Raises what opening an Outbox raises."""

    def __init__(self, configuration: Configuration, heartbeat_file: str | None = None) -> None:
        self._configuration = configuration
        self._heartbeat_file = heartbeat_file
        topics = configuration.topics
        self._outbox = Outbox(
            configuration.store,
            events_max=EVENTS_MAX,
            bytes_max=BYTES_MAX,
            events_topic=topics.events.replace("+", "{device_id}"),
            acks_topic=topics.acks,
        )
        self._dead_ends = DeadEnds(self._outbox.waiting_ids(ID_BEGIN), time.monotonic)
        self._outbox.on_rejected = self._on_rejected
        self._outbox.on_dropped = self._dead_ends.gone
        self._received = Received()
        self._outbox.add_all([], also=self._received.open)
        self._translator = Translator(
            configuration.sources,
            DeviceNames(self._received.names),
        )
        ours = configuration.ours
        self._link = PahoLink(
            self._outbox,
            ours.host,
            ours.port,
            ours.username,
            ours.password,
            ours.ca_file,
            tls=ours.tls,
        )
        self._filters = groups(configuration.sources.filters)
        # Of an earlier configuration there may have been more sessions. Without filters they get
        # nothing new, and what they still have is the first session's to store, or nobody's.
        known = max(self._received.filters, default=-1) + 1
        self._filters += [[] for _ in range(len(self._filters), known)]
        self._outbox.add_all(
            [], also=lambda connection: Received.write_filters(connection, self._filters)
        )
        self._sessions = [
            Session(
                configuration.theirs,
                f"{configuration.theirs.client_id}-in-{number}",
                filters,
                former=self._received.filters.get(number - 1, []),
            )
            for number, filters in enumerate(self._filters, 1)
        ]
        self._seen_connections = [0] * len(self._sessions)
        self._complaints = Complaints(time.monotonic)
        self._counts: Counter[str] = Counter()
        self._counts_at = time.monotonic() + COUNTS_SECONDS
        self._portals: dict[str, float] = {
            portal: 0.0 for portal in configuration.victron_portals if portal != "+"
        }
        self._beat_at = 0.0
        self.is_stopping = False

    def run(self) -> None:
        """Work until is_stopping is set. Raises an OutboxError that no waiting helps against."""
        for number, filters in enumerate(self._filters, 1):
            log.info("session %d reads %s", number, " ".join(filters))
        while not self.is_stopping:
            self._wait()
            for number, session in enumerate(self._sessions):
                arrived = session.read()
                self._note_connection(number, session)
                if arrived:
                    self._take(number, session, arrived)
            self._link.loop(0)
            self._do_what_is_due()
        for session in self._sessions:
            session.close()
        self._link.close()
        self._outbox.close()
        self._log_counts()

    def _wait(self) -> None:
        sockets = [each for session in self._sessions if (each := session.socket) is not None]
        writing = [s.socket for s in self._sessions if s.wants_to_write and s.socket is not None]
        if (own := self._link.socket()) is not None:
            sockets.append(own)
        has_unread = any(session.has_unread for session in self._sessions)
        if sockets:
            select.select(sockets, writing, [], 0 if has_unread else TURN_SECONDS_MAX)
        else:
            time.sleep(TURN_SECONDS_MAX)

    def _note_connection(self, number: int, session: Session) -> None:
        if session.is_up and self._seen_connections[number] != session.connection:
            self._seen_connections[number] = session.connection
            if session.is_fresh:
                self._received.session_lost(number)

    # --- messages in ------------------------------------------------------------------------

    def _take(self, number: int, session: Session, arrived: list[Arrived]) -> None:
        """Make events of messages, keep them, and PUBACK."""
        events: list[Event] = []
        dead_ends: list[Event] = []
        now = datetime.now(UTC)
        for message in arrived:
            self._counts["messages"] += 1
            # Of filters that overlap each has a session of its own, and one of them the message.
            if not self._is_for(number, message.topic):
                continue
            if self._received.is_taken(number, message):
                self._counts["delivered again"] += 1
                continue
            events += self._events(message, now, dead_ends)
        rows = self._received.note(number, arrived)
        names = self._translator.names.new

        def also(connection: sqlite3.Connection) -> None:
            self._received.write(connection, rows, names)

        for result in self._keep([*events, *dead_ends], also):
            if isinstance(result, EventRefused):
                self._complaints.add("an event was refused by the outbox", str(result))
        names.clear()
        self._counts["events"] += len(events)
        session.settle(arrived)

    def _is_for(self, number: int, topic: str) -> bool:
        """Tell whether this session is the first whose filters bring the topic."""
        if len(self._filters) == 1:
            return True
        for index, filters in enumerate(self._filters):
            if any(overlap(each, topic) for each in filters):
                return index == number
        return number == 0

    def _keep(self, events: list[Event], also: Any) -> list[Any]:
        """Commit; while the disk is full, wait and try again, with nothing PUBACKed."""
        while True:
            try:
                return self._outbox.add_all(events, also)
            except StoreFull as error:
                self._complaints.add("the outbox's disk is full, nothing is taken", str(error))
            for _ in range(4):
                for each in self._sessions:
                    each.keep_alive()
                self._link.loop(TURN_SECONDS_MAX)
                if self.is_stopping:
                    raise SystemExit(1)

    def _events(self, arrived: Arrived, now: datetime, dead_ends: list[Event]) -> list[Event]:
        message = Incoming(
            arrived.topic,
            arrived.payload,
            arrived.retained,
            now,
            is_redelivered=arrived.is_redelivered,
        )
        translation = self._translator.translate(message)
        for reason, count in translation.skipped.items():
            self._counts[reason] += count
        if translation.source == "victron":
            self._note_portal(arrived.topic)
        if translation.dead_end is not None:
            self._counts[f"dead end: {translation.dead_end}"] += 1
            self._complaints.add(translation.dead_end, arrived.topic[:SHOWN_CHARS_MAX])
            event = self._dead_ends.event(message, translation.dead_end, translation.device_id)
            if event is not None:
                dead_ends.append(event)
        return translation.events

    # --- what is due --------------------------------------------------------------------------

    def _note_portal(self, topic: str) -> None:
        place = self._configuration.sources.place(topic)
        portal = place.levels.get("portal") if place else None
        if portal and "+" in self._configuration.victron_portals and len(self._portals) < 100:
            self._portals.setdefault(portal, 0.0)

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        for portal, due_at in self._portals.items():
            if now >= due_at and self._sessions[0].is_up:
                # Victron publishes only while somebody asks for it.
                self._sessions[0].publish(f"R/{portal}/keepalive", b"")
                self._portals[portal] = now + VICTRON_SECONDS
        if now >= self._counts_at:
            self._counts_at = now + COUNTS_SECONDS
            self._log_counts()
        if self._heartbeat_file and now >= self._beat_at:
            self._beat_at = now + 1.0
            if self._link.is_connected() and all(session.is_up for session in self._sessions):
                with open(self._heartbeat_file, "ab"):
                    os.utime(self._heartbeat_file)

    def _log_counts(self) -> None:
        if not self._counts:
            return
        told = ", ".join(f"{name} {count}" for name, count in sorted(self._counts.items()))
        log.info("%s; waiting %d, dropped %d", told, self._outbox.waiting(), self._outbox.dropped())
        self._counts.clear()

    def _on_rejected(self, rejected: Rejected) -> None:
        if rejected.event_id.startswith(ID_BEGIN):  # what it is for
            self._dead_ends.gone(rejected.event_id)
            return
        self._counts["rejected"] += 1
        kind = f"the ingester rejects what came from {_source_topic(rejected.payload)}"
        self._complaints.add(kind, f"{rejected.event_id}: {rejected.reason}: {rejected.error}")


def _source_topic(payload: bytes) -> str:
    begin = payload.find(b'"topic":"')
    if begin < 0:
        return "an unknown topic"
    begin += len(b'"topic":"')
    return payload[begin : payload.find(b'"', begin)].decode("utf-8", "replace")[:SHOWN_CHARS_MAX]
