"""missing_events, on a real PostgreSQL: every gap, no more, whatever is in the tables.

What it does: lets a device send numbered events through the real ingester and takes rows away;
compares view and function with a plain computation in Python; looks at the plan. What it does
not: measure times (docs/missing-events.md has them), or run the device libraries.

Invariant: what was stored, kept as a dead letter or told as dropped is never missing.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg2 import extras

from tests.support.device import Device, event
from tests.support.pipeline import Database, Pipeline
from tools.stack import Stack

SALT, OTHER_SALT = "0badcafe", "00000001"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
NOON = datetime(2026, 2, 10, 12, tzinfo=UTC)
EVER = (datetime(1970, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))
ALL = "SELECT device_id, boot, first_sequence, last_sequence FROM missing_events"
OF_ONE = f"{ALL}(%s, %s, %s)"

Gap = tuple[str, int, int, int]


class Row(NamedTuple):
    """What the view looks at of an event."""

    event_id: str
    device_id: str
    event_type: str = "t"
    ts_server: datetime = NOON
    meta: str | None = "{}"


def numbered(
    sequences: Iterable[int], device: str = "esp32-01", boot: int = 1, salt: str = SALT
) -> list[Row]:
    return [Row(f"{device}-{salt}-{boot}-{sequence}", device) for sequence in sequences]


def insert(cursor: Any, rows: Iterable[Row]) -> None:
    sql = f"INSERT INTO events (schema, {', '.join(Row._fields)}) VALUES %s"
    extras.execute_values(cursor, sql, [tuple(row) for row in rows], "(1, %s, %s, %s, %s, %s)")


def keep_dead(cursor: Any, payload: bytes = b"", event_id: str | None = None) -> None:
    cursor.execute(
        "INSERT INTO dead_letters (received_at, reason, error, topic, event_id, payload)"
        " VALUES (now(), 'x', 'x', 'x', %s, %s)",
        (event_id, payload),
    )


@pytest.fixture
def cursor(database: Database) -> Iterator[Any]:
    """A cursor; what it does is rolled back. An old event of another form is there already."""
    connection = database.connect()
    with connection.cursor() as cursor:
        insert(cursor, [Row("first-1", "first", ts_server=NOON - 100 * DAY)])
        connection.commit()
        yield cursor
    connection.close()


def missing(cursor: Any) -> list[Gap]:
    """What the view has, which must be what the function has of all devices."""
    cursor.execute(ALL)
    gaps: list[Gap] = sorted(cursor.fetchall())
    cursor.execute("SELECT DISTINCT device_id FROM events")
    of_each: list[Gap] = []
    for (device,) in cursor.fetchall():
        cursor.execute(OF_ONE, (device, *EVER))
        of_each += cursor.fetchall()
    assert sorted(of_each) == gaps
    return gaps


# --- through the ingester ------------------------------------------------------------


def sent(sequence: int, boot: int = 1, **fields: Any) -> dict[str, Any]:
    """An event of the device esp32-01-2 as the libraries send it."""
    return event(f"{SALT}-{boot}-{sequence}", "esp32-01-2", **fields)


def send_all(device: Device, events: list[dict[str, Any]]) -> None:
    answered = len(device.acks) + len(events)
    device.publish(events)
    device.wait(lambda: len(device.acks) >= answered, "the ACK of an array")


def test_rows_deleted_by_hand_are_missing_and_what_was_refused_or_dropped_is_not(
    running: Pipeline,
) -> None:
    database = running.database
    with running.device("esp32-01-2") as device:
        send_all(device, [sent(n) for n in range(1, 31)])
        # One bad event of an array is kept alone; of more than 20, the array whole.
        send_all(device, [sent(31), sent(32, value=True), sent(33)])
        send_all(device, [sent(n, value=True) for n in range(34, 60)] + [sent(60), sent(61)])
        # Cut short by the network: refused whole, and kept so.
        broken = json.dumps([sent(n) for n in range(62, 66)])[:-20].encode()
        device.publish(broken)
        device.wait(lambda: len(device.acks) >= 30 + 3 + 28 + 4, "the ACK of a broken array")
        # 66 to 70 did not fit the outbox, and 71 says so; of 72 and 73 nothing was heard.
        told = {"from": 66, "to": 70, "boot": 1}
        send_all(device, [sent(71, event_type="outbox_dropped", value=5, meta=told), sent(74)])
    assert database.query("SELECT count(*) FROM dead_letters") == [(3,)]
    assert database.query(ALL) == [("esp32-01-2", 1, 72, 73)]
    last = f"esp32-01-2-{SALT}-1-"
    gone = [f"{last}{n}" for n in (1, 5, 6, 7, 30, 74)]
    database.query("DELETE FROM events WHERE event_id = ANY(%s)", gone)
    assert sorted(row[2:] for row in database.query(ALL)) == [(1, 1), (5, 7), (30, 30)]
    # 74 is the newest no more, and may be on its way, as may 72 and 73.
    with running.device("esp32-01-2") as device:
        for n in (74, 6, 30, 72, 1, 73, 5, 7):
            assert device.ask(sent(n))["status"] == "stored"
    assert database.query(ALL) == []


def test_events_resent_in_another_order_are_no_gap_once_they_are_there(running: Pipeline) -> None:
    with running.device("esp32-01-2") as device:
        for n in (5, 2, 4, 2):
            device.ask(sent(n))
        assert sorted(row[2:] for row in running.database.query(ALL)) == [(1, 1), (3, 3)]
        for n in (3, 1, 5):
            device.ask(sent(n))
    assert running.database.query(ALL) == []


HOSTILE = [
    "99999999999999999999",
    "-5",
    "05",
    "0",
    "٣",
    "3 ",
    "0x10",
    "1e5",
    "2-",
    "2-.*",
    "%",
    "_",
    "\\",
    "'; DROP TABLE events; --",
    "9" * (200 - len(f"esp32-01-2-{SALT}-1-")),
]


def test_ids_of_other_forms_are_left_alone(running: Pipeline) -> None:
    own = "esp32-01-2"
    ids = [f"{own}-{SALT}-1-{end}" for end in HOSTILE] + [
        f"{own}-{SALT}-{end}-7" for end in HOSTILE
    ]
    ids += [f"{own}-{salt}-1-7" for salt in ("0BADCAFE", "0badcaf", "0badcafe0", "0badcafg", "")]
    ids += [f"{own}-17-42", f"{own}-42", "42", f"esp32-01-{SALT}-1-7", f"x{own}-{SALT}-1-7"]
    ids += [f"{own}{SALT}-1-7", f"{SALT}-1-7", f"{own}-{SALT}-1-7\u2028", "7" * 200]
    with running.device(own) as device:
        for event_id in ids:
            ack = device.ask(event(1, own) | {"event_id": event_id})
            assert ack["status"] == "stored", ack
    assert running.database.query(ALL) == []
    assert running.database.query(OF_ONE, own, *EVER) == []


def test_the_greatest_number_that_is_one_is_a_gap_and_costs_nothing(running: Pipeline) -> None:
    greatest = 10**18 - 1
    with running.device("esp32-01-2") as device:
        device.ask(sent(greatest))
        # Boot and sequence have 19 digits together at most.
        device.ask(sent(greatest, boot=10))
    gap = ("esp32-01-2", 1, 1, greatest - 1)
    assert running.database.query(ALL) == [gap]
    assert running.database.query(OF_ONE, "esp32-01-2", *EVER) == [gap]


# --- salts, boots, devices -----------------------------------------------------------


def test_salts_boots_and_devices_count_on_their_own(cursor: Any) -> None:
    # Of each the numbers are complete only if another's were counted in. A device id can be
    # another's with an end that looks like the rest of an id.
    devices = ["a", "a-1", "a-1-2", f"a-{SALT}-1", f"a-{SALT}", "1", "a.*", "a_", "A:1", "-"]
    runs = [(d, boot, salt) for d in devices for boot in (1, 2) for salt in (SALT, OTHER_SALT)]
    expected: list[Gap] = []
    for number, run in enumerate(runs, 3):
        insert(cursor, numbered([1, number], *run))
        expected += [(run[0], run[1], 2, number - 1)]
    assert missing(cursor) == sorted(expected)


def test_a_power_cut_before_anything_was_kept_is_no_gap(cursor: Any) -> None:
    # Boot 1 lost what was in memory after 3, boot 2 all it had; nobody can know of how many.
    insert(cursor, numbered(range(1, 4)) + numbered(range(1, 3), boot=3))
    assert missing(cursor) == []
    # Nor has the end of the salt, when the flash is erased, or the board is replaced.
    insert(cursor, numbered([1], salt=OTHER_SALT))
    assert missing(cursor) == []


def test_what_is_behind_the_newest_of_a_boot_may_be_on_its_way(cursor: Any) -> None:
    insert(cursor, numbered(range(1, 8)) + numbered([2], boot=2))
    # A dead letter, or word of what was dropped, fills a gap and makes none.
    keep_dead(cursor, event_id=f"esp32-01-{SALT}-1-12")
    keep_dead(cursor, event_id=f"esp32-01-{SALT}-3-5")
    told = '{"from": 20, "to": 30, "boot": 1}'
    insert(cursor, [Row(f"esp32-01-{SALT}-2-1", "esp32-01", "outbox_dropped", meta=told)])
    assert missing(cursor) == []


# --- what was told -------------------------------------------------------------------


def dropped(device: str, salt: str, sequence: int, meta: str | None) -> Row:
    return Row(f"{device}-{salt}-9-{sequence}", device, "outbox_dropped", meta=meta)


def test_an_overflow_is_told_for_its_own_salt_and_boot_alone(cursor: Any) -> None:
    for salt in (SALT, OTHER_SALT):
        for boot in (1, 2):
            insert(cursor, numbered([1, 10], boot=boot, salt=salt))
    insert(cursor, numbered([1, 10], "esp32-02"))
    told: list[dict[str, Any]] = [{"boot": 1, "from": 2, "to": 4}, {"boot": 1, "from": 4, "to": 6}]
    told += [{"boot": 1, "from": 8, "to": 8, "salt": SALT}, {"boot": 2, "from": 0, "to": 9}]
    rows = [dropped("esp32-01", SALT, n, json.dumps(meta)) for n, meta in enumerate(told, 1)]
    insert(cursor, rows)
    assert missing(cursor) == sorted(
        [
            ("esp32-01", 1, 7, 7),
            ("esp32-01", 1, 9, 9),
            ("esp32-01", 1, 2, 9),  # of the other salt
            ("esp32-01", 2, 2, 9),  # `from` counts from 1
            ("esp32-01", 2, 2, 9),
            ("esp32-02", 1, 2, 9),
        ]
    )


ODD_META = [
    None,
    "{}",
    '{"from": 2, "to": 3}',
    '{"from": 3, "to": 2, "boot": 1}',
    '{"from": -3, "to": 3, "boot": 1}',
    '{"from": 2.5, "to": 3, "boot": 1}',
    '{"from": 2, "to": 1e300, "boot": 1}',
    '{"from": 2, "to": 9223372036854775807, "boot": 1}',
    '{"from": 2, "to": null, "boot": 1}',
    '{"from": [2], "to": {"a": 3}, "boot": 1}',
    '{"from": "two", "to": "three", "boot": "1"}',
    '{"from": 2, "to": 3, "boot": 1, "salt": "00000001"}',
    '{"from": 2, "to": 3, "boot": 1, "salt": {"a": [1]}}',
    '{"from": 2, "to": 3, "boot": 1, "salt": 7}',
    '{"from": 2, "to": 3, "boot": 1e300}',
    '{"from": 2, "to": 3, "boot": ["1"]}',
]


def test_an_overflow_can_be_told_under_a_later_salt(cursor: Any) -> None:
    insert(cursor, numbered([1, 10]) + numbered([1, 10], "esp32-02"))
    told = json.dumps({"salt": SALT, "boot": 1, "from": 2, "to": 8})
    insert(cursor, [dropped("esp32-01", OTHER_SALT, 1, told)])
    assert missing(cursor) == [("esp32-01", 1, 9, 9), ("esp32-02", 1, 2, 9)]


def test_a_meta_that_makes_no_sense_tells_nothing(cursor: Any) -> None:
    insert(cursor, numbered([1, 4]))
    insert(cursor, [dropped("esp32-01", SALT, n, meta) for n, meta in enumerate(ODD_META, 1)])
    # Nor does one whose own id has no salt, or that is another device's.
    told = '{"from": 2, "to": 3, "boot": 1}'
    insert(cursor, [Row("esp32-01-1", "esp32-01", "outbox_dropped", meta=told)])
    insert(cursor, [Row(f"esp32-02-{SALT}-1-1", "esp32-02", "outbox_dropped", meta=told)])
    assert missing(cursor) == [("esp32-01", 1, 2, 3)]


def test_dead_letters_of_any_bytes_are_searched_for_ids(cursor: Any) -> None:
    device = "esp32-01"
    insert(cursor, numbered([1, 20]))
    start = f"{device}-{SALT}-1-"
    keep_dead(cursor, f'[{{"event_id":"{start}2"}}, {{"event_id" :\t"{start}3"'.encode())
    keep_dead(cursor, b"\xff\x00\xe9" + f'"event_id": "{start}4"'.encode() + b"\\\xff")
    keep_dead(cursor, f'"event_id": "{start}'.encode() + b'5"' * 100_000)
    keep_dead(cursor, event_id=f"{start}6")
    # Neither of these is an event's id, or it is not this one's.
    keep_dead(cursor, f'"id": "{start}10", "event_id": "{start}11'.encode())
    keep_dead(cursor, f'"event_id": "{start}012", "event_id": "x{start}13"'.encode())
    keep_dead(cursor, f'"event_id": "{device}-{OTHER_SALT}-1-14"'.encode())
    keep_dead(cursor, f'"event_id": "{start}15\\u0000"'.encode())
    keep_dead(cursor, event_id=f"{start}{'9' * 150}")
    assert missing(cursor) == [(device, 1, 7, 19)]


# --- periods -------------------------------------------------------------------------


def test_a_gap_belongs_to_the_period_in_which_the_event_behind_it_came_in(cursor: Any) -> None:
    rows = numbered([2, 3, 5, 6, 9, 7])
    insert(cursor, [row._replace(ts_server=NOON + n * HOUR) for n, row in enumerate(rows)])
    # 2 at 12:00, 3, 5, 6, 9, and 7 at 17:00.
    expected = {0: [(1, 1)], 2: [(4, 4)], 4: [(8, 8)]}
    for hour in range(-1, 7):
        begin = NOON + hour * HOUR
        cursor.execute(OF_ONE, ("esp32-01", begin, begin + HOUR))
        assert [row[2:] for row in cursor.fetchall()] == expected.get(hour, [])
    assert [row[2:] for row in missing(cursor)] == [(1, 1), (4, 4), (8, 8)]


@pytest.mark.parametrize(("oldest_days", "is_missing"), [(0.9, True), (1.1, False)])
def test_the_beginning_of_a_boot_that_retention_may_have_deleted_is_left_out(
    database: Database, oldest_days: float, is_missing: bool
) -> None:
    oldest = datetime.now(UTC) - oldest_days * DAY
    connection = database.connect()
    with connection.cursor() as cursor:
        rows = [row._replace(ts_server=oldest) for row in numbered([7, 8, 10])]
        rows += [row._replace(ts_server=oldest + 1.5 * HOUR) for row in numbered([3, 4, 6], boot=2)]
        insert(cursor, rows)
        always = [("esp32-01", 1, 9, 9), ("esp32-01", 2, 1, 2), ("esp32-01", 2, 5, 5)]
        assert missing(cursor) == [("esp32-01", 1, 1, 6)] * is_missing + always
    connection.close()


# --- against a plain computation -----------------------------------------------------

DEVICES = ["a", "a-1", f"a-{SALT}-1"]
Run = tuple[str, str, int]


class Table(NamedTuple):
    """Numbered events by run and sequence, with when they came in, and what was told of them."""

    stored: dict[tuple[Run, int], datetime]
    dropped: list[tuple[Run, int, int]]
    dead: list[tuple[Run, int]]


RUNS = st.tuples(st.sampled_from(DEVICES), st.sampled_from([SALT, OTHER_SALT]), st.integers(1, 2))
SEQUENCES = st.integers(1, 12) | st.sampled_from([99, 100, 101, 10**18 - 1])
TIMES = st.integers(0, 9).map(lambda hours: NOON + hours * HOUR)
TABLES = st.builds(
    Table,
    st.dictionaries(st.tuples(RUNS, SEQUENCES), TIMES, max_size=60),
    st.lists(st.tuples(RUNS, SEQUENCES, SEQUENCES), max_size=3),
    st.lists(st.tuples(RUNS, SEQUENCES), max_size=5),
)


def expected_gaps(table: Table, device: str, since: datetime, until: datetime) -> list[Gap]:
    gaps: list[Gap] = []
    for run in {run for run, _ in table.stored if run[0] == device}:
        previous = 0
        told = [(a, b) for each, a, b in table.dropped if each == run]
        told += [(n, n) for each, n in table.dead if each == run]
        for sequence in sorted(n for each, n in table.stored if each == run):
            first = previous + 1
            if since <= table.stored[run, sequence] < until:
                for begin, end in sorted(told):
                    if first <= end and begin <= end and begin < sequence:
                        if first < begin:
                            gaps.append((device, run[2], first, begin - 1))
                        first = end + 1
                if first < sequence:
                    gaps.append((device, run[2], first, sequence - 1))
            previous = sequence
    return sorted(gaps)


def fill(cursor: Any, table: Table) -> None:
    insert(
        cursor,
        [
            Row(f"{run[0]}-{run[1]}-{run[2]}-{sequence}", run[0], ts_server=ts_server)
            for (run, sequence), ts_server in table.stored.items()
        ],
    )
    told: Counter[tuple[str, str]] = Counter()
    for (device, salt, boot), begin, end in table.dropped:
        told[device, salt] += 1  # so that what tells of them has no gap of its own
        event_id = f"{device}-{salt}-3-{told[device, salt]}"
        meta = json.dumps({"from": begin, "to": end, "boot": boot})
        insert(cursor, [Row(event_id, device, "outbox_dropped", meta=meta)])
    for place, (run, sequence) in enumerate(table.dead):
        event_id = f"{run[0]}-{run[1]}-{run[2]}-{sequence}"
        payload = json.dumps({"event_id": event_id, "number": place}).encode()
        keep_dead(cursor, payload, event_id if place % 2 else None)


@given(table=TABLES, since=TIMES, hours=st.integers(0, 10))
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_view_and_function_say_what_a_plain_computation_says(
    cursor: Any, table: Table, since: datetime, hours: int
) -> None:
    cursor.connection.rollback()
    fill(cursor, table)
    assert missing(cursor) == sorted(
        gap for device in DEVICES for gap in expected_gaps(table, device, *EVER)
    )
    until = since + hours * HOUR
    for device in DEVICES:
        cursor.execute(OF_ONE, (device, since, until))
        assert sorted(cursor.fetchall()) == expected_gaps(table, device, since, until)


# --- quick, readable, and never in the way -------------------------------------------

# 50,000 rows of 100 devices in 90 days, boots of 200, one number in 11 missing.
FILL = f"""
    INSERT INTO events (event_id, device_id, schema, event_type, ts_device, ts_server)
    SELECT format('device-%s-{SALT}-%s-%s', n % 100, n / 20000 + 1, n / 100 % 200 + 1),
        'device-' || n % 100, 1, 'type-' || n % 7, at, at
    FROM (
        SELECT n, now() - interval '90 days' * (50000 - n) / 50000 AS at
        FROM generate_series(0, 49999) AS n
        WHERE n % 11 <> 0
    ) AS numbers
