"""Starts the page: `python -m page`.

What it does: reads the environment and serves HTTP until it is told to end. Settings: libpq's
(PGHOST, PGPORT, PGDATABASE, PGUSER, PGPASSWORD, PGSSLMODE, ...), WEB_LISTEN (address and port),
WEB_HOSTS. What it does not: serve HTTPS, or more than its threads at once.
"""

import logging
import os
import signal
import sys
import time

from waitress import serve

from page.app import make_app
from page.database import CONNECTIONS_MAX, Database

LISTEN_DEFAULT = "127.0.0.1:8080"


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    listen = os.environ.get("WEB_LISTEN") or LISTEN_DEFAULT
    # More threads than connections, so that what needs no database is answered meanwhile.
    serve(make_app(Database()), listen=listen, threads=2 * CONNECTIONS_MAX, ident="")


if __name__ == "__main__":
    main()
