"""Slips that no list has: one constant of the solution is another, an argument is not used, or a sum goes over another axis.

A slip is an edit of the solution, made by machine. It is named only if the edited solution has the learner's outcomes.
"""

from __future__ import annotations

import ast
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from practice.exercise import load
from practice.guarded import apart
from practice.part import Case, Outcome
from practice.plain import plain
from practice.simulate import simulate
from practice.truth import FILE, Truth
from practice.twists import SUMS

# How long slips may be looked for, in seconds of the examiner's own computing.
SECONDS = 1.0
SLIP = "_slip"
SMALL_SAID = (
    "{0:g} is added to what the logarithm is taken of: where that is smaller the answer ends at log({0:g}) = {1:.1f}. Add"
    " nothing: log(softmax) is z - maximum - log(sum of exp), which is never the logarithm of 0."
)
DIVISOR_SAID = "{0:g} is added to the divisor {1}: nothing belongs there. Where it may be 0, treat 0 apart."
MATHS = {"math": math, "np": np}
# Constants of this trade, by which one is often taken for another; the fit starts from the right one and may not reach them.
USUAL = (1e-5, 1e-6, 1e-8, 1e-12, 1e4, 5e5, 1e6)


# Where the number is one that nobody would write.
HIDDEN = ". If yours has the right one, look at what it multiplies, and at the brackets around that."
# What is put for -inf.
LARGE = tuple(-(10.0**n) for n in (4, 5, 6, 7, 8, 9, 10, 12, 15, 18, 20, 30, 37, 38, 300)) + tuple(
    float(np.finfo(t).min) for t in (np.float32, np.float64)
)


@dataclass(frozen=True)
class Slip:
    name: str
    sentence: str
    source: str
    # Whether somebody may have meant this number: it has few digits, or is the right one times a plain factor.
    likely: bool = True
    # The number that stands for a constant, where it is one.
    number: float | None = None


def found(truth: Truth, shown: Sequence[tuple[Case, list[Outcome]]]) -> Slip | None:
    """The slip whose outcomes are the learner's, or None."""
    return apart(lambda: _found(truth, shown), SECONDS)


def _found(truth: Truth, shown: Sequence[tuple[Case, list[Outcome]]]) -> Slip | None:
    begun = time.process_time()
    for slip in _slips(truth, shown[0]):
        if truth.explains(slip.source, shown):
            return slip
        if time.process_time() - begun > SECONDS:
            break
    return None


def _slips(truth: Truth, failed: tuple[Case, list[Outcome]]) -> Iterator[Slip]:
    case, outcomes = failed
    tree = ast.parse(truth.exercise.solution)
    yield from axes(tree)
    yield from smalls(truth)
    yield from divisors(tree)
    yield from masks(tree)
    given = case.arrays(truth.parts[case.part])
    yield from tables(tree, given)
    target = _vector(outcomes)
    if target is None or not np.isfinite(target).all():
        return
    for open_source, right, say in (*constants(tree), *arguments(tree, given)):
        for value in _fitted(truth, case, open_source, right, target):
            likely = _meant(value, right)
            sentence = say(value) if likely else say(value).rstrip(".") + HIDDEN
            yield Slip("constant", sentence, open_source.replace(SLIP, f"({value!r})"), likely, value)


# --- axes


def axes(tree: ast.Module) -> Iterator[Slip]:
    """Each sum, mean or maximum over another axis: one alone, and all of a function that go over the same."""
    nodes = list(ast.walk(tree))
    for function in (n for n in nodes if isinstance(n, ast.FunctionDef)):
        inside = set(ast.walk(function))
        sites = [(n, node) for n, node in enumerate(nodes) if node in inside and _axis(node) is not None]
        groups = [[site] for site in sites]
        groups += [g for axis in (0, 1, 2, 3, -1) if len(g := [s for s in sites if _axis(s[1]) == axis]) > 1]
        for group in groups:
            old = _axis(group[0][1])
            word = SUMS[group[0][1].func.attr] if len({s[1].func.attr for s in group}) == 1 else "reduction"
            for new in (0, 1, 2, 3, None):
                for turned in (False, True):
                    if new != old and (text := _over(tree, [n for n, _ in group], new, turned)):
                        place = "all axes" if new is None else f"axis {new}"
                        sentence = f"A {word} goes over the wrong axis: this is the answer with {place} in place of axis {old}."
                        yield Slip("axis", sentence, text)


