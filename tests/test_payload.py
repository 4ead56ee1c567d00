"""Payloads that are not JSON, or not quite: what can be read of them, and what that costs.

What it does: damages payloads as buffers, cables and printf do, and compares the event ids
that decode() answers with those that were in it; cuts elements out of arrays; holds the time
to be proportional to the bytes. What it does not: the contract of a field (test_event.py), or
the grammar of JSON (test_json_corpus.py).
"""

import gc
import json
import time
from collections.abc import Callable
from datetime import UTC
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ingester.event import PAYLOAD_BYTES_MAX, Decoded, decode
from ingester.payload import elements
from ingester.rejection import Reason, Rejection
from tests.support.each import cases

DEVICE = "d"
DAMAGES = 300
# A slow or busy machine is no reason to fail.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def event(event_id: object, **fields: Any) -> dict[str, Any]:
    required = {"schema": 1, "event_id": event_id, "device_id": DEVICE, "event_type": "t"}
    return required | {"value": 21.5} | fields


def decoded(payload: bytes | str) -> Decoded:
    data = payload if isinstance(payload, bytes) else payload.encode()
    return decode(DEVICE, data, UTC)


def ids_of(payload: bytes | str, reason: Reason = Reason.NOT_JSON) -> list[str | None]:
    """Return the ids that are answered of a payload that is refused as a whole."""
    result = decoded(payload)
    assert result.is_whole
    assert {item.reason for item in result.results if isinstance(item, Rejection)} == {reason}
    # The text is shared, so that a thousand answers hold no more than one.
    assert len({id(item.error) for item in result.results if isinstance(item, Rejection)}) == 1
    return [item.event_id for item in result.results]


# --- ids in what is not JSON ---------------------------------------------------------

ONE = '{"schema":1,"event_id":"a","device_id":"d","event_type":"t","value":21.5}'
TWO = ONE.replace('"a"', '"b"')
WITHIN = '{"event_id":"within"}'

