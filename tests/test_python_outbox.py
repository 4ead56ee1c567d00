"""The Python library's outbox: ids, what is sent when, what an ACK does, what is dropped.

What it does: drives Outbox with a clock of its own, and answers as the ingester would. What it
does not: the contract's vectors (test_python_contract.py), damage and power cuts
(test_python_store.py), or the network (test_device_programs.py).

Invariant: no test waits for time to pass.
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from devices.python.telemetry import NO_TIME, Event, EventRefused, Outbox, Rejected, StoreFailed
from ingester.event import decode
from ingester.rejection import Reason, Rejection

NOW = 1_770_681_600.25


class Bench:
    """An outbox, its clock, and an ingester that answers on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 0.0
        self.outbox: Outbox
        self._opened = False

    def open(self, device_id: str | None = "pi", **options: Any) -> Outbox:
        self.close()
        self.outbox = Outbox(
            self.folder, device_id, clock=lambda: NOW, ticks=lambda: self.now, **options
        )
        self._opened = True
        return self.outbox

    def close(self) -> None:
        if self._opened:
            self.outbox.close()

    def due(self) -> list[list[str]]:
        """Return the event ids of each message that is due."""
        found = [ids_of(message.payload) for message in self.outbox.due()]
        lanes = self.outbox._lanes
        assert self.outbox._in_flight == sum(len(lane.in_flight) for lane in lanes.values())
        waiting = {device_id: lane.waiting for device_id, lane in lanes.items()}
        counts = self.outbox._store.counts()
        assert waiting == {device_id: count for device_id, (count, _) in counts.items()}
        return found

    def answer(self, *event_ids: str, device_id: str = "pi", **fields: str) -> bool:
        answers = [
            {"schema": 1, "event_id": it, "device_id": device_id, "status": "stored"} | fields
            for it in event_ids
        ]
        topic = f"qs/v1/{device_id}/acks"
        return self.outbox.on_message(topic, json.dumps(answers).encode())

    def pass_until_due(self, seconds_max: float) -> list[list[str]]:
        """Let time pass until something is due, by seconds; return it."""
        for _ in range(int(seconds_max)):
            if found := self.due():
                return found
            self.now += 1
        return []


def ids_of(payload: bytes) -> list[str]:
    document = json.loads(payload)
    return [each["event_id"] for each in (document if isinstance(document, list) else [document])]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "store")
    yield made
    made.close()


def test_ids_never_repeat_not_even_after_a_backup_is_restored(bench: Bench, tmp_path: Path) -> None:
    first = bench.open().add("t")
    bench.close()
    (tmp_path / "store").rename(tmp_path / "backup")
    again = bench.open().add("t")  # a new store
    bench.close()
    bench.folder = tmp_path / "backup"
    later = bench.open().add("t")
    assert len({first, again, later}) == 3
    device, salt, boot, sequence = later.rsplit("-", 3)
    assert (device, len(salt), boot, sequence) == ("pi", 8, "2", "1")


def test_what_waits_is_sent_again_by_the_next_process_byte_for_byte(bench: Bench) -> None:
    outbox = bench.open()
    outbox.add("temperature", 21.5, "C", meta={"b": 1, "a": [True, None]})
    outbox.connected()
    (before,) = outbox.due()
    assert b'"ts_device":"2026-02-10T00:00:00.250Z"' in before.payload
    outbox = bench.open()
    assert outbox.waiting() == 1
    outbox.connected()
    assert outbox.due() == [before]


def test_a_time_is_now_or_given_or_none(bench: Bench) -> None:
    outbox = bench.open()
    berlin = timezone(timedelta(hours=1))
    local = datetime(2026, 2, 10, 1, 0, 0, 123456, tzinfo=berlin)
    outbox.add("t", timestamp=local)
    outbox.add("t", timestamp=datetime(2019, 1, 1, tzinfo=UTC))  # somebody knows that it was then
    outbox.add("t", timestamp=1_546_300_800)  # a clock in 2019 was not set
    outbox.add("t", timestamp=NO_TIME)
    outbox.add("t", timestamp=local.replace(tzinfo=None))
    outbox.connected()
    times = [event.get("ts_device") for event in json.loads(outbox.due()[0].payload)]
    assert times[:4] == ["2026-02-10T00:00:00.123456Z", "2019-01-01T00:00:00Z", None, None]
    assert datetime.fromisoformat(times[4]) == local.replace(tzinfo=None).astimezone(UTC)


