"""The event contract, row by row, and then with whatever hypothesis can think of.

What it does: puts payloads through decode(), and compares what comes out with DESIGN's
table: the event, or the reason and the field that the text names. What it does not: servers,
the database; that PostgreSQL takes what decode() let through is tested in test_store.py. The
grammar of JSON itself is in test_json_corpus.py, what is damaged in test_payload.py.
"""

import json
import math
import re
import string
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ingester.event import PAYLOAD_BYTES_MAX, Decoded, Event, decode
from ingester.pattern import recognise
from ingester.payload import elements
from ingester.rejection import Reason, Rejection
from tests.support.each import cases

DEVICE = "esp32-01"
VALID = {
    "schema": 1,
    "event_id": "esp32-01-42",
    "device_id": DEVICE,
    "event_type": "temperature",
    "value": 21.5,
    "unit": "C",
    "ts_device": "2026-02-10T00:00:00Z",
    "meta": {"room": "attic"},
}
REQUIRED = ("schema", "event_id", "device_id", "event_type")
LOS_ANGELES = ZoneInfo("America/Los_Angeles")

# A slow or busy machine is no reason to fail.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# What json.dumps makes of half of a surrogate pair and of U+0000 is an escape, as a device
# would send it.
HALVES = ["\ud800", "\udbff", "\udc00", "\udfff", "a\ud800b", "\udc00\ud800", "\U0001f600\ud83d"]
CONTROLS = [chr(code) for code in (*range(0x01, 0x20), *range(0x7F, 0xA0))]


def payload_of(**fields: Any) -> bytes:
    """Return a valid event's payload with these fields instead."""
    return json.dumps(VALID | fields).encode("ascii")


def payload_without(*names: str) -> bytes:
    return json.dumps({k: v for k, v in VALID.items() if k not in names}).encode("ascii")


def payload_with(name: str, value_json: str) -> bytes:
    """Return a valid event's payload in which one field is exactly this JSON text."""
    others = json.dumps({k: v for k, v in VALID.items() if k != name})
    return f'{others[:-1]}, "{name}": {value_json}}}'.encode()


def both_ways(device_id: str, payload: bytes, default_tz: tzinfo) -> Decoded:
    """Return what decode() finds. What its pattern recognises must come out the same if parsed."""
    decoded = decode(device_id, payload, default_tz)
    if recognise(payload) and len(payload) < PAYLOAD_BYTES_MAX:
        # A NUL at the end is forgiven, but the pattern does not recognise it.
        parsed = decode(device_id, payload + b"\0", default_tz)
        assert as_stored(decoded) == as_stored(parsed)
    return decoded


def as_stored(decoded: Decoded) -> list[Any]:
    """Return the results as PostgreSQL stores them: jsonb tells 1.0 from 1.00, Python does not."""
    found: list[Any] = [decoded.is_array, decoded.is_whole]
    for result in decoded.results:
        found.append(result)
        if isinstance(result, Event):
            meta = json.loads(result.meta, parse_float=Decimal, parse_int=Decimal)
            found[-1] = (*result._replace(meta=""), repr(result.value_num), repr(meta))
    return found


def accepted(payload: bytes, default_tz: tzinfo = UTC, device_id: str = DEVICE) -> Event:
    decoded = both_ways(device_id, payload, default_tz)
    (event,) = decoded.results
    assert isinstance(event, Event)
    assert (decoded.is_array, decoded.is_whole) == (False, False)
    return event


def refused(payload: bytes, device_id: str = DEVICE, default_tz: tzinfo = UTC) -> Rejection:
    (rejection,) = both_ways(device_id, payload, default_tz).results
    assert isinstance(rejection, Rejection)
    return rejection


def assert_refused_field(payload: bytes, name: str) -> Rejection:
    rejection = refused(payload)
    assert rejection.reason is Reason.INVALID_FIELD
    assert rejection.error.startswith(f"{name}: ")
    return rejection


# --- a whole event -------------------------------------------------------------------


def test_a_full_event_comes_out_field_for_column() -> None:
    assert accepted(payload_of()) == Event(
        event_id="esp32-01-42",
        device_id="esp32-01",
        schema=1,
        event_type="temperature",
        value_num=21.5,
        value_text=None,
        unit="C",
        ts_device=datetime(2026, 2, 10, tzinfo=UTC),
        meta='{"room": "attic"}',
    )


def test_a_minimal_event_has_nulls_and_an_empty_meta() -> None:
    payload = payload_without("value", "unit", "ts_device", "meta")
    assert accepted(payload) == Event(
        "esp32-01-42", "esp32-01", 1, "temperature", None, None, None, None, "{}"
    )


@cases("name", REQUIRED)
def test_a_required_field_that_is_absent_is_a_missing_field(name: str) -> None:
    rejection = refused(payload_without(name))
    assert rejection.reason is Reason.MISSING_FIELD
    assert rejection.error == f"{name} is required"


def test_of_several_faults_the_first_in_the_order_of_the_contract_is_told() -> None:
    assert refused(b"{}").error == "schema is required"
    assert refused(b'{"schema": 1}').error == "event_id is required"
    assert refused(b'{"schema": 1, "event_id": ""}').error.startswith("event_id: ")


@cases("name", REQUIRED)
def test_a_required_field_that_is_null_is_an_invalid_field(name: str) -> None:
    rejection = assert_refused_field(payload_of(**{name: None}), name)
    assert rejection.error.endswith("got null")


@cases("name", ["value", "unit", "ts_device", "meta"])
def test_an_optional_field_that_is_null_is_as_if_it_were_absent(name: str) -> None:
    assert accepted(payload_of(**{name: None})) == accepted(payload_without(name))


OF_EACH_KIND = {
    "true": "true",
    "false": "false",
    "a number": "7",
    "a string": '"x"',
    "an array": "[1]",
    "an object": '{"a": 1}',
}
EXPECTED_KIND = {
    "schema": ("the integer 1", {"a number"}),
    "event_id": ("a string", {"a string"}),
    "device_id": ("a string", {"a string"}),
    "event_type": ("a string", {"a string"}),
    "value": ("a number or a string", {"a number", "a string"}),
    "unit": ("a string", {"a string"}),
    "ts_device": ("a string", {"a string"}),
    "meta": ("an object", {"an object"}),
}


