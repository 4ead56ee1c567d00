"""Decoding ahead: what it may change is when a message is decoded, and nothing else.

What it does: lets batches be taken, tried again and lost in any order, with any amount of
decoding ahead between them, and compares with decoding each message when it is its turn.
What it does not: the event contract (test_event.py), or a database; that it is used while
the database works is seen in test_session.py.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingester import decoder as decoder_module
from ingester.decoder import AHEAD_EVENTS, EVENTS_MAX, DecodedMessage, Decoder
from ingester.message import Message
from ingester.topic import Topics
from tests.support.device import event

TOPICS = Topics("qs/v1/+/events", "qs/v1/{device_id}/acks", "qs/v1/deadletter", "qs/v1/status")
PAYLOADS = [
    event(1, "d"),
    [event(2, "d"), event(3, "another")],
    [event(number, "d") for number in range(4, 12)],
    "no event",
]


def message(payload: object, topic: str = "qs/v1/d/events") -> Message:
    text = json.dumps(payload).encode()
    return Message(topic, text, datetime.now(UTC), mid=1, qos=1, connection=1)


def messages(number: int, events_each: int = 1) -> list[Message]:
    events = [event(index, "d") for index in range(events_each)]
    return [message(events if events_each > 1 else events[0]) for _ in range(number)]


def alone(batch: Sequence[Message]) -> list[DecodedMessage]:
    """Return what each message holds, decoded with nothing ahead."""
    return [Decoder(TOPICS, UTC).decode([item])[0] for item in batch]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "ahead", "settle", "lose"]),
        st.integers(min_value=1, max_value=5),
    ),
    max_size=30,
)


@given(steps=STEPS, kinds=st.lists(st.integers(0, 4), min_size=1, max_size=25))
def test_whatever_is_decoded_ahead_a_batch_holds_what_its_messages_hold(
    steps: list[tuple[str, int]], kinds: list[int]
) -> None:
    decoder = Decoder(TOPICS, UTC)

    def arrivals() -> list[Message]:
        foreign = message(PAYLOADS[0], topic="elsewhere")
        return [message(PAYLOADS[kind]) if kind < 4 else foreign for kind in kinds]

    in_hand, taken = arrivals(), 0
    for step, number in steps:
        if step == "take":  # a new batch, or the same one again
            batch = in_hand[:number]
            items = decoder.decode(batch)
            taken = len(items)
            assert [item.message for item in items] == batch
            assert items == alone(batch)
        elif step == "ahead":
            for _ in range(number):
                decoder.decode_ahead(in_hand)
        elif step == "settle":
            del in_hand[:taken]
            taken = 0
        else:  # the connection: all comes again, as other messages
            in_hand, taken = arrivals(), 0


def test_what_is_ahead_is_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, in_hand = Decoder(TOPICS, UTC), messages(10)
    decoder.decode(in_hand[:4])
    assert not decoder.decode_ahead(in_hand)
    monkeypatch.setattr(decoder_module, "decode_payload", None)  # to be called no more
    assert len(decoder.decode(in_hand[4:])) == 6


def test_a_step_ahead_is_short_and_says_whether_there_is_more() -> None:
    decoder, in_hand = Decoder(TOPICS, UTC), messages(2 * AHEAD_EVENTS + 1)
    steps = [decoder.decode_ahead(in_hand) for _ in range(4)]
    assert steps == [True, True, False, False]


def test_no_more_is_taken_or_decoded_ahead_than_one_batch_may_hold() -> None:
    decoder, in_hand = Decoder(TOPICS, UTC), messages(3 * EVENTS_MAX // 1_000 + 3, 1_000)
    batch = decoder.decode(in_hand)
    events = sum(len(item.decoded.results) for item in batch)
    assert EVENTS_MAX <= events < EVENTS_MAX + 1_000
    steps = 0
    while decoder.decode_ahead(in_hand):
        steps += 1
        assert steps < len(in_hand)
    assert decoder._ahead_events == events
