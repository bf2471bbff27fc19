"""A pipeline that ends badly, for the tests of faults: `python -m tests.cases.piped --fault 1W2:kill`."""

import launch.start as start  # isort: skip

import os
import signal
from pathlib import Path

import numpy as np

from launch.options import parser
from parallel import pipeline, schedules
from parallel.axis import Axis
from parallel.pending import Pending
from parallel.schedule import Plan

BEFALL = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": lambda: [].pop(),
}


def options():
    p = parser("piped", __doc__)
    p.add_argument("--schedule", default="zb-h1")
    p.add_argument("--micro-batches", type=int, default=4)
    p.add_argument("--entries", type=int, default=3)
    p.add_argument("--fault", default=":", help="OPERATION:KIND, or swap:RANK, or sends:wait")
    p.add_argument("--clock", type=Path, help="is touched as the fault befalls")
    return p


def swapped(plan, rank):
    """The first two operations of a rank exchanged, of which the others do not know."""
    first, second, *rest = plan.ranks[rank]
    return Plan((*plan.ranks[:rank], (second, first, *rest), *plan.ranks[rank + 1 :]))


def main(args, comm, opened):
    pp = start.make_mesh(args, comm, pp=comm.size).pp
    plan = schedules.plan(args.schedule, comm.size, args.micro_batches)
    where, kind = args.fault.split(":")
    if where == "swap" and comm.rank == int(kind):
        plan = swapped(plan, comm.rank)
    if where == "sends":
        # Large ones return when they are received.
        Axis.start_send = lambda self, x, to, what: self.send(x, to, what) or Pending(None)

    def do(op, x):
        if str(op) == where:
            args.clock.touch()
            BEFALL[kind]()
        return np.ones(args.entries) if x is None else x + 1

    pipeline.run(plan, pp, do, lambda i: (args.entries,), float)
    pp.all_reduce(np.zeros(1))
    if comm.rank == 0:
        print("all agreed")
    return 0


if __name__ == "__main__":
    start.run(options(), lambda args, ranks: None, main)
