"""Every exercise keeps what AUTHORING.md promises of it; the learner's processes are real."""

from dataclasses import replace

import pytest

from launch.practice import Reference, command
from practice import dev
from practice.check import check
from practice.examine import Examiner
from practice.exercise import every, find
from practice.mutants import mutants

EXERCISES = every()


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_an_exercise_accepts_what_is_right_and_names_what_is_wrong(exercise, reference):
    report = dev.check(exercise, reference, seeds=2, with_pairs=False, with_mutants=False)
    assert not report.problems
    assert report.mistakes >= 5


def test_the_authors_check_notices_what_it_is_for(reference):
    """Sabotages of an exercise, each of which must turn the check red."""
    exercise = find("01_mlp_forward")
    part, *_ = exercise.parts

    def problems(**changed):
        sabotaged = find("01_mlp_forward")
        vars(sabotaged.check)["PARTS"] = (replace(part, **changed),)
        return " ".join(dev.check(sabotaged, reference, seeds=1, with_pairs=False, with_mutants=False).problems)

    assert problems() == ""
    right = part.want
    assert "is right and is rejected" in problems(want=lambda a, ref, at: {"y": right(a, ref, at)["y"] * 1.0001})
    assert "do not add up" in problems(ingredients=lambda a, ref, at: {"y": {"b2": a["b2_D"]}})
    assert "passes" in problems(want=lambda a, ref, at: {})


def test_a_check_that_looks_at_little_lets_mutants_through(reference):
    """The share of mutants says something: with one case and its first token alone, some survive that differ."""
    exercise = find("25_ring_all_reduce")
    examiner = Examiner(exercise, reference)
    wide = dev.wide_cases(exercise)
    few = [c for c in wide if c.size == (8, 4)][:1]
    remainder = examiner.mistaken([m for m in exercise.mistakes if m.name == "remainder"])
    assert dev.passes(dev.judged_fast(examiner, remainder, few))
    assert dev.differs(examiner, remainder, wide)
    assert not dev.differs(examiner, exercise.solution, wide)


def test_mutants_are_made_between_the_marks_only():
    exercise = find("20_linear")
    found = list(mutants(exercise.solution, exercise.yours))
    assert any("all_reduce dropped" in what for what, _ in found)
    lines = {int(what.split()[1].rstrip(":")) for what, _ in found}
    assert all(any(line in body for body in exercise.yours) for line in lines)
    assert not list(mutants(exercise.solution, []))


@pytest.mark.parametrize("name", ["01_mlp_forward", "20_linear", "25_ring_all_reduce"])
def test_a_solution_passes_in_real_processes(name, reference):
    exercise = find(name)
    verdict = check(exercise, exercise.folder / "solution.py", reference, command)
    assert verdict.passed, verdict


RING = "chunks[into] += ring.sendrecv(right, chunks[out], left)"
WRONG = {
    "sends first": ("25",
        (RING, "ring.send(right, chunks[out])\n        chunks[into] += ring.recv(left)"), "Every rank sends first"),
    "one stays away": ("20",
        ("tp.all_reduce(part_TD)", "tp.all_reduce(part_TD) if tp.rank else part_TD"), "rank 0 returned without"),
    "bias": ("20", ("(x_Tf @ W_fD)\n    return y_TD + b_D", "(x_Tf @ W_fD + b_D)\n    return y_TD"), "3 x bias"),
    "shapes": ("20", ("(part_TD)", "(part_TD[tp.rank % 2 :])"), "rank 0 has shape"),
    "fork": ("01", ("y_TD = h_TF", "import os; os.fork()\n    y_TD = h_TF"), "os.fork"),
    "ours": ("01", ("y_TD = h_TF", "__import__('layers.mlp')\n    y_TD = h_TF"), "rankwise's own code"),
    "nothing": ("01", ("return y_TD, (x_TD, a_TF, h_TF)", "y_TD"), "two values, y and saved; it returned nothing (None)"),
    "memory": ("01", ("y_TD = h_TF", "np.ones(10**10)\n    y_TD = h_TF"), "more memory"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_goes_wrong_in_real_processes_is_named(what, tmp_path, reference):
    name, (old, new), said = WRONG[what]
    exercise = find(name)
    file = tmp_path / "mine.py"
    assert old in exercise.solution
    file.write_text(exercise.solution.replace(old, new))
    verdict = check(exercise, file, reference, command, seed=3)
    assert not verdict.passed
    assert said in "\n".join(line for j in verdict.parts for line in j.lines)


@pytest.mark.parametrize(
    "odd",
    ["None", "'text'", "np.array(['a'])", "y_TD.astype(object)", "y_TD * np.nan", "y_TD > 0", "y_TD.astype(complex)", "10**400",
     "iter([y_TD])", "np.datetime64('2020')", "{'y': y_TD}", "y_TD[None]", "np.zeros(2, dtype=[('y', float)])"],
)  # fmt: skip
def test_whatever_is_returned_the_examiner_keeps_its_head(odd, reference):
    exercise = find("01_mlp_forward")
    source = exercise.solution.replace("return y_TD,", f"return {odd},")
    (verdict,) = dev.judged(Examiner(exercise, reference), source, seed=1)
    assert verdict.status == "wrong"
    assert verdict.lines
