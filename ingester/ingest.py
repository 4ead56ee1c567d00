"""The hot path: one batch of messages in, what is to be published out.

What it does: stores, keeps what cannot be stored, and answers each event. What it
does not: look into a payload (decoder.py), receive, publish or PUBACK.

Invariant: when ingest() returns, every event of the batch is a committed row of `events`
or of `dead_letters`. When it raises, nothing may be PUBACKed, and the same batch can be
given again: what was stored comes out as a duplicate, which gets the very same ACK.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ingester.decoder import DecodedMessage, Decoder
from ingester.event import ARRAY_EVENTS_MAX, Event
from ingester.message import Message
from ingester.payload import elements
from ingester.rejection import DeadLetter, Reason, Rejection
from ingester.reply import Reply, ack, ack_for, dead_letter_for
from ingester.store import Outcome, Store
from ingester.topic import Topics

# Refused elements of one array that are kept one by one; of more, the whole message is kept
# once, so that what a message costs stays in proportion to its bytes.
ELEMENTS_KEPT_MAX = 20
# A broker hands a retained message out again at each connect, also long after retention has
# deleted its row, and would so bring it back each time.
RETAINED = Rejection(
    Reason.NOT_STORABLE, "events must not be retained: publish it again without the retain flag"
)


class Ingested(NamedTuple):
    """What became of the messages that were ingested, and what to publish."""

    messages: int
    received: int  # events, valid or not
    outcomes: list[Outcome | Rejection]  # of the valid ones
    dead_lettered: int
    replies: list[Reply]

    def counts(self) -> Counter[str]:
        """Return what to count."""
        stored = self.outcomes.count(Outcome.STORED)
        duplicates = self.outcomes.count(Outcome.DUPLICATE)
        return Counter(
            messages=self.messages,
            received=self.received,
            stored=stored,
            duplicates=duplicates,
            rejected=self.received - stored - duplicates,
            dead_lettered=self.dead_lettered,
        )


def ingest(
    messages: Sequence[Message],
    store: Store,
    decoder: Decoder,
    work_meanwhile: Callable[[], None] = lambda: None,
) -> Ingested:
    """Store the events of the messages, or of the first of them; say what to publish.

    `work_meanwhile` is called while the database stores them. Raises StoreUnavailable.
    """
    batch = decoder.decode(messages)
    topics = decoder.topics
    fresh = _events(batch, retained=False)
    store.begin_insert(fresh)
    work_meanwhile()
    outcomes = store.finish_insert()
    retained = _events(batch, retained=True)
    found = [outcome or RETAINED for outcome in store.look_up(retained)]

    of_fresh, of_retained = iter(outcomes), iter(found)
    acks: list[Reply] = []
    letters: list[DeadLetter] = []
    for item in batch:
        outcome = of_retained if item.message.retain else of_fresh
        rejections = [
            _rejection(next(outcome), result.event_id) if isinstance(result, Event) else result
            for result in item.decoded.results
        ]
        acks += _acks(item, rejections, topics)
        if any(rejections):
            letters += _dead_letters(item, rejections)

    ids = store.insert_dead_letters(letters)
    dead_letters = [
        dead_letter_for(topics.deadletter, letter_id, letter)
        for letter_id, letter in zip(ids, letters, strict=True)
    ]
    received = sum(len(item.decoded.results) for item in batch)
    replies = acks + dead_letters
    return Ingested(len(batch), received, outcomes + found, len(letters), replies)


def _events(batch: Sequence[DecodedMessage], *, retained: bool) -> list[Event]:
    return [
        result
        for item in batch
        if item.message.retain is retained
        for result in item.decoded.results
        if isinstance(result, Event)
    ]


def _rejection(verdict: Outcome | Rejection, event_id: str) -> Rejection | None:
    """Return why an event is refused; None if its row is there, which is all that counts."""
    if isinstance(verdict, Rejection):
        return verdict._replace(event_id=event_id)
    if verdict is Outcome.CONFLICT:
        error = "event_id: was stored before with other content, which stays"
        return Rejection(Reason.EVENT_ID_CONFLICT, error, event_id)
    return None


def _acks(
    item: DecodedMessage, rejections: Sequence[Rejection | None], topics: Topics
) -> list[Reply]:
    """Return the ACKs of a message: one, none if there is no topic to send it to.

    More than one only where more events were refused than one array may hold.
    """
    device_id = item.device_id
    if device_id is None or (topic := topics.ack(device_id)) is None:
        return []
    answers = [
        ack(device_id, result.event_id, rejection)
        for result, rejection in zip(item.decoded.results, rejections, strict=True)
    ]
    return [
        ack_for(topic, answers[begin : begin + ARRAY_EVENTS_MAX], is_array=item.decoded.is_array)
        for begin in range(0, len(answers), ARRAY_EVENTS_MAX)
    ]


def _dead_letters(item: DecodedMessage, rejections: Sequence[Rejection | None]) -> list[DeadLetter]:
    """Return what to keep of a message with refused events: each, or the whole message once."""
    refused = {index: rejection for index, rejection in enumerate(rejections) if rejection}
    payload = item.message.payload
    first_index, first = next(iter(refused.items()))
    if item.decoded.is_whole or not item.decoded.is_array:
        event_id = item.decoded.results[0].event_id if len(rejections) == 1 else None
        return [_dead_letter(item, first, event_id, payload)]
    if len(refused) > ELEMENTS_KEPT_MAX:
        error = (
            f"{len(refused)} of {len(rejections)} events were refused, the first of them"
            f" (number {first_index + 1}): {first.error}"
        )
        return [_dead_letter(item, first._replace(error=error), None, payload)]
    return [
        _dead_letter(item, refused[index], item.decoded.results[index].event_id, own_payload)
        for index, own_payload in zip(refused, elements(payload, list(refused)), strict=True)
    ]


def _dead_letter(
    item: DecodedMessage, rejection: Rejection, event_id: str | None, payload: bytes
) -> DeadLetter:
    return DeadLetter(
        received_at=item.message.received_at,
        reason=rejection.reason,
        error=rejection.error,
        topic=item.message.topic,
        device_id=item.device_id,
        event_id=event_id,
        payload=payload,
    )
