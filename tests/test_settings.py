"""The settings: .env, the defaults in the code and docker-compose.yml say the same.

What it does: builds Settings from plain mappings, and from files that they name. What it does
not: change the environment, start the ingester (exit code 2 is tested in test_ingester.py),
or connect (test_tls.py).
"""

import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from dotenv import dotenv_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingester.settings import Settings, SettingsError
from ingester.topic import Topics
from tests.support.certificates import Authority, Certificate, openssl
from tests.support.each import cases
from tools.process import CHECKOUT, clean_environment

DOTENV = {name: value or "" for name, value in dotenv_values(CHECKOUT / ".env").items()}
# Not for the ingester: the broker's ports on this machine, and what the schema step sets.
OTHERS = {
    "MQTT_PORT_PUBLISHED",
    "MQTT_TLS_PORT_PUBLISHED",
    "MQTT_WEBSOCKET_PORT",
    "READER_PASSWORD",
}
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
        "POSTGRES_PASSWORD_FILE": "",
        "READER_PASSWORD": "",
        "POSTGRES_HOST": "postgres",
        "POSTGRES_PORT": "5432",
        "MQTT_HOST": "mosquitto",
        "MQTT_PORT": "1883",
        "MQTT_USERNAME": "",
        "MQTT_PASSWORD": "",
        "MQTT_PASSWORD_FILE": "",
        "MQTT_TLS": "false",
        "MQTT_CA_FILE": "",
        "MQTT_CERT_FILE": "",
        "MQTT_KEY_FILE": "",
        "MQTT_CLIENT_ID": "homelab-ingester",
        "MQTT_PORT_PUBLISHED": "1883",
        "MQTT_TLS_PORT_PUBLISHED": "8883",
        "MQTT_WEBSOCKET_PORT": "9001",
        "MQTT_EVENTS_TOPIC": "qs/v1/+/events",
        "ACK_TEMPLATE": "qs/v1/{device_id}/acks",
        "MQTT_DEADLETTER_TOPIC": "qs/v1/deadletter",
        "MQTT_STATUS_TOPIC": "qs/v1/ingester/status",
        "DEVICE_DEFAULT_TZ": "UTC",
        "LOG_LEVEL": "INFO",
        "BATCH_MAX": "500",
        "RETENTION_DAYS": "",
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
        mqtt_tls=None,
        mqtt_username=None,
        mqtt_password=None,
        mqtt_client_id="homelab-ingester",
        topics=Topics(
            "qs/v1/+/events", "qs/v1/{device_id}/acks", "qs/v1/deadletter", "qs/v1/ingester/status"
        ),
        device_default_tz=ZoneInfo("UTC"),
        log_level="INFO",
        batch_max=500,
        retention_days=None,
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
    assert recorder.asked - libpqs - {"HEARTBEAT_FILE"} == set(DOTENV) - OTHERS


@cases("name", [*DOTENV, "HEARTBEAT_FILE", "PGHOST", "PGPORT", "PGDATABASE"])
def test_an_empty_variable_counts_as_absent(name: str) -> None:
    empty, absent = DOTENV | {name: ""}, {k: v for k, v in DOTENV.items() if k != name}
    if name in NEEDED:
        assert problems_of(empty) == problems_of(absent)
    else:
        assert Settings.from_env(empty) == Settings.from_env(absent)


@cases("name", ["PGHOSTADDR", "PGUSER", "PGPASSWORD", "PGPASSFILE", "PGSERVICE", "PGSSLMODE"])
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
            "RETENTION_DAYS": "30",
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
    assert made.retention_days == 30
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
    ("PGDATABASE", "theirs", "POSTGRES_DB", "dbname"),
    ("PGUSER", "theirs", "POSTGRES_USER", "user"),
    ("PGPASSWORD", "theirs", "POSTGRES_PASSWORD", "password"),
]
# Where the servers are, libpq is told in any case, as each is tried alone.
PLACES = [
    ({"PGHOST": "db.example"}, {"host": "db.example"}),
    ({"PGHOST": "/run/postgresql"}, {"host": "/run/postgresql"}),
    ({"PGHOST": "a,b", "PGPORT": "1,2"}, {"host": "a,b", "port": "1,2"}),
    ({"PGHOST": "a,b"}, {"host": "a,b"}),
    ({"POSTGRES_HOST": "a,b,c"}, {"host": "a,b,c"}),
    ({"PGPORT": "6000"}, {"port": 6000}),
    ({"PGHOST": "a,b", "PGHOSTADDR": "::1,::2"}, {"host": "a,b", "hostaddr": "::1,::2"}),
]


