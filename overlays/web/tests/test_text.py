"""How values are written for people: as visible text, and without digits that nobody measured."""

import math
import re
import struct
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from page.text import INVISIBLE, decimals_of, number, visible, visible_bytes

finite = st.floats(allow_nan=False, allow_infinity=False)


@given(st.text(st.characters(exclude_categories=())))
@example("\u202egnp.exe\u202c\u2066\u200b\u200d\ufeff\u061c\x00\x1b[31m\ud800\u2028")
def test_no_invisible_or_reordering_character_is_left(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(char) for char in shown} & INVISIBLE
    assert not re.search("[\u200e\u200f\u202a-\u202e\u2066-\u2069]", shown)


def test_letters_that_are_drawn_as_nothing_are_named() -> None:
    assert visible("a\u3164\u115f\u034f\ufe00\U000e0100") == (
        "a\\u3164\\u115f\\u034f\\ufe00\\U000e0100"
    )


@given(
    st.text(st.characters(categories=("N", "P", "S", "Zs", "Lu", "Ll", "Lt", "Lm"))).map(
        lambda text: text + "温度 ☀\ufe0f e\u0301"
    )
)
def test_what_is_visible_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a\\x0ab"),
        ("\u202ex", "\\u202ex"),
        ("\U000e0001", "\\U000e0001"),
        ("21.5 °C, ÄÖ, 温度, \N{FIRE}", "21.5 °C, ÄÖ, 温度, \N{FIRE}"),
    ],
)
def test_an_escape_names_the_character(text: str, shown: str) -> None:
    assert visible(text) == shown


@given(st.binary())
def test_any_bytes_are_visible_text(payload: bytes) -> None:
    shown = visible_bytes(payload)
    assert shown == visible(shown)


def test_bytes_that_are_no_text_are_named_and_the_others_read() -> None:
    assert visible_bytes('{"a": "ü"}\xff'.encode("latin-1")) == '{"a": "\\xfc"}\\xff'
    assert visible_bytes(memoryview("温\0".encode())) == "温\\x00"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (21.5, "21.5"),
        (21.499999, "21.5"),
        (21.399999618530273, "21.4"),
        (0.1 + 0.2, "0.3"),
        (123456789, "123456789"),
        (-0.0, "0"),
        (-12.25, "-12.25"),
        (1013.2, "1013.2"),
        (0.000123, "0.000123"),
        (1e300, "1e+300"),
        (-1e300, "-1e+300"),
        (5e-324, "4.94066e-324"),
        (1e15, "1e+15"),
        (999_999_999_999_999, "999999999999999"),
        (2.0**-20, "9.53674e-07"),
    ],
)
def test_a_number_has_the_digits_that_were_measured(value: float, written: str) -> None:
    assert number(value) == written


@given(finite)
@example(1.5358085123835936e-06)
def test_what_is_written_is_the_number_as_far_as_32_bits_tell(value: float) -> None:
    written = float(number(value))
    if 1e-6 <= abs(value) < 1e15:
        assert abs(written - value) <= abs(value) * 2.0**-24
    else:  # six digits; a subnormal one has fewer itself
        assert math.isclose(written, value, rel_tol=1e-5, abs_tol=0)


@given(
    st.floats(
        width=32, allow_nan=False, allow_infinity=False, min_value=2.0**-16, max_value=2.0**29
    )
)
def test_a_number_of_32_bits_is_read_back_as_the_same_32_bits(value: float) -> None:
    (again,) = struct.unpack("f", struct.pack("f", float(number(value))))
    assert again == value


@given(st.integers(-(10**15) + 1, 10**15 - 1))
def test_a_whole_number_is_written_in_full(value: int) -> None:
    assert number(float(value)) == str(value)


@given(st.decimals(-9999, 9999, places=2))
def test_a_short_decimal_is_written_as_it_was(value: object) -> None:
    assert float(number(float(str(value)))) == float(str(value))
    assert len(number(float(str(value))).partition(".")[2]) <= 2


def test_an_axis_has_the_decimals_of_its_longest_number() -> None:
    assert decimals_of([21.5, 3, 21.399999618530273]) == 1
    assert decimals_of([1 / 3]) == 6
    assert decimals_of([1e300]) == decimals_of([]) == 0
