"""Twists: a right answer with one thing changed, made by machine, whose effect is the learner's answer.

A name in another's place, a factor or a term left out, an operator, a step, a verb: in the solution and in each of the other
right answers, so that it matters little how the learner's is written. A twist is named only if it has the learner's outcomes in
every case that was run.
"""

from __future__ import annotations

import ast
import builtins
import copy
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from practice import narrower
from practice.answer import names
from practice.axis import VERBS
from practice.exercise import Exercise
from practice.guarded import apart
from practice.mutants import changes
from practice.part import Case, Outcome
from practice.plain import plain
from practice.simulate import simulate
from practice.spliced import Spliced
from practice.truth import FILE, Truth

# How long twists may be looked for, in seconds of the examiner's own computing.
SECONDS = 2.5
LEFT_OUT = {
    ast.Mult: "the factor {}", ast.Add: "the term {}", ast.Sub: "the term {}", ast.Div: "the division by {}",
    ast.MatMult: "the product with {}", ast.Pow: "the power {}", ast.Mod: "the remainder by {}",
}  # fmt: skip
IFS = {"if: negated": "turned round", "if: always": "taken as true always", "if: never": "never taken as true"}
# What people do most: these come before all others, in each right answer.
OFTEN = ("augmented to plain assignment", "sum to mean", "mean to sum")
SUMS = {"sum": "sum", "mean": "mean", "max": "maximum", "min": "minimum"}
# Names in each other's places are most of all: the solution's come after its others, those of other right answers after all.
SWAPS = 9
# The same change in several places, and in how many at most.
ALIKE, MANY = 5, 6
LONGEST = 70
# Numbers, and what stands round them without a meaning of its own.
BARE = (ast.Constant, ast.UnaryOp, ast.Tuple, ast.Slice, ast.keyword)
ROUND = (ast.expr, ast.keyword, ast.arguments, ast.Assign, ast.AugAssign, ast.For)
# Of a long text, so many characters before what is changed, and in all.
BEFORE, WIDTH = 20, 50
GIVEN = {*dir(builtins), "np", "math"}


@dataclass(frozen=True)
class Twist:
    """rank: what is looked at first."""

    rank: int
    sentence: str
    source: str
    # What was changed, and what it has become.
    nodes: tuple[ast.AST, ...] = field(default=(), compare=False)

    def named(self, scaffold: str, answer: str) -> list[str]:
        """A line on the names that the learner does not know; [] where there are none, or where theirs are not known."""
        nodes = [n for some in self.nodes for n in ast.walk(some)]
        here = {_short(n.id) for n in nodes if _is_name(n) and n.id not in GIVEN}
        here |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n).startswith("self.")}
        told = [w for w in dict.fromkeys(re.findall(r"\w+", self.sentence)) if w in here]
        theirs = _known(scaffold) | _known(answer) if answer else here
        others = [w for w in told if w not in theirs]
        return [f"(Here {', '.join(others)} {'is' if len(others) == 1 else 'are'} named as in our solution.)"] if others else []


def found(truth: Truth, shown: Sequence[tuple[Case, list[Outcome]]]) -> Twist | None:
    """The twist whose outcomes are the learner's, or None. shown: cases with the learner's outcomes, a wrong one first."""
    return apart(lambda: _found(truth, shown), SECONDS)


def _found(truth: Truth, shown: Sequence[tuple[Case, list[Outcome]]]) -> Twist | None:
    begun, second = time.process_time(), None
    case, theirs = shown[0]
    part, allow = truth.parts[case.part], truth.exercise.facts["allow"]
    for twist in twists(truth.exercise, truth.answer):
        if time.process_time() - begun > SECONDS:
            break
        try:
            ours = simulate(part, case, truth.made(twist.source), allow, FILE)
        except Exception:
            continue
        if truth.alike(case, ours, theirs) and truth.explains(twist.source, shown):
            # What spoils a part that the learner has right is told only if nothing else gives this answer.
            if not truth.spoils(twist.source, case):
                return twist
            second = second or twist
    return second


def twists(exercise: Exercise, answer: str = "") -> list[Twist]:
    """All of an exercise's, those of the solution first, the likelier kinds before others. answer: whose names may be used."""
    made: dict[str, Twist] = {}
    told = symbols(exercise.scaffold) | symbols(answer)
    for number, (source, lines) in enumerate(bases(exercise)):
        for twist in sorted(_twists(source, lines, told), key=lambda t: t.rank):
            last = 100 if number and twist.rank == SWAPS else 0
            made.setdefault(twist.source, replace(twist, rank=10 * number + twist.rank + last))
    return sorted(made.values(), key=lambda t: t.rank)


