"""Every promise of a task has a probe; what is told of an answer does not hang on how it is written, and does not mislead."""

import numpy as np
import pytest

from practice import dev, probes, promises, remarks, twists
from practice.exercise import every, find
from practice.progress import Progress
from tests.practice.test_named import examiner, spoken

# --- promises


@pytest.mark.parametrize("exercise", every(), ids=lambda e: e.name)
def test_every_promise_of_a_task_has_a_probe(exercise):
    assert list(promises.problems(exercise)) == []
    assert len(promises.promises(exercise)) >= 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p | {"Send no more than you must": []}, "has no probe"),
        (lambda p: p | {"Send no more than you must": ["limit:miles"]}, "limit:miles is no mistake, limit or size"),
        (lambda p: p | {"Send no more than you must": ["forgetful"]}, "forgetful is no mistake"),
        (lambda p: p | {"Send much": ["dtype"]}, "the task does not say 'Send much'"),
        (
            lambda p: {k: v for k, v in p.items() if "Send" not in k},
            "no probe holds: 'Send no more than you must",
        ),
    ],
)
def test_a_promise_without_a_probe_is_refused(change, said, monkeypatch):
    exercise = find("20")
    changed = change(promises.promises(exercise))
    monkeypatch.setattr(promises, "promises", lambda e: changed)
    assert said in "\n".join(promises.problems(exercise))


def test_an_exercise_that_lists_no_promises_is_refused(monkeypatch):
    monkeypatch.setattr(promises, "FILE", "none.toml")
    assert "there is no none.toml" in "\n".join(promises.problems(find("20")))


# --- mistakes, however the answer is written


def judged(name, source):
    return dev.judged(examiner(name), source, 1, True)


EINSUM = """
import math
import numpy as np
def mlp_backward(dy, saved, W1, W2):
    X, A, hidden = saved
    k = math.sqrt(2 / math.pi)
    th = np.tanh(k * A + k * 0.044715 * A * A * A)
    slope = (1 + th) * 0.5 + A * 0.5 * (1 - th) * (1 + th) * (k + 3 * k * 0.044715 * A * A)
    dh = np.einsum("td,fd->tf", dy, W2)
    da = dh * slope
    dW2 = np.einsum("tf,td->fd", hidden, dy)
    return np.einsum("tf,df->td", da, W1), np.einsum("td,tf->df", X, da), da.sum(0), dW2, dy.sum(0)
"""
EDGES = find("25").rights["other_edges"]


@pytest.mark.parametrize(
    ("name", "source", "edit", "said"),
    [
        ("02", EINSUM, ("da.sum(0)", "dh.sum(0)"), "In what makes db1, dh stands where da belongs."),
        ("02", EINSUM, ('"td,tf->df", X, da', '"td,tf->df", X, dh'), "In what makes dW1, dh stands where da belongs."),
        ("25", EDGES, ("chunks[into] = ring", "chunks[into] += ring"), "The second phase adds"),
        ("25", EDGES, ("range(p - 1)", "range(p - 2)"), "A phase has p - 1 steps"),
    ],
    ids=["a name", "another name", "other edges, a phase", "other edges, a step"],
)
def test_a_mistake_is_named_in_an_answer_of_another_style(name, source, edit, said):
    assert edit[0] in source
    text, mistakes = spoken(judged(name, source.replace(*edit)))
    assert said in text
    assert len(mistakes) == 1


def test_twists_are_programs_and_their_sentences_are_of_one_line():
    made = twists.twists(find("06"))
    assert len(made) > 100
    for twist in made:
        compile(twist.source, "twist", "exec")
        assert "\n" not in twist.sentence
        assert twist.sentence.endswith(".")


STATE = "import numpy as np\nkept = []\n"


def test_what_is_kept_from_call_to_call_is_named():
    source = find("01").solution.replace("    # --- yours ---\n", "    kept.append(1)\n", 1)
    text, mistakes = spoken(judged("01", STATE + source.replace("return y_TD,", "return y_TD + (len(kept) > 1),")))
    assert mistakes == ["state"]
    assert "something is kept from one call to the next" in text


def test_a_buffer_that_is_returned_and_written_to_again_is_named():
    source = find("01").solution.replace(
        "    return y_TD,", "    kept[y_TD.shape, y_TD.dtype.char] = out = kept.get((y_TD.shape, y_TD.dtype.char), y_TD)\n"
        "    out[...] = y_TD\n    return out,",
    )  # fmt: skip
    text, _ = spoken(judged("01", "kept = {}\n" + source.replace("import math", "import math\nkept = {}")))
    assert "what was returned before has changed" in text


# --- nothing misleading


def test_a_factor_needs_several_entries_and_one_name_that_fits_every_case():
    want, allowed, known = np.arange(1.0, 7).reshape(2, 3), np.full((2, 3), 1e-12), {"T": 4.0, "D": 2.0}
    half = probes.factor(want / 2, want, allowed, known)
    assert half == (0.5, {"1/2", "1/D", "1/sqrt(T)"}, 6)
    assert probes.factor_said("y", [half]) == "y is 0.5 times what is right, everywhere"
    other = probes.factor(want / 2, want, allowed, {"T": 3.0, "D": 5.0})
    assert probes.factor_said("y", [half, other]) == "y is exactly 1/2 times what is right"
    one = probes.factor(np.array([1.0]), np.array([2.0]), np.array([1e-12]), known)
    assert probes.factor_said("y", [one]) == ""
    assert probes.factor(want + 1, want, allowed, known) is None


def test_an_order_is_spoken_of_only_where_rows_differ():
    want, allowed = np.array([0.0, 0, 0, 1]), np.zeros(4)
    assert probes.order("p", want[::-1], want, allowed) == ""
    assert "stand entries [2, 1, 0]" in probes.order("p", np.array([3.0, 2, 1]), np.array([1.0, 2, 3]), np.zeros(3))


def test_numbers_and_texts_are_shown_where_they_differ():
    assert probes.told_apart(1.07967382, 1.07967379) == ("1.07967382", "1.07967379")
    assert probes.told_apart(1.0, 2.0) == ("1", "2")
    long = "[" + ", ".join(map(str, range(400)))
    ours, right = probes.apart(long + ", 7]", long + ", 8]")
    assert ours != right
    assert ours.startswith("... ")
    assert len(ours) <= probes.WINDOW + 8


# --- teaching


@pytest.mark.parametrize("exercise", [e for e in every() if e.facts["allow"]], ids=lambda e: e.name)
def test_a_scaffold_lists_the_verbs_that_its_axis_has(exercise):
    handed = exercise.name != "18_mesh"
    for verb in exercise.facts["allow"]:
        assert (f".{verb}(" in exercise.verbs) == handed
    assert exercise.verbs in exercise.scaffold
    compile(exercise.scaffold, "scaffold", "exec")


def test_the_path_goes_from_quick_to_long_and_never_before_what_it_builds_on():
    path = Progress(every()).path
    assert sorted(path) == [e.name for e in every()]
    assert all(path.index(a) < path.index(e.name) for e in every() for a in e.facts["after"])
    assert path != sorted(path)


def test_a_loop_over_tokens_that_could_be_one_product_is_remarked_on():
    loop = "def mlp_forward(x_TD, W1_DF, b1_F, W2_FD, b2_D):\n    return np.stack([x @ W1_DF for x in x_TD])\n"
    assert remarks.loops(find("01"), loop) == [
        "line 2: mlp_forward multiplies token by token; x @ W1_DF for all rows at once is one product"
    ]
    assert all(remarks.loops(e, e.solution) == [] for e in every())
    assert remarks.loops(find("01"), "def (") == []
