"""One frame of the view: from what was seen to lines of text.

What it does: lays out, cuts to the terminal's size, and makes texts harmless. What it does
not: write to a terminal, read a clock, or hear anything.

Invariant: no line is wider than the terminal, there are no more lines than it has, and no
character in them controls it, whatever was published.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import islice
from typing import NamedTuple

from ingester.progress import STATUS_SECONDS, State
from ingester.top.traffic import Ingester, Rate, Status, Traffic

# What stays of the head on a small terminal, and what the tables get before the head has more.
HEAD_LINES_MIN = 5
TABLE_LINES_MIN = 12
LABEL_COLUMNS = 10
# Of a column, but for the last: device ids have up to 64 characters, types up to 100.
CELL_COLUMNS_MAX = 24
# A status comes every 10 s; when two are missing, the last one says little.
STATUS_SECONDS_MAX = 2.5 * STATUS_SECONDS


class Style(NamedTuple):
    """What to draw with: bars of eight heights, and the mark of a text that was cut."""

    bars: str
    mark: str
    is_ascii: bool


UNICODE = Style("▁▂▃▄▅▆▇█", "…", is_ascii=False)
ASCII = Style("_.:-=+*#", "~", is_ascii=True)


def frame(traffic: Traffic, columns: int, rows: int, style: Style = UNICODE) -> list[str]:
    """Return the lines to show on a terminal of this size."""
    lines = _head(traffic, columns, rows, style)
    left = rows - len(lines)
    gap = [""] if left >= TABLE_LINES_MIN else []
    heading = len(gap) + 1
    # A third for the dead letters, if there are as many; at least one, if there is room.
    letters = min(max(1, left // 3 - heading), max(1, len(traffic.last_dead_letters)))
    letters = letters if left >= 2 * heading + 2 else 0
    events = left - heading - (letters + heading if letters else 0)
    lines += [*gap, "LAST EVENTS", *_events(traffic, columns, events, style)]
    if letters:
        lines += [*gap, "LAST DEAD LETTERS", *_dead_letters(traffic, columns, letters, style)]
    return [_fit(_clean(line.rstrip(), style), columns, style) for line in lines[:rows]]


def _head(traffic: Traffic, columns: int, rows: int, style: Style) -> list[str]:
    """Return what is above the tables: on a small terminal the most important lines alone."""
    facts = [ingester.facts for ingester in traffic.ingesters.values()]
    version = _clean(facts[0].version or "", style)
    title = f"homelab ingester {version}".ljust(columns - 12) + f"{traffic.at:%H:%M:%S} UTC"
    events, acks = traffic.events, traffic.acks
    ranked = [
        (7, title),
        (0, _labelled("ingester", _state(traffic))),
        (1, _labelled("broker", _broker(traffic))),
        # Without a connection we do not know it, and the error may be long.
        (2, _labelled("database", _database(traffic)) if traffic.is_connected else traffic.error),
        (5, _labelled("in all", _counters(facts))),
        (6, _labelled("queues", _queues(facts))),
        (4, _labelled("ACKs", _latency(traffic))),
        (3, _labelled("events/s", _rate(events, traffic.now, columns, style))),
        (8, _labelled("ACKs/s", _rate(acks, traffic.now, columns, style))),
    ]
    number = max(HEAD_LINES_MIN, rows - TABLE_LINES_MIN)
    return [line for rank, line in ranked if rank < number][:rows]


def _labelled(label: str, text: str) -> str:
    return label.ljust(LABEL_COLUMNS) + text


def _state(traffic: Traffic) -> str:
    """Return how the ingester is; of several, each that is in trouble, the worst first."""
    if len(traffic.ingesters) == 1:
        return _state_of(traffic, *traffic.ingesters.values())
    ranked = _ranked(traffic)
    parts = [
        f"{number}: {_state_of(traffic, traffic.ingesters[number])}"
        for number in ranked
        if _trouble(traffic, number)
    ]
    well = len(ranked) - len(parts)
    return "  ".join([*parts, f"{well} online"] if well else parts)


def _state_of(traffic: Traffic, ingester: Ingester) -> str:
    status = ingester.status
    if status is None:
        return "unknown: no status has been heard"
    if status.state is None:
        return "unknown: its status cannot be read"
    text = str(status.state)
    if status.since:
        text += f" since {_moment(status.since, traffic.at)}"
        text += f" ({_span((traffic.at - status.since).total_seconds())})"
    if not traffic.is_connected:
        text = f"unknown; was {text}"
    elif status.state is not State.OFFLINE and _is_silent(traffic, ingester):
        text = f"silent for {_span(traffic.now - ingester.status_at)}; was {text}"
    return text


def _is_silent(traffic: Traffic, ingester: Ingester) -> bool:
    return traffic.now - ingester.status_at > STATUS_SECONDS_MAX


def _trouble(traffic: Traffic, number: str) -> int:
    """Return how bad it is with an ingester; 0 if nothing is known to be wrong."""
    ingester = traffic.ingesters[number]
    state = ingester.status.state if ingester.status else None
    if not traffic.is_connected or state in (None, State.OFFLINE) or _is_silent(traffic, ingester):
        return 2
    return 1 if state is State.WAITING_FOR_DATABASE else 0


def _ranked(traffic: Traffic) -> list[str]:
    """Return the numbers of the ingesters, those in most trouble first."""
    return sorted(
        traffic.ingesters, key=lambda number: (-_trouble(traffic, number), len(number), number)
    )


def _worst(traffic: Traffic) -> tuple[str, Ingester]:
    """Return the ingester in most trouble, and what to call it."""
    number = _ranked(traffic)[0]
    return f"ingester {number}".rstrip(), traffic.ingesters[number]


def _broker(traffic: Traffic) -> str:
    if not traffic.is_connected:
        return f"view: not connected since {_moment(traffic.changed_at, traffic.at)}, trying again"
    name, ingester = _worst(traffic)
    state = ingester.status.state if ingester.status else None
    words = {None: "unknown", State.OFFLINE: "not connected"}
    return f"{name}: {words.get(state, 'connected')}  view: connected  ({traffic.broker})"


def _database(traffic: Traffic) -> str:
    name, ingester = _worst(traffic)
    state = ingester.status.state if ingester.status else None
    if state in (None, State.OFFLINE):
        return f"{name}: unknown"
    if state is State.WAITING_FOR_DATABASE:
        return f"{name}: not connected  events wait in the broker"
    milliseconds = ingester.facts.database_round_trip_ms
    return f"{name}: connected  answers in {_milliseconds(milliseconds)}"


def _counters(facts: Sequence[Status]) -> str:
    return "  ".join(
        f"{name} {_number(_sum(of_one.counters.get(name) for of_one in facts))}"
        for name in ("stored", "duplicates", "rejected")
    )


def _queues(facts: Sequence[Status]) -> str:
    in_hand = _number(_sum(of_one.in_hand for of_one in facts))
    # One broker says it to each of them.
    dropped = [number for of_one in facts if (number := of_one.broker_dropped) is not None]
    return f"in hand {in_hand}  dropped by the broker {_number(max(dropped, default=None))}"


def _sum(numbers: Iterable[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _latency(traffic: Traffic) -> str:
    half, most = traffic.latency_ms(0.5), traffic.latency_ms(0.99)
    if half is None:
        return "none yet for an event that was seen"
    last = f"of the last {len(traffic.latencies_ms):,}"
    return f"p50 {_milliseconds(half)}  p99 {_milliseconds(most)}  {last}"


def _rate(rate: Rate, now: float, columns: int, style: Style) -> str:
    """Return the rate, and as much of its history as fits behind it, as bars."""
    text = f"{rate.per_second(now):8,.1f}  "
    room = max(0, columns - LABEL_COLUMNS - len(text))
    history = rate.history(now)
    last = history[len(history) - min(room, len(history)) :]
    if not any(last):
        return text
    # Rounded up: nothing but nothing is as low as nothing.
    heights = [-(-number * (len(style.bars) - 1) // max(last)) for number in last]
    return text + "".join(style.bars[height] for height in heights)


def _events(traffic: Traffic, columns: int, rows: int, style: Style) -> list[str]:
    return _table(
        [
            (f"{event.at:%H:%M:%S}", event.device_id, event.event_type, event.value)
            for event in islice(reversed(traffic.last_events), max(0, rows))
        ],
        columns,
        style,
    )


def _dead_letters(traffic: Traffic, columns: int, rows: int, style: Style) -> list[str]:
    return _table(
        [
            (f"{letter.at:%H:%M:%S}", letter.letter_id, letter.reason, letter.device_id,
             letter.error)
            for letter in islice(reversed(traffic.last_dead_letters), max(0, rows))
        ],
        columns,
        style,
    )  # fmt: skip


def _table(rows: Sequence[tuple[str, ...]], columns: int, style: Style) -> list[str]:
    """Return the rows with their cells below each other, as wide as they need to be."""
    if not rows:
        return ["none yet"]
    cell_columns_max = min(CELL_COLUMNS_MAX, columns // (len(rows[0]) - 1))
    cleaned = [[_clean(cell, style) for cell in row] for row in rows]
    widths = [
        min(cell_columns_max, max(_width(row[i]) for row in cleaned))
        for i in range(len(rows[0]) - 1)
    ]
    lines = []
    for *cells, last in cleaned:
        fitted = [_fit(cell, width, style) for cell, width in zip(cells, widths, strict=True)]
        padding = [" " * (w - _width(cell)) for cell, w in zip(fitted, widths, strict=True)]
        padded = [cell + spaces for cell, spaces in zip(fitted, padding, strict=True)]
        lines.append("  ".join([*padded, last]))
    return lines


# --- characters ------------------------------------------------------------------------


def _clean(text: str, style: Style) -> str:
    """Return the text without what a terminal might obey, or not be able to show."""
    # Not printable are control and format characters (escapes, a change of the direction),
    # surrogates, all spaces but one, and what Unicode has not assigned yet.
    if not text.isprintable():
        text = "".join(character if character.isprintable() else "?" for character in text)
    return text.encode("ascii", "replace").decode("ascii") if style.is_ascii else text


def _columns(character: str) -> int:
    """Return how many columns of the terminal a character takes."""
    if unicodedata.category(character) in ("Mn", "Me"):  # on top of the one before
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _width(text: str) -> int:
    return len(text) if text.isascii() else sum(map(_columns, text))


def _fit(text: str, columns: int, style: Style) -> str:
    """Return the text, cut if it is wider than so many columns."""
    if _width(text) <= columns:
        return text
    kept, left = 0, columns - len(style.mark)
    for character in text:
        left -= _columns(character)
        if left < 0:
            break
        kept += 1
    return text[:kept] + style.mark[:columns]


# --- numbers and times -------------------------------------------------------------------


def _number(number: float | None) -> str:
    return "?" if number is None else f"{number:,.0f}"


def _milliseconds(number: float | None) -> str:
    return "?" if number is None else f"{number:,.{0 if number >= 10 else 1}f} ms"


def _moment(moment: datetime, at: datetime) -> str:
    """Return the time of the day; with the date if it is another one than today's."""
    return f"{moment:%H:%M:%S}" if moment.date() == at.date() else f"{moment:%Y-%m-%d %H:%M}"


def _span(seconds: float) -> str:
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if days >= 1:
        return f"{days:,.0f} d {hours % 24:.0f} h"
    if hours >= 1:
        return f"{hours:.0f} h {minutes % 60:.0f} min"
    return f"{minutes:.0f} min" if minutes >= 1 else f"{max(0, seconds):.0f} s"
