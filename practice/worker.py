"""The learner's process: one a rank. Reads the job, runs each case, and writes its outcome and where this rank is.

Written to the job's folder: state.RANK (where this rank is, for who watches it), CASE.RANK.npz and CASE.RANK.json (an Outcome),
out.RANK (what the learner prints).
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from parallel.atomic import write_atomically
from practice import rules
from practice.axis import Axis, Call, Place, disagreement, pieces
from practice.exercise import MODULE, Exercise
from practice.part import Case, Outcome
from practice.perform import Code, described, perform

STATE_BYTES = 1024
OUTPUT_BYTES = 4 * 2**20


class State:
    """Where this rank is: busy, waits (in a verb) or done (with a case). One fixed-size record in a file."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = os.open(folder / f"state.{rank}", os.O_CREAT | os.O_WRONLY)
        self._steps = 0
        # Messages that this rank has begun to send to, and to receive from, each rank.
        self.offered, self.asked = Counter(), Counter()

    def write(self, state: str, case: int, **more: Any) -> None:
        self._steps += 1
        more |= {"offered": self.offered, "asked": self.asked}
        record = json.dumps({"state": state, "case": case, "steps": self._steps, "pid": os.getpid(), **more}).encode()
        os.pwrite(self._file, record.ljust(STATE_BYTES), 0)


class MpiAxis(Axis):
    """The verbs over real processes."""

    def __init__(self, comm: Any, state: State, allow: Sequence[str], file: str) -> None:
        from mpi4py import MPI

        from parallel.control import Control

        super().__init__(comm.rank, comm.size, allow, file)
        self._mpi, self._comm, self._pairs, self._state = MPI, comm.Dup(), comm.Dup(), state
        # Two communicators, so that a rank that has ended a case early is not paired with one in a collective.
        self._control, self._between, self.case = Control(comm), Control(comm), 0

    def _meet(self, x: np.ndarray, verb: str, option: object, what: str) -> np.ndarray | list[np.ndarray]:
        self._state.write("waits", self.case, what=what, verb=verb)
        calls = self._control.everyone((verb, x.shape, str(x.dtype), option))
        problem = disagreement(calls)
        if problem:
            self._state.write("busy", self.case)
            raise ValueError(problem)
        y = getattr(self, f"_{verb}")(x, option, calls)
        self._state.write("busy", self.case)
        return y

    def _all_reduce(self, x: np.ndarray, op: str, calls: Sequence[Call]) -> np.ndarray:
        y = np.empty_like(x)
        self._comm.Allreduce(x, y, {"sum": self._mpi.SUM, "max": self._mpi.MAX, "min": self._mpi.MIN}[op])
        return y

    def _all_gather(self, x: np.ndarray, dim: int, calls: Sequence[Call]) -> np.ndarray:
        x = np.ascontiguousarray(np.moveaxis(x, dim, 0))
        row = int(np.prod(x.shape[1:]))
        lengths = [shape[dim] for _, shape, _, _ in calls]
        y = np.empty((sum(lengths), *x.shape[1:]), x.dtype)
        self._comm.Allgatherv(x, [y, [n * row for n in lengths]])
        return np.array(np.moveaxis(y, 0, dim))

    def _reduce_scatter(self, x: np.ndarray, dim: int, calls: Sequence[Call]) -> np.ndarray:
        x = np.ascontiguousarray(np.moveaxis(x, dim, 0))
        row = int(np.prod(x.shape[1:]))
        lengths = [len(range(*self.cut(len(x), rank).indices(len(x)))) for rank in range(self.size)]
        y = np.empty((lengths[self.rank], *x.shape[1:]), x.dtype)
        self._comm.Reduce_scatter(x, y, [n * row for n in lengths], self._mpi.SUM)
        return np.array(np.moveaxis(y, 0, dim))

    def _all_to_all(self, x: np.ndarray, shapes: Sequence[tuple[int, ...]], calls: Sequence[Call]) -> list[np.ndarray]:
        come = [theirs[self.rank] for *_, theirs in calls]
        leaving, coming = ([math.prod(shape) for shape in some] for some in (shapes, come))
        y = np.empty(sum(coming), x.dtype)
        self._comm.Alltoallv([x, leaving], [y, coming])
        return pieces(y, come)

    def _broadcast(self, x: np.ndarray, root: int, calls: Sequence[Call]) -> np.ndarray:
        y = x if self.rank == root else np.empty(calls[root][1], x.dtype)
        self._comm.Bcast(y, root)
        return y

    def _transfer(self, to: int | None, x: np.ndarray | None, source: int | None, what: str) -> np.ndarray | None:
        self._state.offered[to] += to is not None
        self._state.asked[source] += source is not None
        self._state.write("waits", self.case, what=what, to=to, source=source)
        sent, y = [], None
        if to is not None:
            head = np.zeros(12, np.int64)
            head[: 2 + x.ndim] = [x.ndim, ord(x.dtype.char), *x.shape]
            # Synchronous: complete when the receiver has begun to take it.
            sent = [self._pairs.Issend(head, to, tag=0), self._pairs.Issend(x, to, tag=1)]
        if source is not None:
            got = np.empty(12, np.int64)
            self._pairs.Recv(got, source, tag=0)
            y = np.empty(got[2 : 2 + got[0]], chr(got[1]))
            self._pairs.Recv(y, source, tag=1)
        self._mpi.Request.Waitall(sent)
        self._state.write("busy", self.case)
        return y

    def agree(self, kind: str) -> bool:
        """Between cases: whether all ranks can go on to the next."""
        return all(k == "ok" for k in self._between.everyone(kind))


