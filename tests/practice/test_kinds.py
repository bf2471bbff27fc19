"""Kinds of mistakes that no list has: told by edits of the solution that are made by machine, or by the learner's own lines."""

import pytest

from practice import answer, translate
from tests.practice.test_named import judged, spoken

KINDS = {
    "a term of rank 0": ("20", "@ W_Df + b_f\n", "@ W_Df\n    y_Tf = y_Tf + b_f if tp.rank == 0 else y_Tf\n",
                         "The term b is added on rank 0 alone"),
    "from the beginning": ("05", "lse_TH[t, h, None]", "lse_TH[:n, h, None]", "lse is read from its beginning"),
    "a product reshaped": ("20", "dW_fD = saved.T @ dy_TD", "dW_fD = (dy_TD.T @ saved).reshape(W_fD.shape)",
                           "is made the other way round and then reshaped"),
    "three dims reshaped": ("09", 'np.einsum("he,che->hc", qn_HE, Wuk_CHE)',
                            '(qn_HE[:, None] @ Wuk_CHE.reshape(*qn_HE.shape, len(Wuk_CHE)))[:, 0]',
                            "Wuk is reshaped where it must be transposed"),
    "a short table": ("07", "positions_T[:, None] *", "(positions_T % 2048)[:, None] *", "positions_T is taken modulo 2,048"),
    "no sign": ("07", "positions_T[:, None] *", "np.abs(positions_T)[:, None] *", "positions_T is taken without its sign"),
    "axis 3": ("08", "axis=3", "axis=2", "axis 2 in place of axis 3"),
    "a bracket": ("06", "1 / np.sqrt((x_TD**2).mean(axis=1) + eps)", "1 / np.sqrt((x_TD**2).mean(axis=1)) + eps",
                  "A bracket is lost"),
    "one term": ("20", "dy_Tf.sum(axis=0)", "dy_Tf[-1]", "the last term alone is left"),
    "not begun anew": ("06", "along_T = (dn_TD * n_TD).mean(axis=1)", "along_T = np.cumsum((dn_TD * n_TD).mean(axis=1))",
                       "does not begin anew"),
    "another logarithm": ("16", "np.log(sum_T1[:, 0])", "np.log10(sum_T1[:, 0])", "log10(sum[:, 0]) stands where"),
    "the first entry": ("01", "@ W2_FD + b2_D", "@ W2_FD + b2_D[0]", "The first entry of b2 is used for all"),
    "a row for a column": ("05", "row_TH[t, h, None]", "row_TH[t, h]", "along which dim it goes counts"),
    "another function": ("21", "dh_Tf * gelu_slope(a_Tf)", "dh_Tf * gelu(a_Tf)", "gelu(a) stands where gelu_slope(a) belongs"),
    "a step": ("10", "    q_NHE = rope(q_NHE, positions_N)\n", "", "A step is missing: q = rope(q, positions)"),
    "less the first": ("07", "positions_T[:, None] *", "(positions_T - positions_T[0])[:, None] *",
                       "taken less the first of them"),
    "raised without need": ("10", "if end > self.k_KCE.shape[1]:", "if end + 1 > self.k_KCE.shape[1]:",
                            "Your file raises this itself"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_told(kind):
    name, right, wrong, said = KINDS[kind]
    text, _ = spoken(judged(name, (right, wrong)))
    assert said in text


def test_what_is_kept_is_told_by_its_key():
    """The corrections alone are kept, by t: the moments go by b1 and b2 as they are given."""
    store = ("import numpy as np\n", "import numpy as np\n\nKEPT = {}\n")
    own = "    if t not in KEPT:\n        KEPT[t] = 1 - b1**t, 1 - b2**t\n    c1, c2 = KEPT[t]\n    mc = m / c1\n"
    text, _ = spoken(judged("17", store, ("    mc = m / (1 - b1**t)\n", own), ("v / (1 - b2**t)", "v / c2")))
    assert "b1 and b2 are those of an earlier call" in text
    assert "found again by t alone" in text


def test_a_key_is_read_in_what_the_function_is_given():
    (found,) = answer.stored(
        "KEPT = {}\ndef f(x, base):\n    T, E = x.shape\n    key = (E, 1)\n    KEPT[key] = base * x.sum()\n"
    )
    assert found == ({"base", "x"}, "(x.shape[1], 1)")
    assert list(answer.stored("KEPT = {}\ndef f(x, n):\n    KEPT[n] = n + 1\n    own = {}\n    own[n] = x\n")) == []


def test_an_empty_list_that_is_stacked():
    error = {"type": "ValueError", "message": "need at least one array to stack", "after": False, "function": "f", "line": 3}
    lines = translate.sentence({**error, "text": "y = np.stack(rows)", "shapes": "", "called": "f"})
    assert lines[1].startswith("stack gets an empty list")


def test_numbers_that_break_in_a_larger_case():
    """In the smallest case all scores are far below 0, where exp gives 0 and no infinity."""
    masked = ("        x_TS = np.where(seen_TS, x_TS, -np.inf)\n", "        x_TS = np.where(seen_TS, x_TS, -1000)\n")
    exp = ("w_TS = np.exp(x_TS - from_T[:, None])", "w_TS = np.exp(x_TS)")
    rest = (("sum_T * shrink_T", "sum_T"), ("o_TE * shrink_T[:, None]", "o_TE"), ("top_T + np.log(sum_T)", "np.log(sum_T)"))
    text, _ = spoken(judged("03", masked, exp, *rest))
    assert "exp overflows in line" in text or "No maximum is subtracted" in text


def test_the_same_in_two_places():
    """As where one function makes both bias gradients."""
    text, _ = spoken(judged("02", ("dy_TD.sum(axis=0)", "dy_TD[0]"), ("da_TF.sum(axis=0)", "da_TF[0]")))
    assert "Of the sum dy.sum(axis=0) the first term alone" in text
    assert "So it is with da.sum(axis=0)." in text
