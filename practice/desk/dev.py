"""`launch.practice dev`: for authors of exercises."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from typing import Any

from parallel.remains import die_with_parent
from practice import dev, mutants_found
from practice.check import check
from practice.exercise import Exercise, every, find


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
    """On all cores, one exercise each at a time."""
    wrong, cores = 0, len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(min(len(exercises), cores), get_context("fork"), _begun, (os.getpid(),)) as pool:
        try:
            reports = [pool.submit(_checked, reference, quick, e.name) for e in exercises]
            for e, report in zip(exercises, (r.result() for r in reports), strict=True):
                print(dev.show(report), flush=True)
                if not quick:
                    mutants_found.record(e, report)
                wrong += bool(report.problems)
        except BaseException:
            for worker in active_children():
                worker.terminate()
            raise
    return 1 if wrong else 0


def _begun(parent: int) -> None:
    """A worker, which ends with this process and when this process says so."""
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _checked(reference: Any, quick: bool, name: str) -> dev.Report:
    return dev.check(find(name), reference, with_mutants=not quick)
