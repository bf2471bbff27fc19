"""What is told by effect is told only where the effect is the mistake's own: arguments, costs, NaN; and the search ends."""

import time

import pytest

from practice import dev, guarded, repairs, twists
from practice.exercise import SOLUTION, TURNS, find, load
from practice.part import cases
from tests.practice.test_named import changed, examiner, spoken
from tests.practice.test_promises import EINSUM, judged


@pytest.mark.parametrize(
    ("line", "said"),
    [("A += 0", "This line changes the argument saved[1] in place"), ("dy += 0", "This line changes the argument dy in place")],
)
def test_the_argument_that_is_changed_is_named(line, said):
    text, mistakes = spoken(judged("02", EINSUM.replace("    k = math", f"    {line}\n    k = math")))
    assert said in text
    assert ("dy is changed in place" in text) == bool(mistakes) == line.startswith("dy")


WHOLE = """
def attention_backward(do, q, k, v, o, lse, lengths):
    one = np.repeat(np.arange(len(lengths)), lengths)
    mask, root = np.tril(one[:, None] == one), math.sqrt(q.shape[2])
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    for h in range(q.shape[1]):
        p = np.exp(np.where(mask, q[:, h] @ k[:, h].T / root - lse[:, h, None], -np.inf))
        ds = p * (do[:, h] @ v[:, h].T - (do[:, h] * o[:, h]).sum(1, keepdims=True)) / root
        dq[:, h], dk[:, h], dv[:, h] = ds @ k[:, h], ds.T @ q[:, h], p.T @ do[:, h]
    return dq, dk, dv
"""


def test_a_cost_is_told_by_a_mistake_whose_answers_are_right():
    text, mistakes = spoken(judged("05", WHOLE))
    assert "right, but" in text
    assert mistakes in ([], ["whole_matrix"])


def test_where_all_that_is_wrong_is_nan_the_line_is_told_and_no_twist():
    guard = "np.where(np.isinf(joint_T), 0, joint_T)"
    source = find("03").rights["merge"].replace("both_T", "joint_T").replace("own_T", "mine_T")
    assert guard in source
    text, _ = spoken(judged("03", source.replace(guard, "joint_T")))
    assert "inf - inf in line" in text
    assert "belongs" not in text


def test_an_exp_that_overflows_although_something_is_subtracted_is_not_called_naive():
    source = changed(
        "03", ("np.maximum(top_T, x_TS.max(axis=1))", "np.where(x_TS.max(axis=1) > -np.inf, x_TS.max(axis=1), top_T)")
    )
    text, _ = spoken(dev.judged(examiner("03"), source, 1))
    assert "what is subtracted there is not the largest" in text
    assert "naive" not in text


def test_what_is_raised_by_the_code_itself_may_say_it_in_other_words():
    free, alloc = "            self.free(table[place])\n", "            copy = self.alloc()\n"
    source = changed(
        "11", (free, ""), (alloc, free + alloc), ("is free already", "has no owner"), ("cannot be shared", "is nobody's")
    )
    _, mistakes = spoken(dev.judged(examiner("11"), source, 1))
    assert mistakes == ["freed_first"]


# --- the search ends


def test_a_changed_solution_loops_no_longer_than_it_may():
    with pytest.raises(RuntimeError, match="without end"):
        load("while True:\n    pass", SOLUTION)
    counted = load("n = odd = 0\nwhile n < 9:\n    n += 1\n    if n % 2:\n        continue\n    odd += 1", SOLUTION)
    assert (counted["n"], counted["odd"]) == (9, 4)
    assert load(f"n = 0\nwhile n < {2 * TURNS}:\n    n += 1", "learner.py")["n"] == 2 * TURNS


def test_no_twist_puts_a_list_into_itself():
    """NumPy does not come to its end with such a list as an index."""
    made = [t.source for t in twists.twists(find("12"))]
    assert any("kept.append" in source for source in made)
    assert not any("kept.append((kept))" in source for source in made)


def test_a_constant_that_a_fit_does_not_reach_is_found_among_its_roots(monkeypatch):
    """Where no repair of the own line is found before."""
    monkeypatch.setattr(repairs, "SECONDS", 0.0)
    verdict = [
        dev.judged(examiner("01"), changed("01", ("math.sqrt(2 / math.pi)", "math.sqrt(2) / math.pi")), seed)
        for seed in range(1, 4)
    ]
    assert all("0.450158" in spoken(v)[0] for v in verdict)


def test_no_twist_puts_a_list_into_itself_where_one_of_two_lists_is_chosen():
    made = [t.source for t in twists.twists(find("26"))]
    assert any(".append((p))" in source for source in made) or any(".append(passing)" in source for source in made)
    assert not any(".append((before))" in source or ".append((after))" in source for source in made)


@pytest.mark.parametrize("endless", ["memory", "time", "waiting", "error"])
def test_a_search_that_takes_all_memory_or_never_ends_finds_nothing(endless, monkeypatch):
    def find():
        if endless == "memory":
            kept = [b"1" * 2**20]
            while True:
                kept += kept
        while endless == "time":
            pass
        while endless == "waiting":
            time.sleep(1)
        raise RuntimeError

    monkeypatch.setattr(guarded, "CLOCK", 2.0)
    begun = time.monotonic()
    assert guarded.apart(find, seconds=0.2) is None
    assert time.monotonic() - begun < 15
    assert guarded.apart(lambda: "found", seconds=0.2) == "found"


# --- the learner's own file, changed

OWN = """
import itertools
import numpy as np

def all_reduce(x, ring):
    p, r = ring.size, ring.rank
    parts, i = [c.copy() for c in np.array_split(x, p)], r
    for _ in range(p - 1):
        got = ring.sendrecv((r + 1) % p, parts[i], (r - 1) % p)
        i = (i - 1) % p
        parts[i] = parts[i] - got
    for _ in itertools.repeat(None, p - 1):
        got = ring.sendrecv((r + 1) % p, parts[i], (r - 1) % p)
        i = (i - 1) % p
        parts[i] = got
    return np.concatenate(parts)
"""


def test_a_mistake_is_told_by_the_change_that_mends_it():
    text, mistakes = spoken(judged("25", OWN))
    assert "line 11: parts[i] = parts[i] - got\nAll is right with parts[i] + got in place of parts[i] - got." in text
    assert [m.partition(":")[0] for m in mistakes] == ["repair"]
    assert dev.passes(judged("25", OWN.replace("- got", "+ got")))


def test_what_a_check_forbids_is_forbidden_where_a_mistake_is_looked_for(tmp_path):
    kept = tmp_path / "kept"
    kept.touch()
    source = OWN.replace("    p, r", f"    import os\n    os.remove({str(kept)!r})\n    p, r")
    assert repairs.found(examiner("25"), cases(find("25").parts, 1)[0], []) == []
    truth = examiner("25")
    truth.answer = source
    assert repairs.found(truth, cases(find("25").parts, 1)[0], []) == []
    assert kept.exists()
