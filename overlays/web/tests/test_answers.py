"""What the page answers, without a browser: headers, hosts, bad addresses, charts as JSON and CSV.

What it does not: look at how any of it is drawn (test_views.py, test_charts.py).
"""

import csv
import io
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import psycopg2
import pytest
from page import database as page_database
from support_page import PASSWORD, Page, ago, insert, readings

from tests.support.pipeline import Database

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
POINTS_MAX = 2_000
VIEWS = ("/", "/device?id=device-1", "/deadletters", "/health")
DATA = (
    "/devices.json",
    "/chart.json?id=device-1&type=temperature",
    "/chart.csv?id=device-1&type=temperature",
    "/sparklines.json?id=device-1",
    "/rate.json",
    "/latency.json",
    "/missing.json",
)
STATIC = ("/static/page.js", "/static/page.css", "/static/icon.svg", "/uplot/uPlot.iife.js")
REFUSED = ("/nothing", "/device", "/chart.json?type=x", "/static/../app.py", "/uplot/none.js")


# --- headers -------------------------------------------------------------------------


def test_every_answer_has_the_policy_and_no_data_is_kept(page: Page) -> None:
    for path in (*VIEWS, *DATA, *STATIC, *REFUSED, "/alive"):
        answer = page.get(path)
        assert answer.status == (200 if path not in REFUSED else answer.status), path
        assert answer.headers["Content-Security-Policy"] == POLICY, path
        assert answer.headers["X-Content-Type-Options"] == "nosniff", path
        assert answer.headers["Referrer-Policy"] == "no-referrer", path
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin", path
        if path not in STATIC:
            assert answer.headers["Cache-Control"] == "no-store", path
        assert not answer.headers["Server"], path
        assert not answer.headers["Set-Cookie"], path
    assert {page.get(path).status for path in REFUSED} == {400, 404}


def test_what_is_not_a_question_is_refused(page: Page) -> None:
    for method in ("POST", "PUT", "DELETE"):
        request = urllib.request.Request(page.origin + "/", data=b"x", method=method)
        with pytest.raises(urllib.error.HTTPError) as found:
            urllib.request.urlopen(request, timeout=10)
        assert found.value.code == 405


@pytest.fixture
def page_of_two_hosts(page: Page) -> Iterator[Page]:
    """Another page over the same database, which answers to these names alone."""
    restricted = Page(page.log_file.parent, page.database, WEB_HOSTS="localhost,127.0.0.1")
    with ExitStack() as cleanup:
        cleanup.callback(restricted.stop)
        restricted.start()
        restricted.wait_ready()
        yield restricted


def test_it_answers_to_its_own_hosts_alone(page: Page, page_of_two_hosts: Page) -> None:
    own = f"localhost:{page_of_two_hosts.port}"
    for path in ("/", "/health", "/rate.json", "/static/page.js", "/nothing"):
        for host in ("localhost", "127.0.0.1", own, "localhost:1"):
            assert page_of_two_hosts.get(path, Host=host).status in (200, 404), (path, host)
        for host in ("evil.example", "localhost.evil.example", "evil.example:8080", "x@localhost"):
            answer = page_of_two_hosts.get(path, Host=host)
            assert answer.status == 400, (path, host)
            assert answer.headers["Content-Security-Policy"] == POLICY
    assert page.get("/", Host="any.lan").status == 200


# --- bad addresses -------------------------------------------------------------------


BAD_ADDRESSES = [
    ("/chart.json?type=t", "id"),
    ("/chart.json?id=d", "type"),
    ("/chart.json?id=d&type=t&type=u", "type"),
    ("/chart.json?type=t" + "".join(f"&id={number}" for number in range(9)), "id"),
    ("/chart.json?id=%00&type=t", "id"),
    (f"/chart.json?id={1001 * 'x'}&type=t", "id"),
    ("/chart.json?id=d&type=t&range=2h", "range"),
    ("/chart.json?id=d&type=t&from=x&to=y", "from"),
    ("/chart.csv?id=d&type=t&range=2h", "range"),
    ("/sparklines.json?range=1h", "id"),
    ("/device?range=1h", "id"),
    ("/device?id=d&range=%3Cb%3E", "range"),
    ("/deadletters?reason=%00", "reason"),
]