DAMAGED: dict[str, tuple[str, list[str | None]]] = {
    "decimal comma": (ONE.replace("21.5", "21,5"), ["a"]),
    "decimal comma before the id": ('{"value":21,5,"event_id":"a"}', ["a"]),
    "decimal comma in an array": (f"[{ONE.replace('.', ',')},{TWO}]", ["a", "b"]),
    "a word that is none": ('{"value":undefined,"event_id":"a"}', ["a"]),
    "a time without quotes": ('{"ts_device":2026-02-10T00:00:00Z,"event_id":"a"}', ["a"]),
    "no value": ('{"value":,"event_id":"a"}', ["a"]),
    "trailing comma": (ONE[:-1] + ",}", ["a"]),
    "trailing comma in an array": (f"[{ONE},{TWO},]", ["a", "b"]),
    "two run together": (ONE + TWO, ["a", "b"]),
    "two on lines": (f"{ONE}\n{TWO}\r\n", ["a", "b"]),
    "two without brackets": (f"{ONE},{TWO}", ["a", "b"]),
    "two arrays run together": (f"[{ONE}][{TWO}]", ["a", "b"]),
    "no comma in an array": (f"[{ONE}{TWO}]", ["a", "b"]),
    "no comma, but a space": (f"[{ONE} {TWO}]", ["a", "b"]),
    "with a word behind": (ONE + " ok", ["a"]),
    "array not closed": (f"[{ONE},{TWO}", ["a", "b"]),
    "event not closed": (f"[{ONE},{TWO[:-1]}", ["a", "b"]),
    "closed twice": (ONE + "}", ["a"]),
    "closed once too often before another": (f"{ONE}}}{TWO}", ["a"]),
    "closed by a bracket": (f"[{ONE[:-1]}],{TWO}]", ["a"]),
    "a string that is not closed": ('{"event_id":"a","unit":"C', ["a"]),
    "an id that is not closed": ('{"event_id":"a', [None]),
    "an id that ends in its escape": ('{"event_id":"a\\"', [None]),
    "an id behind an escaped backslash": ('{"event_id":"a\\\\"', ["a\\"]),
    "an id without anything behind": ('{"event_id":"a"', ["a"]),
    "an id by escapes": ('{"event_id":"\\u0061\\"\\/\\ud83d\\ude00ä",}', ['a"/\U0001f600ä']),
    "an id by a wrong escape": ('{"event_id":"\\x61",}', [None]),
    "an id of half a pair": ('{"event_id":"\\ud800",}', [None]),
    "an id with a raw tab": ('{"event_id":"a\tb",}', [None]),
    "an empty id": ('{"event_id":"",}', [None]),
    "an id of 200": ('{"event_id":"' + "x" * 200 + '",}', ["x" * 200]),
    "an id of 201": ('{"event_id":"' + "x" * 201 + '",}', [None]),
    "an id that is a number": ('{"event_id":7,}', [None]),
    "an id that is null": ('{"event_id":null,"x":"y",}', [None]),
    "an id that is the key": ('{"event_id":"event_id",}', ["event_id"]),
    "an id that has a value": ('{"event_id":"a":"b",}', [None]),
    "the key that has a value": ('{"event_id":"event_id":"b",}', [None]),
    "an id twice": ('{"event_id":"a","event_id":"b",}', ["b"]),
    "an id twice, around meta": (
        '{"event_id":"a","meta":[{"event_id":"within"}],"event_id":"b",}',
        ["b"],
    ),
    "the same id of two": (f"[{ONE},{ONE},]", ["a", "a"]),
    "an id with spaces around": ('{ "event_id"\n:\t"a" ,}', ["a"]),
    "a key of other letters": ('{"Event_id":"a","event_id ":"b","eventid":"c",}', [None]),
    "a key by an escape": ('{"event\\u005fid":"a",}', [None]),
    "no colon": ('{"event_id" "a",}', [None]),
    "only in meta": (f'{{"meta":{WITHIN},}}', [None]),
    "in meta and own": (f'{{"meta":{WITHIN},"event_id":"a",}}', ["a"]),
    "own and in meta": (f'{{"event_id":"a","meta":{WITHIN},}}', ["a"]),
    "in a meta that is not closed": ('{"event_id":"a","meta":{"event_id":"within"', ["a"]),
    "in an array in meta": (f'{{"event_id":"a","meta":{{"x":[{WITHIN},{WITHIN}', ["a"]),
    "in a list": (f'{{"event_id":"a","list":[{WITHIN},{WITHIN}],}}', ["a"]),
    "in a string": ('{"event_id":"a","value":"{\\"event_id\\":\\"within\\"}",}', ["a"]),
    "in a string alone": ('"{\\"event_id\\":\\"within\\"}', [None]),
    "escaped as if in a string": ('{\\"event_id\\":\\"a\\"}', [None]),
    "in a string with quotes of its own": ('{"v":"{"event_id":"within"}","w":1}', [None]),
    "in another object": (f'{{"events":[{WITHIN}],}}', [None]),
    "in another object, its brace lost": (f'"events":[{WITHIN}]}}', [None]),
    "in an object of the array": (f'[{{"x":{WITHIN}}},]', [None]),
    "in an array of the array": (f"[[{WITHIN}],]", [None]),
    "behind a name": (f"data:{WITHIN}", [None]),
    "meta's brace lost": ('{"event_id":"a","meta":"x":1},"event_id":"within"}', ["a"]),
    "meta closed twice": ('{"event_id":"a","meta":{"x":[1]],"event_id":"within"}}', ["a"]),
    "no value before a comma": ('[{"event_id":"a","value":},{"event_id":"b"}]', ["a", "b"]),
    "an opening bracket turned": ('[{"event_id":"a","x":}{"event_id":"within"}]}]', ["a"]),
    "a quote lost": ('{"event_id":"a","unit":"C,"meta":{"event_id":"within"}}', ["a"]),
    "two quotes lost": (
        '{"event_id":"a","unit":"C,"meta":{"x":"y,"event_id":"within"}}',
        ["a"],
    ),
    "an opening quote lost": ('{"event_id":"a","unit":C","meta":{"event_id":"w"}}', ["a"]),
    "the id's quote lost": (f'[{{"event_id":"a,"unit":"C"}},{TWO}]', [None]),
    "the id's opening quote lost": (f'[{{"event_id":a","unit":"C"}},{TWO}]', [None]),
    "the id with a letter behind": ('{"event_id":"a"b,"unit":"C"}', [None]),
    "a comment": (f"/* two */ [{ONE},{TWO}]", [None]),
    "single quotes": ("{'schema':1,'event_id':'a','value':21.5}", ["a"]),
    "Python's repr": (
        str([event("a", on=True, off=None, note="it's"), event("b", meta={"event_id": "no"})]),
        ["a", "b"],
    ),
    "Python's repr of quotes": (str(event('it\'s "a"', x={"it's": 'say "'})), ['it\'s "a"']),
    "Python's repr of braces": (str(event("a", x="}'{", y='"')), ["a"]),
    "Python's repr, cut off": (str(event("a", x="it's"))[:70], ["a"]),
    "single quotes, its string not closed": ("{'event_id':'a", [None]),
    "an apostrophe in JSON": ('{"note":"it\'s","event_id":"it\'s",}', ["it's"]),
    "single quotes within double ones": ('{"x":"\'event_id\':\'no\'","event_id":"a",}', ["a"]),
    "double quotes within single ones": ("{'x':'\"event_id\":\"no\"','event_id':'a'}", ["a"]),
    "a byte order mark": ("\ufeff" + ONE[:-1] + ",}", ["a"]),
    "nan in it too": (ONE.replace("21.5", "nan,"), ["a"]),
    "brackets without end behind it": (ONE + "[" * 100_000, ["a"]),
    "deep in it": (f'[{ONE[:-1]},"x":{"[" * 5000}{"]" * 5000}}},{TWO},]', ["a", "b"]),
}


