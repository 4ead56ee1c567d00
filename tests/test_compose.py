"""docker-compose.yml as it is: what a person types, sees, and may rely on.

What it does: brings the stack up, and goes through names, hardening, the documents' commands,
restarts, upgrades, settings and outages; then once more with the older broker, for what
depends on it. What it does not: look at what the plain processes show as well (the event
contract, rates, kills at each step).

Invariant: after each test the stack is up and healthy, with the settings of .env, and its
rows are those of before and the test's own.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import psycopg2
import pytest
from dotenv import dotenv_values

from tests.support import compose, documents
from tests.support.compose import BROKER, BROKER_2_0, CONTAINERS, PROJECT, VOLUME, Compose
from tests.support.device import Device, event
from tests.support.pipeline import wait_until
from tests.support.secure import Client
from tests.support.terminal import CTRL_C, Terminal
from tools.process import free_port, port_is_free

pytestmark = [pytest.mark.compose, pytest.mark.timeout(300)]
pytest_generate_tests = compose.with_each_broker
both_brokers = pytest.mark.brokers(BROKER, BROKER_2_0)


@pytest.fixture(scope="module")
def whole_stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compose]:
    """The stack of a fresh copy with one of the brokers, up and healthy."""
    with compose.only_run():
        stack = Compose(compose.copy_checkout(tmp_path_factory.mktemp("checkout")))
        stack.use_broker(request.param)
        stack.look_often()
        with compose.cleared(stack):
            stack.up("--build")
            yield stack


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


def test_no_start_in_the_image_compiles_what_it_imports(stack: Compose) -> None:
    programs = "import ingester.app, ingester.deadletters.__main__, ingester.top.__main__"
    done = stack.run("docker", "exec", CONTAINERS["ingester"], "python", "-v", "-c", programs)
    sources = re.findall(r"# code object from '?(\S+?)'?\n", done.stderr)
    assert len(sources) > 50, done.stderr
    assert [path for path in sources if path.endswith(".py")] == []


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


# --- what the documents say to type ---------------------------------------------------


# What goes on until this is pressed.
KEYS = {
    "docker compose exec postgres psql -U qs -d qs": "\\q\n",
    "PGPASSWORD=qs_password psql -h localhost -U qs -d qs": "\\q\n",
    "docker compose exec ingester python -m ingester.top": "q",
    "docker compose run --rm --no-deps ingester python -m ingester.top": "q",
}
HEARD = re.compile('"listened"|"online"|Connected to Postgres')
# Typed by a test below, which looks at what becomes of it.
SIMULATOR = ".venv/bin/python devices/simulator.py --host localhost"
INGESTER = "MQTT_HOST=localhost POSTGRES_HOST=localhost .venv/bin/python -m ingester.app"
# What deadletters.md shows of an id that does not exist.
EXIT_CODES = {"docker compose exec ingester python -m ingester.deadletters replay 99": 2}
REPLAYS = (
    "docker compose exec ingester python -m ingester.deadletters"
    " replay --reason not_storable --since 2d",
    "docker compose exec ingester python -m ingester.deadletters replay 3 --set-device door-3",
)
# These change what runs, and others must not be typed meanwhile.
CHANGES = re.compile(
    r"docker compose (--profile demo|up|down|stop|start|restart|run .*mosquitto)\b"
)
# Takes 15 s, and harms nobody.
DEMO = "docker compose run --rm demo "
# The dead letters of deadletters.md: its event of 85 degrees, and one that
# came on another device's topic.
DEAD_LETTERS = """
    INSERT INTO dead_letters (id, received_at, reason, error, topic, device_id, event_id, payload)
    OVERRIDING SYSTEM VALUE
    VALUES (1, now(), 'not_storable', 'x', 'qs/v1/esp32-01/events', 'esp32-01', 'esp32-01-41',
        '{"schema": 1, "event_id": "esp32-01-41", "device_id": "esp32-01",'
        ' "event_type": "temperature", "value": 85.0, "unit": "C"}'),
    (3, now(), 'device_mismatch', 'x', 'qs/v1/gateway/events', 'gateway', 'door-3-7',
        '{"schema": 1, "event_id": "door-3-7", "device_id": "door-3", "event_type": "door"}')
    ON CONFLICT (id) DO UPDATE SET (reason, topic, device_id, payload, replayed_at) =
        (excluded.reason, excluded.topic, excluded.device_id, excluded.payload, NULL);
    SELECT setval(pg_get_serial_sequence('dead_letters', 'id'), max(id)) FROM dead_letters
