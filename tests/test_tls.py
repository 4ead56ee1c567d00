"""The promise over TLS: a real broker and a real database that ask for it.

What it does: runs the ingester against TLS listeners with certificates of a CA of its own,
good ones and bad ones, and reads what it says of the bad ones. What it does not: settings
that are refused before anything connects (test_settings.py).
"""

import itertools
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority, Certificate, openssl
from tests.support.device import event
from tests.support.each import first_or_all
from tests.support.findings import find
from tests.support.load import connects, deliver_rest, devices, load, wait_for_acks
from tests.support.pipeline import Database, Pipeline, wait_until
from tests.support.proxy import Proxy
from tools.process import clean_environment, free_port, run
from tools.stack import Mosquitto, Postgres, Stack

_number = itertools.count()
DAY = timedelta(days=1)
AGAIN = "; trying again until it works"


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def other_ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "other")


Secured = Callable[..., Pipeline]


@pytest.fixture
def secured(servers: Stack, database: Database, ca: Authority) -> Iterator[Secured]:
    """Make a pipeline whose broker has a TLS listener, which the ingester is to use.

    The devices use the plain one. `certificate` is the broker's, good by default; `options`
    are more lines for that listener, `files` a file of passwords.
    """
    with ExitStack() as cleanup:

        def make(
            certificate: Certificate | None = None,
            options: str = "",
            files: Mapping[str, Path] | None = None,
        ) -> Pipeline:
            folder = servers.folder / f"tls-{next(_number)}"
            folder.mkdir()
            cert, key = certificate or ca.issue("broker")
            for name, source in {"ca": ca.cert, "cert": cert, "key": key, **(files or {})}.items():
                shutil.copy(source, folder / name)
            port = free_port()
            lines = [f"listener {port} 127.0.0.1", "socket_domain ipv4", options]
            lines += [f"{name}file {folder}/{name}" for name in ("ca", "cert", "key")]
            lines += [f"password_file {folder}/{name}" for name in files or ()]
            mosquitto = Mosquitto(folder, free_port(), free_port(), "\n".join(lines))
            cleanup.callback(mosquitto.stop)
            mosquitto.start()
            mosquitto.wait_ready()
            pipeline = Pipeline(mosquitto, database, folder)
            cleanup.callback(pipeline.close)
            pipeline.ingester.environment |= {
                "MQTT_HOST": "localhost",
                "MQTT_PORT": str(port),
                "MQTT_CA_FILE": str(ca.cert),
            }
            return pipeline

        yield make


def start(pipeline: Pipeline, **environment: object) -> Pipeline:
    with_environment(pipeline, **environment).ingester.start()
    pipeline.ingester.wait_ready()
    return pipeline


def with_environment(pipeline: Pipeline, **environment: object) -> Pipeline:
    pipeline.ingester.environment |= {name: str(value) for name, value in environment.items()}
    return pipeline


def tls_port(pipeline: Pipeline) -> int:
    return int(pipeline.ingester.environment["MQTT_PORT"])


# --- the promise -----------------------------------------------------------------------


def test_events_are_stored_and_answered_over_tls(secured: Secured) -> None:
    pipeline = start(secured())
    with pipeline.device() as device:
        for number in range(20):
            assert device.ask(event(number))["status"] == "stored"
        find("tls", [device], pipeline.database)
    assert connects(pipeline) == 1


def test_a_ca_of_the_system_will_do(secured: Secured, ca: Authority) -> None:
    # SSL_CERT_FILE is where OpenSSL finds the system's CAs.
    pipeline = start(secured(), MQTT_CA_FILE="", MQTT_TLS="true", SSL_CERT_FILE=ca.cert)
    with pipeline.device() as device:
        assert device.ask(event(1))["status"] == "stored"


