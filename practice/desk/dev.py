"""`launch.practice dev`: for authors of exercises."""

from __future__ import annotations

import argparse
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from parallel.remains import die_with_parent
from practice import dev, mutants_found
from practice.check import check
from practice.exercise import Exercise, every, find

ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def main(args: argparse.Namespace, reference: Any, command: Callable[[int, str], list[str]]) -> int:
    if args.what == "pages":
        from practice.desk import numbers

        for path in numbers.write():
            print(f"written: {path}")
        return 0
    if args.what == "check":
        return _check([find(n) for n in args.name] or every(), reference, args.quick)
    wrong = 0
    for e in [find(n) for n in args.name] or every():
        if args.what == "say":
            print(dev.say(e, reference))
        elif args.what == "rights":
            found = dev.refused(e, reference, range(1, args.seeds + 1))
            print(
                f"{e.name}: {len(e.rights) + 1} right answers on {args.seeds} seeds, {len(found)} rejected", *found, sep="\n  "
            )
            wrong += bool(found)
        else:
            path = args.file or e.folder / "solution.py"
            verdict = check(e, path.resolve(), reference, command)
            line = f"{e.name}: {'passed' if verdict.passed else 'not passed'}, {verdict.seconds:.2f} s"
            print(line, *verdict.general, sep="\n  ")
            for j in verdict.parts:
                print(f"  {j.part}: {j.status} {j.case}", *j.lines, sep="\n    ")
            wrong += not verdict.passed
    return 1 if wrong else 0


def _check(exercises: Sequence[Exercise], reference: Any, quick: bool) -> int:
    wrong = 0
    for e, report in zip(exercises, _reports(exercises, reference, quick), strict=True):
        print(dev.show(report), flush=True)
        if not quick:
            mutants_found.record(e, report)
        wrong += bool(report.problems)
    return 1 if wrong else 0


def _reports(exercises: Sequence[Exercise], reference: Any, quick: bool) -> Iterator[dev.Report]:
    """In order. Each exercise has a process, of which as many run as there are cores; whenever this one ends, they do.

    A pool of processes is not told to end so simply: it has threads, and a signal may come while it is being made.
    """
    context, cores, todo = get_context("fork"), len(os.sched_getaffinity(0)), deque(exercises)
    running: dict[Connection, tuple[str, BaseProcess]] = {}
    done: dict[str, dev.Report] = {}
    try:
        for e in exercises:
            while e.name not in done:
                while todo and len(running) < cores:
                    name = todo.popleft().name
                    own, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(os.getpid(), theirs, reference, quick, name))
                    # What ends this process waits until it knows the other, which takes it as its own before it is let through.
                    signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
                    process.start()
                    running[own] = name, process
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
                    theirs.close()
                for own in wait([*running]):
                    name, process = running[own]
                    try:
                        done[name] = own.recv()
                    except EOFError:
                        process.join()
                        done[name] = dev.Report(name, [f"its process has ended: exit code {process.exitcode}"])
                    del running[own]
            yield done.pop(e.name)
    finally:
        for _, process in running.values():
            process.kill()


def _work(parent: int, theirs: Connection, reference: Any, quick: bool, name: str) -> None:
    die_with_parent(parent)
    for number in ENDS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    theirs.send(dev.check(find(name), reference, with_mutants=not quick))