def _axis(node: ast.AST) -> int | None:
    """The axis of a sum, None if the node is none."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SUMS):
        return None
    given = next((k.value for k in node.keywords if k.arg == "axis"), None)
    try:
        axis = ast.literal_eval(given)
    except (ValueError, TypeError):
        return None
    return axis if type(axis) is int else None


def _over(tree: ast.Module, numbers: Sequence[int], new: int | None, turned: bool) -> str:
    """The source with these sums over axis `new`; `turned`: where the result stood as r[:, None] it is r[None, :]."""
    twin = copy.deepcopy(tree)
    nodes = list(ast.walk(twin))
    sums = [nodes[n] for n in numbers]
    for node in sums:
        next(k for k in node.keywords if k.arg == "axis").value = ast.Constant(new)
    if not turned:
        return ast.unparse(twin)
    made = [a for a in nodes if isinstance(a, ast.Assign) and any(s in sums for s in ast.walk(a.value))]
    names = {t.id for a in made for t in a.targets if isinstance(t, ast.Name)}
    columns = [
        n for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name) and n.value.id in names
        and isinstance(n.slice, ast.Tuple) and len(n.slice.elts) == 2 and isinstance(n.slice.elts[0], ast.Slice)
    ]  # fmt: skip
    for node in columns:
        node.slice.elts.reverse()
    return ast.unparse(twin) if columns else ""


# --- a small number where there should be none

SMALL = (1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


def smalls(truth: Truth) -> Iterator[Slip]:
    """A small number within a logarithm, against log(0): in the solution, and where a known mistake takes another logarithm."""
    sources = [truth.mistaken((m,)) for m in truth.exercise.mistakes if any("np.log(" in new for _, new in m.edits)]
    for tree in map(ast.parse, (truth.exercise.solution, *sources)):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "log":
                for small, source in _enlarged(tree, node.args[0]):
                    yield Slip("small", SMALL_SAID.format(small, math.log(small)), source)


def divisors(tree: ast.Module) -> Iterator[Slip]:
    """A small number added to what is divided by, against x / 0."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and _value(node.right) is None:
            for small, source in _enlarged(tree, node.right):
                yield Slip("small", DIVISOR_SAID.format(small, plain(node.right)), source)


def _enlarged(tree: ast.Module, node: ast.AST) -> Iterator[tuple[float, str]]:
    """Small numbers, and the source in which each is added to the node."""
    opened, text = _opened(tree, [list(ast.walk(tree)).index(node)]), ast.unparse(node)
    for small in SMALL:
        yield small, opened.replace(SLIP, f"({text} + {small!r})")


# --- masks


def masks(tree: ast.Module) -> Iterator[Slip]:
    """Each -inf of a mask, np.where(seen, x, -np.inf), as a large negative number."""
    nodes = list(ast.walk(tree))
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "where"]
    for number in (nodes.index(x) for call in calls for x in call.args if ast.unparse(x) in ("-np.inf", "-math.inf")):
        opened = _opened(tree, [number])
        for value in LARGE:
            sentence = (
                f"What is not seen gets the score {value:g}, a number, and not -inf: where nothing at all is seen, that leaves"
                " the mean of all values."
            )
            yield Slip("mask", sentence, opened.replace(SLIP, f"({value!r})"))


# --- tables

FROM_END = "as an index into a table, which counts what is below 0 from its end"
LENGTHS = (*(2**n for n in range(8, 18)), 1000, 10_000, 100_000)


def tables(tree: ast.Module, given: dict) -> Iterator[Slip]:
    """Every argument of whole numbers, as positions are, looked up in a table that is too short for them."""
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        for name in (a.arg for a in function.args.args if getattr(given.get(a.arg), "dtype", np.dtype(float)).kind == "i"):
            low, high = given[name].min(initial=0), given[name].max(initial=0)
            ways = [("as 0 where it is below", f"np.maximum({name}, 0)"), ("without its sign", f"np.abs({name})")][
                : 2 * (low < 0)
            ]
            ends = [f"np.abs({name}).max(initial=0)", f"{name}.max(initial=0)"][: 2 * (low < 0)]
            ways += [(FROM_END, f"{name} % ({end} + 1)") for end in ends]
            ways += [("less the first of them", f"{name} - {name}[:1]"), ("in order of size", f"np.sort({name})")]
            ways += [("one too large", f"{name} + 1"), ("one too small", f"{name} - 1")]
            for length in (n for n in LENGTHS if low < 0 or high >= n):
                ways.append((f"modulo {length:,}, as an index into a table of that length", f"{name} % {length}"))
                ways.append((f"as {length - 1:,} where it is larger", f"np.minimum({name}, {length - 1})"))
            for how, text in ways:
                twin = copy.deepcopy(tree)
                body = next(n for n in ast.walk(twin) if isinstance(n, ast.FunctionDef) and n.name == function.name).body
                body.insert(0, ast.parse(f"{name} = {text}").body[0])
                yield Slip(
                    "table", f"{name} is taken {how}: it may be anything, and is to be used as it is.", ast.unparse(twin)
                )


# --- constants

# (the source with SLIP for a number, the right number, what is said of a number in its place)
Open = tuple[str, float, object]


