"""A source of the configuration, compiled: which of its rules a topic falls under.

What it does: joins a preset with what the configuration changes of it. What it does not: read a
file (config.py) or a message (translate.py).

Invariant: the same topic always falls under the same rule, and finding it never raises.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import tzinfo
from fnmatch import translate
from typing import NamedTuple

from devices.bridge.names import EVENT_TYPE_CHARS_MAX, event_type_of
from devices.bridge.presets import DISCOVERY_RULES, PRESETS, Preset, Rule
from devices.bridge.template import TOPIC_CHARS_MAX, Template, compile_template, overlap

_CACHED_MAX = 20_000


@dataclass(frozen=True)
class SourceSettings:
    """What the configuration says of one source; None and empty: as the preset has it."""

    preset: str
    zone: tzinfo
    prefix: str | None = None
    topic: str | None = None
    device: str | None = None
    time: tuple[str, ...] = ()
    take: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)
    retained: bool = False


class Place(NamedTuple):
    """Where a topic belongs, and what its placeholders stand for."""

    source: "Source"
    rule: Rule
    levels: Mapping[str, str]
    device: str  # its name by the topic; empty if the topic has none
    path: tuple[str, ...]  # of the event type, in front of that of a payload's keys


class Source:
    """One source. Raises TemplateError for a topic that is no template."""

    def __init__(self, settings: SourceSettings) -> None:
        self.settings = settings
        self.preset: Preset = PRESETS[settings.preset]
        prefix = self.preset.prefix if settings.prefix is None else settings.prefix
        rules = self.preset.rules
        if settings.topic is not None:
            rules = (_own_rule(settings.topic, rules),)
        self._rules: list[tuple[Rule, Template]] = []
        for rule in rules:
            topic = rule.topic
            if prefix and not self.preset.prefix and settings.topic is None:
                topic = f"{prefix}/{topic}"  # topics that begin with the device
            template = compile_template(topic.replace("{prefix}", prefix), rule.where)
            self._rules.append((rule, template))
        self.prefix = prefix
        self.times = [path.split(".") for path in settings.time or self.preset.time]
        self._takes = _any_of(settings.take)
        times = [pattern for path in settings.time for pattern in (path, f"*.{path}")]
        self._leaves = _any_of((*self.preset.leave, *settings.leave, *times))
        self._told_units = _compiled(settings.units.items())
        self._units = _compiled(self.preset.units)
        self.unit_keys = [(key, _any_of(patterns)) for key, patterns in self.preset.unit_keys]
        self._is_secret = re.compile(self.preset.secret) if self.preset.secret else None
        self._known: dict[str, Kind] = {}

    @property
    def filters(self) -> list[str]:
        """The topic filters to subscribe to."""
        if self.preset.subscribe and self.settings.topic is None:
            return [self.preset.subscribe.replace("{prefix}", self.prefix)]
        rules = (template for rule, template in self._rules if not rule.ignore)
        return [each for template in rules for each in template.filters]

    def brings(self, filters: Iterable[str]) -> str | None:
        """Return which of the filters, a + of which is one name, a rule reads; None if none."""
        for own in filters:
            for rule, template in self._rules:
                # Of the names that a + can stand for, those count that the template demands.
                names = {"x", *template.text.split("/")}
                if not rule.ignore and any(template.match(own.replace("+", n)) for n in names):
                    return own
        return None

    def place(self, topic: str) -> tuple[tuple[int, int], Place] | None:
        """Return where the topic belongs in this source, and how closely it fits."""
        for rule, template in self._rules:
            if (levels := template.match(topic)) is not None:
                return template.literals, self.place_of(rule, levels)
        return None

    def place_of(self, rule: Rule, levels: Mapping[str, str]) -> Place:
        """Return where a topic that the rule has taken apart belongs."""
        known = {"prefix": self.prefix, "device": self.prefix, **levels}
        parts = (*rule.event_type.split("/"), *levels.get("event_type", "").split("/"))
        return Place(self, rule, levels, _filled(rule.device, known), tuple(filter(None, parts)))

    def named(self, name: str, levels: Mapping[str, str]) -> str:
        """Return the device's name as the configuration wants it."""
        wanted = self.settings.device
        return name if wanted is None else _filled(wanted, {**levels, "device": name})

    def is_secret(self, name: str) -> bool:
        """Tell whether the device's name must be kept nowhere."""
        return self._is_secret is not None and self._is_secret.fullmatch(name) is not None

    def kind(self, path: str) -> "Kind":
        """Return what the configuration and the tables say of a path, and its event type."""
        known = self._known.get(path)
        if known is None:
            event_type = event_type_of(path)
            known = Kind(
                event_type,
                self._is_taken(event_type),
                _first(self._told_units, event_type),
                _first(self._units, event_type),
                self.settings.rename.get(event_type, event_type),
            )
            if len(self._known) < _CACHED_MAX and len(path) <= EVENT_TYPE_CHARS_MAX:
                self._known[path] = known
        return known

    def _is_taken(self, event_type: str) -> bool:
        if self._takes is not None:
            return self._takes.fullmatch(event_type) is not None
        return self._leaves is None or not self._leaves.fullmatch(event_type)


