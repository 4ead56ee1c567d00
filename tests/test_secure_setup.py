"""overlays/secure/setup and device, before any stack runs.

What it does: runs both as a person does, and looks at the files that they make. What it
does not: start the stack (test_secure.py).

Invariant: nothing outside the copy of the checkout is touched.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import compose
from tests.support.certificates import openssl
from tests.support.secure import SecureStack, missing_rights

pytestmark = [pytest.mark.compose]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SecureStack:
    """A copy of the checkout with secrets, which no test changes."""
    if reason := compose.missing_engine() or missing_rights():
        pytest.skip(reason)
    stack = SecureStack(compose.copy_checkout(tmp_path_factory.mktemp("setup")))
    # No stack of these tests, which may be up meanwhile, is to be told of a change.
    stack.environment["COMPOSE_PROJECT_NAME"] = "homelab-test-setup"
    assert ": made. " in stack.setup("telemetry.lan", "192.168.1.10", "fd00::1")
    return stack


@pytest.fixture
def stack(made: SecureStack, tmp_path: Path) -> SecureStack:
    """The same, a copy of it for the test alone; all of it is ours."""
    copy = SecureStack(shutil.copytree(made.folder, tmp_path / "copy"))
    copy.environment["COMPOSE_PROJECT_NAME"] = "homelab-test-setup"
    return copy


def state(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Every file with its content, its mode, and when it was changed; not the lock."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes(),
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def names_of(certificate: Path) -> set[str]:
    text = openssl("x509", "-in", certificate, "-noout", "-ext", "subjectAltName")
    return set(re.findall(r"(?:DNS|IP Address):([^,\s]+)", text))


OWN_NAMES = {"localhost", "127.0.0.1", "0:0:0:0:0:0:0:1", "mosquitto", "postgres"}


def test_setup_again_changes_nothing(stack: SecureStack) -> None:
    before = state(stack.secrets)
    assert len(before) == 15
    for names in ((), ("telemetry.lan",), ("192.168.1.10", "localhost")):
        assert stack.setup(*names) == "overlays/secure/secrets: all there; nothing changed"
    assert state(stack.secrets) == before


@pytest.mark.parametrize("folder", ["broker", "database"])
def test_a_certificate_names_what_was_given_and_the_services(
    stack: SecureStack, folder: str
) -> None:
    certificate = stack.secrets / folder / "server.crt"
    given = {"telemetry.lan", "192.168.1.10", "FD00:0:0:0:0:0:0:1"}
    assert names_of(certificate) == OWN_NAMES | given
    openssl("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", stack.ca, certificate)
    openssl("x509", "-in", certificate, "-noout", "-checkend", str(800 * 86_400))


def test_renew_makes_new_certificates_and_leaves_all_else(stack: SecureStack) -> None:
    before = state(stack.secrets)
    assert "certificates renewed, until" in stack.setup("--renew", "new.lan")
    after = state(stack.secrets)
    changed = {name for name in after if after[name][0] != before.get(name, (b"",))[0]}
    assert changed == {"broker/server.crt", "database/server.crt", "names"}
    assert after.keys() == before.keys()
    certificate = stack.secrets / "broker/server.crt"
    assert {"new.lan", "telemetry.lan", "192.168.1.10"} <= names_of(certificate)
    # It fits the key that was there before.
    public = openssl("x509", "-in", certificate, "-noout", "-pubkey")
    assert openssl("pkey", "-in", stack.secrets / "broker/server.key", "-pubout") == public


NOT_NAMES = [
    *("http://x", "a b", "-x", "a/b", "*.lan", "", "a,DNS:b", "ä.lan", "host:8883"),
    *("999.1.1.1", "1.2.3", "1.2.3.4.5", "300", "1..2", "::1::2", "12345::1", "[::1]"),
    *("a..b", ".lan", "lan.", "x-", "a.-b", "x" * 64, ".".join(["x" * 50] * 6)),
]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_what_is_not_a_name_is_refused(stack: SecureStack, name: str) -> None:
    before = state(stack.secrets)
    for arguments in ((name,), ("--renew", name), ("--renew", "good.lan", name)):
        said = stack.setup(*arguments, expected=1)
        assert "not a host name" in said or "unknown" in said
        assert "\n" not in said
    assert state(stack.secrets) == before


def test_what_spoils_the_list_of_names_is_named_and_nothing_is_changed(stack: SecureStack) -> None:
    names = stack.secrets / "names"
    good = names.read_text()
    names.write_text(good + "999.1.1.1\n")
    before = state(stack.secrets)
    assert stack.setup("--renew", expected=1) == (
        "999.1.1.1: not a host name or an IP address; delete it from overlays/secure/secrets/names"
    )
    assert state(stack.secrets) == before
    names.write_text(good)
    # Of what is given twice there is one.
    stack.setup("--renew", "new.lan", "new.lan", "fd00::2")
    assert sorted(names.read_text().split()) == sorted([*good.split(), "new.lan", "fd00::2"])


def test_where_docker_cannot_be_asked_nothing_is_changed_and_it_is_said(
    stack: SecureStack,
) -> None:
    stack.add_device("here")
    before = state(stack.secrets)
    for variables in (
        {"DOCKER_HOST": f"unix://{stack.folder}/no.sock"},
        {"COMPOSE_PROJECT_NAME": "", "POSTGRES_PORT": "none"},  # Compose alone refuses
    ):
        for command in (("device", "add", "x"), ("device", "remove", "here"), ("setup", "--renew")):
            done = stack.run(
                f"overlays/secure/{command[0]}", *command[1:], expected=1, variables=variables
            )
            assert "Docker cannot say whether mosquitto is running; nothing" in done.stderr
            assert done.stdout == ""
    assert state(stack.secrets) == before
    done = stack.run(
        *("overlays/secure/device", "list"),
        expected=1,
        variables={"DOCKER_HOST": f"unix://{stack.folder}/no.sock"},
    )
    assert "Docker could not" in done.stderr


def test_a_name_that_is_in_no_certificate_is_said(stack: SecureStack) -> None:
    assert stack.setup("other.lan", expected=1) == (
        "other.lan: not in the certificates; run setup --renew other.lan"
    )


@pytest.mark.parametrize(
    "name",
    [
        *("ca.crt", "ca.key", "names", "postgres_password", "database_ingester_password"),
        *("database_reader_password", "mqtt_ingester_password", "operator/mosquitto_sub"),
        *("broker/server.key", "broker/server.crt", "broker/passwords"),
        *("database/server.key", "database/server.crt", "database/server.csr"),
    ],
)
def test_a_missing_file_is_named_with_its_fix(stack: SecureStack, name: str) -> None:
    (stack.secrets / name).unlink()
    said = stack.setup(expected=1)
    assert said.startswith(f"overlays/secure/secrets/{name}: missing; put it back from a backup")
    assert "\n" not in said


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o444, 0o620])
@pytest.mark.parametrize("name", ["ca.key", "broker/server.key", "postgres_password"])
def test_a_file_that_is_open_to_others_is_named_with_its_fix(
    stack: SecureStack, name: str, mode: int
) -> None:
    (stack.secrets / name).chmod(mode)
    said = stack.setup(expected=1)
    assert said.startswith(f"overlays/secure/secrets/{name}: others may read it; chmod go= it")
    assert "\n" not in said


def test_a_certificate_of_another_ca_is_named_with_its_fix(
    stack: SecureStack, made: SecureStack
) -> None:
    certificate = stack.secrets / "database/server.crt"
    certificate.unlink()
    key = stack.folder / "other.key"
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-subj", "/CN=x",
            "-out", certificate)  # fmt: skip
    assert stack.setup(expected=1) == (
        "overlays/secure/secrets/database/server.crt: not of this CA; run setup --renew"
    )
    stack.setup("--renew")
    assert stack.setup() == "overlays/secure/secrets: all there; nothing changed"


def test_a_setup_that_fails_half_way_leaves_nothing_and_the_next_one_succeeds(
    stack: SecureStack,
) -> None:
    shutil.rmtree(stack.secrets)
    # No engine answers there, which it needs after the keys are made.
    nowhere = {"DOCKER_HOST": f"unix://{stack.folder}/no.sock"}
    done = stack.run("overlays/secure/setup", expected=1, variables=nowhere)
    assert done.stderr.splitlines()[-1].startswith("Docker could not ")
    assert not stack.secrets.exists()
    assert not (stack.folder / "overlays/secure/secrets.new").exists()
    # Of one that was killed.
    (stack.folder / "overlays/secure/secrets.new/broker").mkdir(parents=True)
    (stack.folder / "overlays/secure/secrets.new/broker/server.key").write_text("half")
    assert ": made. " in stack.setup()
    assert stack.setup() == "overlays/secure/secrets: all there; nothing changed"


def test_two_setups_have_nothing_in_common(stack: SecureStack, made: SecureStack) -> None:
    shutil.rmtree(stack.secrets)
    stack.setup("telemetry.lan", "192.168.1.10", "fd00::1")
    ours, theirs = state(stack.secrets), state(made.secrets)
    assert {name for name in ours if ours[name][0] == theirs[name][0]} <= {"names"}


def test_every_command_runs_from_any_folder_and_explains_itself(
    stack: SecureStack, tmp_path: Path
) -> None:
    for script in ("setup", "device"):
        path = stack.folder / "overlays/secure" / script
        for option in ("-h", "--help"):
            done = subprocess.run(
                [path, option], cwd=tmp_path, capture_output=True, text=True, check=True
            )
            assert f"overlays/secure/{script} " in done.stdout
    done = subprocess.run(
        [stack.folder / "overlays/secure/device", "list"],
        cwd=tmp_path,
        env=stack.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""


# --- device --------------------------------------------------------------------------


def access_rights(stack: SecureStack, **variables: str) -> str:
    """What the broker reads of its users' rights, with these variables in its container."""
    command = "cd overlays/secure/secrets/broker && sh ../../users.sh acl"
    return stack.run("sh", "-c", command, variables=variables).stdout


