"""The author's check of an exercise: right answers pass, wrong ones are rejected and named, unlisted ones too."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from parallel.remains import die_with_parent
from practice import promises
from practice.examine import Examiner, Judged
from practice.exercise import Exercise
from practice.known import contradicted
from practice.mutants import mutants
from practice.part import Case, Mistake, cases, float64

# A mutant is stopped after so many times the computing of the solution, and a second.
TIMES = 4
# At most so many pairs of mistakes are tried, evenly spread over all.
PAIRS = 40
# What the examiner may compute for one.
PAIR_SECONDS = 10
# The search for a pair ends by the clock, and an author's machine may be busy.
PATIENCE = 4.0
REJECTED_SHARE = 0.95


@dataclass
class Report:
    exercise: str
    problems: list[str] = field(default_factory=list)
    mistakes: int = 0
    pairs: int = 0
    mutants: int = 0
    equivalent: int = 0
    rejected: int = 0
    survivors: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        different = self.mutants - self.equivalent
        return self.rejected / different if different else 1.0


def judged(examiner: Examiner, source: str, seed: int, over: bool = False) -> list[Judged]:
    """The verdict on a source, on simulated ranks."""
    chosen = cases(examiner.exercise.parts, seed)
    return examiner.judge(chosen, [*examiner.anew(chosen, source, over)], source)


def told(examiner: Examiner, source: str, seed: int, over: bool = False) -> list[Judged]:
    """As `judged`, up to the first wrong part, without the cases that only tell what depends on what: they judge nothing."""
    verdict: list[Judged] = []
    chosen = [c for c in cases(examiner.exercise.parts, seed) if not c.moved]
    for part in examiner.exercise.parts:
        own = [c for c in chosen if c.part == part.name]
        outcomes = [*examiner.anew(own, source, over)]
        verdict += [j for j in examiner.judge(own, outcomes, source) if j.part == part.name]
        if verdict[-1].status == "wrong":
            break
    return verdict


def passes(verdict: Sequence[Judged]) -> bool:
    return all(j.status == "ok" for j in verdict)


def summary(verdict: Sequence[Judged]) -> str:
    """The first verdict that is not ok, in one line."""
    return next((f"{j.part} {j.status} ({j.case}): {' | '.join(j.lines)}" for j in verdict if j.status != "ok"), "")


def check(
    exercise: Exercise, reference: Any, seeds: int = 20, one_in: int = 1, with_pairs: bool = True, with_mutants: bool = True
) -> Report:
    """Check all that must hold of an exercise, in ten to thirty seconds, with one in so many of its mistakes; `refused` draws
    more inputs."""
    report, examiner = Report(exercise.name), Examiner(exercise, reference)
    report.problems += [*_files(exercise), *promises.problems(exercise)]
    verdict = judged(examiner, exercise.scaffold, 1)
    if {j.status for j in verdict} != {"todo"}:
        report.problems.append(f"the scaffold is {[j.status for j in verdict]}, not 'not implemented yet': {summary(verdict)}")
    for seed in range(1, seeds + 1):
        report.problems += [*_refused(examiner, seed), *_parts(examiner, seed)]
    _mistakes(examiner, report, one_in)
    if with_pairs:
        _pairs(examiner, report)
    if with_mutants:
        _mutants(examiner, report)
    return report


def refused(exercise: Exercise, reference: Any, seeds: range) -> list[str]:
    """Which right answers are not accepted, on many seeds: a line each."""
    # An examiner remembers what is right in every case: a new one a seed keeps that small.
    return [line for seed in seeds for line in _refused(Examiner(exercise, reference), seed)]


def _refused(examiner: Examiner, seed: int) -> Iterator[str]:
    exercise = examiner.exercise
    for name, source, over in (("solution", exercise.solution, False), *((n, s, True) for n, s in exercise.rights.items())):
        verdict = told(examiner, source, seed, over)
        if not passes(verdict):
            yield f"{name} is right and is rejected, seed {seed}: {summary(verdict)}"


def _files(exercise: Exercise) -> Iterator[str]:
    for name in ("exercise.toml", "solution.py", "check.py", "hints.md", "notes.md"):
        if not (exercise.folder / name).exists():
            yield f"there is no {name}"
            return
    for fact in ("title", "topic", "minutes"):
        if fact not in exercise.facts:
            yield f"exercise.toml has no {fact}"
    if len(exercise.hints) != 3:
        yield f"hints.md has {len(exercise.hints)} nudges: three are needed, a line of --- between them"
    lines = exercise.solution.splitlines()
    secret = {lines[n - 1].strip() for body in exercise.yours for n in body if len(lines[n - 1].strip()) > 12} - {
        "# --- yours ---"
    }
    yield from (f"a hint contains a line of the solution: {s}" for s in secret if any(s in h for h in exercise.hints))
    if len(exercise.rights) < 2:
        yield "there are fewer than two other right solutions, right_NAME.py"
    if len(exercise.mistakes) < 5:
        yield "there are fewer than five MISTAKES"
    for n, question in enumerate(exercise.facts["ask"]):
        right = answer(question["answer"])
        for wrong in question.get("wrong", ()):
            if abs(answer(wrong["value"]) - right) <= 0.02 * abs(right):
                yield f"ask {n}: the wrong value {wrong['value']} is the right answer"


def answer(expression: str) -> float:
    """The value of an answer's expression over math and numpy."""
    import math

    return float(eval(expression, {"math": math, "np": np}))