class Kind(NamedTuple):
    """An event type: is it stored, its unit by the configuration and the preset, and its name."""

    event_type: str
    is_taken: bool
    told_unit: str | None
    usual_unit: str | None
    name: str


class Sources:
    """All sources, and the discovery that each of them learns units from."""

    def __init__(self, sources: Iterable[Source], own: Iterable[str] = ()) -> None:
        """`own`: filters of what the stack itself writes to the same broker: no source reads it."""
        self.sources = list(sources)
        self._own = tuple(own)
        self._discovery = [(rule, compile_template(rule.topic)) for rule in DISCOVERY_RULES]
        self._places: dict[str, Place | None] = {}

    @property
    def filters(self) -> list[str]:
        """The topic filters of all of them."""
        own = [each for source in self.sources for each in source.filters]
        return own + [each for _, template in self._discovery for each in template.filters]

    def place(self, topic: str) -> Place | None:
        """Return the source and rule of a topic: of several the one that names most levels."""
        try:
            return self._places[topic]
        except KeyError:
            pass
        found = self._find(topic) if len(topic) <= TOPIC_CHARS_MAX else None
        if len(self._places) < _CACHED_MAX:
            self._places[topic] = found
        return found

    def is_own(self, topic: str) -> bool:
        """Tell whether the stack itself writes to this topic."""
        return any(overlap(each, topic) for each in self._own)

    def _find(self, topic: str) -> Place | None:
        # `$SYS/broker/uptime`: what a broker tells of itself; no wildcard brings it either.
        if self.is_own(topic) or topic.startswith("$"):
            return None
        for rule, template in self._discovery:
            if (levels := template.match(topic)) is not None and self.sources:
                return self.sources[0].place_of(rule, levels)
        best: tuple[tuple[int, int], Place] | None = None
        for source in self.sources:
            found = source.place(topic)
            if found and (best is None or found[0] > best[0]):
                best = found
        return best[1] if best else None


def _own_rule(topic: str, rules: tuple[Rule, ...]) -> Rule:
    """Return the rule of a topic that replaces a preset's: where the readings stand is the same."""
    at = next((rule.at for rule in rules if rule.at), ())
    device_keys: tuple[str, ...] = ()
    if "{device}" not in topic and "{device...}" not in topic:
        device_keys = next((rule.device_keys for rule in rules if rule.device_keys), ())
    return Rule(topic, at=at, device="" if device_keys else "{device}", device_keys=device_keys)


def _filled(text: str, levels: Mapping[str, str]) -> str:
    if text == "{device}":
        return levels["device"]
    for placeholder, level in levels.items():
        text = text.replace(f"{{{placeholder}}}", level)
    return text


def _compiled(units: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(translate(pattern)), unit) for pattern, unit in units]


def _first(units: list[tuple[re.Pattern[str], str]], event_type: str) -> str | None:
    return next((unit for pattern, unit in units if pattern.fullmatch(event_type)), None)


def _any_of(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(translate(pattern) for pattern in patterns)
    return re.compile(joined) if joined else None
