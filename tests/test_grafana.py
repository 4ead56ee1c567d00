"""overlays/grafana without Grafana, which is not here: queries, dashboards, files, Compose files.

What it does: runs the SQL of each panel and variable as `reader` on a real PostgreSQL, reads the
dashboards by Grafana's published schema and the YAML by a list of its keys, runs files.sh and the
service that does, and logs in with what came out. What it does not: run Grafana, or judge how a
panel looks.

Invariant: each check is shown to fail where something is wrong.
"""

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import yaml

from tests.support import compose, grafana
from tests.support.grafana import OVERLAY, Range, Result, expand, panels, variables
from tests.support.pipeline import Database
from tests.support.secure import SecureStack, missing_rights
from tools.process import CHECKOUT, free_port
from tools.stack import Stack

DASHBOARDS = grafana.dashboards()
PANELS = [(name, panel["id"]) for name, board in DASHBOARDS.items() for panel in panels(board)]
PASSWORD = r""" a $b ${c} $$d $__file{e} 'f' \g "h' #i: é"""
LENGTHS = {
    "an hour": timedelta(hours=1),
    "a day": timedelta(days=1),
    "a year": timedelta(days=365),
}
# A reading each minute for two days, with numbered ids and a gap in them; one each hour for a year;
# another unit, names with everything in them, and values that overflow when they are added up;
# texts; a device that is silent; and one whose clock is wrong.
EVENTS = """
    INSERT INTO events
        (event_id, device_id, schema, event_type, value_num, value_text, unit, ts_device, ts_server)
    SELECT 'room-0badcafe-1-' || n, 'room', 1, 'temperature', 20 + sin(n), NULL, 'C',
        now() - n_ago - INTERVAL '20 ms', now() - n_ago
    FROM generate_series(1, 2880) AS n, LATERAL (SELECT (2881 - n) * INTERVAL '1 min') AS a (n_ago)
    WHERE n NOT IN (2800, 2801)
    UNION ALL
    SELECT 'year-' || n, 'room', 1, 'temperature', 15 + n % 10, NULL, 'C',
        now() - n * INTERVAL '1 hour', now() - n * INTERVAL '1 hour'
    FROM generate_series(50, 8700) AS n
    UNION ALL
    SELECT 'odd-' || odd::text || n, 'room', 1, odd.type, 1e308, NULL, odd.unit, NULL,
        now() - n * INTERVAL '1 min'
    FROM generate_series(1, 50) AS n,
        (VALUES ('temperature', 'F'), ('it''s "odd" $1 \\ %', '°''"'), ('none', NULL), ('bare', ''))
            AS odd (type, unit)
    UNION ALL
    SELECT text.type || n, 'room', 1, text.type, NULL,
        CASE n % 3 WHEN 0 THEN 'open' ELSE 'closed' END, NULL,
        now() - n * INTERVAL '7 min', now() - n * INTERVAL '7 min'
    FROM generate_series(0, 9000) AS n, (VALUES ('door'), ('it''s "text"')) AS text (type)
    UNION ALL
    SELECT 'silent-' || n, 'silent', 1, 'power', n, NULL, 'W', NULL, now() - n * INTERVAL '1 min'
    FROM generate_series(120, 240) AS n
    UNION ALL
    SELECT 'clock-' || n, 'clock', 1, 'power', n, NULL, 'W',
        now() - (n + 5) * INTERVAL '1 min', now() - n * INTERVAL '1 min'
    FROM generate_series(0, 100) AS n
"""
LETTERS = """
    INSERT INTO dead_letters
        (received_at, last_received_at, reason, error, topic, device_id, times, payload)
    SELECT now() - n * INTERVAL '1 min', now() - n * INTERVAL '1 min', reason, 'x', 'x', 'room', n,
        ''
    FROM generate_series(1, 30) AS n, (VALUES ('not_json'), ('missing_field')) AS r (reason)
"""
# What Grafana reads of the two files, by its documentation.
PROVIDER_KEYS = {
    "name", "orgId", "type", "disableDeletion", "allowUiUpdates", "updateIntervalSeconds",
    "folder", "folderUid", "editable", "options",
}  # fmt: skip
SOURCE_KEYS = {
    "name", "type", "uid", "access", "orgId", "url", "user", "isDefault", "jsonData",
    "secureJsonData", "version", "editable",
}  # fmt: skip
JSON_DATA_KEYS = {
    "database", "sslmode", "maxOpenConns", "maxIdleConns", "maxIdleConnsAuto", "connMaxLifetime",
    "postgresVersion", "timescaledb", "tlsConfigurationMethod", "sslRootCertFile", "sslCertFile",
    "sslKeyFile",
}  # fmt: skip