def test_a_client_certificate_and_a_password_file_open_a_broker_that_wants_both(
    secured: Secured, ca: Authority, tmp_path: Path
) -> None:
    secret, passwords = tmp_path / "secret", tmp_path / "passwords"
    secret.touch(mode=0o600)
    secret.write_text("s3cret-\u00fc\n", "utf-8")
    command = ["mosquitto_passwd", "-c", "-b", str(passwords), "ingester", "s3cret-\u00fc"]
    run(command, clean_environment())
    client = ca.issue("client")
    pipeline = secured(options="require_certificate true", files={"passwords": passwords})
    start(
        pipeline,
        MQTT_CERT_FILE=client.cert,
        MQTT_KEY_FILE=client.key,
        MQTT_USERNAME="ingester",
        MQTT_PASSWORD_FILE=secret,
    )
    with pipeline.device() as device:
        assert device.ask(event(1))["status"] == "stored"
    assert "s3cret" not in pipeline.ingester.log()
    pipeline.ingester.stop()
    secret.write_text("s3cret-u\n")  # so the broker does look at it
    assert "Not authorized" in refusal(pipeline)
    assert "s3cret" not in pipeline.ingester.log()


def test_the_longest_answers_go_through_tls(secured: Secured) -> None:
    pipeline = start(secured())
    names = ["\U0001f600" * 56 + f"{number:04}" for number in range(1000)]
    elements = ",".join(f'{{"event_id": "{name}"}}' for name in names)
    with pipeline.device() as device:
        for _ in range(3):
            device.send(f"[{elements}]".encode())
        device.wait(lambda: len(device.acks) == 3000, "three arrays of 1,000 ACKs", 30)
    assert [ack["event_id"] for ack in device.acks] == names * 3
    assert connects(pipeline) == 1


def test_a_backlog_is_drained_over_tls(secured: Secured) -> None:
    pipeline = start(secured())
    with pipeline.device() as device:
        pipeline.ingester.stop()
        for number in range(5_000):
            device.send(event(number, value=number))
        device.wait_taken(60)
        start(pipeline)
        device.wait(lambda: len(device.heard_at) == 5_000, "5,000 ACKs", 60)
        find("backlog", [device], pipeline.database)
    assert connects(pipeline) == 2


@contextmanager
def terminator(certificate: Certificate, broker_port: int) -> Iterator[int]:
    """Take TLS off in front of a broker, as a reverse proxy does; return its port.

    What comes from the broker is gathered until there is a pause, so that many messages are
    in one TLS record. Mosquitto itself makes one of each.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    over = threading.Event()

    def forward() -> None:
        with (
            socket.create_connection(("127.0.0.1", broker_port)) as broker,
            context.wrap_socket(listener.accept()[0], server_side=True) as client,
        ):
            gathered = b""
            while not over.is_set():
                ready, _, _ = select.select([client, broker], [], [], 0.05)
                if client in ready:
                    broker.sendall(client.recv(65_536))
                if broker in ready:
                    gathered += broker.recv(65_536)
                elif gathered and not ready:
                    client.sendall(gathered)
                    gathered = b""

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=forward)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            over.set()
            thread.join()


def test_the_messages_of_one_tls_record_are_one_batch(secured: Secured, ca: Authority) -> None:
    pipeline = secured()
    with terminator(ca.issue("front"), pipeline.mosquitto.port) as port:
        start(pipeline, MQTT_PORT=port)
        with pipeline.device() as device:
            device.deliver([event("first")])  # the subscription stands
            log_end = pipeline.ingester.log_end
            for number in range(80):  # 13 kB, and a record holds 16
                device.send(event(number))
            device.wait(lambda: len(device.heard_at) == 81, "80 ACKs more")
        pipeline.ingester.stop()
    # By paho alone, 1, then 2, 4, 8 and so on: 7 batches.
    assert pipeline.ingester.log(log_end).count("batch: ") <= 3


def test_cuts_and_restarts_of_the_broker_lose_nothing_over_tls(secured: Secured) -> None:
    pipeline = secured()
    with Proxy(tls_port(pipeline)) as proxy, devices(pipeline, 2) as publishers:
        start(pipeline, MQTT_PORT=proxy.port)
        with load(publishers):
            for reset in (True, False):
                wait_for_acks(publishers)
                proxy.cut(reset)
            wait_for_acks(publishers)
            pipeline.mosquitto.stop()
            pipeline.mosquitto.start()
            pipeline.mosquitto.wait_ready()
            wait_for_acks(publishers)
            proxy.freeze(to_server=False)
            time.sleep(0.5)  # long enough to fill what is on its way
            proxy.cut()
            proxy.thaw()
            wait_for_acks(publishers)
        find("before anything is sent again", publishers, pipeline.database, complete=False)
        deliver_rest(publishers)
        find("cut and restarted", publishers, pipeline.database)
        pipeline.ingester.stop()
    assert "Traceback" not in pipeline.ingester.log()


# --- what is refused, and how it is said -----------------------------------------------


def refusal(pipeline: Pipeline, server_log: Path | None = None) -> str:
    """Start the ingester, let it fail three times, and return the one line that says so.

    `server_log` is that of the server which it tries, if that is not the broker.
    """
    server_log, ingester = server_log or pipeline.mosquitto.log_file, pipeline.ingester
    before, log_start = tries(server_log), ingester.log_end
    ingester.start()
    wait_until(lambda: tries(server_log) >= before + 3, "three tries", 30)
    ingester.wait_for_log(AGAIN, after=log_start)
    assert ingester.stop() == 0, ingester.log_tail()
    lines = [line.split(" ", 2)[2] for line in ingester.log(log_start).splitlines()]
    (line,) = [line for line in lines if line not in ("Connected to Postgres", "stopped")]
    for raw in ("_ssl.c", "[SSL", "OpenSSL", "certificate verify failed"):
        assert raw not in line
    return line.removesuffix(AGAIN).removeprefix("MQTT: ")


def tries(server_log: Path) -> int:
    """Count the connections that came, by what Mosquitto or `openssl s_server` says of each."""
    words = ("New connection from", "Client connection from", "ERROR\n")
    return sum(server_log.read_text("utf-8").count(word) for word in words)


@contextmanager
def s_server(pipeline: Pipeline, certificate: Certificate, *options: str) -> Iterator[Path]:
    """Let `openssl s_server` take the broker's place; return its log."""
    port, log_file = free_port(), pipeline.mosquitto.folder / "s_server.log"
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", *options]
    command += ["-cert", str(certificate.cert), "-key", str(certificate.key)]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command, env=clean_environment(), stdin=subprocess.PIPE, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: "ACCEPT" in log_file.read_text("utf-8"), "s_server")
        with_environment(pipeline, MQTT_PORT=port)
        yield log_file
    finally:
        process.kill()
        process.communicate()


