"""What the desk leaves alone and what it hands out: tracked files, the arrays of a failing case."""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from launch import practice as command
from practice.desk.desk import Refused
from practice.exercise import find
from tests.harness import ROOT, launcher_free
from tests.practice.test_cli import BIAS, NO_B2, book, drill, solve, typed  # noqa: F401  fixtures

VERBS = next(a for a in command.options()._actions if isinstance(a, argparse._SubParsersAction)).choices

# --- what fits


@pytest.mark.parametrize("width", [80, 120, 200])
def test_lists_and_pages_fit_the_terminal(width, book, typed, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", str(width))
    for begun in (False, True):
        if begun:
            typed("start")
            solve(book, "01")
            typed("check")
        for words in ([], ["list"], ["read"], ["cheat"], ["read", "11"]):
            assert [line for line in typed(*words).splitlines() if len(line) > width] == [], words
    assert "topic" in typed("list") or width == 80


# --- tracked files

# What a learner types, each verb at least once. `watch` checks as `check` does; `dev` is for authors, who change the exercises.
TYPED = [
    [], ["start"], ["check"], ["hint"], ["check", "--case"], ["solution", "--yes"], ["rate", "hard"], ["brief"], ["ask"],
    ["list"], ["read"], ["read", "5", "done"], ["board"], ["cheat", "comm"], ["interview", "2026-12-20"],
    ["drill"], ["drill", "stop"], ["mock"], ["drill", "stop"],
]  # fmt: skip
AUTHORS = {"dev", "watch"}
TYPING = """
import json, sys
from launch.practice import main
for words in json.loads(sys.argv[1]):
    main(words)
"""


def hashes(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts and "workbook" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_no_command_of_a_learner_changes_a_tracked_file(tmp_path):
    """In a copy of the house, with its own workbook/ and no RANKWISE_WORKBOOK."""
    assert {words[0] for words in TYPED if words} == set(VERBS) - AUTHORS
    house = tmp_path / "house"
    rooms = [p.name for p in ROOT.iterdir() if (p / "__init__.py").exists() and p.name != "tests"]
    for room in rooms:
        shutil.copytree(ROOT / room, house / room, ignore=shutil.ignore_patterns("__pycache__"))
    before = hashes(house)
    environ = {k: v for k, v in launcher_free().items() if not k.startswith("RANKWISE_")}
    environ |= {"PYTHONPATH": str(house), "PYTHONDONTWRITEBYTECODE": "1"}
    run = [sys.executable, "-c", TYPING, json.dumps(TYPED)]
    done = subprocess.run(run, cwd=house, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert hashes(house) == before
    assert "| DONE | Megatron-LM (" in (house / "workbook/READING.md").read_text()
    assert "exercises/20_linear" in (house / "workbook/STATUS.md").read_text()


# --- the arrays of a case


def answered(script):
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=launcher_free())
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_a_failing_case_is_kept_with_a_script_that_calls_the_learners_code(book, typed):  # noqa: F811
    typed("start")
    solve(book, "01", NO_B2)
    out = typed("check", "--case", "--seed", "3", status=1)
    assert f"python {book / 'case_01.py'}" in out
    with np.load(book / "case_01.npz") as kept:
        a = {n: kept[n] for n in kept.files}
    assert {"in.x_TD", "in.W1_DF", "in.b1_F", "in.W2_FD", "in.b2_D", "right.y", "yours.y"} <= set(a)
    np.testing.assert_allclose(a["yours.y"] + a["in.b2_D"], a["right.y"], rtol=1e-12)
    said = answered(book / "case_01.py")
    assert str(a["yours.y"]) in said
    assert str(a["right.y"]) in said
    # What stands in the learner's file now is what the script calls.
    solve(book, "01")
    assert answered(book / "case_01.py").count(str(a["right.y"])) == 2
    # And on the arrays that stand in the file now.
    np.savez(book / "case_01.npz", **a | {"in.x_TD": 0 * a["in.x_TD"], "in.b1_F": 0 * a["in.b1_F"]})
    assert str(np.tile(a["in.b2_D"], (len(a["in.x_TD"]), 1))) in answered(book / "case_01.py")
    assert "No case has failed" in typed("check", "--case")


def test_each_ranks_part_of_a_case_is_kept(book, typed):  # noqa: F811
    typed("start", "20")
    solve(book, "20", BIAS)
    told = json.loads(typed("check", "--case", "--json", "--seed", "3", status=1))
    assert told["case"] == [str(book / "case_20.npz"), str(book / "case_20.py")]
    with np.load(book / "case_20.npz") as kept:
        a = {n: kept[n] for n in kept.files}
    parts = [a[f"rank{r}.row_forward.W_fD"] for r in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), a["in.V_FD"])
    np.testing.assert_allclose(a["rank1.yours.y"] - 2 * a["in.c_D"], a["rank1.right.y"], rtol=1e-9, atol=1e-12)
    said = answered(book / "case_20.py")
    assert all(f"rank {r}, y: yours\n{a[f'rank{r}.yours.y']}\nright\n{a[f'rank{r}.right.y']}" in said for r in range(3))


def test_every_exercise_can_keep_a_case(tmp_path):
    """Iterators, classes, plain data and all: the script's results are those of the check."""
    from practice import replay
    from practice.examine import Examiner
    from practice.exercise import every
    from practice.part import cases

    for e in every():
        part, examiner = e.parts[0], Examiner(e, command.Reference())
        case = next(c for c in cases(e.parts, 1) if c.part == part.name)
        outcomes = examiner.simulated(case, e.solution)
        right = [r.results for r in examiner.right(case)]
        data, script = replay.keep(tmp_path, e, replay.Failed(case, outcomes, right))
        compile(script.read_text(), str(script), "exec")
        (tmp_path / "mine.py").write_text(e.solution)
        for (yours, _), outcome in zip(replay.replay(data, tmp_path / "mine.py"), outcomes, strict=True):
            assert yours.keys() == outcome.results.keys(), e.name
            assert all(np.array_equal(yours[n], x) for n, x in outcome.results.items() if isinstance(x, np.ndarray)), e.name


def test_an_error_is_told_by_the_script(book, typed):  # noqa: F811
    typed("start")
    solve(book, "01", ("@ W2_FD + b2_D", "@ W2_FD.T.T.T + b2_D"))
    typed("check", "--case", status=1)
    assert "ValueError: matmul" in answered(book / "case_01.py")


def test_in_a_drill_there_are_no_cases(drill, book):  # noqa: F811
    drill.desk.drill("01", 25, "")
    solve(book, "01", NO_B2)
    with pytest.raises(Refused, match="no cases in a drill"):
        drill.desk.check(None, verbose=False, case=True)
    assert not list(book.glob("case_*"))
    assert find("01").name == drill.desk.progress.current
