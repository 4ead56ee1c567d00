"""One message of other firmware, and the readings that it holds.

What it does: finds the rule of its topic, takes the payload apart, and makes readings with a device
id, an event type, a value, a unit and a time that the contract allows. It learns units and, of
rtl_433, times from other messages. What it does not: I/O, or ask a clock.

Invariant: any bytes on any topic give a Translation, never an exception, by work that is bounded;
and each reading is one that the ingester takes.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, NamedTuple

from devices.bridge.moment import moment
from devices.bridge.names import DeviceNames, TooManyNames, digest
from devices.bridge.presets import COMMAND, COMMAND_LEVELS, Rule
from devices.bridge.source import Place, Source, Sources
from devices.bridge.units import LearntUnits
from devices.bridge.value import TEXT_CHARS_MAX, of_json, of_text, storable, unit_name
from devices.python.telemetry import NO_TIME, Event
from devices.python.telemetry.event import timestamp_text

# Bytes. Zigbee2MQTT's list of devices can have some MB, and is no reading.
PAYLOAD_BYTES_MAX = 65_536
LEARNT_BYTES_MAX = 4_194_304
NODES_MAX = 2_000
READINGS_MAX = 500
DEPTH_MAX = 16
# What is remembered of messages and readings that came shortly before.
REMEMBERED_MAX = 10_000
# Between rtl_433's message with the time and those with the fields.
TIME_SECONDS_MAX = 2.0

# Why nothing is stored, beside the reasons of presets.py.
RETAINED = "retained: an old state"
UNKNOWN_TOPIC = "topic of no source"
OWN_TOPIC = "the stack's own topic"
NOTHING_IN_IT = "no value"
LEFT = "left out by the preset or the configuration"
BINARY = "not a text"
REPEATED = "the same message again"
ECHO = "the same reading by another topic"
LEARNT = "only learnt from"
# Why something that looks like a reading cannot become one.
NOT_JSON = "not JSON"
TOO_LARGE = f"more than {PAYLOAD_BYTES_MAX} bytes"
TOO_DEEP = f"nested deeper than {DEPTH_MAX} levels"
TOO_MANY = f"more than {READINGS_MAX} readings, or {NODES_MAX} keys"
TOO_LONG = f"a text of more than {TEXT_CHARS_MAX} characters"
NO_DEVICE = "no device in the topic or the payload"
NOT_DECODED = "the readings are not where the format has them"

# As printf and Python write what JSON has no word for.
_NOT_FINITE = re.compile(r"(?<=[:\[,\s])[-+]?(?:nan|inf(?:inity)?)(?=\s*[,}\]])", re.IGNORECASE)
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)


class Incoming(NamedTuple):
    """A message as it came; `received_at` is None for a recorded one."""

    topic: str
    payload: bytes
    retained: bool = False
    received_at: datetime | None = None
    is_redelivered: bool = False
    zone: tzinfo | None = None  # of a recorded message, where it is not the source's


class Translation(NamedTuple):
    """What a message becomes: events, and how many values were not stored and why.

    `dead_end` says why something that looks like a reading is none; it has no events then.
    """

    events: list[Event]
    skipped: Mapping[str, int]
    source: str
    device_id: str | None = None
    dead_end: str | None = None


class _Common(NamedTuple):
    """What all readings of a document have; `event_id` begins theirs if it has a time of its own.

    Without one they get their ids from the outbox.
    """

    event_id: str | None
    device_id: str
    happened_at: datetime | float
    meta: dict[str, Any]

    def event(
        self,
        event_type: str,
        value: float | str,
        unit: str | None,
        meta: dict[str, Any],
        number: int,
    ) -> Event:
        """Return the event; `number` tells those of one document apart that have one type."""
        event_id = self.event_id
        if event_id is not None:
            event_id += f"-{number}-{event_type}" if number else f"-{event_type}"
        return Event(event_type, value, unit, self.happened_at, meta, self.device_id, event_id)


class _DeadEnd(Exception):
    """From where a message turns out to be none of ours to where it becomes a Translation."""


class Translator:
    """The sources, and what has been learnt so far."""

    def __init__(
        self,
        sources: Sources,
        names: DeviceNames | None = None,
        units: LearntUnits | None = None,
    ) -> None:
        self._sources = sources
        self.names = names or DeviceNames()
        self.units = units or LearntUnits()
        self._times: OrderedDict[str, tuple[datetime, datetime | None]] = OrderedDict()
        self._messages: OrderedDict[bytes, datetime] = OrderedDict()
        self._values: OrderedDict[tuple[object, ...], tuple[str, datetime]] = OrderedDict()

    def translate(self, message: Incoming) -> Translation:
        """Return what a message becomes. Never raises."""
        place = self._sources.place(message.topic)
        if place is None:
            is_own = self._sources.is_own(message.topic)
            return _nothing(OWN_TOPIC if is_own else UNKNOWN_TOPIC, "")
        source, rule = place.source, place.rule
        name = source.settings.preset
        if rule.learn:
            return self._learn(message, place)
        if rule.ignore or _is_command(message.topic):
            return _nothing(rule.ignore or COMMAND, name)
        if message.retained and not source.settings.retained:
            return _nothing(RETAINED, name)
        try:
            return self._readings(message, place)
        except (_DeadEnd, TooManyNames) as error:
            if source.is_secret(place.device):  # it stays out of the dead letters and the log, too
                return _nothing(str(error), name)
            named = source.named(place.device, place.levels)
            device_id = self._device_id_of(named) if place.device else None
            return Translation([], {}, name, device_id, str(error))

    def _device_id_of(self, name: str) -> str | None:
        try:
            return self.names.device_id(name)
        except TooManyNames:
            return None

    # --- what a payload holds --------------------------------------------------------

    def _readings(self, message: Incoming, place: Place) -> Translation:
        source, rule = place.source, place.rule
        name = source.settings.preset
        if len(message.payload) > PAYLOAD_BYTES_MAX:
            raise _DeadEnd(TOO_LARGE)
        received_at = message.received_at or datetime.now(UTC)
        if self._is_repeated(message, source, received_at):
            return _nothing(REPEATED, name)
        documents = _documents(message.payload, rule)
        if documents is None:
            return _nothing(BINARY, name)
        events: list[Event] = []
        skipped: dict[str, int] = {}
        for document in documents:
            self._take(document, message, place, received_at, events, skipped)
        if not events and not skipped:  # [{}]
            _count(skipped, NOTHING_IN_IT)
        if len(events) > READINGS_MAX:
            raise _DeadEnd(TOO_MANY)
        if source.preset.echo_seconds and message.received_at and not message.is_redelivered:
            events = self._without_echoes(events, message, source, skipped)
        return Translation(events, skipped, name)

    def _take(
        self,
        document: Any,
        message: Incoming,
        place: Place,
        received_at: datetime,
        events: list[Event],
        skipped: dict[str, int],
    ) -> None:
        """Add the readings of one document."""
        source = place.source
        device, above = self._device(document, place)
        happened_at = self._time(document, message, source, device, received_at)
        if message.retained and happened_at is None:
            # It has no age: each restart would add rows.
            _count(skipped, RETAINED)
            return
        all_have = self._common(message, place, device, happened_at)
        inside = _inside(document, place.rule)
        siblings = _sibling_units(inside, source)
        base = (*above, *place.path)
        times: dict[str, int] = {}
        for path, value in _flat(inside):
            full = ".".join(filter(None, (*base, *path)))
            kind = source.kind(full)
            if not kind.is_taken:
                _count(skipped, LEFT)
                continue
            found = of_json(value, path[-1] if path else full.rpartition(".")[2])
            if found.value is None:
                _count(skipped, NOTHING_IN_IT)
                continue
            unit = None
            if not isinstance(found.value, str):
                unit = (
                    kind.told_unit
                    or found.unit
                    or _unit_of_sibling(siblings, kind.event_type)
                    or self._learnt(message.topic, path, place)
                    or kind.usual_unit
                )
            elif len(found.value) > TEXT_CHARS_MAX:
                raise _DeadEnd(TOO_LONG)
            meta = all_have.meta
            if kind.name != full:
                meta = {**meta, "type": storable(full[:500])}
            number = times.get(kind.name, 0)
            times[kind.name] = number + 1
            events.append(all_have.event(kind.name, found.value, unit, meta, number))
            if len(events) > READINGS_MAX:
                raise _DeadEnd(TOO_MANY)

    def _common(
        self, message: Incoming, place: Place, device: str, happened_at: datetime | None
    ) -> "_Common":
        """Return what all readings of a document have."""
        source = place.source
        is_secret = source.is_secret(device)
        named = source.named(f"ecowitt-{digest(device, 8)}" if is_secret else device, place.levels)
        device_id = self.names.device_id(named)
        meta: dict[str, Any] = {"source": source.settings.preset}
        if not is_secret:
            meta["topic"] = storable(message.topic)
        if device_id != named:
            meta["device"] = storable(named)
        if happened_at is None:
            if message.received_at is not None:
                meta["received_at"] = timestamp_text(message.received_at)
            return _Common(None, device_id, NO_TIME, meta)
        # The same message again is the same event: its topic, payload and time say so.
        text = message.payload.decode("latin-1")
        said = digest(f"{message.topic}\0{timestamp_text(happened_at)}\0{text}", 24)
        return _Common(f"bridge-{said}", device_id, happened_at, meta)

    def _device(self, document: Any, place: Place) -> tuple[str, tuple[str, ...]]:
        """Return the device's name, and what of it turns out to be the reading's path."""
        source, rule, device = place.source, place.rule, place.device
        if rule.device_keys and isinstance(document, dict):
            parts = (document.get(key) for key in rule.device_keys)
            device = "/".join(
                str(part) for part in parts if isinstance(part, (str, int, float)) and part != ""
            )
        is_text = not isinstance(document, (dict, list))
        if rule.text_has_type and is_text and not self.units.is_zigbee_name(source.prefix, device):
            # Zigbee2MQTT with `output: attribute`, where a device has not just this name.
            above, _, last = device.rpartition("/")
            return (above, (last,)) if above else (device, ())
        if not device and source.settings.device is None:
            raise _DeadEnd(NO_DEVICE)
        return device, ()

    def _time(
        self,
        document: Any,
        message: Incoming,
        source: Source,
        device: str,
        received_at: datetime,
    ) -> datetime | None:
        for path in source.times:
            given = _at(document, path)
            if given is not None:
                found = moment(given, message.zone or source.settings.zone, received_at)
                if found is not None:
                    return found
        told = self._times.get(f"{source.settings.preset}\0{device}") if self._times else None
        if told is None:
            return None
        found, told_at = told
        if told_at is None or message.received_at is None:
            return found
        age_seconds = (message.received_at - told_at).total_seconds()
        return found if age_seconds <= TIME_SECONDS_MAX else None

    def _learnt(self, topic: str, path: tuple[str, ...], place: Place) -> str | None:
        if self.units.is_empty:
            return None
        learnt = self.units.unit(topic, ".".join(filter(None, path)))
        if learnt is None and place.levels.get("event_type") == "state":
            learnt = self.units.unit(f"{topic.rpartition('/')[0]}\0", "")
        return learnt

    # --- what is learnt ----------------------------------------------------------------

    def _learn(self, message: Incoming, place: Place) -> Translation:
        source, rule = place.source, place.rule
        if len(message.payload) <= LEARNT_BYTES_MAX:
            if rule.learn == "units":
                self.units.learn_discovery(_json(message.payload))
            elif rule.learn == "zigbee2mqtt":
                self.units.learn_zigbee(source.prefix, _json(message.payload))
            elif rule.learn == "unit":
                unit = _json(message.payload)
                if not isinstance(unit, str):
                    unit = message.payload[:100].decode("utf-8", "replace")
                self.units.learn(f"{message.topic.rpartition('/')[0]}\0", "", unit)
            elif rule.learn == "time" and not message.retained:
                self._learn_time(message, place)
        return _nothing(LEARNT, source.settings.preset)

    def _learn_time(self, message: Incoming, place: Place) -> None:
        source = place.source
        text = message.payload[:100].decode("utf-8", "replace")
        received_at = message.received_at or datetime.now(UTC)
        key = f"{source.settings.preset}\0{place.device}"
        self._times.pop(key, None)
        if found := moment(text, message.zone or source.settings.zone, received_at):
            self._times[key] = found, message.received_at
            if len(self._times) > REMEMBERED_MAX:
                self._times.popitem(last=False)

    # --- what comes more than once --------------------------------------------------------

    def _is_repeated(self, message: Incoming, source: Source, received_at: datetime) -> bool:
        # What the broker delivers again was perhaps never stored.
        if not source.preset.repeat_seconds or message.is_redelivered:
            return False
        text = f"{message.topic}\0".encode("utf-8", "replace") + message.payload
        key = hashlib.blake2b(text, digest_size=16).digest()
        before = self._messages.pop(key, None)
        self._messages[key] = received_at
        if len(self._messages) > REMEMBERED_MAX:
            self._messages.popitem(last=False)
        within = timedelta(seconds=source.preset.repeat_seconds)
        return before is not None and timedelta(0) <= received_at - before <= within

    def _without_echoes(
        self,
        events: list[Event],
        message: Incoming,
        source: Source,
        skipped: dict[str, int],
    ) -> list[Event]:
        """Return what has not just come by another topic."""
        assert message.received_at is not None
        within = timedelta(seconds=source.preset.echo_seconds)
        kept = []
        for event in events:
            key = event.device_id, event.event_type, event.value
            topic, before = self._values.pop(key, ("", message.received_at))
            is_echo = topic not in ("", message.topic) and (
                timedelta(0) <= message.received_at - before <= within
            )
            if is_echo:
                skipped[ECHO] = skipped.get(ECHO, 0) + 1
                continue  # and a third one by the first topic is a new one
            self._values[key] = message.topic, message.received_at
            if len(self._values) > REMEMBERED_MAX:
                self._values.popitem(last=False)
            kept.append(event)
        return kept


def _is_command(topic: str) -> bool:
    return topic.rpartition("/")[2] in COMMAND_LEVELS or topic.startswith("cmnd/")


def _count(skipped: dict[str, int], reason: str) -> None:
    skipped[reason] = skipped.get(reason, 0) + 1


def _unit_of_sibling(units: list[tuple[re.Pattern[str], str]], event_type: str) -> str | None:
    return next((unit for pattern, unit in units if pattern.fullmatch(event_type)), None)


def _nothing(reason: str, source: str) -> Translation:
    return Translation([], {reason: 1}, source)


def _json(payload: bytes) -> Any:
    """Return the document; None for what is none."""
    try:
        return _DECODER.decode(payload.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _documents(payload: bytes, rule: Rule) -> list[Any] | None:
    """Return what a payload holds: texts, or JSON documents; None for what is no text.

    Raises _DeadEnd for what should be JSON and is not.
    """
    data = payload.removeprefix(b"\xef\xbb\xbf").strip(b" \t\r\n\0")
    if not data:
        return [None]
    is_json = data[:1] in (b"{", b"[")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        if is_json or (rule.json_only and len(data) < 4_096):
            raise _DeadEnd(NOT_JSON) from None
        # 21.5 °C of a program that knows no UTF-8.
        text = data.decode("latin-1")
        found = of_text(text, "") if len(text) <= 40 else None
        return [text] if found is not None and isinstance(found.value, (int, float)) else None
    if is_json:
        return _parsed(text)
    if text[0] == '"':
        document = _json(data)
        if isinstance(document, str):
            return [document]
    if rule.json_only and of_text(text, "").value is not None:
        raise _DeadEnd(NOT_JSON)
    if rule.json_only:
        return [None]
    if len(text) > TEXT_CHARS_MAX:
        raise _DeadEnd(TOO_LONG)
    if rule.timed_text and ":" in text:
        time, *values = text.split(":")
        # One value has the topic's name alone, since an empty key falls out.
        numbered = enumerate(values) if len(values) > 1 else [("", values[0])]
        return [{"time": time, **{str(number): value for number, value in numbered}}]
    return [text]


def _parsed(text: str) -> list[Any]:
    """Return the documents of a text: one, or several that were run together."""
    for attempt in (text, None):
        if attempt is None:
            attempt = _NOT_FINITE.sub("null", text)
            if attempt == text:
                break
        documents: list[Any] = []
        position = 0
        try:
            while position < len(attempt):
                document, position = _DECODER.raw_decode(attempt, position)
                documents.append(document)
                while position < len(attempt) and attempt[position] in " \t\r\n\0":
                    position += 1
            if all(isinstance(each, (dict, list)) for each in documents) and len(documents) <= 20:
                return documents
        except RecursionError:
            raise _DeadEnd(TOO_DEEP) from None
        except ValueError:
            pass
    raise _DeadEnd(NOT_JSON)


def _inside(document: Any, rule: Rule) -> Any:
    """Return the part of a document that holds the readings. Raises _DeadEnd if it is not there."""
    if not rule.at or document is None:
        return document
    if not isinstance(document, dict):
        raise _DeadEnd(NOT_DECODED)
    inside = document
    for key in rule.at:
        if not isinstance(inside, dict) or key not in inside:
            raise _DeadEnd(NOT_DECODED)
        inside = inside[key]
    return _with_events(inside) if rule.at == ("params",) else inside


def _with_events(params: Any) -> Any:
    """Return Shelly's params with each of its `events` under the component that it is of."""
    events = params.get("events") if isinstance(params, dict) else None
    if not isinstance(events, list):
        return params
    found = {key: value for key, value in params.items() if key != "events"}
    for event in events:
        component = event.get("component") if isinstance(event, dict) else None
        if isinstance(component, str):
            found[component] = {k: v for k, v in event.items() if k != "component"}
    return found


def _flat(document: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each scalar with the path of its keys. Raises _DeadEnd for what is too much."""
    nodes = 0
    waiting: list[tuple[tuple[str, ...], Any]] = [((), document)]
    while waiting:
        path, node = waiting.pop()
        if isinstance(node, dict):
            children = [((*path, key), child) for key, child in node.items()]
        elif isinstance(node, list):
            children = [((*path, str(index)), child) for index, child in enumerate(node)]
        else:
            yield path, node
            continue
        nodes += len(children)
        if nodes > NODES_MAX:
            raise _DeadEnd(TOO_MANY)
        if len(path) >= DEPTH_MAX:
            raise _DeadEnd(TOO_DEEP)
        waiting += reversed(children)


def _at(document: Any, path: list[str]) -> Any:
    for key in path:
        if not isinstance(document, dict):
            return None
        document = document.get(key)
    return document


def _sibling_units(document: Any, source: Source) -> list[tuple[re.Pattern[str], str]]:
    """Return which units other keys of the same message tell."""
    found = []
    for key, pattern in source.unit_keys:
        unit = document.get(key) if isinstance(document, dict) else None
        if pattern is not None and isinstance(unit, str) and (name := unit_name(unit)):
            found.append((pattern, name))
    return found