def test_an_expired_certificate_of_the_broker(secured: Secured, ca: Authority) -> None:
    pipeline = secured(ca.issue("old", ends=-DAY))
    assert refusal(pipeline) == (
        f"the certificate of localhost:{tls_port(pipeline)} has expired, or its CA's has: make"
        " it again, or set the clock of this machine"
    )


def test_a_certificate_of_tomorrow(secured: Secured, ca: Authority) -> None:
    line = refusal(secured(ca.issue("new", begins=DAY)))
    assert "is not valid yet: set the clock" in line


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_for_another_name(secured: Secured, ca: Authority, host: str) -> None:
    pipeline = secured(ca.issue("named", "DNS:broker.example,IP:192.0.2.1"))
    with_environment(pipeline, MQTT_HOST=host)
    assert refusal(pipeline) == (
        f"the certificate of {host}:{tls_port(pipeline)} is not for this name: set MQTT_HOST"
        " to a name in it, or make it again for this name"
    )


UNKNOWN_CA = "): set MQTT_CA_FILE to the certificate of the CA that signed it"


def test_a_certificate_of_another_ca(secured: Secured, other_ca: Authority) -> None:
    assert UNKNOWN_CA in refusal(secured(other_ca.issue("broker")))


def test_a_certificate_of_another_ca_of_the_same_name(secured: Secured, tmp_path: Path) -> None:
    assert UNKNOWN_CA in refusal(secured(Authority(tmp_path / "twin").issue("broker")))


def test_a_certificate_of_a_ca_that_the_system_does_not_know(secured: Secured) -> None:
    pipeline = with_environment(secured(), MQTT_CA_FILE="", MQTT_TLS="true")
    assert UNKNOWN_CA in refusal(pipeline)


def test_a_ca_file_takes_the_place_of_the_systems_cas(
    secured: Secured, ca: Authority, other_ca: Authority
) -> None:
    pipeline = secured()
    with_environment(pipeline, MQTT_CA_FILE=other_ca.cert, MQTT_TLS="true", SSL_CERT_FILE=ca.cert)
    assert UNKNOWN_CA in refusal(pipeline)


def test_a_broker_that_speaks_no_tls_on_that_port(secured: Secured) -> None:
    pipeline = secured()
    port = pipeline.mosquitto.port
    assert refusal(with_environment(pipeline, MQTT_PORT=port)) == (
        f"localhost:{port} closes the connection in the TLS handshake: it is being stopped or"
        " refuses us, which its log tells, or MQTT_PORT is not that of its TLS listener"
    )


