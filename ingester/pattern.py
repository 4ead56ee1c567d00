"""The events that most devices send, recognised by one regular expression.

What it does: takes the fields of a valid event out of the text of a payload, in a fraction of the
time that parsing and checking take. What it does not: refuse anything. What it does not recognise
(escaped characters, nested meta, null, a further field, any fault) is for event.py to parse.

Invariant: what is recognised is what event.py would find: the same texts, a number that float()
reads the same, and meta as JSON that is equal in PostgreSQL. The time is proportional to the
bytes, because no two parts that repeat are neighbours and none can contain what ends it. The memory
is bounded, because no group repeats without a limit.
"""

import re

EVENT_ID_CHARS_MAX = 200
EVENT_TYPE_CHARS_MAX = 100
UNIT_CHARS_MAX = 50
DEVICE_ID = r"[A-Za-z0-9_.:-]{1,64}"
# The profile of ISO 8601 that RFC 3339 has, plus an absent, short or colonless offset.
TIMESTAMP = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?"
)
# An object with more members is parsed: re keeps about 1 kB for each of meta's, to backtrack.
META_MEMBERS_MAX = 64
_EVENT_MEMBERS_MAX = 16

Fields = tuple[str | None, ...]

# `*+` does not backtrack. Only behind a set: behind a group, Python before 3.13.1 gets it wrong
# (gh-101955, gh-106052).
_CHAR = r'[^"\\\0-\x1f\x7f-\x9f]'  # neither escaped nor a control character
_SPACE = r"[ \t\r\n]*+"  # RFC 8259, section 2
# Not -0: JSON has it as an integer, and so without its sign.
_NUMBER = r"(?:-?[1-9][0-9]*|-0(?=\.)|0)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
# An integer that Python writes as it is, or a fraction of at most 15 digits whose last is not 0:
# of any other, PostgreSQL would show something else than of the double that event.py makes of it.
_META_NUMBER = r"(?:-?[1-9][0-9]{0,17}+|0|-?(?:[1-9][0-9]{0,8}+|0)\.(?:0|[0-9]{0,5}[1-9]))"


def _members(*members: str) -> str:
    """Return the pattern of what repeats in an object: one of these members, in any order."""
    behind = rf'{_SPACE}(?:,{_SPACE}(?=")|(?=\}}))'
    return rf"(?:(?:{'|'.join(members)}){behind})"


def _member(name: str, value: str) -> str:
    return rf'"{name}"{_SPACE}:{_SPACE}{value}'


_META_MEMBER = _members(_member(rf"{_CHAR}*+", rf'(?:"{_CHAR}*+"|true|false|null|{_META_NUMBER})'))
_META = rf"\{{{_SPACE}{_META_MEMBER}{{0,{META_MEMBERS_MAX}}}\}}"
_EVENT_MEMBER = _members(
    _member("event_id", rf'"({_CHAR}{{1,{EVENT_ID_CHARS_MAX}}}+)"'),
    _member("device_id", rf'"({DEVICE_ID})"'),
    _member("schema", "(1)"),
    _member("event_type", rf'"({_CHAR}{{1,{EVENT_TYPE_CHARS_MAX}}}+)"'),
    _member("value", rf'(?:({_NUMBER})|"({_CHAR}*+)")'),
    _member("unit", rf'"({_CHAR}{{0,{UNIT_CHARS_MAX}}}+)"'),
    _member("ts_device", rf'"({TIMESTAMP})"'),
    _member("meta", rf"({_META})"),
)
_EVENT = re.compile(rf"{_SPACE}\{{{_SPACE}{_EVENT_MEMBER}{{1,{_EVENT_MEMBERS_MAX}}}\}}{_SPACE}")


def recognise(payload: bytes) -> tuple[list[Fields], bool] | None:
    """Return the fields of each event, and whether they are in an array; None if it is unsure.

    The fields are texts: id, device id, schema, type, value if a number, value if a text, unit,
    ts_device, meta. One that is absent is None, and of one that is there twice it is the last;
    both kinds of value may be there.
    """
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return None
    if not text.startswith("["):
        if text.count("{") > 2:  # nested meta: a failure here would cost as much as a match
            return None
        match = _EVENT.fullmatch(text)
        return ([match.groups()], False) if match else None
    found = []
    behind = ","
    end = 0
    while behind == ",":
        match = _EVENT.match(text, end + 1)
        if not match:
            return None
        found.append(match.groups())
        end = match.end()
        behind = text[end : end + 1]
    return (found, True) if text[end:].rstrip(" \t\r\n") == "]" else None
