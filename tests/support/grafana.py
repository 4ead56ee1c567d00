"""What Grafana would make of overlays/grafana: queries with variables and macros, YAML, panels.

What it does: expands a panel's SQL and a provisioning file's values as Grafana's documentation
and source say, decodes a dashboard strictly, and lists what is wrong. What it does not: run
Grafana, which is not here.

Invariant: what it does not know (a macro, a key, a value of an enumeration) is a problem, and
never passed over.
"""

import enum
import json
import os
import re
import subprocess
import typing
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tools.process import CHECKOUT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would have us use the second schema, which is a preview
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

register_default_plugins()

OVERLAY = CHECKOUT / "overlays/grafana"
DATA_SOURCE = {"type": "grafana-postgresql-datasource", "uid": "homelab-telemetry"}
# What a query of the data source has.
TARGET = {"refId", "datasource", "editorMode", "format", "rawQuery", "rawSql"}
# What an override may set: of the schema, these are free text.
PROPERTIES = {
    "color",
    "custom.cellOptions",
    "custom.fillBelowTo",
    "custom.fillOpacity",
    "custom.lineWidth",
    "custom.showPoints",
    "custom.width",
    "decimals",
    "links",
    "thresholds",
    "unit",
}
COLUMNS, POINTS_MAX = 24, 2_000
# bigint, integer, text, double precision, timestamp with time zone. Of others, Grafana shows
# some, and fails at some (json).
SHOWN = {20, 23, 25, 701, 1184}
TIME, TEXT = 1184, 25


class Range(NamedTuple):
    """What the time picker says."""

    since: datetime
    until: datetime

    @property
    def literals(self) -> tuple[str, str]:
        """As they stand in the SQL: UTC, RFC 3339."""
        since, until = (moment.astimezone(UTC).isoformat("T", "milliseconds") for moment in self)
        return (f"'{since.replace('+00:00', 'Z')}'", f"'{until.replace('+00:00', 'Z')}'")


def dashboards() -> dict[str, dict[str, Any]]:
    """Each of the overlay's, by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in OVERLAY.glob("dashboards/*.json")}


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Its panels."""
    found: list[dict[str, Any]] = dashboard["panels"]
    return found