@cases(("payload", "ids"), DAMAGED.values(), ids=DAMAGED)
def test_of_what_is_not_json_each_id_that_stands_for_certain_is_answered(
    payload: str, ids: list[str | None]
) -> None:
    assert ids_of(payload) == ids
    begins_array = payload.removeprefix("\ufeff").startswith("[")
    assert decoded(payload).is_array == (begins_array or len(ids) > 1)


def test_of_what_is_not_utf8_the_ids_that_are_are_answered() -> None:
    payload = f'[{ONE},{{"event_id":"°"}},{{"event_id":"ü","unit":"ß"}}]'.encode("latin-1")
    assert ids_of(payload, Reason.NOT_UTF8) == ["a"]
    payload = ONE.encode() + TWO.encode()[:-1] + b',"unit":"\xc3"}'
    assert ids_of(payload, Reason.NOT_UTF8) == ["a", "b"]
    assert ids_of(b'\xff{"event_id":"a"}', Reason.NOT_UTF8) == [None]
    for byte in (b"\xc0", b"\xfc", b"\xfd", b"\xfe", b"\xff"):
        broken = b'{"event_id":"x%s","event_id":"y%sz"}' % (byte * 2, byte)
        assert ids_of(broken, Reason.NOT_UTF8) == [None]


def test_of_what_is_too_large_the_ids_at_its_beginning_are_answered() -> None:
    event_json = ONE.replace('"a"', '"%06d"')
    number = PAYLOAD_BYTES_MAX // (len(event_json % 0) + 1)
    payload = "[" + ",".join(event_json % i for i in range(2 * number)) + "]"
    assert ids_of(payload, Reason.PAYLOAD_TOO_LARGE) == [f"{i:06}" for i in range(number)]
    assert decoded(payload).is_array
    assert ids_of(ONE + " " * PAYLOAD_BYTES_MAX, Reason.PAYLOAD_TOO_LARGE) == ["a"]


def test_on_a_topic_of_a_long_device_id_there_is_but_one_answer() -> None:
    # Each would repeat it, and a topic may have 65 kB.
    for payload in (f"[{ONE},{TWO},]", ONE + TWO, f"[{ONE},{TWO}" + " " * PAYLOAD_BYTES_MAX):
        (rejection,) = decode("x" * 65, payload.encode(), UTC).results
        assert rejection.event_id is None
    (rejection,) = decode("x" * 65, ONE[:-1].encode(), UTC).results
    assert rejection.event_id == "a"


def test_json_that_holds_no_event_is_not_searched_for_one() -> None:
    for document in (f'{{"events":[{ONE}]}}', f'{{"event":{ONE}}}', f"[[{ONE}]]", json.dumps(ONE)):
        (result,) = decoded(document).results
        assert result.event_id is None


KEYS = st.sampled_from(["event_id", "meta", "a", "", '"', "{", "\\", "'", ",", "ü"])
STRINGS = st.sampled_from(
    ["event_id", '"event_id":"within"', '{"event_id": "within"}', "},{", '"', "\\", "'", ", ", "ü"]
) | st.text(max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | STRINGS | st.just({"event_id": "within"}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
# Valid ids, none of which is `within`.
IDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
EVENTS = st.builds(
    lambda event_id, before, after: {**before, "event_id": event_id, **after},
    IDS,
    st.dictionaries(KEYS.filter(lambda key: key != "event_id"), VALUES, max_size=2),
    st.dictionaries(KEYS.filter(lambda key: key != "event_id"), VALUES, max_size=2),
)
ARRAYS = st.lists(EVENTS, min_size=1, max_size=4)


def dumped(array: list[dict[str, Any]], data: st.DataObject) -> bytes:
    as_ascii, indent = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1]))
    return json.dumps(array, ensure_ascii=as_ascii, indent=indent).encode("utf-8", "replace")


