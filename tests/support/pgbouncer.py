"""PgBouncer between the ingester and PostgreSQL, as a plain process.

What it does: pools a few server connections in transaction mode, which is how hosters offer
PostgreSQL. What it does not: check passwords; who reaches it is let in as the test's own user.

Invariant: it is reached on 127.0.0.1 alone, and starts no service of the system's.
"""

import signal
from pathlib import Path

import psycopg2

from tools.process import (
    LOOPBACK,
    Process,
    chown_tree,
    clean_environment,
    free_port,
    reachable_folder,
    require,
    service_account,
)
from tools.stack import Postgres

# `ignore_startup_parameters` is what its documentation tells everybody to set, for JDBC.
CONFIG = """\
[databases]
* = host={host} port={server_port} user={user} password={password}

[pgbouncer]
listen_addr = {host}
listen_port = {port}
unix_socket_dir =
auth_type = any
admin_users = {user}
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 50
ignore_startup_parameters = extra_float_digits
logfile =
"""


class PgBouncer(Process):
    """The pooler in front of `postgres`, with so many connections to each database."""

    stop_signal = signal.SIGTERM  # at once; SIGINT waits for what is under way

    def __init__(self, folder: Path, postgres: Postgres, pool_size: int = 1) -> None:
        account = service_account("postgres")  # it refuses to be root
        self.folder = reachable_folder(folder, account)
        self.port = free_port()
        self.postgres = postgres
        self.pool_size = pool_size
        super().__init__("pgbouncer", self.folder / "pgbouncer.log", account)

    def start(self) -> None:
        require("pgbouncer")
        config_file = self.folder / "pgbouncer.ini"
        server = self.postgres
        config = CONFIG.format(
            host=LOOPBACK,
            port=self.port,
            server_port=server.port,
            user=server.user,
            password=server.password,
            pool_size=self.pool_size,
        )
        config_file.write_text(config)
        chown_tree(self.folder, self.account)
        self._spawn(["pgbouncer", str(config_file)], clean_environment(), self.folder)

    def wait_ready(self, timeout: float = 15.0) -> None:
        self.wait_until(self._answers, f"answering on port {self.port}", timeout)

    def _answers(self) -> bool:
        # Its own console, so that no server connection is opened for it.
        try:
            user = self.postgres.user
            psycopg2.connect(host=LOOPBACK, port=self.port, user=user, dbname="pgbouncer").close()
        except psycopg2.OperationalError:
            return False
        return True