# What comes back for a ClientHello, and what is to be said of it. MQTT's own answer is a CONNACK.
ANSWERS = {
    "nothing": (b"", "closes the connection in the TLS handshake: "),
    "a reset": (b"", "closes the connection in the TLS handshake: "),
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not answer in TLS: set MQTT_PORT"),
    "SMTP": (b"220 mail.example ESMTP\r\n", "does not answer in TLS: set MQTT_PORT"),
    "alert: internal error": (
        b"\x15\x03\x03\x00\x02\x02\x50",
        "fails: TLSV1_ALERT_INTERNAL_ERROR",
    ),
    "alert: unknown CA": (
        b"\x15\x03\x03\x00\x02\x02\x30",
        "wants a client certificate (MQTT_CERT_FILE), or refuses ours: ",
    ),
    "alert: close": (
        b"\x15\x03\x03\x00\x02\x01\x00",
        "closes the connection in the TLS handshake: ",
    ),
}


@pytest.mark.parametrize("answer", first_or_all(ANSWERS))
def test_a_port_that_answers_the_handshake_with_something_else(
    secured: Secured, answer: str
) -> None:
    data, expected = ANSWERS[answer]
    pipeline = secured()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(15)
        with_environment(pipeline, MQTT_HOST="127.0.0.1", MQTT_PORT=server.getsockname()[1])
        pipeline.ingester.start()
        line, _ = server.accept()
        with line:
            line.recv(4096)
            line.sendall(data)
            if answer == "a reset":
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        pipeline.ingester.wait_for_log(AGAIN)
        assert pipeline.ingester.stop() == 0
    log = pipeline.ingester.log()
    assert expected in log
    assert "Traceback" not in log


def test_a_broker_that_wants_tls_where_none_is_set(secured: Secured) -> None:
    pipeline = with_environment(secured(), MQTT_CA_FILE="")
    assert "it may want TLS (MQTT_TLS)" in refusal(pipeline)


@pytest.mark.parametrize("shown", ["none", "another CA's"])
def test_a_broker_that_wants_a_client_certificate(
    secured: Secured, other_ca: Authority, shown: str
) -> None:
    pipeline = secured(options="require_certificate true")
    if shown != "none":
        cert, key = other_ca.issue("client")
        with_environment(pipeline, MQTT_CERT_FILE=cert, MQTT_KEY_FILE=key)
    assert "it may want TLS (MQTT_TLS), or a client certificate" in refusal(pipeline)


def test_a_broker_that_wants_a_client_certificate_in_tls_1_2(
    secured: Secured, ca: Authority
) -> None:
    pipeline = secured()  # TLS 1.3 says so later, behind the handshake
    with s_server(pipeline, ca.issue("server"), "-tls1_2", "-Verify", "1") as log:
        assert "wants a client certificate (MQTT_CERT_FILE), or refuses ours" in refusal(
            pipeline, log
        )


def test_a_broker_with_tls_1_1_alone(secured: Secured, ca: Authority) -> None:
    pipeline = secured()
    options = ("-tls1_1", "-cipher", "DEFAULT:@SECLEVEL=0")
    with s_server(pipeline, ca.issue("server"), *options) as log:
        port = tls_port(pipeline)
        # It does speak TLS 1.1, so that what is refused is the version.
        old = openssl("s_client", "-connect", f"127.0.0.1:{port}", "-tls1_1", *options[1:])
        assert "Protocol  : TLSv1.1" in old
        assert f"localhost:{port} has no TLS 1.2 or newer: " in refusal(pipeline, log)


# --- a broker that never answers -------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_handshake_that_is_never_answered_is_given_up_and_holds_up_no_signal(
    secured: Secured, number: signal.Signals
) -> None:
    pipeline = secured()
    with Proxy(tls_port(pipeline)) as proxy:
        proxy.freeze()
        with_environment(pipeline, MQTT_PORT=proxy.port).ingester.start()
        pipeline.ingester.wait_for_log(
            f"WARNING MQTT: localhost:{proxy.port} takes the connection and does not answer in the"
            " TLS handshake: it hangs or is overloaded, or MQTT_PORT is not that of its TLS"
            f" listener{AGAIN}"
        )
        proxy.cut()
        proxy.thaw()
        pipeline.ingester.wait_ready()
        with pipeline.device() as device:
            assert device.ask(event(1))["status"] == "stored"
        proxy.freeze()
        proxy.cut()
        wait_until(lambda: proxy.connections > 0, "it to connect again")
        pipeline.ingester.stop_signal = number
        began_at = time.monotonic()
        assert pipeline.ingester.stop() == 0, pipeline.ingester.log_tail()
        assert time.monotonic() - began_at < 5  # the promise that Compose relies on
        assert "Traceback" not in pipeline.ingester.log()


