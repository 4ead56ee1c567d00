"""What a clone of this checkout would have, whether git is here or not.

What it does: lists the files that git tracks, or would after `git add`. It reads the .gitignore
files itself, and knows of them what ours use: names, `*` in them, a `/` in front or behind, `!`.
What it does not: ask git, which is not on every machine, and knows nothing of an unpacked ZIP.

Invariant: the list is git's own (test_rules.py compares them).
"""

import fnmatch
import os
from pathlib import Path

# A folder, and the lines of its .gitignore.
Rules = list[tuple[Path, list[str]]]


def files_of(folder: Path) -> dict[str, Path]:
    """Every file that a clone would have, by its name from this folder, sorted."""
    found: dict[str, Path] = {}
    _collect(folder, folder, [], found)
    return dict(sorted(found.items()))


def _collect(top: Path, folder: Path, rules: Rules, found: dict[str, Path]) -> None:
    if (own := folder / ".gitignore").is_file():
        rules = [*rules, (folder, own.read_text("utf-8").splitlines())]
    for entry in os.scandir(folder):
        path = Path(entry.path)
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.name == ".git" or _is_ignored(path, is_folder, rules):
            continue
        if is_folder:
            _collect(top, path, rules, found)
        elif path.is_file():
            found[path.relative_to(top).as_posix()] = path


def _is_ignored(path: Path, is_folder: bool, rules: Rules) -> bool:
    ignored = False
    for folder, patterns in rules:
        for line in patterns:
            pattern = line.removeprefix("!")
            if not pattern or pattern.startswith("#") or (pattern[-1] == "/" and not is_folder):
                continue
            inside = path.relative_to(folder).as_posix() if "/" in pattern[:-1] else path.name
            if fnmatch.fnmatchcase(inside, pattern.strip("/")):
                ignored = not line.startswith("!")
    return ignored