@cases(
    ("name", "kind"),
    [
        (name, kind)
        for name in EXPECTED_KIND
        for kind in sorted(OF_EACH_KIND.keys() - EXPECTED_KIND[name][1])
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_by_name_and_kind(name: str, kind: str) -> None:
    expected, _ = EXPECTED_KIND[name]
    rejection = refused(payload_with(name, OF_EACH_KIND[kind]))
    assert rejection.reason is Reason.INVALID_FIELD
    assert rejection.error == f"{name}: expected {expected}, got {kind}"


def test_the_last_of_duplicate_keys_wins() -> None:
    payload = payload_with("event_type", '"first", "event_type": "last"')
    assert accepted(payload).event_type == "last"
    payload = payload_with("event_type", '"good", "event_type": 5')
    assert refused(payload).error == "event_type: expected a string, got a number"
    payload = payload_with("event_type", '5, "event_type": "good"')
    assert accepted(payload).event_type == "good"
    assert json.loads(accepted(payload_with("meta", '{"a": 1, "a": 2}')).meta) == {"a": 2}


def test_field_names_are_case_sensitive() -> None:
    assert refused(payload_without("schema")[:-1] + b', "Schema": 1}').error == "schema is required"


@cases(
    "ignored",
    ["1", "null", '"\\ud800"', '"\\u0000"', "[[]]", '{"a": {"b": [true]}}', '"' + "x" * 9999 + '"'],
)
def test_any_other_field_is_ignored(ignored: str) -> None:
    assert accepted(payload_with("firmware", ignored)) == accepted(payload_of())


# --- schema --------------------------------------------------------------------------


@cases("number", ["0", "2", "-1", "10", "1" + "0" * 300])
def test_another_schema_number_is_an_unsupported_schema(number: str) -> None:
    rejection = refused(payload_with("schema", number))
    assert rejection.reason is Reason.UNSUPPORTED_SCHEMA
    assert rejection.error.startswith("schema: ")
    assert len(rejection.error) < 100


@cases("value", ["1.0", "1e0", "true", "false", '"1"', "0.0", "2.5", '""', "[1]", "{}", "null"])
def test_schema_is_an_integer_and_nothing_that_python_finds_equal(value: Any) -> None:
    assert_refused_field(payload_with("schema", value), "schema")


def test_the_schema_of_an_event_is_an_int() -> None:
    assert type(accepted(payload_of()).schema) is int


# --- event_id, event_type, unit ------------------------------------------------------

TEXTS = [("event_id", 1, 200), ("event_type", 1, 100), ("unit", 0, 50)]
# Each is one character to PostgreSQL and one code point here, whatever its bytes.
ONE_CHARACTER = ["x", "ä", "\u2028", "\uffff", "\U0001f600", "\U0010ffff", '"', "\\", "'", " "]


@cases("char", ONE_CHARACTER)
@cases(("name", "chars_min", "chars_max"), TEXTS)
def test_a_text_may_be_as_long_as_its_limit_in_code_points(
    name: str, chars_min: int, chars_max: int, char: str
) -> None:
    for chars in {chars_min, 1, chars_max - 1, chars_max}:
        text = char * chars
        assert getattr(accepted(payload_of(**{name: text})), name) == text
        raw = payload_with(name, json.dumps(text, ensure_ascii=False))
        assert getattr(accepted(raw), name) == text
    rejection = assert_refused_field(payload_of(**{name: char * (chars_max + 1)}), name)
    assert rejection.error == (
        f"{name}: expected {chars_min} to {chars_max} characters, got {chars_max + 1}"
    )


@cases("name", ["event_id", "event_type"])
def test_a_required_text_may_not_be_empty(name: str) -> None:
    rejection = assert_refused_field(payload_of(**{name: ""}), name)
    assert rejection.error.endswith("got 0")


def test_a_unit_may_be_empty_and_stays_so() -> None:
    assert accepted(payload_of(unit="")).unit == ""


def test_a_combining_accent_counts_as_a_character_of_its_own() -> None:
    assert accepted(payload_of(unit="e\u0301" * 25)).unit == "e\u0301" * 25
    assert_refused_field(payload_of(unit="e\u0301" * 25 + "\u0301"), "unit")


@cases("name", [name for name, _, _ in TEXTS])
def test_a_text_holds_no_control_character_wherever_it_stands(name: str) -> None:
    for char in ["\0", *CONTROLS]:
        for text in (char, "a" + char, char + "a", "a" + char + "a"):
            assert_refused_field(payload_of(**{name: text}), name)


@cases("name", [name for name, _, _ in TEXTS])
@cases("text", HALVES, ids=ascii)
def test_a_text_holds_no_half_of_a_surrogate_pair(name: str, text: str) -> None:
    assert_refused_field(payload_of(**{name: text}), name)


@cases("char", [" ", "~", "\u00a0", "\u00ad", "\ud7ff", "\ue000", "\ufeff"])
@cases("name", [name for name, _, _ in TEXTS])
def test_the_neighbours_of_what_is_forbidden_are_allowed(name: str, char: str) -> None:
    assert getattr(accepted(payload_of(**{name: char})), name) == char


# --- device_id -----------------------------------------------------------------------


@cases("device_id", [*(string.ascii_letters + string.digits + "_.:-"), "x" * 64])
def test_a_device_id_may_have_64_characters_of_the_set(device_id: str) -> None:
    assert accepted(payload_of(device_id=device_id), device_id=device_id).device_id == device_id


@cases(
    "device_id",
    [
        *("", "x" * 65, "a" * 200, "a b", "a/b", "a+", "#", "a,", "$SYS", "{device_id}"),
        *("ä", "\u0661", "a\u200b", "\U0001f600", "\ud800", "a\n", "\n", "\0", "x\x7f"),
    ],
    ids=ascii,
)
def test_a_device_id_out_of_the_set_is_refused_even_where_the_topic_has_the_same(
    device_id: str,
) -> None:
    payload = payload_of(device_id=device_id)
    rejection = refused(payload, device_id=device_id)
    assert rejection.reason is Reason.INVALID_FIELD
    assert rejection.error == "device_id: expected 1 to 64 characters of A-Z a-z 0-9 _ . : -"
    assert refused(payload).error == rejection.error


@cases("device_id", ["esp32-02", "ESP32-01", "esp32-0", "esp32-011", "e"])
def test_a_device_id_that_is_not_the_topics_is_a_mismatch(device_id: str) -> None:
    rejection = refused(payload_of(device_id=device_id))
    assert rejection.reason is Reason.DEVICE_MISMATCH
    assert rejection.error.startswith("device_id: ")


def test_a_valid_device_id_on_a_topic_with_an_invalid_one_is_a_mismatch() -> None:
    assert refused(payload_of(), device_id="no such/device").reason is Reason.DEVICE_MISMATCH


# --- value ---------------------------------------------------------------------------

DOUBLE_MAX = 2**1024 - 2**971
# Half a step above the largest double: the first that rounds to infinity.
DOUBLE_OVERFLOW = 2**1024 - 2**970


@cases(
    ("value_json", "value_num"),
    [
        ("0", 0.0),
        ("-0", 0.0),
        ("-0.0", -0.0),
        ("1", 1.0),
        ("-17", -17.0),
        ("1.0", 1.0),
        ("1e3", 1000.0),
        ("1E+3", 1000.0),
        ("1e-3", 0.001),
        ("0.1", 0.1),
        ("9007199254740993", 9007199254740992.0),
        ("1e308", 1e308),
        ("1.7976931348623157e308", 1.7976931348623157e308),
        (str(DOUBLE_MAX), 1.7976931348623157e308),
        (str(DOUBLE_OVERFLOW - 1), 1.7976931348623157e308),
        (str(1 - DOUBLE_OVERFLOW), -1.7976931348623157e308),
        ("5e-324", 5e-324),
        ("1e-400", 0.0),
        ("0e400", 0.0),
        ("0." + "0" * 9999 + "1", 0.0),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_number_becomes_value_num_as_a_double(value_json: str, value_num: float) -> None:
    event = accepted(payload_with("value", value_json))
    assert event.value_num == value_num
    assert type(event.value_num) is float
    assert event.value_text is None


OVERFLOWS = ["1e400", "-1e400", "1e309", "1.8e308", "1e99999999999", "9" * 400, "-" + "9" * 400]
OVERFLOWS += ["9" * 309, "1" * 5000, str(DOUBLE_OVERFLOW), str(-DOUBLE_OVERFLOW), "1" + "0" * 309]
NOT_FINITE = ["NaN", "nan", "NAN", "-NaN", "-nan", "+nan", "Infinity", "-Infinity", "infinity"]
NOT_FINITE += ["inf", "-inf", "INF", "+Inf", "ovf", "-ovf"]
NOT_NUMBERS = ["+1", ".5", "1.", "01", "0x1", "nano", "--nan", "na", "infinit", "NaN1", "21,5"]
PLACES_OF_A_NUMBER = ["value", "schema", "event_id", "ts_device", "meta", "firmware"]


@cases("number", OVERFLOWS, ids=lambda text: text[:16])
def test_a_number_too_large_for_a_double_costs_its_event_where_it_is_looked_at(number: str) -> None:
    other = payload_of(event_id="other")
    event = payload_with("value", number)
    rejection = assert_refused_field(event, "value")
    assert "finite number" in rejection.error
    assert results_of(array_of(event, other)) == [rejection, accepted(other)]
    ignored = payload_with("firmware", f"[{number}]")
    assert accepted(ignored) == accepted(payload_of())
    # With a neighbour that is no JSON, it is the same.
    _, beside = results_of(array_of(payload_with("value", "nan"), ignored))
    assert beside == accepted(ignored)


@cases("number", ["1e400", "-1.8e308", "9" * 5000])
def test_a_number_in_meta_is_a_double_or_an_integer_of_up_to_4300_digits(number: str) -> None:
    assert (
        "finite number"
        in assert_refused_field(payload_with("meta", f'{{"a":{number}}}'), "meta").error
    )
    exact = "9" * 4300
    assert accepted(payload_with("meta", f'{{"a":{exact}}}')).meta == f'{{"a": {exact}}}'


@cases("place", PLACES_OF_A_NUMBER)
@cases("number", NOT_FINITE, ids=lambda text: text[:16])
def test_a_number_that_is_none_costs_its_event_wherever_it_stands(place: str, number: str) -> None:
    for value_json in (number, f"[{number}]", f'{{"a": {{"b": [0, {number} ]}}}}'):
        event = payload_with(place, value_json)
        rejection = assert_refused_field(event, place)
        assert "finite number" in rejection.error
        event_id = None if place == "event_id" else "esp32-01-42"
        assert rejection.event_id == event_id
        other = payload_of(event_id="other")
        assert results_of(array_of(event, other, event)) == [rejection, accepted(other), rejection]


@cases("place", PLACES_OF_A_NUMBER)
@cases("number", NOT_NUMBERS)
def test_what_is_no_number_at_all_is_no_json_wherever_it_stands(place: str, number: str) -> None:
    for value_json in (number, f"[0 {number}]", f'{{"a": {{"b": {number}}}}}'):
        rejection = refused(payload_with(place, value_json))
        assert rejection.reason is Reason.NOT_JSON
        assert len(rejection.error) < 200
        assert rejection.event_id == (None if place == "event_id" else "esp32-01-42")


@cases("name", ["x" * 10_000, "\n\ud800", '"', "", "\u202e\u0000"], ids=ascii)
def test_the_field_that_a_rejection_names_is_cut_and_printable(name: str) -> None:
    rejection = refused(payload_of()[:-1] + f", {json.dumps(name)}: [nan]}}".encode())
    assert rejection.reason is Reason.INVALID_FIELD
    assert rejection.event_id == "esp32-01-42"
    assert_is_answerable(rejection)


@cases("word", NOT_FINITE[:15])
def test_such_words_in_a_string_are_text(word: str) -> None:
    for text in (word, f" {word}, ", f'",{word},"', f"[{word}]\\"):
        event = accepted(payload_of(value=text, meta={text: [text]}, unit=word))
        assert (event.value_text, json.loads(event.meta)) == (text, {text: [text]})
        # And where another number is none.
        nan = payload_of(event_id="nan")[:-1] + b', "x": nan}'
        results = results_of(array_of(payload_of(value=text, meta={text: [text]}, unit=word), nan))
        assert results[0] == event
        assert results[1].event_id == "nan"


@cases("word", NOT_FINITE[:15])
def test_such_words_are_no_json_as_a_key_or_as_the_payload(word: str) -> None:
    for payload in (
        word.encode(),
        f" {word} ".encode(),
        payload_of()[:-1] + b", %s: 1}" % word.encode(),
    ):
        assert refused(payload).reason is Reason.NOT_JSON


@cases("text", ["", "on", "21.5", "NaN", "a\nb\t\x01\x7f\x9f", "\U0001f600" * 999])
def test_a_string_becomes_value_text_as_it_is(text: str) -> None:
    event = accepted(payload_of(value=text))
    assert (event.value_num, event.value_text) == (None, text)


def test_a_value_text_has_no_limit_but_the_payloads() -> None:
    text = "x" * 260_000
    assert accepted(payload_of(value=text)).value_text == text


@cases("text", [*HALVES, "\0", "a\0", "\0a", "\U0001f600\0"], ids=ascii)
def test_a_value_text_holds_neither_u0000_nor_half_of_a_surrogate_pair(text: str) -> None:
    assert_refused_field(payload_of(value=text), "value")


def test_the_text_of_an_invalid_value_is_the_documented_one() -> None:
    rejection = refused(payload_of(value=[1]))
    assert rejection.reason == "invalid_field"
    assert rejection.error == "value: expected a number or a string, got an array"


# --- ts_device -----------------------------------------------------------------------


def at(
    year: int, month: int, day: int, hour: int, minute: int, second: int, microsecond: int = 0
) -> datetime:
    return datetime(year, month, day, hour, minute, second, microsecond, tzinfo=UTC)


MOMENTS = {
    "2026-02-10T00:00:00Z": at(2026, 2, 10, 0, 0, 0),
    "2026-02-10T00:00:00": at(2026, 2, 10, 0, 0, 0),
    "2026-02-10T12:34:56+00:00": at(2026, 2, 10, 12, 34, 56),
    "2026-02-10T12:34:56-00:00": at(2026, 2, 10, 12, 34, 56),
    "2026-02-10T12:34:56+02:00": at(2026, 2, 10, 10, 34, 56),
    "2026-02-10T12:34:56+0200": at(2026, 2, 10, 10, 34, 56),
    "2026-02-10T12:34:56+02": at(2026, 2, 10, 10, 34, 56),
    "2026-02-10T12:34:56-07:30": at(2026, 2, 10, 20, 4, 56),
    "2026-02-10T12:34:56-0730": at(2026, 2, 10, 20, 4, 56),
    "2026-02-10T23:59:59-23:59": at(2026, 2, 11, 23, 58, 59),
    "2026-02-10T00:00:00+23:59": at(2026, 2, 9, 0, 1, 0),
    "2024-02-29T23:59:59Z": at(2024, 2, 29, 23, 59, 59),
    "2000-02-29T00:00:00Z": at(2000, 2, 29, 0, 0, 0),
    "1970-01-01T00:00:00Z": at(1970, 1, 1, 0, 0, 0),
    "0001-01-01T00:00:00Z": at(1, 1, 1, 0, 0, 0),
    "9999-12-31T23:59:59.999999Z": at(9999, 12, 31, 23, 59, 59, 999_999),
    "2026-02-10T00:00:00.5Z": at(2026, 2, 10, 0, 0, 0, 500_000),
    "2026-02-10T00:00:00.25+02": at(2026, 2, 9, 22, 0, 0, 250_000),
}


@cases("text", MOMENTS)
def test_a_ts_device_becomes_that_moment_in_utc(text: str) -> None:
    moment = accepted(payload_of(ts_device=text)).ts_device
    assert moment == MOMENTS[text]
    assert moment is not None
    assert moment.tzinfo is UTC


@cases("digits", range(1, 25))
@cases("offset", ["", "Z", "+00:00", "+0000", "+00"])
def test_a_fraction_of_any_length_is_cut_off_after_microseconds(digits: int, offset: str) -> None:
    fraction = ("987654999999" * 2)[:digits]
    moment = accepted(payload_of(ts_device=f"2026-02-10T00:00:00.{fraction}{offset}")).ts_device
    assert moment == at(2026, 2, 10, 0, 0, 0, int(fraction[:6].ljust(6, "0")))


@cases(
    ("local", "utc"),
    [
        ("2026-01-15T12:00:00", at(2026, 1, 15, 20, 0, 0)),
        ("2026-07-15T12:00:00", at(2026, 7, 15, 19, 0, 0)),
        ("2026-03-08T01:59:59", at(2026, 3, 8, 9, 59, 59)),
        # This hour does not exist: as if the clock had not been put forward yet.
        ("2026-03-08T02:00:00", at(2026, 3, 8, 10, 0, 0)),
        ("2026-03-08T02:30:00", at(2026, 3, 8, 10, 30, 0)),
        ("2026-03-08T03:00:00", at(2026, 3, 8, 10, 0, 0)),
        # This hour exists twice: the first of the two.
        ("2026-11-01T00:59:59", at(2026, 11, 1, 7, 59, 59)),
        ("2026-11-01T01:30:00", at(2026, 11, 1, 8, 30, 0)),
        ("2026-11-01T02:00:00", at(2026, 11, 1, 10, 0, 0)),
        # Before time zones: local mean time.
        ("0001-01-01T00:00:00", at(1, 1, 1, 7, 52, 58)),
        ("2026-01-15T12:00:00.125", at(2026, 1, 15, 20, 0, 0, 125_000)),
    ],
)
def test_a_ts_device_without_an_offset_is_in_the_default_time_zone(
    local: str, utc: datetime
) -> None:
    event = accepted(payload_of(ts_device=local), LOS_ANGELES)
    assert event.ts_device == utc
    assert event.ts_device.tzinfo is UTC


@cases("offset", ["Z", "+00:00", "+02:00"])
def test_an_offset_wins_over_the_default_time_zone(offset: str) -> None:
    payload = payload_of(ts_device=f"2026-07-15T12:00:00{offset}")
    assert accepted(payload, LOS_ANGELES) == accepted(payload, UTC)


@cases(
    "text",
    [
        "",
        "now",
        "yesterday",
        "infinity",
        "epoch",
        "1770681600",
        "20260210T000000Z",
        "2026-02-10",
        "2026-02-10T",
        "2026-02-10T00",
        "2026-02-10T00:00",
        "2026-02-10T00:00Z",
        "00:00:00Z",
        "2026-W07-2T00:00:00Z",
        "2026-041T00:00:00Z",
        "2026-02-10 00:00:00Z",
        "2026-02-10t00:00:00Z",
        "2026-02-10_00:00:00Z",
        "2026-02-10T00:00:00z",
        "2026-02-10T00:00:00 Z",
        "2026-02-10T00:00:00,5Z",
        "2026-02-10T00:00:00.Z",
        "2026-02-10T00:00:00.",
        "2026-02-10T24:00:00Z",
        "2026-02-10T25:00:00Z",
        "2026-02-10T00:60:00Z",
        "2026-02-10T00:00:60Z",
        "2026-12-31T23:59:60Z",
        "2026-02-30T00:00:00Z",
        "2026-02-29T00:00:00Z",
        "1900-02-29T00:00:00Z",
        "2026-04-31T00:00:00Z",
        "2026-00-10T00:00:00Z",
        "2026-13-10T00:00:00Z",
        "2026-02-00T00:00:00Z",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
        "+10000-01-01T00:00:00Z",
        "-2026-02-10T00:00:00Z",
        "026-02-10T00:00:00Z",
        "2026-2-10T00:00:00Z",
        "2026-02-10T0:00:00Z",
        "2026-02-10T00:00:00+24:00",
        "2026-02-10T00:00:00+02:60",
        "2026-02-10T00:00:00+2",
        "2026-02-10T00:00:00+02:",
        "2026-02-10T00:00:00+02:00:00",
        "2026-02-10T00:00:00Z+02:00",
        "2026-02-10T00:00:00UTC",
        "2026-02-10T00:00:00 Europe/Berlin",
        "2026-02-10T00:00:00\u221202:00",
        "\u0662\u0660\u0662\u0666-02-10T00:00:00Z",
        "2026-02-10T00:00:0\uff10Z",
        "2026-02-10T00:00:00.\u0665Z",
        "2026-02-10T00:00:00.123456\u0665Z",
        "2026-02-10T00:00:00Z\n",
        "\n2026-02-10T00:00:00Z",
        " 2026-02-10T00:00:00Z",
        "2026-02-10T00:00:00Z ",
        "2026-02-10T00:00:00Z\0",
        "2026-02-10T00:00:00\n",
        "2026-02-10T00:00:00\ud800",
        "2026-02-10\ud80000:00:00Z",
        "0001-01-01T00:00:00+14:00",
        "0001-01-01T00:00:00+00:01",
        "9999-12-31T23:59:59-14:00",
        "9999-12-31T23:59:59-00:01",
        "2026-02-10T00:00:00Z" + "0" * 9999,
    ],
    ids=lambda text: ascii(text[:40]),
)
def test_a_ts_device_of_another_form_is_refused(text: str) -> None:
    rejection = assert_refused_field(payload_of(ts_device=text), "ts_device")
    assert len(rejection.error) < 100


@cases(
    ("local", "zone"),
    [("0001-01-01T00:00:00", "Asia/Tokyo"), ("9999-12-31T23:59:59", "America/Los_Angeles")],
)
def test_a_ts_device_that_utc_cannot_say_is_refused(local: str, zone: str) -> None:
    rejection = refused(payload_of(ts_device=local), default_tz=ZoneInfo(zone))
    assert rejection.error.startswith("ts_device: ")


OFFSETS = st.integers(-(24 * 60 - 1), 24 * 60 - 1)


@given(st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31)), OFFSETS, st.booleans())
@settings(PATIENT)
def test_every_moment_with_every_offset_is_read_as_arithmetic_has_it(
    local: datetime, minutes: int, with_colon: bool
) -> None:
    sign = "-" if minutes < 0 else "+"
    hours, rest = divmod(abs(minutes), 60)
    colon = ":" if with_colon else ""
    text = f"{local.isoformat()}{sign}{hours:02}{colon}{rest:02}"
    moment = accepted(payload_of(ts_device=text)).ts_device
    assert moment is not None
    assert moment.replace(tzinfo=None) == local - timedelta(minutes=minutes)
    assert moment == local.replace(tzinfo=timezone(timedelta(minutes=minutes)))


# --- meta ----------------------------------------------------------------------------


@cases(
    "meta",
    [
        {},
        {"": ""},
        {"a": [1, -2.5, 1e100, "x", None, True, False, {"b": []}]},
        {"ä\U0001f600": "\U0010ffff\uffff\u2028"},
        {"control": "\x01\x1f\x7f\x9f\n"},
        {str(i): i for i in range(5000)},
        {"big": 10**300, "small": 5e-324},
        {"quotes": "\"'\\/"},
    ],
    ids=lambda meta: ascii(meta)[:30],
)
def test_a_meta_comes_out_as_json_text_of_the_same_object(meta: dict[str, Any]) -> None:
    event = accepted(payload_of(meta=meta))
    assert json.loads(event.meta) == meta
    assert event.meta == accepted(payload_with("meta", json.dumps(meta, ensure_ascii=False))).meta


def test_a_meta_keeps_bool_and_number_and_string_apart() -> None:
    event = accepted(payload_of(meta={"a": [1, 1.0, True, "1", None]}))
    assert event.meta == '{"a": [1, 1.0, true, "1", null]}'


def nested(levels: int, opening: str, closing: str, innermost: str) -> str:
    """Return a meta that is `levels` deep, itself included."""
    return '{"a": ' + opening * (levels - 1) + innermost + closing * (levels - 1) + "}"


@cases("innermost", ["1", '"x"', "null"])
@cases(("opening", "closing"), [("[", "]"), ('{"b": ', "}"), ('[1, "x", ', ", 2]")])
def test_a_meta_may_nest_32_levels_of_which_it_is_the_first(
    opening: str, closing: str, innermost: str
) -> None:
    for levels in (1, 2, 31, 32):
        assert accepted(payload_with("meta", nested(levels, opening, closing, innermost)))
    for levels in (33, 34, 400):
        payload = payload_with("meta", nested(levels, opening, closing, innermost))
        rejection = assert_refused_field(payload, "meta")
        assert "32" in rejection.error


@cases("empty", ["{}", "[]"])
def test_an_empty_container_is_a_level_of_meta_as_well(empty: str) -> None:
    assert accepted(payload_with("meta", nested(31, "[", "]", empty)))
    assert_refused_field(payload_with("meta", nested(32, "[", "]", empty)), "meta")


def test_the_deepest_branch_of_a_meta_counts_wherever_it_stands() -> None:
    branch = "[" * 32 + "]" * 32
    for meta in (f'{{"a": 1, "b": {branch}}}', f'{{"a": {branch}, "b": []}}'):
        assert_refused_field(payload_with("meta", meta), "meta")


IN_META = [
    '{{"{}": 1}}',
    '{{"a": "{}"}}',
    '{{"a{}z": 1}}',
    '{{"a": "a{}z"}}',
    '{{"a": ["b", "{}"]}}',
    '{{"a": {{"b": {{"{}": []}}}}}}',
]


@cases("template", IN_META)
@cases(
    "escape",
    ["\\u0000", "\\ud800", "\\uDFFF", "\\udc00\\ud800", "\\ud83dx\\ude00", "\\\\\\u0000"],
)
def test_a_meta_holds_neither_u0000_nor_half_of_a_surrogate_pair(
    template: str, escape: str
) -> None:
    rejection = assert_refused_field(payload_with("meta", template.format(escape)), "meta")
    assert "U+0000" in rejection.error


@cases("template", IN_META)
@cases(
    "escape",
    [
        "\\\\u0000",
        "\\\\\\\\u0000",
        "\\\\ud800",
        "u0000",
        "\\ud83d\\ude00",
        "\\\\\\u0001",
        "\\u007f",
    ],
)
def test_a_meta_may_hold_the_letters_of_such_an_escape(template: str, escape: str) -> None:
    meta = template.format(escape)
    event = accepted(payload_with("meta", meta))
    assert json.loads(event.meta) == json.loads(meta)


def test_a_meta_of_backslashes_takes_no_longer_than_another() -> None:
    # A search that starts again at each of 130,000 backslashes would take minutes.
    meta = {"a": "\\" * 130_000, "b": "\\u0000"}
    assert json.loads(accepted(payload_of(meta=meta)).meta) == meta
    assert_refused_field(payload_of(meta={"a": "\\" * 130_000 + "\0"}), "meta")


# --- the payload as a whole ----------------------------------------------------------


@cases(
    ("payload", "reason"),
    [
        (b"", Reason.NOT_JSON),
        (b" \t\r\n", Reason.NOT_JSON),
        (b"{", Reason.NOT_JSON),
        (b"21.5,", Reason.NOT_JSON),
        (b"temperature=21.5", Reason.NOT_JSON),
        (b"\0", Reason.NOT_JSON),
        (b"\xef\xbb\xbf", Reason.NOT_JSON),
        (b"\xef\xbb\xbf" * 2 + b"{}", Reason.NOT_JSON),
        (b"{}\0 ", Reason.NOT_JSON),
        (b"\0{}", Reason.NOT_JSON),
        (b"{\0}", Reason.NOT_JSON),
        (b"{}{}", Reason.NOT_JSON),
        (b"{}\x0b", Reason.NOT_JSON),
        ("{}\u00a0".encode(), Reason.NOT_JSON),
        (payload_of().decode().encode("utf-16"), Reason.NOT_UTF8),
        (payload_of().decode().encode("utf-16-le"), Reason.NOT_JSON),
        (payload_of().decode().encode("utf-16-be"), Reason.NOT_JSON),
        (payload_of().decode().encode("utf-32-le"), Reason.NOT_JSON),
        (b"\xff", Reason.NOT_UTF8),
        (b'"\xc0\x80"', Reason.NOT_UTF8),
        (b'"\xed\xa0\x80"', Reason.NOT_UTF8),
        (b'"\xf4\x90\x80\x80"', Reason.NOT_UTF8),
        (b'{"a": 1\xc3', Reason.NOT_UTF8),
        (b"null", Reason.NOT_AN_OBJECT),
        (b"true", Reason.NOT_AN_OBJECT),
        (b"false", Reason.NOT_AN_OBJECT),
        (b"21.5", Reason.NOT_AN_OBJECT),
        (b'"on"', Reason.NOT_AN_OBJECT),
        (b"[]", Reason.NOT_AN_OBJECT),
        (b"[ ]", Reason.NOT_AN_OBJECT),
        (b"NaN", Reason.NOT_JSON),
        (b"1e400", Reason.NOT_AN_OBJECT),
    ],
    ids=lambda value: ascii(value)[:40] if isinstance(value, bytes) else str(value),
)
def test_a_payload_that_is_no_event_is_refused_with_its_reason(
    payload: bytes, reason: Reason
) -> None:
    rejection = refused(payload)
    assert rejection.reason is reason
    assert 0 < len(rejection.error) < 200
    assert rejection.event_id is None


def test_what_is_not_an_object_is_named() -> None:
    assert refused(b"null").error == "expected an event object, got null"
    assert refused(b"false").error == "expected an event object, got false"
    assert refused(b"1").error == "expected an event object, got a number"
    assert refused(b'"on"').error == "expected an event object, got a string"


def test_whitespace_around_an_event_is_json() -> None:
    assert accepted(b" \t\r\n" + payload_of() + b"\n\r\t ") == accepted(payload_of())


@cases("mark", [b"", b"\xef\xbb\xbf"])
@cases("end", [b"", b"\0", b"\0\0\0", b"\r\n\0"])
def test_a_byte_order_mark_and_terminating_nul_bytes_are_taken(mark: bytes, end: bytes) -> None:
    assert accepted(mark + payload_of() + end) == accepted(payload_of())
    array = array_of(payload_of(), b"0", payload_of()[:-1] + b', "x": inf}')
    assert decode(DEVICE, mark + array + end, UTC) == decode(DEVICE, array, UTC)
    assert elements(mark + array + end, [1, 2]) == elements(array, [1, 2])


def test_a_payload_may_have_262144_bytes_and_not_one_more() -> None:
    assert PAYLOAD_BYTES_MAX == 262_144
    at_limit = payload_of().ljust(262_144)
    assert accepted(at_limit) == accepted(payload_of())
    rejection = refused(at_limit + b" ")
    assert rejection.reason is Reason.PAYLOAD_TOO_LARGE
    assert "262144" in rejection.error
    assert "262145" in rejection.error


def test_a_payload_is_measured_before_it_is_looked_at() -> None:
    assert refused(b"\xff" * 262_145).reason is Reason.PAYLOAD_TOO_LARGE
    assert refused(b"\xff" * 262_144).reason is Reason.NOT_UTF8


# --- the event's id in a rejection ---------------------------------------------------


@cases(
    "payload",
    [
        payload_without("schema"),
        payload_of(schema=2),
        payload_of(device_id="other"),
        payload_of(event_type=None),
        payload_of(value=True),
        payload_of(ts_device="now"),
        payload_of(meta=[]),
    ],
    ids=["no schema", "schema", "device_id", "event_type", "value", "ts_device", "meta"],
)
def test_a_rejection_carries_the_events_id_where_that_is_valid(payload: bytes) -> None:
    assert refused(payload).event_id == "esp32-01-42"


@cases("event_id", [None, 5, "", "x" * 201, "a\0", "\ud800", [], "\x7f"])
def test_a_rejection_carries_no_id_that_is_not_valid(event_id: Any) -> None:
    assert refused(payload_of(event_id=event_id)).event_id is None
    assert refused(payload_of(event_id=event_id, schema=2)).event_id is None


# --- arrays --------------------------------------------------------------------------


def array_of(*payloads: bytes) -> bytes:
    return b"[" + b", ".join(payloads) + b"]"


def results_of(payload: bytes) -> list[Event | Rejection]:
    decoded = decode(DEVICE, payload, UTC)
    assert decoded.is_array
    assert not decoded.is_whole
    return list(decoded.results)


def test_an_array_of_one_is_an_array() -> None:
    assert results_of(array_of(payload_of())) == [accepted(payload_of())]


def test_each_event_of_an_array_stands_or_falls_by_itself() -> None:
    results = results_of(
        array_of(
            payload_of(event_id="1"),
            payload_of(event_id="2", value=[]),
            b"null",
            b"[]",
            array_of(payload_of(event_id="3")),
            b"{}",
            payload_of(event_id="4"),
            payload_of(event_id="4"),
            payload_of(event_id="5", device_id="other"),
        )
    )
    assert [
        result.reason if isinstance(result, Rejection) else result.event_id for result in results
    ] == [
        "1",
        Reason.INVALID_FIELD,
        Reason.NOT_AN_OBJECT,
        Reason.NOT_AN_OBJECT,
        Reason.NOT_AN_OBJECT,
        Reason.MISSING_FIELD,
        "4",
        "4",
        Reason.DEVICE_MISMATCH,
    ]
    assert [r.event_id for r in results if isinstance(r, Rejection)] == [
        *("2", None, None, None, None),
        "5",
    ]
    nested_array = results[4]
    assert isinstance(nested_array, Rejection)
    assert nested_array.error == "expected an event object, got an array"


def test_an_array_that_is_no_json_anywhere_is_refused_as_a_whole() -> None:
    for broken in (b"{", b"01", b"[" * 2000):
        decoded = decode(DEVICE, array_of(payload_of(), broken), UTC)
        assert decoded.is_array
        assert decoded.is_whole
        (rejection,) = decoded.results
        assert isinstance(rejection, Rejection)
        assert (rejection.reason, rejection.event_id) == (Reason.NOT_JSON, "esp32-01-42")


@cases("number", ["NaN", "-inf", "1e400", "[nan]"])
def test_a_number_that_is_none_as_an_element_is_no_event(number: str) -> None:
    results = results_of(array_of(payload_of(), number.encode()))
    assert results[0] == accepted(payload_of())
    assert isinstance(results[1], Rejection)
    assert results[1].reason is Reason.NOT_AN_OBJECT


def test_an_array_may_hold_1000_events_and_not_one_more() -> None:
    results = results_of(array_of(*[b"0"] * 1000))
    assert len(results) == 1000
    rejection = refused(array_of(*[b"0"] * 1001))
    assert rejection.reason is Reason.PAYLOAD_TOO_LARGE
    assert "1000" in rejection.error
    assert "1001" in rejection.error
    assert rejection.event_id is None


def test_each_id_of_an_array_of_too_many_is_answered() -> None:
    numbers = [number for number in range(1500) if number % 3]
    others = [{"event_id": ""}, {"event_id": None}, {}, {"meta": {"event_id": "no"}}, "event_id"]
    payload = json.dumps([*others, *({"event_id": str(number)} for number in numbers)]).encode()
    decoded = decode(DEVICE, payload, UTC)
    assert decoded.is_array
    assert decoded.is_whole
    assert [result.event_id for result in decoded.results] == [str(number) for number in numbers]
    assert {result.reason for result in decoded.results if isinstance(result, Rejection)} == {
        Reason.PAYLOAD_TOO_LARGE
    }


def test_a_thousand_events_fit_into_one_payload() -> None:
    event = b'{"schema":1,"event_id":"%d","device_id":"esp32-01","event_type":"t","value":1}'
    results = results_of(array_of(*[event % i for i in range(1000)]))
    assert [result.event_id for result in results] == [str(i) for i in range(1000)]


@cases("device_id", ["", "a b", "x" * 65, "x" * 60_000])
def test_an_array_on_a_topic_with_an_invalid_device_id_is_refused_as_a_whole(
    device_id: str,
) -> None:
    decoded = decode(device_id, array_of(payload_of(event_id="1"), payload_of(event_id="2")), UTC)
    assert decoded.is_array
    assert decoded.is_whole
    # Each answer repeats the device id, so if that is long, there is but one.
    ids = ["1", "2"] if len(device_id) <= 64 else [None]
    assert [result.event_id for result in decoded.results] == ids
    for rejection in decoded.results:
        assert isinstance(rejection, Rejection)
        assert rejection.reason is Reason.INVALID_FIELD
        assert rejection.error.startswith("device_id: ")


# --- nesting -------------------------------------------------------------------------

CONTAINERS = [(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")]
PLACES = [
    (b"", b""),
    (b"[", b"]"),
    (b"[0, ", b", {}]"),
    (payload_of()[:-1] + b', "firmware": ', b"}"),
    (payload_without("meta")[:-1] + b', "meta": ', b"}"),
    (b"[" + payload_of() + b"," + payload_of()[:-1] + b', "firmware": ', b"}]"),
    (b"[" + payload_without("meta")[:-1] + b', "meta": {"a": ', b"}}]"),
]


@pytest.mark.parametrize(
    "levels",
    [
        *(*range(46, 50), *range(60, 68), *range(950, 1000, 7), 5000),
        pytest.param(100_000, marks=pytest.mark.slow),
    ],
)
def test_nesting_of_any_depth_gives_results_or_a_rejection(levels: int) -> None:
    for opening, closing in CONTAINERS:
        for before, after in PLACES:
            # Beside a number, null can be read one level deeper, where it cannot be written.
            for innermost in (b"1", b"null"):
                document = before + opening * levels + innermost
                assert_results_or_rejection(document + closing * levels + after)
            assert_results_or_rejection(before + opening * levels)


LEVELS = [*range(62, 67), 250, *range(590, 1000, 12), 5000, 20_000]


def at_each_depth_of_the_stack(payload: bytes) -> Decoded:
    """Decode it with little and with much of the stack in use; all results are one."""
    results = []

    def decode_below(levels: int) -> None:
        if levels:
            decode_below(levels - 1)
        else:
            results.append(decode(DEVICE, payload, UTC))

    for levels in (0, 40, 333):
        decode_below(levels)
    assert results[0] == results[1] == results[2]
    return results[0]


@cases(("opening", "closing"), CONTAINERS)
def test_an_event_may_nest_as_deep_as_it_likes_where_nobody_looks(
    opening: bytes, closing: bytes
) -> None:
    other = payload_of(event_id="other")
    for levels in LEVELS:
        deep = opening * levels + b'"]}\\"nan"' + closing * levels
        event = payload_of()[:-1] + b', "firmware": ' + deep + b', "event_type": "last"}'
        results = [accepted(payload_of(event_type="last")), accepted(other)]
        assert list(at_each_depth_of_the_stack(array_of(event, other)).results) == results


@cases(("opening", "closing"), CONTAINERS)
def test_a_meta_that_is_too_deep_costs_its_event_however_deep_it_is(
    opening: bytes, closing: bytes
) -> None:
    other = payload_of(event_id="other")
    for levels in LEVELS:
        for number in (b"1", b"nan", b"1e999", b'"]"'):
            deep = b', "meta": {"a": ' + opening * levels + number + closing * levels + b"}}"
            payload = array_of(other, payload_without("meta")[:-1] + deep, other)
            first, rejection, last = at_each_depth_of_the_stack(payload).results
            assert first == last == accepted(other)
            assert isinstance(rejection, Rejection)
            assert (rejection.reason, rejection.event_id) == (Reason.INVALID_FIELD, "esp32-01-42")
            # Of a number that is none, deep inside, it is not told.
            told = ["meta: nested deeper than 32 levels", "meta: expected a finite number"]
            assert rejection.error.startswith(tuple(told if levels < 65 else told[:1]))


@cases("levels", LEVELS)
def test_brackets_alone_are_the_same_at_any_depth(levels: int) -> None:
    (rejection,) = at_each_depth_of_the_stack(b"[" * levels + b"]" * levels).results
    error = "expected an event object, got an array"
    assert rejection == Rejection(Reason.NOT_AN_OBJECT, error)
    rejection = refused(b"[" * levels)
    assert (rejection.reason, rejection.event_id) == (Reason.NOT_JSON, None)


# --- whatever hypothesis can think of ------------------------------------------------

JSON_STRINGS = st.text(st.characters(), max_size=20)  # surrogates included
JSON_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | JSON_STRINGS
JSON_VALUES = st.recursive(
    JSON_SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(JSON_STRINGS, inner, max_size=5),
    max_leaves=20,
)


def assert_results_or_rejection(
    payload: bytes, device_id: str = DEVICE, default_tz: tzinfo = UTC
) -> None:
    """The invariant: events or a Rejection come of it, and every event keeps the contract."""
    decoded = both_ways(device_id, payload, default_tz)
    results = decoded.results
    assert results
    assert decoded.is_array or len(results) == 1
    if decoded.is_whole:
        ids = [result.event_id for result in results]
        assert None not in ids or ids == [None]
    elif decoded.is_array:
        assert len(results) <= 1000
        own = elements(payload, range(len(results)))
        for result, part in zip(results, own, strict=True):
            # What is kept of it is refused again for the same, if it is sent alone.
            (alone,) = decode(device_id, part, default_tz).results[:1]
            if isinstance(result, Event):
                assert alone == result
    for result in results:
        if isinstance(result, Rejection):
            assert_is_answerable(result)
        else:
            assert not decoded.is_whole
            assert_keeps_the_contract(result, device_id)


def assert_is_answerable(rejection: Rejection) -> None:
    assert isinstance(rejection.reason, Reason)
    assert 0 < len(rejection.error) <= 200
    assert rejection.error.isprintable()
    if rejection.event_id is not None:
        assert_is_storable_text(rejection.event_id, 1, 200)


def assert_is_storable_text(text: str, chars_min: int, chars_max: int) -> None:
    assert type(text) is str
    assert chars_min <= len(text) <= chars_max
    for char in text:
        assert unicodedata.category(char) not in ("Cc", "Cs")


def strings_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_of(item)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} in meta")


def assert_keeps_the_contract(event: Event, device_id: str) -> None:
    assert type(event) is Event
    assert event.schema == 1
    assert type(event.schema) is int
    assert event.device_id == device_id
    assert 1 <= len(device_id) <= 64
    assert set(device_id) <= set(string.ascii_letters + string.digits + "_.:-")
    assert_is_storable_text(event.event_id, 1, 200)
    assert_is_storable_text(event.event_type, 1, 100)
    if event.unit is not None:
        assert_is_storable_text(event.unit, 0, 50)
    assert event.value_num is None or event.value_text is None
    if event.value_num is not None:
        assert type(event.value_num) is float
        assert math.isfinite(event.value_num)
    if event.ts_device is not None:
        assert event.ts_device.tzinfo is UTC
    assert type(event.meta) is str
    meta = json.loads(event.meta, parse_constant=refuse_constant)
    assert type(meta) is dict
    assert depth_of(meta) <= 32
    for text in (*strings_of(meta), event.value_text or ""):
        assert "\0" not in text
        text.encode("utf-8")  # raises at half of a surrogate pair


@given(st.binary(), st.sampled_from([DEVICE, "", "a b", "x" * 65]))
@example(b"[" * 100_000, DEVICE)
@example(b"\xef\xbb\xbf{}", DEVICE)
@settings(PATIENT)
def test_any_bytes_give_events_or_a_rejection_and_nothing_else(
    payload: bytes, device_id: str
) -> None:
    assert_results_or_rejection(payload, device_id)


@given(st.text(st.sampled_from('{}[]":,.+-0159eE\\u/ntrfalsN "\n\0\ud800'), max_size=60))
@settings(PATIENT, max_examples=500)
def test_any_text_of_jsons_letters_gives_events_or_a_rejection(text: str) -> None:
    assert_results_or_rejection(text.encode("utf-8", "surrogatepass"))


@pytest.mark.slow
@given(JSON_VALUES, st.booleans())
@settings(PATIENT, max_examples=300)
def test_any_json_value_gives_events_or_a_rejection(value: Any, as_ascii: bool) -> None:
    payload = json.dumps(value, ensure_ascii=as_ascii).encode("utf-8", "surrogatepass")
    assert_results_or_rejection(payload)


FIELDS = st.sampled_from([*VALID, "firmware", "Value", ""])


@pytest.mark.slow
@given(
    st.lists(st.tuples(FIELDS, JSON_VALUES), max_size=3),
    st.lists(FIELDS, max_size=2),
    st.booleans(),
)
@settings(PATIENT, max_examples=500)
def test_a_mutated_event_keeps_the_contract_or_is_refused(
    replaced: list[tuple[str, Any]], dropped: list[str], in_array: bool
) -> None:
    document = VALID | dict(replaced)
    for name in dropped:
        document.pop(name, None)
    payload = json.dumps([document, VALID] if in_array else document).encode("ascii")
    assert_results_or_rejection(payload, default_tz=LOS_ANGELES)


@pytest.mark.slow
@given(st.data())
@settings(PATIENT, max_examples=500)
def test_a_valid_event_with_damaged_bytes_keeps_the_contract_or_is_refused(
    data: st.DataObject,
) -> None:
    payload = bytearray(payload_of(meta={"a": ["\\u0000", "\U0001f600", 1e5]}))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(payload) - 1))
        payload[position : position + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"\\u0000", b"\\ud800", b"NaN", b"1e999"])
        )
    assert_results_or_rejection(bytes(payload))


