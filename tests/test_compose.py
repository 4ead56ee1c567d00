"""docker-compose.yml as it is: what a person types, sees, and may rely on.

What it does: brings the stack up, and goes through names, hardening, the README's commands,
restarts, upgrades, settings and outages; then once more with the older broker, for what
depends on it. What it does not: look at what the plain processes show as well (the event
contract, rates, kills at each step).

Invariant: after each test the stack is up and healthy, with the settings of .env, and its
rows are those of before and the test's own.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg2
import pytest
from dotenv import dotenv_values

from tests import compose
from tests.compose import BROKER, BROKER_2_0, CONTAINERS, PROJECT, VOLUME, Compose
from tests.device import Device, event
from tests.pipeline import wait_until
from tools.process import free_port, port_is_free

pytestmark = [pytest.mark.compose, pytest.mark.timeout(300)]
pytest_generate_tests = compose.with_each_broker
both_brokers = pytest.mark.brokers(BROKER, BROKER_2_0)


@pytest.fixture(scope="module")
def whole_stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compose]:
    """The stack of a fresh copy with one of the brokers, up and healthy."""
    if reason := compose.missing_engine():
        pytest.skip(reason)
    if not (lock := compose.lock()):
        pytest.skip("another run of these tests is under way on this machine")
    with lock:
        stack = Compose(compose.copy_checkout(tmp_path_factory.mktemp("checkout")))
        stack.use_broker(request.param)
        stack.compose("down", "--volumes", "--remove-orphans")  # what a killed run left
        if reason := compose.in_the_way(stack):
            pytest.skip(reason)
        try:
            try:
                stack.up("--build")
            except BaseException:
                print(stack.trouble())
                raise
            yield stack
        finally:
            stack.tear_down()


@pytest.fixture
def stack(whole_stack: Compose, request: pytest.FixtureRequest) -> Iterator[Compose]:
    """The same; of a test that failed, pytest shows what is printed here."""
    failed_before = request.session.testsfailed
    yield whole_stack
    if request.session.testsfailed > failed_before:
        print(whole_stack.trouble())


@pytest.fixture
def put_back(stack: Compose) -> Iterator[Compose]:
    """The same, for a test that changes settings or takes something away."""
    settings = (stack.folder / ".env").read_text()
    yield stack
    (stack.folder / ".env").write_text(settings)
    stack.up()


# --- what is there -------------------------------------------------------------------


@both_brokers
def test_all_three_services_are_healthy_and_the_schema_step_has_ended_well(stack: Compose) -> None:
    assert {service: stack.health(service) for service in CONTAINERS} == dict.fromkeys(
        CONTAINERS, "healthy"
    )
    schema = stack.inspect("schema")["State"]
    assert (schema["Status"], schema["ExitCode"]) == ("exited", 0)
    assert stack.log("schema") == ""


def test_ps_shows_the_documented_names_images_and_ports(stack: Compose) -> None:
    listed = [json.loads(line) for line in stack.compose("ps", "--format", "json").splitlines()]
    assert {row["Service"]: (row["Name"], row["Image"]) for row in listed} == {
        "mosquitto": ("mosquitto", "eclipse-mosquitto:2"),
        "postgres": ("homelab-postgres", "postgres:16"),
        "ingester": ("homelab-ingester", "homelab-ingester"),
    }
    ports = {
        row["Service"]: {(p["PublishedPort"], p["TargetPort"]) for p in row["Publishers"] or ()}
        - {(0, 5432), (0, 1883)}  # exposed by the image, published nowhere
        for row in listed
    }
    assert ports == {
        "mosquitto": {(1883, 1883), (9001, 9001)},
        "postgres": {(int(stack.settings["POSTGRES_PORT"] or 0), 5432)},
        "ingester": set(),
    }


def test_a_service_that_dies_is_started_again_and_no_log_fills_the_disk(stack: Compose) -> None:
    host = {service: stack.inspect(service)["HostConfig"] for service in (*CONTAINERS, "schema")}
    assert {service: config["RestartPolicy"]["Name"] for service, config in host.items()} == {
        "mosquitto": "unless-stopped",
        "postgres": "unless-stopped",
        "ingester": "unless-stopped",
        "schema": "no",
    }
    for config in host.values():
        assert config["LogConfig"]["Type"] == "json-file"
        assert config["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}


OVERLAY = ("-f", "docker-compose.yml", "-f", "overlays/secure/docker-compose.yml")


@pytest.mark.parametrize("files", [(), OVERLAY], ids=["default", "secure"])
def test_it_fits_a_machine_of_1_gb_and_waits_for_a_slow_card(
    stack: Compose, files: tuple[str, ...]
) -> None:
    command = (*files, "--profile", "demo", "config", "--format", "json")
    services = json.loads(stack.compose(*command))["services"]
    limits = {name: int(service["mem_limit"]) for name, service in services.items()}
    assert limits.keys() == {*CONTAINERS, "schema", "demo"}
    assert sum(limits.values()) < 1_000_000_000, limits
    for name in CONTAINERS:
        check = services[name]["healthcheck"]
        assert check["start_period"] in ("2m0s", "5m0s"), name
        assert check["timeout"] == "10s", name
    # The database shares out what it has in the overlay, too.
    given = set(" ".join(services["postgres"]["command"]).split(" -c ")[1:])
    assert given >= {"shared_buffers=64MB", "work_mem=2MB", "max_connections=25"}
    # The broker refuses before the kernel ends it.
    mounted = "overlays/secure" if files else "mosquitto/config"
    text = (stack.folder / mounted / "mosquitto.conf").read_text()
    heap = re.search(r"^memory_limit (\d+)$", text, re.MULTILINE)
    assert heap
    assert int(heap[1]) < 0.85 * limits["mosquitto"]


@both_brokers
def test_the_broker_takes_more_clients_than_an_engine_that_allows_1024_files(
    stack: Compose,
) -> None:
    service = json.loads(stack.compose("config", "--format", "json"))["services"]["mosquitto"]
    configuration = f"{stack.folder}/mosquitto/config:/mosquitto/config:ro"
    run = ("docker", "run", "--detach", "--rm", "--name", "homelab-test-many")
    few = ("--ulimit", "nofile=1024:4096", "--network", f"{PROJECT}_default")
    command = [part.replace("$$", "$") for part in service["command"]]
    stack.run(*run, *few, "--volume", configuration, service["image"], *command)
    try:
        stack.compose("exec", "ingester", "python", "-c", CONNECT_MANY)
    finally:
        stack.run("docker", "rm", "--force", "homelab-test-many")


# Each waits for its CONNACK; they stay until all are in.
CONNECT_MANY = """
import resource, socket, time
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
clients = []
while len(clients) < 1500:
    try:
        client = socket.create_connection(("homelab-test-many", 1883), timeout=30)
    except OSError:
        if clients:
            raise
        continue  # it is starting
    name = b"many-%04d" % len(clients)
    client.sendall(b"\\x10\\x15\\0\\4MQTT\\4\\2\\0\\0\\0\\x09" + name)
    assert client.recv(4) == b"\\x20\\2\\0\\0", len(clients)
    clients.append(client)