@cases(("variables", "told"), PLACES)
def test_where_the_servers_are_libpq_is_told(
    variables: dict[str, str], told: dict[str, str | int]
) -> None:
    assert Settings.from_env(OURS | variables).database == FROM_OURS | told


def test_an_address_takes_the_place_of_our_host() -> None:
    database = Settings.from_env(OURS | {"PGHOSTADDR": "192.0.2.1"}).database
    assert (database.get("host"), database["hostaddr"]) == (None, "192.0.2.1")


@cases(
    "variables",
    [
        {"PGHOST": "a,b", "PGPORT": "1,2,3"},
        {"PGHOST": "a,b", "PGHOSTADDR": "::1"},
        {"PGPORT": "1,2"},
    ],
)
def test_lists_of_servers_that_do_not_go_together_are_refused(variables: dict[str, str]) -> None:
    (problem,) = problems_of(OURS | variables)
    assert problem.startswith("PGHOST, PGHOSTADDR, PGPORT: ")


def test_what_libpq_is_not_told_it_is_told_by_our_variables() -> None:
    assert Settings.from_env(OURS).database == FROM_OURS


@cases(("theirs", "value", "ours", "key"), WINS)
def test_libpqs_variable_takes_the_place_of_ours_and_of_no_other(
    theirs: str, value: str, ours: str, key: str
) -> None:
    left = {k: v for k, v in FROM_OURS.items() if k != key}
    assert Settings.from_env(OURS | {theirs: value}).database == left
    without_ours = {k: v for k, v in OURS.items() if k != ours}
    assert Settings.from_env(without_ours | {theirs: value}).database == left


@cases("name", ["POSTGRES_HOST", "POSTGRES_DB", "POSTGRES_USER"])
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


@cases("mode", ["disable", "allow", "prefer", "require", "verify-ca"])
def test_libpqs_ssl_modes_are_left_to_libpq(mode: str) -> None:
    assert Settings.from_env(OURS | {"PGSSLMODE": mode}).database == FROM_OURS


@cases("service", [{}, {"PGSERVICE": "homelab"}], ids=["", "service"])
def test_bad_variables_of_libpq_are_named_too(service: dict[str, str]) -> None:
    problems = problems_of(OURS | service | {"PGPORT": "x", "PGSSLMODE": "yes"})
    assert sorted(problem.split(":")[0] for problem in problems) == ["PGPORT", "PGSSLMODE"]


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
    "RETENTION_DAYS": "0",
    "MQTT_EVENTS_TOPIC": "qs/#",
    "ACK_TEMPLATE": "qs/acks",
    "MQTT_DEADLETTER_TOPIC": "+",
    "MQTT_TLS": "yes",
    "MQTT_CA_FILE": "/nowhere/ca.crt",
    "MQTT_CERT_FILE": "/nowhere/crt",
    "MQTT_KEY_FILE": "/nowhere/key",
    "MQTT_PASSWORD_FILE": "/nowhere/mqtt",
    "POSTGRES_PASSWORD_FILE": "/nowhere/postgres",
}
NAMED = set(BAD) - {"MQTT_PASSWORD", "PGPORT", "POSTGRES_PASSWORD"}


def test_every_bad_variable_is_named_in_one_message() -> None:
    names = [problem.split(":")[0] for problem in problems_of(BAD)]
    assert set(names) == NAMED
    assert len(names) == len(NAMED)


