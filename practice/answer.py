"""What a learner's file shows without being run: what it keeps between calls, arguments it does not read, float64 it makes.

None of this is a verdict. It says where, once it is known from the outcomes that something is wrong.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Methods that change what they are called on.
CHANGING = ("append", "add", "update", "setdefault", "extend", "insert", "pop", "popleft", "appendleft", "clear", "fill")
CACHES = ("cache", "lru_cache")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
WIDE = ("float64", "double", "float_", "float", "longdouble")
# np.zeros and its like make float64 unless they are told otherwise; (how many arguments come before dtype).
MAKING = {"zeros": 1, "ones": 1, "empty": 1, "eye": 3, "identity": 1, "tri": 3, "full": 2, "linspace": 5}
LONGEST = 90
# Words of a text that are names, too, in some code.
PLAIN = ("do", "at", "in", "so", "as", "no", "own", "one", "first", "last", "take", "left", "right", "back")


@dataclass(frozen=True)
class Line:
    """A line of the learner's file, and the name it is about."""

    name: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.text}"


def _tree(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _line(source: str, name: str, node: ast.AST) -> Line:
    text = source.splitlines()[node.lineno - 1].strip()
    return Line(name, node.lineno, text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")


def names(source: str) -> set[str]:
    """All names that the file's code has, and the words of its docstrings."""
    tree = _tree(source)
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)
    }
    found |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    found |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    told = [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef))]
    # Not the halves of a word, as one-hot.
    return found | {w for text in told for w in re.findall(r"(?<![\w-])\w+(?![\w-])", text) if w not in PLAIN}


def has(source: str, number: float) -> bool:
    """Whether the file's code has this number, and it is one that does not stand for many things."""
    found = {n.value for n in ast.walk(_tree(source)) if isinstance(n, ast.Constant) and type(n.value) in (int, float)}
    return number not in (0, 1, 2, 0.5) and number in found


# --- what is kept


def kept(source: str) -> list[Line]:
    """What the file's functions change that outlives a call: a name each, with the first line that changes it."""
    tree = _tree(source)
    outer = {t.id for s in tree.body for t in _targets(s) if isinstance(t, ast.Name)}
    outer |= {s.name for s in tree.body if isinstance(s, (ast.FunctionDef, ast.ClassDef))}
    found: dict[str, Line] = {}
    for function in (n for n in ast.walk(tree) if isinstance(n, FUNCTIONS)):
        for name, node in _changed(function, outer):
            found.setdefault(name, _line(source, name, node))
        for decorator in getattr(function, "decorator_list", ()):
            if last(decorator.func if isinstance(decorator, ast.Call) else decorator) in CACHES:
                found.setdefault(function.name, _line(source, function.name, decorator))
    return sorted(found.values(), key=lambda line: line.number)


def _changed(function: ast.AST, outer: set[str]) -> Iterator[tuple[str, ast.AST]]:
    nodes = list(ast.walk(function))
    shared = {name for n in nodes if isinstance(n, ast.Global) for name in n.names}
    own = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} - shared
    arguments = [*function.args.posonlyargs, *function.args.args]
    defaults = zip(arguments[len(arguments) - len(function.args.defaults) :], function.args.defaults, strict=True)
    defaults = [*defaults, *zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)]
    made = {a.arg for a, d in defaults if isinstance(d, (ast.List, ast.Dict, ast.Set, ast.Call))}
    own |= {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)} - made
    outlive = (outer | shared | made) - own
    for node in nodes:
        for target in _targets(node):
            root = _root(target)
            if isinstance(target, ast.Name) and target.id in shared:
                yield target.id, node
            elif target is not root and isinstance(root, ast.Name) and root.id in outlive:
                yield root.id, node
            elif isinstance(root, ast.Call) and last(root.func) == "globals" and isinstance(target, ast.Subscript):
                yield ast.unparse(target.slice).strip("'\""), node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            root = _root(node.func)
            if isinstance(root, ast.Name) and root.id in outlive:
                yield root.id, node


def stored(source: str) -> Iterator[tuple[set[str], str]]:
    """(arguments that it is made of, what it is found again by) of each value that a function keeps under a key: both in what
    the function is given. By '0' where it is kept once for all."""
    tree = _tree(source)
    outer = {t.id for s in tree.body for t in _targets(s) if isinstance(t, ast.Name)}
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        given = {a.arg for a in function.args.args}
        shared = {name for n in ast.walk(function) if isinstance(n, ast.Global) for name in n.names}
        meant = {k: v for k, v in _meanings(function).items() if k not in given | outer | shared}
        for node in (n for n in ast.walk(function) if isinstance(n, ast.Assign)):
            target = node.targets[0]
            key = target.slice if isinstance(target, ast.Subscript) else ast.Constant(0)
            if getattr(target.value if isinstance(target, ast.Subscript) else target, "id", "") in outer | shared - given:
                key, value = (_meant(x, meant) for x in (key, node.value))
                used = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)} & given
                used -= {n.id for n in (key.elts if isinstance(key, ast.Tuple) else [key]) if isinstance(n, ast.Name)}
                if used:
                    yield used, ast.unparse(key)


