"""Starts the page: `python -m page`.

What it does: reads the environment and serves HTTP until it is told to end. Settings: libpq's
(PGHOST, PGPORT, PGDATABASE, PGUSER, PGPASSWORD, PGSSLMODE, ...), WEB_LISTEN (address and port),
WEB_HOSTS. What it does not: serve HTTPS, or more than its threads at once.
"""

import os
import signal
import sys

from waitress import serve

from page.app import make_app
from page.database import CONNECTIONS_MAX, Database

LISTEN_DEFAULT = "127.0.0.1:8080"


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listen = os.environ.get("WEB_LISTEN") or LISTEN_DEFAULT
    print(f"listening on {listen}", flush=True)
    # More threads than connections, so that what needs no database is answered meanwhile.
    serve(make_app(Database()), listen=listen, threads=2 * CONNECTIONS_MAX, ident="")


if __name__ == "__main__":
    main()
