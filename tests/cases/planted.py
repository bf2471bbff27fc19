"""A command that ends badly on rank 1, for the tests of the start and of the guard: `python -m tests.cases.planted KIND`."""

import launch.start as start  # isort: skip

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
from mpi4py import MPI

from launch.options import UsageError, parser
from parallel.control import Control

# Waits that are no verbs of a mesh: one rank does not come.
OUTSIDE = {
    "everyone": lambda comm, control: control.everyone(0),
    "to_first": lambda comm, control: control.to_first(0),
    "asleep": lambda comm, control: control.wait(),
    "duplicating": lambda comm, control: comm.Dup(),
    "splitting": lambda comm, control: comm.Split(comm.rank % 2),
    "barrier": lambda comm, control: comm.Barrier(),
}
# Messages between ranks 0 and 1, of which some never come.
MESSAGES = ("halted", "unsent")


def options():
    p = parser("planted", __doc__)
    p.add_argument("kind")
    return p


def check(args, ranks):
    if args.kind == "usage":
        raise UsageError("cannot use 'usage': use something else")


def main(args, comm, opened):
    tp, control = start.make_mesh(args, comm, tp=comm.size).tp, Control(comm)
    if comm.rank == 0:
        print("pids", *comm.gather(os.getpid()), flush=True)
    else:
        comm.gather(os.getpid())
    tp.all_reduce(np.zeros((2, 3), "f4"))
    if comm.rank == min(1, comm.size - 1):
        if args.kind == "raise":
            raise ValueError("planted")
        if args.kind == "exit":
            sys.exit(3)
        if args.kind == "thread":
            threading.Thread(target=lambda: 1 / 0).start()
            time.sleep(30)
        if args.kind == "torn":
            time.sleep(0.03)
        if args.kind in ("kill", "torn"):
            os.kill(os.getpid(), 9)
        if args.kind == "segv":
            ctypes.string_at(0)
        if args.kind == "os._exit":
            os._exit(0)
        if args.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if args.kind == "spin":
            while True:
                pass
        if args.kind == "receive":
            tp.receive((3,), "f4", 0, "2I0")
        if args.kind == "halted":
            # Stopped in the receive for a while: nothing moves, though the message that it waits for is on its way.
            subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -STOP {os.getpid()}; sleep 2.5; kill -CONT {os.getpid()}"])
        if args.kind in MESSAGES:
            tp.receive((3,), "f4", 0, "2F0")
        if args.kind == "halted":
            tp.send(np.zeros(3, "f4"), 0, "2I0")
        if args.kind == "unsent":
            tp.receive((3,), "f4", 0, "2F1")
        if args.kind == "return":
            return 0
        if args.kind in ("wait", "late", *OUTSIDE):
            time.sleep(1.5 if args.kind == "late" else 30)
    if args.kind == "torn" and comm.rank == 0:
        # As a receive does whose sender is gone.
        raise MPI.Exception(MPI.ERR_OTHER)
    if args.kind in MESSAGES and comm.rank == 0:
        time.sleep(1)
        tp.start_send(np.zeros(3, "f4"), 1, "2F0")
        tp.receive((3,), "f4", 1, "2I0")
    if args.kind in OUTSIDE:
        OUTSIDE[args.kind](comm, control)
    if args.kind == "block":
        print("█")
    if args.kind == "long":
        # Computing without verbs, longer than --timeout.
        time.sleep(3.3)
    tp.all_reduce(np.zeros(1))
    return 7 if args.kind == "status" else 0


if __name__ == "__main__":
    start.run(options(), check, main)