def store(folder: Path, case: int, rank: int, outcome: Outcome) -> None:
    arrays = {n: x for n, x in outcome.results.items() if isinstance(x, np.ndarray) and not x.dtype.hasobject}
    plain = {
        n: x if not isinstance(x, np.ndarray) else "<array of objects>" for n, x in outcome.results.items() if n not in arrays
    }
    np.savez(folder / f"{case}.{rank}.npz", **{f"_{n}": x for n, x in arrays.items()})
    record = asdict(outcome) | {"results": plain, "order": list(outcome.results)}
    with write_atomically(folder / f"{case}.{rank}.json") as file:
        file.write(json.dumps(record))


def stored(folder: Path, case: int, rank: int) -> Outcome | None:
    """The Outcome that `store` wrote, or None."""
    try:
        record = json.loads((folder / f"{case}.{rank}.json").read_text())
        with np.load(folder / f"{case}.{rank}.npz", allow_pickle=False) as arrays:
            results = {n[1:]: arrays[n] for n in arrays.files}
    except (OSError, ValueError):
        return None
    results |= record["results"]
    order = record.pop("order")
    # JSON's names are texts.
    record["sent"] = {int(line): numbers for line, numbers in record["sent"].items()}
    return Outcome(**(record | {"results": {n: results[n] for n in order}}))


def main(job: str, comm: Any = None) -> None:
    """Run the job in the folder `job`, on `comm` if it is one of several ranks."""
    folder = Path(job)
    task = json.loads((folder / "job.json").read_text())
    rank = comm.rank if comm else 0
    state = State(folder, rank)
    state.write("busy", -1)
    exercise = Exercise(task["exercise"])
    parts = {p.name: p for p in exercise.parts}
    cases = [Case(**(c | {"size": tuple(c["size"]), "moved": c["moved"] and tuple(c["moved"])})) for c in task["cases"]]
    file, source = task["file"], task["source"]
    axis = MpiAxis(comm, state, exercise.facts["allow"], file) if comm else Place(0, 1)

    stacks = open(folder / f"stack.{rank}", "w")  # noqa: SIM115  open as long as the process
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    out = os.open(folder / f"out.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT_BYTES, OUTPUT_BYTES))
    # Memory that NumPy and MPI have mapped does not count as the learner's.
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = mapped + task["mebibytes"] * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    # If its parent is killed, this process ends too.
    signal.alarm(int(task["seconds"]) + 30)
    # The project's modules stay usable where they are imported already, but cannot be imported any more.
    rules.close(file, [n for n in sys.modules if n.split(".")[0] in rules.OURS])

    sys.modules[MODULE] = module = ModuleType(MODULE)
    space: dict[str, Any] = vars(module)
    space |= {"__file__": file, "__source__": source}
    failed = None
    state.write("busy", 0)
    try:
        exec(compile(source, file, "exec", dont_inherit=True), space)
    except BaseException as error:
        failed = Outcome("error", error=described(error, Code(space), file))
    stuck: set[str] = set()
    for number, case in enumerate(cases):
        if case.part in stuck:
            continue
        if comm:
            axis.case = number
        state.write("busy", number)
        outcome = failed or perform(parts[case.part], case, space, axis, file, origins=True)
        if rules.attempted and outcome.kind == "ok":
            outcome = Outcome(
                "error", error=described(PermissionError(rules.attempted[0]), Code(space), file) | {"after": False}
            )
        # Memory that the learner's code has used up is given back first: the report needs some.
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        store(folder, number, rank, outcome)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        state.write("done", number)
        if "File too large" in outcome.error.get("message", ""):
            stuck |= {p.name for p in exercise.parts}
        # Once a rank has failed, the others may wait for it in a verb: the part ends here for all.
        if comm and not axis.agree(outcome.kind):
            stuck.add(case.part)
        if failed:
            break
    state.write("end", len(cases))
    sys.stdout.flush()