# Alone, each of these lacks another variable.
ALONE = NAMED - {"MQTT_USERNAME", "MQTT_PASSWORD_FILE", "MQTT_CERT_FILE", "MQTT_KEY_FILE"}


@cases("name", sorted(ALONE))
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


NUMBERS = [
    *(("MQTT_PORT", 65_535), ("POSTGRES_PORT", 65_535)),
    *(("BATCH_MAX", 10_000), ("RETENTION_DAYS", 36_500)),
]


@cases(("name", "number_max"), NUMBERS)
def test_a_number_may_be_from_1_to_its_limit(name: str, number_max: int) -> None:
    for number in (1, 2, number_max - 1, number_max):
        made = Settings.from_env(DOTENV | {name: str(number)})
        taken = made.mqtt_port, made.database["port"], made.batch_max, made.retention_days
        assert number in taken
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


@cases("host", ["localhost", "192.0.2.1", "::1", "a.example.", "bücher.example"])
def test_a_host_may_be_a_name_or_an_address(host: str) -> None:
    assert Settings.from_env(DOTENV | {"MQTT_HOST": host}).mqtt_host == host


@cases(
    "host", [" ", "a b", "a\nb", "a\tb", "a\0b", "a..b", ".a", "a" * 64, "\udcff", "a\u200b\ud800"]
)
def test_a_host_that_cannot_be_one_is_named(host: str) -> None:
    (problem,) = problems_of(DOTENV | {"MQTT_HOST": host})
    assert problem.startswith("MQTT_HOST: ")


@cases("level", ["DEBUG", "INFO", "WARNING", "ERROR", "debug", "Info"])
def test_a_log_level_may_be_in_small_letters(level: str) -> None:
    assert Settings.from_env(DOTENV | {"LOG_LEVEL": level}).log_level == level.upper()


@cases("level", ["CRITICAL", "TRACE", "10", " INFO", "WARN"])
def test_another_log_level_is_named(level: str) -> None:
    (problem,) = problems_of(DOTENV | {"LOG_LEVEL": level})
    assert problem == "LOG_LEVEL: expected one of DEBUG, INFO, WARNING, ERROR"


@cases("key", ["UTC", "Europe/Berlin", "America/Los_Angeles", "Asia/Kolkata"])
def test_a_time_zone_goes_by_its_iana_name(key: str) -> None:
    assert Settings.from_env(DOTENV | {"DEVICE_DEFAULT_TZ": key}).device_default_tz == ZoneInfo(key)


@cases(
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
    assert "of an old name, such as US/Eastern, write the new one" in problem


# What os.environ makes of the byte 0xFF: nothing that UTF-8, and so MQTT, can say.
@cases(
    "name",
    [
        *("MQTT_HOST", "MQTT_EVENTS_TOPIC", "ACK_TEMPLATE", "MQTT_DEADLETTER_TOPIC"),
        *("MQTT_PORT", "LOG_LEVEL", "DEVICE_DEFAULT_TZ", "BATCH_MAX", "POSTGRES_PORT"),
        *("MQTT_CLIENT_ID", "MQTT_USERNAME", "MQTT_PASSWORD"),
        *("POSTGRES_HOST", "POSTGRES_DB", "POSTGRES_USER", "POSTGRES_PASSWORD"),
        *("MQTT_TLS", "MQTT_CA_FILE", "MQTT_PASSWORD_FILE", "POSTGRES_PASSWORD_FILE"),
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


# --- passwords in files --------------------------------------------------------------

PASSWORD_FILES = ["MQTT_PASSWORD_FILE", "POSTGRES_PASSWORD_FILE"]
NAMED_USER = DOTENV | {"MQTT_USERNAME": "me"}


def secret_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    file = folder / "secret"
    file.write_bytes(content)
    file.chmod(mode)
    return file


def passwords_of(made: Settings) -> dict[str, object]:
    return {
        "MQTT_PASSWORD_FILE": made.mqtt_password,
        "POSTGRES_PASSWORD_FILE": made.database["password"],
    }


@pytest.mark.parametrize("name", PASSWORD_FILES)
@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"hunter2\n", "hunter2"),
        (b"hunter2", "hunter2"),
        (b" hunter 2\t\n", " hunter 2\t"),
        ("hünter\u2028😀\n".encode(), "hünter\u2028😀"),
        (b"x" * 65_535 + b"\n", "x" * 65_535),
    ],
    ids=ascii,
)
def test_a_password_is_the_file_without_its_trailing_newline(
    tmp_path: Path, name: str, content: bytes, password: str
) -> None:
    file = secret_file(tmp_path, content)
    made = Settings.from_env(NAMED_USER | {name: str(file)})
    assert passwords_of(made)[name] == password
    assert password not in repr(made)