"""


def processes_of(stack: Compose, container: str) -> list[dict[str, str]]:
    """What the kernel says of each process in a container, and of the one that looks."""
    look = ("docker", "exec", "--user", "10001:10001", container)
    statuses = stack.run(*look, "sh", "-c", "cat /proc/[0-9]*/status").stdout
    return [
        dict(line.split(":\t", 1) for line in block.splitlines() if ":\t" in line)
        for block in re.split(r"^(?=Name:)", statuses, flags=re.M)[1:]
    ]


def test_no_process_of_the_ingester_is_root_or_can_become_it(stack: Compose) -> None:
    processes = processes_of(stack, "homelab-ingester")
    assert "python" in {process["Name"] for process in processes}
    for process in processes:
        assert set(process["Uid"].split()) == set(process["Gid"].split()) == {"10001"}, process
        assert int(process["CapEff"], 16) == int(process["CapBnd"], 16) == 0, process
        assert process["NoNewPrivs"] == "1", process


@pytest.mark.parametrize("service", [*CONTAINERS, "schema"])
def test_every_container_has_a_read_only_root_and_few_capabilities(
    stack: Compose, service: str
) -> None:
    host = stack.inspect(service)["HostConfig"]
    # A backup lies in the database's /tmp until `docker compose cp` takes it.
    assert host["ReadonlyRootfs"] or service == "postgres"
    assert host["CapDrop"] == ["ALL"]
    assert {name.removeprefix("CAP_") for name in host["CapAdd"] or ()} <= {
        *("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID")
    }
    assert "no-new-privileges:true" in host["SecurityOpt"]


@pytest.mark.parametrize("path", ["/app/ingester/app.py", "/app/new", "/usr/bin/new", "/etc/new"])
def test_not_even_root_can_write_into_the_ingesters_root_file_system(
    stack: Compose, path: str
) -> None:
    command = ["docker", "compose", "exec", "-u", "0", "ingester", "sh", "-c", f"echo x >> {path}"]
    assert "Read-only file system" in stack.run(*command, expected=2).stderr


def test_the_ingesters_image_holds_three_packages_and_no_other(stack: Compose) -> None:
    listed = stack.compose("exec", "ingester", "pip", "list", "--format", "json")
    names = {package["name"] for package in json.loads(listed)}
    assert names - {"pip"} == {"paho-mqtt", "psycopg2-binary", "python-dotenv"}


@both_brokers
def test_the_log_says_that_both_connections_are_up_and_no_more(stack: Compose) -> None:
    connected, subscribed = stack.log("ingester").splitlines()[:2]
    assert connected.endswith(" INFO Connected to Postgres")
    assert subscribed.endswith(" INFO MQTT connected rc=Success; subscribing qs/v1/+/events")
    assert not re.search("WARNING|ERROR|Traceback", stack.log("ingester"))


@both_brokers
def test_the_brokers_log_is_a_file_on_the_host_and_a_quiet_stack_writes_nothing_into_it(
    stack: Compose,
) -> None:
    def checks_ended() -> list[str]:
        return [entry["End"] for entry in stack.inspect("mosquitto")["State"]["Health"]["Log"]]

    def wait_for_checks(number: int) -> None:
        last = checks_ended()[-1]
        wait_until(lambda: sum(end > last for end in checks_ended()) >= number, "checks", 30)

    def queue_written_at() -> int:
        queue = stack.folder / "mosquitto/data/mosquitto.db"
        return queue.stat().st_mtime_ns if queue.exists() else 0

    log = stack.folder / "mosquitto/log/mosquitto.log"
    # Without its file, 2.1 logs errors only, wherever to.
    assert "as homelab-ingester (" in log.read_text()
    assert "as homelab-ingester (" in stack.log("mosquitto")
    # Nobody else may write into the folder, or read the file.
    assert log.parent.stat().st_mode & 0o022 == log.stat().st_mode & 0o077 == 0
    wait_for_checks(1)  # what came before has been written by then
    before = log.stat().st_size
    for _ in range(2):
        at_first = queue_written_at()
        wait_for_checks(2)
        if queue_written_at() == at_first:
            break
    else:
        pytest.fail("the queue, which is written every 5 minutes, was written twice at once")
    assert log.stat().st_size == before, stack.compose(
        "exec", "mosquitto", "tail", "/mosquitto/log/mosquitto.log"
    )


# --- what the README says to type ----------------------------------------------------


def readme_commands(text: str) -> list[str]:
    """Every line of a ```sh block that looks into the stack, with those that it goes on for."""
    commands = []
    for block in re.findall(r"^[ ]*```sh\n(.*?)^[ ]*```", text, flags=re.M | re.S):
        lines = iter(textwrap.dedent(block).splitlines())
        for line in lines:
            if re.match("docker compose (exec|ps|logs)\\b", line):
                while not _is_whole(line):
                    line += "\n" + next(lines)
                commands.append(line)
    return commands


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:  # a quotation is open, or a backslash ends the line
        return False
    return True


# Goes on until it is interrupted.
LISTENS = re.compile(r"mosquitto_sub(?!.* -C )|logs.* (-f|--follow)\b")


def run_as_typed(stack: Compose, command: str) -> str | None:
    """Run a line in a shell; return what is wrong, if something is.

    A command that listens on is given some seconds, and must have found nothing to complain
    of by then.
    """
    listens = LISTENS.search(command)
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=stack.folder,
        env=stack.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=3 if listens else 30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        return None if listens and not errors else f"{command}\nended by us:\n{output}{errors}"
    if process.returncode:
        return f"{command}\nexit {process.returncode}:\n{output}{errors}"
    return None


@both_brokers
def test_every_exec_ps_and_logs_command_of_the_readme_works(put_back: Compose) -> None:
    commands = readme_commands((put_back.folder / "README.md").read_text())
    if put_back.broker != BROKER:  # what is the broker's, and takes no long time
        commands = [c for c in commands if " exec mosquitto " in c and not LISTENS.search(c)]
    assert any(" exec " in command for command in commands), commands
    wrong = [problem for command in commands if (problem := run_as_typed(put_back, command))]
    assert not wrong, "\n\n".join(wrong)


def test_readme_commands_are_found_with_all_their_lines() -> None:
    text = """
```sh
docker compose exec a b '{
  "c": 1}'
