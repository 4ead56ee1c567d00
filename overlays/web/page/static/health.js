// The parts of the health view that may take the database a while: each is asked for by itself
// and says itself what went wrong.

import { clockTime, day, duration, getJson, Problem, whileVisible } from "./page.js";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Fills the element `id` with what `make` makes of the answer, again after each pause.
function panel(id, address, pauseMs, make) {
  const place = document.getElementById(id);
  const load = async () => {
    const started = performance.now();
    try {
      make(place, await getJson(address));
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      place.replaceChildren(element("p", error.message, "warning"));
      if (!error.hasCost) return 0;
    }
    return performance.now() - started;
  };
  load();
  whileVisible(load, () => pauseMs);
}

function table(names, rows) {
  const made = element("table");
  const head = element("tr");
  const kind = (column) => (column ? "number" : "");
  names.forEach((name, column) => head.append(element("th", name, kind(column))));
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr");
    row.forEach((cell, column) => line.append(element("td", cell, kind(column))));
    body.append(line);
  }
  const header = element("thead");
  header.append(head);
  made.append(header, body);
  return made;
}

function seconds(number) {
  return number < 10 ? `${number.toFixed(3)} s` : duration(number);
}

let drawn = null;

function drawRate(place, { at, events }) {
  drawn?.destroy();
  const total = events.reduce((sum, count) => sum + count, 0);
  const caption = element("p", `${total} in all, at most ${Math.max(0, ...events)} in a minute`);
  caption.className = "note";
  const figure = element("figure");
  figure.setAttribute("aria-label", caption.textContent);
  place.replaceChildren(caption, figure);
  const grid = { stroke: css("--grid"), width: 1 };
  const axis = { stroke: css("--soft"), grid, ticks: grid, font: "12px system-ui, sans-serif" };
  const times = [
    [3600, "{HH}:{mm}", "\n{MM}-{DD}", null, "\n{MM}-{DD}", null, null, null, 1],
    [60, "{HH}:{mm}", "\n{MM}-{DD}", null, "\n{MM}-{DD}", null, null, null, 1],
  ];
  const color = css("--series-0");
  drawn = new uPlot(
    {
      width: Math.max(200, figure.clientWidth),
      height: 180,
      legend: { show: false },
      cursor: { drag: { setScale: false, x: false, y: false } },
      series: [
        {},
        { stroke: color, fill: `${color}55`, paths: uPlot.paths.stepped({ align: 1 }), points: { show: false } },
      ],
      axes: [
        { ...axis, values: times },
        { ...axis, size: 60 },
      ],
      scales: { y: { range: (plot, least, most) => [0, Math.max(1, most) * 1.05] } },
    },
    [at, events],
    figure,
  );
}

panel("rate", "/rate.json", 30_000, drawRate);

panel("latency", "/latency.json", 60_000, (place, hours) => {
  if (hours.length === 0) {
    place.replaceChildren(element("p", "No event of the last 24 hours has a time that can be right.", "note"));
    return;
  }
  const rows = hours.map(({ hour, events, ...times }) => {
    const date = new Date(hour * 1000);
    const named = ["p50", "p95", "p99", "max"].map((name) => seconds(times[name]));
    return [`${day(date).slice(5)} ${clockTime(date)}`, String(events), ...named];
  });
  place.replaceChildren(table(["hour", "events", "p50", "p95", "p99", "max"], rows));
});

panel("missing", "/missing.json", 300_000, (place, { gaps, events, rows }) => {
  if (gaps === 0) {
    place.replaceChildren(element("p", "None: no device that numbers its events has a gap."));
    return;
  }
  const text = `${events} missing in ${gaps} gap${gaps === 1 ? "" : "s"}`;
  const shown = rows.map(({ device, boot, first, last }) => [device, boot, first, last].map(String));
  const cut = rows.length < gaps ? [element("p", `The first ${rows.length}.`, "note")] : [];
  place.replaceChildren(
    element("p", text, "warning"),
    table(["device", "boot", "first", "last"], shown),
    ...cut,
  );
});

window.addEventListener("resize", () => {
  const figure = document.querySelector("#rate figure");
  if (drawn && figure) drawn.setSize({ width: Math.max(200, figure.clientWidth), height: 180 });
});
