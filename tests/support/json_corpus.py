"""A corpus of JSON documents, good and bad, each to be put into an event as its `meta`.

What it does: names documents, each as bytes with what RFC 8259's grammar and then the event
contract have to say of it. What it does not: parse; test_json_corpus.py puts each through
decode(), and an end-to-end test through the broker and the database.

Invariant: none of the invalid documents becomes valid by standing inside of an event; so
there is no `{}, "b": 1` among them.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from ingester.rejection import Reason


class Grammar(StrEnum):
    """What RFC 8259 says of a document."""

    VALID = "valid"
    INVALID = "invalid"
    OPEN = "implementation-defined"  # valid, and left to whoever reads it: section 4, 6, 8, 9


class Expected(StrEnum):
    """What becomes of an event with the document as its meta."""

    STORED = "stored"
    REJECTED = "rejected"
    EITHER = "either"


class Document(NamedTuple):
    """A document; `reason` is why an event with it is rejected, None if it need not be."""

    name: str
    data: bytes
    grammar: Grammar
    expected: Expected
    reason: Reason | None = None


def event_with(document: Document, device_id: str, event_id: str) -> bytes:
    """Return the payload of an event that is valid but for its meta."""
    event = {"schema": 1, "event_id": event_id, "device_id": device_id, "event_type": "corpus"}
    return json.dumps(event).encode("ascii")[:-1] + b', "meta":' + document.data + b"}"


# Valid objects within the contract's limits.
_STORED = {
    # structure
    "object, empty": "{}",
    "object, empty, with space": "{ }",
    "object, one member": '{"a":1}',
    "object, two members": '{"a":1,"b":2}',
    "object, empty key": '{"":0}',
    "object, key of one space": '{" ":0}',
    "object, key with a quote": r'{"\"":0}',
    "object, key with a backslash": r'{"\\":0}',
    "object, key with an escaped solidus": r'{"\/":0}',
    "object, key by escapes only": r'{"\u0061\u0062":0}',
    "object, key like a number": '{"1":1}',
    "object, key like a literal": '{"null":null,"true":true,"false":false}',
    "object, key of braces": '{"{}[],:":0}',
    "object, keys that differ in case": '{"a":1,"A":2}',
    "object, keys that differ in normal form": r'{"\u00e9":1,"e\u0301":2}',
    "object, keys of the event itself": '{"schema":2,"event_id":null,"meta":[]}',
    "object, key like a Python attribute": '{"__class__":"__proto__","__proto__":{}}',
    "object, in object": '{"a":{"b":{}}}',
    "object, in array": '{"a":[{},{"b":{}}]}',
    "array, empty": '{"a":[]}',
    "array, of arrays": '{"a":[[],[[]],[[[]]]]}',
    "array, of every kind": '{"a":[null,true,false,1,-1.5e3,"x",[],{}]}',
    # duplicate keys: the contract lets the last win
    "duplicate keys": '{"a":1,"a":2}',
    "duplicate keys of other kinds": '{"a":{"b":1},"a":[],"a":null}',
    "duplicate keys by an escape": r'{"a":1,"\u0061":2}',
    "duplicate keys, the last one a number": '{"a":1e400,"a":1}',
    "duplicate keys in a nested object": '{"a":{"b":1,"b":2}}',
    # literals
    "literal null": '{"a":null}',
    "literal true": '{"a":true}',
    "literal false": '{"a":false}',
    # numbers
    "number 0": '{"a":0}',
    "number -0": '{"a":-0}',
    "number -0.0": '{"a":-0.0}',
    "number 0e0": '{"a":0e0}',
    "number 0e400": '{"a":0e400}',
    "number 0.000e-400": '{"a":0.000e-400}',
    "number 1": '{"a":1}',
    "number -1": '{"a":-1}',
    "number 10": '{"a":10}',
    "number 1.0": '{"a":1.0}',
    "number 1.50": '{"a":1.50}',
    "number 0.1": '{"a":0.1}',
    "number -0.1": '{"a":-0.1}',
    "number 1e1": '{"a":1e1}',
    "number 1E1": '{"a":1E1}',
    "number 1e+1": '{"a":1e+1}',
    "number 1e-1": '{"a":1e-1}',
    "number 1e01": '{"a":1e01}',
    "number 1e-00": '{"a":1e-00}',
    "number 1.5E+10": '{"a":1.5E+10}',
    "number of 64 bits": '{"a":9223372036854775807,"b":-9223372036854775808}',
    "number above 64 bits": '{"a":18446744073709551616}',
    "number above 53 bits": '{"a":9007199254740993}',
    "number of 308 digits": '{"a":' + "9" * 308 + "}",
    "number of 309 digits": '{"a":' + "9" * 309 + "}",
    "number of 4,300 digits": '{"a":-' + "9" * 4300 + "}",
    "number 1e308": '{"a":1e308}',
    "number, the largest double": '{"a":1.7976931348623157e308}',
    "number, the smallest double": '{"a":5e-324}',
    "number of 1,000 decimals": '{"a":0.' + "3" * 1000 + "}",
    "number of 1,000 decimals and an exponent": '{"a":1.' + "0" * 1000 + "e5}",
    # strings
    "string, empty": '{"a":""}',
    "string, ASCII": '{"a":" !#$%&\'()*+,-./09:;<=>?@AZ[]^_`az{|}~"}',
    "string, DEL": '{"a":"\x7f"}',
    "string, C1 controls": '{"a":"\x80\x85\x9f"}',
    "string, Latin": '{"a":"äé"}',
    "string, Greek and Chinese": '{"a":"Ω漢字"}',
    "string, emoji": '{"a":"\U0001f600"}',
    "string, emoji joined": '{"a":"\U0001f468\u200d\U0001f469\u200d\U0001f467"}',
    "string, right to left": '{"a":"\u202eabc\u05d0"}',
    "string, line separators": '{"a":"\u2028\u2029"}',
    "string, byte order mark": '{"a":"\ufeff"}',
    "string, replacement character": '{"a":"\ufffd"}',
    "string, private use": '{"a":"\ue000\U0010fffd"}',
    "string, noncharacters": '{"a":"\ufffe\uffff\ufdd0\U0001ffff\U0010ffff"}',
    "string, neighbours of the surrogates": '{"a":"\ud7ff\ue000"}',
    "string, combining": '{"a":"' + "e" + "\u0301" * 50 + '"}',
    "string, like JSON": r'{"a":"{\"b\":[1,null]}"}',
    "string, like a comment": '{"a":"/* */ // #"}',
    "string, like SQL": '{"a":"\'; DROP TABLE events; --","b":"%s %(a)s $1 \\\\"}',
    "string, like NaN": '{"NaN":"Infinity"}',
    # escapes
    "escape, each of the short ones": r'{"a":"\"\\\/\b\f\n\r\t"}',
    "escape, solidus": r'{"a":"\/"}',
    "escape, ASCII by number": r'{"a":"\u0041\u007a"}',
    "escape, hexadecimal in both cases": r'{"a":"\u00aF\u00Af"}',
    "escape, controls by number": r'{"a":"\u0001\u001f\u007f\u0080"}',
    "escape, quote and backslash by number": r'{"a":"\u0022\u005c"}',
    "escape, surrogate pair": r'{"a":"\ud83d\ude00"}',
    "escape, surrogate pair in capitals": r'{"a":"\uD83D\uDE00"}',
    "escape, first and last surrogate pair": r'{"a":"\ud800\udc00\udbff\udfff"}',
    "escape, noncharacters": r'{"a":"\uffff\ufffe\ufdd0\udbff\udfff"}',
    "escape, byte order mark": r'{"a":"\ufeff"}',
    "escape, escaped backslash before u0000": r'{"a":"\\u0000"}',
    "escape, two escaped backslashes before u0000": r'{"a":"\\\\u0000"}',
    "escape, escaped backslash before ud800": r'{"a":"\\ud800"}',
    "escape, escaped backslash before u0000 in a key": r'{"\\u0000":1}',
    "escape, letters after the fourth digit": r'{"a":"\u00e9e9"}',
    "escape, backslashes only": '{"a":"' + "\\" * 100 + '"}',
    # whitespace
    "whitespace, all four": '{ \t\r\n"a" \t\r\n: \t\r\n1 \t\r\n, \t\r\n"b":[ \t\r\n] \t\r\n}',
    "whitespace, around": ' \t\r\n{"a":1} \t\r\n',
    "whitespace, none": '{"a":[1,2,{"b":null}],"c":"d"}',
    "whitespace, Windows lines": '{\r\n  "a": 1\r\n}\r\n',
    # nesting: meta is level 1
    "nesting, 2 levels": '{"a":[]}',
    "nesting, 31 levels of arrays": '{"a":' + "[" * 30 + "]" * 30 + "}",
    "nesting, 32 levels of arrays": '{"a":' + "[" * 31 + "]" * 31 + "}",
    "nesting, 32 levels of objects": '{"a":' * 32 + "1" + "}" * 32,
    "nesting, 32 levels of both": '{"a":' + '[{"a":' * 15 + "[0]" + "}]" * 15 + "}",
    "nesting, 1,000 side by side": '{"a":[' + ",".join(["[[]]"] * 1000) + "]}",
    # size
    "size, string of 200,000": '{"a":"' + "x" * 200_000 + '"}',
    "size, key of 200,000": '{"' + "k" * 200_000 + '":1}',
    "size, string of 30,000 escapes": '{"a":"' + r"\u00e9" * 30_000 + '"}',
    "size, array of 100,000": '{"a":[' + ",".join(["0"] * 100_000) + "]}",
    "size, object of 10,000": "{" + ",".join(f'"k{i}":{i}' for i in range(10_000)) + "}",
    "size, 200,000 spaces": "{" + " " * 200_000 + "}",
    "size, number of 100,000 decimals": '{"a":0.' + "1" * 100_000 + "}",
    # null is as if meta were absent
    "value null": "null",
    "value null with space": " null ",
}

# Valid, and no object, which meta must be.
_NO_OBJECT = {
    "value true": "true",
    "value false": "false",
    "value 0": "0",
    "value -1.5e3": "-1.5e3",
    "value empty string": '""',
    "value string": '"{}"',
    "value string of escapes": r'"\u007b\u007d"',
    "value empty array": "[]",
    "value array": '[{"a":1}]',
    "value array of 400 levels": "[" * 400 + "]" * 400,
    "value string of U+0000": r'"\u0000"',
    "value lone surrogate": r'"\ud800"',
}

# Valid objects that the contract refuses, because PostgreSQL could not hold them.
_REFUSED = {
    "U+0000 in a string": r'{"a":"\u0000"}',
    "U+0000 within a string": r'{"a":"b\u0000c"}',
    "U+0000 in a key": r'{"\u0000":1}',
    "U+0000 in an array": r'{"a":["\u0000"]}',
    "U+0000 in a nested key": r'{"a":[{"b\u0000":1}]}',
    "U+0000 behind an escaped backslash": r'{"a":"\\\u0000"}',
    "U+0000 behind two escaped backslashes": r'{"a":"\\\\\u0000"}',
    "U+0000 behind its own letters": r'{"a":"\\u0000\u0000"}',
    "lone surrogate, high": r'{"a":"\ud800"}',
    "lone surrogate, low": r'{"a":"\udfff"}',
    "lone surrogate, in a key": r'{"\uDBFF":1}',
    "lone surrogate, high twice": r'{"a":"\ud83d\ud83d"}',
    "lone surrogate, low before high": r'{"a":"\ude00\ud83d"}',
    "lone surrogate, with a letter between": r'{"a":"\ud83dx\ude00"}',
    "lone surrogate, behind a pair": r'{"a":"\ud83d\ude00\ude00"}',
    "lone surrogate, with an escape behind": r'{"a":"\ud800\n"}',
    "lone surrogate, with U+0041 behind": r'{"a":"\ud800\u0041"}',
    "lone surrogate, deep inside": r'{"a":[[[{"b":["\udc00"]}]]]}',
    "nesting, 33 levels of arrays": '{"a":' + "[" * 32 + "]" * 32 + "}",
    "nesting, 33 levels of objects": '{"a":' * 33 + "1" + "}" * 33,
    "nesting, 33 levels behind 1": '{"a":1,"b":' + "[" * 32 + "]" * 32 + "}",
    "nesting, 400 levels of objects": '{"a":' * 400 + "1" + "}" * 400,
}

# Valid by the grammar, but no double holds the number, or it is an integer of over 4,300 digits.
_OVERFLOW = {
    "number 1e309": '{"a":1e309}',
    "number 1e400": '{"a":1e400}',
    "number -1e400": '{"a":-1e400}',
    "number 1E+999999999": '{"a":1E+999999999}',
    "number 1e with 1,000 digits": '{"a":1e' + "9" * 1000 + "}",
    "number of 5,000 digits": '{"a":' + "1" * 5000 + "}",
    "number of 200,000 digits": '{"a":' + "1" * 200_000 + "}",
    "number too large in an array": '{"a":[1,[1e400]]}',
}

# Not JSON, but what printf, Python or Arduino print for a number costs its event alone.
_NOT_FINITE = {
    "number NaN": '{"a":NaN}',
    "number -NaN": '{"a":-NaN}',
    "number nan": '{"a":nan}',
    "number Infinity": '{"a":Infinity}',
    "number -Infinity": '{"a":-Infinity}',
    "number +Infinity": '{"a":+Infinity}',
    "number inf": '{"a":inf}',
    "number NaN as the whole": "NaN",
    "number -Infinity as the whole": "-Infinity",
    "number -nan": '{"a":-nan}',
    "number INF in an array": '{"a":[1,INF ,2]}',
    "number ovf": '{"a":ovf}',
    "number nan with text like it": '{"nan":"nan, nan","a":nan}',
}

# Deeper than many a reader goes.
_TOO_DEEP = {
    **{
        f"nesting, {levels} levels of arrays": '{"a":' + "[" * levels + "]" * levels + "}"
        for levels in (950, 980, 990, 995, 1000, 1005, 1020, 5000, 100_000)
    },
    **{
        f"nesting, {levels} levels of objects": '{"a":' * levels + "1" + "}" * levels
        for levels in (950, 990, 1000, 1020, 30_000)
    },
}

_INVALID: dict[str, str | bytes] = {
    # structure
    "nothing": "",
    "nothing but spaces": " \t\r\n",
    "object, not closed": '{"a":1',
    "object, not closed after a comma": '{"a":1,',
    "object, not closed after a key": '{"a"',
    "object, not closed after a colon": '{"a":',
    "object, closed twice": '{"a":1}}',
    "object, closed by a bracket": '{"a":1]',
    "object, not opened": '"a":1}',
    "object, trailing comma": '{"a":1,}',
    "object, leading comma": '{,"a":1}',
    "object, two commas": '{"a":1,,"b":2}',
    "object, comma alone": "{,}",
    "object, without comma": '{"a":1 "b":2}',
    "object, semicolon": '{"a":1;"b":2}',
    "object, without colon": '{"a" 1}',
    "object, two colons": '{"a"::1}',
    "object, colon alone": "{:}",
    "object, equals sign": '{"a"=1}',
    "object, arrow": '{"a"=>1}',
    "object, without value": '{"a":}',
    "object, without key": "{:1}",
    "object, key alone": '{"a"}',
    "object, key without quotes": "{a:1}",
    "object, key in single quotes": "{'a':1}",
    "object, key in backquotes": "{`a`:1}",
    "object, key is a number": "{1:1}",
    "object, key is null": "{null:1}",
    "object, key is an array": "{[]:1}",
    "object, value without key": "{1}",
    "object, two in a row": "{}{}",
    "object, two in a row with space": "{} {}",
    "object, with a word behind": "{} x",
    "object, with a comma behind": "{},",
    "array, not closed": '{"a":[1',
    "array, closed by a brace": '{"a":[1}',
    "array, closed twice": '{"a":[1]]}',
    "array, trailing comma": '{"a":[1,]}',
    "array, leading comma": '{"a":[,1]}',
    "array, two commas": '{"a":[1,,2]}',
    "array, comma alone": '{"a":[,]}',
    "array, without comma": '{"a":[1 2]}',
    "array, with a colon": '{"a":[1:2]}',
    "array, with a member": '{"a":["b":2]}',
    "array, with dots": '{"a":[1,...]}',
    "parentheses": '{"a":(1)}',
    "bracket alone": "[",
    "comment, to the end of the line": '{"a":1} // b\n',
    "comment, in stars": '{/* a */"a":1}',
    "comment, hash": '{"a":1} # b\n',
    # literals
    "literal True": '{"a":True}',
    "literal TRUE": '{"a":TRUE}',
    "literal tru": '{"a":tru}',
    "literal truee": '{"a":truee}',
    "literal nul": '{"a":nul}',
    "literal Null": '{"a":Null}',
    "literal None": '{"a":None}',
    "literal undefined": '{"a":undefined}',
    "literal fals": '{"a":fals',
    "literal yes": '{"a":yes}',
    "literal of two": '{"a":true false}',
    # numbers
    "number NaN, then another word": '{"a":NaN,"b":nano}',
    "number nan as a key": "{nan:1}",
    "number +1": '{"a":+1}',
    "number ++1": '{"a":++1}',
    "number --1": '{"a":--1}',
    "number -": '{"a":-}',
    "number - 1": '{"a":- 1}',
    "number 01": '{"a":01}',
    "number -01": '{"a":-01}',
    "number 00": '{"a":00}',
    "number 1.": '{"a":1.}',
    "number .5": '{"a":.5}',
    "number -.5": '{"a":-.5}',
    "number 1..5": '{"a":1..5}',
    "number 1.2.3": '{"a":1.2.3}',
    "number 1.e5": '{"a":1.e5}',
    "number 1e": '{"a":1e}',
    "number 1e+": '{"a":1e+}',
    "number 1e1.5": '{"a":1e1.5}',
    "number 1ee1": '{"a":1ee1}',
    "number 1e1e1": '{"a":1e1e1}',
    "number e1": '{"a":e1}',
    "number 0x10": '{"a":0x10}',
    "number 0b1": '{"a":0b1}',
    "number 1_000": '{"a":1_000}',
    "number 1 000": '{"a":1 000}',
    "number 1,5 in quotes' stead": '{"a":1,5}',
    "number 1L": '{"a":1L}',
    "number 1f": '{"a":1.0f}',
    "number 1/2": '{"a":1/2}',
    "number in Arabic digits": '{"a":\u0661}',
    "number in wide digits": '{"a":\uff11}',
    "number with a Unicode minus": '{"a":\u22121}',
    "number with digits from elsewhere": '{"a":1\u0662}',
    # strings
    "string, not closed": '{"a":"b}',
    "string, opened once more": '{"a":"b"c"}',
    "string, in single quotes": "{\"a\":'b'}",
    "string, in typographic quotes": '{"a":\u201cb\u201d}',
    "string, without quotes": '{"a":b}',
    "string, two in a row": '{"a":"b" "c"}',
    "string, added up": '{"a":"b"+"c"}',
    "string, raw U+0000": '{"a":"\0"}',
    "string, raw U+0001": '{"a":"\x01"}',
    "string, raw tab": '{"a":"\t"}',
    "string, raw line feed": '{"a":"b\nc"}',
    "string, raw carriage return": '{"a":"b\rc"}',
    "string, raw U+001F": '{"a":"\x1f"}',
    "string, raw escape": '{"a":"\x1b[31m"}',
    "string, raw tab in a key": '{"a\tb":1}',
    # escapes
    "escape, unknown letter": r'{"a":"\a"}',
    "escape, unknown letter in a key": r'{"\x":1}',
    "escape, single quote": r'{"a":"\'"}',
    "escape, hexadecimal": r'{"a":"\x41"}',
    "escape, octal": r'{"a":"\101"}',
    "escape, zero": r'{"a":"\0"}',
    "escape, capital U": r'{"a":"\U00000041"}',
    "escape, in braces": r'{"a":"\u{41}"}',
    "escape, capital N": r'{"a":"\N"}',
    "escape, space": r'{"a":"\ "}',
    "escape, line feed": '{"a":"\\\n"}',
    "escape, U+0000": '{"a":"\\\0"}',
    "escape, emoji": '{"a":"\\\U0001f600"}',
    "escape, nothing": '{"a":"\\"}',
    "escape, no digits": r'{"a":"\u"}',
    "escape, one digit": r'{"a":"\u0"}',
    "escape, three digits": r'{"a":"\u004"}',
    "escape, wrong digit": r'{"a":"\u004g"}',
    "escape, digits with a sign": r'{"a":"\u+041"}',
    "escape, digits with a space": r'{"a":"\u 041"}',
    "escape, digits with an underscore": r'{"a":"\u0_41"}',
    "escape, digits with 0x": r'{"a":"\u0x41"}',
    "escape, wide digits": '{"a":"\\u\uff10\uff10\uff14\uff11"}',
    "escape, surrogate pair cut off": r'{"a":"\ud83d\ude0"}',
    "escape, surrogate pair of a wrong digit": r'{"a":"\ud83d\ude0g"}',
    "escape, outside of a string": r'{"a":\n1}',
    "escape, of the key's quote": r"{\"a\":1}",
    # whitespace
    "whitespace, form feed": '{"a":\x0c1}',
    "whitespace, vertical tab": '{"a":\x0b1}',
    "whitespace, no-break space": '{"a":\u00a01}',
    "whitespace, ideographic space": '{"a":\u30001}',
    "whitespace, line separator": '{\u2028"a":1}',
    "whitespace, next line": '{"a":1\u0085}',
    "whitespace, zero width": '{\u200b"a":1}',
    "whitespace, U+0000": '{"a":1\0}',
    "whitespace, U+0000 at the end": '{"a":1}\0',
    "whitespace, byte order mark": '\ufeff{"a":1}',
    "whitespace, byte order mark at the end": '{"a":1}\ufeff',
    "whitespace, within a number": '{"a":1 .5}',
    "whitespace, within a literal": '{"a":nu ll}',
    # encodings that are UTF-8 by chance
    "encoding, UTF-16 little-endian": '{"a":1}'.encode("utf-16-le"),
    "encoding, UTF-16 big-endian": '{"a":1}'.encode("utf-16-be"),
    "encoding, UTF-32 little-endian": '{"a":1}'.encode("utf-32-le"),
    "encoding, UTF-7": '{"a":1}'.encode("ascii").replace(b"{", b"+AHs-"),
    # other formats
    "format, YAML": "a: 1\n",
    "format, XML": "<a>1</a>",
    "format, SQL": "'{}'::jsonb",
    "format, JavaScript call": 'callback({"a":1})',
    "format, JSON within a string, not closed": r'"{\"a\":1}',
    # nesting and size
    "nesting, 1,000 levels never closed": '{"a":' + "[" * 1000,
    "nesting, 100,000 levels never closed": "[" * 100_000,
    "nesting, 30,000 objects never closed": '{"a":' * 30_000,
    "size, string of 200,000 never closed": '{"a":"' + "x" * 200_000,
    "size, 200,000 backslashes never closed": '{"a":"' + "\\" * 200_000 + '"',
}

_NOT_UTF8: dict[str, bytes] = {
    "encoding, Latin-1": '{"a":"é"}'.encode("latin-1"),
    "encoding, Windows-1252": '{"a":"€"}'.encode("cp1252"),
    "encoding, Shift JIS": '{"a":"漢"}'.encode("shift_jis"),
    "encoding, UTF-16 with its mark": '{"a":1}'.encode("utf-16"),
    "encoding, UTF-32 with its mark": '{"a":1}'.encode("utf-32"),
    "encoding, 0xFF": b'{"a":"\xff"}',
    "encoding, 0xFF outside of a string": b'{"a":\xff1}',
    "encoding, 0xFF in a key": b'{"\xff":1}',
    "encoding, continuation alone": b'{"a":"\x80"}',
    "encoding, cut off after one of two": b'{"a":"\xc3"}',
    "encoding, cut off after two of three": b'{"a":"\xe2\x82"}',
    "encoding, cut off after three of four": b'{"a":"\xf0\x9f\x98"}',
    "encoding, cut off at the very end": b'{"a":1}\xe2\x82',
    "encoding, overlong U+0000": b'{"a":"\xc0\x80"}',
    "encoding, overlong solidus": b'{"a":"\xe0\x80\xaf"}',
    "encoding, overlong quote": b'{"a":"\xc0\xa2"}',
    "encoding, overlong of four": b'{"a":"\xf0\x80\x80\x80"}',
    "encoding, raw high surrogate": b'{"a":"\xed\xa0\x80"}',
    "encoding, raw low surrogate": b'{"a":"\xed\xbf\xbf"}',
    "encoding, raw surrogate pair": b'{"a":"\xed\xa0\xbd\xed\xb8\x80"}',
    "encoding, above U+10FFFF": b'{"a":"\xf4\x90\x80\x80"}',
    "encoding, five bytes": b'{"a":"\xf8\x88\x80\x80\x80"}',
    "encoding, part of a byte order mark": b'\xef\xbb{"a":1}',
}

# Readers may keep less than what is written: section 6 on range and precision of numbers.
_OPEN = {
    "number too small for a double": '{"a":1e-400}',
    "number far too small": '{"a":1e-999999999}',
    "number in between": '{"a":1e-320}',
    "number of more digits than a double": '{"a":3.14159265358979323846264338327950288}',
    "number 1e23": '{"a":1e23}',
    "number -1e-400": '{"a":-1e-400}',
    "number of a whole double and more": '{"a":123456789012345678901234567890.5}',
    "number halfway above the largest double": '{"a":1.797693134862315807e308}',
    "number 0. and 200,000 zeros": '{"a":0.' + "0" * 200_000 + "1}",
    "number brought back by its exponent": '{"a":1' + "0" * 400 + "e-400}",
    "number brought up by its exponent": '{"a":0.' + "0" * 400 + "1e400}",
}


def _documents(
    group: Mapping[str, str | bytes],
    grammar: Grammar,
    expected: Expected,
    reason: Reason | None = None,
) -> list[Document]:
    return [
        Document(
            name, text if isinstance(text, bytes) else text.encode(), grammar, expected, reason
        )
        for name, text in group.items()
    ]


DOCUMENTS = [
    *_documents(_STORED, Grammar.VALID, Expected.STORED),
    *_documents(_NO_OBJECT, Grammar.VALID, Expected.REJECTED, Reason.INVALID_FIELD),
    *_documents(_REFUSED, Grammar.VALID, Expected.REJECTED, Reason.INVALID_FIELD),
    *_documents(_OVERFLOW, Grammar.VALID, Expected.REJECTED, Reason.INVALID_FIELD),
    *_documents(_NOT_FINITE, Grammar.INVALID, Expected.REJECTED, Reason.INVALID_FIELD),
    *_documents(_TOO_DEEP, Grammar.VALID, Expected.REJECTED, Reason.INVALID_FIELD),
    *_documents(_INVALID, Grammar.INVALID, Expected.REJECTED, Reason.NOT_JSON),
    *_documents(_NOT_UTF8, Grammar.INVALID, Expected.REJECTED, Reason.NOT_UTF8),
    *_documents(_OPEN, Grammar.OPEN, Expected.EITHER),
]
