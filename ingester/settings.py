"""The settings, from environment variables.

What it does: reads and checks every variable once, with the files that they name, and names
every bad one at once. What it does not: look at any of it after the start.

Invariant: a Settings that exists is complete and valid, so nothing behind it checks again.
"""

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from zoneinfo import ZoneInfo

from ingester.secret import is_open_to_others, read_password
from ingester.tls import make_context
from ingester.topic import TOPIC_BYTES_MAX, Topics, topic_problems

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
# libpq's documentation, "Database Connection Control Functions", sslmode.
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

_MQTT_TEXTS = ("MQTT_CLIENT_ID", "MQTT_USERNAME", "MQTT_PASSWORD")
# libpq's variables that name a file to read.
_LIBPQ_FILES = (
    "PGPASSFILE",
    "PGSERVICEFILE",
    "PGSSLROOTCERT",
    "PGSSLCERT",
    "PGSSLKEY",
    "PGSSLCRL",
)
_POSTGRES_TEXTS = ("POSTGRES_HOST", "POSTGRES_DB", "POSTGRES_USER", "POSTGRES_PASSWORD")


class SettingsError(Exception):
    """The environment does not make valid settings; the text names each bad variable."""


@dataclass(frozen=True)
class Settings:
    """Everything that can be configured; .env documents each variable.

    `database` holds what libpq is told: where the servers are, one or a list of each, and
    what its own variables (PGUSER, ...) leave open, which it reads itself. `mqtt_tls` is None
    for none. `retention_days` is None for ever. `heartbeat_file` is None where nobody looks.
    """

    database: Mapping[str, str | int] = field(repr=False)
    mqtt_host: str
    mqtt_port: int
    mqtt_tls: ssl.SSLContext | None
    mqtt_username: str | None
    mqtt_password: str | None = field(repr=False)
    mqtt_client_id: str
    topics: Topics
    device_default_tz: ZoneInfo
    log_level: str
    batch_max: int
    retention_days: int | None
    heartbeat_file: str | None

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Return the settings that `env` describes; an empty variable counts as absent.

        Raises SettingsError, which names every missing or bad variable and its fix.
        """
        problems: list[str] = []
        topics = Topics(
            events=env.get("MQTT_EVENTS_TOPIC") or "qs/v1/+/events",
            ack_template=env.get("ACK_TEMPLATE") or "qs/v1/{device_id}/acks",
            deadletter=env.get("MQTT_DEADLETTER_TOPIC") or "qs/v1/deadletter",
            status=env.get("MQTT_STATUS_TOPIC") or "qs/v1/ingester/status",
        )
        log_level = (env.get("LOG_LEVEL") or "INFO").upper()
        if log_level not in LOG_LEVELS:
            problems.append(f"LOG_LEVEL: expected one of {', '.join(LOG_LEVELS)}")
        if not env.get("MQTT_HOST"):
            problems.append("MQTT_HOST: missing; set it to the broker's host name")
        elif not _is_host(env["MQTT_HOST"]):
            problems.append(f"MQTT_HOST: expected a host name, got {env['MQTT_HOST']!r}")
        settings = cls(
            database=_database(env, problems),
            mqtt_host=env.get("MQTT_HOST", ""),
            mqtt_port=_integer(env, "MQTT_PORT", 1883, 65_535, problems),
            mqtt_tls=make_context(env, problems),
            mqtt_username=env.get("MQTT_USERNAME") or None,
            mqtt_password=_mqtt_password(env, problems),
            mqtt_client_id=env.get("MQTT_CLIENT_ID") or "homelab-ingester",
            topics=topics,
            device_default_tz=_time_zone(env, "DEVICE_DEFAULT_TZ", problems),
            log_level=log_level,
            batch_max=_integer(env, "BATCH_MAX", 500, 10_000, problems),
            # Empty or absent: 0. As a number, 0 is refused, as it could mean two things.
            retention_days=_integer(env, "RETENTION_DAYS", 0, 36_500, problems) or None,
            heartbeat_file=_heartbeat_file(env, problems),
        )
        problems += topic_problems(topics)
        problems += [
            f"{name}: not UTF-8, or too long"
            for name in _MQTT_TEXTS + _POSTGRES_TEXTS
            if not _is_text(env, name)
        ]
        if problems:
            raise SettingsError(
                "cannot start, the settings are wrong (see .env):"
                + "".join(f"\n  {problem}" for problem in problems)
            )
        return settings


def _mqtt_password(env: Mapping[str, str], problems: list[str]) -> str | None:
    password, file = env.get("MQTT_PASSWORD"), env.get("MQTT_PASSWORD_FILE")
    if (password or file) and not env.get("MQTT_USERNAME"):
        problems.append("MQTT_USERNAME: missing, and the password needs it")
    if password and file:
        problems.append("MQTT_PASSWORD_FILE: set, and MQTT_PASSWORD as well; empty one of them")
    elif file:
        return read_password("MQTT_PASSWORD_FILE", file, problems)
    return password or None


def _heartbeat_file(env: Mapping[str, str], problems: list[str]) -> str | None:
    path = env.get("HEARTBEAT_FILE") or None
    if path is None:
        return None
    existed = os.path.exists(path)
    try:
        with open(path, "ab"):  # which leaves its time as it is: nothing beats yet
            pass
        if not existed:
            os.unlink(path)
    except OSError as error:
        problems.append(
            f"HEARTBEAT_FILE: {path!r} cannot be written ({error.strerror}); name a file in a"
            " folder that the ingester's user may write to"
        )
    return path


def _database(env: Mapping[str, str], problems: list[str]) -> dict[str, str | int]:
    """Return what libpq's own variables leave open, from the POSTGRES_ ones."""
    if env.get("PGSSLMODE") and env["PGSSLMODE"] not in SSL_MODES:
        problems.append(f"PGSSLMODE: expected one of {', '.join(SSL_MODES)}")
    password = env.get("POSTGRES_PASSWORD")
    if file := env.get("POSTGRES_PASSWORD_FILE"):
        password = read_password("POSTGRES_PASSWORD_FILE", file, problems)
    for name in _LIBPQ_FILES:
        _check_libpq_file(name, env.get(name, ""), problems)
    database = _servers(env, problems)
    if env.get("PGSERVICE"):
        return {}  # the service file says it all, and would lose to these
    for name, own, ours in (
        ("dbname", "PGDATABASE", "POSTGRES_DB"),
        ("user", "PGUSER", "POSTGRES_USER"),
    ):
        if env.get(own):
            continue
        if env.get(ours):
            database[name] = env[ours]
        else:
            problems.append(f"{ours}: missing; set it, or {own}")
    # No password at all is a valid choice: the server decides whether it wants one.
    if password and not (env.get("PGPASSWORD") or env.get("PGPASSFILE")):
        database["password"] = password
    return database