@pytest.mark.parametrize(
    "fields",
    [
        {"value": [1]},
        {"value": 10**400},
        {"value": "a\0b"},
        {"value": "\ud800"},
        {"meta": {"a": 10**400}},
        {"meta": {1: "a"}},
        {"meta": {"a": {1, 2}}},
        {"meta": [1]},
        {"unit": 1},
        {"event_type": None},
        {"timestamp": "yesterday"},
        {"timestamp": datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))},
        {"event_id": ""},
        {"event_id": "a\nb"},
        {"event_id": "x" * 201},
        {"event_id": 7},
        {"device_id": "other"},
        {"value": "x" * 200_000},
    ],
    ids=lambda fields: f"{next(iter(fields))} {str(next(iter(fields.values())))[:20]!r}",
)
def test_what_could_never_be_stored_is_refused_and_nothing_else_is(
    bench: Bench, fields: dict[str, Any]
) -> None:
    outbox = bench.open()
    good = Event("t", 1)
    first, bad, second = outbox.add_all([good, Event(**{"event_type": "t"} | fields), good])
    assert isinstance(bad, EventRefused)
    assert str(bad)
    assert (outbox.waiting(), outbox.refused()) == (2, 1)
    assert [str(it).rsplit("-", 1)[1] for it in (first, second)] == ["1", "2"]


def test_meta_may_nest_as_deep_as_the_ingester_takes_it(bench: Bench) -> None:
    outbox = bench.open()
    deep: Any = 1
    for _ in range(31):
        deep = [deep]
    outbox.add("t", meta={"a": deep})
    with pytest.raises(EventRefused):
        outbox.add("t", meta={"a": [deep]})


def test_one_message_of_a_device_is_on_its_way_and_the_next_follows_its_answer(
    bench: Bench,
) -> None:
    outbox = bench.open()
    first = outbox.add("t")
    assert bench.due() == []  # no connection
    outbox.connected()
    assert bench.due() == [[first]]
    others = [outbox.add("t") for _ in range(3)]
    assert bench.due() == []
    assert bench.answer(first)
    assert bench.due() == [others]
    assert bench.answer(others[1])
    assert bench.due() == []
    assert bench.answer(others[0], others[2])
    assert outbox.waiting() == 0
    assert bench.due() == []


def test_without_an_answer_it_is_sent_again_with_growing_pauses(bench: Bench) -> None:
    outbox = bench.open()
    event_id = outbox.add("t")
    outbox.connected()
    pauses = []
    for _ in range(8):
        sent_at = bench.now
        assert bench.pass_until_due(1000) == [[event_id]]
        pauses.append(bench.now - sent_at)
    assert pauses[0] == 0
    for pause, delay in zip(pauses[1:], (10, 20, 40, 80, 160, 300, 300), strict=True):
        assert delay * 0.5 <= pause <= delay * 1.5 + 1


def test_a_batch_that_is_not_answered_is_halved_and_whole_again_after_an_answer(
    bench: Bench,
) -> None:
    outbox = bench.open()
    for _ in range(10):
        outbox.add("t")
    outbox.connected()
    sizes = [len(bench.pass_until_due(1000)[0]) for _ in range(5)]
    assert sizes == [10, 10, 5, 2, 1]
    first = f"pi-{outbox._store.salt}-1-1"
    bench.answer(first)
    assert len(bench.due()[0]) == 9


def test_after_three_silent_sends_it_asks_once_for_a_new_connection(bench: Bench) -> None:
    outbox = bench.open()
    outbox.add("t")
    outbox.connected()
    asked = []
    for _ in range(4):
        assert bench.pass_until_due(1000)
        asked.append(outbox.reconnect_wanted())
    assert asked == [False, False, False, True]
    assert not outbox.reconnect_wanted()
    outbox.disconnected()
    assert bench.due() == []
    outbox.connected()
    assert len(bench.due()) == 1  # at once


def test_one_device_that_is_never_answered_does_not_cost_the_others_their_connection(
    bench: Bench,
) -> None:
    outbox = bench.open(None)
    outbox.add_all([Event("t", device_id="mute", event_id="m")])
    outbox.connected()
    for number in range(2000):
        outbox.add_all([Event("t", device_id="loud", event_id=f"l{number}")])
        for ids in bench.due():
            if ids != ["m"]:
                bench.answer(*ids, device_id="loud")
        bench.now += 1
        assert not outbox.reconnect_wanted()
    assert outbox.waiting() == 1


