"""Sums without end, until a file appears: `python -m tests.cases.looping FILE KIND`. Then what KIND says befalls --rank."""

import launch.start as start  # isort: skip

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from launch.options import parser

BEFALLS = ("raise", "all raise", "exit", "os._exit", "kill", "segv", "stop", "sleep", "spin", "return", "nothing", "end")


def options():
    p = parser("looping", __doc__)
    p.add_argument("file", type=Path)
    p.add_argument("kind", choices=BEFALLS)
    p.add_argument("--rank", type=int, default=-1, help="of all; -1: the last")
    return p


def check(args, ranks):
    return args.rank % ranks


def main(args, comm, rank):
    tp = start.make_mesh(args, comm, tp=comm.size).tp
    if comm.rank == 0:
        print("begun", flush=True)
    while not tp.all_reduce(np.array([args.file.exists() + 0.0]))[0]:
        time.sleep(0.02)
    if args.kind == "end":
        return 0
    if comm.rank == rank or args.kind == "all raise":
        befall(args.kind)
        if args.kind == "return":
            return 0
    while True:
        tp.all_reduce(np.zeros((2, 3), "f4"))
        time.sleep(0.02)


def befall(kind):
    if kind.endswith("raise"):
        raise ValueError("planted")
    if kind == "exit":
        sys.exit(3)
    if kind == "os._exit":
        os._exit(5)
    if kind in ("kill", "segv", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "stop": signal.SIGSTOP}[kind])
    while kind in ("sleep", "spin"):
        time.sleep(1000 if kind == "sleep" else 0)


if __name__ == "__main__":
    start.run(options(), check, main)