# --- the queries ---------------------------------------------------------------------------


@cache
def now() -> datetime:
    """When the events were put in; this module may have been loaded long before."""
    return datetime.now(UTC)


def last(length: str) -> Range:
    return Range(now() - LENGTHS[length], now())


@pytest.fixture(scope="module")
def reader(servers: Stack) -> Iterator[Any]:
    """A session of `reader`, logged in, in a database with events of each kind."""
    name = "grafana"
    servers.postgres.create_database(name, template="qs")
    database = Database(servers.postgres, name)
    database.query(EVENTS)
    database.query(LETTERS)
    now()
    database.query("ANALYZE")
    servers.postgres.apply_schema(name, reader_password="reader")
    conninfo = database.conninfo | {"user": "reader", "password": "reader"}
    with closing(psycopg2.connect(**conninfo)) as connection:
        connection.autocommit = True
        yield connection
    servers.postgres.apply_schema(name)
    servers.postgres.drop_database(name)


def run(reader: Any, sql: str) -> Result:
    with reader.cursor() as cursor:
        cursor.execute(sql)
        types = [column.type_code for column in cursor.description]
        return Result([column.name for column in cursor.description], types, cursor.fetchall())


def options(reader: Any, dashboard: dict[str, Any], name: str, shown: Range) -> list[str]:
    """The values that a variable can have, for the device `room`."""
    variable = variables(dashboard)[name]
    if variable["type"] == "textbox":
        return ["", "OO", "%"]
    names, types, rows = run(reader, expand(variable["query"], shown, {"device": "room"}))
    assert set(types) == {grafana.TEXT}
    assert names in (["__text", "__value"], [names[0]])
    return [row[-1] for row in rows]


@pytest.mark.services
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("name", "number"), PANELS)
def test_a_panel_has_something_to_show(reader: Any, name: str, number: int, length: str) -> None:
    dashboard, shown = DASHBOARDS[name], last(length)
    (panel,) = (panel for panel in panels(dashboard) if panel["id"] == number)
    sql = panel["targets"][0]["rawSql"]
    used = [v for v in variables(dashboard) if f"${{{v}:sqlstring}}" in sql and v != "device"]
    cases = [{"device": "room"}]
    for variable in used:
        cases = [
            case | {variable: option}
            for case in cases
            for option in options(reader, dashboard, variable, shown)
        ]
    assert cases
    for case in cases:
        result = run(reader, expand(sql, shown, case))
        if case.get("search") == "%":  # is no pattern
            assert result.rows == []
            continue
        assert list(grafana.problems_of_result(panel, result)) == [], case


@pytest.mark.services
def test_the_variables_offer_each_device_each_unit_and_each_text(reader: Any) -> None:
    dashboard, shown = DASHBOARDS["device"], last("a day")
    assert options(reader, dashboard, "device", shown) == ["clock", "room", "silent"]
    charts = [json.loads(text) for text in options(reader, dashboard, "chart", shown)]
    assert sorted(charts, key=str) == sorted(
        [
            ["bare", ""],
            ['it\'s "odd" $1 \\ %', "°'\""],
            ["none", None],
            ["temperature", "C"],
            ["temperature", "F"],
        ],
        key=str,
    )
    assert options(reader, dashboard, "state", shown) == ["door", 'it\'s "text"']


