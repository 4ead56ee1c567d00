"""What devices have measured: the list of them, a day at a glance, and a chart of a period.

What it does: asks the views and the table of events, and chooses how finely a period is drawn.
What it does not: know HTTP or HTML.

Invariant: a chart has at most POINTS_MAX numbers, whatever the period holds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from page.database import Database, Row
from page.period import Period, gaps_after, step_seconds
from page.text import decimals_of, number, visible

# As many as a screen has pixels, or nearly. A point that stands for a step of time is three
# numbers: the mean, the least and the greatest.
POINTS_MAX = 2_000
DEVICES_MAX = 8  # in one chart: as many as there are colours
SPARKLINE_STEPS = 48
SPARKLINE_DEVICES_MAX = 50

# The events of a device and type that happened in a period, by event_time(): the device's clock
# where it can be right, else the database's. By index, and as few as that takes: a clock counts
# if it is ahead by an hour at most, so what came in earlier is not of the period; what came in
# after it is, if it was late. OFFSET 0, so that event_time(), the dear part, is asked once.
IN_PERIOD = """
    (
        SELECT event_id, value_num, value_text, unit, ts_server,
            event_time(ts_device, ts_server) AS happened_at
        FROM events
        WHERE device_id = %(device)s AND event_type = %(type)s
            AND ts_server >= %(since)s - INTERVAL '1 hour' AND ts_server < %(until)s
        UNION ALL
        SELECT event_id, value_num, value_text, unit, ts_server,
            event_time(ts_device, ts_server)
        FROM events
        WHERE device_id = %(device)s AND event_type = %(type)s
            AND ts_server >= %(until)s AND ts_device >= %(since)s AND ts_device < %(until)s
        OFFSET 0
    ) AS found
    WHERE happened_at >= %(since)s AND happened_at < %(until)s
"""
# extract() would come by way of a NUMERIC, which takes several times as long.
SECONDS = "date_part('epoch', happened_at)"
# So many events before a period may the text be away that holds when it begins. A type of numbers
# has none, and without a limit all that it ever sent would be read for it.
EVENTS_BEFORE = 20


@dataclass(frozen=True)
class Reading:
    """The last value of a device and type, as text for people."""

    type: str
    value: str
    unit: str
    is_number: bool


@dataclass(frozen=True)
class Device:
    """A device and what it said last; `usual_pause_seconds` is known of silent ones."""

    id: str
    last_seen_at: datetime
    latest: Sequence[Row]
    is_silent: bool
    usual_pause_seconds: float | None

    @property
    def readings(self) -> list[Reading]:
        """Its last values by type. Made when they are shown: of a thousand devices few are."""
        return sorted(map(_reading, self.latest), key=lambda reading: reading.type)


def devices(database: Database, names: Sequence[str] | None = None) -> list[Device]:
    """Return the devices that are named, or all, by name. Raises Unavailable."""
    wanted = "" if names is None else "WHERE device_id = ANY(%(names)s)"
    latest: dict[str, list[Row]] = {}
    for row in database.rows(
        f"""
        SELECT device_id, event_type, value_num, value_text, unit, ts_server
        FROM latest_values {wanted}
        """,
        names=names,
    ):
        latest.setdefault(row["device_id"], []).append(row)
    silent = {
        row["device_id"]: row["usual_pause"]
        for row in database.rows(
            f"SELECT device_id, usual_pause FROM silent_devices {wanted}", names=names
        )
    }
    return [
        Device(
            id=name,
            last_seen_at=max(row["ts_server"] for row in latest[name]),
            latest=latest[name],
            is_silent=name in silent,
            usual_pause_seconds=pause.total_seconds() if (pause := silent.get(name)) else None,
        )
        for name in sorted(latest)
    ]


def device_ids(database: Database) -> list[str]:
    """Return the ids of all devices, in order. Raises Unavailable."""
    rows = database.rows("SELECT DISTINCT device_id FROM event_types_heard")
    return sorted(row["device_id"] for row in rows)


def _reading(row: Row) -> Reading:
    if row["value_num"] is not None:
        value = number(row["value_num"])
    elif row["value_text"] is not None:
        value = visible(row["value_text"])
    else:
        value = "empty"
    unit = visible(row["unit"] or "")
    is_number = row["value_num"] is not None
    return Reading(row["event_type"], value, unit, is_number)


def sparklines(
    database: Database, names: Sequence[str], period: Period
) -> dict[str, dict[str, list[float | None]]]:
    """Return the means of SPARKLINE_STEPS equal parts of a period, for each device and type.

    None where there was nothing; a type of which there was nothing at all is left out. Raises
    Unavailable.
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    rows = database.rows(
        """
        SELECT device_id, event_type, means.step, means.mean
        FROM event_types_heard AS heard
        CROSS JOIN LATERAL (
            SELECT
                floor(
                    (date_part('epoch', event_time(ts_device, ts_server)) - %(since_seconds)s)
                    / %(step)s
                )::int AS step,
                avg(value_num) AS mean
            FROM events
            WHERE events.device_id = heard.device_id AND events.event_type = heard.event_type
                AND ts_server >= %(since)s AND abs(value_num) < 1e100
                AND event_time(ts_device, ts_server) >= %(since)s
                AND event_time(ts_device, ts_server) < %(until)s
            GROUP BY 1
        ) AS means
        WHERE device_id = ANY(%(devices)s) AND last_seen_at >= %(since)s
        """,
        devices=list(names),
        since=period.since,
        since_seconds=period.since.timestamp(),
        until=period.until,
        step=period.seconds / SPARKLINE_STEPS,
    )
    for row in rows:
        types = found.setdefault(row["device_id"], {})
        line = types.setdefault(row["event_type"], [None] * SPARKLINE_STEPS)
        line[min(row["step"], SPARKLINE_STEPS - 1)] = row["mean"]
    return found


