"""The page's addresses: what each shows, and the headers that keep it to itself.

What it does: reads an address, asks for the data and renders it. What it does not: hold a
session, take a password, or answer anything but GET.

Invariant: nothing that a browser gets from here makes it load or send anything elsewhere.
"""

import csv
import importlib.util
import io
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from flask import Flask, Response, jsonify, render_template, request, send_from_directory
from werkzeug.exceptions import BadRequest, HTTPException, SecurityError

from page import health, letters, readings, text
from page.database import Database, TooSlow, Unavailable
from page.period import RANGES, BadPeriod, Period, read_period

# What is shown at once; the search finds the others.
DEVICES_A_PAGE = 100
NAME_LENGTH_MAX = 1_000  # of what an address may name; the longest event type is shorter
TITLE = "Homelab telemetry"
# 'self' is this page. It has no inline script or style, and talks to nobody else.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


def _uplot_folder() -> Path:
    # Found, not imported: only two of its files are of use here.
    spec = importlib.util.find_spec("uplot")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("uplot-python is not installed: pip install -r chart-requirements.txt")
    return Path(spec.submodule_search_locations[0], "static")


def make_app(database: Database) -> Flask:
    """Return the WSGI application. WEB_HOSTS names the hosts that it answers to; else any."""
    app = Flask(__name__)
    hosts = os.environ.get("WEB_HOSTS", "")
    # Else a page elsewhere could point a name of its own at this machine and read along.
    app.config["TRUSTED_HOSTS"] = hosts.split(",") if hosts else None
    app.jinja_env.trim_blocks = True
    app.jinja_env.lstrip_blocks = True
    app.jinja_env.filters["visible"] = text.visible
    app.jinja_env.filters["visible_bytes"] = text.visible_bytes
    app.jinja_env.filters["address"] = _address
    app.jinja_env.globals["title"] = TITLE
    app.jinja_env.globals["now_ms"] = lambda: int(datetime.now(UTC).timestamp() * 1000)
    app.jinja_env.globals["topic"] = os.environ.get("MQTT_EVENTS_TOPIC") or "qs/v1/+/events"
    _add_pages(app, database)
    _add_data(app, database)
    _add_errors(app)
    return app


def _address(path: str, pairs: Iterable[tuple[str, str]]) -> str:
    """An address of this page, with its parameters."""
    query = urlencode(list(pairs))
    return f"{path}?{query}" if query else path


def _names(parameter: str, most: int) -> list[str]:
    """The different values of a parameter. Raises BadRequest."""
    names = list(dict.fromkeys(request.args.getlist(parameter)))
    if not 1 <= len(names) <= most:
        raise BadRequest(f"{parameter}: must be there once, and at most {most} times")
    for name in names:
        _check_name(parameter, name)
    return names


def _name(parameter: str) -> str | None:
    name = request.args.get(parameter)
    if name is not None:
        _check_name(parameter, name)
    return name


def _check_name(parameter: str, name: str) -> None:
    if "\0" in name or len(name) > NAME_LENGTH_MAX:
        raise BadRequest(f"{parameter}: names nothing that can be stored")


def _period() -> Period:
    try:
        return read_period(request.args, datetime.now(UTC))
    except BadPeriod as error:
        raise BadRequest(str(error)) from None


# --- pages -----------------------------------------------------------------------------


def _add_pages(app: Flask, database: Database) -> None:
    @app.get("/")
    def show_devices() -> str:
        every = readings.devices(database)
        search = request.args.get("q", "").strip()
        silent_only = request.args.get("silent") == "1"
        found = [
            device
            for device in every
            if search.casefold() in device.id.casefold() and (device.is_silent or not silent_only)
        ]
        if request.args.get("sort") == "heard":
            found.sort(key=lambda device: device.last_seen_at, reverse=True)
        last_page = max(0, len(found) - 1) // DEVICES_A_PAGE * DEVICES_A_PAGE
        start = min(max(0, request.args.get("start", 0, int)), last_page)
        return render_template(
            "devices.html",
            shown=found[start : start + DEVICES_A_PAGE],
            start=start,
            page_size=DEVICES_A_PAGE,
            found=len(found),
            total=len(every),
            silent=sum(device.is_silent for device in every),
            search=search,
            silent_only=silent_only,
            sort=request.args.get("sort", "name"),
        )

    @app.get("/device")
    def show_device() -> str:
        names = _names("id", readings.DEVICES_MAX)
        period = _period()
        ids = [("id", name) for name in names]
        shown = readings.devices(database, names)
        shown.sort(key=lambda device: names.index(device.id))
        return render_template(
            "device.html",
            names=names,
            shown=shown,
            types=sorted({reading.type for device in shown for reading in device.readings}),
            may_add=len(names) < readings.DEVICES_MAX,
            period=period,
            ranges={name: _address("/device", [*ids, ("range", name)]) for name in RANGES},
            ids=ids,
            period_pairs=_period_pairs(period),
        )

    @app.get("/deadletters")
    def show_dead_letters() -> str:
        device, reason = _name("device"), _name("reason")
        return render_template(
            "deadletters.html",
            groups=letters.dead_letter_groups(database),
            letters=letters.dead_letters(database, device, reason),
            letters_max=letters.LETTERS_MAX,
            bytes_max=letters.PAYLOAD_BYTES_MAX,
            device=device,
            reason=reason,
        )

    @app.get("/health")
    def show_health() -> str:
        return render_template(
            "health.html",
            newest=health.newest(database),
            rate_hours=health.RATE_HOURS,
            missing_days=health.MISSING_DAYS,
            silent=health.silent(database),
        )