@pytest.mark.slow
@given(ARRAYS, st.data())
@settings(PATIENT, max_examples=300, derandomize=True)
def test_of_an_array_cut_off_anywhere_each_complete_id_is_answered_in_order(
    array: list[dict[str, Any]], data: st.DataObject
) -> None:
    whole = dumped(array, data)
    payload = whole[: data.draw(st.integers(1, len(whole) - 1))]
    true_ids = [item["event_id"] for item in array]
    result = decoded(payload)
    assert result.is_array
    assert result.is_whole
    ids = [item.event_id for item in result.results if item.event_id is not None]
    assert ids == true_ids[: len(ids)]
    # And none is missing that is complete.
    closed = [len(dumped_to) for dumped_to in ends_of_ids(whole, true_ids)]
    assert len(ids) == sum(end <= len(payload) for end in closed)


def ends_of_ids(whole: bytes, true_ids: list[str]) -> list[bytes]:
    """Return the text up to the end of each event's id, found by parsing ever more of it."""
    ends: list[bytes] = []
    decoder = json.JSONDecoder()
    text = whole.decode()
    at = 1
    for _ in true_ids:
        at += len(text[at:]) - len(text[at:].lstrip(" \n,"))
        end = decoder.raw_decode(text, at)[1]
        key_at = members_of(text, at)["event_id"]
        ends.append(text[: decoder.raw_decode(text, key_at)[1]].encode())
        at = end
    return ends


def members_of(text: str, at: int) -> dict[str, int]:
    """Return where each member's value of the object at `at` begins."""
    decoder = json.JSONDecoder()
    members: dict[str, int] = {}
    at += 1
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \n,"))
        if text[at] == "}":
            return members
        key, at = decoder.raw_decode(text, at)
        at = text.index(":", at) + 1
        at += len(text[at:]) - len(text[at:].lstrip(" "))
        members[key] = at
        at = decoder.raw_decode(text, at)[1]


@pytest.mark.slow
@given(ARRAYS, st.data())
@settings(PATIENT, max_examples=DAMAGES, derandomize=True)
def test_of_an_array_with_one_byte_damaged_no_id_is_answered_that_is_none(
    array: list[dict[str, Any]], data: st.DataObject
) -> None:
    whole = dumped(array, data)
    at = data.draw(st.sampled_from([i for i, byte in enumerate(whole) if byte in b'[]{}",:\\']))
    instead = data.draw(st.sampled_from([b"", b"x", b" ", b",", b'"', b"}", b"\xff"]))
    result = decoded(whole[:at] + instead + whole[at + 1 :])
    assume(result.is_whole)
    true_ids = iter([item["event_id"] for item in array])
    for item in result.results:
        if item.event_id is not None:
            # In the order of the array, and none of another place.
            assert item.event_id in true_ids


# --- elements ------------------------------------------------------------------------


def test_elements_are_the_text_that_was_sent_whatever_stands_in_it() -> None:
    own = [
        *(
            '{"a" : 1.50}',
            "[ ]",
            "null",
            '"ä,]\\"\U0001f600"',
            "true",
            "7",
            '{"b":["\\n",[{},",}"]]}',
        ),
        *('{"v":nan,"w":-Infinity}', "[" * 3000 + "]" * 3000, '{"a":"\\ud800","a":1e999}', "inf"),
    ]
    payload = ("\ufeff [" + " ,\n".join(own) + "\t]\r\n\0").encode()
    assert len(decoded(payload).results) == len(own)
    assert elements(payload, range(len(own))) == [text.encode() for text in own]
    for index, text in enumerate(own):
        assert elements(payload, [index]) == [text.encode()]
    assert elements(payload, [10, 2]) == [b"inf", b"null"]


@pytest.mark.slow
@given(st.lists(VALUES, min_size=1, max_size=5), st.data())
@settings(PATIENT, max_examples=300, derandomize=True)
def test_elements_of_any_array_are_its_elements(values: list[Any], data: st.DataObject) -> None:
    payload = json.dumps(values, indent=data.draw(st.sampled_from([None, 1]))).encode()
    assert [json.loads(text) for text in elements(payload, range(len(values)))] == values


