"""A failing case in the learner's hands: its arrays in a file, and a script that calls their code on them, in one process."""

from __future__ import annotations

import inspect
import json
import textwrap
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from practice.axis import Place
from practice.exercise import Exercise, load
from practice.part import Case, Outcome
from practice.simulate import simulate
from practice.workbook import replace

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = '''"""{title}: the smallest case that failed. `check --case` writes this file anew.

case_{number}.npz has its arrays:
{arrays}
All ranks run in this one process, so that print and breakpoint() work in your code.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, {root!r})

from practice.replay import replay  # noqa: E402

# Your code is called so, on the arrays in.NAME. Results by name come back:
{call}
for rank, (yours, right) in enumerate(replay(HERE / "case_{number}.npz", HERE / "{name}.py")):
    for name in yours | right:
        print(f"rank {{rank}}, {{name}}: yours", yours.get(name), "right", right.get(name), "", sep="\\n")
'''


@dataclass(frozen=True)
class Failed:
    """A case that failed: what came of it, and what is right, by rank."""

    case: Case
    outcomes: list[Outcome]
    right: list[dict[str, Any]]


def keep(folder: Path, exercise: Exercise, failed: Failed) -> tuple[Path, Path]:
    """Write case_NN.npz and case_NN.py; returns their paths."""
    part = next(p for p in exercise.parts if p.name == failed.case.part)
    number, several = exercise.name.partition("_")[0], exercise.ranks > 1
    inputs = {f"in.{n}": x for n, x in failed.case.arrays(part).items() if isinstance(x, np.ndarray)}
    arrays = {"case": np.array(json.dumps(vars(failed.case) | {"exercise": exercise.name})), **inputs}
    for rank, (outcome, right) in enumerate(zip(failed.outcomes, failed.right, strict=True)):
        at = f"rank{rank}." if several else ""
        arrays |= {f"{at}right.{n}": _storable(x) for n, x in right.items()}
        arrays |= {f"{at}yours.{n}": _storable(x) for n, x in outcome.results.items()}
    told = ["in.NAME what is given, right.NAME what is right, yours.NAME what your code returned."]
    if several:
        arrays |= _handed(exercise, failed.case)
        told = [
            "in.NAME whole arrays, rank0.FUNCTION.NAME what rank 0's function is handed of them,",
            "rank0.right.NAME what is right on rank 0, rank0.yours.NAME what your code returned there.",
        ]
    data, script = folder / f"case_{number}.npz", folder / f"case_{number}.py"
    np.savez(data, **arrays)
    call = textwrap.indent(textwrap.dedent(inspect.getsource(part.call)).rstrip(), "#     ", lambda line: True)
    title = f"{exercise.name}, {part.name}, {failed.case.label(part)}"
    facts = {"title": title, "number": number, "name": exercise.name, "root": str(ROOT), "call": call}
    replace(script, SCRIPT.format(arrays=textwrap.indent("\n".join(told), "  "), **facts))
    return data, script


def _storable(x: Any) -> np.ndarray:
    """An array as it is; plain data as its text."""
    return x if isinstance(x, np.ndarray) else np.array(x if isinstance(x, (int, float)) else repr(x))


def _handed(exercise: Exercise, case: Case) -> dict[str, np.ndarray]:
    """The arrays that each rank's functions are handed, as the solution's are."""
    arrays: dict[str, np.ndarray] = {}

    def watched(rank: int, function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
            for name, x in given.items():
                if isinstance(x, np.ndarray):
                    arrays.setdefault(f"rank{rank}.{function.__name__}.{name}", np.array(x))
            return function(*args, **kwargs)

        return call

    part = next(p for p in exercise.parts if p.name == case.part)
    spaces = [load(exercise.solution, "solution.py") for _ in range(exercise.ranks)]
    spaces = [{n: watched(r, x) if inspect.isfunction(x) else x for n, x in s.items()} for r, s in enumerate(spaces)]
    simulate(part, case, spaces, exercise.facts["allow"], "solution.py")
    return arrays


def replay(data: Path, file: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(results of the learner's code, right results) by rank, on the arrays in `data`. What kept a rank from one: "error"."""
    with np.load(data) as kept:
        arrays = {n: kept[n] for n in kept.files}
    facts = json.loads(str(arrays.pop("case")))
    exercise = Exercise(facts.pop("exercise"))
    case = Case(**facts | {"size": tuple(facts["size"])})
    part = next(p for p in exercise.parts if p.name == case.part)
    given = case.arrays(part) | {n.removeprefix("in."): x for n, x in arrays.items() if n.startswith("in.")}
    source = file.read_text()
    places = Place(0, exercise.ranks).others()
    spaces = [load(source, str(file), {"__source__": source}) for _ in places]
    found = []
    for rank, o in enumerate(simulate(part, case, spaces, exercise.facts["allow"], str(file), given)):
        at = f"rank{rank}.right." if exercise.ranks > 1 else "right."
        why = (
            f"waits in {o.waits.partition('|')[0]}"
            if o.kind == "hang"
            else "{type}: {message} (line {line})".format_map({"type": "", "message": "", "line": 0} | o.error)
        )
        right = {n.removeprefix(at): x for n, x in arrays.items() if n.startswith(at)}
        found.append((o.results if o.kind == "ok" else {"error": why}, right))
    return found
