"""The views for people, on a real PostgreSQL: right, quick, readable and never in the way.

What it does: compares each view with a plain computation in Python, over events as strange as
the contract lets in; looks at the plans on a table of some size; applies the schema while
somebody reads. What it does not: measure times; that is the benchmark, with 10 million rows.

Invariant: no row that the contract lets in makes a view fail.
"""

import itertools
import json
import shlex
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2 import errors, extras

from tests.support.documents import chapter
from tests.support.pipeline import Database
from tools.stack import Stack

VIEWS = {
    "event_types_heard",
    "latest_values",
    "devices",
    "hourly_values",
    "ingest_latency",
    "silent_devices",
    "accounted_events",
    "missing_events",
}
MISSING = {"accounted_events", "missing_events"}
HOUR, DAY = timedelta(hours=1), timedelta(hours=24)
NOTHING = timedelta()
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Row(NamedTuple):
    """What the views look at of an event, in the order of COLUMNS."""

    event_id: str
    device_id: str
    event_type: str
    value_num: float | None
    value_text: str | None
    unit: str | None
    ts_device: datetime | None
    ts_server: datetime


COLUMNS = ", ".join(Row._fields)


def insert(cursor: Any, rows: Iterable[Row]) -> None:
    sql = f"INSERT INTO events (schema, {COLUMNS}) VALUES %s"
    template = f"(1{', %s' * len(Row._fields)})"
    extras.execute_values(cursor, sql, [tuple(row) for row in rows], template)