BAD_CONTENTS = {
    b"": "is empty",
    b"\n": "is empty",
    b" \n": "is empty",
    b"hunter\xff\n": "is not UTF-8",
    "hunter\n".encode("utf-16"): "is not UTF-8",
    b"hunter\n\n": "must hold one line",
    b"hunter\nhunter\n": "must hold one line",
    b"hunter\r\n": "must hold one line",
    b"hunter\0": "must hold one line",
    b"\xef\xbb\xbfhunter\n": "must hold one line",
    b"x" * 65_536: "must hold one line of at most 65535 bytes",
}


@pytest.mark.parametrize("name", PASSWORD_FILES)
@pytest.mark.parametrize("content", BAD_CONTENTS, ids=lambda content: ascii(content[:20]))
def test_a_password_file_that_holds_no_password_is_named(
    tmp_path: Path, name: str, content: bytes
) -> None:
    file = secret_file(tmp_path, content)
    (problem,) = problems_of(NAMED_USER | {name: str(file)})
    assert problem.startswith(f"{name}: '{file}' {BAD_CONTENTS[content]}")
    assert "hunter" not in problem
    assert "xxx" not in problem


@pytest.mark.parametrize("name", PASSWORD_FILES)
@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o660, 0o602, 0o777])
def test_a_password_file_of_our_own_that_others_can_open_is_refused(
    tmp_path: Path, name: str, mode: int
) -> None:
    file = secret_file(tmp_path, b"hunter2\n", mode)
    (problem,) = problems_of(NAMED_USER | {name: str(file)})
    assert problem == f"{name}: '{file}' can be read by others; chmod 600 {file}"
    file.chmod(0o400)
    Settings.from_env(NAMED_USER | {name: str(file)})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", PASSWORD_FILES)
def test_of_a_file_that_is_not_ours_others_decide_who_may_read_it(
    tmp_path: Path, name: str
) -> None:
    file = secret_file(tmp_path, b"hunter2\n", 0o444)
    os.chown(file, 10_001, 10_001)
    assert passwords_of(Settings.from_env(NAMED_USER | {name: str(file)}))[name] == "hunter2"


def test_what_docker_mounts_as_a_secret_has_dockers_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = secret_file(tmp_path, b"hunter2\n", 0o444)
    monkeypatch.setattr("ingester.secret.DOCKER_SECRETS", f"{tmp_path}/")
    assert Settings.from_env(NAMED_USER | {"MQTT_PASSWORD_FILE": str(file)})


@pytest.mark.parametrize("name", [*PASSWORD_FILES, "MQTT_CA_FILE"])
def test_a_file_that_is_not_there_or_is_none_is_named(tmp_path: Path, name: str) -> None:
    missing = tmp_path / "none"
    (problem,) = problems_of(NAMED_USER | {name: str(missing)})
    assert problem == (
        f"{name}: '{missing}' cannot be read (No such file or directory); make it, or let the"
        " ingester's user read it"
    )
    (problem,) = problems_of(NAMED_USER | {name: str(tmp_path)})
    assert problem.startswith(f"{name}: '{tmp_path}' cannot be read (Is a directory)")


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become somebody else")
def test_a_file_that_we_may_not_read_is_named() -> None:
    # As nobody, whom /etc/shadow is closed to. Not in this process: root can read all.
    code = (
        "import os; from ingester.settings import Settings, SettingsError; os.setgroups([]);"
        " os.setgid(65534); os.setuid(65534)\n"
        "try: Settings.from_env({'POSTGRES_PASSWORD_FILE': '/etc/shadow'})\n"
        "except SettingsError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    expected = (
        "POSTGRES_PASSWORD_FILE: '/etc/shadow' cannot be read (Permission denied); make it,"
        " or let the ingester's user read it\n"
    )
    assert expected in done.stdout


