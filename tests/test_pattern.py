"""The pattern that knows most events: what it knows, and that it is right about that.

What it does: gives it what devices send, and texts of its own grammar that hypothesis puts
together, and compares what decode() makes of them with what it makes by parsing. What it does
not: the contract of a field, test_event.py, which looks at both ways too; that the time is
proportional to the bytes, test_payload.py.
"""

import json
import tracemalloc
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingester.event import PAYLOAD_BYTES_MAX, Event, decode
from ingester.pattern import META_MEMBERS_MAX, recognise
from tests.support.each import cases
from tests.support.pipeline import Database
from tests.test_event import LOS_ANGELES, PATIENT, VALID, both_ways, payload_with

DEVICE = str(VALID["device_id"])
ONE = json.dumps(VALID)
COMPACT = json.dumps(VALID, separators=(",", ":"))

KNOWN = {
    "as Python writes it": ONE,
    "as ArduinoJson writes it": COMPACT,
    "indented": json.dumps(VALID, indent=2) + "\r\n",
    "backwards": json.dumps(dict(reversed(VALID.items()))),
    "the required fields": json.dumps({name: VALID[name] for name in list(VALID)[:4]}),
    "not ASCII": json.dumps(VALID | {"unit": "°C", "value": "grün 😀"}, ensure_ascii=False),
    "an empty text": json.dumps(VALID | {"value": "", "unit": ""}),
    "an empty meta": json.dumps(VALID | {"meta": {}}),
    "all that meta may hold": ONE.replace(
        '{"room": "attic"}',
        '{"a":"","b":-1.5,"c":0.000001,"g":1700000000000,"d":true,"e":false,"f":null,"":5.0}',
    ),
    "an exponent": ONE.replace("21.5", "-2.15e+1"),
    "an offset": ONE.replace("00Z", "00.123456+05:30"),
    "no offset": ONE.replace("00Z", "00"),
    "an array": f"[{ONE},{COMPACT} , {ONE} ]\n",
}
UNSURE = {
    "nothing": "",
    "no event": "{}x",
    "no array": f"[{ONE},]",
    "an empty array": "[]",
    "two arrays": f"[{ONE}]]",
    "an escape": ONE.replace("attic", "\\u0061ttic"),
    "an escaped name": ONE.replace("unit", "\\u0075nit"),
    "a control character": ONE.replace("attic", "at\ttic"),
    "a further field": ONE.replace("{", '{"firmware": "1.0", ', 1),
    "another schema": ONE.replace("1", "2", 1),
    "a schema that only begins so": ONE.replace("1", "1.0", 1),
    "null": ONE.replace("21.5", "null"),
    "an array in meta": ONE.replace('"attic"', '["attic"]'),
    "an object in meta": ONE.replace('"attic"', '{"of": "attic"}'),
    "minus zero, which JSON has as an integer": ONE.replace("21.5", "-0"),
    "a zero in front": ONE.replace("21.5", "021.5"),
    "a decimal comma": ONE.replace("21.5", "21,5"),
    "a number that ends in a point": ONE.replace("21.5", "21."),
    "nan": ONE.replace("21.5", "nan"),
    "a comma too many": ONE[:-1] + ",}",
    "another space": ONE.replace(" ", "\u00a0"),
    "a byte order mark": "\ufeff" + ONE,
    "a NUL at the end": ONE + "\0",
    "a zero that PostgreSQL would keep": ONE.replace('"attic"', "1.50"),
    "minus zero in meta": ONE.replace('"attic"', "-0"),
    "an exponent in meta": ONE.replace('"attic"', "1e5"),
    "a fraction of 16 digits": ONE.replace('"attic"', "1234567890.123457"),
    "a fraction of 7 digits": ONE.replace('"attic"', "123456789.1234567"),
    "an integer of 19 digits": ONE.replace('"attic"', "1234567890123456789"),
}


@cases("payload", KNOWN.values(), ids=KNOWN)
def test_what_devices_send_is_recognised(payload: str) -> None:
    assert recognise(payload.encode())
    results = both_ways(DEVICE, payload.encode(), LOS_ANGELES).results
    assert all(isinstance(result, Event) for result in results)


@cases("payload", UNSURE.values(), ids=UNSURE)
def test_of_anything_else_the_pattern_is_unsure(payload: str) -> None:
    assert recognise(payload.encode()) is None


def test_bytes_that_are_not_utf_8_are_not_recognised() -> None:
    assert recognise(ONE.encode().replace(b"attic", b"\xff")) is None


@cases("first", ['"x"', "1", "1e999"])
@cases(("last", "value"), [('"y"', (None, "y")), ("2", (2.0, None))])
def test_of_a_value_that_is_there_twice_the_last_one_counts(
    first: str, last: str, value: tuple[float | None, str | None]
) -> None:
    payload = payload_with("value", f'{first}, "value": {last}')
    (result,) = both_ways(DEVICE, payload, LOS_ANGELES).results
    assert isinstance(result, Event)
    assert (result.value_num, result.value_text) == value


