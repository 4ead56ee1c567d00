"""Where the time of broker and database goes: samples of their stacks, taken by perf.

What it does: lets perf look at both while the devices keep them busy, and sums up by stage. What
it does not: need debug symbols; the names that a program exports are enough for the stages, as
the frame that names the stage calls those that have no name.

Invariant: the shares of a program's stages do not overlap: of the frames that name a stage the
innermost counts, by the order below.
"""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.process import Process, SetupError, process_status
from tools.stack import Stack

SAMPLES_PER_SECOND = 997
SECONDS = 3
# A stack is copied so far, in bytes: enough for PostgreSQL's executor below an INSERT.
STACK_BYTES = 16_384
THE_REST = "the rest"
# A stage, and the functions that are it: the first stage that has one on the stack counts, so the
# special ones come first. Names are those of Linux, glibc, PostgreSQL and Mosquitto.
Stages = Mapping[str, str]
BROKER: Stages = {
    "write to sockets": "__sys_sendto|__x64_sys_write|ksys_write|__sys_sendmsg|do_writev",
    "read from sockets": "__sys_recvfrom|__x64_sys_read|ksys_read|__sys_recvmsg",
    "wait for sockets": "ep_poll|do_epoll_wait|do_epoll_ctl|epoll_wait|epoll_ctl",
    "allocate and free memory": "malloc|calloc|realloc|cfree|free|__libc_.*alloc|_int_.*",
    "copy and compare memory": "mem(cpy|cmp|move|set).*|__mem.*|str(len|cmp|chr|dup).*|__str.*",
}
DATABASE: Stages = {
    "write and flush the WAL at commit": "XLogFlush|XLogWrite|XLogBackgroundFlush",
    "put rows into the WAL": "XLogInsert|XLogInsertRecord|XLogBeginInsert|XLogRegister.*",
    "indexes": "ExecInsertIndexTuples|ExecCheckIndexConstraints|btinsert|index_insert",
    "the table itself": "heap_insert|heap_multi_insert|heap_.*|RelationGetBufferForTuple",
    "read the parameters: jsonb": "jsonb_in|jsonb_from_cstring|pg_parse_json",
    "read the parameters: arrays": "array_in|ReadArrayStr|EvaluateParams|InputFunctionCall",
    "parse the statement": "raw_parser|parse_analyze_.*|pg_analyze_and_rewrite.*|base_yyparse",
    "plan": "pg_plan_query|standard_planner|GetCachedPlan|planner",
    "send the answer": "printtup|pq_flush|internal_flush|secure_write|pq_endmessage.*|EndCommand",
    "unnest and rows for the executor": "ExecMakeTableFunctionResult|array_unnest|ExecScan",
    "read the statement": "pq_getmessage|pq_getbyte|pq_recvbuf|secure_read|pq_getbytes",
    "commit, besides the WAL": "CommitTransactionCommand|StartTransactionCommand|AbortTransaction",
    "execute, besides the above": "standard_ExecutorRun|ExecutorRun|PortalRun|ExecModifyTable",
    "writing and cleaning in the background": "BackgroundWriterMain|CheckpointerMain|WalWriterMain"
    "|AutoVac.*Main|do_autovacuum|StartBackgroundWorker",
}
_FRAME = re.compile(r"^\s+[0-9a-f]+ (.+?)(?:\+0x[0-9a-f]+)? \((.*)\)$")


def require() -> None:
    """Raise SetupError if there is no perf."""
    if shutil.which("perf") is None:
        raise SetupError(
            "perf looks at broker and database, and is not installed. On Debian: "
            "tools/bootstrap --packages linux-perf"
        )


class Look:
    """perf, looking at the two from now on for SECONDS."""

    def __init__(self, stack: Stack) -> None:
        self._programs = {"broker": _pids(stack.mosquitto), "database": _pids(stack.postgres)}
        self._file = stack.folder / "perf.data"
        pids = [str(pid) for pids in self._programs.values() for pid in pids]
        command = ["perf", "record", "--quiet", "--event", "cpu-clock"]
        command += ["--freq", str(SAMPLES_PER_SECOND), "--call-graph", f"dwarf,{STACK_BYTES}"]
        command += ["--output", str(self._file), "--pid", ",".join(pids)]
        self._perf = subprocess.Popen(
            [*command, "--", "sleep", str(SECONDS)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def shares(self) -> dict[str, dict[str, float]]:
        """Wait for it; return for each program the shares of its stages, in percent."""
        if self._perf.wait(120) != 0:
            raise SetupError("perf could not look at broker and database; run it as root")
        samples = _samples(self._file)
        return {
            name: _summarise(
                [frames for pid, frames in samples if pid in pids],
                BROKER if name == "broker" else DATABASE,
            )
            for name, pids in self._programs.items()
        }


def _pids(process: Process) -> set[int]:
    others = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return {process.pid, *(pid for pid in others if process_status(pid)[1] == process.pid)}


def _samples(file: Path) -> list[tuple[int, list[str]]]:
    """Return of each sample whose it is, and the functions on its stack, innermost first."""
    command = ["perf", "script", "--input", str(file), "--fields", "pid,ip,sym,dso", "--no-inline"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    samples: list[tuple[int, list[str]]] = []
    for line in done.stdout.splitlines():
        if frame := _FRAME.match(line):
            samples[-1][1].append(frame[1])
        elif line.strip():
            samples.append((int(line.split()[0]), []))
    return samples


def _summarise(samples: Sequence[Sequence[str]], stages: Stages) -> dict[str, float]:
    patterns = {stage: re.compile(pattern) for stage, pattern in stages.items()}
    counts: Counter[str] = Counter()
    for frames in samples:
        found = (
            stage
            for stage, pattern in patterns.items()
            if any(pattern.fullmatch(frame) for frame in frames)
        )
        counts[next(found, THE_REST)] += 1
    return {stage: 100 * count / len(samples) for stage, count in counts.most_common()}