# --- a chart ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A reading, or the readings of a step: its middle in seconds since 1970, and how they were."""

    at: float
    mean: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Line:
    """The numbers of a device in one unit, in order of time."""

    device: str
    unit: str
    points: Sequence[Point]


@dataclass(frozen=True)
class State:
    """Since when a device has said this; `text` is as it was sent."""

    since: float
    text: str


@dataclass(frozen=True)
class Chart:
    """One type of event of some devices. `step_seconds` is 0 if the points are the readings.

    `states` is by device. Of a device in `truncated` there were more changes than can be drawn,
    and the earlier ones are left out.
    """

    type: str
    period: Period
    step_seconds: int
    lines: Sequence[Line]
    states: dict[str, Sequence[State]]
    truncated: Sequence[str]


def chart(database: Database, names: Sequence[str], event_type: str, period: Period) -> Chart:
    """Return what devices have said of a type in a period. Raises Unavailable."""
    share = POINTS_MAX // len(names)
    parameters = [
        {"device": name, "type": event_type, "since": period.since, "until": period.until}
        for name in names
    ]
    has_texts = True
    if all(_count(database, share, chosen) <= share for chosen in parameters):
        step = 0
        lines = [line for chosen in parameters for line in _readings(database, chosen)]
    else:
        step = step_seconds(period, share // 3)
        lines = []
        has_texts = False
        for chosen in parameters:
            found, texts = _means(database, step, chosen)
            lines += found
            has_texts |= texts > 0
    states: dict[str, Sequence[State]] = {}
    truncated = []
    for chosen in parameters:
        changes: Sequence[State] = _changes(database, share, chosen) if has_texts else []
        if len(changes) > share:
            changes = changes[1:]
            truncated.append(str(chosen["device"]))
        else:
            changes = _with_state_before(database, chosen, changes)
        if changes:
            states[str(chosen["device"])] = changes
    return Chart(event_type, period, step, lines, states, truncated)


def _count(database: Database, most: int, parameters: Row) -> int:
    """How many readings there are, up to one more than `most`."""
    (row,) = database.rows(
        f"""
        SELECT count(*) FROM (
            SELECT FROM {IN_PERIOD} AND value_num IS NOT NULL LIMIT {most + 1}
        ) AS found
        """,
        **parameters,
    )
    return int(row["count"])


def _readings(database: Database, parameters: Row) -> list[Line]:
    return _lines(
        parameters,
        database.rows(
            f"""
            SELECT unit, {SECONDS} AS at, value_num AS mean, value_num AS least,
                value_num AS greatest
            FROM {IN_PERIOD} AND value_num IS NOT NULL
            ORDER BY at, ts_server, length(event_id), event_id
            """,
            **parameters,
        ),
    )


def _means(database: Database, step: int, parameters: Row) -> tuple[list[Line], int]:
    """The lines, and how many texts there are besides."""
    # A mean overflows with a value of 1e200, say, and one silly reading must not take the others
    # away; where all of a step are such, its middle stands for them.
    # The database takes the steps for about as many as the readings, and would sort these, on the
    # disk if there are millions. So the few that it finds are sorted here.
    rows = database.rows(
        f"""
        SET LOCAL enable_sort = off;
        SELECT unit, floor({SECONDS} / %(step)s) * %(step)s + %(step)s / 2.0::float8 AS at,
            coalesce(
                avg(value_num) FILTER (WHERE abs(value_num) < 1e100),
                min(value_num) / 2 + max(value_num) / 2
            ) AS mean,
            min(value_num) AS least, max(value_num) AS greatest, count(value_text) AS texts
        FROM {IN_PERIOD}
        GROUP BY unit, 2
        """,
        step=step,
        **parameters,
    )
    numbers = sorted((row for row in rows if row["mean"] is not None), key=lambda row: row["at"])
    return _lines(parameters, numbers), sum(row["texts"] for row in rows)


def _lines(parameters: Row, rows: Iterable[Row]) -> list[Line]:
    points: dict[str, list[Point]] = {}
    for row in rows:
        point = Point(row["at"], row["mean"], row["least"], row["greatest"])
        points.setdefault(row["unit"] or "", []).append(point)
    return [Line(parameters["device"], unit, points[unit]) for unit in sorted(points)]


def _changes(database: Database, most: int, parameters: Row) -> Sequence[State]:
    """The texts of a period where they differ from the one before.

    If there are more than `most`, the last of them and one more.
    """
    rows = database.rows(
        f"""
        SELECT at, value_text FROM (
            SELECT {SECONDS} AS at, value_text,
                lag(value_text) OVER (
                    ORDER BY happened_at, ts_server, length(event_id), event_id
                ) AS previous
            FROM {IN_PERIOD} AND value_text IS NOT NULL
        ) AS texts
        WHERE value_text IS DISTINCT FROM previous
        ORDER BY at DESC
        LIMIT {most + 1}
        """,
        **parameters,
    )
    return [State(row["at"], row["value_text"]) for row in reversed(rows)]


def _with_state_before(
    database: Database, parameters: Row, changes: Sequence[State]
) -> Sequence[State]:
    """The same, begun by what held when the period did."""
    before = database.rows(
        f"""
        SELECT value_text
        FROM (
            SELECT value_text, ts_device, ts_server
            FROM events
            WHERE device_id = %(device)s AND event_type = %(type)s AND ts_server < %(since)s
            ORDER BY ts_server DESC
            FETCH FIRST {EVENTS_BEFORE} ROWS WITH TIES
        ) AS events_before
        WHERE value_text IS NOT NULL
        ORDER BY ts_server DESC, ts_device DESC NULLS LAST
        LIMIT 1
        """,
        **parameters,
    )
    for row in before:
        state = State(parameters["since"].timestamp(), row["value_text"])
        if changes and changes[0].text == state.text:
            return [state, *changes[1:]]
        return [state, *changes]
    return changes


# --- as JSON ---------------------------------------------------------------------------


def chart_json(chart: Chart) -> dict[str, Any]:
    """Return what the script draws: a plot for each unit, and the states."""
    plots = []
    for unit in sorted({line.unit for line in chart.lines}):
        lines = [line for line in chart.lines if line.unit == unit]
        points = [point for line in lines for point in line.points]
        extremes = [value for point in points for value in (point.least, point.greatest)]
        plots.append(
            {
                "unit": visible(unit),
                "decimals": decimals_of(extremes),
                "lines": [_line_json(line, chart.step_seconds) for line in lines],
            }
        )
    return {
        "from": chart.period.since.timestamp(),
        "to": chart.period.until.timestamp(),
        "step_seconds": chart.step_seconds,
        "plots": plots,
        "states": [
            {
                "device": visible(device),
                "at": [state.since for state in states],
                "text": [visible(state.text) for state in states],
                "truncated": device in chart.truncated,
            }
            for device, states in chart.states.items()
        ],
    }


def _line_json(line: Line, step: int) -> dict[str, Any]:
    """A line as columns. In a gap stands a point without a value, where the drawing ends."""
    gaps = set(gaps_after([point.at for point in line.points], step))
    columns: dict[str, list[float | None]] = {"at": [], "mean": [], "least": [], "greatest": []}
    for place, point in enumerate(line.points):
        columns["at"].append(point.at)
        columns["mean"].append(point.mean)
        columns["least"].append(point.least)
        columns["greatest"].append(point.greatest)
        if place in gaps:
            columns["at"].append((point.at + line.points[place + 1].at) / 2)
            for name in ("mean", "least", "greatest"):
                columns[name].append(None)
    if step == 0:
        del columns["least"], columns["greatest"]
    return {"device": visible(line.device)} | columns