def _parts(examiner: Examiner, seed: int) -> Iterator[str]:
    """Check that the ingredients add up to the right answer."""
    for case in cases(examiner.exercise.parts, seed):
        part = examiner.parts[case.part]
        if part.ingredients is None or case.moved or case.dtype != "float64":
            continue

        a = float64(case.arrays(part))
        for place, right in zip(examiner.places, examiner.right(case), strict=True):
            for name, pieces in part.ingredients(a, examiner.reference, place).items():
                total, want = sum(pieces.values()), right.results.get(name)
                if (
                    want is not None
                    and np.shape(want)
                    and np.abs(total - want).max(initial=0) > 1e-9 * (1 + np.abs(want).max(initial=0))
                ):
                    yield f"{part.name}: the ingredients of {name} do not add up to it ({case.label(part)}, rank {place.rank})"
                    return


def _mistakes(examiner: Examiner, report: Report, one_in: int) -> None:
    for m in examiner.exercise.mistakes[::one_in]:
        source = examiner.mistaken((m,))
        if source is None:
            report.problems.append(f"mistake {m.name}: its edits do not apply to the solution")
            continue
        try:
            verdict = told(examiner, source, 1)
        except SyntaxError:
            report.problems.append(f"mistake {m.name}: its edits make no Python")
            continue
        report.mistakes += 1
        named = [n for j in verdict for n in j.mistakes]
        said = "\n".join(line for j in verdict for line in j.lines)
        if passes(verdict):
            report.problems.append(f"mistake {m.name} passes")
        elif named != [m.name] or m.sentence not in said:
            report.problems.append(f"mistake {m.name} is named {named}: {summary(verdict)}")