@pytest.mark.parametrize(
    "device_id",
    ["", "a b", "a/b", "+", "#", "a\nb", "ä", "x" * 65, "operator", "homelab-ingester", "a=b"],
)
def test_an_id_that_breaks_the_contract_is_refused(stack: SecureStack, device_id: str) -> None:
    before = state(stack.secrets)
    for command in ("add", "remove"):
        said = stack.device(command, device_id, expected=1)
        assert re.search("not a device id|longer than 64|a user of the stack itself", said)
    assert state(stack.secrets) == before


def test_an_id_within_the_contract_gets_two_topics_and_no_more(stack: SecureStack) -> None:
    ids = ["esp32-01", "A.b_c:-9", "x" * 64, "-dash", ".", "ingester", "deadletter"]
    for device_id in ids:
        stack.add_device(device_id)
    assert stack.device("list").splitlines() == ids
    acl = access_rights(stack)
    for device_id in ids:
        user = device_id.replace(":", "=")
        assert (
            f"\nuser {user}\n"
            f"topic write qs/v1/{device_id}/events\ntopic read qs/v1/{device_id}/acks\n" in acl
        )
    assert len(re.findall("^user ", acl, re.MULTILINE)) == len(ids) + 2
    assert len(set(stack.passwords.values())) == len(ids)
    for password in stack.passwords.values():
        assert password not in (stack.secrets / "broker/passwords").read_text()


