"""Edits of a learner's function that change dtypes alone: what is made gets a dtype, what is cast is not, or is cast back."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial

from practice.answer import MAKING, WIDE, last
from practice.edits import Edit, put, said, separate

NARROW = ("float16", "half", "f2", "float32", "single", "f4")
DIGITS = {"float16": ("float16", "half", "f2"), "float32": ("float32", "single", "f4")}
# How many arguments come before the dtype of what makes an array.
PLACE = MAKING | {"array": 1, "asarray": 1, "arange": 3, "ones_like": 1, "zeros_like": 1, "empty_like": 1, "full_like": 2}
# What makes an array of others, whose dtype may be told by name.
JOINING = ("concatenate", "stack", "vstack", "hstack", "matmul", "einsum", "sum", "mean", "cumsum", "asarray", "array")


def narrow(source: str) -> bool:
    """Whether a file names a dtype of few digits."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):
        return False
    return any(last(n) in NARROW for n in nodes)


def told(lines: list[str]) -> tuple[str, list[str]]:
    """The name of what a repair repairs, and what is said of it."""
    kind = next((k for k, names in DIGITS.items() if any(n in lines[0] for n in names)), "")
    said = [f"Digits are lost: an array on the way is {kind}."] if kind else []
    return kind or f"repair: {lines[-1]}", [*said, *lines]


def why(repair: str) -> list[str]:
    """Why what a repair changes has made float64; [] of a cast back."""
    if "with float(" in repair or "and float(" in repair:
        return [
            "A number that NumPy makes is a np.float64, and makes float64 of float32 arrays; a number of Python's does not."
        ]
    return ["What is made without dtype= is float64."] if "given to np." in repair else []


def edits(function: ast.FunctionDef, kinds: dict[str, set[str]], far: bool) -> Iterator[Edit]:
    """kinds: of each name what it has been. far: what is made so is cast back; or else it is not made so."""
    nodes = list(ast.walk(function))
    yield from _back(nodes, _floats(function, nodes, kinds)) if far else _causes(function, nodes, kinds)


def _causes(function: ast.FunctionDef, nodes: list[ast.AST], kinds: dict[str, set[str]]) -> Iterator[Edit]:
    parents = {child: n for n in nodes for child in ast.iter_child_nodes(n)}
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    numbers, words = [], []
    for call in calls:
        # Not cast at all.
        method = last(call.func) == "astype"
        inner = call.func.value if method else call.args[0] if call.args else None
        to = [*call.args, *(k.value for k in call.keywords)] if method else [call.func]
        if inner is not None and any(last(x) in NARROW for x in to) and (sets := put(parents[call], call, inner)):
            yield Edit(0, call.lineno, partial(said, call, inner, parents), sets)
        # A number of NumPy's promotes, one of Python's does not.
        if last(getattr(call.func, "value", None)) in ("np", "numpy") and last(call.func) not in (*PLACE, *JOINING):
            new = ast.Call(ast.Name("float", ast.Load()), [call], [])
            if sets := put(parents[call], call, new):
                yield Edit(0, call.lineno, partial(said, call, new, parents), sets)
                if _of_numbers(call, kinds):
                    numbers += sets
                    words += [said(call, new, parents)]
    yield from _together(1, words, numbers)
    for x in _floats(function, nodes, kinds):
        dtype = ast.parse(f"{x}.dtype", mode="eval").body
        given = [(n, "keywords", [*n.keywords, ast.keyword("dtype", dtype)]) for n in calls if _untold(n)]
        told = [f"with dtype={x}.dtype given to {ast.unparse(n.func)}" for n, _, _ in given]
        # An array of floats that is made one anew is cast.
        yield from _together(1, told, given, lambda n: 3 * (last(n.func) in ("array", "asarray")))
        if given and numbers:
            yield from _all(2, [*words, *told], [*numbers, *given])
        for n in (n for n in nodes if _named(n, NARROW) and not isinstance(parents[n], ast.Attribute)):
            # Where digits are lost, more of them, also for inputs of float32.
            new = ast.parse("np.float64", mode="eval").body
            yield Edit(1, n.lineno, partial(str, f"with np.float64 in place of {ast.unparse(n)}"), put(parents[n], n, new))


def _named(node: ast.AST, names: tuple[str, ...]) -> bool:
    return last(node) in names and isinstance(node, (ast.Attribute, ast.Name, ast.Constant))


