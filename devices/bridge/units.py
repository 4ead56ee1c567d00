"""The units that other topics tell: Home Assistant's discovery, Zigbee2MQTT's list of devices.

What it does: learns which unit belongs to which topic and path of keys. What it does not: guess.

Invariant: never raises, whatever a discovery message holds, and what is kept is bounded.
"""

import re
from collections.abc import Iterator
from typing import Any

from devices.bridge.value import unit_name

UNITS_MAX = 50_000
CHARS_MAX = 1_500  # of a topic and a path
# Of nested `features` and `components`.
_DEPTH_MAX = 4

# {{ value_json.ENERGY.Power }}, {{ value_json['ENERGY']['Power'] | float }}, value_json["SDS0X1"].
_VALUE_JSON = re.compile(r"""value_json((?:\.\w+|\[\s*(?:'[^']*'|"[^"]*"|\d+)\s*\])+)""")
_STEP = re.compile(r"""\.(\w+)|\[\s*(?:'([^']*)'|"([^"]*)"|(\d+))\s*\]""")


class LearntUnits:
    """Units by topic and path of keys; the path of a message that is one value is empty."""

    def __init__(self) -> None:
        self._units: dict[tuple[str, str], str] = {}
        self._zigbee_names: dict[str, frozenset[str]] = {}

    def unit(self, topic: str, path: str) -> str | None:
        """Return the unit of what stands there; None if nobody has told."""
        return self._units.get((topic, path))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was learnt, which is cheap to ask."""
        return not self._units

    def is_zigbee_name(self, prefix: str, name: str) -> bool:
        """Tell whether Zigbee2MQTT has told of a device of this name."""
        return name in self._zigbee_names.get(prefix, ())

    def learn(self, topic: str, path: str, unit: Any) -> None:
        """Note a unit, if it is one."""
        if isinstance(unit, str) and (name := unit_name(unit)):
            is_new = (topic, path) not in self._units
            if len(topic) + len(path) > CHARS_MAX or (is_new and len(self._units) >= UNITS_MAX):
                return
            self._units[topic, path] = name

    def learn_discovery(self, document: Any) -> None:
        """Note what a message on homeassistant/.../config tells."""
        if not isinstance(document, dict):
            return
        base = _text(document, "~")
        components = document.get("cmps", document.get("components"))
        entries = [document]
        if isinstance(components, dict):
            entries += [each for each in components.values() if isinstance(each, dict)]
        for entry in entries[:1_000]:
            unit = _text(entry, "unit_of_meas", "unit_of_measurement")
            topic = _text(entry, "stat_t", "state_topic") or _text(
                document, "stat_t", "state_topic"
            )
            if not unit or not topic:
                continue
            topic = topic.replace("~", _text(entry, "~") or base) if "~" in topic else topic
            template = _text(entry, "val_tpl", "value_template")
            self.learn(topic, _path(template), unit)

    def learn_zigbee(self, prefix: str, document: Any) -> None:
        """Note what <prefix>/bridge/devices tells."""
        names: set[str] = set()
        for device in document[:2_000] if isinstance(document, list) else ():
            if not isinstance(device, dict) or not (name := _text(device, "friendly_name")):
                continue
            names.add(name)
            definition = device.get("definition")
            exposes = definition.get("exposes") if isinstance(definition, dict) else None
            for path, unit in _exposed(exposes, "", 0):
                self.learn(f"{prefix}/{name}", path, unit)
        self._zigbee_names[prefix] = frozenset(names)


def _exposed(exposes: Any, above: str, depth: int) -> Iterator[tuple[str, Any]]:
    if not isinstance(exposes, list) or depth > _DEPTH_MAX:
        return
    for each in exposes[:500]:
        if not isinstance(each, dict):
            continue
        name = _text(each, "property")
        path = ".".join(filter(None, (above, name)))
        if name and "unit" in each:
            yield path, each["unit"]
        # Of a composite the features are keys of its object; of a light they stand beside it.
        yield from _exposed(each.get("features"), path, depth + 1)


def _text(document: dict[str, Any], *keys: str) -> str:
    for key in keys:
        if isinstance(found := document.get(key), str):
            return found
    return ""


def _path(template: str) -> str:
    """Return the path that a template takes its value from; empty for the whole message."""
    if len(template) > 1_000 or not (found := _VALUE_JSON.search(template)):
        return ""
    return ".".join(filter(None, ("".join(step) for step in _STEP.findall(found[1]))))