def test_once_there_is_an_answer_after_a_silence_nobody_waits_for_long(bench: Bench) -> None:
    outbox = bench.open(None)
    devices = [f"d{number}" for number in range(5)]
    outbox.add_all([Event("t", device_id=it, event_id=it) for it in devices])
    outbox.connected()
    while bench.now < 2000:
        bench.due()
        bench.now += 1
    assert bench.answer("d0", device_id="d0")
    seen: set[str] = set()
    for _ in range(12):
        seen |= {event_id for ids in bench.due() for event_id in ids}
        bench.now += 1
    assert seen == set(devices[1:])


def test_a_device_with_a_large_backlog_does_not_starve_another(bench: Bench) -> None:
    outbox = bench.open(None, send_bytes_max=50_000)
    outbox.add_all([Event("t", number, device_id="big") for number in range(3000)])
    outbox.connected()
    assert len(bench.due()[0]) == 200
    outbox.add_all([Event("t", device_id="small", event_id="s")])
    assert bench.due() == [["s"]]


def test_no_more_is_in_flight_than_a_broker_likes(bench: Bench) -> None:
    outbox = bench.open(None)
    outbox.add_all([Event("t", device_id=f"d{number}") for number in range(50) for _ in range(200)])
    outbox.connected()
    first = bench.due()
    assert sum(map(len, first)) == 4_000
    for ids in first:
        bench.answer(*ids, device_id=ids[0].split("-")[0])
    following = bench.due()
    assert sum(map(len, following)) == 4_000
    assert not {ids[0] for ids in first} & {ids[0] for ids in following}


def test_an_id_from_outside_is_one_event_however_often_it_is_added(bench: Bench) -> None:
    outbox = bench.open(None)
    event = Event("t", 1, device_id="plug", event_id="0a1b")
    assert outbox.add_all([event, event]) == ["0a1b", "0a1b"]
    outbox = bench.open(None)
    assert outbox.add_all([event]) == ["0a1b"]
    assert (outbox.waiting(), outbox.repeated()) == (1, 1)
    assert (outbox.waiting_ids("0a"), outbox.waiting_ids("1b")) == (["0a1b"], [])
    outbox.connected()
    assert outbox.subscriptions() == ["qs/v1/+/acks"]
    (message,) = outbox.due()
    assert message.topic == "qs/v1/plug/events"
    # An answer counts on the topic of its device alone.
    assert bench.answer("0a1b", device_id="other")
    assert outbox.waiting() == 1
    assert bench.answer("0a1b", device_id="plug")
    assert outbox.waiting() == 0
    own = f"plug-{outbox._store.salt}-1-1"
    (refused,) = outbox.add_all([Event("t", device_id="plug", event_id=own)])
    assert isinstance(refused, EventRefused)


def test_rows_of_the_program_are_written_in_the_transaction_of_its_events(bench: Bench) -> None:
    outbox = bench.open(None)
    event = Event("t", 1, device_id="plug", event_id="x")

    def fail(connection: Any) -> None:
        connection.execute("CREATE TABLE bridge (mid INTEGER)")
        raise KeyError("as a bug would")

    with pytest.raises(KeyError):
        outbox.add_all([event], also=fail)
    assert outbox.waiting() == 0
    outbox.add_all([event], also=lambda sql: sql.execute("CREATE TABLE bridge (mid INTEGER)"))
    outbox.add_all([], also=lambda sql: sql.execute("INSERT INTO bridge VALUES (7)"))
    outbox = bench.open(None)
    found: list[tuple[int]] = []
    outbox.add_all([], also=lambda sql: found.extend(sql.execute("SELECT mid FROM bridge")))
    assert found == [(7,)]
    assert (outbox.waiting(), outbox.damaged()) == (1, 0)


def test_a_rejected_event_is_told_with_all_there_is_and_forgotten(bench: Bench) -> None:
    outbox = bench.open()
    event_id = outbox.add("t", 1)
    told: list[Rejected] = []
    outbox.on_rejected = told.append
    outbox.connected()
    (message,) = outbox.due()
    bench.answer(event_id, status="rejected", reason="invalid_field", error="value: no")
    assert told == [Rejected("pi", event_id, "invalid_field", "value: no", message.payload)]
    assert outbox.waiting() == 0


def test_what_can_be_no_event_is_sent_so_that_it_becomes_a_dead_letter(bench: Bench) -> None:
    outbox = bench.open(None)
    event = Event("t", device_id="plug", event_id="x", dead_letter={"raw": "?"})
    assert outbox.add_all([event]) == ["x"]
    outbox.connected()
    (message,) = outbox.due()
    assert json.loads(message.payload)["value"] == {"raw": "?"}
    (result,) = decode("plug", message.payload, UTC).results
    assert isinstance(result, Rejection)
    assert (result.reason, result.event_id) == (Reason.INVALID_FIELD, "x")