def groups(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    grouped: dict[K, list[T]] = defaultdict(list)
    for row in rows:
        grouped[key(row)].append(row)
    return grouped


def nearest_rank(values: Iterable[timedelta], share: float) -> timedelta:
    """The smallest of the values that is not less than such a share of them."""
    ordered = sorted(values)
    return ordered[max(0, ceil(len(ordered) * share) - 1)]


# --- what each view should say -------------------------------------------------------


def clock_can_be_right(row: Row) -> bool:
    year_2001 = datetime(2001, 1, 1, tzinfo=UTC)
    return row.ts_device is not None and year_2001 <= row.ts_device <= row.ts_server + HOUR


def happened_at(row: Row) -> datetime:
    return row.ts_device if row.ts_device and clock_can_be_right(row) else row.ts_server


def hour_of(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def latest_values(rows: list[Row], now: datetime) -> set[Any]:
    def rank(row: Row) -> Any:
        clock = (row.ts_device is not None, row.ts_device or now)
        return row.ts_server, clock, len(row.event_id), row.event_id

    by_type = groups(rows, lambda row: (row.device_id, row.event_type))
    return {tuple(sorted(group, key=rank)[-1]) for group in by_type.values()}


def heard(rows: list[Row], now: datetime) -> set[Any]:
    by_type = groups(rows, lambda row: (row.device_id, row.event_type))
    return {(*key, max(row.ts_server for row in group)) for key, group in by_type.items()}


def devices(rows: list[Row], now: datetime) -> set[Any]:
    expected = set()
    for device, group in groups(rows, lambda row: row.device_id).items():
        day = [row for row in group if row.ts_server > now - DAY]
        drifts = [row.ts_server - row.ts_device for row in day if row.ts_device]
        drift = nearest_rank(drifts, 0.5) if drifts else None
        expected.add((device, max(row.ts_server for row in group), len(day), drift))
    return expected


def hourly_values(rows: list[Row], now: datetime) -> set[Any]:
    numbers = [row for row in rows if row.value_num is not None]
    by_hour = groups(
        numbers, lambda row: (row.device_id, row.event_type, row.unit, hour_of(happened_at(row)))
    )
    expected = set()
    for key, group in by_hour.items():
        values = [row.value_num for row in group if row.value_num is not None]
        tame = [value for value in values if abs(value) < 1e100]
        mean = rounded(statistics.fmean(tame)) if tame else None
        expected.add((*key, len(values), min(values), mean, max(values)))
    return expected


def ingest_latency(rows: list[Row], now: datetime) -> set[Any]:
    usable = [row for row in rows if row.ts_server > now - DAY and clock_can_be_right(row)]
    latencies = []
    for group in groups(usable, lambda row: row.device_id).values():
        behind = [(row, row.ts_server - row.ts_device) for row in group if row.ts_device]
        quickest = min(each for _, each in behind)
        latencies += [(hour_of(row.ts_server), each - quickest) for row, each in behind]
    expected = set()
    for hour, group_ in groups(latencies, lambda pair: pair[0]).items():
        of_hour = [latency for _, latency in group_]
        percentiles = (nearest_rank(of_hour, share) for share in (0.5, 0.95, 0.99, 1))
        expected.add((hour, len(of_hour), *percentiles))
    return expected


def silent_devices(rows: list[Row], now: datetime) -> set[Any]:
    expected = set()
    for device, group in groups(rows, lambda row: row.device_id).items():
        medians = []
        for of_type in groups(group, lambda row: row.event_type).values():
            times = sorted(row.ts_server for row in of_type)[-10:]
            pauses = [b - a for a, b in itertools.pairwise(times) if b > a]
            medians += [nearest_rank(pauses, 0.5)] if pauses else []
        last = max(row.ts_server for row in group)
        allowed = 3 * min(medians) if medians else DAY
        if now - last > max(allowed, timedelta(minutes=10)):
            expected.add((device, last, now - last, min(medians, default=None)))
    return expected


def rounded(value: float | None) -> float | None:
    # Two sums in different order are not the same to the last bit.
    return None if value is None else float(f"{value:.9g}")


ASKED: dict[str, tuple[str, Callable[[list[Row], datetime], set[Any]]]] = {
    "event_types_heard": ("device_id, event_type, last_seen_at", heard),
    "latest_values": (COLUMNS, latest_values),
    "devices": ("device_id, last_seen_at, events_24h, clock_drift", devices),
    "hourly_values": (
        "device_id, event_type, unit, hour, readings, min, mean, max",
        hourly_values,
    ),
    "ingest_latency": ("hour, events, p50, p95, p99, max", ingest_latency),
    "silent_devices": ("device_id, last_seen_at, silent_for, usual_pause", silent_devices),
}


# --- are they right ------------------------------------------------------------------

VALUES = [0.0, -0.0, 21.5, -3.25, 5e-324, -5e-324, 1e99, 1e100, 1e200, -1e308, 1.7e308]
MINUTES = [0, 1, 2, 9, 11, 29, 31, 59, 61, 125, 300, 1439, 1441, 1500, 3000, 100_000]
CLOCKS = [
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(1970, 1, 1, 0, 0, 7, tzinfo=UTC),
    datetime(2000, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    datetime(2001, 1, 1, tzinfo=UTC),
    datetime(2106, 2, 7, 6, 28, 15, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
]
BEHIND = [-7200, -3600.000001, -3600, -0.5, 0, 0.001, 0.002, 3, 3, 90, 86_400, 40_000_000]


@pytest.fixture
def cursor(database: Database) -> Iterator[Any]:
    """A cursor in UTC; what it does is rolled back."""
    connection = database.connect()
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
        connection.commit()
        yield cursor
    connection.close()


@st.composite
def tables(draw: st.DrawFn, now: datetime) -> list[Row]:
    """Draw some events of few devices, so that there are ties and gaps."""
    rows = []
    for number in range(draw(st.integers(1, 40))):
        ts_server = now - timedelta(minutes=draw(st.sampled_from(MINUTES)))
        if draw(st.booleans()):
            ts_server = hour_of(ts_server)
        behind = timedelta(seconds=draw(st.sampled_from(BEHIND)))
        value = draw(st.none() | st.sampled_from(VALUES) | st.sampled_from(["open", ""]))
        rows.append(
            Row(
                event_id=f"e-{number}",
                device_id=draw(st.sampled_from(["a", "A:1", "b"])),
                event_type=draw(st.sampled_from(["t", "T", "two words"])),
                value_num=value if isinstance(value, float) else None,
                value_text=value if isinstance(value, str) else None,
                unit=draw(st.sampled_from([None, "C", "F"])),
                ts_device=draw(st.sampled_from([None, *CLOCKS, *[ts_server - behind] * 7])),
                ts_server=ts_server,
            )
        )
    return rows


@given(data=st.data())
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_each_view_says_what_a_plain_computation_says(cursor: Any, data: st.DataObject) -> None:
    cursor.connection.rollback()
    cursor.execute("SELECT now()")
    now = cursor.fetchone()[0]
    rows = data.draw(tables(now))
    insert(cursor, rows)
    # No answer may depend on the plan, such as on the order in which an index is read.
    by_index = data.draw(st.sampled_from(["on", "off"]))
    for method in ("indexscan", "indexonlyscan", "bitmapscan"):
        cursor.execute(f"SET LOCAL enable_{method} = {by_index}")
    for view, (columns, expected) in ASKED.items():
        cursor.execute(f"SELECT {columns} FROM {view}")
        found = cursor.fetchall()
        if view == "hourly_values":
            found = [(*row[:6], rounded(row[6]), row[7]) for row in found]
        assert len(found) == len(set(found)), view
        assert set(found) == expected(rows, now), view

    some_row = data.draw(st.sampled_from(rows))
    since = hour_of(some_row.ts_server) - data.draw(st.sampled_from([0, 1])) * HOUR
    until = since + data.draw(st.sampled_from([1, 2, 24, 1000])) * HOUR
    columns = "event_type, unit, hour, readings, min, mean, max"
    cursor.execute(f"SELECT {columns} FROM hourly('a', %s, %s)", (since, until))
    of_function = set(cursor.fetchall())
    sql = f"SELECT {columns} FROM hourly_values WHERE device_id = 'a' AND hour >= %s AND hour < %s"
    cursor.execute(sql, (since, until))
    assert of_function == set(cursor.fetchall())


def test_every_view_is_compared(database: Database) -> None:
    views = database.query(
        "SELECT relname FROM pg_class WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace"
    )
    assert {row[0] for row in views} == VIEWS
    assert set(ASKED) | MISSING == VIEWS  # test_missing_events.py compares those


def test_an_empty_table_makes_empty_views(database: Database) -> None:
    for view in VIEWS:
        assert database.query(f"SELECT * FROM {view}") == []


def test_a_clock_in_the_future_does_not_hide_the_values_after_it(cursor: Any) -> None:
    cursor.execute("SELECT now()")
    now = cursor.fetchone()[0]
    wrong = Row("wrong", "d", "t", 1.0, None, None, datetime(2106, 1, 1, tzinfo=UTC), now - HOUR)
    insert(cursor, [wrong, Row("right", "d", "t", 2.0, None, None, now, now)])
    cursor.execute("SELECT value_num FROM latest_values")
    assert cursor.fetchall() == [(2.0,)]
    cursor.execute("SELECT last_seen_at FROM devices")
    assert cursor.fetchall() == [(now,)]


# How many minutes ago a device sent events of each of its types.
SILENT: dict[str, list[Iterable[int]]] = {
    "for three pauses": [(61, 81)],
    "for ten minutes": [(11, 12, 13)],
    "since its one event": [(1441,)],
    "since its one batch": [(1441, 1441)],
    "for three pauses of its quicker type": [(76, 21, 81), (500, 80)],
    "for three pauses, but for one outage": [(61, 81, 101, 5000, 5020)],
}
NOT_SILENT: dict[str, list[Iterable[int]]] = {
    "for less than three pauses": [(59, 79)],
    "for less than ten minutes": [(9, 10, 11)],
    "since its one event, today": [(1439,)],
    "since its one batch, today": [(1439, 1439)],
    "two types, one of them recent": [(60, 61, 62), (9,)],
    "quicker than usual of late": [(*range(100, 105), *range(164, 1064, 60))],
}


def test_a_device_is_silent_after_three_of_its_usual_pauses(cursor: Any) -> None:
    cursor.execute("SELECT now()")
    now = cursor.fetchone()[0]
    numbers = itertools.count()
    insert(
        cursor,
        [
            Row(f"{next(numbers)}", device, f"{t}", 1.0, None, None, None, ago)
            for device, types in (SILENT | NOT_SILENT).items()
            for t, minutes in enumerate(types)
            for ago in (now - timedelta(minutes=each) for each in minutes)
        ],
    )
    cursor.execute("SELECT device_id FROM silent_devices")
    assert {row[0] for row in cursor.fetchall()} == set(SILENT)


# --- are they quick ------------------------------------------------------------------

# 50,000 rows: 100 devices of 5 types, the last of them now.
FILL = """
    INSERT INTO events (event_id, device_id, schema, event_type, value_num, ts_device, ts_server)
    SELECT n::text, 'device-' || n % 100, 1, 'type-' || n / 100 % 5, n % 40, at, at + '1 second'
    FROM (
        SELECT n, now() - interval '90 days' * (50000 - n) / 50000 AS at
        FROM generate_series(1, 50000) AS n
    ) AS numbers
"""


def scans(plan: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield how each scan reads, and how many rows or index entries it took."""
    if "Relation Name" in plan or plan["Node Type"] == "Bitmap Index Scan":
        taken = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
        yield plan["Node Type"], taken * plan["Actual Loops"]
    for part in plan.get("Plans", ()):
        yield from scans(part)


# How many rows and index entries each may take.
READS = {
    "SELECT * FROM event_types_heard": 1_000,
    "SELECT * FROM latest_values": 2_000,
    "SELECT * FROM latest_values WHERE device_id = 'device-7'": 2_000,
    "SELECT * FROM devices": 3_000,
    "SELECT * FROM silent_devices": 15_000,
    "SELECT * FROM ingest_latency": 2_000,
    "SELECT * FROM hourly_values WHERE device_id = 'device-7'": 2_000,
    "SELECT * FROM hourly('device-7', now() - interval '9 d', now() - interval '8 d')": 100,
}


# As many dead letters of the same devices over the same time.
FILL_DEAD_LETTERS = """
    INSERT INTO dead_letters (received_at, last_received_at, reason, error, topic, device_id,
        payload)
    SELECT ts_server - interval '1 day', ts_server, 'not_json', 'x', 'x', device_id, ''
    FROM events
"""


def queries(heading: str) -> list[str]:
    """The queries of one chapter that people are told to type, without psql around them."""
    block = chapter("docs/queries.md", heading).split("```sh\n")[1].split("```")[0]
    found = [shlex.split(command)[-1] for command in block.splitlines()]
    return [query for query in found if " FROM events" in query or " FROM dead_letters" in query]


def flood_queries() -> list[str]:
    return queries("Which device floods")


def test_a_view_reads_by_index_and_not_the_whole_table(database: Database) -> None:
    database.query(FILL)
    database.query(FILL_DEAD_LETTERS)
    database.query("VACUUM ANALYZE events, dead_letters")
    shown = [
        query.replace("test-device", "device-7").replace("'temperature'", "'type-2'")
        for query in (*flood_queries(), *queries("Query"))
    ]
    for query, rows_max in (READS | dict.fromkeys(shown, 50)).items():
        plan = database.query(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}")[0][0][0]["Plan"]
        why = f"{query}\n{json.dumps(plan, indent=1)}"
        found = list(scans(plan))
        assert found, why
        assert "Seq Scan" not in {kind for kind, _ in found}, why
        taken = sum(rows for kind, rows in found if kind != "Bitmap Heap Scan")
        assert 0 < taken <= rows_max, why


# --- the documented queries ------------------------------------------------------------


def test_the_documented_query_by_the_devices_clock_begins_with_the_newest(cursor: Any) -> None:
    cursor.execute("SELECT now()")
    now = cursor.fetchone()[0]
    times = [None if n % 2 else now - timedelta(minutes=n) for n in range(40)]
    insert(
        cursor,
        [
            Row(f"{n}", "test-device", "temperature", n, None, None, at, now)
            for n, at in enumerate(times)
        ],
    )
    (query,) = (query for query in queries("Query") if "ORDER BY ts_device" in query)
    cursor.execute(query)
    assert cursor.fetchall() == [(times[n], n) for n in range(0, 20, 2)]


# --- the queries that find the device that floods -------------------------------------


def test_the_documented_queries_find_the_device_that_floods(cursor: Any) -> None:
    cursor.execute("SELECT now()")
    now = cursor.fetchone()[0]
    minutes = {"many": range(40), "few": range(0, 50, 10), "before": range(61, 200)}
    insert(
        cursor,
        [
            Row(f"{device}-{ago}", device, "t", 1.0, None, None, None, now - timedelta(minutes=ago))
            for device, all_ago in minutes.items()
            for ago in all_ago
        ],
    )
    # What came last before this hour does not count, however often it came.
    letters = [("garbage", 9, 500), ("garbage", 59, 500), ("few", 1, 3), (None, 2, 2)]
    letters += [("before", 61, 10**6), *((f"d-{n:02}", 5, 1) for n in range(20))]
    for device, ago, times in letters:
        cursor.execute(
            "INSERT INTO dead_letters (received_at, last_received_at, times, reason, error,"
            " topic, device_id, payload) VALUES (%s, %s, %s, 'not_json', 'x', 'x', %s, '')",
            (now - DAY, now - timedelta(minutes=ago), times, device),
        )
    cursor.execute("SET ROLE reader")
    by_events, by_dead_letters = flood_queries()
    cursor.execute(by_events)
    assert cursor.fetchall() == [("many", 40), ("few", 5)]
    cursor.execute(by_dead_letters)
    found = cursor.fetchall()
    last = [now - timedelta(minutes=ago) for ago in (9, 1, 2)]
    assert found[:3] == [
        ("garbage", 1000, 2, now - DAY, last[0]),
        ("few", 3, 1, now - DAY, last[1]),
        (None, 2, 1, now - DAY, last[2]),
    ]
    assert [row[1:3] for row in found[3:]] == [(1, 1)] * 7


# --- may one read them, and are they in the way --------------------------------------


def test_the_reader_may_read_every_view_and_the_ingester_none(database: Database) -> None:
    connection = database.connect()
    with connection.cursor() as cursor:
        cursor.execute("SET ROLE reader")
        for view in VIEWS:
            cursor.execute(f"SELECT * FROM {view}")
        cursor.execute("SELECT * FROM hourly('a', now() - interval '1 day', now())")
        connection.rollback()
        for view in VIEWS:
            cursor.execute("SET ROLE ingester")
            with pytest.raises(errors.InsufficientPrivilege):
                cursor.execute(f"SELECT * FROM {view}")
            connection.rollback()
    connection.close()


# With what a restore or a DROP could leave behind: views, functions and the index are gone.
TAKE_AWAY = """
    DROP VIEW IF EXISTS latest_values, devices, hourly_values, ingest_latency, silent_devices,
        event_types_heard, missing_events;
    DROP VIEW IF EXISTS accounted_events CASCADE;
    DROP FUNCTION IF EXISTS event_time, hourly, missing_events, has_sequence;
    DROP INDEX IF EXISTS idx_events_device_type_server;
"""
DESCRIBE = """
    SELECT relname, relkind, relacl::text, pg_get_viewdef(oid), obj_description(oid)
    FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('v', 'i')
    UNION ALL
    SELECT proname, prokind, proacl::text, pg_get_functiondef(oid), obj_description(oid)
    FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    ORDER BY 1, 2
"""


def test_an_older_database_gets_them_and_the_second_run_changes_nothing(
    servers: Stack, database: Database
) -> None:
    whole = database.query(DESCRIBE)
    made = database.query("SELECT oid FROM pg_class WHERE relkind = 'v' ORDER BY oid")
    servers.postgres.apply_schema(database.name)
    assert database.query(DESCRIBE) == whole
    assert database.query("SELECT oid FROM pg_class WHERE relkind = 'v' ORDER BY oid") == made
    database.query(TAKE_AWAY)
    assert len(database.query(DESCRIBE)) == len(whole) - len(VIEWS) - 5
    servers.postgres.apply_schema(database.name)
    assert database.query(DESCRIBE) == whole


def test_everything_has_a_comment(database: Database) -> None:
    bare = database.query(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        " AND relkind = 'v' AND obj_description(oid) IS NULL"
        " UNION ALL SELECT relname || '.' || attname FROM pg_class"
        " JOIN pg_attribute ON attrelid = pg_class.oid"
        " WHERE relnamespace = 'public'::regnamespace AND relkind = 'v'"
        " AND col_description(attrelid, attnum) IS NULL"
        " UNION ALL SELECT proname FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace AND obj_description(oid) IS NULL"
    )
    assert bare == []


def test_the_schema_step_does_not_wait_for_a_long_query_on_a_view(
    servers: Stack, database: Database
) -> None:
    reader = database.connect()
    with reader.cursor() as cursor:
        for view in VIEWS:
            cursor.execute(f"SELECT * FROM {view}")  # and the transaction stays open
        database.query(f"ALTER DATABASE {database.name} SET lock_timeout = '5s'")
        servers.postgres.apply_schema(database.name)
    reader.close()


def test_tables_of_the_owners_own_with_the_names_of_views_stay(
    servers: Stack, database: Database
) -> None:
    names = sorted(VIEWS - MISSING - {"event_types_heard"})  # which the others stand on
    for name in names:
        database.query(f"DROP VIEW {name}")
        database.query(f"CREATE TABLE {name} AS SELECT 'kitchen' AS room")
    begin = servers.postgres.log_end
    servers.postgres.apply_schema(database.name)
    warning = f"no view, because a table of yours has its name: {', '.join(names)}\n"
    assert warning in servers.postgres.log(begin)
    for name in names:
        assert database.query(f"SELECT * FROM {name}") == [("kitchen",)]
