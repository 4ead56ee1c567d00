"""The hot path: one batch of messages in, what is to be published out.

What it does: decodes, stores, keeps what cannot be stored, and answers each event. What it
does not: receive, publish or PUBACK.

Invariant: when ingest() returns, every event of the batch is a committed row of `events`
or of `dead_letters`. When it raises, nothing may be PUBACKed, and the same batch can be
given again: what was stored comes out as a duplicate, which gets the very same ACK.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import tzinfo
from typing import NamedTuple

from ingester.broker import Message
from ingester.event import Event, decode, elements
from ingester.rejection import DeadLetter, Reason, Rejection
from ingester.reply import Reply, ack, ack_for, dead_letter_for
from ingester.store import Outcome, Store
from ingester.topic import Topics

# Once a batch has this many events, its other messages wait for the next one: a message may
# hold a thousand, each with an answer.
EVENTS_MAX = 5_000


class Ingested(NamedTuple):
    """How many of the messages were ingested, what to publish, and what to count."""

    messages: int
    replies: list[Reply]
    counts: Counter[str]


class Decoded(NamedTuple):
    """A message and what its payload held; device_id is None if its topic names none."""

    message: Message
    device_id: str | None
    results: list[Event | Rejection]
    is_array: bool


def ingest(
    messages: Sequence[Message], store: Store, topics: Topics, default_tz: tzinfo
) -> Ingested:
    """Store the events of the messages, or of the first of them; say what to publish.

    Raises StoreUnavailable.
    """
    batch: list[Decoded] = []
    size = 0
    for message in messages:
        batch.append(_decode(message, topics, default_tz))
        size += len(batch[-1].results)
        if size >= EVENTS_MAX:
            break
    events = [result for item in batch for result in item.results if isinstance(result, Event)]
    outcomes = store.insert(events)
    counts = _counts(len(batch), size, outcomes)

    outcome = iter(outcomes)
    acks: list[Reply] = []
    letters: list[DeadLetter] = []
    for item in batch:
        rejections = [
            _rejection(next(outcome) if isinstance(result, Event) else result)
            for result in item.results
        ]
        acks += _acks(item, rejections, topics)
        letters += _dead_letters(item, rejections)

    ids = store.keep(letters)
    counts["dead_lettered"] = len(letters)
    dead_letters = [
        dead_letter_for(topics.deadletter, letter_id, letter)
        for letter_id, letter in zip(ids, letters, strict=True)
    ]
    return Ingested(len(batch), acks + dead_letters, counts)


def _counts(messages: int, received: int, outcomes: list[Outcome | Rejection]) -> Counter[str]:
    stored, duplicates = outcomes.count(Outcome.STORED), outcomes.count(Outcome.DUPLICATE)
    return Counter(
        messages=messages,
        received=received,
        stored=stored,
        duplicates=duplicates,
        rejected=received - stored - duplicates,
    )


def _decode(message: Message, topics: Topics, default_tz: tzinfo) -> Decoded:
    device_id = topics.device_id(message.topic)
    try:
        if device_id is None:
            # A kept session still delivers what an earlier MQTT_EVENTS_TOPIC matched.
            raise Rejection(Reason.DEVICE_MISMATCH, "the topic is not one of MQTT_EVENTS_TOPIC")
        decoded = decode(device_id, message.payload, default_tz)
    except Rejection as rejection:
        return Decoded(message, device_id, [rejection], is_array=False)
    if isinstance(decoded, list):
        return Decoded(message, device_id, decoded, is_array=True)
    return Decoded(message, device_id, [decoded], is_array=False)


def _rejection(verdict: Outcome | Rejection) -> Rejection | None:
    """Return why an event is refused; None if its row is there, which is all that counts."""
    if isinstance(verdict, Rejection):
        return verdict
    if verdict is Outcome.CONFLICT:
        return Rejection(
            Reason.EVENT_ID_CONFLICT, "event_id: was stored before with other content, which stays"
        )
    return None


def _acks(item: Decoded, rejections: list[Rejection | None], topics: Topics) -> list[Reply]:
    """Return the one ACK of a message, or none if there is no topic to send it to."""
    device_id = item.device_id
    if device_id is None or (topic := topics.ack(device_id)) is None:
        return []
    answers = [
        ack(device_id, result.event_id, rejection)
        for result, rejection in zip(item.results, rejections, strict=True)
    ]
    return [ack_for(topic, answers if item.is_array else answers[0])]


def _dead_letters(item: Decoded, rejections: list[Rejection | None]) -> list[DeadLetter]:
    """Return what to keep of a message: each refused event, whole."""
    if not any(rejections):
        return []
    payload = item.message.payload
    payloads = elements(payload, len(rejections)) if item.is_array else [payload]
    return [
        DeadLetter(
            received_at=item.message.received_at,
            reason=rejection.reason,
            error=rejection.error,
            topic=item.message.topic,
            device_id=item.device_id,
            event_id=result.event_id,
            payload=own_payload,
        )
        for result, rejection, own_payload in zip(item.results, rejections, payloads, strict=True)
        if rejection is not None
    ]
