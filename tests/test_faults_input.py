"""What devices send that cannot be stored: a poisonous event, a flood of nonsense.

What it does: sends it among good events, and counts at the sender. What it does not: look
at each rule of the event contract (test_event.py) or each answer (test_ingester.py).
"""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.device import event
from tests.support.findings import Finding, find
from tests.support.load import connects
from tests.support.pipeline import Pipeline

Report = Callable[[Finding], None]

BATCH = 500
# Too long for an index even when it is compressed.
NOISE = "".join(chr(0x4E00 + i * 7919 % 20_000) for i in range(6_000))


POISONS: list[tuple[str, str, dict[str, Any], str]] = [
    (
        "a constraint of the user's own",
        "ALTER TABLE events ADD CHECK (value_num < 1000)",
        {"value": 5000},
        "23514",
    ),
    ("too large for an index", "CREATE INDEX ON events (unit, value_text)", {}, "54000"),
    (
        "an index expression divides by zero",
        "CREATE INDEX ON events ((1 / (value_num - 7)::int))",
        {"value": 7},
        "22012",
    ),
]


@pytest.mark.parametrize(
    ("poison", "sql", "fields", "sqlstate"),
    [POISONS[0], *(pytest.param(*poison, marks=pytest.mark.faults) for poison in POISONS[1:])],
    ids=[poison[0] for poison in POISONS],
)
def test_one_poisonous_event_in_a_full_batch_is_kept_and_the_rest_stored_in_one_pass(
    running: Pipeline,
    report: Report,
    poison: str,
    sql: str,
    fields: dict[str, Any],
    sqlstate: str,
) -> None:
    database, postgres = running.database, running.database.postgres
    database.query(sql)
    poisonous = event(377, **(fields or {"value": NOISE}))
    with running.device() as device:
        try:
            # While the first waits for the table, a full batch comes together behind it.
            with database.locked():
                device.publish(event("first"))
                database.wait_blocked()
                for number in range(BATCH - 1):
                    device.send(poisonous if number == 377 else event(number, value=number % 5))
                device.publish(event("last"))
                log_start = postgres.log_end
                postgres.psql("ALTER SYSTEM SET log_statement = 'all'", "postgres")
                postgres.psql("SELECT pg_reload_conf()", "postgres")
            device.wait(lambda: len(device.acks) == BATCH + 1, "an ACK for each")
            device.wait(lambda: bool(device.dead_letters), "the dead letter")
        finally:
            postgres.psql("ALTER SYSTEM RESET log_statement", "postgres")
            postgres.psql("SELECT pg_reload_conf()", "postgres")
    log = running.ingester.log()
    batch = f"batch: messages {BATCH}, stored {BATCH - 1}, duplicates 0, rejected 1 "
    assert log.count(batch) == 1, log
    said = postgres.log(log_start)
    inserts = re.findall("statement: .*(?:INSERT INTO events|EXECUTE insert_events)", said)
    # Halved down to the one, doubled again behind it, and not one by one.
    assert 9 < len(inserts) <= 4 * 9, inserts
    assert database.query("SELECT reason, event_id FROM dead_letters") == [
        ("not_storable", poisonous["event_id"])
    ]
    assert sqlstate in device.dead_letters[0]["error"]
    assert "WARNING" not in log
    note = f"{len(inserts)} INSERTs"
    report(find(f"one of {BATCH} is poisonous: {poison}", [device], database, note=note))


def one(number: int, **fields: Any) -> str:
    return json.dumps(event(number, **fields))


# What devices print: the payload, the answers, and which of the events are rows.
PRINTED: list[tuple[str, str, list[tuple[str, str | None]], list[str]]] = [
    (
        "nan in an array",
        f"[{one(1)}, {one(2).replace('21.5', 'nan')}, {one(3, unit='nan, NaN')}]",
        [("device-1-1", "stored"), ("device-1-2", "invalid_field"), ("device-1-3", "stored")],
        ["device-1-1", "device-1-3"],
    ),
    ("a single -inf", one(1).replace("21.5", "-inf"), [("device-1-1", "invalid_field")], []),
    (
        "an array that is cut off",
        f"[{one(1)}, {one(2)}, {one(3)}]"[:-30],
        [("device-1-1", "not_json"), ("device-1-2", "not_json"), ("device-1-3", "not_json")],
        [],
    ),
    ("a decimal comma", one(1).replace("21.5", "21,5"), [("device-1-1", "not_json")], []),
    (
        "a byte order mark and a NUL",
        f"\ufeff[{one(1)}]\0",
        [("device-1-1", "stored")],
        ["device-1-1"],
    ),
    (
        "one event that is absurdly deep",
        f"[{one(1, meta='DEEP')}, {one(2)}]".replace('"DEEP"', '{"a":' * 5000 + "1" + "}" * 5000),
        [("device-1-1", "invalid_field"), ("device-1-2", "stored")],
        ["device-1-2"],
    ),
]