@cases(
    "member",
    [
        '"unit":"C",',
        '"meta":{%s"n":0},' % ('"n":1,' * (META_MEMBERS_MAX - 1)),
        '"ts_device":"2026-02-10T00:00:00Z",',
    ],
)
def test_what_it_keeps_does_not_grow_with_the_members(member: str) -> None:
    members = member * (PAYLOAD_BYTES_MAX // len(member)) + ONE[1:-1]
    for text in (f"{{{members}}}", f"{{{members}", f"[{{{members}}}]", f"[{{{members}"):
        payload = text.encode()
        tracemalloc.start()
        try:
            assert recognise(payload) is None
            assert tracemalloc.get_traced_memory()[1] < 8 * len(payload)
        finally:
            tracemalloc.stop()


@cases(("count", "is_known"), [(META_MEMBERS_MAX, True), (META_MEMBERS_MAX + 1, False)])
def test_meta_of_many_members_is_parsed(count: int, is_known: bool) -> None:
    payload = json.dumps(VALID | {"meta": {str(n): n for n in range(count)}}).encode()
    assert bool(recognise(payload)) is is_known
    (result,) = decode(DEVICE, payload, LOS_ANGELES).results
    assert isinstance(result, Event)
    assert len(json.loads(result.meta)) == count


def test_meta_is_in_postgresql_what_parsing_would_have_made_of_it(database: Database) -> None:
    numbers = map(
        "".join,
        product(["", "-"], ["0", "7", "100", "987654321"], ["", ".0", ".5", ".000001", ".999999"]),
    )
    texts = [f'{{"n":{number}}}' for number in numbers if number != "-0"]
    texts += [
        '{"n":123456789012345678}',
        '{ "b" :1,"a": "°", "b":2.5 }',
        "{}",
        '{"":null,"\u2028":true}',
    ]
    metas = [(_meta_of(text, recognised=True), _meta_of(text, recognised=False)) for text in texts]
    assert any(by_pattern != parsed for by_pattern, parsed in metas)
    other = "SELECT * FROM unnest(%s, %s) AS t (a, b) WHERE a::jsonb::text <> b::jsonb::text"
    assert database.query(other, *map(list, zip(*metas, strict=True))) == []


def _meta_of(text: str, *, recognised: bool) -> str:
    payload = payload_with("meta", text) + (b"" if recognised else b"\0")
    assert bool(recognise(payload)) is recognised
    (event,) = decode(DEVICE, payload, LOS_ANGELES).results
    assert isinstance(event, Event)
    return event.meta


# --- whatever hypothesis can think of ------------------------------------------------

SPACES = st.sampled_from(["", "", " ", "\r\n\t"])
CHARS = st.sampled_from('abc~°😀 "\\\x7f\x85\u2028,:{}[]')
STRINGS = st.text(CHARS, max_size=4).map('"{}"'.format)
DIGITS = st.text(st.sampled_from("0159"), max_size=9)
NUMBERS = st.tuples(
    st.sampled_from(["", "-", "+"]),
    DIGITS,
    DIGITS.map(".{}".format) | st.sampled_from(["", "e5", "E-3", ".5e+0"]),
).map("".join)
SCALARS = STRINGS | NUMBERS | st.sampled_from(["true", "false", "null", "nan", "{}", "[1]"])


def objects(members: st.SearchStrategy[list[tuple[str, str]]]) -> st.SearchStrategy[str]:
    """Return JSON objects of these names and values, or nearly."""

    def text(members: list[tuple[str, str]], space: str) -> str:
        inner = f"{space},{space}".join(f"{name}{space}:{value}" for name, value in members)
        return f"{space}{{{space}{inner}{space}}}{space}"

    return st.builds(text, members, SPACES)


MEMBERS: dict[str, st.SearchStrategy[str]] = {
    "event_type": STRINGS,
    "value": SCALARS,
    "unit": STRINGS,
    "ts_device": st.sampled_from(
        [
            f'"{day}T00:00:00{offset}"'
            for day in ("2026-02-30", "0001-01-01")
            for offset in ("", "+14")
        ]
    ),
    "meta": objects(st.lists(st.tuples(STRINGS, SCALARS), max_size=4)),
}
# A valid event with some members more, which are there twice then, and perhaps one less.
EVENTS = objects(
    st.lists(
        st.sampled_from([*MEMBERS]).flatmap(
            lambda name: st.tuples(st.just(f'"{name}"'), MEMBERS[name])
        ),
        max_size=3,
    )
    .map(lambda more: [(f'"{name}"', json.dumps(value)) for name, value in VALID.items()] + more)
    .flatmap(st.permutations)
    .flatmap(lambda members: st.integers(0, 1).map(lambda cut: members[cut:]))
)


@pytest.mark.slow
@given(st.lists(EVENTS, min_size=1, max_size=3), st.booleans())
@settings(PATIENT, max_examples=500)
def test_what_the_pattern_finds_is_what_parsing_finds(events: list[str], in_array: bool) -> None:
    payload = f"[{','.join(events)}]" if in_array else events[0]
    both_ways(DEVICE, payload.encode(), LOS_ANGELES)
