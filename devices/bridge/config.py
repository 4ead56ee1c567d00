"""The configuration file: from TOML to sources and the other side's broker.

What it does: reads the file and the environment, and says in one line what is wrong, and where.
What it does not: connect, or guess what a misspelt key means.

Invariant: what comes out can be run. No input of it is one of the stack's own topics at the same
broker, so the bridge never reads what it has written.
"""

import sys
import tomllib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo

from devices.bridge.presets import PRESETS
from devices.bridge.source import Source, Sources, SourceSettings
from devices.bridge.template import TemplateError, compile_template
from devices.bridge.value import unit_name

_SOURCE_KEYS = {
    "preset": str,
    "prefix": str,
    "topic": str,
    "device": str,
    "timezone": str,
    "time": (str, list),
    "take": list,
    "leave": list,
    "rename": dict,
    "units": dict,
    "retained": bool,
    "portal": str,
}
_BROKER_KEYS = {
    "host": str,
    "port": int,
    "username": str,
    "password": str,
    "password_file": str,
    "tls": bool,
    "ca_file": str,
    "client_id": str,
}
_WORDS = {str: "a text", list: "a list of texts", dict: "a table", bool: "true or false", int: "a"
          " whole number"}  # fmt: skip


class ConfigError(Exception):
    """The configuration cannot be run; the text is one line, with the place."""


@dataclass(frozen=True)
class BrokerSettings:
    """A broker, and who we are there."""

    host: str
    port: int
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    tls: bool = False
    client_id: str = "homelab-bridge"


@dataclass(frozen=True)
class Topics:
    """The stack's own topics; `events` has a + for the device id, `acks` {device_id}."""

    events: str = "qs/v1/+/events"
    acks: str = "qs/v1/{device_id}/acks"
    deadletter: str = "qs/v1/deadletter"
    status: str = "qs/v1/ingester/status"

    @property
    def filters(self) -> tuple[str, ...]:
        """Filters that bring all of them."""
        acks = self.acks.replace("{device_id}", "+")
        return self.events, acks, self.deadletter, self.status


@dataclass(frozen=True)
class Configuration:
    """Everything that is configured."""

    sources: Sources
    theirs: BrokerSettings
    ours: BrokerSettings
    topics: Topics
    store: str
    log_level: str
    victron_portals: tuple[str, ...]  # kept alive; + for all that are heard of


