"""Device ids and event types of the contract, from the names that other firmware uses.

What it does: makes a name valid (`/` becomes `.`, what the contract forbids `_`), keeps two names
apart that would become one, and shortens what is too long. What it does not: keep anything on
disk; what it has learnt is taken and given back by whoever has a store.

Invariant: never raises. Two names never have one id from the moment that both are known.
"""

import hashlib
import re
from collections.abc import Iterable

DEVICE_ID_CHARS_MAX = 64
EVENT_TYPE_CHARS_MAX = 100
# Names that are told apart. Whoever can publish could else fill the memory and the store.
NAMES_MAX = 20_000

_NOT_IN_ID = re.compile(r"[^A-Za-z0-9_.:-]")
_NOT_IN_TYPE = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")


class TooManyNames(Exception):
    """More devices than are told apart; the text is one line."""


def digest(text: str, characters: int) -> str:
    """Return hex digits that are this text's."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:characters]


def event_type_of(path: str) -> str:
    """Return a valid event type; the same if the path is one."""
    found = path if path.isprintable() else _NOT_IN_TYPE.sub("_", path)
    if found != path or len(found) > EVENT_TYPE_CHARS_MAX:
        found = f"{found[: EVENT_TYPE_CHARS_MAX - 9]}~{digest(path, 8)}"
    return found or "value"


class DeviceNames:
    """The names that have come so far, and their ids."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._ids: dict[str, str] = {}  # of each name, as long as it is the only one with it
        self._names_by_id: dict[str, list[str]] = {}
        self.new: list[str] = []  # names that whoever keeps them has not taken yet
        for name in known:
            self._add(name)

    def device_id(self, name: str) -> str:
        """Return the id of a name. Raises TooManyNames."""
        if name not in self._ids:
            if len(self._ids) >= NAMES_MAX:
                raise TooManyNames(f"more than {NAMES_MAX} devices: a new name is not taken")
            self._add(name)
            self.new.append(name)
        plain = self._ids[name]
        if len(self._names_by_id[plain]) == 1:
            return plain
        return f"{plain[: DEVICE_ID_CHARS_MAX - 9]}-{digest(name, 8)}"

    def _add(self, name: str) -> None:
        if name not in self._ids:
            self._ids[name] = plain = _plain(name)
            self._names_by_id.setdefault(plain, []).append(name)


def _plain(name: str) -> str:
    found = _NOT_IN_ID.sub("_", name.replace("/", ".")) or "_"
    if len(found) > DEVICE_ID_CHARS_MAX:
        found = f"{found[: DEVICE_ID_CHARS_MAX - 9]}-{digest(name, 8)}"
    return found