def _meanings(function: ast.FunctionDef) -> dict[str, ast.AST]:
    """What each name of a function is given; of several at once, its item."""
    found: dict[str, ast.AST] = {}
    for node in (n for n in ast.walk(function) if isinstance(n, ast.Assign)):
        for target in node.targets:
            if isinstance(target, ast.Name):
                found.setdefault(target.id, node.value)
            for n, one in enumerate(getattr(target, "elts", ())):
                item = node.value.elts[n] if isinstance(node.value, ast.Tuple) and n < len(node.value.elts) else None
                found.setdefault(getattr(one, "id", ""), item or ast.Subscript(node.value, ast.Constant(n), ast.Load()))
    return found


def _meant(node: ast.AST, meanings: dict[str, ast.AST], depth: int = 4) -> ast.AST:
    """An expression with what its names are given in their places."""

    class Meant(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.AST:
            given = meanings.get(name.id) if depth else None
            return _meant(given, meanings, depth - 1) if given is not None else name

    return Meant().visit(copy.deepcopy(node))


def _targets(node: ast.AST) -> list[ast.AST]:
    given = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    given = given if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else []
    return [t for target in given for t in (target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target])]


def _root(node: ast.AST) -> ast.AST:
    """last of last["row", 0].x; a call where it begins with one."""
    while isinstance(node, (ast.Subscript, ast.Attribute, ast.Starred)):
        node = node.value
    return node


def last(node: ast.AST | None) -> str:
    """The name by which a function, or a dtype, is called: float16 of np.float16 and of "float16"."""
    name = getattr(node, "attr", getattr(node, "id", getattr(node, "value", "")))
    return name if isinstance(name, str) else ""


# --- arguments that are not read


def unread(source: str, solution: str, others: Iterable[str] = ()) -> list[tuple[str, str]]:
    """(function, argument) of those that the solution's function reads, and all others', and the file's function does not.

    Not one that may come in another argument: a function that returns `saved` may put a scale into it, made of its own alpha.
    """
    needed, read, returned = _read(solution), _read(source), _returned(solution)
    free = {(f, a) for other in others for f, some in _read(other).items() for a, yes in some.items() if not yes}
    return [
        (f, a)
        for f, some in needed.items()
        for a, yes in some.items()
        if yes
        and (f, a) not in free
        and read.get(f, {}).get(a) is False
        and not any(_brings(read, returned, g, f, a) for g in read if g != f)
    ]


def _brings(read: dict[str, dict[str, bool]], returned: dict[str, str], g: str, f: str, argument: str) -> bool:
    """Whether g reads the argument and returns what f reads, by the name that both functions' lines give it."""
    given = [a for a, yes in read[f].items() if yes and re.search(rf"\b{a}\b", returned.get(g, ""))]
    return bool(given) and read[g].get(argument) is True


def _returned(solution: str) -> dict[str, str]:
    """By function: what its docstring says that it returns."""
    functions = [n for n in _tree(solution).body if isinstance(n, ast.FunctionDef)]
    return {f.name: (ast.get_docstring(f) or "").partition("->")[2] for f in functions}


def _read(source: str) -> dict[str, dict[str, bool]]:
    """By function: which of its arguments it reads."""
    functions = [n for n in _tree(source).body if isinstance(n, ast.FunctionDef)]
    loaded = {f.name: {n.id for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} for f in functions}
    return {f.name: {a.arg: a.arg in loaded[f.name] for a in f.args.args} for f in functions}


# --- float64


def called(tree: ast.Module, function: str) -> list[ast.AST]:
    """The function of this name, and those of the file that it calls, by whatever way."""
    made = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    found, new = {}, [function]
    while new:
        name = new.pop()
        if name in made and name not in found:
            found[name] = made[name]
            new += [n.id for n in ast.walk(made[name]) if isinstance(n, ast.Name)]
    return list(found.values())


def asked(source: str, function: str) -> str:
    """The text of this function and of those that it calls; all of the file where it has none of this name."""
    return "\n".join(map(ast.unparse, called(_tree(source), function))) or source


def untold(node: ast.AST) -> str:
    """zeros of a call of np.zeros, or of its like, that says no dtype; '' of all else."""
    name = last(node.func) if isinstance(node, ast.Call) and last(_root(node.func)) in ("np", "numpy") else ""
    told = name in MAKING and (len(node.args) > MAKING[name] or any(k.arg == "dtype" for k in node.keywords))
    return name if name in MAKING and not told else ""


def wide(source: str, function: str = "") -> list[Line]:
    """Lines that make float64 whatever the inputs are: said outright first, then np.zeros and its like without a dtype.

    function: only in this one and in what it calls.
    """
    said, unsaid, tree = [], [], _tree(source)
    for node in (n for some in (called(tree, function) if function else [tree]) for n in ast.walk(some)):
        if not isinstance(node, ast.Call):
            continue
        name = last(node.func)
        types = [*(k.value for k in node.keywords if k.arg == "dtype"), *(node.args[:1] if name == "astype" else [])]
        if name in MAKING and len(node.args) > MAKING[name]:
            types.append(node.args[MAKING[name]])
        line = _line(source, ast.unparse(node), node)
        if any(last(t) in WIDE for t in types) or name in ("float64", "double"):
            said.append(line)
        elif untold(node):
            unsaid.append(line)
    ordered = [*sorted(said, key=lambda line: line.number), *sorted(unsaid, key=lambda line: line.number)]
    return list({line.number: line for line in reversed(ordered)}.values())[::-1]