def panel_of(name: str, title: str) -> dict[str, Any]:
    (panel,) = (panel for panel in panels(DASHBOARDS[name]) if panel["title"] == title)
    return panel


@pytest.mark.services
def test_what_they_show_is_what_is_stored(reader: Any) -> None:
    """For readings one by one and by hourly(), for what is counted, for states."""

    def rows(name: str, title: str, shown: Range, **values: str) -> list[tuple[Any, ...]]:
        sql = panel_of(name, title)["targets"][0]["rawSql"]
        return run(reader, expand(sql, shown, {"device": "room", **values})).rows

    chart = {"chart": '["temperature", "C"]'}
    for span in ("an hour", "a day"):
        found = rows("device", "${chart:text}", last(span), **chart)
        assert len(found) <= 600 + 2
        assert all(19 <= low <= mean <= high <= 21 for _, low, mean, high in found)
    year = rows("device", "${chart:text}", last("a year"), **chart)
    assert 400 < len(year) <= 600 + 2
    assert (min(low for _, low, *_ in year), max(high for *_, high in year)) == (15, 24)

    counted = rows("home", "Events per minute", last("an hour"))
    stored = "SELECT date_trunc('minute', ts_server), count(*) FROM events GROUP BY 1"
    by_minute = dict(run(reader, stored).rows)
    assert len(counted) in (60, 61)
    assert all(by_minute.get(minute, 0) == number for minute, number in counted[1:-1])
    assert rows("home", "Events per minute", Range(now(), now() + timedelta(hours=1)))[-1][1] == 0

    (first, *_, latest) = rows("device", "${state:text}", last("an hour"), state="door")
    milliseconds = now().microsecond // 1000
    assert first[0] == now().replace(microsecond=milliseconds * 1000) - timedelta(hours=1)
    assert {first[1], latest[1]} <= {"open", "closed"}
    assert rows("device", "Missing events", last("a day")) == [(2,)]
    assert rows("ingest", "Missing events, last 24 hours", last("a day")) == [
        ("room", 1, 2800, 2801, 2)
    ]
    assert rows("home", "Silent", last("a day"), search="")[0][0] == "silent"
    assert rows("ingest", "Clocks", last("a day"))[0] == ("clock", 300)


def test_a_macro_a_variable_or_a_result_that_grafana_would_not_take_is_found() -> None:
    shown = Range(datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 3, tzinfo=UTC))
    sql = "$__timeFilter(a) AND b < $__timeTo() AND c = ${d:sqlstring}"
    assert expand(sql, shown, {"d": "it's $e"}) == (
        "a BETWEEN '2026-01-02T00:00:00.000Z' AND '2026-01-03T00:00:00.000Z'"
        " AND b < '2026-01-03T00:00:00.000Z' AND c = 'it''s $e'"
    )
    for wrong in ("$__timefilter(a)", "$device", "${device}", "$__interval"):
        with pytest.raises(AssertionError, match="not expanded"):
            expand(f"SELECT {wrong}", shown, {})

    series, stat, states = (
        panel_of(*of)
        for of in (("ingest", "Ingest latency, last 24 hours"), ("home", "Silent devices"),
                   ("device", "${state:text}"))
    )  # fmt: skip
    one, two = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    time, text, number, json_data = 1184, 25, 701, 3802
    good = Result(["time", "p50"], [time, number], [(one, 1.0), (two, 2.0)])
    assert list(grafana.problems_of_result(series, good)) == []
    for panel, result in (
        (series, good._replace(rows=[])),
        (series, good._replace(rows=good.rows[::-1])),
        (series, good._replace(names=["hour", "p50"])),
        (series, good._replace(types=[text, number])),
        (series, good._replace(types=[time, text])),
        (series, good._replace(types=[time, json_data])),
        (series, good._replace(rows=[(one, 1.0)] * 2_001)),
        (stat, Result(["a"], [number], [(1,), (2,)])),
        (stat, Result(["a", "a"], [number, number], [(1, 1)])),
        (states, good),
        (panel_of("home", "Silent"), Result(["device"], [text], [("room",)])),
    ):
        assert list(grafana.problems_of_result(panel, result)), result


