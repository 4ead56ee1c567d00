"""The text of a payload: from bytes to a JSON document, and what can be read of one that is none.

What it does: parses, forgives what is harmless (a byte order mark, terminating NUL bytes),
marks a number that is not one, so that it costs one event and not the whole payload, and finds
the event ids in a text that is not JSON. What it does not: know what an event is, but that it is
an object with an `event_id`.

Invariant: the time is proportional to the bytes, whatever they are, and no answer depends on
how deep the stack is. What is valid is parsed once, by the C decoder, and nothing else is done
to it. All the rest works on whole texts (split, translate, accumulate), never on a character.
"""

import json
import math
import re
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

# Levels of brackets that are looked into. What a container at level NESTING_CUT nests beyond
# NESTING_MAX is cut out together with it. An event's meta begins at level 2 or 3, so that one
# that was cut is too deep for the contract in any case.
NESTING_MAX = 64
NESTING_CUT = 48

_WHITESPACE = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# No UTF-8 has these bytes, so they can stand for an escaped quote and an escaped backslash.
_HIDDEN_QUOTE = b"\xfe\xfe"
_HIDDEN_BACKSLASH = b"\xff\xff"
_HIDDEN_APOSTROPHE = b"\xfd\xfd"
_NOT_HIDDEN = bytes.maketrans(b"\xfd\xfe\xff", b"\xfc\xfc\xfc")


def _table(kept: bytes, other: bytes) -> bytes:
    """Return a table for bytes.translate(): what is not kept becomes the other."""
    return bytes(code if code in kept else other[0] for code in range(256))


_BLANK = _table(b'"', b"_")
_COMPACT = _table(b'[]{},:"', b"x")
# What a byte does to the depth, as a signed byte.
_STEPS = bytes({0x5B: 1, 0x7B: 1, 0x5D: 255, 0x7D: 255}.get(code, 0) for code in range(256))

# As C's printf, Python, JavaScript and Arduino's Print write them, where a value stands.
_SPELLED_OUT = re.compile(
    rb"[-+iInNoO](?<=[\[,:\s].)"  # first, as re is quick to find one of a set
    rb"(?:(?<=[-+])(?:nan|inf|infinity|ovf)|(?<=n)an|(?<=i)nf(?:inity)?|(?<=o)vf)(?=[\s,\]}])",
    re.IGNORECASE,
)


# What parse() returns in place of a number that is not one.
NOT_A_NUMBER = object()


class NotJSONError(ValueError):
    """The text is not JSON; the message says why."""


def parse(payload: bytes) -> tuple[Any, bool]:
    """Return the document, and whether it is plain JSON: if not, NOT_A_NUMBER may be in it.

    A number that is too large for a double is an infinity in any case. Raises NotJSONError and
    UnicodeDecodeError.
    """
    text = payload.decode("utf-8")
    try:
        return _STRICT.decode(text), True
    except (ValueError, RecursionError) as error:
        data = _trimmed(payload)
        if len(data) == len(payload):
            return _parse_repaired(data, error)
    try:
        return _STRICT.decode(data.decode("utf-8")), True
    except (ValueError, RecursionError) as error:
        return _parse_repaired(data, error)