def test_a_password_of_mqtt_stands_in_one_place_and_has_a_user(tmp_path: Path) -> None:
    env = {"MQTT_PASSWORD_FILE": str(secret_file(tmp_path, b"hunter2\n"))}
    (problem,) = problems_of(DOTENV | env)
    assert problem == "MQTT_USERNAME: missing, and the password needs it"
    (problem,) = problems_of(NAMED_USER | env | {"MQTT_PASSWORD": "other"})
    assert problem == "MQTT_PASSWORD_FILE: set, and MQTT_PASSWORD as well; empty one of them"


def test_a_password_file_of_the_database_wins_over_ours_and_not_over_libpqs(
    tmp_path: Path,
) -> None:
    env = OURS | {"POSTGRES_PASSWORD_FILE": str(secret_file(tmp_path, b"hunter2\n"))}
    assert Settings.from_env(env).database["password"] == "hunter2"
    pgpass = tmp_path / "pgpass"
    pgpass.touch(0o600)
    for theirs, value in (("PGPASSWORD", "x"), ("PGPASSFILE", str(pgpass))):
        assert "password" not in Settings.from_env(env | {theirs: value}).database


LIBPQ_FILES = [
    "PGPASSFILE", "PGSERVICEFILE", "PGSSLROOTCERT", "PGSSLCERT", "PGSSLKEY", "PGSSLCRL",
]  # fmt: skip


@pytest.mark.parametrize("name", LIBPQ_FILES)
def test_a_file_of_libpqs_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """libpq passes over some that are missing, and says of others what is no help."""
    file = tmp_path / "there"
    for path, why in ((file, "No such file or directory"), (tmp_path, "Is a directory")):
        (problem,) = problems_of(OURS | {name: str(path)})
        assert problem == f"{name}: '{path}' cannot be read ({why})"
    file.touch(0o600)
    Settings.from_env(OURS | {name: str(file)})


def test_what_is_no_file_of_libpqs_is_left_to_it() -> None:
    Settings.from_env(OURS | {"PGSSLROOTCERT": "system", "PGSSLKEY": "engine:key"})


@pytest.mark.parametrize("name", ["missing/heartbeat", "."])
def test_a_heartbeat_file_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (problem,) = problems_of(OURS | {"HEARTBEAT_FILE": str(tmp_path / name)})
    assert problem.startswith("HEARTBEAT_FILE: ")
    assert "cannot be written" in problem


def test_looking_at_the_heartbeat_file_does_not_beat(tmp_path: Path) -> None:
    file = tmp_path / "heartbeat"
    Settings.from_env(OURS | {"HEARTBEAT_FILE": str(file)})
    assert not file.exists()
    file.touch()
    os.utime(file, (1, 1))
    Settings.from_env(OURS | {"HEARTBEAT_FILE": str(file)})
    assert file.stat().st_mtime == 1


def test_a_pgpassfile_that_libpq_would_ignore_is_refused(tmp_path: Path) -> None:
    file = secret_file(tmp_path, b"*:*:*:*:hunter2\n", 0o640)
    (problem,) = problems_of(OURS | {"PGPASSFILE": str(file)})
    assert problem == f"PGPASSFILE: libpq ignores '{file}'; chmod 600 {file}"
    file.chmod(0o600)
    Settings.from_env(OURS | {"PGPASSFILE": str(file)})


# --- TLS -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture(scope="module")
def own(ca: Authority) -> Certificate:
    return ca.issue("client")


def with_own(ca: Authority, cert: Path, key: Path) -> dict[str, str]:
    files = {"MQTT_CA_FILE": ca.cert, "MQTT_CERT_FILE": cert, "MQTT_KEY_FILE": key}
    return DOTENV | {name: str(file) for name, file in files.items()}


