"""A command that saves without end, for the tests of checkpoints to kill: `mpirun -n 2 python -m tests.cases.saving FOLDER`.

It goes on from the newest step, which another number of ranks may have written, and checks it first. It prints `pids` and its
processes, then `saving` and the step as each save begins.
"""

import launch.start as start  # isort: skip

import os
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np

from launch.options import parser
from parallel.checkpoint import Checkpoint, latest, pieces, save
from parallel.control import Control
from parallel.shard import Layout, covering, even

ROWS, PRIME = 12_000, 1009


def layouts(ranks):
    """How the arrays are held on `ranks` ranks: cut along either dim, held in part by several ranks, and by all."""
    heads = even(18, ranks)
    return {
        "table": Layout((ROWS, 40), {"tp": (0, even(ROWS, ranks))}),
        "W1": Layout((61, ROWS), {"tp": (1, even(ROWS, ranks))}),
        "Wk": Layout((50, 6, 80), {"tp": (1, covering(heads, 3))}),
        "b": Layout((ROWS,)),
    }


@cache
def base():
    found = {}
    for n, (name, layout) in enumerate(layouts(1).items()):
        dtype = "f8" if n % 2 else "f4"
        found[name] = np.arange(np.prod(layout.shape)).reshape(layout.shape).astype(dtype) % PRIME
    return found


def contents(step):
    """The arrays of a step, whole: every entry tells its step, and differs from its neighbours."""
    return {name: x + PRIME * step for name, x in base().items()}


def require_of_its_step(checkpoint, ranks, rank):
    """Every array and the state are those of the checkpoint's step, bit for bit."""
    whole = contents(checkpoint.step)
    assert checkpoint.state == {"next": checkpoint.step + 1}
    assert sorted(checkpoint.names) == sorted(whole)
    for name, layout in layouts(ranks).items():
        got = checkpoint.read(name, layout, {"tp": rank}, whole[name].dtype)
        assert (got == layout.take(whole[name], {"tp": rank})).all(), f"{name} is not of step {checkpoint.step}"


def options():
    p = parser("saving", __doc__)
    p.add_argument("folder", type=Path)
    return p


def main(args, comm, opened):
    control = Control(comm)
    newest = control.from_first(latest(args.folder))
    at = 0
    if newest is not None:
        checkpoint = Checkpoint(newest, control)
        require_of_its_step(checkpoint, comm.size, comm.rank)
        at = checkpoint.state["next"]
    pids = control.everyone(os.getpid())
    if comm.rank == 0:
        print("pids", *pids, flush=True)
    held, place = layouts(comm.size), {"tp": comm.rank}
    for step in count(at):
        whole = contents(step)
        mine = [p for name, x in held.items() for p in pieces(name, x, place, x.take(whole[name], place))]
        if comm.rank == 0:
            print("saving", step, flush=True)
        save(args.folder, step, mine, {"next": step + 1}, control)


if __name__ == "__main__":
    start.run(options(), lambda args, ranks: None, main)