def variables(dashboard: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Its variables, by name."""
    return {variable["name"]: variable for variable in dashboard["templating"]["list"]}


def expand(sql: str, shown: Range, values: Mapping[str, str]) -> str:
    """The SQL as the database gets it."""
    since, until = shown.literals
    for name, value in values.items():
        sql = sql.replace(f"${{{name}:sqlstring}}", "'" + value.replace("'", "''") + "'")
    # A macro's argument ends at the first bracket.
    sql = re.sub(r"\$__timeFilter\(([^)]*)\)", rf"\1 BETWEEN {since} AND {until}", sql)
    sql = sql.replace("$__timeFrom()", since).replace("$__timeTo()", until)
    left = re.search(r"\$(__|\{|[a-z])\w*", re.sub(r"'(''|[^'])*'", "''", sql))
    assert not left, f"{left[0]} is not expanded"
    return sql


def interpolate(value: Any, environment: Mapping[str, str]) -> Any:
    """A value of a provisioning file as Grafana takes it, which knows variables there."""
    if isinstance(value, dict):
        return {key: interpolate(item, environment) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, environment) for item in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        return environment.get(match[1] or match[2], "")

    parts = [re.sub(r"\$(?:\{([^}]*)\}|(\w+))", variable, part) for part in value.split("$$")]
    return "$".join(parts)


def make_files(overlay: Path, target: Path, **environment: str) -> None:
    """Run files.sh, as the service grafana-files does."""
    subprocess.run(
        ["sh", overlay / "files.sh", overlay, target],
        env={"PATH": os.environ["PATH"], "POSTGRES_DB": "qs", **environment},
        check=True,
    )


# --- what is wrong with a dashboard -------------------------------------------------------


def problems_of(dashboard: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with it, but for its queries."""
    if dashboard["id"] is not None or "__inputs" in dashboard:
        yield "an id, or inputs"
    decoded = Dashboard.from_json(dict(dashboard))
    again = json.loads(json.dumps(decoded, cls=JSONEncoder))
    yield from _lost({**dashboard, "id": 0}, again | {"id": 0}, "")
    yield from _not_of_enumerations(decoded, "")
    ids = [panel["id"] for panel in panels(dashboard)]
    if len(set(ids)) < len(ids):
        yield "an id of a panel stands twice"
    yield from _overlaps([panel["gridPos"] for panel in panels(dashboard)])
    for panel in panels(dashboard):
        (target,) = panel["targets"]
        for holder in (panel, target):
            if holder["datasource"] != DATA_SOURCE:
                yield f"panel {panel['id']}: another data source"
        if wrong := TARGET ^ set(target):
            yield f"panel {panel['id']}: {wrong}"
        for override in panel["fieldConfig"]["overrides"]:
            if wrong := {item["id"] for item in override["properties"]} - PROPERTIES:
                yield f"panel {panel['id']}: {wrong}"
        if (repeated := panel.get("repeat")) and repeated not in variables(dashboard):
            yield f"panel {panel['id']}: repeated for {repeated}, which is no variable"


def _lost(before: Any, after: Any, path: str) -> Iterator[str]:
    """Yield each key that is not in the schema, and so was not read."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key not in after:
                yield f"{path}.{key}: not in the schema"
            else:
                yield from _lost(value, after[key], f"{path}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from _lost(*pair, f"{path}[{number}]")
    elif before != after:
        yield f"{path}: {before!r} is read as {after!r}"


def _not_of_enumerations(decoded: Any, path: str) -> Iterator[str]:
    """Yield each value that stands where the schema has an enumeration, and is not of it."""
    if isinstance(decoded, list):
        for number, item in enumerate(decoded):
            yield from _not_of_enumerations(item, f"{path}[{number}]")
        return
    if not type(decoded).__module__.startswith("grafana_foundation_sdk.models"):
        return
    hints = typing.get_type_hints(type(decoded))
    for name, value in vars(decoded).items():
        hint = hints.get(name)
        for kind in (hint, *typing.get_args(hint)):
            allowed: tuple[Any, ...] = ()
            if isinstance(kind, type) and issubclass(kind, enum.Enum):
                allowed = tuple(member.value for member in kind)
            elif typing.get_origin(kind) is typing.Literal:
                allowed = typing.get_args(kind)
            if allowed and value is not None and value not in allowed:
                yield f"{path}.{name}: {value!r} is none of {allowed}"
        yield from _not_of_enumerations(value, f"{path}.{name}")


def _overlaps(places: list[Mapping[str, int]]) -> Iterator[str]:
    taken: set[tuple[int, int]] = set()
    for place in places:
        cells = {
            (column, row)
            for column in range(place["x"], place["x"] + place["w"])
            for row in range(place["y"], place["y"] + place["h"])
        }
        if cells & taken or place["x"] + place["w"] > COLUMNS:
            yield f"a panel at {place} lies over another, or beyond the edge"
        taken |= cells


# --- what is wrong with the result of a query ----------------------------------------------


class Result(NamedTuple):
    """What the database answered."""

    names: list[str]
    types: list[int]
    rows: list[tuple[Any, ...]]


def problems_of_result(panel: Mapping[str, Any], result: Result) -> Iterator[str]:
    """Yield why the panel could not show it."""
    names, types, rows = result
    if not rows:
        yield "no rows"
    if len(set(names)) < len(names):
        yield f"a column stands twice: {names}"
    if wrong := [name for name, kind in zip(names, types, strict=True) if kind not in SHOWN]:
        yield f"a type that Grafana cannot show: {wrong}"
    over_time = panel["type"] in ("timeseries", "state-timeline")
    if over_time:
        if names[0] != "time" or types[0] != TIME:
            yield "the first column is not `time`"
        elif [row[0] for row in rows] != sorted(row[0] for row in rows):
            yield "not ordered by time"
        texts = [kind == TEXT for kind in types[1:]]
        if texts != [panel["type"] == "state-timeline"] * len(texts):
            yield "numbers where there should be texts, or texts for numbers"
        if panel["type"] == "timeseries" and panel["targets"][0]["format"] != "time_series":
            yield "not in the format of a time series"
    if len(rows) * (len(names) - 1 if over_time else 1) > POINTS_MAX:
        yield f"{len(rows)} rows of {names}"
    if panel["type"] == "stat" and (len(rows), len(names)) != (1, 1):
        yield "more than one number"
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["options"] not in names:
            yield f"{override['matcher']['options']} is no column of it"
