// The charts of one or more devices: draws them, moves the period, keeps both up to date.
//
// The address holds all of it: which devices, which period. What it does not: decide how finely
// a period is drawn; the server does.

import { clockTime, day, duration, getJson, now, Problem, refresh, whileVisible } from "./page.js";

const REFRESH_MS = 5_000;
const SHORTEST_MS = 10_000;
const LONGEST_MS = 20 * 365 * 86_400_000;
const RANGES_MS = {
  "1h": 3_600_000,
  "24h": 86_400_000,
  "7d": 7 * 86_400_000,
  "30d": 30 * 86_400_000,
  "1y": 365 * 86_400_000,
};
const POINTS_SHOWN_MAX = 200; // then the line alone

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const seriesColor = (number) => css(`--series-${number % 8}`);

// --- the period ----------------------------------------------------------------------

function parameters() {
  return new URLSearchParams(location.search);
}

function range() {
  return parameters().has("from") ? "" : (parameters().get("range") ?? "24h");
}

// From when to when, in milliseconds since 1970.
function period() {
  const given = parameters();
  if (given.has("from")) return [Date.parse(given.get("from")), Date.parse(given.get("to"))];
  return [now() - RANGES_MS[range()], now()];
}

function show(change) {
  const wanted = parameters();
  for (const name of ["range", "from", "to"]) wanted.delete(name);
  for (const [name, value] of Object.entries(change)) wanted.set(name, value);
  history.pushState(null, "", `?${wanted}`);
  periodChanged();
}

function showBetween(from, to) {
  const middle = (from + to) / 2;
  const length = Math.min(LONGEST_MS, Math.max(SHORTEST_MS, to - from));
  const earliest = Math.max(0, middle - length / 2);
  show({
    from: new Date(earliest).toISOString(),
    to: new Date(earliest + length).toISOString(),
  });
}

function move(how) {
  const [from, to] = period();
  const length = to - from;
  if (how === "earlier") showBetween(from - length / 2, to - length / 2);
  if (how === "later") {
    // Into the future goes nothing: where the end is now, the period follows it again.
    const ended = to + length / 2 >= now();
    const same = Object.keys(RANGES_MS).find((name) => Math.abs(RANGES_MS[name] - length) < 2_000);
    if (ended && same) show({ range: same });
    else if (ended) showBetween(now() - length, now());
    else showBetween(from + length / 2, to + length / 2);
  }
  if (how === "in") showBetween(from + length / 4, to - length / 4);
  if (how === "out") {
    const later = Math.min(length / 2, Math.max(0, now() - to));
    showBetween(to + later - 2 * length, to + later);
  }
}

// As <input type="datetime-local"> wants it, in the viewer's zone.
function localTime(ms) {
  const date = new Date(ms);
  return `${day(date)}T${clockTime(date, true)}`;
}

function showPeriodInForm() {
  const form = document.querySelector("form.own");
  if (form.contains(document.activeElement)) return;
  const [from, to] = period();
  form.elements.from.value = localTime(from);
  form.elements.to.value = localTime(to);
}

// --- a chart -------------------------------------------------------------------------

function axes(labels, unit) {
  const grid = { stroke: css("--grid"), width: 1 };
  const common = { stroke: css("--soft"), grid, ticks: grid, font: "12px system-ui, sans-serif" };
  const year = 365 * 86_400;
  const times = [
    // From which step on; its format; and what is written below it where the year, the month, the
    // day, the hour, the minute changes.
    [year, "{YYYY}", null, null, null, null, null, null, 1],
    [28 * 86_400, "{YYYY}-{MM}", null, null, null, null, null, null, 1],
    [86_400, "{MM}-{DD}", "\n{YYYY}", null, null, null, null, null, 1],
    [3_600, "{HH}:{mm}", "\n{YYYY}-{MM}-{DD}", null, "\n{MM}-{DD}", null, null, null, 1],
    [60, "{HH}:{mm}", "\n{YYYY}-{MM}-{DD}", null, "\n{MM}-{DD}", null, null, null, 1],
    [1, "{HH}:{mm}:{ss}", "\n{YYYY}-{MM}-{DD}", null, "\n{MM}-{DD}", null, null, null, 1],
    [0.001, ":{ss}.{fff}", "\n{MM}-{DD} {HH}:{mm}", null, null, null, null, null, 1],
  ];
  const widest = (plot, values) => {
    plot.ctx.font = common.font;
    const widths = (values ?? []).map((value) => plot.ctx.measureText(value).width);
    return Math.ceil(Math.max(24, ...widths) / devicePixelRatio) + 14;
  };
  return [
    { ...common, values: times, space: 70 },
    { ...common, ...labels, label: unit, labelSize: 18, labelFont: common.font, size: widest },
  ];
}

