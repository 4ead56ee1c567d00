"""What a text or a JSON value of other firmware says: a number, a text, or nothing.

What it does: reads numbers out of texts (`21,5`, `42 F`), turns true and false into 1 and 0, and
knows the words that stand for no value. What it does not: judge a value. -127 is a number.

Invariant: never raises. What comes out is a finite number or a text that PostgreSQL takes, and
an id, a version, a duration or hex digits are never a number.
"""

import math
import re
from functools import lru_cache
from typing import Any, NamedTuple

# Characters. What is longer is a document, and no reading.
TEXT_CHARS_MAX = 1_000
# Above it a double does not tell neighbours apart, so digits of a text are an id and not a count.
EXACT_MAX = 2**53

# A leading zero is that of an id (0119, 007), and an exponent without a sign or a point may be of
# hex digits (12E4).
_WHOLE = r"(?:0|[1-9][0-9]*)"
_NUMBER = rf"[-+]?(?:{_WHOLE}?[.,][0-9]+(?:[eE][-+]?[0-9]+)?|{_WHOLE}(?:[eE][-+][0-9]+)?)"
_PLAIN = re.compile(_NUMBER)
# What stands for no value. `none` is a word: "effect": "none".
_ABSENT = {
    *("", "null", "nan", "+nan", "-nan", "unavailable", "unknown", "undef", "undefined"),
    *("inf", "+inf", "-inf", "infinity", "+infinity", "-infinity"),
}
_ABSENT_EXACTLY = {"None"}
# Directly behind a digit these may be hex digits, or minutes.
_SPACED_UNITS = {*"ACFmgtlLKJ"}
# Units that a number in a text may carry. None of time: "15 s" is a duration.
_UNITS = """
    °C °F ℃ ℉ % %RH ‰ mV V kV µA mA mW W kW MW GW mWh Wh kWh MWh VA kVA var kvar VAr kVAr varh kvarh
    VAh Ah mAh Hz kHz MHz GHz Pa hPa kPa MPa mbar bar psi inHg mmHg mm cm dm km in ft yd mi m/s km/h
    mph kn kt l/h L/h l/min L/min m³/h m3/h m³ m3 ml mL cl gal lx klx lm lux ppm ppb µg/m³ ug/m3
    µg/m3 mg/m³ mg/m3 g/m³ g/m3 mg µg kg lb oz dB dBm dBA W/m² W/m2 Wh/m² mm/h in/h Ω ohm kΩ MΩ pH
    rpm ° deg µS/cm uS/cm mS/cm kJ MJ kcal B kB MB GB TB KiB MiB GiB TiB kbit/s Mbit/s kbps Mbps bpm
    €/kWh EUR € $ ct/kWh
"""
_ALL_UNITS = {*_UNITS.split(), *_SPACED_UNITS}
_WITH_UNIT = re.compile(rf"({_NUMBER})(\s*)(\S{{1,8}})")
# As tables and discovery have them.
_UNIT_NAMES = {"C": "°C", "F": "°F", "℃": "°C", "℉": "°F"}
# The last key of what names a thing or a release: its value is a text, digits or not.
_NAMES_A_THING = re.compile(
    r"(?:^|[_.\- ])(?:id|ids|uid|uuid|guid|mac|serial|eui|addr|address|imei|iccid|version|ver|fw|hw"
    r"|sw|firmware|build|revision|rev|ip|ssid|bssid|serialnumber|serial_number|serial_no)$"
    r"|(?:[a-z0-9]|^)(?:Id|ID|Uid|UUID|Mac|MAC|Serial|SerialNumber|Eui|EUI|Address|Addr|Version"
    r"|Firmware|Revision|Build|BSSId|SSId|ProductId)$",
)
_ENDING_CHARS = 40  # more than the longest of them
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class Value(NamedTuple):
    """A number or a text, and the unit that came with it; `value` is None for nothing."""

    value: float | int | str | None
    unit: str | None = None


NOTHING = Value(None)


def names_a_thing(key: str) -> bool:
    """Tell whether what stands under this key is an id or a version."""
    return _ends_so(key[-_ENDING_CHARS:])


@lru_cache(maxsize=10_000)
def _ends_so(ending: str) -> bool:
    return _NAMES_A_THING.search(ending) is not None


def of_json(given: Any, key: str) -> Value:
    """Return what a scalar of a JSON document says; `key` is the one that it stands under."""
    if given is None:
        return NOTHING
    if given is True or given is False:
        return Value(int(given))
    if isinstance(given, str):
        return of_text(given, key)
    if isinstance(given, int):
        try:
            float(given)
        except OverflowError:
            return NOTHING
    elif not isinstance(given, float) or not math.isfinite(given):
        return NOTHING
    return Value(repr(given)) if names_a_thing(key) else Value(given)


def of_text(text: str, key: str) -> Value:
    """Return what a text says; of `true` the same as of JSON's, since firmware writes either."""
    text = text.strip(" \t\r\n\0")
    if text.lower() in _ABSENT or text in _ABSENT_EXACTLY:
        return NOTHING
    if text in ("true", "false"):
        return Value(int(text == "true"))
    if len(text) <= 40 and not names_a_thing(key):
        if _PLAIN.fullmatch(text):
            number = _number(text)
            return Value(text if number is None else number)
        with_unit = _WITH_UNIT.fullmatch(text)
        if with_unit and (unit := _unit(with_unit[3], with_unit[2] != "")):
            number = _number(with_unit[1])
            return Value(text) if number is None else Value(number, unit)
    return Value(storable(text))


def storable(text: str) -> str:
    """Return the text with what PostgreSQL's text cannot hold replaced."""
    return text if text.isprintable() else _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def unit_name(unit: str) -> str | None:
    """Return the unit as it is stored; None for what is no unit, or none that can be stored."""
    unit = unit.strip()
    if not unit or len(unit) > 50 or not unit.isprintable():
        return None
    return _UNIT_NAMES.get(unit, unit)


def _unit(text: str, is_spaced: bool) -> str | None:
    if text not in _ALL_UNITS or (text in _SPACED_UNITS and not is_spaced):
        return None
    return unit_name(text)


def _number(text: str) -> float | int | None:
    """Return the number; None for what no double holds, or not every digit of it."""
    text = text.replace(",", ".")
    if text.lstrip("+-").isdecimal():
        number = int(text)
        return number if abs(number) <= EXACT_MAX else None
    value = float(text)
    return value if math.isfinite(value) else None
