"""The JSON corpus, put through decode(): what is stored, what is refused, and why.

What it does: puts each document of json_corpus.py into an event as its meta, and the
document itself in the event's place. What it does not: servers; the end-to-end test of the
same corpus is in test_ingester.py.
"""

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC

from ingester.event import PAYLOAD_BYTES_MAX, Event, decode
from ingester.rejection import Reason, Rejection
from tests.support.each import each
from tests.support.json_corpus import DOCUMENTS, Document, Expected, Grammar, event_with

DEVICE = "corpus"


def result_of(payload: bytes) -> Event | Rejection:
    (result,) = decode(DEVICE, payload, UTC).results
    return result


def those(expected: Expected) -> Callable[[Callable[[Document], None]], Callable[[], None]]:
    return each(
        lambda: [document for document in DOCUMENTS if document.expected is expected],
        lambda document: document.name,
    )


@those(Expected.STORED)
def test_a_valid_object_is_stored_as_it_is(document: Document) -> None:
    event = result_of(event_with(document, DEVICE, "1"))
    assert isinstance(event, Event)
    assert json.loads(event.meta) == (json.loads(document.data) or {})


@those(Expected.REJECTED)
def test_a_document_that_is_no_meta_is_rejected_for_its_reason(document: Document) -> None:
    rejection = result_of(event_with(document, DEVICE, "1"))
    assert isinstance(rejection, Rejection)
    if document.reason is not None:
        assert rejection.reason is document.reason
    if rejection.reason is Reason.INVALID_FIELD:
        assert rejection.error.startswith("meta: ")
    assert rejection.event_id == "1"
    assert 0 < len(rejection.error) < 200


@those(Expected.EITHER)
def test_what_is_left_open_is_stored_or_rejected_and_nothing_else(document: Document) -> None:
    result = result_of(event_with(document, DEVICE, "1"))
    if isinstance(result, Event):
        assert type(json.loads(result.meta)) is dict
    else:
        assert result.reason in (Reason.INVALID_FIELD, Reason.NOT_JSON)


# Harmless around a payload, and not within.
HARMLESS = ["whitespace, U+0000 at the end", "whitespace, byte order mark"]


@each(lambda: DOCUMENTS, lambda document: document.name)
def test_a_document_in_the_events_place_is_no_event(document: Document) -> None:
    decoded = decode(DEVICE, document.data, UTC)
    reasons = set()
    for rejection in decoded.results:
        assert isinstance(rejection, Rejection)
        assert rejection.event_id is None
        reasons.add(rejection.reason)
    if document.reason is Reason.INVALID_FIELD or document.name in HARMLESS:
        return
    no_json = bool(reasons & {Reason.NOT_JSON, Reason.NOT_UTF8})
    assert no_json == (document.grammar is Grammar.INVALID)
    assert decoded.is_whole == no_json


def test_the_corpus_is_large_and_each_name_can_serve_as_an_event_id() -> None:
    assert Counter(document.grammar for document in DOCUMENTS).keys() == set(Grammar)
    assert len(DOCUMENTS) >= 150
    names = [document.name for document in DOCUMENTS]
    assert len(set(names)) == len(names)
    for document in DOCUMENTS:
        assert len(document.name) <= 200
        assert document.name.isascii()
        assert document.name.isprintable()
        assert len(event_with(document, "d" * 64, "e" * 200)) <= PAYLOAD_BYTES_MAX