// Without the noise of binary fractions: 0.3, not 0.30000000000000004.
function plain(value) {
  return String(Number(value.toPrecision(12)));
}

function value(number, decimals) {
  const size = Math.abs(number);
  if (size !== 0 && (size >= 1e15 || size < 1e-6)) return number.toPrecision(6);
  return number.toFixed(decimals);
}

function at(seconds, step) {
  const date = new Date(seconds * 1000);
  return `${day(date)} ${clockTime(date, step < 60)}`;
}

// One <section class="chart">: a type of event.
class Chart {
  constructor(section) {
    this.section = section;
    this.place = section.querySelector(".plots");
    this.plots = [];
    this.isVisible = false;
    this.isDue = true;
    this.shape = "";
  }

  // Asks for what the address says, and draws it; says how long that took.
  async load() {
    const started = performance.now();
    const asked = location.search;
    const wanted = parameters();
    wanted.set("type", this.section.dataset.type);
    this.isDue = false;
    try {
      const data = await getJson(`/chart.json?${wanted}`);
      if (asked === location.search) this.draw(data);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      this.isDue = true;
      if (asked === location.search) this.say(error.message);
      if (!error.hasCost) return 0;
    }
    return performance.now() - started;
  }

  say(text) {
    this.clear();
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = text;
    this.place.replaceChildren(note);
  }

  clear() {
    for (const { plot } of this.plots) plot.destroy();
    this.plots = [];
    this.shape = "";
  }

  redraw() {
    if (!this.data) return;
    this.clear();
    this.draw(this.data);
  }

  draw(data) {
    this.data = data;
    if (data.plots.length === 0 && data.states.length === 0) {
      this.say("Nothing in this period.");
      return;
    }
    // While only the points change, the plots stay.
    const shape = JSON.stringify([
      data.plots.map(({ unit, lines }) => [unit, lines.map(({ device }) => device)]),
      data.states.map(({ device }) => device),
      data.step_seconds > 0,
    ]);
    if (shape !== this.shape) {
      this.clear();
      this.shape = shape;
      this.place.replaceChildren();
      for (const plot of data.plots) this.plots.push(this.linePlot(data, plot));
      if (data.states.length) this.plots.push(this.statePlot(data));
    }
    this.plots.forEach((shown, number) => shown.update(data, data.plots[number]));
  }

  frame(kind) {
    const figure = document.createElement("figure");
    figure.className = kind;
    figure.tabIndex = 0;
    const readout = document.createElement("figcaption");
    figure.append(readout);
    this.place.append(figure);
    return [figure, readout];
  }

  options(figure, height, more) {
    return {
      width: Math.max(200, figure.clientWidth),
      height,
      legend: { show: false },
      cursor: {
        sync: { key: "time", setSeries: false },
        drag: { x: true, y: false, setScale: false },
        points: { size: 6 },
        bind: { dblclick: () => () => move("out") },
      },
      hooks: {
        setSelect: [
          (plot) => {
            const { left, width } = plot.select;
            if (width < 4) return;
            const [from, to] = [left, left + width].map((x) => plot.posToVal(x, "x") * 1000);
            plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
            showBetween(from, to);
          },
        ],
        ...more.hooks,
      },
      ...more.options,
    };
  }

  linePlot(data, { unit, lines }) {
    const [figure, readout] = this.frame("lines");
    let current = data;
    let own = { unit, lines };
    const series = [{}];
    const bands = [];
    lines.forEach(({ device }, number) => {
      const color = seriesColor(this.colorOf(device, number));
      series.push({
        label: device,
        stroke: color,
        width: 1.5,
        points: { size: 4, fill: color, show: (plot, place, from, to) => to - from <= 60, filter },
      });
      if (data.step_seconds === 0) return;
      const edge = { stroke: "transparent", width: 0, points: { show: false } };
      bands.push({ series: [series.length + 1, series.length], fill: `${color}38` });
      series.push({ ...edge, label: "least" }, { ...edge, label: "greatest" });
    });
    const options = this.options(figure, 220, {
      options: {
        series,
        bands,
        axes: axes({ values: (plot, splits) => splits.map(plain) }, unit),
        scales: { x: { time: true, range: () => [current.from, current.to] } },
      },
      hooks: { setCursor: [(plot) => readout.replaceChildren(...describe(plot))] },
    });
    const columns = () => {
      const tables = own.lines.map((line) =>
        [line.at, line.mean, line.least, line.greatest].filter(Boolean),
      );
      return tables.length === 1 ? tables[0] : uPlot.join(tables);
    };
    const describe = (plot) => {
      const place = plot.cursor.idx;
      if (place === null || place === undefined) return [summary(current, own)];
      const words = [at(plot.data[0][place], current.step_seconds)];
      const width = current.step_seconds === 0 ? 1 : 3;
      own.lines.forEach(({ device }, number) => {
        const near = nearest(plot.data[1 + number * width], place);
        if (near === null) return;
        const [mean, least, greatest] = [0, 1, 2].map(
          (column) => plot.data[1 + number * width + column]?.[near],
        );
        const name = own.lines.length > 1 ? `${device} ` : "";
        const unitText = own.unit ? ` ${own.unit}` : "";
        if (width === 1) {
          words.push(`${name}${value(mean, own.decimals)}${unitText}`);
        } else {
          const [low, high] = [least, greatest].map((end) => value(end, own.decimals));
          words.push(`${name}${value(mean, own.decimals + 1)}${unitText} (${low} to ${high})`);
        }
      });
      return [words.join("  |  ")];
    };
    const plot = new uPlot(options, columns(), figure);
    figure.prepend(readout);
    return {
      plot,
      figure,
      height: 220,
      update(newData, newOwn) {
        current = newData;
        own = newOwn;
        figure.setAttribute("aria-label", summary(current, own));
        plot.setData(columns());
        readout.replaceChildren(...describe(plot));
      },
    };
  }

