"""The settings: .env, the defaults in the code and docker-compose.yml say the same.

What it does: builds Settings from plain mappings. What it does not: change the environment,
start the ingester (exit code 2 is tested in test_ingester.py), or connect with libpq.
"""

from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from dotenv import dotenv_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingester.settings import Settings, SettingsError
from ingester.topic import Topics

CHECKOUT = Path(__file__).resolve().parent.parent
DOTENV = {name: value or "" for name, value in dotenv_values(CHECKOUT / ".env").items()}
# What the code has no default for.
NEEDED = {
    "MQTT_HOST": "mosquitto",
    "POSTGRES_HOST": "postgres",
    "POSTGRES_DB": "qs",
    "POSTGRES_USER": "qs",
}

# A slow or busy machine is no reason to fail.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def problems_of(env: dict[str, str]) -> list[str]:
    """Return the lines of the message that refuses these settings."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(env)
    headline, *problems = str(caught.value).split("\n")
    assert headline == "cannot start, the settings are wrong (see .env):"
    assert all(problem.startswith("  ") for problem in problems)
    return [problem.strip() for problem in problems]


# --- defaults ------------------------------------------------------------------------


def test_the_file_has_the_documented_variables_and_values() -> None:
    assert DOTENV == {
        "POSTGRES_DB": "qs",
        "POSTGRES_USER": "qs",
        "POSTGRES_PASSWORD": "qs_password",
        "POSTGRES_HOST": "postgres",
        "POSTGRES_PORT": "5432",
        "MQTT_HOST": "mosquitto",
        "MQTT_PORT": "1883",
        "MQTT_USERNAME": "",
        "MQTT_PASSWORD": "",
        "MQTT_CLIENT_ID": "homelab-ingester",
        "MQTT_EVENTS_TOPIC": "qs/v1/+/events",
        "ACK_TEMPLATE": "qs/v1/{device_id}/acks",
        "MQTT_DEADLETTER_TOPIC": "qs/v1/deadletter",
        "MQTT_STATUS_TOPIC": "qs/v1/ingester/status",
        "DEVICE_DEFAULT_TZ": "UTC",
        "LOG_LEVEL": "INFO",
        "BATCH_MAX": "500",
    }


def test_the_files_values_make_these_settings() -> None:
    assert Settings.from_env(DOTENV) == Settings(
        database={
            "host": "postgres",
            "port": 5432,
            "dbname": "qs",
            "user": "qs",
            "password": "qs_password",
        },
        mqtt_host="mosquitto",
        mqtt_port=1883,
        mqtt_username=None,
        mqtt_password=None,
        mqtt_client_id="homelab-ingester",
        topics=Topics(
            "qs/v1/+/events", "qs/v1/{device_id}/acks", "qs/v1/deadletter", "qs/v1/ingester/status"
        ),
        device_default_tz=ZoneInfo("UTC"),
        log_level="INFO",
        batch_max=500,
        heartbeat_file=None,
    )


def test_where_the_code_has_a_default_it_is_the_files() -> None:
    without_default = {name: DOTENV[name] for name in (*NEEDED, "POSTGRES_PASSWORD")}
    assert Settings.from_env(without_default) == Settings.from_env(DOTENV)


class Recorder(dict[str, str]):
    """A mapping that notes which names it was asked for."""

    def __init__(self, env: dict[str, str]) -> None:
        super().__init__(env)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return super().__getitem__(name)


def test_every_variable_of_the_file_is_read_and_every_one_read_is_in_the_file() -> None:
    recorder = Recorder(DOTENV)
    Settings.from_env(recorder)
    libpqs = {name for name in recorder.asked if name.startswith("PG")}
    # Compose alone sets HEARTBEAT_FILE, for its healthcheck.
    assert recorder.asked - libpqs - {"HEARTBEAT_FILE"} == set(DOTENV)


@pytest.mark.parametrize("name", [*DOTENV, "HEARTBEAT_FILE", "PGHOST", "PGPORT", "PGDATABASE"])
def test_an_empty_variable_counts_as_absent(name: str) -> None:
    empty, absent = DOTENV | {name: ""}, {k: v for k, v in DOTENV.items() if k != name}
    if name in NEEDED:
        assert problems_of(empty) == problems_of(absent)
    else:
        assert Settings.from_env(empty) == Settings.from_env(absent)


@pytest.mark.parametrize(
    "name", ["PGHOSTADDR", "PGUSER", "PGPASSWORD", "PGPASSFILE", "PGSERVICE", "PGSSLMODE"]
)
def test_an_empty_variable_of_libpq_counts_as_absent(name: str) -> None:
    assert Settings.from_env(DOTENV | {name: ""}) == Settings.from_env(DOTENV)


def test_every_variable_reaches_its_setting() -> None:
    made = Settings.from_env(
        NEEDED
        | {
            "MQTT_HOST": "broker.example",
            "MQTT_PORT": "8883",
            "MQTT_USERNAME": "me",
            "MQTT_PASSWORD": "secret",
            "MQTT_CLIENT_ID": "other",
            "MQTT_EVENTS_TOPIC": "home/+/in",
            "ACK_TEMPLATE": "home/{device_id}/out",
            "MQTT_DEADLETTER_TOPIC": "home/dead",
            "MQTT_STATUS_TOPIC": "home/status",
            "DEVICE_DEFAULT_TZ": "America/Los_Angeles",
            "LOG_LEVEL": "debug",
            "BATCH_MAX": "7",
            "HEARTBEAT_FILE": "/tmp/heartbeat",
            "POSTGRES_PORT": "5433",
        }
    )
    assert (made.mqtt_host, made.mqtt_port) == ("broker.example", 8883)
    assert (made.mqtt_username, made.mqtt_password) == ("me", "secret")
    assert made.mqtt_client_id == "other"
    assert made.topics == Topics("home/+/in", "home/{device_id}/out", "home/dead", "home/status")
    assert made.device_default_tz == ZoneInfo("America/Los_Angeles")
    assert (made.log_level, made.batch_max) == ("DEBUG", 7)
    assert made.heartbeat_file == "/tmp/heartbeat"
    assert made.database["port"] == 5433


def test_a_username_may_come_without_a_password() -> None:
    assert Settings.from_env(NEEDED | {"MQTT_USERNAME": "me"}).mqtt_username == "me"


# --- the database: libpq's own variables win, one by one -----------------------------

FROM_OURS = {"host": "ours", "port": 5433, "dbname": "ours", "user": "ours", "password": "ours"}
OURS = {
    "MQTT_HOST": "mosquitto",
    "POSTGRES_HOST": "ours",
    "POSTGRES_PORT": "5433",
    "POSTGRES_DB": "ours",
    "POSTGRES_USER": "ours",
    "POSTGRES_PASSWORD": "ours",
}
WINS = [
    ("PGHOST", "db.example", "POSTGRES_HOST", "host"),
    ("PGHOST", "/run/postgresql", "POSTGRES_HOST", "host"),
    ("PGHOSTADDR", "192.0.2.1", "POSTGRES_HOST", "host"),
    ("PGPORT", "6000", "POSTGRES_PORT", "port"),
    ("PGDATABASE", "theirs", "POSTGRES_DB", "dbname"),
    ("PGUSER", "theirs", "POSTGRES_USER", "user"),
    ("PGPASSWORD", "theirs", "POSTGRES_PASSWORD", "password"),
    ("PGPASSFILE", "/tmp/pgpass", "POSTGRES_PASSWORD", "password"),
]


def test_what_libpq_is_not_told_it_is_told_by_our_variables() -> None:
    assert Settings.from_env(OURS).database == FROM_OURS


@pytest.mark.parametrize(("theirs", "value", "ours", "key"), WINS)
def test_libpqs_variable_takes_the_place_of_ours_and_of_no_other(
    theirs: str, value: str, ours: str, key: str
) -> None:
    left = {k: v for k, v in FROM_OURS.items() if k != key}
    assert Settings.from_env(OURS | {theirs: value}).database == left
    without_ours = {k: v for k, v in OURS.items() if k != ours}
    assert Settings.from_env(without_ours | {theirs: value}).database == left


@pytest.mark.parametrize("name", ["POSTGRES_HOST", "POSTGRES_DB", "POSTGRES_USER"])
def test_what_neither_says_is_missing(name: str) -> None:
    (problem,) = problems_of({k: v for k, v in OURS.items() if k != name})
    assert problem.startswith(f"{name}: missing")


def test_a_missing_port_is_5432_and_a_missing_password_is_none_at_all() -> None:
    assert Settings.from_env(NEEDED).database == {
        "host": "postgres",
        "port": 5432,
        "dbname": "qs",
        "user": "qs",
    }


def test_a_service_says_it_all() -> None:
    assert Settings.from_env(OURS | {"PGSERVICE": "homelab"}).database == {}
    assert Settings.from_env({"MQTT_HOST": "m", "PGSERVICE": "homelab"}).database == {}


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require", "verify-ca"])
def test_libpqs_ssl_modes_are_left_to_libpq(mode: str) -> None:
    assert Settings.from_env(OURS | {"PGSSLMODE": mode}).database == FROM_OURS


@pytest.mark.parametrize("service", [{}, {"PGSERVICE": "homelab"}], ids=["", "service"])
def test_bad_variables_of_libpq_are_named_too(service: dict[str, str]) -> None:
    problems = problems_of(OURS | service | {"PGPORT": "x", "PGSSLMODE": "yes"})
    assert [problem.split(":")[0] for problem in problems] == ["PGPORT", "PGSSLMODE"]


# --- bad values ----------------------------------------------------------------------

BAD = {
    "LOG_LEVEL": "LOUD",
    "MQTT_HOST": "no such host",
    "MQTT_USERNAME": "",
    "MQTT_PASSWORD": "hunter2-mqtt",
    "PGPORT": "",
    "PGSSLMODE": "on",
    "POSTGRES_HOST": "",
    "POSTGRES_PORT": "five",
    "POSTGRES_DB": "",
    "POSTGRES_USER": "",
    "POSTGRES_PASSWORD": "hunter2-postgres",
    "MQTT_PORT": "65536",
    "DEVICE_DEFAULT_TZ": "Mars/Olympus",
    "BATCH_MAX": "0",
    "MQTT_EVENTS_TOPIC": "qs/#",
    "ACK_TEMPLATE": "qs/acks",
    "MQTT_DEADLETTER_TOPIC": "+",
}
NAMED = set(BAD) - {"MQTT_PASSWORD", "PGPORT", "POSTGRES_PASSWORD"}


def test_every_bad_variable_is_named_in_one_message() -> None:
    names = [problem.split(":")[0] for problem in problems_of(BAD)]
    assert set(names) == NAMED
    assert len(names) == len(NAMED)


@pytest.mark.parametrize("name", sorted(NAMED - {"MQTT_USERNAME"}))
def test_a_single_bad_variable_is_the_only_one_named(name: str) -> None:
    (problem,) = problems_of(DOTENV | {name: BAD[name]})
    assert problem.startswith(f"{name}: ")


def test_nothing_at_all_names_what_has_no_default() -> None:
    names = {problem.split(":")[0] for problem in problems_of({})}
    assert names == set(NEEDED)


def test_a_password_without_a_username_names_the_username() -> None:
    (problem,) = problems_of(DOTENV | {"MQTT_PASSWORD": "hunter2"})
    assert problem.startswith("MQTT_USERNAME: ")
    assert "hunter2" not in problem


NUMBERS = [("MQTT_PORT", 65_535), ("POSTGRES_PORT", 65_535), ("BATCH_MAX", 10_000)]


@pytest.mark.parametrize(("name", "number_max"), NUMBERS)
def test_a_number_may_be_from_1_to_its_limit(name: str, number_max: int) -> None:
    for number in (1, 2, number_max - 1, number_max):
        made = Settings.from_env(DOTENV | {name: str(number)})
        assert number in (made.mqtt_port, made.database["port"], made.batch_max)
    for number in (0, number_max + 1, number_max * 10):
        (problem,) = problems_of(DOTENV | {name: str(number)})
        assert problem.startswith(f"{name}: expected a whole number from 1 to {number_max}")


@pytest.mark.parametrize(
    "text",
    [
        *("-1", "+1", "1.0", " 1883", "1883 ", "1883\n", "1_883", "0x10", "1e3", "one", "\u0661"),
        *("\uff11", "\u00b2", "NaN", "9" * 5000, "5432;", "0" * 20),
        pytest.param("0000655351", id="zeros before a number that is too large"),
    ],
    ids=lambda text: ascii(text[:20]),
)
@pytest.mark.parametrize("name", [name for name, _ in NUMBERS] + ["PGPORT"])
def test_a_number_is_decimal_digits_and_nothing_else(name: str, text: str) -> None:
    (problem,) = problems_of(DOTENV | {name: text})
    assert problem.startswith(f"{name}: expected a whole number")


@given(st.integers(0, 12), st.integers(0, 200_000))
@settings(PATIENT, max_examples=500)
def test_a_number_that_is_taken_is_within_its_limit(zeros: int, number: int) -> None:
    text = "0" * zeros + str(number)
    try:
        made = Settings.from_env(DOTENV | {"BATCH_MAX": text})
    except SettingsError:
        assert not 1 <= int(text) <= 10_000 or len(text) > 9
    else:
        assert made.batch_max == int(text)
        assert 1 <= made.batch_max <= 10_000


@pytest.mark.parametrize("host", ["localhost", "192.0.2.1", "::1", "a.example.", "bücher.example"])
def test_a_host_may_be_a_name_or_an_address(host: str) -> None:
    assert Settings.from_env(DOTENV | {"MQTT_HOST": host}).mqtt_host == host


@pytest.mark.parametrize(
    "host", [" ", "a b", "a\nb", "a\tb", "a\0b", "a..b", ".a", "a" * 64, "\udcff", "a\u200b\ud800"]
)
def test_a_host_that_cannot_be_one_is_named(host: str) -> None:
    (problem,) = problems_of(DOTENV | {"MQTT_HOST": host})
    assert problem.startswith("MQTT_HOST: ")


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "debug", "Info"])
def test_a_log_level_may_be_in_small_letters(level: str) -> None:
    assert Settings.from_env(DOTENV | {"LOG_LEVEL": level}).log_level == level.upper()


@pytest.mark.parametrize("level", ["CRITICAL", "TRACE", "10", " INFO", "WARN"])
def test_another_log_level_is_named(level: str) -> None:
    (problem,) = problems_of(DOTENV | {"LOG_LEVEL": level})
    assert problem == "LOG_LEVEL: expected one of DEBUG, INFO, WARNING, ERROR"


@pytest.mark.parametrize("key", ["UTC", "Europe/Berlin", "America/Los_Angeles", "Asia/Kolkata"])
def test_a_time_zone_goes_by_its_iana_name(key: str) -> None:
    assert Settings.from_env(DOTENV | {"DEVICE_DEFAULT_TZ": key}).device_default_tz == ZoneInfo(key)


@pytest.mark.parametrize(
    "key",
    [
        *("Mars/Olympus", "Europe", "../../etc/passwd", "/etc/localtime", "Europe/", ".", "+02:00"),
        *("\0", "a\0b", "\udcff", "x" * 5000, "tzdata.zi", "zone.tab", "Europe/Berlin\n", " "),
    ],
    ids=lambda key: ascii(key[:20]),
)
def test_a_time_zone_that_is_none_is_named(key: str) -> None:
    (problem,) = problems_of(DOTENV | {"DEVICE_DEFAULT_TZ": key})
    assert problem.startswith("DEVICE_DEFAULT_TZ: ")


# What os.environ makes of the byte 0xFF: nothing that UTF-8, and so MQTT, can say.
@pytest.mark.parametrize(
    "name",
    [
        *("MQTT_HOST", "MQTT_EVENTS_TOPIC", "ACK_TEMPLATE", "MQTT_DEADLETTER_TOPIC"),
        *("MQTT_PORT", "LOG_LEVEL", "DEVICE_DEFAULT_TZ", "BATCH_MAX", "POSTGRES_PORT"),
        *("MQTT_CLIENT_ID", "MQTT_USERNAME", "MQTT_PASSWORD"),
        *("POSTGRES_HOST", "POSTGRES_DB", "POSTGRES_USER", "POSTGRES_PASSWORD"),
    ],
)
def test_a_variable_that_is_not_utf8_is_named(name: str) -> None:
    problems = problems_of(DOTENV | {"MQTT_USERNAME": "me", name: "{device_id}\udcff"})
    assert [problem.split(":")[0] for problem in problems] == [name]
    problems[0].encode("utf-8")  # stderr could not write it otherwise


# --- secrets -------------------------------------------------------------------------


def test_no_password_stands_in_the_repr() -> None:
    env = DOTENV | {"MQTT_USERNAME": "me", "MQTT_PASSWORD": "hunter2", "POSTGRES_PASSWORD": "pg7"}
    made = Settings.from_env(env)
    assert made.mqtt_password == "hunter2"
    assert made.database["password"] == "pg7"
    for text in (repr(made), str(made), f"{made}"):
        assert "hunter2" not in text
        assert "pg7" not in text


def test_no_password_stands_in_an_error_message() -> None:
    text = "\n".join(problems_of(BAD | {"PGPASSWORD": "hunter2-libpq"}))
    assert "hunter2" not in text


# --- docker-compose.yml --------------------------------------------------------------


def environment_of(service: str) -> dict[str, str]:
    """Return the `environment` mapping of a service; the file's indents are two spaces."""
    lines = iter((CHECKOUT / "docker-compose.yml").read_text("utf-8").splitlines())
    for heading in (f"  {service}:", "    environment:"):
        assert heading in lines  # reads on to it
    environment = {}
    for line in lines:
        if line.strip().startswith("#"):
            continue
        if not line.startswith("      "):
            break
        name, _, value = line.strip().partition(":")
        environment[name] = value.strip()
    return environment


def test_compose_passes_every_variable_by_name_and_pins_the_port_inside() -> None:
    assert environment_of("ingester") == dict.fromkeys(DOTENV, "") | {
        "POSTGRES_PORT": "5432",
        "HEARTBEAT_FILE": "/tmp/heartbeat",
    }
