"""The database with many rows, and the queries that docs/queries.md shows.

What it does: fills the table of events, and takes the time that each of the documented queries
needs, psql's own start included. What it does not: know the queries; it reads them there, so
one that the page shows tomorrow is measured too.

Invariant: the rows look like a year of readings, of 1,000 devices in equal shares, so that
the planner's estimates and the sizes of the indexes are those of real use.
"""

import re
import statistics
import time

from tools.process import CHECKOUT
from tools.stack import Postgres

LOAD = """
    INSERT INTO events
        (event_id, device_id, schema, event_type, value_num, unit, ts_device, ts_server, meta)
    SELECT 'load-' || n, 'device-' || n % 1000, 1,
        (ARRAY['temperature', 'humidity', 'pressure', 'battery'])[n / 1000 % 4 + 1],
        n % 400 / 10.0, 'C', at, at + interval '1 second', '{{"sensor": "dht22", "n": 1}}'
    FROM (
        SELECT n, now() - interval '1 year' * ({rows_max} - n) / {rows_max} AS at
        FROM generate_series({begin}, {end} - 1) AS n
    ) AS numbers
"""
ROWS_MAX = 10_000_000
CHUNK_ROWS = 500_000
_DOCUMENTED_QUERY = re.compile(r'(?m)^docker compose exec postgres psql .* -c "(SELECT .+)"$')


def load_up_to(postgres: Postgres, rows: int, rows_max: int = ROWS_MAX) -> None:
    """Fill the table until it holds so many rows of ours, as it would be after a while.

    `rows_max` is how many a year has.
    """
    begin = int(postgres.psql("SELECT count(*) FROM events WHERE event_id LIKE 'load-%'"))
    while begin < rows:
        end = min(begin + CHUNK_ROWS, rows)
        postgres.psql(LOAD.format(rows_max=rows_max, begin=begin, end=end))
        begin = end
    postgres.psql("VACUUM ANALYZE events")
    postgres.psql("CHECKPOINT")


def remove_all_others(postgres: Postgres) -> None:
    """Leave the rows of ours alone: nobody's year ends with two million events in a minute."""
    postgres.psql("DELETE FROM events WHERE event_id NOT LIKE 'load-%'")
    postgres.psql("VACUUM ANALYZE events")
    postgres.psql("CHECKPOINT")


def measure(postgres: Postgres, rounds: int) -> dict[str, float]:
    """Return the median time of each query of docs/queries.md, in milliseconds."""
    page = (CHECKOUT / "docs/queries.md").read_text()
    return {sql: _milliseconds(postgres, sql, rounds) for sql in _DOCUMENTED_QUERY.findall(page)}


def _milliseconds(postgres: Postgres, sql: str, rounds: int) -> float:
    # What the examples ask for is a device that nothing was loaded for.
    sql = sql.replace("test-device", "device-7")
    times = []
    for _ in range(rounds):
        began_at = time.perf_counter()
        postgres.psql(sql)
        times.append(time.perf_counter() - began_at)
    return statistics.median(times) * 1e3