# --- PostgreSQL ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encrypted(servers: Stack) -> Iterator[Database]:
    """A database server that takes connections over TLS alone; serve() it a certificate."""
    folder = servers.folder / "tls-postgres"
    names = {"ssl_cert_file": "crt", "ssl_key_file": "key"}
    settings = {"ssl": "on"} | {key: str(folder / name) for key, name in names.items()}
    postgres = Postgres(folder, free_port(), settings)
    serve(postgres, Authority(servers.folder / "tls-postgres-ca").issue("database"))
    try:
        hba = postgres.data / "pg_hba.conf"
        hba.write_text(hba.read_text().replace("host ", "hostssl "))
        postgres.apply_schema()
        yield Database(postgres, postgres.dbname)
    finally:
        postgres.stop()


def serve(postgres: Postgres, certificate: Certificate) -> None:
    """Start the server again with this certificate."""
    postgres.stop()
    postgres.folder.mkdir(exist_ok=True)
    for source, name in zip(certificate, ("crt", "key"), strict=True):
        shutil.copy(source, postgres.folder / name)
    postgres.start()
    postgres.wait_ready()


def with_database(pipeline: Pipeline, encrypted: Database, ca: Path) -> Pipeline:
    return with_environment(
        pipeline,
        POSTGRES_HOST="localhost",
        POSTGRES_PORT=encrypted.postgres.port,
        POSTGRES_DB=encrypted.name,
        PGSSLMODE="verify-full",
        PGSSLROOTCERT=ca,
    )


def test_everything_goes_over_tls_with_no_password_in_the_environment(
    secured: Secured, encrypted: Database, ca: Authority, tmp_path: Path
) -> None:
    serve(encrypted.postgres, ca.issue("database"))
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text(encrypted.postgres.password + "\n")
    pipeline = with_database(secured(), encrypted, ca.cert)
    start(pipeline, POSTGRES_PASSWORD="wrong", POSTGRES_PASSWORD_FILE=secret)
    with pipeline.device() as device:
        for number in range(20):
            assert device.ask(event(number))["status"] == "stored"
        find("tls", [device], encrypted)
    sessions = "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE %s"
    assert encrypted.query(sessions % "application_name = 'homelab-ingester'") == [(True,)]
    assert encrypted.postgres.password not in pipeline.ingester.log()


UNVERIFIED = (
    "SSL error: certificate verify failed: it has expired, or is not signed by the CA in"
    " PGSSLROOTCERT"
)
BAD_DATABASES: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"ends": -DAY}, UNVERIFIED),
    "another name": (
        {"alternative_names": "DNS:db.example"},
        'server certificate for "db.example" does not match host name "localhost"',
    ),
    "another CA": ({}, UNVERIFIED),
}


@pytest.mark.parametrize("case", first_or_all(BAD_DATABASES))
def test_a_database_whose_certificate_is_not_accepted(
    pipeline: Pipeline, encrypted: Database, ca: Authority, other_ca: Authority, case: str
) -> None:
    fields, expected = BAD_DATABASES[case]
    serve(encrypted.postgres, ca.issue("database", **fields))
    root = other_ca.cert if case == "another CA" else ca.cert
    ingester = with_database(pipeline, encrypted, root).ingester
    ingester.start()
    ingester.wait_for_log(AGAIN)
    ingester.wait_for_log("MQTT connected")  # and it goes on trying
    assert ingester.stop() == 0, ingester.log_tail()
    lines = [line.split(" ", 2)[2] for line in ingester.log().splitlines()]
    says, last = [line for line in lines if "MQTT" not in line]
    # Behind the address; there may be another one of localhost, where nobody answers.
    assert f"127.0.0.1:{encrypted.postgres.port}): {expected}{AGAIN}" in says
    assert last == "stopped"