@pytest.mark.parametrize(
    ("template", "of_any", "of_one"),
    [
        ("", "qs/v1/+/acks", "qs/v1/a:b/acks"),
        ("{device_id}", "+", "a:b"),
        ("{device_id}/x", "+/x", "a:b/x"),
        ("x/{device_id}", "x/+", "x/a:b"),
        ("x/to-{device_id}", "x/+", "x/to-a:b"),
        ("to-{device_id}-here/x y/z", "+/x y/z", "to-a:b-here/x y/z"),
        ("/x/{device_id}.y/", "/x/+/", "/x/a:b.y/"),
    ],
)
def test_the_rights_follow_the_topics_of_the_settings(
    stack: SecureStack, template: str, of_any: str, of_one: str
) -> None:
    stack.add_device("a:b")
    acl = access_rights(
        stack,
        ACK_TEMPLATE=template,
        MQTT_EVENTS_TOPIC="my home/+",
        MQTT_DEADLETTER_TOPIC="lost",
        MQTT_STATUS_TOPIC="how it is",
    ).split("\n\n")
    assert acl[0].splitlines() == [
        "user homelab-ingester",
        "topic read my home/+",
        f"topic readwrite {of_any}",
        "topic readwrite lost",
        "topic readwrite how it is",
        "topic read $SYS/broker/publish/messages/dropped",
    ]
    assert acl[-1].splitlines() == [
        "user a=b",
        "topic write my home/a:b",
        f"topic read {of_one}",
    ]


