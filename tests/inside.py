"""A command run inside the ranks that are there: its options, its numbers and its words, without a process of its own.

    got = inside(comm, "tp_mlp", "--tokens", "5", "--json")
    assert "use 1 or more" in inside(comm, "tp_mlp", "--tokens", "0", status=2)

What is about processes (launching, exit status, signals, deaths, the real standard output) needs one: tests.harness.mpirun.
"""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from mpi4py import MPI

from launch import start
from launch.options import UsageError
from parallel.control import Control


class Ran(NamedTuple):
    """How a command ended, and what it printed. Of the first of its ranks, on every rank."""

    status: int
    out: str
    err: str


def ran(comm: MPI.Intracomm, command: str | ModuleType, *arguments: object, ranks: int | None = None) -> Ran:
    """`mpirun -n RANKS python -m launch.COMMAND ARGUMENTS`, on the first `ranks` (all) of `comm`. The others wait, asleep.

    Only the first rank may print, and all must end alike. All of `comm` call it together.
    """
    ranks = comm.size if ranks is None else ranks
    control, mine = Control(comm), None
    if comm.rank < ranks:
        chosen = comm.Get_group().Range_incl([(0, ranks - 1, 1)])
        own = comm.Dup() if ranks == comm.size else comm.Create_group(chosen)
        chosen.Free()
        mine = _alone(own, command, [str(a) for a in arguments])
        own.Free()
    control.wait()
    every = control.everyone(mine)[:ranks]
    control.close()
    assert {r.status for r in every} == {every[0].status}, f"statuses by rank: {[r.status for r in every]}\n{every[0].err}"
    assert not any(r.out or r.err for r in every[1:]), f"printed by other ranks than the first: {every[1:]}"
    return every[0]


def _alone(comm: MPI.Intracomm, command: str | ModuleType, arguments: list[str]) -> Ran:
    module = import_module(f"launch.{command}") if isinstance(command, str) else command
    problem = args = None
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            args = module.options().parse_args(arguments)
        except UsageError as error:
            problem = str(error)
        status = start.outcome(args, problem, module.check, module.main, comm)
    return Ran(status, out.getvalue(), err.getvalue())


def inside(
    comm: MPI.Intracomm, command: str | ModuleType, *arguments: object, status: int = 0, ranks: int | None = None
) -> dict | str:
    """What it says when it ends in this status, on every rank: its JSON (without --json its text); in 2 its line of error."""
    done = ran(comm, command, *arguments, ranks=ranks)
    assert done.status == status, done.out + done.err
    if status == 2:
        assert done.out == ""
        assert done.err.startswith("error: ")
        assert len(done.err.splitlines()) == 1, done.err
        return done.err.removesuffix("\n")
    return json.loads(done.out) if "--json" in arguments else done.out