"""


def typed(stack: Compose, command: str) -> Terminal:
    """Type a command in a terminal in the folder of the stack."""
    powershell = command.startswith("'")  # which prints a text that stands alone
    return Terminal(f"echo {command}" if powershell else command, stack.folder, stack.environment)


def with_python(stack: Compose) -> None:
    """Give the copy the Python packages that tools/bootstrap installs."""
    link = stack.folder / ".venv"
    if not link.exists():
        link.symlink_to(Path(sys.prefix))


def type_all(stack: Compose, commands: Iterable[str]) -> Iterator[str]:
    """Type one after the other; yield what is wrong."""
    for command in commands:
        with typed(stack, command) as terminal:
            if key := KEYS.get(command):
                terminal.wait_for("qs=#" if key != "q" else "ingester  online")
                terminal.press(key)
            if (code := terminal.wait_end()) != EXIT_CODES.get(command, 0):
                yield f"exit {code}: {terminal}"
            if (
                " replay " in command
                and not code
                and "1 of 1 dead letter: 1 stored" not in terminal.output
            ):
                yield str(terminal)


# With today's broker alone: what depends on the broker is tried with both by other tests.
def test_every_command_of_the_documents_works_as_typed_in_a_terminal(put_back: Compose) -> None:
    with_python(put_back)
    put_back.psql(DEAD_LETTERS)
    commands = [
        command
        for command in documents.to_type(documents.DEFAULT)
        if not documents.GOES_ON.search(command) and command not in (SIMULATOR, INGESTER)
    ]
    demo = [command for command in commands if command.startswith(DEMO)]
    changing = [command for command in commands if CHANGES.match(command)]
    with ExitStack() as cleanup:
        terminals = [cleanup.enter_context(typed(put_back, command)) for command in demo]
        looking = (command for command in commands if command not in (*changing, *demo))
        wrong = list(type_all(put_back, looking))
        for terminal in terminals:
            assert terminal.wait_end() == 0, str(terminal)
    for command, before in zip(changing, ["", *changing], strict=False):
        if " down" in before and " up" not in command:
            put_back.up()
        wrong += type_all(put_back, [command])
    assert not wrong, "\n\n".join(wrong)


@both_brokers
def test_what_the_documents_have_listen_hears_something_until_ctrl_c(stack: Compose) -> None:
    commands = [c for c in documents.to_type(documents.DEFAULT) if documents.GOES_ON.search(c)]
    assert len(commands) >= 6, commands
    with ExitStack() as cleanup, Device(1883, "listened") as device:
        open_terminals = [cleanup.enter_context(typed(stack, c)) for c in commands]

        def all_have_heard() -> bool:
            # Again and again, as one may not have subscribed yet.
            device.publish(event("heard", "listened"))
            device.publish({"schema": 1})
            return all(HEARD.search(terminal.output) for terminal in open_terminals)

        wait_until(all_have_heard, "something in each terminal")
        for terminal in open_terminals:
            terminal.press(CTRL_C)
            terminal.wait_end()


@both_brokers
def test_the_readmes_two_lines_show_the_acks_that_it_shows(stack: Compose) -> None:
    lines = [c for c in documents.to_type(documents.DEFAULT) if " mosquitto_rr " in c]
    said = []
    for line in lines:
        with typed(stack, line) as terminal:
            assert terminal.wait_end() == 0
        assert terminal.output in documents.text_of("README.md")
        said.append(json.loads(terminal.output)["status"])
    assert said == ["stored", "rejected"]


def test_the_documented_simulator_on_this_machine_stores_until_ctrl_c(stack: Compose) -> None:
    with_python(stack)
    with typed(stack, SIMULATOR) as terminal:
        terminal.wait_for(" stored,")
        terminal.press(CTRL_C)
        assert terminal.wait_end() == 0, str(terminal)
    assert "every event is stored" in terminal.output


def test_the_documented_ingester_as_a_plain_process_stores_until_ctrl_c(put_back: Compose) -> None:
    with_python(put_back)
    put_back.compose("stop", "ingester")
    with typed(put_back, INGESTER) as terminal, Device(1883, "plain") as device:
        device.deliver([event(1, "plain")])
        terminal.press(CTRL_C)
        assert terminal.wait_end() == 0, str(terminal)
    assert put_back.event_ids("plain") == {"plain-1"}


# As a power cut or a newer broker leaves the queue's file.
SPOILT = {
    "zeros": 'head -c "$(stat -c %s "$f")" /dev/zero > "$f.x"; cat "$f.x" > "$f"; rm "$f.x"',
    "cut off": 'truncate -s "$(($(stat -c %s "$f") / 2))" "$f"',
    # Behind the 15 bytes that name the format and the 4 of a checksum: the format's version.
    "of a version to come": "printf '\\377' | dd of=\"$f\" bs=1 seek=22 conv=notrunc",
}


@both_brokers
def test_a_broker_whose_file_is_cut_off_is_put_right_by_the_documented_commands(
    put_back: Compose,
) -> None:
    spoil_and_put_right(put_back, "cut off")


# Only with today's broker: the older one refuses them as it refuses what is cut off.
@pytest.mark.parametrize("how", [how for how in SPOILT if how != "cut off"])
def test_a_broker_whose_file_is_spoilt_is_put_right_by_the_documented_commands(
    put_back: Compose, how: str
) -> None:
    spoil_and_put_right(put_back, how)


def spoil_and_put_right(stack: Compose, how: str) -> None:
    stack.compose("stop", "ingester")
    name = f"spoilt-{how.replace(' ', '-')}"
    with Device(1883, name) as device:
        for number in range(20):
            device.publish(event(number, name))
    stack.compose("stop", "mosquitto")
    spoil = f"set -e; f=/mosquitto/data/mosquitto.db; test -s $f; {SPOILT[how]}"
    stack.compose("run", "--rm", "-T", "mosquitto", "sh", "-c", spoil)
    before = len(broker_refusals(stack))
    stack.compose("start", "mosquitto")
    # 2.1 writes a new file when it ends; 2.0 does not, and so ends again and again.
    often = 1 if stack.broker == BROKER else 2
    wait_until(lambda: len(broker_refusals(stack)) >= before + often, "the broker to refuse", 30)
    if stack.broker == BROKER:
        with Device(1883, name):
            pass

    (commands,) = documents.blocks("The broker does not start")
    stack.run("bash", "-euc", commands)

    stack.wait_healthy()
    assert stack.event_ids(name) == set()  # what was queued is lost
    with Device(1883, name) as again:
        again.deliver(device.sent.values())
    assert stack.event_ids(name) == set(device.sent)


def broker_refusals(stack: Compose) -> list[str]:
    return re.findall("Couldn't open database", stack.log("mosquitto"))


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
    with Client(None, "browser", port=9001, transport="websockets") as browser:
        answer = browser.ask(event(1, "browser"))
    assert answer["status"] == "stored", answer
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
    stack.psql("DROP INDEX idx_events_type_ts; DROP TABLE dead_letters CASCADE")
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


def test_the_reader_looks_as_documented_once_it_has_a_password(put_back: Compose) -> None:
    stack = put_back
    (block,) = documents.blocks("As `reader`")
    inside, outside = block.splitlines()
    stack.up(READER_PASSWORD="let me look")
    with typed(stack, inside) as terminal:
        assert terminal.wait_end() == 0, str(terminal)
    with typed(stack, outside) as terminal:
        terminal.wait_for("Password for user reader:")
        terminal.press("let me look\r")
        assert terminal.wait_end() == 0, str(terminal)
    stack.up()
    with typed(stack, inside) as terminal:
        assert terminal.wait_end() == 2
        assert "is not permitted to log in" in terminal.output


def test_a_variable_of_the_shell_wins_over_the_file(put_back: Compose) -> None:
    put_back.up("ingester", LOG_LEVEL="DEBUG", DEVICE_DEFAULT_TZ="America/Los_Angeles")
    with Device(1883, "shell") as device:
        device.deliver([event(1, "shell", ts_device="2026-07-01T00:00:00")])
    # The engine writes the log down a moment later.
    wait_until(lambda: " DEBUG batch" in put_back.log("ingester"), "the line of the batch", 15)
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
    stack.psql("DELETE FROM events WHERE device_id LIKE 'sim-%'")  # of another test
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
    chapter = documents.chapter("docs/devices.md", "Simulated devices")
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
