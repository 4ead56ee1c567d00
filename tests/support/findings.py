"""What a fault did to the events of a device: the promise, checked, and a row of a table.

What it does: compares what the sender knows with what the database holds, for each case of
the fault tests, and collects the figures for FAULTS.md. What it does not: take the number
that it expects from the table that it tests; it counts at the sender.

Invariant: a Finding exists only for a case in which the promise held.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.device import Device
from tests.support.pipeline import Database

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


@dataclass(frozen=True)
class Finding:
    """One case: events sent (distinct ids), heard stored, rows, refused and kept."""

    case: str
    sent: int
    heard_stored: int
    rows: int
    dead_letters: int
    note: str = ""

    def row(self) -> str:
        figures = (self.sent, self.heard_stored, self.rows, self.dead_letters)
        return f"| {self.case} | {' | '.join(f'{n:,}' for n in figures)} | {self.note} |"


def find(
    case: str,
    devices: Iterable[Device],
    database: Database,
    *,
    complete: bool = True,
    note: str = "",
) -> Finding:
    """Check the promise for what these devices sent; return the figures.

    Always: what was heard as stored is a row with the very value that was sent, and no event
    is two rows. `complete` (after the fault is over and all ACKs are in): every event that
    was sent is a row or was refused, and every one that is a row was heard.
    """
    sent: dict[str, object] = {}
    heard: set[str] = set()
    refused: set[str] = set()
    for device in devices:
        sent |= {key: event.get("value") for key, event in device.sent.items()}
        heard |= device.heard_at.keys()
        refused |= {ack["event_id"] for ack in device.acks if ack["status"] == "rejected"}
    found = database.query("SELECT event_id, coalesce(value_num::text, value_text) FROM events")
    rows = dict(found)
    assert len(found) == len(rows)  # event_id is the primary key
    unknown = heard - rows.keys()
    assert not unknown, f"{case}: heard as stored and not a row: {sorted(unknown)[:5]}"
    wrong = [key for key in heard if not _same(sent[key], rows[key])]
    assert not wrong, f"{case}: stored with another value: {wrong[:5]}"
    if complete:
        lost = sent.keys() - rows.keys() - refused
        assert not lost, f"{case}: {len(lost)} neither a row nor refused: {sorted(lost)[:5]}"
        unheard = rows.keys() - heard
        assert not unheard, f"{case}: {len(unheard)} rows nobody heard of: {sorted(unheard)[:5]}"
    letters = database.query("SELECT coalesce(sum(times), 0)::int FROM dead_letters")[0][0]
    return Finding(case, len(sent), len(heard), len(rows), letters, note)


def _same(value: object, stored: str) -> bool:
    return float(stored) == float(value) if isinstance(value, (int, float)) else stored == value


def table(findings: Iterable[Finding]) -> str:
    """Return the table in Markdown."""
    names = "| case | sent | heard stored | rows | dead letters | |"
    rule = "| --- | --: | --: | --: | --: | --- |"
    return "\n".join([names, rule, *(finding.row() for finding in findings)])


def write_into(file: Path, text: str) -> None:
    """Put the text between the two marks in the file."""
    page = file.read_text()
    pattern = re.compile(f"(?s)({BEGIN}\n).*?({END})")
    page, count = pattern.subn(lambda match: f"{match[1]}{text}\n{match[2]}", page)
    assert count == 1, f"{file.name} does not have the two marks {BEGIN} and {END}"
    file.write_text(page)