  statePlot(data) {
    const [figure, readout] = this.frame("states");
    let current = data;
    const count = data.states.length;
    const height = 70 + 30 * count;
    const options = this.options(figure, height, {
      options: {
        series: [{}, { show: true, stroke: "transparent", points: { show: false } }],
        axes: axes(
          {
            splits: () => current.states.map((_, number) => number + 0.5),
            values: () => current.states.map(({ device }) => (count > 1 ? device : "")),
            grid: { show: false },
            ticks: { show: false },
          },
          "",
        ),
        scales: {
          x: { time: true, range: () => [current.from, current.to] },
          y: { range: () => [count, 0] },
        },
      },
      hooks: {
        draw: [(plot) => drawStates(plot, current)],
        setCursor: [(plot) => readout.replaceChildren(describe(plot))],
      },
    });
    const describe = (plot) => {
      const left = plot.cursor.left;
      if (left === undefined || left < 0) return stateSummary(current);
      const seconds = plot.posToVal(left, "x");
      const words = [at(seconds, 1)];
      for (const { device, at: since, text } of current.states) {
        const place = since.findLastIndex((start) => start <= seconds);
        if (place >= 0) words.push(`${count > 1 ? `${device} ` : ""}${text[place]}`);
      }
      return words.join("  |  ");
    };
    const plot = new uPlot(options, [[data.from, data.to], [null, null]], figure);
    figure.prepend(readout);
    return {
      plot,
      figure,
      height,
      update(newData) {
        current = newData;
        figure.setAttribute("aria-label", stateSummary(current));
        plot.setData([[current.from, current.to], [null, null]]);
        readout.replaceChildren(describe(plot));
      },
    };
  }

  // The colour of a device is the same in each chart: by its place in the heading.
  colorOf(device, number) {
    const names = [...document.querySelectorAll("h1 .chosen bdi")].map((name) => name.textContent);
    const place = names.indexOf(device);
    return place < 0 ? number : place;
  }
}

// Which points are drawn as dots: all where they are few, else those with a gap on both sides,
// which no line shows.
function filter(plot, place, show, gaps) {
  const values = plot.data[place];
  if (show && values.length <= POINTS_SHOWN_MAX) return null;
  const alone = [];
  let previous = null;
  for (let index = 0; index < values.length; index++) {
    if (values[index] === undefined) continue;
    if (values[index] !== null && previous === null) {
      let next = index + 1;
      while (next < values.length && values[next] === undefined) next++;
      if (next >= values.length || values[next] === null) alone.push(index);
    }
    previous = values[index];
  }
  return alone;
}

// Devices do not speak at the same moment: the place of the value that is next to the cursor.
function nearest(values, place) {
  for (let distance = 0; distance < 100; distance++) {
    for (const index of [place - distance, place + distance]) {
      if (values[index] !== null && values[index] !== undefined) return index;
    }
  }
  return null;
}

function summary({ step_seconds: step }, { lines }) {
  const points = lines.reduce((sum, { mean }) => sum + mean.filter((y) => y !== null).length, 0);
  if (step === 0) return `${points} reading${points === 1 ? "" : "s"}`;
  return `each point is the mean of ${duration(step)}, the band from the least to the greatest`;
}

function stateSummary({ states }) {
  const changes = states.reduce((sum, { at: since }) => sum + since.length, 0);
  const cut = states.some(({ truncated }) => truncated) ? "; the earlier ones are not shown" : "";
  return `${changes} state${changes === 1 ? "" : "s"}${cut}`;
}