def _pairs(examiner: Examiner, report: Report) -> None:
    """Some pairs of mistakes, of which one at least must be named. Two together may run for ever: such a pair is stopped."""
    pairs = list(itertools.combinations(examiner.exercise.mistakes, 2))
    # Two that are together a third one are told as that.
    alone = {None, *(examiner.mistaken((m,)) for m in examiner.exercise.mistakes)}
    chosen = [(p, s) for p in pairs[:: -(-len(pairs) // PAIRS) or 1] if (s := examiner.mistaken(p)) not in alone]

    def judge(source: str) -> str:
        try:
            verdict = told(examiner, source, 1)
        except SyntaxError:
            return ""
        return "passes" if passes(verdict) else json.dumps([[n for j in verdict for n in j.mistakes], summary(verdict)])

    examiner.patience = PATIENCE
    for (pair, source), result in zip(chosen, forked(judge, [s for _, s in chosen], PAIR_SECONDS), strict=True):
        names = [m.name for m in pair]
        report.pairs += bool(result)
        if result == "passes":
            report.problems.append(f"the mistakes {names} together pass")
        elif result.startswith("["):
            named, said = json.loads(result)
            # Two may be together what one change of the file mends; or one hides in part what the other does.
            mended = any(n.startswith("repair: ") for n in named)
            if not set(named) & set(names) and not mended and not _hidden(examiner, pair, source):
                report.problems.append(f"the mistakes {names} together are named {named}: {said}")
        elif result not in ("", "stopped"):
            report.problems.append(f"the mistakes {names} together: the check itself fails: {result}")


def _hidden(examiner: Examiner, pair: tuple[Mistake, ...], source: str) -> bool:
    """Whether a result is right with both that is wrong with one of them."""
    chosen = [c for c in cases(examiner.exercise.parts, 1) if not c.moved]
    parts = {part.name: [c for c in chosen if c.part == part.name] for part in examiner.exercise.parts}
    ran = {name: list(zip(own, examiner.anew(own, source), strict=True)) for name, own in parts.items()}
    return any(contradicted(examiner, m, some) for m in pair for some in ran.values())


# --- mutants


def wide_cases(exercise: Exercise) -> list[Case]:
    """Many random inputs, to judge whether a mutant differs at all."""
    wide: dict[Case, None] = {}
    for seed in range(1000, 1008):
        wide |= dict.fromkeys(c for c in cases(exercise.parts, seed) if not c.moved)
    return list(wide)


def _mutants(examiner: Examiner, report: Report) -> None:
    exercise = examiner.exercise
    wide = wide_cases(exercise)
    chosen = cases(exercise.parts, 7)
    for case in wide + chosen:
        examiner.right(case)  # before the fork: once for all mutants

    def judge(source: str) -> str:
        # The check's own verdict comes first: a mutant that it rejects differs, and needs no more.
        if not passes(judged_fast(examiner, source, chosen)):
            return "rejected"
        return "survived" if differs(examiner, source, wide) else "equivalent"

    # What the solution takes is measured here, and so is whether it passes as not different.
    begun = time.process_time()
    result = judge(exercise.solution)
    seconds = 1 + TIMES * (time.process_time() - begun)
    if result != "equivalent":
        report.problems.append(f"mutant nothing: the check itself fails: {result}")
    listed = list(mutants(exercise.solution, exercise.yours))
    for (what, _), result in zip(listed, forked(judge, [s for _, s in listed], seconds), strict=True):
        if result not in ("rejected", "stopped", "survived", "equivalent"):
            report.problems.append(f"mutant {what}: the check itself fails: {result}")
        report.mutants += 1
        # A mutant that neither answers nor deadlocks is stopped by the learner's time limit.
        report.rejected += result in ("rejected", "stopped")
        report.equivalent += result == "equivalent"
        if result == "survived":
            report.survivors.append(what)
    if report.share < REJECTED_SHARE:
        report.problems.append(
            f"only {report.share:.0%} of the mutants that differ are rejected: {'; '.join(report.survivors)}"
        )


def judged_fast(examiner: Examiner, source: str, chosen: Sequence[Case]) -> list[Judged]:
    """Whether answers are right, without a diagnosis."""
    measured = []
    for case in chosen:
        if case.moved:
            continue
        outcomes = _safely(examiner, case, source)
        if outcomes is None or any(examiner.problem(case, r, o) for r, o in enumerate(outcomes)):
            return [Judged(case.part, "wrong")]
        measured.append((case, outcomes))
    return [examiner._cost(p, [f for f in measured if f[0].part == p.name]) for p in examiner.parts.values()]


def _safely(examiner: Examiner, case: Case, source: str) -> list | None:
    try:
        return examiner.simulated(case, source)
    except Exception:
        return None


def differs(examiner: Examiner, source: str, wide: Sequence[Case]) -> bool:
    for case in wide:
        outcomes = _safely(examiner, case, source)
        if outcomes is None or any(examiner.problem(case, r, o) for r, o in enumerate(outcomes)):
            return True
    return False


def forked(work: Callable[[str], str], items: Sequence[str], seconds: float) -> Iterator[str]:
    """work(item) of each item, in a forked process that is replaced when an item ends it or computes for longer than that:
    'stopped' then. The time is the process's own, so that a busy machine stops no more than a quiet one.
    """
    done = 0
    while done < len(items):
        reader, writer = os.pipe()
        parent, child = os.getpid(), os.fork()
        if child == 0:
            die_with_parent(parent)
            os.close(reader)
            _work(work, items[done:], seconds, writer)
        os.close(writer)
        with os.fdopen(reader) as lines:
            for line in lines:
                done += 1
                yield json.loads(line)
        os.waitpid(child, 0)
        if done < len(items):
            done += 1
            yield "stopped"


def _work(work: Callable[[str], str], items: Sequence[str], seconds: float, writer: int) -> NoReturn:
    """Write a line an item, and end this process: whatever happens, no caller of a caller goes on in it."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        for item in items:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                result = work(item)
            except BaseException as error:
                result = f"{type(error).__name__}: {error}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            os.write(writer, (json.dumps(result) + "\n").encode())
    finally:
        os._exit(0)


def show(report: Report) -> str:
    different = report.mutants - report.equivalent
    lines = [
        f"{report.exercise}: {report.mistakes} mistakes, {report.pairs} pairs, {report.mutants} mutants, of which {different}"
        f" differ and {report.rejected} are rejected ({report.share:.1%})"
    ]
    lines += [f"  survives: {s}" for s in report.survivors]
    lines += [f"  WRONG: {p}" for p in report.problems]
    return "\n".join(lines)


def say(exercise: Exercise, reference: Any) -> str:
    """What the examiner says to each known mistake: for the author to read."""
    examiner = Examiner(exercise, reference)
    lines = []
    for m in exercise.mistakes:
        source = examiner.mistaken((m,))
        lines += [f"== {m.name}"]
        for j in judged(examiner, source, 1) if source else []:
            lines += [f"  {j.part}: {j.status} {j.case}", *(f"    {line}" for line in j.lines)]
    return "\n".join(lines)