# --- the dashboards --------------------------------------------------------------------------


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_what_the_published_schema_says(name: str) -> None:
    assert list(grafana.problems_of(DASHBOARDS[name])) == []


def test_the_dashboards_have_names_of_their_own_and_lead_to_each_other() -> None:
    for key in ("uid", "title"):
        assert len({board[key] for board in DASHBOARDS.values()}) == len(DASHBOARDS) == 3
    uids = {board["uid"] for board in DASHBOARDS.values()}
    for board in DASHBOARDS.values():
        (links,) = board["links"]
        assert set(links["tags"]) <= set(board["tags"])
        for panel in panels(board):
            for override in panel["fieldConfig"]["overrides"]:
                for item in override["properties"]:
                    for link in item["value"] if item["id"] == "links" else ():
                        assert link["url"].split("?")[0].removeprefix("/d/") in uids
        # No device is named.
        assert " = '" not in " ".join(panel["targets"][0]["rawSql"] for panel in panels(board) if (
            "pg_stat_user_tables" not in panel["targets"][0]["rawSql"]))  # fmt: skip


BREAKS: dict[str, Callable[[dict[str, Any]], object]] = {
    "an id": lambda board: board.update(id=7),
    "inputs": lambda board: board.update(__inputs=[]),
    "a key of the dashboard": lambda board: board.update(timeZone="browser"),
    "a key of a panel": lambda board: board["panels"][0].update(titel="x"),
    "a key of its options": lambda board: board["panels"][0]["options"].update(colourMode="value"),
    "a key of its fields": lambda board: board["panels"][0]["fieldConfig"]["defaults"].update(
        uni=1
    ),
    "a value of its options": lambda board: board["panels"][0]["options"].update(colorMode="blue"),
    "a key of a chart": lambda board: board["panels"][4]["fieldConfig"]["defaults"][
        "custom"
    ].update(linewidth=2),
    "a value of a chart": lambda board: board["panels"][4]["fieldConfig"]["defaults"][
        "custom"
    ].update(drawStyle="curve"),
    "a direction": lambda board: board["panels"][4].update(repeatDirection="x"),
    "a variable's key": lambda board: board["templating"]["list"][0].update(includeall=True),
    "a variable's type": lambda board: board["templating"]["list"][0].update(type="sql"),
    "no such variable": lambda board: board["panels"][4].update(repeat="charts"),
    "a key of the query": lambda board: board["panels"][0]["targets"][0].update(rawSQL=""),
    "another data source": lambda board: board["panels"][0]["datasource"].update(uid="mine"),
    "an override": lambda board: board["panels"][4]["fieldConfig"]["overrides"][0][
        "properties"
    ].append({"id": "custom.linewidth", "value": 1}),
    "the same id": lambda board: board["panels"][1].update(id=1),
    "one over another": lambda board: board["panels"][1]["gridPos"].update(x=0),
    "beyond the edge": lambda board: board["panels"][3]["gridPos"].update(w=7),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_dashboard_that_is_broken_is_found(how: str) -> None:
    board = copy.deepcopy(DASHBOARDS["device"])
    assert list(grafana.problems_of(board)) == []
    BREAKS[how](board)
    assert list(grafana.problems_of(board))


# --- the files -------------------------------------------------------------------------------


def provisioned(target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one provider and the one data source in a folder that files.sh has filled."""
    provider = yaml.safe_load((target / "provisioning/dashboards/dashboards.yaml").read_text())
    source = yaml.safe_load((target / "provisioning/datasources/datasource.yaml").read_text())
    assert (provider.pop("apiVersion"), source.pop("apiVersion")) == (1, 1)
    assert (set(provider), set(source)) == ({"providers"}, {"datasources"})
    (provider,), (source,) = provider["providers"], source["datasources"]
    return grafana.interpolate(provider, {}), grafana.interpolate(source, {"c": "x", "b": "y"})


def test_the_yaml_has_no_key_that_grafana_does_not_know(tmp_path: Path) -> None:
    grafana.make_files(OVERLAY, tmp_path, READER_PASSWORD="x")
    provider, source = provisioned(tmp_path)
    assert set(provider) <= PROVIDER_KEYS
    assert provider["options"] == {"path": "/telemetry/dashboards"}
    assert set(source) <= SOURCE_KEYS
    assert set(source["jsonData"]) <= JSON_DATA_KEYS
    assert set(source["secureJsonData"]) == {"password"}
    assert {key: source[key] for key in grafana.DATA_SOURCE} == grafana.DATA_SOURCE
    # 10 for `reader`, of which the page has 4.
    assert source["jsonData"]["maxOpenConns"] <= 5


def test_a_password_and_a_name_with_everything_in_them_arrive_and_a_start_changes_the_rest_alone(
    tmp_path: Path,
) -> None:
    grafana.make_files(OVERLAY, tmp_path, READER_PASSWORD=PASSWORD, POSTGRES_DB=PASSWORD)
    _, source = provisioned(tmp_path)
    assert source["secureJsonData"]["password"] == source["jsonData"]["database"] == PASSWORD
    assert source["jsonData"]["sslmode"] == "disable"
    password = (tmp_path / "admin_password").read_text()
    assert len(password) == 24

    (tmp_path / "dashboards/old.json").write_text("{}")
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    (tmp_path / "ca").write_text("the CA\n")
    given = {"READER_PASSWORD_FILE": f"{tmp_path}/password", "CA_FILE": f"{tmp_path}/ca"}
    grafana.make_files(OVERLAY, tmp_path, **given)
    _, source = provisioned(tmp_path)
    assert source["secureJsonData"]["password"] == PASSWORD
    assert source["jsonData"]["sslmode"] == "verify-full"
    assert (tmp_path / "ca.crt").read_text() == "the CA\n"
    assert (tmp_path / "admin_password").read_text() == password
    assert not (tmp_path / "dashboards/old.json").exists()


def test_everybody_can_read_the_files_of_a_checkout_that_is_its_owners_alone(
    tmp_path: Path,
) -> None:
    shutil.copytree(OVERLAY, tmp_path / "overlay")
    for path in (tmp_path / "overlay", *(tmp_path / "overlay").rglob("*")):
        path.chmod(path.stat().st_mode & 0o700)
    target = tmp_path / "target"
    target.mkdir(mode=0o755)
    grafana.make_files(tmp_path / "overlay", target, READER_PASSWORD="x")
    for path in target.rglob("*"):
        wanted = 0o755 if path.is_dir() else 0o644
        assert path.stat().st_mode & 0o777 == wanted, path


# --- the Compose files -------------------------------------------------------------------------

PLAIN = ("docker-compose.yml", "overlays/grafana/docker-compose.yml")
FORGOTTEN = (PLAIN[0], "overlays/secure/docker-compose.yml", PLAIN[1])
SECURE = (*FORGOTTEN, "overlays/grafana/secure.yml")


def config(*files: str, **variables: str) -> dict[str, Any]:
    """The services, as Compose sees them."""
    done = subprocess.run(
        ["docker", "compose", *(word for file in files for word in ("-f", file)),
         "config", "--format", "json"],
        cwd=CHECKOUT, env={"PATH": os.environ["PATH"], **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@pytest.mark.skipif(not shutil.which("docker"), reason="Docker is not installed")
def test_grafana_is_closed_in_and_changes_nothing_of_the_stack_but_the_readers_login() -> None:
    base, plain, secure = (config(*files) for files in (PLAIN[:1], PLAIN, SECURE))
    secured = config(*SECURE[:2])
    for before, after in ((base, plain), (secured, secure)):
        assert set(after) - set(before) == {"grafana", "grafana-files"}
        for name in set(before) - {"schema"}:
            assert after[name] == before[name]
        for name in ("grafana", "grafana-files"):
            assert after[name]["read_only"]
            assert after[name]["cap_drop"] == ["ALL"]
            assert after[name]["security_opt"] == ["no-new-privileges:true"]
            assert {"mem_limit", "pids_limit"} <= set(after[name])
    assert plain["schema"]["environment"]["READER_PASSWORD"] == "reader"
    assert plain["grafana-files"]["environment"]["READER_PASSWORD"] == "reader"
    given = config(*PLAIN, READER_PASSWORD="mine", GRAFANA_PORT="3001")
    for name in ("schema", "grafana-files"):
        assert given[name]["environment"]["READER_PASSWORD"] == "mine"
    assert given["grafana"]["ports"][0]["published"] == "3001"
    # With the overlay on this machine alone, and no secret in an environment.
    (port,) = secure["grafana"]["ports"]
    assert (port["host_ip"], port["target"]) == ("127.0.0.1", 3000)
    assert set(secure["grafana-files"]["environment"]) == {
        "POSTGRES_DB",
        "READER_PASSWORD_FILE",
        "CA_FILE",
    }


class GrafanaStack(SecureStack):
    """The database, the schema step and the files, in the default stack or behind the overlay."""

    def start(self, *files: str, **variables: str) -> dict[str, Any]:
        """Start them; return the data source that Grafana's user reads in its container."""
        self.environment["COMPOSE_FILE"] = os.pathsep.join(files)
        self.up("postgres", **variables)
        command = ("docker", "compose", "up", "--no-color", "schema", "grafana-files")
        self.run(*command, variables=variables)
        return provisioned(self.copy_for_472())[1]

    def copy_for_472(self) -> Path:
        """All that user 472 can read, where Grafana has it."""
        target = self.folder / "read"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        done = subprocess.run(
            ["docker", "run", "--rm", "--user", "472:0", "--entrypoint", "tar", "-v",
             f"{compose.PROJECT}_grafana_files:/telemetry:ro", "postgres:16", "-c", "-C",
             "/telemetry", "."],
            env=self.environment, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        subprocess.run(["tar", "-x", "-C", target], input=done.stdout, check=True)
        return target

    def log_in(self, source: dict[str, Any]) -> str:
        """Connect as Grafana would; return who came in, or why not."""
        data, target = source["jsonData"], self.folder / "read"
        options = {"sslmode": data["sslmode"], "dbname": data["database"]}
        if data["sslmode"] != "disable":
            options["sslrootcert"] = str(target / Path(data["sslRootCertFile"]).name)
        try:
            password = source["secureJsonData"]["password"]
            connection = self.connect_database(source["user"], password, **options)
        except psycopg2.OperationalError as error:
            return str(error)
        with closing(connection), connection.cursor() as cursor:
            cursor.execute("SELECT current_user, count(*) FROM events")
            return str(cursor.fetchone()[0])


@pytest.mark.compose
@pytest.mark.timeout(300)
def test_what_the_files_say_logs_in_and_a_forgotten_last_file_opens_nothing(
    tmp_path: Path,
) -> None:
    if reason := missing_rights():
        pytest.skip(reason)
    with compose.only_run(), ExitStack() as cleanup:
        stack = GrafanaStack(compose.copy_checkout(tmp_path / "checkout"))
        stack.look_often()
        stack.environment["COMPOSE_FILE"] = os.pathsep.join(PLAIN)
        cleanup.enter_context(compose.cleared(stack))
        port = {"POSTGRES_PORT": str(free_port())}
        stack.settings |= port
        stack.environment |= port
        assert stack.log_in(stack.start(*PLAIN)) == "reader"
        assert stack.log_in(stack.start(*PLAIN, READER_PASSWORD=PASSWORD)) == "reader"
        stack.down()
        stack.setup()
        assert "no encryption" in stack.log_in(stack.start(*FORGOTTEN, READER_PASSWORD="reader"))
        source = stack.start(*SECURE, READER_PASSWORD="reader")
        assert stack.log_in(source) == "reader"
        assert source["jsonData"]["sslmode"] == "verify-full"
        assert source["secureJsonData"]["password"] == stack.secret("database_reader_password")
        source["secureJsonData"]["password"] = "reader"
        assert "password authentication failed" in stack.log_in(source)