def context_of(env: dict[str, str]) -> ssl.SSLContext:
    context = Settings.from_env(env).mqtt_tls
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    return context


@cases("word", ["", "false", "FALSE"])
def test_without_a_word_there_is_no_tls(word: str) -> None:
    assert Settings.from_env(DOTENV | {"MQTT_TLS": word}).mqtt_tls is None


def test_a_ca_file_means_tls_verified_against_that_ca_alone(ca: Authority) -> None:
    for word in ("", "false", "true"):
        context = context_of(DOTENV | {"MQTT_TLS": word, "MQTT_CA_FILE": str(ca.cert)})
        (trusted,) = context.get_ca_certs()
        assert trusted["subject"] == ((("commonName", "test CA"),),)


@cases("word", ["true", "True"])
def test_tls_without_a_ca_file_is_verified_against_the_systems_cas(word: str) -> None:
    context = context_of(DOTENV | {"MQTT_TLS": word})
    system = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    system.load_default_certs()
    assert context.cert_store_stats() == system.cert_store_stats()


@cases("word", ["yes", "1", "on", "truee", " true"])
def test_another_word_for_tls_is_named(word: str) -> None:
    (problem,) = problems_of(DOTENV | {"MQTT_TLS": word})
    assert problem == f"MQTT_TLS: expected true or false, got {word!r}"


def test_a_client_certificate_may_have_text_around_it_and_a_chain_behind_it(
    ca: Authority, own: Certificate, tmp_path: Path
) -> None:
    context_of(with_own(ca, *own))
    chain = tmp_path / "chain"
    text = openssl("x509", "-in", own.cert, "-text")
    chain.write_text(f"# Küche\n{text}\n{ca.cert.read_text()}", "utf-8")
    context_of(with_own(ca, chain, own.key))


@pytest.mark.parametrize("name", ["MQTT_CERT_FILE", "MQTT_KEY_FILE"])
def test_a_client_certificate_needs_its_key_and_tls(
    ca: Authority, own: Certificate, name: str
) -> None:
    both = with_own(ca, *own)
    (problem,) = problems_of(both | {name: ""})
    assert problem == "MQTT_CERT_FILE, MQTT_KEY_FILE: set both, or neither"
    for without_tls in (both, both | {name: ""}):
        (problem,) = problems_of(without_tls | {"MQTT_CA_FILE": ""})
        assert problem == "MQTT_CERT_FILE, MQTT_KEY_FILE: set MQTT_CA_FILE or MQTT_TLS too"


def encrypted(own: Certificate, folder: Path) -> Certificate:
    key = folder / "encrypted"
    openssl("pkey", "-in", own.key, "-aes256", "-passout", "pass:hunter2", "-out", key)
    return Certificate(own.cert, key)


def text_file(folder: Path, text: str) -> Path:
    return secret_file(folder, text.encode())


BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
NOT_PEM = (
    "MQTT_KEY_FILE: {key!r} is not the key of MQTT_CERT_FILE {cert!r}, or one of them is not PEM,"
    " or asks for a passphrase"
)
BAD_PAIRS: dict[str, tuple[Callable[[Authority, Certificate, Path], Certificate], str]] = {
    "expired": (
        lambda ca, own, tmp: ca.issue("old", ends=-timedelta(minutes=1)),
        "MQTT_CERT_FILE: {cert!r} has expired; make it again",
    ),
    "another key": (
        lambda ca, own, tmp: Certificate(own.cert, ca.issue("other").key),
        "MQTT_KEY_FILE: {key!r} is not the key of MQTT_CERT_FILE {cert!r}, but of another one",
    ),
    "a passphrase": (
        lambda ca, own, tmp: encrypted(own, tmp),
        NOT_PEM + " (openssl pkey takes it off)",
    ),
    "swapped": (
        lambda ca, own, tmp: Certificate(own.key, own.cert),
        "MQTT_KEY_FILE: {key!r} can be read by others; chmod 600 {key}",
    ),
    "no certificate": (
        lambda ca, own, tmp: Certificate(text_file(tmp, "hunter2"), own.key),
        NOT_PEM,
    ),
    "broken certificate": (
        lambda ca, own, tmp: Certificate(text_file(tmp, f"{BEGIN}\nAAAA\n{END}\n"), own.key),
        NOT_PEM,
    ),
    "no key": (
        lambda ca, own, tmp: Certificate(own.cert, text_file(tmp, "hunter2")),
        NOT_PEM,
    ),
    "empty key": (
        lambda ca, own, tmp: Certificate(own.cert, text_file(tmp, "")),
        "MQTT_KEY_FILE: {key!r} is empty",
    ),
    "missing certificate": (
        lambda ca, own, tmp: Certificate(tmp / "none", own.key),
        "MQTT_CERT_FILE: {cert!r} cannot be read (No such file or directory)",
    ),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_client_certificate_that_cannot_be_used_is_named_with_its_fix(
    ca: Authority, own: Certificate, tmp_path: Path, case: str
) -> None:
    make, expected = BAD_PAIRS[case]
    pair = make(ca, own, tmp_path)
    (problem,) = problems_of(with_own(ca, *pair))
    assert problem.startswith(expected.format(cert=str(pair.cert), key=str(pair.key)))
    assert "hunter2" not in problem


@pytest.mark.parametrize("years", [1, 60], ids=["two digits", "four digits"])
def test_a_client_certificate_may_end_in_the_next_half_of_the_century(
    ca: Authority, years: int
) -> None:
    made = ca.issue(f"in {years} years", ends=timedelta(days=365 * years))
    context_of(with_own(ca, *made))


def openssl_der(cert: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(cert.read_text())


@pytest.mark.parametrize("content", ["hunter2", f"{BEGIN}\nAAAA\n{END}\n", f"{BEGIN}\n"])
def test_a_ca_file_that_is_no_certificate_is_named(tmp_path: Path, content: str) -> None:
    file = text_file(tmp_path, content)
    (problem,) = problems_of(DOTENV | {"MQTT_CA_FILE": str(file)})
    assert problem == f"MQTT_CA_FILE: '{file}' holds no certificate in PEM; export it so"


def test_a_ca_file_in_der_is_named(ca: Authority, tmp_path: Path) -> None:
    file = tmp_path / "der"
    file.write_bytes(openssl_der(ca.cert))
    (problem,) = problems_of(DOTENV | {"MQTT_CA_FILE": str(file)})
    assert problem.startswith(f"MQTT_CA_FILE: '{file}' is not UTF-8; write it as plain text")


def test_a_public_file_may_be_read_by_others_and_a_key_of_our_own_may_not(
    ca: Authority, own: Certificate, tmp_path: Path
) -> None:
    key = Path(shutil.copy(own.key, tmp_path / "key"))
    key.chmod(0o644)
    own.cert.chmod(0o644)
    ca.cert.chmod(0o644)
    (problem,) = problems_of(with_own(ca, own.cert, key))
    assert problem == f"MQTT_KEY_FILE: '{key}' can be read by others; chmod 600 {key}"


def test_all_bad_files_are_named_at_once(tmp_path: Path) -> None:
    file = secret_file(tmp_path, b"hunter2\n", 0o644)
    names = ["MQTT_CA_FILE", "MQTT_CERT_FILE", "MQTT_KEY_FILE", *PASSWORD_FILES]
    problems = problems_of(NAMED_USER | {"MQTT_TLS": "x"} | dict.fromkeys(names, str(file)))
    # The certificate is looked into only with a key.
    named = {problem.split(":")[0] for problem in problems}
    assert named == {*names, "MQTT_TLS"} - {"MQTT_CERT_FILE"}


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
    assert environment_of("ingester") == dict.fromkeys(DOTENV.keys() - OTHERS, "") | {
        "POSTGRES_PORT": "5432",
        "HEARTBEAT_FILE": "/tmp/heartbeat",
    }
