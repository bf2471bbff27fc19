"""What is told by a repair of the learner's own lines, and of what is kept between calls: it holds beyond the cases run."""

from __future__ import annotations

import ast

import pytest

from practice import edits, origin
from tests.practice.test_named import judged, spoken

SPEEDUP = "expected_tokens(alpha, gamma) / (gamma * c + 1)"
FROM_NOTHING = "whole_N = np.array([])\n    for part in parts:\n        whole_N = np.append(whole_N, part)\n    return whole_N"
WIDE = {
    "an empty one": ("26", [("return np.concatenate(parts)", FROM_NOTHING)], "dtype=x_n.dtype given to np.array."),
    "integers": (
        "38",
        [("sum_TF.astype(x_TD.dtype) * scale_T1", "sum_TF * scale_T1")],
        "All is right with .astype(x_TD.dtype)",
    ),
    "a number of NumPy's": ("32", [("n_TD = c_TD * r_T1", "n_TD = c_TD * r_T1 * np.sqrt(4) / 2")], "with float(np.sqrt(4))"),
}


@pytest.mark.parametrize("what", WIDE)
def test_what_is_to_be_given_a_dtype_is_told(what):
    name, edits, said = WIDE[what]
    text, _ = spoken(judged(name, *edits))
    assert said in text
    assert "np.zeros" not in text


def test_a_term_that_is_sent_in_float16_is_told_in_the_own_line():
    sent = "tp.all_reduce((x_Tf @ W_fD).astype('float16')).astype(x_Tf.dtype)"
    text, mistakes = spoken(judged("20", ("tp.all_reduce(x_Tf @ W_fD)", sent)))
    assert mistakes == ["float16"]
    assert "in place of (x_Tf @ W_fD).astype('float16')" in text


def test_an_array_of_an_array_keeps_its_dtype():
    for text in ("z = np.array(x)", "z = np.array(x, dtype=x.dtype)", "z = x.copy()"):
        said = origin.said({"line": 1, "text": text, "kinds": {"x": "float64"}, "numbers": []})
        assert said == f": it becomes so in line 1, {text}"
    cast = origin.said({"line": 1, "text": "z = np.array(x, np.float64)", "kinds": {"x": "float32"}, "numbers": []})
    assert cast.endswith("and is not made float32 again")


def test_indices_that_come_twice_and_parts_of_one_length_are_tried():
    source = "def f(x, i, v, n, ep):\n    x[i] += v\n    return [x[r * n : (r + 1) * n] for r in range(ep.size)]"
    said = [e.words() for e in edits.edits(ast.parse(source).body[0], {}, False)]
    assert "with np.add.at(x, i, v) in place of x[i] += v" in said
    assert "with x[ep.cut(len(x), r)] in place of x[r * n:(r + 1) * n]" in said


def test_beside_an_exact_repair_nothing_is_said_in_names_that_are_not_there():
    """Another solution has `hot`, and with hot.any() in place of hot.any(axis=1) it nearly gives this."""
    edits = (
        ("np.where(mine_T, far_Tv[", "np.where(mine_T, z_Tv["),
        ("sum_T, at_T = tp.all_reduce(np.stack([e_Tv.sum(axis=1), hit_T]))",
         "sum_T = tp.all_reduce(e_Tv.sum(axis=1))\n    at_T = tp.all_reduce(hit_T, op='max')"),
        ("(np.log(sum_T) - at_T)", "(np.log(sum_T) + high_T - at_T)"),
    )  # fmt: skip
    text, _ = spoken(judged("23", *edits))
    assert "hot" not in text
    assert "tp.all_reduce(hit_T, op='sum') in place of" in text


def test_a_repair_that_makes_another_part_wrong_is_not_told():
    """1 / gamma, which is below all speed-ups, divides by 0 where best_gamma asks for none."""
    text, mistakes = spoken(judged("14", ("return tokens / cost", f"return max(1.0, {SPEEDUP})")))
    assert "1.0 / gamma" not in text
    assert f"with {SPEEDUP} in place of max(" in text
    assert mistakes[0].startswith("repair: All is right")


def test_a_loop_is_told_by_its_own_line():
    source = "def f(x):\n    total = 0\n    for row in x:\n        for a in row:\n            total += a\n"
    function = ast.parse(source).body[0]
    said = {e.words() for far in (False, True) for e in edits.edits(function, {}, far)}
    assert "with it at the beginning of the loop that begins in line 3" in said


def test_what_another_call_overwrites_is_found_by_keeping_it():
    some = (
        ("return y_TD, (n_TD, r_T)", "STATE['r'] = r_T\n    return y_TD, n_TD"),
        ("n_TD, r_T = saved", "n_TD, r_T = saved, STATE['r']"),
    )
    text, mistakes = spoken(judged("06", *some, ("def rmsnorm(", "STATE = {}\n\n\ndef rmsnorm(")))
    assert mistakes == ["state"]
    assert "STATE is kept from one call to the next" in text
    assert "put it into what is returned" in text