def symbols(scaffold: str) -> set[str]:
    """The names that a task has for what is computed: its arguments, and what its formulas and shapes stand behind."""
    names = re.findall(r"\b([A-Za-z]\w*)(?=\s*[=\[]|\s*\([A-Z0-9])", scaffold)
    names += [a.arg for f in ast.walk(ast.parse(scaffold)) if isinstance(f, ast.FunctionDef) for a in f.args.args]
    # A word of the text that is a function's name, as sum, is no name of a result.
    return {n for name in names for n in (name, _short(name))} - set(dir(builtins))


def bases(exercise: Exercise) -> Iterator[tuple[str, list[range]]]:
    """(source, lines that may be changed): the solution, and the solution with each other right answer on top."""
    yield exercise.solution, exercise.yours
    above = len(exercise.solution.splitlines()) + 1
    for text in exercise.rights.values():
        yield f"{exercise.solution}\n{text}", [range(above, above + len(text.splitlines()) + 2)]


def _twists(source: str, lines: Sequence[range], told: set[str]) -> Iterator[Twist]:
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    # Of the statements that hold a node, ast.walk meets the innermost last.
    statements = {n: s for s in nodes if isinstance(s, ast.stmt) for n in ast.walk(s)}
    parents = {child: n for n in nodes for child in ast.iter_child_nodes(n)}
    functions = {n: f for f in nodes if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    spliced, axes, alike = Spliced(source), narrower.axes(nodes), {}
    given = {f.name: len(f.args.args) for f in tree.body if isinstance(f, ast.FunctionDef)}
    for node in nodes:
        if not any(getattr(node, "lineno", 0) in some for some in lines) or node not in functions:
            continue
        place = _place(statements.get(node), told)
        ways = (
            *_swapped(node, functions[node]), *_loops(node), *_brackets(node, place), *_reshaped(node, place),
            *narrower.ways(node, functions[node], axes, given),
            *((_rank(what), _said(what, node, place), change) for what, change in changes(node)),
        )  # fmt: skip
        for rank, sentence, change in ways:
            try:
                new = ast.fix_missing_locations(change(copy.deepcopy(node)))
                text = spliced.text((node, new))
            except (TypeError, ValueError, AttributeError):
                continue
            twist = Twist(rank, sentence or _instead(*wider(node, new, parents), place), text, (node, new))
            key = (_form(node), _form(new))
            if rank != SWAPS and key[0] != key[1] and isinstance(node, (ast.Call, ast.Attribute)):
                alike.setdefault(key, []).append(twist)
            yield twist
    # A function that is called twice, as a linear's backward, has its mistake twice. (Signs and sums are not that alike.)
    for some in (some for some in alike.values() if 1 < len(some) < MANY):
        others = ", ".join(dict.fromkeys(plain(t.nodes[0]) for t in some[1:]))
        with suppress(ValueError):
            text = spliced.text(*(t.nodes for t in some))
            yield Twist(ALIKE, f"{some[0].sentence} So it is with {others}.", text, some[0].nodes)


def _form(node: ast.AST) -> str:
    """A node without its names."""
    return re.sub(r"id='\w+'", "", ast.dump(node))


# --- what is changed


def _swapped(node: ast.AST, function: ast.FunctionDef) -> Iterator[tuple[int, str, object]]:
    """A name for another of the same function that is of the same kind: shapes stand behind the underscore."""
    if not (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)):
        return
    stored = [n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    names = dict.fromkeys([a.arg for a in function.args.args] + stored)
    # A list that is put into itself: NumPy never comes to its end.
    into = [
        *(c.func for c in ast.walk(function) if isinstance(c, ast.Call) and node in c.args),
        *(t for a in ast.walk(function) if isinstance(a, ast.Assign) and node in ast.walk(a.value) for t in a.targets),
    ]
    itself = {n.id for i in into if isinstance(i, (ast.Attribute, ast.Subscript)) for n in ast.walk(i.value) if _is_name(n)}
    if node.id in names:
        for other in names:
            if other not in {node.id, "self"} and _kind(other) == _kind(node.id) and other not in itself:
                yield SWAPS, "", lambda n, other=other: ast.Name(other, ast.Load())


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _kind(name: str) -> str:
    return name.partition("_")[2]


def _loops(node: ast.AST) -> Iterator[tuple[int, str, object]]:
    if isinstance(node, ast.For):
        # The same may come of a loop that has a step too few.
        yield (
            0,
            f"A loop is missing, or ends too early: for {plain(node.target)} in {plain(node.iter)}.",
            lambda n: ast.Pass(),
        )
        yield (
            2, f"A loop ends after its first turn: for {plain(node.target)} in {plain(node.iter)}.",
            lambda n: ast.For(n.target, n.iter, [*n.body, ast.Break()], []),
        )  # fmt: skip
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "range" and node.args:
        yield 0, f"{plain(node)} ends one too early.", lambda n: _stopped(n, -1)
        yield 1, f"{plain(node)} ends one too late.", lambda n: _stopped(n, 1)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield 1, f"The sign of {plain(node.right)} is turned.", lambda n: ast.BinOp(n.left, ast.Sub(), n.right)
        yield 1, f"The sign of {plain(node.left)} is turned.", lambda n: ast.BinOp(n.right, ast.Sub(), n.left)
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
        yield (
            1, f"What belongs in the place of {plain(node.targets[0])} is added to it.",
            lambda n: ast.AugAssign(n.targets[0], ast.Add(), n.value),
        )  # fmt: skip


def _stopped(node: ast.Call, by: int) -> ast.Call:
    """range(a, b) with another b."""
    stop = min(len(node.args) - 1, 1)
    node.args[stop] = ast.BinOp(node.args[stop], ast.Add(), ast.Constant(by))
    return node


def _brackets(node: ast.AST, place: str) -> Iterator[tuple[int, str, object]]:
    """c (a + b) as c a + b, and (a + b) / c as a + b / c or a / c + b."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div, ast.MatMult))):
        return
    for side in ("left", "right") if not isinstance(node.op, ast.Div) else ("left",):
        whole = getattr(node, side)
        if isinstance(whole, ast.BinOp) and isinstance(whole.op, (ast.Add, ast.Sub)):
            other = node.right if side == "left" else node.left
            what = "division by" if isinstance(node.op, ast.Div) else "factor"
            for alone in ("left", "right"):

                def change(n: ast.BinOp, side: str = side, alone: str = alone) -> ast.BinOp:
                    total = getattr(n, side)
                    setattr(n, side, getattr(total, alone))
                    setattr(total, alone, n)
                    return total

                one, all_of = plain(getattr(whole, alone)), plain(whole)
                sentence = f"{place}the {what} {plain(other)} is of {one} alone: it is of all of {all_of}."
                yield 1, _sentence(sentence), change


def _reshaped(node: ast.AST, place: str) -> Iterator[tuple[int, str, object]]:
    """What is transposed, by a method or within einsum, reshaped to the same shape: the numbers stay in their order."""
    said = "{} is reshaped where it must be transposed: reshape changes the shape, and leaves the numbers in their order."
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield (
            1,
            place + said.format(plain(node.value)),
            lambda n: _call(n.value, "reshape", _shape(n)),
        )
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return
    if node.func.attr in ("transpose", "swapaxes", "moveaxis"):
        of_numpy = isinstance(node.func.value, ast.Name) and node.func.value.id == "np"
        x = node.args[0] if of_numpy else node.func.value
        yield (
            1, place + said.format(plain(x)),
            lambda n: _call(n.args[0] if of_numpy else n.func.value, "reshape", _shape(n)),
        )  # fmt: skip
    elif node.func.attr == "einsum" and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
        for number, letters in enumerate(node.args[0].value.partition("->")[0].split(","), 1):
            for dims in list(itertools.permutations(range(len(letters))))[1:] if len(letters) < 4 else ():

                def change(n: ast.Call, number: int = number, dims: tuple[int, ...] = dims) -> ast.Call:
                    x, back = n.args[number], [dims.index(i) for i in range(len(dims))]
                    shape = ast.parse(f"[({ast.unparse(x)}).shape[i] for i in {dims}]", mode="eval").body
                    n.args[number] = _call(_call(x, "reshape", shape), "transpose", ast.parse(str(back), mode="eval").body)
                    return n

                yield 2, place + said.format(plain(node.args[number])), change


def _shape(x: ast.AST) -> ast.AST:
    return ast.Attribute(x, "shape", ast.Load())


def _call(x: ast.AST, method: str, argument: ast.AST) -> ast.Call:
    return ast.Call(ast.Attribute(x, method, ast.Load()), [argument], [])


def _rank(what: str) -> int:
    if what in OFTEN:
        return -100
    return 0 if " only" in what or "dropped" in what else 3 if " to " in what and what[0] in "-0123456789" else 2


# --- what is said of it


def _said(what: str, node: ast.AST, place: str) -> str:
    """The sentence where what was changed has a plain name; '' where before and after are shown."""
    of_what = f" of {plain(node)}" if not place and len(plain(node)) <= LONGEST else ""
    if isinstance(node, ast.BinOp) and what.endswith(" only"):
        out = node.right if what.startswith("left") else node.left
        of = LEFT_OUT.get(type(node.op)) if what.startswith("left") or isinstance(node.op, (ast.Mult, ast.Add)) else None
        left = (of or "{}").format(plain(out))
        return _sentence(f"{place}{left} is left out{of_what}.") if len(plain(out)) <= LONGEST else ""
    if what == "augmented to plain assignment":
        return f"{plain(node.target)} is replaced each time: it is to be added up."
    if what in ("statement dropped", "assignment dropped", "augmented assignment dropped"):
        return f"A step is missing: {plain(node)}."
    if what in ("break dropped", "continue dropped"):
        return f"A {what.partition(' ')[0]} is left out: what comes after it is done then as well."
    if what == "targets exchanged":
        return f"{' and '.join(plain(t) for t in node.targets[0].elts)} are exchanged."
    if what.endswith(" doubled"):
        return f"{place}{what.removesuffix(' doubled')} is called once too often."
    if isinstance(node, ast.Call) and what.removesuffix(" dropped") in VERBS:
        return f"{place}{what.removesuffix(' dropped')} is left out{of_what}."
    if what == "axis= dropped" and isinstance(node.func, ast.Attribute) and node.func.attr in SUMS:
        x = node.args[0] if node.args else node.func.value
        word = SUMS[node.func.attr]
        return f"The {word} of {plain(x)} is taken over all axes at once: it goes over one, and the others stay apart."
    if what.startswith("if: "):
        return f"The condition {plain(node.test)} is {IFS[what]}."
    return ""


def wider(old: ast.AST, new: ast.AST, parents: dict[ast.AST, ast.AST]) -> tuple[ast.AST, ast.AST]:
    """Both within the expression round them, where what is changed is a bare number: alone it says nothing."""
    outer = old
    while isinstance(outer, BARE) and isinstance(parents.get(outer), ROUND):
        outer = parents[outer]
    if outer is old:
        return old, new
    return outer, swapped(outer, old, new)


def swapped(outer: ast.AST, old: ast.AST, new: ast.AST) -> ast.AST:
    """A copy of an expression with another node in the place of one that it holds."""
    number = next(n for n, x in enumerate(ast.walk(outer)) if x is old)
    twin = copy.deepcopy(outer)
    return _Exchanged(list(ast.walk(twin))[number], new).visit(twin)


class _Exchanged(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _instead(old: ast.AST, new: ast.AST, place: str) -> str:
    before, after = cut(plain(old), plain(new))
    return f"{place}{after} stands where {before} belongs."


def cut(a: str, b: str) -> tuple[str, str]:
    """Two texts; long ones, which begin alike, from shortly before they differ."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - BEFORE) if max(len(a), len(b)) > LONGEST and same else 0

    def short(text: str) -> str:
        shown = text[start : start + WIDTH] if start else text
        return f"{'... ' if start else ''}{shown}{' ...' if start and len(text) > start + WIDTH else ''}"

    return short(a), short(b)


def _sentence(text: str) -> str:
    """With a capital, if it begins with a word of ours and not with a name of the code."""
    return text[0].upper() + text[1:] if text.startswith("the ") else text


def _place(statement: ast.stmt | None, told: set[str]) -> str:
    """Where in the answer: by the name of what is made, if the task has that name."""
    if isinstance(statement, ast.Return):
        return "In what is returned, "
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    names = [plain(t) for t in targets if t is not None]
    return f"In what makes {names[0]}, " if names and names[0] in told else ""


def _known(source: str) -> set[str]:
    """Names that a source has, with their shapes and without."""
    found = names(source)
    return found | {_short(n) for n in found}


def _short(name: str) -> str:
    return re.sub(r"_[A-Za-z0-9]{1,4}$", "", name)