@pytest.mark.parametrize(
    ("payload", "answers", "rows"),
    [case[1:] for case in PRINTED],
    ids=[case[0] for case in PRINTED],
)
def test_what_a_device_prints_costs_the_events_it_concerns_and_each_answer_names_one(
    running: Pipeline, payload: str, answers: list[tuple[str, str]], rows: list[str]
) -> None:
    with running.device() as device:
        device.publish(payload.encode())
        device.wait(lambda: len(device.acks) >= len(answers), "an ACK for each")
        heard = [(ack["event_id"], ack.get("reason", ack["status"])) for ack in device.acks]
        assert heard == answers
        stored = running.database.query("SELECT event_id FROM events ORDER BY event_id")
        assert [row[0] for row in stored] == rows
        if len(rows) < len(answers):
            device.wait(lambda: bool(device.dead_letters), "the dead letter")
            kept = running.database.query("SELECT payload FROM dead_letters")
            assert len(kept) == 1
            # As it was sent, so that a replay after a fix makes sense.
            assert bytes(kept[0][0]).decode() in payload
        assert "WARNING" not in running.ingester.log()


def test_each_of_many_ids_is_answered_in_arrays_that_the_broker_takes(running: Pipeline) -> None:
    # As long as they can be in one payload, and each character two in JSON.
    ids = [f"{number:06}".ljust(200, '"') for number in range(600)]
    payload = json.dumps([{"event_id": event_id} for event_id in ids])
    more = "".join(f'{{"event_id":"{number}"}}' for number in range(10_000))
    with running.device() as device:
        device.publish(payload.encode()[:-1])
        device.publish(more.encode())
        device.wait(lambda: len(device.acks) >= 10_600, "an ACK for each", 30)
    assert [ack["event_id"] for ack in device.acks] == ids[: len(ids)] + [
        str(number) for number in range(10_000)
    ]
    assert running.database.count("dead_letters") == 2
    assert connects(running) == 1


def nonsense(randomness: random.Random, number: int) -> bytes:
    """Return a payload that is no event, of one kind or another."""
    kinds = [
        randomness.randbytes(randomness.randrange(200)),
        b"",
        b'{"schema": 1, "event_id": "',
        b"[1, 2",
        b'"text"',
        b"NaN",
        b"\xff\xfe{\x00}\x00",
        b'{"schema": 2, "event_id": "x%d"}' % number,
        b'{"schema": 1, "event_id": "x%d", "device_id": "another", "event_type": "t"}' % number,
        b'{"schema": 1, "event_id": "x%d", "device_id": "device-1"}' % number,
        b"[" * 5000,
        b"x" * 20_000,
    ]
    return kinds[number % len(kinds)]


def test_a_flood_of_nonsense_is_kept_and_the_good_events_in_it_are_stored(
    running: Pipeline, report: Report, pytestconfig: pytest.Config
) -> None:
    each = 4_000 if pytestconfig.getoption("faults") else 1_000
    randomness = random.Random(20260210)
    with running.device() as device:
        order = [True] * each + [False] * each
        randomness.shuffle(order)
        for number, good in enumerate(order):
            device.send(event(number, value=number) if good else nonsense(randomness, number))
        device.wait(lambda: len(device.acks) >= 2 * each, "an ACK for each", 90)
        device.wait(lambda: len(device.dead_letters) >= each, "each dead letter", 30)
    answers = [ack["status"] for ack in device.acks]
    assert (answers.count("stored"), answers.count("rejected")) == (each, each)
    database = running.database
    assert len(device.dead_letters) == each
    kept = database.query("SELECT sum(times) FROM dead_letters")
    assert (database.count(), kept) == (each, [(each,)])
    log = running.ingester.log()
    assert log.count("MQTT connected rc=Success") == 1
    assert len(re.findall(r" (?:INFO|WARNING|ERROR) ", log)) < 12, log
    assert running.ingester.running
    case = f"{each:,} payloads of nonsense among {each:,} events"
    report(find(case, [device], database))
