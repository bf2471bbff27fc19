"""No file of the house has two subjects: none is longer than 400 lines."""

import pytest

from tests.harness import ROOT

LONGEST = 400
ROOMS = ("launch", "practice", "plan", "inference", "training", "models", "layers", "reference", "parallel", "tests")
# Stored data and prose may be as long as they are.
KINDS = (".py", ".js", ".css", ".html", ".c", ".sh")


def too_long(root):
    """{file: lines} of the written files below `root` that are longer than LONGEST."""
    inside = [p for room in ROOMS for p in (root / room).rglob("*") if p.suffix in KINDS]
    written = [p for p in (root / "Makefile", root / ".ci/run", *inside) if p.exists()]
    lines = {str(p.relative_to(root)): len(p.read_text().splitlines()) for p in written}
    return {name: n for name, n in lines.items() if n > LONGEST}


def test_no_file_is_longer_than_400_lines():
    assert too_long(ROOT) == {}


@pytest.mark.parametrize("name", ["layers/a.py", "tests/oracles/b.py", "inference/server/page.js", "Makefile"])
def test_a_longer_one_is_seen(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("\n" * (LONGEST + 1))
    (tmp_path / "tests").mkdir(exist_ok=True)
    (tmp_path / "tests/stored.json").write_text("\n" * 1000)
    assert too_long(tmp_path) == {name: LONGEST + 1}
    (tmp_path / name).write_text("\n" * LONGEST)
    assert too_long(tmp_path) == {}
