// What each view does: shows times in the viewer's zone, keeps itself up to date without jumping,
// and says so when it cannot. What it does not: draw charts (device.js, health.js).
//
// What devices sent is only ever written as text: never as HTML.

const REFRESH_MS = 5_000;
const ANSWER_MS = 20_000;
// What a refresh costs the server decides how often: it is asked for a twentieth of the time.
const LOAD_SHARE = 20;
const SPARKLINE_AGE_MS = 60_000;
const SPARKLINES_AT_ONCE = 25;

// --- times ---------------------------------------------------------------------------

// How far the server's clock is ahead of the viewer's.
let clockOffsetMs = 0;

export function now() {
  return Date.now() + clockOffsetMs;
}

const two = (number) => String(number).padStart(2, "0");

export function clockTime(date, withSeconds) {
  const seconds = withSeconds ? `:${two(date.getSeconds())}` : "";
  return `${two(date.getHours())}:${two(date.getMinutes())}${seconds}`;
}

export function day(date) {
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

export function duration(seconds) {
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 100 * 60) return `${Math.round(seconds / 60)} min`;
  if (seconds < 48 * 3600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

function ago(date) {
  const seconds = (now() - date.getTime()) / 1000;
  return seconds < 2 ? "now" : `${duration(seconds)} ago`;
}

function showTimes(root) {
  for (const element of root.querySelectorAll("time[data-time]")) {
    const date = new Date(element.dateTime);
    const today = day(date) === day(new Date(now()));
    const text = `${ago(date)}, ${today ? "" : `${day(date)} `}${clockTime(date, today)}`;
    if (element.textContent !== text) element.textContent = text;
    element.title = date.toString();
  }
  for (const element of root.querySelectorAll("[data-duration]")) {
    element.textContent = duration(Number(element.dataset.duration));
  }
}

// --- up to date ----------------------------------------------------------------------

export class Problem extends Error {
  constructor(text, status) {
    super(text);
    // Else the database is away, and asking again soon costs it nothing.
    this.hasCost = status === 504;
  }
}

// What an address answers, as JSON; throws Problem, with a text for people.
export async function getJson(address) {
  const response = await answer(address);
  const body = await response.json().catch(() => ({}));
  const { ok, status } = response;
  if (!ok) throw new Problem(body.problem ?? `${address}: ${status}`, status);
  return body;
}

async function answer(address) {
  try {
    return await fetch(address, { signal: AbortSignal.timeout(ANSWER_MS) });
  } catch {
    throw new Problem("The page's server does not answer.");
  }
}

export function showTrouble(text) {
  const element = document.getElementById("trouble");
  const shown = text ? `${text} Trying again; what is below may be old.` : "";
  if (element.textContent !== shown) element.textContent = shown;
  element.hidden = !text;
}

// Makes `element` what `wanted` is, and touches only what differs: so the scroll position, the
// focus and the selection stay. What has data-keep is its script's.
function become(element, wanted) {
  if ("keep" in element.dataset) return;
  for (const { name } of [...element.attributes]) {
    if (!wanted.hasAttribute(name)) element.removeAttribute(name);
  }
  for (const { name, value } of wanted.attributes) {
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
  }
  const keyed = new Map();
  for (const child of element.children) keyed.set(keyOf(child), child);
  let place = element.firstChild;
  for (const child of [...wanted.childNodes]) {
    const key = keyOf(child);
    let same = key ? keyed.get(key) : place;
    if (same && (same.nodeName !== child.nodeName || keyOf(same) !== key)) same = null;
    if (!same) {
      element.insertBefore(document.importNode(child, true), place);
      continue;
    }
    if (same === place) place = place.nextSibling;
    else element.insertBefore(same, place);
    if (same.nodeType === Node.ELEMENT_NODE) become(same, child);
    else if (same.data !== child.data) same.data = child.data;
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

function keyOf(node) {
  // Not node.id: of a form with a field named so that is the field.
  return node.dataset?.key ?? node.getAttribute?.("id") ?? undefined;
}

let refreshing = null;

// Asks for this view again and shows what has changed. Once at a time: who calls meanwhile gets
// another one behind it, for the address that it is then.
export async function refresh() {
  while (refreshing) await refreshing;
  refreshing = refreshOnce();
  try {
    return await refreshing;
  } finally {
    refreshing = null;
  }
}

async function refreshOnce() {
  const started = performance.now();
  try {
    const address = location.href;
    const response = await answer(address);
    const wanted = new DOMParser().parseFromString(await response.text(), "text/html");
    if (address !== location.href) return performance.now() - started;
    const problem = wanted.getElementById("problem");
    if (problem) throw new Problem(problem.textContent, response.status);
    // A view that began with trouble has no scripts of its own yet.
    if (document.getElementById("problem")) location.reload();
    showTrouble("");
    readClock(wanted.body);
    document.title = wanted.title;
    become(document.querySelector("main"), wanted.querySelector("main"));
    showTimes(document);
    document.dispatchEvent(new Event("refreshed"));
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    const own = document.getElementById("problem");
    if (own) own.textContent = error.message;
    else showTrouble(error.message);
    if (!error.hasCost) return 0;
  }
  return performance.now() - started;
}

function readClock(body) {
  clockOffsetMs = Number(body.dataset.now) - Date.now();
}

// Calls `task`, which says how long it took, again and again while somebody looks.
export function whileVisible(task, pauseMs) {
  let timer = 0;
  const turn = async () => {
    timer = 0;
    const tookMs = await task();
    if (!document.hidden) timer = setTimeout(turn, Math.max(pauseMs(), LOAD_SHARE * tookMs));
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) {
      clearTimeout(timer);
      timer = 0;
    } else if (!timer) {
      timer = setTimeout(turn, 0);
    }
  });
  timer = setTimeout(turn, pauseMs());
}

// --- a day at a glance ---------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function sparkline(means) {
  const values = means.filter((mean) => mean !== null);
  const least = Math.min(...values);
  const range = Math.max(...values) - least || 1;
  const y = (mean) => (15 - (14 * (mean - least)) / range).toFixed(2);
  let path = "";
  let alone = "";
  means.forEach((mean, place) => {
    if (mean === null) return;
    const [before, after] = [means[place - 1] ?? null, means[place + 1] ?? null];
    const point = `${place + 0.5} ${y(mean)}`;
    // A line without length is drawn as a dot.
    if (before === null && after === null) alone += `M${point}h0`;
    else path += before === null ? `M${point}` : `L${point}`;
  });
  const drawing = svg("svg", { viewBox: `0 0 ${means.length} 16`, preserveAspectRatio: "none" });
  drawing.setAttribute("aria-hidden", "true");
  if (path) drawing.append(svg("path", { d: path }));
  if (alone) drawing.append(svg("path", { d: alone, class: "alone" }));
  return drawing;
}

// What devices are called may be `constructor`, or whatever else each object has.
function own(object, name) {
  return object && Object.hasOwn(object, name) ? object[name] : undefined;
}

const drawnAt = new WeakMap();
const inSight = new Set();

async function drawSparklines() {
  const due = [...inSight].filter((row) => {
    if (!row.isConnected) inSight.delete(row);
    return row.isConnected && now() - (drawnAt.get(row) ?? 0) > SPARKLINE_AGE_MS;
  });
  for (let start = 0; start < due.length; start += SPARKLINES_AT_ONCE) {
    const rows = due.slice(start, start + SPARKLINES_AT_ONCE);
    for (const row of rows) drawnAt.set(row, now());
    const query = rows.map((row) => ["id", row.dataset.device]);
    try {
      const lines = await getJson(`/sparklines.json?${new URLSearchParams(query)}`);
      for (const row of rows) {
        for (const place of row.querySelectorAll(".sparkline")) {
          const means = own(own(lines, row.dataset.device), place.dataset.type);
          place.replaceChildren(...(means ? [sparkline(means)] : []));
        }
      }
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      for (const row of rows) drawnAt.delete(row);
      return; // the next refresh says what is wrong, and comes here again
    }
  }
}

function watchRows() {
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) inSight.add(target);
      else inSight.delete(target);
    }
    drawSparklines();
  });
  const observe = () => {
    for (const row of document.querySelectorAll("tr[data-device]")) seen.observe(row);
    drawSparklines();
  };
  document.addEventListener("refreshed", observe);
  observe();
}

// --- search --------------------------------------------------------------------------

function searchWhileTyping() {
  document.addEventListener("input", (event) => {
    if (event.target.id !== "search") return;
    const parameters = new URLSearchParams(location.search);
    parameters.delete("start");
    parameters.set("q", event.target.value);
    if (!event.target.value) parameters.delete("q");
    const query = String(parameters);
    history.replaceState(null, "", query ? `?${query}` : location.pathname);
    refresh();
  });
  document.addEventListener("keydown", (event) => {
    const search = document.getElementById("search");
    if (event.key !== "/" || !search || event.target.closest("input, textarea")) return;
    event.preventDefault();
    search.focus();
  });
}

readClock(document.body);
showTimes(document);
searchWhileTyping();
if (location.pathname === "/") watchRows();
setInterval(() => showTimes(document), 1_000);
const isFinal = document.getElementById("problem") && !document.querySelector("[data-retry]");
if (!isFinal) whileVisible(refresh, () => REFRESH_MS);