def load(path: str, env: Mapping[str, str]) -> Configuration:
    """Return what the file (-: standard input) and the environment say. Raises ConfigError."""
    try:
        with nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            document = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return _configuration(document, env)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _configuration(document: dict[str, Any], env: Mapping[str, str]) -> Configuration:
    _check_keys(document, {"broker": dict, "source": list}, "")
    topics = Topics(
        env.get("MQTT_EVENTS_TOPIC") or Topics.events,
        env.get("ACK_TEMPLATE") or Topics.acks,
        env.get("MQTT_DEADLETTER_TOPIC") or Topics.deadletter,
        env.get("MQTT_STATUS_TOPIC") or Topics.status,
    )
    ours = _our_broker(env)
    theirs = _their_broker(document.get("broker", {}), ours)
    tables = document.get("source", [])
    if not tables:
        raise ConfigError('no [[source]]: name at least one, such as preset = "zigbee2mqtt"')
    sources = [_source(table, f"source {number}", env) for number, table in enumerate(tables, 1)]
    is_same = (theirs.host.lower(), theirs.port) == (ours.host.lower(), ours.port)
    if is_same:
        for number, source in enumerate(sources, 1):
            _refuse_loop(source, topics, f"source {number}")
    level = (env.get("LOG_LEVEL") or "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigError("LOG_LEVEL: expected one of DEBUG, INFO, WARNING, ERROR")
    portals = {table.get("portal", "+") for table in tables if table.get("preset") == "victron"}
    return Configuration(
        Sources(sources, topics.filters if is_same else ()),
        theirs,
        ours,
        topics,
        env.get("BRIDGE_STORE") or "bridge-store",
        level,
        tuple(sorted(portals)),
    )


def _refuse_loop(source: Source, topics: Topics, place: str) -> None:
    if own := source.brings(topics.filters):
        raise ConfigError(
            f"{place}: it would read {own}, which the stack itself writes: a loop; name a prefix"
            " or a topic that leaves it out"
        )


def _source(table: Any, place: str, env: Mapping[str, str]) -> Source:
    _check_keys(table, _SOURCE_KEYS, place)
    preset = table.get("preset", "plain")
    if preset not in PRESETS:
        raise ConfigError(f"{place}: preset: {preset!r} is none of {', '.join(PRESETS)}")
    prefix = table.get("prefix")
    if prefix is not None and (not prefix or set(prefix) & set("+#{}") or "" in prefix.split("/")):
        raise ConfigError(f"{place}: prefix: expected levels of a topic, got {prefix!r}")
    time = table.get("time", [])
    if "portal" in table and preset != "victron":
        raise ConfigError(f'{place}: portal: only of preset = "victron"')
    settings = SourceSettings(
        preset,
        _zone(table.get("timezone"), place, env),
        prefix,
        table.get("topic"),
        table.get("device"),
        (time,) if isinstance(time, str) else _texts(time, f"{place}: time"),
        _texts(table.get("take", []), f"{place}: take"),
        _texts(table.get("leave", []), f"{place}: leave"),
        _names(table.get("rename", {}), f"{place}: rename"),
        _names(table.get("units", {}), f"{place}: units"),
        table.get("retained", False),
    )
    for name, unit in settings.units.items():
        if unit_name(unit) is None:
            raise ConfigError(f"{place}: units: {name}: expected 1 to 50 characters")
    for name, new in settings.rename.items():
        if not 0 < len(new) <= 100 or not new.isprintable():
            raise ConfigError(f"{place}: rename: {name}: expected 1 to 100 characters")
    _check_topic(settings, place)
    try:
        return Source(settings)
    except TemplateError as error:
        raise ConfigError(f"{place}: topic: {error}") from None


def _check_topic(settings: SourceSettings, place: str) -> None:
    topic, device = settings.topic, settings.device
    names: frozenset[str] = frozenset({"device"})
    if topic is not None:
        if not topic or len(topic.encode()) > 1_000:
            raise ConfigError(f"{place}: topic: expected 1 to 1000 bytes")
        try:
            names = compile_template(topic.replace("{prefix}", settings.prefix or "x")).names
        except TemplateError as error:
            raise ConfigError(f"{place}: topic: {error}") from None
        own_keys = settings.preset == "rtl_433"
        if "device" not in names and device is None and not own_keys:
            raise ConfigError(f'{place}: topic: no {{device}} in it; set device = "a-name"')
    if device is not None and not device:
        raise ConfigError(f'{place}: device: expected a name, such as "attic-{{device}}"')


def _zone(name: str | None, place: str, env: Mapping[str, str]) -> ZoneInfo:
    key = name or env.get("DEVICE_DEFAULT_TZ") or "UTC"
    where = f"{place}: timezone" if name else "DEVICE_DEFAULT_TZ"
    try:
        return ZoneInfo(key)
    except (KeyError, ValueError, OSError):
        raise ConfigError(f"{where}: {key!r} is no IANA time zone such as Europe/Berlin") from None


def _our_broker(env: Mapping[str, str]) -> BrokerSettings:
    password = env.get("MQTT_PASSWORD") or None
    if file := env.get("MQTT_PASSWORD_FILE"):
        password = _password(file, "MQTT_PASSWORD_FILE")
    return BrokerSettings(
        env.get("MQTT_HOST") or "localhost",
        _port(env.get("MQTT_PORT") or "1883", "MQTT_PORT"),
        env.get("MQTT_USERNAME") or None,
        password,
        env.get("MQTT_CA_FILE") or None,
        (env.get("MQTT_TLS") or "").lower() == "true" or bool(env.get("MQTT_CA_FILE")),
        env.get("BRIDGE_CLIENT_ID") or BrokerSettings.client_id,
    )


def _their_broker(table: dict[str, Any], ours: BrokerSettings) -> BrokerSettings:
    _check_keys(table, _BROKER_KEYS, "broker")
    client_id = table.get("client_id", ours.client_id)
    if "host" not in table:
        if set(table) - {"client_id"}:
            raise ConfigError("broker: host: missing; without it the broker is the stack's own")
        return BrokerSettings(
            ours.host, ours.port, ours.username, ours.password, ours.ca_file, ours.tls, client_id
        )
    password = table.get("password")
    if file := table.get("password_file"):
        password = _password(file, "broker: password_file")
    return BrokerSettings(
        table["host"],
        _port(table.get("port", 1883), "broker: port"),
        table.get("username"),
        password,
        table.get("ca_file"),
        table.get("tls", False) or "ca_file" in table,
        client_id,
    )


def _password(path: str, place: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: {path!r} cannot be read: {error}") from None


def _port(given: str | int, place: str) -> int:
    text = str(given)
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65_535):
        raise ConfigError(f"{place}: expected a whole number from 1 to 65535, got {given!r}")
    return int(text)


def _check_keys(table: Any, known: Mapping[str, Any], place: str) -> None:
    where = f"{place}: " if place else ""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}expected a table")
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}{key}: unknown; known are {', '.join(known)}")
        kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
        if type(value) not in kinds:
            wanted = " or ".join(_WORDS[kind] for kind in kinds)
            raise ConfigError(f"{where}{key}: expected {wanted}, got {value!r:.50}")


def _texts(given: list[Any], place: str) -> tuple[str, ...]:
    if not all(isinstance(each, str) and each for each in given):
        raise ConfigError(f"{place}: expected a list of texts, got {given!r:.50}")
    return tuple(given)


def _names(given: dict[str, Any], place: str) -> dict[str, str]:
    if not all(isinstance(each, str) and each for each in given.values()):
        raise ConfigError(f'{place}: expected texts, as {{ "ENERGY.Power" = "power" }}')
    return given