def _check_libpq_file(name: str, path: str, problems: list[str]) -> None:
    # Neither is a file: the system's own CAs, and a key in an engine.
    if not path or path == "system" or (name == "PGSSLKEY" and ":" in path):
        return
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        problems.append(f"{name}: {path!r} cannot be read ({error.strerror})")
    else:
        if name == "PGPASSFILE" and is_open_to_others(path):
            problems.append(f"PGPASSFILE: libpq ignores {path!r}; chmod 600 {path}")


def _servers(env: Mapping[str, str], problems: list[str]) -> dict[str, str | int]:
    """Return host, hostaddr and port: lists of one length, or one port for all."""
    servers: dict[str, str | int] = {}
    if "," in env.get("PGPORT", ""):
        servers["port"] = env["PGPORT"]
    elif env.get("PGPORT"):
        servers["port"] = _integer(env, "PGPORT", 0, 65_535, problems)
    if env.get("PGSERVICE"):
        return servers
    if not env.get("PGPORT"):
        servers["port"] = _integer(env, "POSTGRES_PORT", 5432, 65_535, problems)
    for name, variable in (("host", "PGHOST"), ("hostaddr", "PGHOSTADDR")):
        if env.get(variable):
            servers[name] = env[variable]
    if not ("host" in servers or "hostaddr" in servers):
        if env.get("POSTGRES_HOST"):
            servers["host"] = env["POSTGRES_HOST"]
        else:
            problems.append("POSTGRES_HOST: missing; set it to the database's host name")
    counts = {name: str(value).count(",") + 1 for name, value in servers.items()}
    if counts["port"] == 1:
        del counts["port"]
    if len(set(counts.values())) > 1:
        problems.append(
            "PGHOST, PGHOSTADDR, PGPORT: expected as many of each, or one port for all hosts"
        )
    return servers


def _is_host(name: str) -> bool:
    try:
        return bool(name.encode("idna")) and name.isprintable() and not {" ", "/"} & set(name)
    except UnicodeError:
        return False


def _is_text(env: Mapping[str, str], name: str) -> bool:
    try:
        # The limit of a topic is that of every string in MQTT.
        return len(env.get(name, "").encode("utf-8")) <= TOPIC_BYTES_MAX
    except UnicodeEncodeError:  # the environment holds bytes, and Python hides what is not UTF-8
        return False


def _integer(
    env: Mapping[str, str], name: str, default: int, number_max: int, problems: list[str]
) -> int:
    text = env.get(name)
    if not text:
        return default
    # isdecimal() alone takes Arabic digits, and int() takes signs and underscores.
    if text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= number_max:
        return int(text)
    problems.append(f"{name}: expected a whole number from 1 to {number_max}, got {text!r}")
    return default


def _time_zone(env: Mapping[str, str], name: str, problems: list[str]) -> ZoneInfo:
    key = env.get(name) or "UTC"
    try:
        return ZoneInfo(key)
    except (KeyError, ValueError, OSError):
        problems.append(
            f"{name}: expected an IANA time zone such as America/New_York or UTC, got {key!r}; of"
            " an old name, such as US/Eastern, write the new one, or install tzdata-legacy"
        )
        return ZoneInfo("UTC")