def test_a_bad_address_is_told_which_part_is_wrong(page: Page) -> None:
    for path, parameter in BAD_ADDRESSES:
        answer = page.get(path)
        assert answer.status == 400, path
        if "." in path.partition("?")[0]:
            assert answer.json()["problem"].startswith(f"{parameter}: "), path
        else:
            assert f">{parameter}: " in answer.text, path


def test_a_page_number_that_is_not_there_is_no_error(page: Page) -> None:
    insert(page.database, readings("device-1", [1.0], 60, ago(minutes=1)))
    for start in ("-5", "x", "1000", "99999999999999999999"):
        answer = page.get("/", {"start": start})
        assert answer.status == 200
        assert "1 to 1 of 1" in answer.text


# --- charts --------------------------------------------------------------------------


def lines(chart: Any) -> list[Any]:
    return [line for plot in chart["plots"] for line in plot["lines"]]


def numbers(chart: Any) -> int:
    return sum(
        value is not None
        for line in lines(chart)
        for column in ("mean", "least", "greatest")
        for value in line.get(column, ())
    )


def fill(database: Database, device: str, rows: int, every: str, unit: str = "C") -> None:
    """Rows of a device up to now, one in each `every`."""
    database.query(
        f"""
        INSERT INTO events (event_id, device_id, schema, event_type, value_num, unit, ts_server)
        SELECT '{device}-{unit}-' || number, '{device}', 1, 'temperature', number % 100, '{unit}',
            now() - number * INTERVAL '{every}'
        FROM generate_series(1, {rows}) AS number
        """
    )


def test_few_readings_are_drawn_as_they_are(page: Page) -> None:
    values = [21.399999618530273, 21.5, -3, 1e300]
    end = datetime.now(UTC).replace(microsecond=0)
    insert(page.database, readings("device-1", values, 60, end, unit="C"))
    chart = page.chart("device-1", "temperature", range="1h")
    assert chart["step_seconds"] == 0
    (plot,) = chart["plots"]
    assert plot["unit"] == "C"
    (line,) = plot["lines"]
    assert line["mean"] == values
    assert line["at"] == [end.timestamp() - 60 * back for back in (3, 2, 1, 0)]


def test_of_many_readings_no_more_travels_than_can_be_seen(page: Page) -> None:
    fill(page.database, "device-1", 100_000, "5 minutes")
    fill(page.database, "device-2", 1_000, "8 hours")
    fill(page.database, "device-2", 500, "1 day", unit="F")
    page.database.query("ANALYZE")
    for period in ("1h", "24h", "7d", "30d", "1y"):
        for ids in (["device-1"], ["device-1", "device-2"]):
            pairs = [("type", "temperature"), ("range", period), *(("id", name) for name in ids)]
            chart = page.get("/chart.json", pairs).json()
            assert 0 < numbers(chart) <= POINTS_MAX, (period, ids)
    chart = page.chart("device-1", "temperature", range="1y")
    assert chart["step_seconds"] == 86_400
    (line,) = lines(chart)
    # All of it is in there: each step has its least and greatest.
    assert (min(line["least"]), max(line["greatest"])) == (0, 99)
    assert all(
        least <= mean <= greatest
        for least, mean, greatest in zip(line["least"], line["mean"], line["greatest"], strict=True)
    )