def _parse_repaired(data: bytes, fault: Exception) -> tuple[Any, bool]:
    """Parse what has this fault, if that is all there is to repair."""
    # A fault of the grammar has its place in the text; it is the one to tell.
    told = str(fault) if isinstance(fault, json.JSONDecodeError) else None
    if not data:
        raise NotJSONError("the payload is empty")
    repaired = _repaired(data)
    if told and repaired is data:
        raise NotJSONError(told)
    try:
        document = _MARKING.decode(repaired.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise NotJSONError(told or error.msg) from None
    except RecursionError:  # brackets that do not match
        raise NotJSONError("brackets are not closed") from None
    if document is NOT_A_NUMBER:
        raise NotJSONError("a number that is not one is not JSON")
    return document, False


def holds_numbers(document: Any) -> bool:
    """Tell whether NOT_A_NUMBER is nowhere in what parse() returned, or in this part of it."""
    try:
        _TO_JSON.encode(document)
    except TypeError:
        return False
    return True


def begins_array(payload: bytes) -> bool:
    """Tell whether the text begins as an array does."""
    return payload.removeprefix(_BYTE_ORDER_MARK).lstrip(_WHITESPACE).startswith(b"[")


def elements(payload: bytes, indexes: Sequence[int]) -> list[bytes]:
    """Return the text of these elements of the array that parse() returned, as it was sent."""
    data = _trimmed(payload)
    structure = _structure(data)
    depths = _depths(structure)
    bounds, at = [structure.index(b"[")], structure.index(b"[") + 1
    last = max(indexes)
    while len(bounds) <= last + 1:
        comma = structure.find(b",", at)
        if comma >= 0 and depths[comma] > 1:
            at = depths.index(1, comma)  # behind the container that it stands in
            continue
        end = comma if comma >= 0 and depths[comma] == 1 else structure.rindex(b"]")
        bounds.append(end)
        at = end + 1
    return [data[bounds[i] + 1 : bounds[i + 1]].strip(_WHITESPACE) for i in indexes]


def _trimmed(payload: bytes) -> bytes:
    return payload.removeprefix(_BYTE_ORDER_MARK).rstrip(b"\0")


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:  # over 4,300 digits
        return math.copysign(math.inf, float(text))


# Made once: json.loads() and json.dumps() make one at every call with arguments like these.
_STRICT = json.JSONDecoder(parse_constant=_constant)
_MARKING = json.JSONDecoder(parse_int=_integer, parse_constant=lambda _: NOT_A_NUMBER)
_TO_JSON = json.JSONEncoder()


def _hidden(data: bytes) -> bytes:
    """Return the text with each escaped quote and backslash hidden: each quote is a string's."""
    return data.replace(b"\\\\", _HIDDEN_BACKSLASH).replace(b'\\"', _HIDDEN_QUOTE)


def _shown(hidden: bytes) -> bytes:
    return hidden.replace(_HIDDEN_QUOTE, b'\\"').replace(_HIDDEN_BACKSLASH, b"\\\\")


def _structure(data: bytes) -> bytes:
    """Return a text of the same length, in which the strings hold nothing of interest."""
    parts = _hidden(data).split(b'"')
    if len(parts) > 1:
        parts[1::2] = b'"'.join(parts[1::2]).translate(_BLANK).split(b'"')
    return b'"'.join(parts)


def _depths(structure: bytes) -> list[int]:
    """Return for each byte how many brackets are open after it."""
    return list(accumulate(array("b", structure.translate(_STEPS))))


def _repaired(data: bytes) -> bytes:
    """Return a text that _MARKING takes, if there is one; the same if nothing can be repaired."""
    parts = _hidden(data).split(b'"')
    # Each string is but a quote here, so what is in it is safe.
    outside = b'"'.join(parts[::2])
    opened = outside.count(b"["), outside.count(b"{")
    if len(parts) % 2 == 0 or opened != (outside.count(b"]"), outside.count(b"}")):
        return data
    if sum(opened) > NESTING_MAX:
        flat = _without_depths(data)
        if flat is not data:
            data = flat
            parts = _hidden(data).split(b'"')
            outside = b'"'.join(parts[::2])
    with_nan = _SPELLED_OUT.sub(b"NaN", outside)
    if with_nan == outside:
        return data
    parts[::2] = with_nan.split(b'"')
    return _shown(b'"'.join(parts))


def _without_depths(data: bytes) -> bytes:
    """Return the text with what is nested absurdly deep as a 0; the same if nothing is."""
    depths = _depths(_structure(data))
    if max(depths) <= NESTING_MAX:
        return data
    backwards = depths[::-1]
    kept, begin = [], 0
    with suppress(ValueError):  # index() finds no more
        while True:
            deep = depths.index(NESTING_MAX + 1, begin)
            opening = len(depths) - backwards.index(NESTING_CUT, len(depths) - deep)
            closing = depths.index(NESTING_CUT, deep)
            kept += [data[begin:opening], b"0"]
            begin = closing + 1
    return b"".join(kept) + data[begin:]


# --- event ids in what is not JSON -------------------------------------------------------

_KEY = b"event_id"
# Between strings stands one of [ ] { } , : and else a quote is missing somewhere, or one too
# many: from there on, what is taken for a string may be what stands between two. Where a value
# is missing, a container that follows at once may be what was damaged.
_DOUBTFUL = re.compile(
    rb'["k:](?:(?<=:)[\]}][\[{]|(?<=["k])(?:[^,:\]}]|(?<=[^\[{,:].)))',
)
# The key of an event's own id, k being such a key and " any other string. What is looked for
# comes first and what must stand before it last: so re finds it without trying at each byte.
_OWN_KEY = re.compile(rb'k(?=:["k](?:[,}]|\Z))(?<=[{,]k)')
# A container that belongs to a key, or to nobody knows what.
_OBJECT_WITHIN = re.compile(rb"\{(?<=[^\[\]},]\{)")
_ARRAY_WITHIN = re.compile(rb"\[(?<=[^\[\]},]\[)")
_OPENING = {ord("}"): b"{(", ord("]"): b"[<"}
_OBJECT, _OWN_ID = ord("{"), ord("I")
# What is open around an event's own members.
_IN_EVENT = (b"{", b"[{")
# Of either kind of quotes; the last one may not be closed.
_PYTHON_STRINGS = re.compile(rb"""('[^']*'?|"[^"]*"?)""")


def event_ids(payload: bytes) -> list[str]:
    """Return the event ids that stand for certain in a payload, of which the rest is damaged.

    Each is the complete string behind the key `event_id` of an object that stands for itself or
    in an array that does; the last one of its object. Reading ends where brackets do not match,
    or a quote is missing.
    """
    data = _hidden(payload.removeprefix(_BYTE_ORDER_MARK).translate(_NOT_HIDDEN))
    outside, strings = _split(data)
    keys = [index for index, string in enumerate(strings) if string == _KEY]
    if not keys:
        return []
    compact = b'"'.join(outside).translate(_COMPACT, _WHITESPACE)
    parts = compact.split(b'"')
    for index in keys:
        parts[index] += b"k"
    compact = b'"'.join(parts).replace(b'k"', b"k")
    if doubt := _DOUBTFUL.search(compact):
        compact = compact[: doubt.start()]
    texts = (_unescaped(strings[index]) for index in _ids_at(compact, keys))
    return [text for text in texts if text is not None]


def _split(hidden: bytes) -> tuple[list[bytes], list[bytes]]:
    """Return what is outside of the strings, one part more than there are strings, and these."""
    single, double = hidden.find(b"'"), hidden.find(b'"')
    if single >= 0 and not 0 <= double < single:  # as Python's repr() has it
        hidden = hidden.replace(b"\\'", _HIDDEN_APOSTROPHE)
        if double >= 0:
            parts = _PYTHON_STRINGS.split(hidden)
            outside, strings = parts[::2], parts[1::2]
            if strings and (len(strings[-1]) < 2 or strings[-1][0] != strings[-1][-1]):
                strings.pop()
                outside[-2:] = [outside[-2] + b"x"]
            return outside, [string[1:-1] for string in strings]
        hidden = hidden.replace(b"'", b'"')
    parts = hidden.split(b'"')
    if len(parts) % 2 == 0:  # the last string is not closed
        parts[-2:] = [parts[-2] + b"x"]
    return parts[::2], parts[1::2]


def _ids_at(compact: bytes, keys: Sequence[int]) -> list[int]:
    """Return which strings are ids, of a text whose strings are k (the `keys`) and quotes."""
    tokens = _ARRAY_WITHIN.sub(b"<", _OBJECT_WITHIN.sub(b"(", _OWN_KEY.sub(b"I", compact)))
    tokens = tokens.translate(None, b'x,:"')
    tokens = tokens.replace(b"[]", b"").replace(b"<]", b"").replace(b"(}", b"")
    opened = bytearray()
    found: list[int | None] = []
    key = -1
    for token in tokens:
        if token in b"[<{(":
            opened.append(token)
            if token == _OBJECT and opened in _IN_EVENT:
                found.append(None)
        elif token in b"]}":
            if not opened or opened.pop() not in _OPENING[token]:
                break
        else:
            key += 1
            if token == _OWN_ID and opened in _IN_EVENT:
                found[-1] = keys[key] + 1
    return [index for index in found if index is not None]


def _unescaped(hidden: bytes) -> str | None:
    """Return the string that stands between quotes; None if JSON knows no such string."""
    try:
        if b"\\" not in hidden and hidden.isascii():
            return hidden.decode("ascii")
        hidden = hidden.replace(b'"', _HIDDEN_QUOTE).replace(_HIDDEN_APOSTROPHE, b"'")
        text = _STRICT.decode(f'"{_shown(hidden).decode("utf-8")}"')
    except ValueError:
        return None
    return text if isinstance(text, str) else None