def test_an_answer_that_comes_after_a_restart_counts(bench: Bench) -> None:
    event_id = bench.open().add("t")
    outbox = bench.open()
    outbox.connected()
    assert bench.answer(event_id)
    assert outbox.waiting() == 0
    assert bench.open().waiting() == 0


def test_events_of_an_earlier_device_id_are_sent_under_it(bench: Bench) -> None:
    event_id = bench.open("old").add("t")
    outbox = bench.open("new")
    assert outbox.subscriptions() == ["qs/v1/new/acks", "qs/v1/old/acks"]
    outbox.connected()
    assert [message.topic for message in outbox.due()] == ["qs/v1/old/events"]
    assert bench.answer(event_id, device_id="old")
    assert outbox.subscriptions() == ["qs/v1/new/acks"]


def test_other_topics_are_the_programs(bench: Bench) -> None:
    outbox = bench.open()
    for topic in ("qs/v1/pi/commands", "qs/v1/acks", "qs/v1//acks", "qs/v1/a/b/acks", ""):
        assert not outbox.on_message(topic, b"{}")


def test_the_oldest_give_way_and_the_server_is_told_which(bench: Bench) -> None:
    outbox = bench.open(events_max=5)
    dropped: list[str] = []
    outbox.on_dropped = dropped.append
    ids = [outbox.add("t", number) for number in range(12)]
    assert dropped == ids[:7]
    assert (outbox.waiting(), outbox.dropped()) == (5, 7)
    salt, outbox = outbox._store.salt, bench.open(events_max=5)
    outbox.connected()
    assert bench.due() == [ids[7:]]
    bench.answer(ids[7])
    assert bench.due() == []
    assert outbox.waiting() == 5  # with the one that tells of the others
    outbox = bench.open(events_max=5)  # it is kept as any other
    outbox.connected()
    (message,) = outbox.due()
    told = json.loads(message.payload)[-1]
    assert told["event_type"] == "outbox_dropped"
    assert told["value"] == 7
    assert told["meta"] == {"salt": salt, "boot": 1, "from": 1, "to": 7}


def test_what_tells_of_lost_events_and_is_lost_itself_is_told_again(bench: Bench) -> None:
    outbox = bench.open(events_max=2)
    ids = [outbox.add("t") for _ in range(4)]
    outbox.connected()
    bench.due()
    bench.answer(*ids[2:])
    assert outbox.waiting() == 0
    bench.due()
    assert outbox.waiting() == 1  # outbox_dropped, number 5
    for _ in range(2):
        outbox.add("t")  # numbers 6 and 7
    assert outbox.dropped() == 3
    runs = [(run.first, run.last) for run in outbox._store.runs()]
    assert sorted(runs) == [(1, 2), (5, 5)]


def test_of_ids_from_outside_it_is_told_how_many_were_lost(bench: Bench) -> None:
    outbox = bench.open(None, events_max=3)
    for number in range(10):
        outbox.add_all([Event("t", device_id="plug", event_id=f"id{number}")])
    outbox.connected()
    bench.due()
    bench.answer("id7", "id8", "id9", device_id="plug")
    (message,) = outbox.due()
    event = json.loads(message.payload)
    assert (event["event_type"], event["value"]) == ("outbox_dropped", 7)
    assert "meta" not in event


def test_bytes_are_bounded_as_events_are(bench: Bench) -> None:
    outbox = bench.open(bytes_max=20_000)
    for _ in range(100):
        outbox.add("t", "x" * 1000)
    assert outbox.waiting() == 17
    assert outbox.dropped() == 83
    outbox.add_all([Event("t", "x" * 1000) for _ in range(100)])  # more than fits at once
    assert outbox.waiting() == 17
    assert bench.open(bytes_max=20_000).waiting() == 17


def test_a_callback_may_add_events_even_where_there_is_no_room(bench: Bench) -> None:
    outbox = bench.open(events_max=3)
    ids = [outbox.add("t") for _ in range(3)]
    outbox.on_stored = lambda event_id: outbox.add("seen", event_id)
    outbox.connected()
    bench.due()
    bench.answer(*ids)
    assert outbox.waiting() == sum(lane.waiting for lane in outbox._lanes.values()) >= 2
    assert sum(count for count, _ in outbox._store.counts().values()) == outbox.waiting()


def test_a_closed_outbox_says_so(bench: Bench) -> None:
    outbox = bench.open()
    outbox.close()
    with pytest.raises(StoreFailed):
        outbox.add("t")