@pytest.mark.parametrize("count", [120, 6_000])
def test_a_gap_stays_a_gap(page: Page, count: int) -> None:
    end = ago(minutes=1)
    rows = readings("device-1", [20.0] * count, 86_000 / count, end)
    del rows[count // 3 : count // 2]
    insert(page.database, rows)
    (line,) = lines(page.chart("device-1", "temperature", range="24h"))
    assert line["mean"].count(None) == 1
    place = line["mean"].index(None)
    assert line["at"] == sorted(line["at"])
    assert line["at"][place + 1] - line["at"][place - 1] > 86_000 / 6 - 600


@pytest.mark.parametrize("copies", [1, 60])
def test_an_event_is_where_event_time_says_whatever_the_two_clocks_say(
    page: Page, copies: int
) -> None:
    since, until = ago(days=9), ago(days=6)
    offsets = ("-3 days", "-61 min", "-59 min", "-1 s", "0", "1 s", "1 day", "59 min", "61 min")
    servers = [f"TIMESTAMPTZ '{start}' + INTERVAL '{by}'" for start in (since, until)
               for by in offsets]  # fmt: skip
    devices = ["NULL", "'1970-01-01 00:00:07Z'", *servers]
    page.database.query(
        f"""
        INSERT INTO events
            (event_id, device_id, schema, event_type, value_num, ts_server, ts_device)
        SELECT row_number() OVER (), 'odd', 1, 't', row_number() OVER (), ts_server, ts_device
        FROM unnest(ARRAY[{", ".join(servers)}]) AS ts_server
        CROSS JOIN unnest(ARRAY[{", ".join(devices)}]::timestamptz[]) AS ts_device
        CROSS JOIN generate_series(1, {copies})
        """
    )
    chart = page.chart("odd", "t", **{"from": since.isoformat(), "to": until.isoformat()})
    step = chart["step_seconds"]
    assert (step > 0) == (copies > 1)
    (line,) = lines(chart)
    found = [point for point in zip(line["at"], line["mean"], strict=True) if point[1] is not None]
    place = f"floor(at / {step}) * {step} + {step} / 2.0" if step else "at"
    wanted = page.database.query(
        f"""
        SELECT ({place})::float8, avg(value_num)
        FROM (
            SELECT extract(epoch FROM event_time(ts_device, ts_server)) AS at, value_num, event_id
            FROM events
            WHERE event_time(ts_device, ts_server) >= '{since}'
                AND event_time(ts_device, ts_server) < '{until}'
        ) AS in_period
        GROUP BY 1 {"" if step else ", event_id"}
        """
    )
    assert len(wanted) >= (5 if step else 20)
    assert sorted(found) == sorted(wanted)


def test_texts_are_states_and_what_held_before_is_the_first(page: Page) -> None:
    said = ["closed", "open", "open", "closed", "closed", "open"]
    rows = readings("device-1", said, 3_600, ago(minutes=30), event_type="door")
    insert(page.database, rows)
    chart = page.chart("device-1", "door", range="24h")
    assert chart["plots"] == []
    (states,) = chart["states"]
    assert states["text"] == ["closed", "open", "closed", "open"]
    assert not states["truncated"]
    (states,) = page.chart("device-1", "door", range="1h")["states"]
    assert states["text"] == ["closed", "open"]


def test_a_text_long_before_numbers_is_no_state(page: Page) -> None:
    said: list[float | str] = ["error", *[20.0] * 60]
    insert(page.database, readings("device-1", said, 600, ago(minutes=5)))
    assert page.chart("device-1", "temperature", range="1h")["states"] == []


def test_of_too_many_states_the_last_are_shown_and_it_is_said(page: Page) -> None:
    said = ["open", "closed"] * 1_500
    insert(page.database, readings("device-1", said, 20, ago(minutes=1), event_type="door"))
    (states,) = page.chart("device-1", "door", range="24h")["states"]
    assert len(states["text"]) == POINTS_MAX
    assert states["truncated"]
    assert states["text"][-1] == "closed"


def test_a_silly_value_does_not_take_the_others_away(page: Page) -> None:
    values = [20.0, 1.7e308, -1.7e308, 21.0] * 1_000
    insert(page.database, readings("device-1", values, 20, ago(minutes=1)))
    (line,) = lines(page.chart("device-1", "temperature", range="24h"))
    assert all(20 <= mean <= 21 for mean in line["mean"])
    assert page.get("/sparklines.json", {"id": "device-1"}).status == 200


@pytest.mark.parametrize("count", [100, 6_000])
def test_the_csv_has_what_the_chart_shows(page: Page, count: int) -> None:
    values = [21.399999618530273 + number / 7 for number in range(count)]
    insert(page.database, readings("device-1", values, 80_000 / count, ago(minutes=5), unit="C"))
    insert(page.database, readings("device-2", ["open", 'a\n,"b"'], 60, ago(minutes=5)))
    end = datetime.now(UTC)
    period = {"from": ago(days=1).isoformat(), "to": end.isoformat(), "type": "temperature"}
    pairs = [*period.items(), ("id", "device-1"), ("id", "device-2")]
    chart = page.get("/chart.json", pairs).json()
    answer = page.get("/chart.csv", pairs)
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert "attachment" in answer.headers["Content-Disposition"]
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    (line,) = lines(chart)
    drawn = [
        (at, mean, least, greatest)
        for at, mean, least, greatest in zip(
            line["at"],
            line["mean"],
            line.get("least", line["mean"]),
            line.get("greatest", line["mean"]),
            strict=True,
        )
        if mean is not None
    ]
    written = [row for row in rows if row["value"]]
    assert [float(row["value"]) for row in written] == [mean for _, mean, _, _ in drawn]
    if chart["step_seconds"]:
        assert [(float(row["min"]), float(row["max"])) for row in written] == [
            (least, greatest) for _, _, least, greatest in drawn
        ]
    for row, (at, *_) in zip(written, drawn, strict=True):
        assert abs(datetime.fromisoformat(row["time"]).timestamp() - at) < 0.001
        named = row["device_id"], row["event_type"], row["unit"]
        assert named == ("device-1", "temperature", "C")
    assert [row["text"] for row in rows if row["text"]] == ["open", 'a\n,"b"']


def test_no_text_of_a_csv_is_a_formula(page: Page) -> None:
    for number, start in enumerate(("=", "+", "-", "@", "\t", "\r")):
        text = f"{start}cmd|' /C calc'!A0"
        row = {"event_id": f"{number}-text", "device_id": text, "event_type": text,
               "value_text": text, "ts_server": ago(minutes=1)}  # fmt: skip
        other = {"event_id": f"{number}", "value_text": None, "value_num": -1.5, "unit": text}
        insert(page.database, [row, row | other])
        answer = page.get("/chart.csv", {"id": text, "type": text, "range": "1h"})
        _, *rows = csv.reader(io.StringIO(answer.text, newline=""))
        assert len(rows) == 2
        for cells in rows:
            for cell in cells:
                assert not cell.startswith(("=", "+", "@", "\t", "\r"))
                assert not cell.startswith("-") or float(cell) == -1.5
            assert cells.count("'" + text) == 3


# --- it reads ------------------------------------------------------------------------


WRITES = (
    "INSERT INTO events (event_id, device_id, schema, event_type) VALUES ('a', 'b', 1, 'c')"
    " RETURNING 1",
    "UPDATE events SET value_num = 1 RETURNING 1",
    "DELETE FROM dead_letters RETURNING 1",
    "CREATE TABLE mine (a INT)",
    "SET default_transaction_read_only = off; DELETE FROM events",
    "SET transaction_read_only = off; CREATE TEMPORARY TABLE mine (a INT)",
)


def test_nothing_is_written(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in page.environment.items():
        monkeypatch.setenv(name, value)
    insert(page.database, readings("device-1", [1.0], 60, ago(minutes=1)))
    try:
        database = page_database.Database()
        assert database.rows("SHOW transaction_read_only")[0]["transaction_read_only"] == "on"
        for sql in WRITES:
            with pytest.raises((page_database.Unavailable, psycopg2.Error)):
                database.rows(sql)
        assert page.database.query("SELECT value_num FROM events") == [(1.0,)]
    finally:
        # It is the whole process's, and the connections of other tests do not know it.
        psycopg2.extensions.set_wait_callback(None)


def test_it_is_reader_with_a_deadline_and_few_connections(page: Page) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = [*VIEWS, *DATA] * 2
        assert {answer.status for answer in pool.map(page.get, paths)} == {200}
    found = page.database.query(
        "SELECT usename, count(*) FROM pg_stat_activity WHERE application_name = 'web' GROUP BY 1"
    )
    ((role, connections),) = found
    assert role == "reader"
    assert connections <= page_database.CONNECTIONS_MAX
    assert PASSWORD not in page.log()
