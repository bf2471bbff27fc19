"""A command that ends badly on rank 1, for tests/test_start.py: `python -m tests.cases.planted KIND`."""

import launch.start as start  # isort: skip

import os
import sys
import threading
import time

import numpy as np

from parallel.mesh import Mesh


def options():
    p = start.parser("planted", __doc__)
    p.add_argument("kind")
    return p


def check(args, ranks):
    if args.kind == "usage":
        raise start.UsageError("cannot use 'usage': use something else")


def main(args, comm):
    tp = Mesh(comm, tp=comm.size).tp
    if comm.rank == 0:
        print("pids", *comm.gather(os.getpid()), flush=True)
    else:
        comm.gather(os.getpid())
    if comm.rank == min(1, comm.size - 1):
        if args.kind == "raise":
            raise ValueError("planted")
        if args.kind == "exit":
            sys.exit(3)
        if args.kind == "thread":
            threading.Thread(target=lambda: 1 / 0).start()
            time.sleep(30)
        if args.kind == "kill":
            os.kill(os.getpid(), 9)
        if args.kind == "wait":
            time.sleep(30)
    tp.all_reduce(np.zeros(1))
    return 7 if args.kind == "status" else 0


if __name__ == "__main__":
    start.run(options(), check, main)