def _back(nodes: list[ast.AST], floats: list[str]) -> Iterator[Edit]:
    parents = {child: n for n in nodes for child in ast.iter_child_nodes(n)}
    named = [n for n in nodes if _named(n, (*WIDE, *NARROW)) and not isinstance(parents.get(n), ast.Attribute)]
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    for x in floats:
        ends = [(n, "value") for n in nodes if isinstance(n, ast.Return) and n.value and not isinstance(n.value, ast.Tuple)]
        returned = f"with .astype({x}.dtype) at what is returned"
        yield from _together(1, [returned] * len(ends), [_cast(n, f, x) for n, f in ends])
        held = [n.value for n in nodes if isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple)]
        held += [n for n in nodes if isinstance(n, ast.List) and isinstance(n.ctx, ast.Load)]
        for some, field in [*((n, "elts") for n in held), *((n, "args") for n in calls if last(n.func) == "append")]:
            whole = getattr(some, field)
            for n, one in ((n, x) for n, x in enumerate(whole) if not isinstance(x, ast.Starred)):
                text = f"({ast.unparse(one)}).astype({x}.dtype)"
                words = partial(str, f"with .astype({x}.dtype) after {ast.unparse(one)}")
                yield Edit(2, one.lineno, words, ((some, field, [*whole[:n], _parsed(text), *whole[n + 1 :]]),))
        made = [(n, "elt") for n in nodes if isinstance(n, (ast.ListComp, ast.GeneratorExp))]
        made += [
            (n, "value") for n in nodes if isinstance(n, ast.Assign) and not isinstance(n.value, (ast.Tuple, ast.Constant))
        ]
        for n, field in made:
            what = ast.unparse(getattr(n, field))
            yield Edit(3, n.lineno, partial(str, f"with .astype({x}.dtype) after {what}"), (_cast(n, field, x),))
        # Not made float64 at all: that may be meant, to keep digits on the way.
        dtype = ast.parse(f"{x}.dtype", mode="eval").body
        told = [f"with {x}.dtype in place of {ast.unparse(n)}" for n in named]
        yield from _together(4, told, [s for n in named for s in put(parents[n], n, dtype)])


def _of_numbers(call: ast.Call, kinds: dict[str, set[str]]) -> bool:
    """Whether a call is given numbers of Python's and sizes alone, so that it gives a number."""
    sizes = ("shape", "size", "ndim")
    used = [n for x in call.args for n in ast.walk(x) if isinstance(n, (ast.Name, ast.Attribute))]
    of = {n for x in used if isinstance(x, ast.Attribute) and x.attr in sizes for n in ast.walk(x)}
    lengths = {n for x in call.args for c in ast.walk(x) if last(getattr(c, "func", None)) == "len" for n in ast.walk(c)}
    rest = [n.id for n in used if isinstance(n, ast.Name) and n not in of | lengths and n.id not in ("np", "math", "float")]
    return all(kinds.get(n, {"int"}) <= {"int", "float", "float64", "int64"} for n in rest)


def _floats(function: ast.FunctionDef, nodes: list[ast.AST], kinds: dict[str, set[str]]) -> list[str]:
    """What has a dtype to go by: arguments that are arrays of floats, or hold them, and what a loop goes through."""
    loops = [t for n in nodes if isinstance(n, (ast.For, ast.comprehension)) for t in ast.walk(n.target)]
    names = [a.arg for a in function.args.args] + [t.id for t in loops if isinstance(t, ast.Name)]
    known = {name: kinds.get(name, {"array f"}) for name in names}
    arrays = [name for name, some in known.items() if any(k.startswith("array f") for k in some)]
    return arrays + [f"{name}[0]" for name, some in known.items() if name not in arrays and some & {"list", "tuple"}]


def _untold(node: ast.Call) -> bool:
    """Whether a call makes an array and says no dtype."""
    place = PLACE.get(last(node.func))
    numpy = last(getattr(node.func, "value", None)) in ("np", "numpy")
    return numpy and place is not None and len(node.args) <= place and all(k.arg != "dtype" for k in node.keywords)


def _together(
    rank: int, words: list[str], sets: list[tuple[ast.AST, str, object]], more: Callable[[ast.AST], int] = lambda _: 0
) -> Iterator[Edit]:
    """Each alone, of a rank as much higher as `more` says of its node, then all at once."""
    lines = [getattr(n, "lineno", 0) for n, _, _ in sets]
    for line, said_of_it, one in zip(lines, words, sets, strict=True):
        yield Edit(rank + more(one[0]), line, partial(str, said_of_it), (one,))
    yield from _all(rank + 1, words, sets)


def _all(rank: int, words: list[str], sets: list[tuple[ast.AST, str, object]]) -> Iterator[Edit]:
    """All at once, where they are of several places."""
    if len(sets) > 1 and separate(sets):
        lines = [getattr(n, "lineno", 0) for n, _, _ in sets]
        places: dict[str, list[int]] = {}
        for line, said_of_it in sorted(zip(lines, words, strict=True)):
            places.setdefault(said_of_it, []).append(line)
        first, *others = (f"{w}{_lines(some)}" for w, some in places.items())
        told = ", and ".join([first, *(x.removeprefix("with ") for x in others)])
        yield Edit(rank, min(lines), partial(str, told), tuple(sets))


def _lines(lines: list[int]) -> str:
    some = list(dict.fromkeys(lines))
    return f" (line{'s' * (len(some) > 1)} {', '.join(map(str, some))})"


def _cast(node: ast.AST, field: str, x: str) -> tuple[ast.AST, str, ast.AST]:
    return node, field, _parsed(f"({ast.unparse(getattr(node, field))}).astype({x}.dtype)")


def _parsed(text: str) -> ast.AST:
    return ast.parse(text, mode="eval").body