function drawStates(plot, data) {
  const { ctx } = plot;
  const texts = [...new Set(data.states.flatMap(({ text }) => text))].sort();
  const ratio = devicePixelRatio;
  const x = (seconds) => plot.valToPos(seconds, "x", true);
  const end = Math.min(data.to, now() / 1000);
  ctx.save();
  ctx.beginPath();
  ctx.rect(plot.bbox.left, plot.bbox.top, plot.bbox.width, plot.bbox.height);
  ctx.clip();
  ctx.font = `${12 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  data.states.forEach(({ at: since, text }, number) => {
    const top = plot.valToPos(number + 0.12, "y", true);
    const bottom = plot.valToPos(number + 0.88, "y", true);
    since.forEach((start, place) => {
      const left = Math.max(x(start), plot.bbox.left);
      const right = x(since[place + 1] ?? Math.max(end, start));
      const width = Math.max(right - left, 1);
      const color = texts.indexOf(text[place]);
      ctx.fillStyle = css(`--state-${color % 8}`);
      ctx.fillRect(left, top, width, bottom - top);
      const room = width - 10 * ratio;
      if (room > ctx.measureText(text[place]).width) {
        ctx.fillStyle = css("--state-text");
        ctx.fillText(text[place], left + 5 * ratio, (top + bottom) / 2);
      }
    });
  });
  ctx.restore();
}

// --- all of them ---------------------------------------------------------------------

const charts = new Map();

const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const chart = charts.get(target);
      if (!chart) continue;
      chart.isVisible = isIntersecting;
      if (isIntersecting && chart.isDue) chart.load();
    }
  },
  { rootMargin: "200px" },
);

const sized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    for (const { plot, figure, height } of charts.get(target)?.plots ?? []) {
      const width = Math.max(200, figure.clientWidth);
      if (width !== plot.width) plot.setSize({ width, height });
    }
  }
});

function findCharts() {
  for (const section of charts.keys()) if (!section.isConnected) charts.delete(section);
  for (const section of document.querySelectorAll("section.chart")) {
    if (charts.has(section)) continue;
    charts.set(section, new Chart(section));
    seen.observe(section);
    sized.observe(section);
  }
}

async function loadVisible() {
  let tookMs = 0;
  for (const chart of charts.values()) {
    if (chart.isVisible) tookMs += await chart.load();
    else chart.isDue = true;
  }
  return tookMs;
}

function periodChanged() {
  showPeriodInForm();
  loadVisible();
  refresh(); // its links and buttons are the server's
}

// A step of a year is a day; to look every five seconds whether it changed is of no use.
function pauseMs() {
  const steps = [...charts.values()].map(({ data }) => data?.step_seconds ?? 0);
  return Math.max(REFRESH_MS, 100 * Math.max(0, ...steps));
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-range]");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    show({ range: link.dataset.range });
  }
  const button = event.target.closest("button[data-move]");
  if (button) move(button.dataset.move);
});

document.addEventListener("submit", (event) => {
  if (event.target.matches("form.own")) {
    event.preventDefault();
    const { from, to } = event.target.elements;
    const [start, end] = [from, to].map(({ value: local }) => new Date(local).getTime());
    to.setCustomValidity(start < end ? "" : "must be later than the beginning");
    if (event.target.reportValidity()) {
      document.activeElement.blur();
      showBetween(start, end);
    }
  } else if (event.target.matches("form.compare")) {
    event.preventDefault();
    const wanted = parameters();
    wanted.append("id", event.target.elements[event.target.elements.length - 2].value);
    location.search = String(wanted);
  }
});

// The names of the other devices, of which there may be a thousand, only when they are of use.
document.addEventListener("focusin", async ({ target }) => {
  const names = target.matches("form.compare input") ? target.list : null;
  if (!names || names.options.length) return;
  try {
    const shown = parameters().getAll("id");
    const others = (await getJson("/devices.json")).filter((id) => !shown.includes(id));
    names.replaceChildren(...others.map((id) => Object.assign(new Option(), { value: id })));
  } catch (error) {
    if (!(error instanceof Problem)) throw error; // the next refresh says what is wrong
  }
});

document.addEventListener("input", ({ target }) => {
  if (target.form?.matches("form.own")) target.form.elements.to.setCustomValidity("");
});

document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select") || event.ctrlKey || event.altKey) return;
  if (event.metaKey) return;
  const how = { ArrowLeft: "earlier", ArrowRight: "later", "+": "in", "-": "out" }[event.key];
  if (!how) return;
  event.preventDefault();
  move(how);
});

window.addEventListener("popstate", periodChanged);
document.addEventListener("refreshed", findCharts);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const chart of charts.values()) chart.redraw();
});

findCharts();
showPeriodInForm();
whileVisible(async () => {
  // What ended in the past does not change, or hardly.
  if (range() || [...charts.values()].some(({ isDue, isVisible }) => isDue && isVisible)) {
    if (range()) showPeriodInForm();
    return loadVisible();
  }
  return 0;
}, pauseMs);
