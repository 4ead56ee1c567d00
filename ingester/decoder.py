"""From messages to decoded ones, in their order, and the next ones ahead.

What it does: gathers the decoded messages of a batch, and uses the time in which the database
works to decode what comes after it. What it does not: say what is valid (event.py), or store.

Invariant: what was decoded ahead is used for that very message or not at all. Decoding looks
at nothing else, so it makes no difference when it is done.
"""

from collections import deque
from collections.abc import Sequence
from datetime import tzinfo
from itertools import islice
from typing import NamedTuple

from ingester.event import Decoded
from ingester.event import decode as decode_payload
from ingester.message import Message
from ingester.rejection import Reason, Rejection
from ingester.topic import Topics

# Once a batch has this many events, its other messages wait for the next one: a message may
# hold a thousand, each with an answer. No more than this is decoded ahead.
EVENTS_MAX = 2_500
# Decoded ahead at once, in half a millisecond; then whoever called can look about.
AHEAD_EVENTS = 64


class DecodedMessage(NamedTuple):
    """A message and what its payload held; device_id is None if its topic names none."""

    message: Message
    device_id: str | None
    decoded: Decoded


class Decoder:
    """Decodes by the settings that it was made with."""

    def __init__(self, topics: Topics, default_tz: tzinfo) -> None:
        self.topics = topics
        self._default_tz = default_tz
        self._batch_size = 0
        self._last: DecodedMessage | None = None
        # Of the messages behind those taken.
        self._ahead: deque[DecodedMessage] = deque()
        self._ahead_events = 0

    def decode(self, messages: Sequence[Message]) -> list[DecodedMessage]:
        """Return what the messages hold, or the first of them if that is much."""
        batch: list[DecodedMessage] = []
        events = 0
        for message in messages:
            if self._ahead and self._ahead[0].message is message:
                item = self._ahead.popleft()
                self._ahead_events -= len(item.decoded.results)
            else:
                # Nothing is ahead; or the connection was lost, or a batch is tried again.
                self._ahead.clear()
                self._ahead_events = 0
                item = self._decode(message)
            batch.append(item)
            events += len(item.decoded.results)
            if events >= EVENTS_MAX:
                break
        self._batch_size = len(batch)
        return batch

    def decode_ahead(self, messages: Sequence[Message]) -> bool:
        """Decode some of what comes behind the messages taken; say whether there is more.

        `messages` are all unsettled: those that were taken last, then the others.
        """
        new_events = 0
        for message in islice(messages, self._batch_size + len(self._ahead), None):
            if new_events >= AHEAD_EVENTS:
                return True
            if self._ahead_events >= EVENTS_MAX:
                return False
            item = self._decode(message)
            self._ahead.append(item)
            self._ahead_events += len(item.decoded.results)
            new_events += len(item.decoded.results)
        return False

    def _decode(self, message: Message) -> DecodedMessage:
        # A device that hears no answer, or does not understand it, sends the same again and again.
        last = self._last
        if last and (last.message.payload, last.message.topic) == (message.payload, message.topic):
            return last._replace(message=message)
        self._last = self._decode_anew(message)
        return self._last

    def _decode_anew(self, message: Message) -> DecodedMessage:
        device_id = self.topics.device_id(message.topic)
        if device_id is None:
            # A kept session still delivers what an earlier MQTT_EVENTS_TOPIC matched.
            error = "the topic is not one of MQTT_EVENTS_TOPIC"
            refused = Decoded([Rejection(Reason.DEVICE_MISMATCH, error)], False, True)
            return DecodedMessage(message, None, refused)
        decoded = decode_payload(device_id, message.payload, self._default_tz)
        return DecodedMessage(message, device_id, decoded)
