"""Dead letters that are equal, on a real PostgreSQL: one row, counted, and never a deadlock.

What it does: lets the Store keep letters, and the ingester a flood of them. What it does not:
what a person does with them (test_deadletters.py), or rows of before (test_upgrade.py).
"""

import hashlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from psycopg2 import extensions

from ingester.rejection import DeadLetter, Reason
from ingester.store import Store
from tests.support.pipeline import Database, Pipeline
from tools.stack import Stack

NOON = datetime(2026, 2, 10, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def letter(payload: bytes, seconds: float = 0, error: str = "bad") -> DeadLetter:
    topic = "qs/v1/d/events"
    return DeadLetter(NOON + seconds * SECOND, Reason.NOT_JSON, error, topic, "d", None, payload)


@pytest.fixture
def store(database: Database) -> Iterator[Store]:
    store = Store(database.conninfo | {"options": "-c role=ingester"})
    store.connect()
    yield store
    store.close()
    # It is process-wide; the tests have connections of their own as well.
    extensions.set_wait_callback(None)


def groups(database: Database) -> list[tuple[object, ...]]:
    return database.query(
        "SELECT id, times, received_at, last_received_at, error FROM dead_letters ORDER BY id"
    )


def test_equal_letters_are_one_row_in_a_batch_and_over_batches(
    store: Store, database: Database
) -> None:
    payloads = [b"%d" % number for number in (3, 1, 3, 2, 3, 1)]
    batch = [letter(payload, i, f"e-{i}") for i, payload in enumerate(payloads)]
    ids = store.insert_dead_letters(batch)
    by_payload = {
        bytes(row[1]): row[0] for row in database.query("SELECT id, payload FROM dead_letters")
    }
    assert ids == [by_payload[payload] for payload in payloads]
    assert len(by_payload) == 3
    database.query("UPDATE dead_letters SET replayed_at = now(), replay_outcome = 'stored'")
    # The clock has been set back meanwhile.
    assert store.insert_dead_letters([letter(b"3", -9, "once more")]) == [by_payload[b"3"]]
    assert groups(database) == sorted(
        [
            (by_payload[b"1"], 2, NOON + SECOND, NOON + 5 * SECOND, "e-5"),
            (by_payload[b"2"], 1, NOON + 3 * SECOND, NOON + 3 * SECOND, "e-3"),
            (by_payload[b"3"], 4, NOON, NOON + 4 * SECOND, "once more"),
        ]
    )
    again = "SELECT id, replayed_at FROM dead_letters WHERE replay_outcome IS NULL"
    assert database.query(again) == [(by_payload[b"3"], None)]


def test_what_differs_in_reason_topic_or_payload_is_not_the_same(
    store: Store, database: Database
) -> None:
    usual = letter(b"x")
    letters = [
        usual,
        letter(b""),
        letter(b"\0x"),
        usual._replace(reason=Reason.NOT_UTF8),
        usual._replace(topic="qs/v1/e/events", device_id="e"),
        usual._replace(topic="", payload=b"qs/v1/d/events\0x"),
        # The longest that MQTT has, which no index would take.
        usual._replace(topic="\u00e9" * 32_767),
        usual._replace(payload=b"x" * 1_000_000),
        usual._replace(payload=bytes(range(256))),
    ]
    for _ in range(2):
        ids = store.insert_dead_letters(letters)
        assert len(set(ids)) == len(letters) == database.count("dead_letters")


def test_the_daemon_and_the_schema_step_compute_the_same_digest(
    store: Store, servers: Stack, database: Database
) -> None:
    for reason in Reason:
        store.insert_dead_letters(
            [letter(bytes(range(256)))._replace(reason=reason, topic="t/\u00e9\u20ac\U0001f600")]
        )
    store.insert_dead_letters([letter(b"{")])
    sql = "SELECT id, digest FROM dead_letters ORDER BY id"
    before = [(row[0], bytes(row[1])) for row in database.query(sql)]
    assert before[-1][1] == hashlib.sha256(b"not_json\0qs/v1/d/events\0{").digest()
    database.query("UPDATE dead_letters SET digest = NULL")
    servers.postgres.apply_schema(database.name)
    assert [(row[0], bytes(row[1])) for row in database.query(sql)] == before


def test_two_writers_of_the_same_letters_do_not_deadlock(store: Store, database: Database) -> None:
    letters = [letter(b"%d" % number) for number in range(10)]
    store.insert_dead_letters(letters)
    rows = database.query("SELECT payload FROM dead_letters ORDER BY digest")
    ordered = [letter(bytes(row[0])) for row in rows]
    # Another one has the first of them, as sorted, and comes for the last.
    other = database.connect()
    count = "UPDATE dead_letters SET times = times + 1 WHERE payload = %s"
    with other.cursor() as cursor:
        cursor.execute(count, (ordered[0].payload,))
        kept: list[int] = []
        thread = threading.Thread(
            target=lambda: kept.extend(store.insert_dead_letters(ordered[::-1]))
        )
        thread.start()
        database.wait_blocked()
        cursor.execute(count, (ordered[-1].payload,))
    other.commit()
    other.close()
    thread.join(10)
    assert len(kept) == 10
    assert database.query("SELECT sum(times) FROM dead_letters") == [(22,)]


def test_a_device_that_floods_makes_one_row_and_every_message_is_published_with_its_id(
    running: Pipeline,
) -> None:
    with running.device() as device:
        for number in range(1_000):
            device.send(b'{"value": 21,5}' if number % 10 else b"[1, 2]")
        # Of an array each element is a letter.
        device.wait(lambda: len(device.dead_letters) == 1_100, "each to be published")
    rows = running.database.query("SELECT id, payload, times FROM dead_letters")
    assert sorted((bytes(row[1]), row[2]) for row in rows) == [
        (b"1", 100),
        (b"2", 100),
        (b'{"value": 21,5}', 900),
    ]
    ids = {row[0]: bytes(row[1]).decode() for row in rows}
    assert all(ids[each["id"]] == each["payload"] for each in device.dead_letters)
    kept = "SELECT max(last_received_at) >= max(received_at) FROM dead_letters"
    assert running.database.query(kept) == [(True,)]
