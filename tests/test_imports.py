"""The arrows between the rooms of the house, held to."""

import ast
import sys

import pytest

from launch.__main__ import commands
from tests.harness import ROOT

MAY_IMPORT = {
    "parallel": set(),
    "layers": {"parallel"},
    "reference": set(),
    "models": {"layers", "parallel"},
    "inference": {"models", "layers", "parallel"},
    "training": {"models", "layers", "parallel"},
    "plan": {"models", "layers", "parallel"},
    "practice": {"plan", "inference", "training", "models", "layers", "parallel"},
    "launch": {"practice", "plan", "inference", "training", "models", "layers", "parallel", "reference"},
}
OUTSIDE = {"parallel": {"numpy", "mpi4py"}, "layers": {"numpy", "mpi4py"}, "reference": {"numpy"}}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(p): p for room in MAY_IMPORT for p in sorted((ROOT / room).rglob("*.py"))}
# What can be run, of what lies in launch/ itself.
COMMANDS = {m for m, p in FILES.items() if p.parent == ROOT / "launch" and '__name__ == "__main__"' in p.read_text()}
COMMANDS |= {"launch.bench.__main__"}


def imported(text):
    """Every module that the text imports, wherever in it; of `from a import b` both a and a.b, if these are modules here."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module whole"
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in FILES)


def circle(arrows):
    """The modules of one circle of arrows {module: those it imports}, or None."""
    done, way = set(), []

    def visit(module):
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return None
        way.append(module)
        found = next(filter(None, map(visit, sorted(arrows[module]))), None)
        way.pop()
        done.add(module)
        return found

    return next(filter(None, map(visit, sorted(arrows))), None)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    text, room = FILES[module].read_text(), module.split(".")[0]
    found = set(imported(text))
    rooms = {m.split(".")[0] for m in found}
    assert rooms & set(MAY_IMPORT) - {room} <= MAY_IMPORT[room]
    if room in OUTSIDE:
        assert rooms - set(MAY_IMPORT) - set(sys.stdlib_module_names) <= OUTSIDE[room]
    if not module.startswith("launch.pictures"):
        assert "matplotlib" not in rooms, "only launch/pictures draws"
    assert not found & COMMANDS, "nothing imports a command"
    if room != "launch":
        assert "COMM_WORLD" not in text, "only launch/ and the tests may name it"


def test_no_files_import_each_other_in_a_circle():
    arrows = {
        m: {i for i in imported(p.read_text()) if i in FILES and FILES[i].name != "__init__.py"} for m, p in FILES.items()
    }
    assert circle(arrows) is None


def test_a_circle_would_be_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    within = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\ndef f():\n    from b.c import d\n"
    assert {"a", "b.c"} <= set(imported(within))


def test_there_is_something_to_hold():
    assert {m.split(".")[0] for m in FILES} == set(MAY_IMPORT)
    assert {"launch.__main__", *(f"launch.{'bench.__main__' if name == 'bench' else name}" for name in commands())} == COMMANDS
    assert not [p for name in ("utils", "core", "common") for p in ROOT.glob(f"*/{name}*")]