def constants(tree: ast.Module) -> Iterator[Open]:
    """Every constant expression that is no whole number, as large as it goes (sqrt(2 / pi)), and every float within one."""
    whole = [(n, node) for n, node in enumerate(ast.walk(tree)) if _value(node) is not None]
    inner = {child for _, node in whole for child in ast.walk(node) if child is not node}
    largest = [(n, node) for n, node in whole if node not in inner and isinstance(_value(node), float)]
    literals = [(n, node) for n, node in whole if isinstance(node, ast.Constant) and isinstance(node.value, float)]
    seen = set()
    for some in (largest, literals):
        for _, node in some:
            text = ast.unparse(node)
            same = [n for n, other in some if ast.unparse(other) == text]
            for numbers in (same, *([n] for n in same)):
                if tuple(numbers) not in seen:
                    seen.add(tuple(numbers))
                    yield _opened(tree, numbers), float(_value(node)), lambda value, node=node: _said(node, value)


def _value(node: ast.AST) -> int | float | None:
    """The value of an expression made of numbers, math and np alone; None if it is another, or not finite."""
    if not isinstance(node, (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Call, ast.Attribute)):
        return None
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    if not names <= set(MATHS) or not any(isinstance(n, (ast.Constant, ast.Attribute)) for n in ast.walk(node)):
        return None
    try:
        value = eval(compile(ast.Expression(node), FILE, "eval"), MATHS)
    except Exception:
        return None
    if isinstance(value, np.floating):
        value = float(value)
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _meant(value: float, right: float) -> bool:
    few = float(f"{value:.8g}") == value
    square = (value / right) ** 2 if right else 0.0
    return few or abs(float(Fraction(square).limit_denominator(100)) - square) <= 1e-9 * square


def _opened(tree: ast.Module, numbers: Sequence[int]) -> str:
    twin = copy.deepcopy(tree)
    nodes = list(ast.walk(twin))
    places = [nodes[n] for n in numbers]

    class Open(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return ast.Name(SLIP, ast.Load()) if node in places else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Open().visit(twin)))


def _said(node: ast.AST, value: float) -> str:
    text, right = ast.unparse(node).replace("math.", "").replace("np.", ""), _value(node)
    worth = "" if isinstance(node, ast.Constant) else f" = {right:.6g}"
    sentence = f"A constant or a factor is not right: this is the answer with {value:.12g} in place of {text}{worth}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        missing = [f for f in (node.left, node.right) if math.isclose(value * _value(f), right, rel_tol=1e-9)]
        sentence += f"; the factor {ast.unparse(missing[0])} is missing" if missing else ""
    return sentence + "."


def arguments(tree: ast.Module, given: dict) -> Iterator[Open]:
    """Every argument that is a float of the case's inputs, as if something else had been given."""
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        for name in (a.arg for a in function.args.args if type(given.get(a.arg)) is float):
            twin = copy.deepcopy(tree)
            body = next(n for n in ast.walk(twin) if isinstance(n, ast.FunctionDef) and n.name == function.name).body
            body.insert(0, ast.parse(f"{name} = {SLIP}").body[0])
            sentence = f"{name} is not used as it is given: this is the answer with {name} = {{:.12g}}, whatever is asked for."
            yield ast.unparse(twin), given[name], sentence.format


# --- the fit


def _vector(outcomes: Sequence[Outcome]) -> np.ndarray | None:
    """All floats of the results, one after another; None where a rank has none."""
    if any(o.kind != "ok" for o in outcomes):
        return None
    floats = [x for o in outcomes for x in o.results.values() if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
    return np.concatenate([x.ravel() for x in floats]).astype(np.float64) if floats else None


def _fitted(truth: Truth, case: Case, source: str, right: float, target: np.ndarray) -> Iterator[float]:
    """Values of SLIP that may give the target: by Gauss and Newton from the right one, to few digits; then usual ones."""
    part, allow = truth.parts[case.part], truth.exercise.facts["allow"]

    def run(value: float) -> np.ndarray | None:
        try:
            spaces = [load(source, FILE, {SLIP: value, "__source__": source}) for _ in truth.places]
        except Exception:
            return None
        y = _vector(simulate(part, case, spaces, allow, FILE))
        return y if y is not None and y.shape == target.shape and np.isfinite(y).all() else None

    value, y = right, run(right)
    if y is None:
        return
    off = first = float(np.linalg.norm(target - y))
    for _ in range(12):
        width = 1e-6 * (abs(value) or 1.0)
        beside = run(value + width)
        if beside is None or not (slope := (beside - y) / width).any():
            break
        step, before = float(slope @ (target - y) / (slope @ slope)), off
        # A step that leads too far is taken in part.
        for share in (1.0, 0.5, 0.2):
            there = run(value + share * step)
            if there is not None and np.linalg.norm(target - there) < 0.9 * off:
                value, y, off = value + share * step, there, float(np.linalg.norm(target - there))
                break
        if off == before:
            break
    if off < 1e-6 * first:
        for digits in range(1, 16):
            rounded = float(f"{value:.{digits}g}")
            if abs(rounded - value) <= 1e-7 * abs(value):
                yield rounded
        return
    root = abs(right) ** 0.5
    powers = (right**2, root, right / math.pi**0.5, 2 * right, right / 2)
    for other in (0.0, 1.0, 10 * right, right / 10, 100 * right, right / 100, *powers, *USUAL):
        y = run(other)
        if y is not None and np.linalg.norm(target - y) <= 1e-6 * first:
            yield other
