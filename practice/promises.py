"""What an exercise's task promises or asks, word for word, and the probe that finds out whoever breaks it: promises.toml.

    [promises]
    "Keep the inputs' dtype" = ["dtype", "promoted"]

A probe is the name of a mistake of check.py that breaks the promise (and that `dev check` sees rejected), or one of these:

    limit:COUNTER     a counter that `limits` of a part bounds
    size:NAME=VALUE   a size that a part is run with
    case:WORDS        inputs that every check has, in a few words
    dtype, shape, arguments    held of every exercise: results are compared in both dtypes, shapes too, and inputs are read-only
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Sequence

from practice.axis import Place
from practice.exercise import Exercise
from practice.part import Case

FILE = "promises.toml"
GENERAL = ("dtype", "shape", "arguments")
# Words that make a sentence of a task a promise, or a demand.
WORDS = re.compile(
    r"\b(must|may|never|nothing|none|nobody|not|no more|only|keep|leave|raises|same|at most|enough|suffice|whatever|exactly"
    r"|as large as|send no|returns? what|in the order|in order|is to return|are to return|waits|once)\b",
    re.IGNORECASE,
)
COLUMNS = ("exercise", "promise", "held by")


def promises(e: Exercise) -> dict[str, list[str]]:
    """The promises of an exercise, each with its probes; {} where it has no promises.toml."""
    path = e.folder / FILE
    return tomllib.loads(path.read_text()).get("promises", {}) if path.exists() else {}


def text(e: Exercise) -> str:
    """The docstrings that a learner is given, a paragraph or a sentence a line, spaces as one."""
    found = [n for n in ast.walk(ast.parse(e.scaffold)) if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef))]
    return "\n\n".join(d for n in found if (d := ast.get_docstring(n)) and not d.startswith("Given"))


def sentences(e: Exercise) -> list[str]:
    whole = re.sub(r"\n\s*\n", ". ", text(e))
    return [s for s in re.split(r"(?<=[.;:])\s+|\s{3,}", " ".join(whole.split("\n"))) if s.strip()]


def problems(e: Exercise) -> Iterator[str]:
    """What keeps an exercise's promises from being held, a line each."""
    if not (e.folder / FILE).exists():
        yield f"there is no {FILE}: list what the task promises, each with its probe (practice/promises.py)"
        return
    given, said = _spaced(text(e)), promises(e)
    counters, sizes, names = _counters(e), _sizes(e), {m.name for m in e.mistakes}
    for promise, probes in said.items():
        if _spaced(promise) not in given:
            yield f"the task does not say {promise!r}: give its own words"
        if not probes:
            yield f"{promise!r} has no probe: name a mistake that breaks it, or a limit"
        for probe in probes:
            kind, _, rest = probe.partition(":")
            known = {"limit": rest in counters, "size": rest in sizes, "case": bool(rest)}.get(kind) if rest else None
            if not (known or probe in GENERAL or probe in names):
                yield f"{promise!r}: {probe} is no mistake, limit or size of this exercise"
    held = [_spaced(p) for p in said]
    for sentence in sentences(e):
        bare = _spaced(sentence)
        if WORDS.search(bare) and not any(p in bare or bare.strip(" .;:") in p for p in held):
            yield f"this sentence promises something that no probe holds: {bare!r}"


def rows(exercises: Sequence[Exercise]) -> list[tuple[str, str, str]]:
    return [
        (e.name.partition("_")[0], promise.replace("|", "\\|"), ", ".join(probes))
        for e in exercises
        for promise, probes in promises(e).items()
    ]


def _spaced(words: str) -> str:
    return " ".join(words.split())


def _counters(e: Exercise) -> set[str]:
    found: set[str] = set()
    for part in e.parts:
        if part.limits:
            case = Case(part.name, tuple(part.sizes[0]), part.dtypes[0], 1)
            found |= set(part.limits(case.arrays(part), Place(0, e.ranks)))
    return found


def _sizes(e: Exercise) -> set[str]:
    return {f"{n}={v}" for part in e.parts for size in part.sizes for n, v in zip(part.size_names, size, strict=True)}