# Each field with values that the contract takes and values that it does not, made by its
# rules and not by the code's: an event is accepted exactly if all of its fields are good.
PLAIN = st.characters(exclude_categories=["Cs", "Cc"])
ANY_BUT_U0000 = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
FORBIDDEN = st.characters(categories=["Cs", "Cc"])
KIND_OTHER: st.SearchStrategy[Any] = st.booleans() | st.integers() | st.just([]) | st.just({})


def texts(chars_min: int, chars_max: int) -> st.SearchStrategy[str]:
    return st.text(PLAIN, min_size=chars_min, max_size=chars_max)


def not_texts(chars_max: int) -> st.SearchStrategy[Any]:
    spoilt = st.tuples(st.text(PLAIN, max_size=9), FORBIDDEN, st.text(PLAIN, max_size=9))
    too_long = st.text(PLAIN, min_size=chars_max + 1, max_size=chars_max + 3)
    return spoilt.map("".join) | too_long | KIND_OTHER


FINITE = st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False)
META_VALUES = st.recursive(
    st.none() | st.booleans() | FINITE | st.text(ANY_BUT_U0000, max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(ANY_BUT_U0000, max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
METAS = st.dictionaries(st.text(ANY_BUT_U0000, max_size=9), META_VALUES, max_size=3)
SPOILT_METAS = st.builds(
    lambda meta, char, as_key: meta | ({char: 1} if as_key else {"z": ["a" + char]}),
    METAS,
    st.just("\0") | st.characters(categories=["Cs"]),
    st.booleans(),
)
TIMES = st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31)).map(datetime.isoformat)

GOOD = {
    "schema": st.just(1),
    "event_id": texts(1, 200),
    "device_id": st.just(DEVICE),
    "event_type": texts(1, 100),
    "value": st.none() | FINITE | st.text(ANY_BUT_U0000),
    "unit": st.none() | texts(0, 50),
    "ts_device": st.none() | st.builds(str.__add__, TIMES, st.sampled_from(["", "Z", "-0330"])),
    "meta": st.none() | METAS,
}
BAD = {
    "schema": st.none()
    | st.integers().filter(lambda n: n != 1)
    | st.sampled_from([True, 1.0, "1"]),
    "event_id": st.none() | st.just("") | not_texts(200),
    "device_id": st.none() | st.just("") | not_texts(64) | st.text().filter(lambda t: t != DEVICE),
    "event_type": st.none() | st.just("") | not_texts(100),
    "value": st.booleans()
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=2), st.none(), max_size=2)
    | st.tuples(st.text(max_size=3), st.just("\0") | st.characters(categories=["Cs"])).map("".join),
    "unit": not_texts(50),
    "ts_device": KIND_OTHER
    | st.text(max_size=30).filter(lambda text: not re.match(r"\d{4}-\d\d-\d\dT", text))
    | st.builds(
        str.__add__, TIMES, st.sampled_from([" ", "\n", "z", "+24:00", "+1", ".", "\u0661"])
    ),
    "meta": st.booleans() | FINITE | st.text(max_size=5) | st.lists(st.none()) | SPOILT_METAS,
}


