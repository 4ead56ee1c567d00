"""Run every vector of contract.json through the C++ library.

What it does: writes each vector as a line for the program `contract`, and compares what it answers.
What it does not: know the library. A section or a key that it does not know is a failure.

    python3 devices/arduino/tests/contract.py PROGRAM [devices/contract.json]
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CONTRACT = Path(__file__).resolve().parents[2] / "contract.json"
NAMES = {
    "ids": {"name", "device_id", "salt", "boot", "sequence", "event_id"},
    "events": {"name", "given", "json"},
    "clock": {"name", "unix_ms", "ts_device"},
    "batches": {"name", "events", "payload"},
    "limits": {"name", "device_id", "event_id", "receive_bytes", "events"},
    "dropped": {"name", "salt", "boot", "from", "to", "json"},
    "acks": {"name", "sent", "stored_before", "payloads", "stored", "rejected", "waiting"},
}
OTHERS = {"about", "topics", "events_device", "numbers_that_are_none", "acks_device"}
FIELDS = {"type", "value", "unit", "unix_ms", "meta"}


class Library:
    """The program, and what was wrong with its answers."""

    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.checked = 0
        self.wrong: list[str] = []

    def ask(self, *words: object) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"contract: the program ended at {words[:2]}")
        return answer.rstrip("\n")

    def check(self, what: str, got: object, wanted: object) -> None:
        self.checked += 1
        if got != wanted:
            self.wrong.append(f"{what}\n    wanted {wanted!r}\n    got    {got!r}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait(60) != 0:
            self.wrong.append(f"the program ended with {self._process.returncode}")


def hexed(text: str | None) -> str:
    return "-" if text is None else text.encode().hex()


def value(given: Any) -> str:
    """Return the kind of a value, and its text in hex."""
    if given is None:
        return "n"
    if isinstance(given, str):
        return f"t{given.encode().hex()}"
    kind = "b" if isinstance(given, bool) else "i" if isinstance(given, int) else "d"
    return kind + json.dumps(given).encode().hex()


def fields(given: dict[str, Any]) -> list[str]:
    assert given.keys() <= FIELDS, given
    meta = given.get("meta")
    compact = None if meta is None else json.dumps(meta, ensure_ascii=False, separators=(",", ":"))
    return [
        given["type"].encode().hex(),
        value(given.get("value")),
        hexed(given.get("unit")),
        str(given.get("unix_ms", 0)),
        hexed(compact),
    ]


def key(device: dict[str, Any]) -> list[object]:
    return [
        device["device_id"].encode().hex(),
        device["salt"],
        device["boot"],
        device.get("sequence", 1),
    ]


def unhexed(text: str) -> str:
    return "" if text == "=" else bytes.fromhex(text).decode()


def check_events(library: Library, contract: dict[str, Any]) -> None:
    device = key(contract["events_device"])
    topic = contract["topics"]["events"]
    for vector in contract["events"]:
        answer = library.ask("added", *device, *fields(vector["given"]))
        got = None if answer == "refused" else unhexed(answer.split()[0])
        library.check(f"events: {vector['name']}", got, vector["json"])
        if got is not None:
            library.check(f"events: {vector['name']}: topic", answer.split()[1], topic)
    for number in contract["numbers_that_are_none"]:
        for kind in "df":
            words = ["74", kind + number.encode().hex(), "-", "0", "-"]
            library.check(f"{number} ({kind})", library.ask("added", *device, *words), "refused")
    # A float is written with the digits that a float needs.
    answer = library.ask("added", *device, "74", "f" + b"0.1".hex(), "-", "0", "-")
    library.check("a float", '"value":0.1}' in unhexed(answer.split()[0]), True)
    for vector in contract["batches"]:
        events = [json.loads(event) for event in vector["events"]]
        added = [{"type": event["event_type"], "value": event["value"]} for event in events]
        words = [word for given in added for word in fields(given)]
        answer = library.ask("added", *device, *words)
        library.check(f"batches: {vector['name']}", unhexed(answer.split()[0]), vector["payload"])
    for vector in contract["dropped"]:
        run = [vector["salt"], vector["boot"], vector["from"], vector["to"]]
        answer = library.ask("dropped", *device, *run)
        library.check(f"dropped: {vector['name']}", unhexed(answer), vector["json"])


def check_plain(library: Library, contract: dict[str, Any]) -> None:
    for vector in contract["ids"]:
        answer = library.ask("id", *key(vector))
        library.check(f"ids: {vector['name']}", answer, vector["event_id"] or "none")
    for vector in contract["clock"]:
        answer = library.ask("clock", vector["unix_ms"])
        library.check(f"clock: {vector['name']}", answer, vector["ts_device"] or "none")
    for vector in contract["limits"]:
        salt, boot, sequence = vector["event_id"].removeprefix(vector["device_id"] + "-").split("-")
        device = [vector["device_id"].encode().hex(), salt, boot, sequence]
        answer = library.ask("limit", *device, vector["receive_bytes"])
        library.check(f"limits: {vector['name']}", answer, str(vector["events"]))


def check_acks(library: Library, contract: dict[str, Any]) -> None:
    device = contract["acks_device"]
    head = f"{device['device_id']}-{device['salt']}-{device['boot']}-"
    added = [word for given in device["added"] for word in fields(given)]
    for vector in contract["acks"]:
        payloads = [payload.encode().hex() for payload in vector["payloads"]]
        told, rest = library.ask("acks", *key(device), len(payloads), *payloads, *added).split("\t")
        count, packet, topic = rest.split(" ")
        name = f"acks: {vector['name']}"
        stored = re.findall(rf" stored {head}(\d+)", told)
        rejected = re.findall(rf" rejected {head}(\d+)=(\S*)", told)
        sent_again = re.findall(rf'"event_id":"{head}(\d+)"', unhexed(packet))
        library.check(f"{name}: stored", [int(n) for n in stored], vector["stored"])
        library.check(f"{name}: rejected", [[int(n), r] for n, r in rejected], vector["rejected"])
        library.check(f"{name}: waiting", [int(n) for n in sent_again], vector["waiting"])
        library.check(f"{name}: how many", int(count), len(vector["waiting"]))
        told_all = len(stored) + len(rejected)
        library.check(f"{name}: nothing else", told.count(head), told_all)
        library.check(f"{name}: topic", topic, contract["topics"]["acks"])


def main(program: str, file: str = str(CONTRACT)) -> int:
    contract = json.loads(Path(file).read_text("utf-8"))
    library = Library(program)
    library.check("sections", set(contract), OTHERS | set(NAMES))
    for section, names in NAMES.items():
        for vector in contract[section]:
            library.check(f"{section}: {vector['name']}: keys", set(vector) - names, set())
    check_plain(library, contract)
    check_events(library, contract)
    check_acks(library, contract)
    library.close()
    for text in library.wrong:
        print(f"contract: {text}", file=sys.stderr)
    print(f"contract: {library.checked} checks, {len(library.wrong)} wrong")
    return 1 if library.wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