docker compose exec d \\
  e
docker compose down -v
```
```powershell
docker compose exec f
```
   ```sh
   docker compose exec g
   ```
"""
    assert readme_commands(text) == [
        "docker compose exec a b '{\n  \"c\": 1}'",
        "docker compose exec d \\\n  e",
        "docker compose exec g",
    ]


@both_brokers
@pytest.mark.parametrize(
    ("payload", "topic", "heard"),
    [
        (event(1, "typed"), "qs/v1/typed/acks", {"event_id": "typed-1", "status": "stored"}),
        ({"schema": 1}, "qs/v1/typed/acks", {"status": "rejected", "reason": "missing_field"}),
        ({"schema": 1}, "qs/v1/deadletter", {"device_id": "typed", "payload": '{"schema": 1}'}),
    ],
)
def test_what_mosquitto_pub_publishes_is_answered_where_mosquitto_sub_hears_it(
    stack: Compose, payload: dict[str, object], topic: str, heard: dict[str, object]
) -> None:
    into_broker = ["docker", "compose", "exec", "mosquitto"]
    listener = subprocess.Popen(
        [*into_broker, "mosquitto_sub", "-t", topic, "-C", "1", "-W", "20"],
        cwd=stack.folder,
        env=stack.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    message = json.dumps(payload)
    while listener.poll() is None:  # again and again, as it may not have subscribed yet
        stack.run(*into_broker, "mosquitto_pub", "-t", "qs/v1/typed/events", "-m", message)
    answer = json.loads(listener.communicate()[0])
    assert {name: answer[name] for name in heard} == heard


@both_brokers
def test_a_device_over_websocket_hears_that_its_event_is_stored(stack: Compose) -> None:
    with Device(9001, "browser", transport="websockets") as device:
        answer = device.ask(event(1, "browser"))
    assert answer["status"] == "stored"
    assert stack.event_ids("browser") == {"browser-1"}


# --- stopping and starting -----------------------------------------------------------


RESTARTS = pytest.mark.parametrize("how", ["restart", "stop and start"])


@RESTARTS
@pytest.mark.parametrize("services", ["postgres", "ingester", pytest.param("", id="all")])
def test_events_go_on_being_stored_after_a_restart_of(
    stack: Compose, services: str, how: str
) -> None:
    events_are_stored_before_and_after(stack, services, how)


@both_brokers
@RESTARTS
def test_events_go_on_being_stored_after_a_restart_of_the_broker(stack: Compose, how: str) -> None:
    events_are_stored_before_and_after(stack, "mosquitto", how)


def events_are_stored_before_and_after(stack: Compose, services: str, how: str) -> None:
    name = f"{services or 'all'}-{how.replace(' ', '-')}"
    with Device(1883, name) as device:
        device.deliver([event("before", name)])
        for command in how.split(" and "):
            stack.compose(command, *services.split())
        device.deliver([event("after", name)])
    assert stack.event_ids(name) == {f"{name}-before", f"{name}-after"}
    stack.wait_healthy()
    wait_until(lambda: not stack.inspect("schema")["State"]["Running"], "the schema step to end")
    assert stack.inspect("schema")["State"]["ExitCode"] == 0


# ALRM ends a process whose loop hangs (test_watchdog.py). It would not end a PID 1, which has
# no default action for signals: hence `init`.
@pytest.mark.parametrize("name", ["KILL", "ALRM"])
def test_a_killed_ingester_is_started_again(stack: Compose, name: str) -> None:
    restarts = stack.inspect("ingester")["RestartCount"]
    # -1: whatever this user may signal in this container, but for its PID 1.
    stack.compose("exec", "ingester", "sh", "-c", f"kill -{name} -1")
    device_id = f"killed-by-{name}"
    with Device(1883, device_id) as device:
        device.deliver([event(1, device_id)])
    assert stack.inspect("ingester")["RestartCount"] == restarts + 1
    assert ("most recent call first" in stack.log("ingester")) == (name == "ALRM")
    stack.wait_healthy()


@both_brokers
def test_a_stopped_ingester_exits_0_within_5_s_and_finds_what_came_meanwhile(
    stack: Compose,
) -> None:
    asked_at = datetime.now(UTC)
    stack.compose("stop", "ingester")
    state = stack.inspect("ingester")["State"]
    assert state["ExitCode"] == 0
    assert (datetime.fromisoformat(state["FinishedAt"]) - asked_at).total_seconds() < 5
    with Device(1883, "meanwhile") as device:
        for number in range(20):
            device.publish(event(number, "meanwhile"), qos=number % 2)
        stack.compose("start", "ingester")
        device.wait(lambda: len(device.acks) >= 20, "all ACKs", 30)
    assert stack.event_ids("meanwhile") == {f"meanwhile-{number}" for number in range(20)}
    stack.wait_healthy()


@both_brokers
def test_down_keeps_rows_and_queued_events_and_the_next_up_changes_no_schema(
    put_back: Compose,
) -> None:
    stack = put_back
    stack.compose("stop", "ingester")
    with Device(1883, "kept") as device:
        for number in range(20):
            device.publish(event(number, "kept"), qos=number % 2)
    rows = stack.psql("SELECT count(*) FROM events")
    schema = stack.schema()
    assert "idx_events_device_ts" in schema
    assert stack.event_ids("kept") == set()

    stack.down()
    assert stack.volumes_left() == {VOLUME}  # no anonymous one
    stack.up()

    assert stack.log("schema") == ""
    assert stack.schema() == schema
    wait_until(lambda: len(stack.event_ids("kept")) == 20, "the queued events", 30)
    assert int(stack.psql("SELECT count(*) FROM events")) == int(rows) + 20


def test_a_database_that_was_half_made_is_whole_after_the_next_up(put_back: Compose) -> None:
    stack = put_back
    whole = stack.schema()
    stack.psql("DROP INDEX idx_events_type_ts; DROP TABLE dead_letters")
    stack.up()
    assert stack.schema() == whole
    with Device(1883, "healed") as device:
        assert device.ask({})["status"] == "rejected"
        device.wait(lambda: bool(device.dead_letters), "the dead letter")


def test_a_down_with_volumes_begins_anew(put_back: Compose) -> None:
    put_back.down("--volumes")
    assert put_back.volumes_left() == set()
    put_back.up()
    assert put_back.psql("SELECT count(*) FROM events") == "0"
    assert "Connected to Postgres" in put_back.log("ingester")


# --- settings ------------------------------------------------------------------------


def test_every_setting_reaches_the_ingester_and_the_port_inside_stays_5432(
    put_back: Compose,
) -> None:
    stack = put_back
    port = free_port()
    settings = stack.folder / ".env"
    text = re.sub("^POSTGRES_PORT=.*", f"POSTGRES_PORT={port}", settings.read_text(), flags=re.M)
    settings.write_text(f"{text}\nPGAPPNAME=of-the-file\n")
    stack.up()

    arrived = dict(
        line.split("=", 1) for line in stack.compose("exec", "ingester", "env").splitlines()
    )
    assert arrived.items() >= (dotenv_values(settings) | {"POSTGRES_PORT": "5432"}).items()
    connection = psycopg2.connect(
        host="127.0.0.1",
        port=port,
        dbname=stack.settings["POSTGRES_DB"],
        user=stack.settings["POSTGRES_USER"],
        password=stack.settings["POSTGRES_PASSWORD"],
    )
    with connection.cursor() as cursor:
        cursor.execute("SELECT application_name FROM pg_stat_activity")
        assert ("of-the-file",) in cursor.fetchall()
    connection.close()
    assert port_is_free(int(stack.settings["POSTGRES_PORT"] or 0))
    with Device(1883, "moved") as device:
        device.deliver([event(1, "moved")])


def test_a_variable_of_the_shell_wins_over_the_file(put_back: Compose) -> None:
    put_back.up("ingester", LOG_LEVEL="DEBUG", DEVICE_DEFAULT_TZ="America/Los_Angeles")
    with Device(1883, "shell") as device:
        device.deliver([event(1, "shell", ts_device="2026-07-01T00:00:00")])
    assert " DEBUG batch" in put_back.log("ingester")
    stored = put_back.psql(
        "SELECT ts_device AT TIME ZONE 'UTC' FROM events WHERE event_id = 'shell-1'"
    )
    assert stored == "2026-07-01 07:00:00"


def test_old_names_of_time_zones_are_in_the_image(stack: Compose) -> None:
    look = """
from ingester.settings import Settings
import os
for name in ("US/Eastern", "Europe/Kiev", "Asia/Calcutta", "EST", "GB", "Brazil/East"):
    zone = Settings.from_env({**os.environ, "DEVICE_DEFAULT_TZ": name}).device_default_tz
    print(zone.key, zone.utcoffset(__import__("datetime").datetime(2026, 7, 1)))
"""
    assert stack.compose("exec", "ingester", "python", "-c", look).splitlines() == [
        "US/Eastern -1 day, 20:00:00",
        "Europe/Kiev 3:00:00",
        "Asia/Calcutta 5:30:00",
        "EST -1 day, 19:00:00",
        "GB 1:00:00",
        "Brazil/East -1 day, 21:00:00",
    ]


def test_wrong_settings_end_the_start_with_2_and_one_message_naming_each(stack: Compose) -> None:
    done = stack.run(
        *("docker", "compose", "run", "--rm", "--no-deps", "-T"),
        *("-e", "BATCH_MAX=x", "-e", "MQTT_HOST=", "ingester"),
        expected=2,
    )
    assert done.stderr.count("cannot start, the settings are wrong") == 1
    assert "BATCH_MAX: expected a whole number from 1 to 10000, got 'x'" in done.stderr
    assert "MQTT_HOST: missing" in done.stderr
    assert "Traceback" not in done.stderr


# --- outages -------------------------------------------------------------------------


def test_a_frozen_database_makes_the_ingester_unhealthy_and_loses_nothing(stack: Compose) -> None:
    with Device(1883, "frozen") as device:
        stack.compose("pause", "postgres")
        try:
            device.publish(event(1, "frozen"))
            stack.wait_health("ingester", "unhealthy", 75)
        finally:
            stack.compose("unpause", "postgres")
        device.wait(lambda: bool(device.acks), "the ACK", 30)
    assert stack.event_ids("frozen") == {"frozen-1"}
    assert stack.inspect("ingester")["RestartCount"] == 0
    stack.wait_healthy()


# --- the demo --------------------------------------------------------------------------


DEMO_DEVICES = "SELECT count(DISTINCT device_id) FROM events WHERE device_id LIKE 'sim-%'"


def test_the_demo_is_not_there_unless_asked_for_and_then_its_events_are_stored(
    stack: Compose,
) -> None:
    assert "demo" not in stack.compose("config", "--services").split()
    demo = ("--profile", "demo")
    stack.compose(*demo, "up", "-d", "--wait")
    try:
        wait_until(lambda: stack.psql(DEMO_DEVICES) == "5", "an event of each of five devices")
        host = json.loads(stack.run("docker", "inspect", "homelab-demo").stdout)[0]["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        processes = processes_of(stack, "homelab-demo")
        assert "python" in {process["Name"] for process in processes}
        for process in processes:  # root has only opened the program
            assert set(process["Uid"].split()) == set(process["Gid"].split()) == {"10001"}, process
            assert (int(process["CapEff"], 16), process["NoNewPrivs"]) == (0, "1"), process
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
        stack.compose(*demo, "stop", "demo")
        said = stack.run("docker", "logs", "homelab-demo").stdout
        assert said.endswith("every event is stored\n"), said
        events = re.search(r"(\d+) events: ", said.splitlines()[-2])
        assert events
        rows = stack.psql("SELECT count(*) FROM events WHERE device_id LIKE 'sim-%'")
        assert rows == events[1]
    finally:
        stack.compose(*demo, "rm", "-sf", "demo")


def test_the_demo_goes_on_after_stop_down_and_up_in_any_order_and_ends_without_a_trace(
    put_back: Compose,
) -> None:
    stack = put_back
    chapter = (stack.folder / "README.md").read_text().partition("## Devices to try it with")[2]
    start, stop, end = (
        re.findall(rf"^(docker compose --profile demo {what}.*)$", chapter, re.MULTILINE)[0].split()
        for what in ("up", "stop", "down")
    )

    def events() -> int:
        return int(stack.psql("SELECT count(*) FROM events WHERE device_id LIKE 'sim-%'"))

    def wait_for_more(how_long: float = 60) -> None:
        before = events()
        wait_until(lambda: events() > before, "an event of the demo", how_long)

    stack.run(*start)
    wait_for_more()
    # Without its profile no command touches it: it waits for what is away.
    stack.compose("stop")
    stack.compose("start")
    wait_for_more()
    said = stack.run("docker", "compose", "down").stderr
    assert "Resource is still in use" in said
    stack.up()
    wait_for_more()
    # A container that is stopped outlives `down`, and its network does not.
    stack.run(*stop)
    stack.down()
    stack.run(*start)
    wait_for_more()
    stack.run(*end)
    label = f"label=com.docker.compose.project={compose.PROJECT}"
    for kind in (("ps", "-a"), ("network", "ls")):
        assert stack.run("docker", *kind, "-q", "--filter", label).stdout == ""


# --- a newer broker -------------------------------------------------------------------


# The last of all: the older broker would not read what the newer one has written.
@pytest.mark.brokers(BROKER_2_0)
def test_a_newer_broker_delivers_what_the_older_one_queued_and_writes_into_the_same_log(
    stack: Compose,
) -> None:
    stack.compose("stop", "ingester")
    with Device(1883, "upgraded") as device:
        for number in range(20):
            device.publish(event(number, "upgraded"), qos=number % 2)
    log = stack.folder / "mosquitto/log/mosquitto.log"
    before = log.read_text()
    stack.use_broker(BROKER)
    stack.up()
    wait_until(lambda: len(stack.event_ids("upgraded")) == 20, "the queued events", 30)
    assert stack.inspect("mosquitto")["Config"]["Image"] == BROKER
    after = log.read_text()
    assert after.startswith(before)
    assert "as homelab-ingester (" in after[len(before) :]