def _period_pairs(period: Period) -> list[tuple[str, str]]:
    if period.name:
        return [("range", period.name)]
    return [
        (name, time.isoformat(timespec="milliseconds").replace("+00:00", "Z"))
        for name, time in (("from", period.since), ("to", period.until))
    ]


# --- data ------------------------------------------------------------------------------


def _add_data(app: Flask, database: Database) -> None:
    @app.get("/devices.json")
    def device_ids() -> Response:
        return jsonify(readings.device_ids(database))

    @app.get("/sparklines.json")
    def sparklines() -> Response:
        names = _names("id", readings.SPARKLINE_DEVICES_MAX)
        return jsonify(readings.sparklines(database, names, _period()))

    @app.get("/chart.json")
    def chart() -> Response:
        return jsonify(readings.chart_json(_chart(database)))

    @app.get("/chart.csv")
    def chart_csv() -> Response:
        rows = _csv_rows(_chart(database))
        headers = {"Content-Disposition": 'attachment; filename="chart.csv"'}
        return Response(_csv_text(rows), mimetype="text/csv", headers=headers)

    @app.get("/rate.json")
    def rate() -> Response:
        return jsonify(health.events_per_minute(database, datetime.now(UTC)))

    @app.get("/latency.json")
    def latency() -> Response:
        return jsonify(health.latency(database))

    @app.get("/missing.json")
    def missing() -> Response:
        return jsonify(health.missing(database))

    @app.get("/alive")
    def alive() -> str:
        """Whether this program runs; of the database it says nothing."""
        return "alive\n"

    uplot = _uplot_folder()

    @app.get("/uplot/<name>")
    def chart_library(name: str) -> Response:
        return send_from_directory(uplot, name)


def _chart(database: Database) -> readings.Chart:
    (event_type,) = _names("type", 1)
    return readings.chart(database, _names("id", readings.DEVICES_MAX), event_type, _period())


def _csv_rows(chart: readings.Chart) -> Iterator[list[Any]]:
    """What is shown, a row for each point; times in UTC."""
    yield ["time", "device_id", "event_type", "unit", "value", "min", "max", "text"]
    for line in chart.lines:
        for point in line.points:
            extremes = [point.least, point.greatest] if chart.step_seconds else ["", ""]
            place = [_csv_cell(line.device), _csv_cell(chart.type), _csv_cell(line.unit)]
            yield [_iso(point.at), *place, point.mean, *extremes, ""]
    for device, states in chart.states.items():
        for state in states:
            place = [_csv_cell(device), _csv_cell(chart.type), "", "", "", ""]
            yield [_iso(state.since), *place, _csv_cell(state.text)]


def _csv_cell(sent: str) -> str:
    """A spreadsheet would take a text that begins so for a formula, and run it."""
    return f"'{sent}" if sent.startswith(("=", "+", "-", "@", "\t", "\r")) else sent


def _csv_text(rows: Iterable[list[Any]]) -> Iterator[str]:
    for row in rows:
        line = io.StringIO()
        csv.writer(line).writerow(row)
        yield line.getvalue()


def _iso(seconds: float) -> str:
    time = datetime.fromtimestamp(seconds, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- what goes wrong, and headers ------------------------------------------------------


def _add_errors(app: Flask) -> None:
    @app.errorhandler(Unavailable)
    def unavailable(error: Unavailable) -> tuple[Response | str, int]:
        # The script waits longer after a 504, which has cost the database something.
        return _problem(str(error), 504 if isinstance(error, TooSlow) else 503)

    @app.errorhandler(SecurityError)
    def refused_host(error: SecurityError) -> tuple[str, int, dict[str, str]]:
        # Not a page: without a host there are no addresses to put into one.
        message = "This page does not answer to this host name; WEB_HOSTS says to which.\n"
        return message, 400, {"Content-Type": "text/plain"}

    @app.errorhandler(HTTPException)
    def refused(error: HTTPException) -> tuple[Response | str, int]:
        return _problem(error.description or error.name, error.code or 500)

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        is_static = request.endpoint in ("static", "chart_library")
        if not is_static or response.status_code >= 400:
            response.headers["Cache-Control"] = "no-store"
        return response


def _problem(message: str, status: int) -> tuple[Response | str, int]:
    shown = text.visible(message)
    if request.path.endswith((".json", ".csv")):
        return jsonify(problem=shown), status
    return render_template("problem.html", problem=shown, status=status), status
