"""An exercise as its folder says it: data, solution, scaffold, check, other right solutions."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
import warnings
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import CodeType, ModuleType, SimpleNamespace
from typing import Any

from practice.axis import PLACE, SIGNATURES, VERBS
from practice.part import Mistake, Part

FOLDER = Path(__file__).resolve().parent / "exercises"
SOLUTION = "solution.py"
# No right answer loops so often in a case.
TURNS = 10_000
YOURS, END = "# --- yours ---", "# --- end ---"
# The learner's file, as a module: its classes say that they are of it, and `dataclass` looks it up.
MODULE = "exercise"


class NoSuchExercise(ValueError):
    """A name of no exercise or of several; the text says which there are."""


def load(text: str, name: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The namespace that a source text makes, on top of the names in `before`."""
    sys.modules.setdefault(MODULE, ModuleType(MODULE))
    space = {**(before or {}), "__name__": MODULE, "__file__": name}
    exec(_compiled(text, name), space)
    return space


@lru_cache(maxsize=64)
def _compiled(text: str, name: str) -> CodeType:
    """The same for all ranks. Of a solution, which may be a changed one, no loop is endless."""
    with warnings.catch_warnings():
        # What Python warns of in a changed solution is nobody's mistake, and no learner's to read.
        warnings.simplefilter("ignore")
        return compile(bounded(text) if name == SOLUTION else text, name, "exec", dont_inherit=True)


def bounded(text: str, turns: int = TURNS) -> ast.Module:
    """The tree of a source in which no loop is endless."""
    return _Bounded(turns).visit(ast.parse(text))


class _Bounded(ast.NodeTransformer):
    """`while TEST: ...` becomes `for _ in range(TURNS): if not TEST: break; ...`, and an error after the last turn."""

    def __init__(self, turns: int) -> None:
        self._turns = turns

    def visit_While(self, node: ast.While) -> ast.AST:
        self.generic_visit(node)
        if node.orelse:
            return node
        # A continue of the loop tests again, as it should.
        first = ast.If(ast.UnaryOp(ast.Not(), node.test), [ast.Break()], [])
        turns = ast.Call(ast.Name("range", ast.Load()), [ast.Constant(self._turns)], [])
        endless = ast.parse("raise RuntimeError('a loop without end')").body
        loop = ast.For(ast.Name("_", ast.Store()), turns, [first, *node.body], endless)
        return ast.fix_missing_locations(ast.copy_location(loop, node))


@dataclass(frozen=True)
class Exercise:
    name: str

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @cached_property
    def facts(self) -> dict[str, Any]:
        """exercise.toml: title, topic, ranks, minutes, after, reads, allow, seconds, mebibytes, ask."""
        defaults = {"ranks": 1, "after": [], "reads": [], "allow": [], "seconds": 10, "mebibytes": 512, "ask": []}
        return defaults | tomllib.loads((self.folder / "exercise.toml").read_text())

    @property
    def ranks(self) -> int:
        return self.facts["ranks"]

    @cached_property
    def solution(self) -> str:
        return (self.folder / "solution.py").read_text()

    @property
    def scaffold(self) -> str:
        """The solution with what lies between the marks cut out, and with the verbs that the axis has."""
        cut = re.sub(
            rf"^( *){YOURS}\n.*?^ *{END}\n",
            lambda m: f"{m[1]}{YOURS}\n{m[1]}raise NotImplementedError\n",
            self.solution,
            flags=re.MULTILINE | re.DOTALL,
        )
        first = re.search(r"^(?:@|def |class |[A-Z]+ = )", cut, flags=re.MULTILINE)
        return cut[: first.start()] + self.verbs + cut[first.start() :] if self.verbs and first else cut

    @cached_property
    def verbs(self) -> str:
        """Comment lines with what the axis that the functions are handed has; '' where they are handed none."""
        names = [a.arg for f in ast.walk(ast.parse(self.solution)) if isinstance(f, ast.FunctionDef) for a in f.args.args]
        axis = next((n for n in names if re.search(rf"\b{n}\.({'|'.join(VERBS)}|cut|rank)\b", self.solution)), None)
        if axis is None or not self.facts["allow"]:
            return ""
        lines = [f"#     {axis}.{line}\n" for line in (*PLACE, *(SIGNATURES[v] for v in self.facts["allow"]))]
        return f"# What `{axis}` has; x and y are arrays, and no verb changes its argument:\n{''.join(lines)}\n\n"

    @property
    def yours(self) -> list[range]:
        """Lines of the solution (from 1) that lie between marks."""
        lines = self.solution.splitlines()
        starts = [n for n, line in enumerate(lines, 1) if line.strip() == YOURS]
        ends = [n for n, line in enumerate(lines, 1) if line.strip() == END]
        return [range(a, b) for a, b in zip(starts, ends, strict=True)]

    @cached_property
    def rights(self) -> dict[str, str]:
        """Other right solutions by name, from right_NAME.py: each may define only the functions that differ."""
        return {p.stem.removeprefix("right_"): p.read_text() for p in sorted(self.folder.glob("right_*.py"))}

    @cached_property
    def check(self) -> SimpleNamespace:
        path = self.folder / "check.py"
        return SimpleNamespace(**load(path.read_text(), str(path)))

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(self.check.PARTS)

    @property
    def mistakes(self) -> tuple[Mistake, ...]:
        return tuple(self.check.MISTAKES)

    def returns(self, function: str) -> list[str]:
        """The names of what a function returns, as its docstring has them after the arrow."""
        found = (f for f in ast.walk(ast.parse(self.solution)) if isinstance(f, ast.FunctionDef) and f.name == function)
        _, _, said = (ast.get_docstring(next(found)) or "").rpartition("-> ")
        return re.findall(r"(?:^|, )(\w+)", re.sub(r"\(.*?\)|:.*", "", said, flags=re.DOTALL))

    @property
    def hints(self) -> list[str]:
        """The nudges of hints.md, which a line of --- separates."""
        return [h.strip() for h in re.split(r"^---$", (self.folder / "hints.md").read_text(), flags=re.MULTILINE)]

    @property
    def notes(self) -> str:
        return (self.folder / "notes.md").read_text().strip()

    @property
    def task(self) -> str:
        """The solution's docstring: what is to be done."""
        return ast.get_docstring(ast.parse(self.solution)) or ""


def every() -> list[Exercise]:
    return [Exercise(p.parent.name) for p in sorted(FOLDER.glob("*/exercise.toml"))]


def find(name: str) -> Exercise:
    """The exercise of a full name, a number (7 or 07), or the beginning of a name with or without its number."""
    named = [e for e in every() if e.name == name or (name.isdecimal() and int(e.name.partition("_")[0]) == int(name))]
    matching = named or [e for e in every() if e.name.startswith(name) or e.name.partition("_")[2].startswith(name)]
    if len(matching) != 1:
        problem = f"the beginning of several: use one of {', '.join(e.name for e in matching)}" if matching else "no exercise"
        known = "" if matching else f": use 1 to {len(every())}, or a name that python -m launch.practice list shows"
        raise NoSuchExercise(f"{name!r} is {problem}{known}")
    return matching[0]
