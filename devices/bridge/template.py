"""Topic templates: `home/{device}/{event_type}`, and the topic filters that they subscribe to.

What it does: compiles a template, takes a topic apart by it, and compares filters. A `{name}`
stands for one level, a `{name...}` for one or more, `+` for one that does not matter. What it does
not: look into a message.

Invariant: a topic that a template matches is one that its filters bring, unless it begins with a
placeholder and a `{name...}` before the end covers more than LEVELS_MAX levels. Never raises on a
topic.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

# Of what a `{name...}` can stand for where a filter cannot say "one or more".
LEVELS_MAX = 3
TOPIC_CHARS_MAX = 1_000

_PLACEHOLDER = re.compile(r"\{([a-z_]+)(\.\.\.)?\}")


class TemplateError(ValueError):
    """The text is no template; the message says why."""


class Template(NamedTuple):
    """A compiled template; `literals` is how much of it is fixed, to find the closest one."""

    text: str
    pattern: re.Pattern[str]
    filters: tuple[str, ...]
    names: frozenset[str]
    literals: tuple[int, int]

    def match(self, topic: str) -> Mapping[str, str] | None:
        """Return what the placeholders stand for in this topic; None if it is another's."""
        found = self.pattern.fullmatch(topic)
        return found.groupdict() if found else None


def compile_template(text: str, where: Mapping[str, str] | None = None) -> Template:
    """Return the template. `where` restricts placeholders by a regular expression each.

    Raises TemplateError.
    """
    patterns: list[str] = []
    filters: list[list[str]] = [[]]
    names: list[str] = []
    levels = text.split("/")
    literals = 0
    for index, level in enumerate(levels):
        is_last = index == len(levels) - 1
        placeholder = _PLACEHOLDER.fullmatch(level)
        if level == "+":
            patterns.append("[^/]+")
            filters = [[*each, "+"] for each in filters]
        elif placeholder:
            name, is_many = placeholder[1], bool(placeholder[2])
            if name in names:
                raise TemplateError(f"{level} stands twice")
            names.append(name)
            inner = (where or {}).get(name) or ("[^/]+(?:/[^/]+)*?" if is_many else "[^/]+")
            patterns.append(f"(?P<{name}>{inner})")
            if is_many and (is_last or _is_word(levels[0])):
                filters = [[*each, "#"] for each in filters]
            elif is_many:
                counts = range(1, LEVELS_MAX + 1)
                filters = [[*each, *["+"] * count] for each in filters for count in counts]
            else:
                filters = [[*each, "+"] for each in filters]
        elif set(level) & set("{}+#"):
            raise TemplateError(f"{level!r}: expected a word, + or {{name}} between two slashes")
        else:
            literals += 1
            patterns.append(re.escape(level))
            filters = [[*each, level] for each in filters]
    return Template(
        text,
        re.compile("/".join(patterns)),
        tuple("/".join(_until_all(each)) for each in filters),
        frozenset(names),
        (literals, int(_is_word(levels[0]))),
    )


def _is_word(level: str) -> bool:
    return level != "+" and not _PLACEHOLDER.fullmatch(level)


def _until_all(levels: list[str]) -> list[str]:
    return levels[: levels.index("#") + 1] if "#" in levels else levels


def overlap(one: str, other: str) -> bool:
    """Tell whether there is a topic that both filters bring."""
    first, second = one.split("/"), other.split("/")
    for mine, others in zip(first, second, strict=False):
        if "#" in (mine, others):
            return True
        if mine != others and "+" not in (mine, others):
            return False
    if len(first) == len(second):
        return True
    longer, shorter = sorted((first, second), key=len, reverse=True)
    return longer[len(shorter)] == "#"  # a/# brings a, too


def covers(one: str, other: str) -> bool:
    """Tell whether the first filter brings all that the second one brings."""
    first, second = one.split("/"), other.split("/")
    for mine, others in zip(first, second, strict=False):
        if mine == "#":
            return True
        if others == "#" or (mine not in ("+", others)):
            return False
    return len(first) == len(second) or first[len(second) :] == ["#"]


def without_covered(filters: list[str]) -> list[str]:
    """Return the filters without those that another one covers, each once."""
    unique = list(dict.fromkeys(filters))
    return [
        each for each in unique if not any(covers(other, each) for other in unique if other != each)
    ]


def groups(filters: list[str]) -> list[list[str]]:
    """Return the filters in groups, none of which holds two that overlap.

    A broker may deliver a message once for each filter that brings it (MQTT 3.1.1, 3.3.5), so each
    group gets a session of its own, in which every message comes once.
    """
    found: list[list[str]] = []
    for each in without_covered(filters):
        for group in found:
            if not any(overlap(each, other) for other in group):
                group.append(each)
                break
        else:
            found.append([each])
    return found
