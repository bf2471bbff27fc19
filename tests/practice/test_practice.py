"""Every exercise keeps what AUTHORING.md promises of it, on simulated ranks."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

from launch.practice import Reference
from practice import dev
from practice.examine import Examiner
from practice.exercise import every, find
from practice.mutants import mutants
from tests.ahead import ahead
from tests.grids import thinned


@pytest.fixture(scope="module")
def reference():
    return Reference()


def checked(name):
    return dev.check(find(name), Reference(), seeds=thinned(20, 1), one_in=thinned(1, 3), with_pairs=False, with_mutants=False)


@pytest.fixture(scope="module")
def reports(request):
    """On two cores: all of it is computing."""
    with ahead(request, ProcessPoolExecutor(2, get_context("spawn")), checked) as begun:
        yield begun


@pytest.mark.limit(thinned(300, 120))
@pytest.mark.parametrize("name", [e.name for e in every()])
def test_an_exercise_accepts_what_is_right_and_names_what_is_wrong(name, reports):
    report = reports[name].result()
    assert not report.problems
    assert report.mistakes == len(find(name).mistakes[:: thinned(1, 3)])


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


@pytest.mark.parametrize(
    ("future", "annotation"), [("", "int"), ("", "'int'"), ("from __future__ import annotations\n", "int")]
)
def test_a_file_may_make_dataclasses(future, annotation, reference):
    """They look up the module that their class is of."""
    exercise = find("01_mlp_forward")
    body = exercise.solution.partition('"""\n\n')[2]
    source = f"{future}from dataclasses import dataclass\n\n@dataclass\nclass Kept:\n    tokens: {annotation} = 0\n\n{body}"
    (verdict,) = dev.judged(Examiner(exercise, reference), source, seed=1)
    assert verdict.status == "ok", verdict.lines
