"""How what devices sent is written for people: strings as visible text, numbers without noise.

What it does: turns values into text. What it does not: make HTML (Jinja escapes it), or know
where a value came from. Pure.

Invariant: what `visible` returns has no character that is invisible or reorders its neighbours.
"""

import math
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

# Controls, format characters (the overrides of reading direction are among them), surrogates,
# and the separators of lines and paragraphs.
INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Letters and marks that are drawn as nothing, too (Unicode: Default_Ignorable_Code_Point). The two
# stay that say whether the sign before them is drawn as text or as a picture, which is seen.
BLANK = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0} | {
    code
    for first, last in ((0x180B, 0x180F), (0xFE00, 0xFE0D), (0xE0100, 0xE01EF))
    for code in range(first, last + 1)
}
# The precision of a 32-bit float, in which most sensors measure: half of the last of 24 bits.
FLOAT32_PRECISION = 2.0**-24
DECIMALS_MAX = 13  # half of the last is less than FLOAT32_PRECISION of 1e-6


def visible(text: str) -> str:
    """Write what cannot be seen as an escape: a line feed as \\x0a, U+202E as \\u202e."""
    return "".join(_escape(ord(char)) if _is_invisible(char) else char for char in text)


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) in INVISIBLE or ord(char) in BLANK


def visible_bytes(payload: bytes | memoryview) -> str:
    """Write bytes as the text that they are meant to be; a byte that is none as \\xNN."""
    # Backslashes that were sent stay single: this is to look at, not to be read back.
    return visible(bytes(payload).decode("utf-8", "backslashreplace"))


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def number(value: float) -> str:
    """Write a number with no more digits than it was measured with.

    A device that measures in 32 bits sends 21.5 as 21.499999 or 21.4 as 21.399999618530273. So of
    more than seven digits only those are written that tell it from its neighbours in 32 bits.
    Whole numbers are written in full.
    """
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-6 <= size < 1e15:
        return f"{value:.6g}"
    if value == math.floor(value):
        return str(int(value))
    shortest = Decimal(repr(value))
    if len(shortest.as_tuple().digits) <= 7:
        return f"{shortest:f}"
    for decimals in range(DECIMALS_MAX):
        if abs(round(value, decimals) - value) <= size * FLOAT32_PRECISION:
            return f"{value:.{decimals}f}"
    return f"{value:.{DECIMALS_MAX}f}"


def decimals_of(values: Iterable[float]) -> int:
    """Return the most decimals that any of these is written with; at most 6."""
    most = 0
    for value in values:
        written = number(value)
        if "e" not in written:
            most = max(most, len(written.partition(".")[2]))
    return min(most, 6)
