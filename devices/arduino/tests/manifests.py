"""Whether what describes the library to its tools is true, and agrees.

What it does: compares library.properties, library.json, idf_component.yml and keywords.txt with
each other and with the headers. What it does not: replace those tools.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def faults() -> list[str]:
    found = []
    properties = dict(
        line.split("=", 1) for line in (ROOT / "library.properties").read_text().splitlines()
    )
    described = json.loads((ROOT / "library.json").read_text("utf-8"))
    component = re.search(r'^version: "(.*)"$', (ROOT / "idf_component.yml").read_text(), re.M)
    versions = {properties["version"], described["version"], component and component[1]}
    if len(versions) != 1:
        found.append(f"several versions: {versions}")
    if not re.fullmatch(r"\d+\.\d+\.\d+", properties["version"]):
        found.append("the version is not three numbers")
    wanted = {"name", "version", "author", "maintainer", "sentence", "paragraph", "category", "url"}
    if wanted - properties.keys():
        found.append(f"library.properties lacks {wanted - properties.keys()}")
    for header in (properties["includes"], described["headers"]):
        if not (ROOT / "src" / header).is_file():
            found.append(f"src/{header} is not there")
    if properties["name"] != described["name"]:
        found.append("two names")
    headers = "\n".join(path.read_text("utf-8") for path in sorted(ROOT.glob("src/**/*.h")))
    for line in (ROOT / "keywords.txt").read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        word, _, kind = line.partition("\t")
        if kind not in ("KEYWORD1", "KEYWORD2") or not re.search(rf"\b{word}\b", headers):
            found.append(f"keywords.txt: {line!r}")
    for sketch in ROOT.glob("examples/*/*.ino"):
        if sketch.stem != sketch.parent.name:
            found.append(f"{sketch.name} is not named as its folder")
    return found


if __name__ == "__main__":
    for fault in faults():
        print(f"manifests: {fault}", file=sys.stderr)
    print(f"manifests: {len(faults())} faults")
    sys.exit(1 if faults() else 0)