def test_a_device_is_added_once_and_removed_once(stack: SecureStack) -> None:
    stack.add_device("once")
    before = state(stack.secrets)
    assert stack.device("add", "once", expected=1) == (
        "once: is there already; for a new password remove it first"
    )
    assert stack.device("remove", "on.e", expected=1) == "on.e: no such device; see device list"
    assert state(stack.secrets) == before
    stack.device("remove", "once")
    assert stack.device("list") == ""
    assert "once" not in access_rights(stack)
    assert "once" not in (stack.secrets / "broker/passwords").read_text()


def test_an_id_is_compared_as_text_and_never_as_a_number_an_option_or_a_pattern(
    stack: SecureStack,
) -> None:
    alike = [
        "7",
        "007",
        "7.0",
        "7e0",
        "0x7",
        "nan",
        "inf",
        "30e628123456",
        "-n",
        "a.c",
        "abc",
        "A.C",
    ]
    gone = ["7", "nan", "30e628123456", "-n", "a.c"]
    # Added as they are in the list that `add` keeps: that it works is tested above.
    passwords = stack.secrets / "broker/passwords"
    for device_id in alike[1:]:
        with passwords.open("a") as file:
            file.write(f"{device_id}:$7$101$x$y\n")
    for device_id in ("7", "7e1", "8", "NAN", "0", ".", "a", "--"):
        said = stack.device("remove", device_id, expected=1)
        assert said == f"{device_id}: no such device; see device list"
    stack.add_device("7")
    for device_id in gone:
        stack.device("remove", device_id)
        assert stack.device("remove", device_id, expected=1).endswith("device list")
    assert set(stack.device("list").splitlines()) == set(alike) - set(gone)
    assert {"homelab-ingester", "operator"} <= {
        line.split(":")[0] for line in passwords.read_text().splitlines()
    }


def test_every_password_is_kept_as_a_hash_that_a_small_machine_can_check(
    stack: SecureStack,
) -> None:
    stack.add_device("hashed")
    lines = (stack.secrets / "broker/passwords").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"[\w-]+:\$7\$\d+\$[^$]+\$[^$]+", line)  # PBKDF2-SHA512
    # By name, so that a later image cannot choose Argon2id.
    for image in (compose.BROKER, compose.BROKER_2_0):
        mount = f"{stack.folder}/overlays/secure/users.sh:/users.sh:ro"
        said = stack.run("docker", "run", "--rm", "-v", mount, image, "sh", "/users.sh", "hash")
        assert said.stdout == "-H sha512-pbkdf2\n"


def test_devices_that_are_added_at_once_are_all_there(stack: SecureStack) -> None:
    ids = {f"many-{number}" for number in range(6)}
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(stack.add_device, ids))
    assert set(stack.device("list").splitlines()) == ids
    acl = access_rights(stack)
    assert all(f"\nuser {device_id}\n" in acl for device_id in ids)


def test_device_before_setup_and_wrong_words_say_what_to_do(stack: SecureStack) -> None:
    shutil.rmtree(stack.secrets)
    assert stack.device("add", "x", expected=1) == (
        "overlays/secure/secrets/broker: missing; run overlays/secure/setup first"
    )
    assert stack.setup("--renew", expected=1) == (
        "overlays/secure/secrets/ca.key: missing; run setup first"
    )
    for arguments in ((), ("add",), ("add", "a", "b"), ("rm", "a"), ("list", "a")):
        assert "overlays/secure/device add ID" in stack.device(*arguments, expected=2)
