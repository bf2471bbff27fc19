"""Runs the learner's file in processes of its own, and ends them at a deadlock or at the time limit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

from parallel import remains
from parallel.threads import BLAS_VARIABLES
from practice.exercise import Exercise
from practice.part import Case, Outcome
from practice.worker import STATE_BYTES, stored

# Nothing must move for so many seconds before a deadlock is reported.
STILL = 0.5
# How long ranks may take to leave after the last case.
LEAVING = 2.0
# Variables that an outer launcher sets for its own ranks, and those that a user sets for theirs.
LAUNCHERS = ("PYTHON", "PMI", "OMPI_", "PRTE", "HYDRA", "HYDI", "MPI_", "MPIR_")
KEPT = ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_MCA_rmaps_default_mapping_policy")
# Bytes that the temporary folder must have left, for what the learner prints and returns.
ROOM = 8 * 2**20
# How long they may take to end when they are killed.
GONE = 3.0
# How long processes may take to start and import.
STARTING = 60


class NoRoom(Exception):
    """The learner's processes have no room to work in."""


@dataclass
class Run:
    """outcomes: by case, one a rank; [] for a case that was not reached. ended: why the run was stopped, or ''."""

    outcomes: list[list[Outcome]]
    ended: str = ""
    # At a deadlock or the time limit: each rank's state, and its Python stack within the learner's file.
    states: list[dict] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    printed: str = ""
    seconds: float = 0.0


def run(exercise: Exercise, file: str, source: str, cases: Sequence[Case], command: Callable[[int, str], list[str]]) -> Run:
    """Run all cases on the learner's `source`. `command(ranks, job)`: what starts `worker.main(job)` on so many ranks."""
    with _temporary() as folder, open(folder / "start", "w") as log:
        return _run(folder, exercise, file, source, cases, command, log)


@contextmanager
def _temporary() -> Iterator[Path]:
    """A folder that is removed, also when this process is killed. Raises NoRoom."""
    begin = f"rankwise-practice-{os.getpid()}-"
    try:
        place = tempfile.gettempdir()
    except OSError:
        raise NoRoom("there is no temporary folder: give TMPDIR one to write in") from None
    # What has been killed together with its sweeper.
    remains.sweep((re.escape(f"{place}/rankwise-practice-") + r"\d+-.*",), until=time.time() - remains.OLD)
    with remains.swept(re.escape(f"{place}/{begin}") + ".*", *remains.MPI_NAMES, patience=GONE):
        try:
            made = tempfile.TemporaryDirectory(prefix=begin, ignore_cleanup_errors=True)
        except OSError as error:
            raise NoRoom(f"{place}: {error.strerror}: give TMPDIR a folder to write in") from None
        with made as folder:
            space = os.statvfs(folder)
            if (free := space.f_bavail * space.f_frsize) < ROOM:
                need = f"{free / 2**20:.1f} MiB are left, and a check needs {ROOM / 2**20:g}"
                raise NoRoom(f"{place}: {need}: give TMPDIR another folder")
            yield Path(folder)


def _run(
    folder: Path,
    exercise: Exercise,
    file: str,
    source: str,
    cases: Sequence[Case],
    command: Callable[[int, str], list[str]],
    log: TextIO,
) -> Run:
    facts, ranks = exercise.facts, exercise.ranks
    job = {"exercise": exercise.name, "file": file, "source": source, "cases": [asdict(c) for c in cases]}
    (folder / "job.json").write_text(json.dumps(job | {k: facts[k] for k in ("mebibytes", "seconds")}))
    environment = {k: v for k, v in os.environ.items() if k.startswith(KEPT) or not k.startswith(LAUNCHERS)}
    environment |= dict.fromkeys(BLAS_VARIABLES, "1") | {"MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"}
    # Open MPI's option for more ranks than cores.
    environment.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    begun, started = time.monotonic(), time.time()
    own = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": environment, "start_new_session": True}
    # Were this killed, nobody would end the learner's endless loop.
    own["preexec_fn"] = partial(remains.die_with_parent, os.getpid())
    process = subprocess.Popen(command(ranks, str(folder)), **own)
    try:
        ended = _watch(process, folder, ranks, facts["seconds"])
        states = [_state(folder, rank) for rank in range(ranks)]
        lines = _lines(folder, states, file) if ended else [0] * ranks
    finally:
        _end(process, [s.get("pid", 0) for s in (_state(folder, r) for r in range(ranks))])
        remains.sweep(remains.MPI_NAMES, since=started)
    outcomes = []
    for number in range(len(cases)):
        by_rank = [stored(folder, number, rank) for rank in range(ranks)]
        reached = any(by_rank) or any(s.get("case") == number for s in states)
        silent = [_missing(states[r], ended, facts["seconds"], lines[r], source) for r in range(ranks)]
        outcomes.append([o or s for o, s in zip(by_rank, silent, strict=True)] if reached else [])
    printed = "".join(_text(folder / f"out.{rank}") for rank in range(ranks))
    if not ended and not any(outcomes):
        said = _text(folder / "start")
        if said.startswith("error: "):
            raise NoRoom(said.splitlines()[0].removeprefix("error: "))
        ended = "the process ended before it began: " + said[-600:]
    return Run(outcomes, ended, states, lines, printed, time.monotonic() - begun)