@pytest.mark.slow
@given(st.fixed_dictionaries(GOOD), st.booleans())
@settings(PATIENT, max_examples=300)
def test_an_event_of_good_fields_is_accepted_and_comes_out_as_it_went_in(
    fields: dict[str, Any], as_ascii: bool
) -> None:
    event = accepted(json.dumps(fields, ensure_ascii=as_ascii).encode("utf-8"))
    assert_keeps_the_contract(event, DEVICE)
    for name in ("event_id", "event_type", "unit"):
        assert getattr(event, name) == fields[name]
    value = fields["value"]
    assert (event.value_num, event.value_text) == (
        (None, value) if isinstance(value, str) or value is None else (float(value), None)
    )
    assert (event.ts_device is None) == (fields["ts_device"] is None)
    meta = fields["meta"] or {}
    assert json.loads(event.meta) == meta
    # repr() keeps 1, 1.0 and True apart, which == does not.
    assert repr(json.loads(event.meta)) == repr(meta)


@pytest.mark.slow
@given(st.fixed_dictionaries(GOOD), st.sampled_from([*BAD]), st.data())
@settings(PATIENT, max_examples=500)
def test_an_event_with_one_bad_field_is_refused_and_the_text_names_that_field(
    fields: dict[str, Any], bad: str, data: st.DataObject
) -> None:
    fields |= {bad: data.draw(BAD[bad])}
    rejection = refused(json.dumps(fields).encode("ascii"))
    assert rejection.error.startswith(f"{bad}: ")
    if bad in ("schema", "device_id"):
        others = {Reason.UNSUPPORTED_SCHEMA, Reason.DEVICE_MISMATCH}
        assert rejection.reason in {Reason.INVALID_FIELD} | others
    else:
        assert rejection.reason is Reason.INVALID_FIELD
    assert rejection.event_id == (None if bad == "event_id" else fields["event_id"])
    assert_is_answerable(rejection)
