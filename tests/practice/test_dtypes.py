"""Dtypes that are not the inputs', told by a repair of the learner's own lines."""

from __future__ import annotations

import pytest

from practice import origin
from tests.practice.test_named import judged, spoken

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