def _missing(state: dict, ended: str, seconds: float, line: int, source: str) -> Outcome:
    """The Outcome of a rank that has not written one for its present case."""
    if state.get("state") == "waits":
        return Outcome("hang", waits=state["what"])
    if ended:
        lines = source.splitlines()
        at = f", in line {line}: {lines[line - 1].strip()}" if 0 < line <= len(lines) else ""
        return Outcome("silent", waits=f"still running after {seconds:g} s, and stopped{at}")
    return Outcome("silent", waits="its process ended by itself, without returning (os._exit, os.abort, or out of memory)")


def _state(folder: Path, rank: int) -> dict:
    try:
        return json.loads((folder / f"state.{rank}").read_bytes()[:STATE_BYTES])
    except (OSError, ValueError):
        return {}


def _watch(process: subprocess.Popen, folder: Path, ranks: int, limit: float) -> str:
    """Wait until the process has ended (returns '') or must be ended (returns 'deadlock' or 'time').

    The limit counts from the learner's first line.
    """
    begun = still = time.monotonic()
    started, before = 0.0, None
    while process.poll() is None:
        time.sleep(0.005)
        now = time.monotonic()
        states = [_state(folder, rank) for rank in range(ranks)]
        if states != before:
            before, still = states, now
        if now - still > LEAVING and all(s.get("state") == "end" for s in states):
            return ""
        if not started and all(s.get("case", -1) >= 0 for s in states):
            started = now
        if started and now - still > STILL and _stuck(states):
            return "deadlock"
        if now - (started or begun) > (limit if started else STARTING):
            return "time"
    return ""


def _stuck(states: list[dict]) -> bool:
    """Whether no rank can go on: each waits in a verb or has ended the case, and what each waits for will not come."""
    waiting = {rank: s for rank, s in enumerate(states) if s["state"] == "waits"}
    if not waiting or any(s["state"] == "busy" for s in states):
        return False
    if len(waiting) == len(states) and all("verb" in s for s in states):
        return False

    def will_end(rank: int, s: dict) -> bool:
        to, source = s["to"], s["source"]
        taken = to is None or states[to]["asked"].get(str(rank), 0) >= s["offered"][str(to)]
        comes = source is None or states[source]["offered"].get(str(rank), 0) >= s["asked"][str(source)]
        return taken and comes

    return not any(will_end(rank, s) for rank, s in waiting.items() if "verb" not in s)


def _lines(folder: Path, states: list[dict], file: str) -> list[int]:
    """The line of the learner's file at which each rank is, 0 where that is not known."""
    for state in states:
        with suppress(OSError, KeyError):
            os.kill(state["pid"], signal.SIGUSR1)
    time.sleep(0.1)
    lines = []
    for rank in range(len(states)):
        own = [t.split("line ")[1].split()[0] for t in _text(folder / f"stack.{rank}").splitlines() if f'"{file}"' in t]
        # In the middle of a step of the interpreter the number is "???".
        lines.append(next((int(n) for n in own if n.isdigit()), 0))
    return lines


def _end(process: subprocess.Popen, pids: Sequence[int]) -> None:
    """End the process, its group, and its ranks, which mpirun puts into groups of their own."""
    if process.poll() is None:
        for pid in pids:
            if pid:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(path: Path) -> str:
    try:
        return path.read_bytes()[: 2**20].decode(errors="replace")
    except OSError:
        return ""
