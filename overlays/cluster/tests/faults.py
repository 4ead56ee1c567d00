"""Each fault of the list, one after the other, under load: `overlays/cluster/test --long`.

What it does: runs them on the real overlay, and prints a row for each, into docs/scaling.md with
--write. What it does not: end at a failure, but for the exit code: 1 if an event was lost, was
falsely said to be stored, or was refused.

Invariant: nothing of a stack that somebody else runs is touched; there must be none.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from cluster import (
    ETCD,
    INGESTERS,
    NATS,
    Cluster,
    Result,
    freeze,
    kill,
    more_partitions,
    signal_all,
    under_fault,
)
from sender import Sender

from tests.support import compose
from tools.process import CHECKOUT

PAGE = CHECKOUT / "docs/scaling.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = """| fault | events | lost | false `stored` | refused | no ACK, s | of one device, s |
| --- | --: | --: | --: | --: | --: | --: |"""


def killed_behind_frozen_standbys(cluster: Cluster) -> None:
    """Freeze both standbys, so that no commit is answered, and then kill the primary."""
    primary = cluster.primary()
    standbys = [member["name"] for member in cluster.members() if member["name"] != primary]
    signal_all(cluster, "STOP", *standbys)
    time.sleep(10)
    cluster.docker("kill", primary)
    signal_all(cluster, "CONT", *standbys)
    time.sleep(20)
    cluster.docker("start", primary)


def one_machine(cluster: Cluster) -> list[str]:
    """Return what would be on the machine of the primary."""
    number = cluster.primary()[-1]
    return [f"nats-{number}", f"etcd-{number}", f"postgres-{number}", INGESTERS[0]]


def faults(cluster: Cluster) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield each fault's name, and what makes it; which node it is for is decided then."""
    yield "none, for 20 s", partial(time.sleep, 20)
    for name in NATS:
        yield f"kill {name}, 10 s", partial(kill, cluster, name)
    for name in NATS:
        yield f"freeze {name}, 30 s", partial(freeze, cluster, name)
    for name in INGESTERS:
        yield f"kill {name}, 10 s", partial(kill, cluster, name)
        yield f"freeze {name}, 30 s", partial(freeze, cluster, name)
    yield "kill the primary, 10 s", lambda: kill(cluster, cluster.primary())
    yield "freeze the primary, 60 s", lambda: freeze(cluster, cluster.primary(), seconds=60)
    yield "kill a standby, 10 s", lambda: kill(cluster, cluster.standby())
    yield "freeze a standby, 30 s", lambda: freeze(cluster, cluster.standby())
    yield (
        "freeze both standbys, then kill the primary",
        lambda: killed_behind_frozen_standbys(cluster),
    )
    yield "kill all etcd, 15 s", partial(kill, cluster, *ETCD, seconds=15)
    yield (
        "kill one machine (NATS, etcd, primary, ingester), 20 s",
        lambda: kill(cluster, *one_machine(cluster), seconds=20),
    )
    yield "from 2 to 3 partitions", lambda: more_partitions(cluster)


def row(name: str, result: Result, before: int) -> str:
    """Return a line of the table."""
    counts = f"{result.sent - before:,} | {result.lost} | {result.false_stored} | {result.refused}"
    return f"| {name} | {counts} | {result.gap:.1f} | {result.gap_of_one:.1f} |"


def run(cluster: Cluster) -> tuple[list[str], bool]:
    """Run all; return the table's rows, and whether the promise was kept in each."""
    rows: list[str] = []
    kept, before = True, 0
    with Sender(int(str(cluster.settings["MQTT_PORT_PUBLISHED"]))) as sender:
        for name, fault in faults(cluster):
            try:
                result = under_fault(cluster, sender, fault)
            except AssertionError as error:
                print(f"{name}: {error}\n{cluster.trouble()}", flush=True)
                return [*rows, f"| {name} | not ended |"], False
            rows.append(row(name, result, before))
            print(rows[-1], flush=True)
            kept, before = kept and result.is_kept, result.sent
    return rows, kept


def write(rows: list[str]) -> None:
    """Put the rows into the page."""
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    text = PAGE.read_text()
    table = f"{BEGIN}\n{day}:\n\n{HEAD}\n" + "\n".join(rows) + f"\n{END}"
    text, count = re.subn(f"{BEGIN}.*?{END}", lambda _: table, text, flags=re.DOTALL)
    assert count == 1, f"{PAGE} has no place for the table"
    PAGE.write_text(text)


def main() -> int:
    """Run the long form."""
    with compose.only_run(), tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(compose.copy_checkout(Path(folder) / "copy"))
        with compose.cleared(cluster):
            cluster.up("--build")
            rows, kept = run(cluster)
    if "--write" in sys.argv:
        write(rows)
        subprocess.run(["git", "diff", "--stat", str(PAGE)], cwd=CHECKOUT, check=False)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
