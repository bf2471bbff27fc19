"""The arrows between the rooms of the house, held to."""

import ast

import pytest

from tests.harness import ROOT

ROOMS = ("parallel", "layers", "reference", "models", "inference", "training", "practice", "launch")
MAY_IMPORT = {
    "parallel": set(),
    "layers": {"parallel"},
    "reference": set(),
    "models": {"layers", "parallel"},
    "inference": {"models", "layers", "parallel"},
    "training": {"models", "layers", "parallel"},
    "practice": {"training", "inference", "models", "layers", "parallel"},
    "launch": {"practice", "training", "inference", "models", "layers", "parallel", "reference"},
}
OUTSIDE = {"parallel": {"numpy", "mpi4py"}, "layers": {"numpy", "mpi4py"}, "reference": {"numpy"}}
FILES = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (n.split(".")[0] for n in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    import sys

    room = path.relative_to(ROOT).parts[0]
    found = set(imported(path))
    assert found & set(ROOMS) - {room} <= MAY_IMPORT[room]
    if room in OUTSIDE:
        assert found - set(ROOMS) - set(sys.stdlib_module_names) <= OUTSIDE[room]
    if room != "launch":
        assert "COMM_WORLD" not in path.read_text(), "only launch/ and the tests may name it"


def test_there_is_something_to_hold():
    assert {p.relative_to(ROOT).parts[0] for p in FILES} >= {"parallel", "layers", "reference", "launch"}
    assert not [p for name in ("utils", "core", "common") for p in ROOT.glob(f"*/{name}*")]
