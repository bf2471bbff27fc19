"""What is told in the learner's own lines: what is kept, what is not read, what makes float64, what sends, what is silenced."""

import re

import pytest

from practice import answer, dev, remarks, twists
from practice.exercise import find
from tests.practice.test_named import examiner, judged, spoken

KEPT = """
import functools
last, calls, class_is = {}, 0, "kept"
class Ring:
    seen = []
def forward(x, memory=[], size=3):
    global calls
    calls += 1
    last["x", 0] = x
    Ring.seen.append(x)
    memory.append(x)
    forward.out = x
    globals()["hidden"] = x
    local = {}
    local["x"] = x
    size += 1
    return x
@functools.cache
def factors(n):
    return n
def backward(last):
    last["x"] = 1
"""


def test_what_outlives_a_call_is_found():
    assert {line.name for line in answer.kept(KEPT)} == {"calls", "last", "Ring", "memory", "forward", "hidden", "factors"}
    assert str(answer.kept(KEPT)[0]) == "line 8: calls += 1"


@pytest.mark.parametrize("source", [find(n).solution for n in ("16", "20", "25", "29", "11")] + ["def f(:"])
def test_nothing_outlives_a_call_of_what_is_right(source):
    assert answer.kept(source) == []


def test_what_is_kept_is_named_with_its_line_and_the_argument_that_is_not_read():
    edits = ("return y_Tf, x_TD", "globals()['mine'] = x_TD\n    return y_Tf, None"), ("dW_Df = saved.T", "dW_Df = mine.T")
    text, mistakes = spoken(judged("20", *edits))
    assert mistakes == ["state"]
    assert "something is kept from one call to the next: mine." in text
    assert "globals()['mine'] = x_TD" in text
    assert "column_backward must go by the argument saved, and does not read it" in text


COUNTER = "    global calls\n    calls = globals().get('calls', 0) + 1\n"


def test_a_counter_of_calls_in_place_of_t():
    text, _ = spoken(judged("17", ("    w = w - lr * wd * w\n", f"{COUNTER}    w = w - lr * wd * w\n"), ("**t", "**calls")))
    assert "from one call to the next: calls." in text
    assert "adamw must go by the argument t, and does not read it" in text


def test_groups_of_another_mesh():
    first = '    i, j = divmod(rank, tp)\n    if axis == "tp":\n        return [i * tp + n for n in range(tp)]\n'
    last = "    return [n * tp + j for n in range(dp)]"
    both = "[i * tp + n for n in range(tp)] if axis == 'tp' else [n * tp + j for n in range(dp)]"
    asked = "    i, j = divmod(rank, tp)\n    key = rank, axis\n    if key not in KNOWN:\n"
    edits = (
        (first, asked),
        (last, f"        KNOWN[key] = {both}\n    return KNOWN[key]"),
        ("def members", "KNOWN = {}\n\n\ndef members"),
    )
    _, mistakes = spoken(judged("18", *edits))
    assert mistakes == ["remembered"]


def test_lines_that_make_float64_are_told():
    source = "a = np.zeros(3)\nb = np.zeros(3, x.dtype)\nc = x.astype(float)\nd = np.full(3, 0.0, dtype=np.float64)"
    assert [line.number for line in answer.wide(source)] == [3, 4, 1]
    text, _ = spoken(judged("21", ("a_Tf = x_TD @ W1_Df", "a_Tf = x_TD.astype(np.float64) @ W1_Df")))
    assert "should be float32\n\nline" in text
    assert re.search(r"All is right with .astype\(x_TD.dtype\) (after y_TD|at what is returned)", text)


def test_lines_that_send_are_told_with_what_they_send():
    more = "tp.all_gather(x_Tf, dim=1)\n    y_TD = tp.all_reduce(x_Tf @ W_fD)"
    text, _ = spoken(judged("20", ("y_TD = tp.all_reduce(x_Tf @ W_fD)", more)))
    sent = re.findall(r"line \d+ sends (\d+): (.*)", text)
    assert {what for _, what in sent} == {"tp.all_gather(x_Tf, dim=1)", "y_TD = tp.all_reduce(x_Tf @ W_fD)"}
    assert f"{sum(int(n) for n, _ in sent)} numbers sent" in text


def test_what_errstate_silences_is_told_with_its_line():
    edits = (
        ("            new_tH = np.maximum(top_tH, x_tHs.max(axis=2))\n", "            new_tH = 0 * sum_tH\n"),
        ("            w_tHs = np.exp(x_tHs - new_tH[..., None])\n",
         "            with np.errstate(all='ignore'):\n                w_tHs = np.exp(x_tHs) + 0 * new_tH[..., None]\n"),
    )  # fmt: skip
    text, _ = spoken(judged("30", *edits))
    assert "exp overflows in line" in text


@pytest.mark.parametrize("small", ["1e-9", "1e-7", "1e-12"])
def test_a_small_number_in_a_logarithm(small):
    log, kept = "np.log(sum_T1[:, 0])", "z_TV[row_T, id_T] - high_T1[:, 0] - "
    text, _ = spoken(judged("16", (kept + log, f"np.log((e_TV / sum_T1)[row_T, id_T] + {small})")))
    assert f"{float(small):g} is added to what the logarithm is taken of" in text


def test_a_mistake_but_where_there_is_nothing_to_do():
    """Where no token counts this answer is right, and the mistake's is not."""
    text, mistakes = spoken(judged("16", ("dz_TV[~counts_T] = 0", "dz_TV[~counts_T] = p_TV[~counts_T] * counts_T.any()")))
    assert mistakes == ["ignored_softmax"]
    assert "In ignored rows of dz the softmax is left" in text


# --- twists


def test_a_twist_says_which_names_are_not_the_learners():
    made = next(t for t in twists.twists(find("25")) if t.sentence.startswith("A loop is missing, or ends too early"))
    assert made.named(find("25").scaffold, "p = r = 1") == ["(Here step is named as in our solution.)"]
    assert made.named(find("25").scaffold, "p = step = 1") == made.named(find("25").scaffold, "") == []


def test_a_twist_that_spoils_an_earlier_part_gives_way():
    """gelu left out in the forward gives this dW2, too; the learner's forward is right."""
    text, _ = spoken(judged("21", ("dW2_fD = h_Tf.T @ dy_TD", "dW2_fD = a_Tf.T @ dy_TD")))
    assert "gelu" not in text
    assert "a stands where h belongs" in text


def test_a_range_that_ends_too_early():
    made = [t.sentence for t in twists.twists(find("18"))]
    assert "range(dp) ends one too early." in made


def test_a_factor_of_the_ranks_is_explained():
    text, _ = spoken(
        judged("20", ("return dx_TD, dW_Df, dy_Tf.sum(axis=0)", "return dx_TD, dW_Df, dy_Tf.sum(axis=0) / tp.size"))
    )
    assert "db is exactly 1/ranks times what is right: it is divided by the number of ranks, and should not be" in text


def test_a_sum_of_squares_is_no_product_token_by_token():
    loop = "def block_forward(x_tD):\n    for row in x_tD:\n        y = {}\n"
    assert remarks.loops(find("28"), loop.format("row @ row")) == []
    assert remarks.loops(find("28"), loop.format("row @ W")) != []


def test_a_norm_of_zero():
    text, mistakes = spoken(judged("27", ("g_n * min(1, clip / norm)", "g_n * (min(norm, clip) / norm)")))
    assert mistakes == ["norm_zero"]
    assert "0/0 is NaN" in text
    assert dev.passes(dev.judged(examiner("27"), find("27").solution, 1))