"""


def test_a_devices_week_is_read_by_index(database: Database) -> None:
    database.query(FILL)
    database.query("VACUUM ANALYZE events, dead_letters")
    week = (
        "SELECT * FROM missing_events('device-7', now() - interval '8 d', now() - interval '1 d')"
    )
    assert len(database.query(week)) > 0
    assert database.query("SELECT count(*) FROM missing_events")[0][0] > 4_000
    connection = database.connect()
    with connection.cursor() as cursor:
        cursor.execute(week)
        cursor.execute(
            "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables"
            " WHERE relname = 'events'"
        )
        by_scan, by_index = cursor.fetchall()[0]
    connection.close()
    # At most what came in of all devices in that week, not what the table holds.
    assert by_scan == 0
    assert 0 < by_index < 5_000


def test_more_numbers_than_are_looked_up_give_the_same_gaps(cursor: Any) -> None:
    # More than 100,000 are missing: then all of the device is read. What came in before the
    # period or after it stands in the middle of a gap.
    rows = numbered([4, 250_000]) + numbered([1, 9], boot=2)
    outside = numbered([100_000, 100_001]) + numbered([5], boot=2)
    insert(cursor, rows)
    insert(cursor, [row._replace(ts_server=NOON - DAY) for row in outside[:2]])
    insert(cursor, [row._replace(ts_server=NOON + DAY) for row in outside[2:]])
    cursor.execute(OF_ONE, ("esp32-01", NOON, NOON + HOUR))
    expected = [(1, 1, 3), (1, 100_002, 249_999), (2, 6, 8)]
    assert sorted(row[1:] for row in cursor.fetchall()) == expected
    assert len(missing(cursor)) == 5
    cursor.execute("DELETE FROM events WHERE event_id LIKE '%-250000'")
    cursor.execute(OF_ONE, ("esp32-01", NOON, NOON + HOUR))
    assert sorted(row[1:] for row in cursor.fetchall()) == [(1, 1, 3), (2, 6, 8)]


def test_the_reader_may_ask_the_function_and_the_view(database: Database) -> None:
    connection = database.connect()
    with connection.cursor() as cursor:
        insert(cursor, numbered([1, 3]))
        cursor.execute("SET ROLE reader")
        assert missing(cursor) == [("esp32-01", 1, 2, 2)]
    connection.close()


def test_a_table_of_the_owners_own_with_its_name_stays(servers: Stack, database: Database) -> None:
    database.query("DROP VIEW missing_events")
    database.query("CREATE TABLE missing_events AS SELECT 'kitchen' AS room")
    begin = servers.postgres.log_end
    servers.postgres.apply_schema(database.name)
    warning = "no view, because a table of yours has its name: missing_events\n"
    assert warning in servers.postgres.log(begin)
    assert database.query("SELECT * FROM missing_events") == [("kitchen",)]
    # The function is there all the same.
    assert database.query(OF_ONE, "esp32-01", *EVER) == []
