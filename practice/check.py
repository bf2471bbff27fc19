"""The whole check of a learner's file: the imports, the run in processes of its own, the verdict."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from practice import remarks, rules
from practice.examine import Examiner, Judged
from practice.exercise import Exercise
from practice.part import cases
from practice.replay import Failed
from practice.run import Run, run


@dataclass
class Verdict:
    """parts: one each; `general`: what keeps the file from being judged at all; `printed`: what it printed."""

    exercise: str
    parts: list[Judged] = field(default_factory=list)
    general: list[str] = field(default_factory=list)
    printed: str = ""
    # What may be said of a file that runs, right or not.
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    # The case of the part that is spoken of.
    failed: Failed | None = None
    # By rank: what the last case of each part counted.
    counts: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    # The same of the solution, once all has passed.
    best: dict[str, list[dict[str, int]]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.general and all(j.status == "ok" for j in self.parts)


def check(
    exercise: Exercise, path: Path, reference: Any, command: Callable[[int, str], list[str]], seed: int | None = None
) -> Verdict:
    """Run and judge the file at `path`. `seed`: of the inputs, drawn anew each time where it is not given."""
    begun = time.monotonic()
    verdict = Verdict(exercise.name)
    source = path.read_text(errors="replace")
    try:
        refused = rules.first_refused(source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 0
        text = (getattr(error, "text", None) or "").strip()
        where = [f"line {line}: {text}"] if line else []
        verdict.general = [*where, f"This is no Python: {getattr(error, 'msg', error)}."]
        return verdict
    if refused:
        verdict.general = [f"line {refused[0]}: {refused[1]}."]
        return verdict
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    chosen = cases(exercise.parts, seed)
    examiner = Examiner(exercise, reference)
    # What is right is worked out while the learner's processes start and run.
    ahead = threading.Thread(target=examiner.prepare, args=(chosen,), daemon=True)
    ahead.start()
    done = run(exercise, str(path), source, chosen, command)
    ahead.join()
    verdict.printed = done.printed
    verdict.remarks = remarks.loops(exercise, source)
    verdict.parts = examiner.judge(chosen, done.outcomes, source)
    if examiner.failed:
        case, by_rank = examiner.failed
        verdict.failed = Failed(case, by_rank, [r.results for r in examiner.right(case)])
    if done.ended and not any(j.status == "wrong" for j in verdict.parts):
        verdict.general = _stopped(done, exercise)
    last = {}
    for case, by_rank in zip(chosen, done.outcomes, strict=True):
        if by_rank and not case.moved:
            verdict.counts[case.part], last[case.part] = [o.counts for o in by_rank], case
    if verdict.passed:
        solved = {part: examiner.simulated(case, exercise.solution) for part, case in last.items()}
        verdict.best = {part: [o.counts for o in by_rank] for part, by_rank in solved.items()}
    verdict.seconds = time.monotonic() - begun
    return verdict


def _stopped(done: Run, exercise: Exercise) -> list[str]:
    """Why a run has no verdict, in lines for the learner."""
    if done.ended == "time":
        return [f"Nothing came of it within {exercise.facts['seconds']:g} s, and it was stopped."]
    if done.ended == "deadlock":
        return ["Nobody could go on, and it was stopped."]
    return [done.ended]