# --- what it costs -------------------------------------------------------------------


def filled(before: bytes, middle: bytes, after: bytes = b"") -> Callable[[int], bytes]:
    """Return what makes such a payload of about so many bytes."""
    return lambda size: before + middle * ((size - len(before) - len(after)) // len(middle)) + after


GOOD = b'{"schema":1,"event_id":"%s","device_id":"d","event_type":"t","meta":%s}'
COSTLY = {
    "open brackets": filled(b"", b"["),
    "open objects": filled(b"", b'{"a":'),
    "closed brackets": filled(b"", b"]"),
    "pairs": filled(b"[", b"[],", b"0]"),
    "quotes": filled(b"", b'"'),
    "single quotes": filled(b"", b"'"),
    "both quotes": filled(b"", b"''\"\""),
    "backslashes": filled(b'{"event_id":"', b"\\"),
    "nan": filled(b"", b"nan"),
    "nan in an array": filled(b"[", b"nan,", b"0]"),
    "signs": filled(b"[", b"-+", b"]"),
    "spaces": filled(b"[", b" ", b"nan"),
    "numbers too large": filled(b"[", b"1e400,", b"0]"),
    "digits": filled(b"[", b"9", b"]"),
    "ids": filled(b"", b'{"event_id":"a"}'),
    "ids of an array": filled(b"[", b'{"event_id":"a"},', b"]"),
    "ids of a valid array": filled(b"[", b'{"event_id":"a"},', b"0]"),
    "keys": filled(b"{", b'"event_id":', b"}"),
    "an id, and brackets": filled(b'{"event_id":"a"}', b"[[1]"),
    "an id, and quotes": filled(b'{"event_id":"a"}', b'"",'),
    "nested deep": filled(b"[", b"[" * 99 + b"]" * 99 + b",", b"0]"),
    "nested 85 deep": filled(b"[", GOOD % (b"a", b'{"a":' * 85 + b"1" + b"}" * 85) + b",", b"0]"),
    "nested at the limit": filled(b"[" * 64, b"[[]],", b"0" + b"]" * 64),
    "nested as a whole": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "a field again and again": filled(b"{", b'"unit":"",', b'"unit":""}'),
    "a field again and again, cut off": filled(b"{", b'"unit":"",'),
    "a text that does not end": filled(b'{"value":"', b"x"),
    "digits of a field": filled(b'{"value":', b"9", b"}"),
    "spaces of a field": filled(b'{"value":', b" "),
    "members of meta": filled(b'{"meta":{', b'"":0.1,', b'"":0.1}}'),
    "members of meta, cut off": filled(b'{"meta":{', b'"":0.1,'),
    "events, cut off": filled(b"[", b'{"event_id":"a"},', b"{"),
    "a wide meta": filled(b'{"event_id":"a","meta":{"a":[', b"[0],", b"nan]}}"),
}


def seconds(payload: bytes) -> float:
    """Return the least time of several that it takes to decode a payload."""
    times = []
    gc.disable()  # what it costs depends on what else is in memory
    try:
        for _ in range(5):
            begin = time.process_time()
            decode(DEVICE, payload, UTC)
            times.append(time.process_time() - begin)
    finally:
        gc.enable()
    return min(times)


@pytest.mark.slow
@cases("payload_of", COSTLY.values(), ids=COSTLY)
def test_the_time_is_proportional_to_the_bytes(payload_of: Callable[[int], bytes]) -> None:
    half, whole = payload_of(PAYLOAD_BYTES_MAX // 4), payload_of(PAYLOAD_BYTES_MAX)
    assert PAYLOAD_BYTES_MAX * 0.9 < len(whole) <= PAYLOAD_BYTES_MAX
    # Four times the bytes: were it quadratic, it would take sixteen times as long.
    assert seconds(whole) < 10 * max(seconds(half), 0.000_5)


def test_what_is_refused_holds_nothing_of_the_payload() -> None:
    payload = b"[" + b", ".join([b"1"] * 1000) + b"]"
    result = decoded(payload)
    assert len({id(item.error) for item in result.results if isinstance(item, Rejection)}) == 1
    for item in result.results:
        assert type(item) is Rejection
        assert [type(field) for field in item] == [Reason, str, type(None)]
