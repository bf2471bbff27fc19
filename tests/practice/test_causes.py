"""What answers that were written from the scaffolds alone have shown of causes: each a kind, on an answer unlike those."""

import re
import sys

import numpy as np
import pytest

from practice import origin, probes, remarks, twists
from practice.axis import Place
from practice.exercise import every, find, load
from practice.memory import Memory
from practice.part import cases
from practice.perform import perform
from practice.rules import Gate, Refused
from tests.practice.test_named import changed, judged, spoken


def test_memory_that_an_import_takes_is_not_counted():
    sys.modules.pop("pickletools", None)
    with Memory() as memory:
        held = memory.begin()
        before = bytearray(30_000)
        del before
        __import__("pickletools")
        assert memory.peak() - held < 40_000
        during = bytearray(50_000)
        assert 50_000 <= memory.peak() - held < 60_000
        del during


def test_an_import_is_refused_where_memory_is_traced():
    gate = Gate("theirs.py")
    sys.modules.pop("runpy", None)
    sys.meta_path.insert(0, gate)
    try:
        with Memory(), pytest.raises(Refused):
            exec(compile("__import__('runpy')", "theirs.py", "exec"))
    finally:
        sys.meta_path.remove(gate)


def test_what_a_file_asks_numpy_to_ignore_is_told_where_it_is_the_cause():
    hushed = "with np.errstate(over='ignore', invalid='ignore'):\n        w_HS = np.exp(s_HS)\n        p_HS = w_HS"
    edits = ("w_HS = np.exp(s_HS - s_HS.max(axis=1, keepdims=True))\n        p_HS = w_HS", hushed.replace("\n", "\n    "))
    text, mistakes = spoken(judged("36", edits))
    assert mistakes == ["naive_softmax"]
    assert "exp overflows in line" in text


def test_what_is_ignored_and_harmless_is_not_told():
    """The overflow is of a sigmoid far below 0, which is 0; the loss is infinite by the logarithm."""
    loss = "with np.errstate(over='ignore'):\n        p_N = 1 / (1 + np.exp(-m_N))\n    loss = -np.log(p_N).mean()"
    text, _ = spoken(judged("34", ("loss = np.logaddexp(0, -m_N).mean()", loss)))
    assert "the logarithm of 0 in line" in text
    assert "-log(sigmoid(m)) is logaddexp(0, -m)" in text
    assert "exp overflows" not in text
    assert "NaN" not in text


def origins(name, part, *edits):
    """What is said of the origins of float64, of a changed solution's results in float32."""
    exercise, source = find(name), changed(name, *edits)
    part = next(p for p in exercise.parts if p.name == part)
    case = next(c for c in cases((part,), 1) if c.dtype == "float32")
    space = load(source, "theirs.py", {"__source__": source})
    outcome = perform(part, case, space, Place(0, 1), "theirs.py", origins=True)
    return {n: origin.said(found) for n, found in outcome.origins.items()}


LAST = "n_TD = c_TD * r_T1"
MADE = {
    "one_TD = np.ones(c_TD.shape)\n    n_TD = c_TD * one_TD\n    n_TD *= r_T1": "one_TD = np.ones(c_TD.shape); np.ones makes",
    "root = np.sqrt(4)\n    n_TD = c_TD * r_T1 * root / 2": "root is a np.float64 number and promotes",
    "one_TD = np.ones(c_TD.shape, int)\n    n_TD = c_TD * one_TD * r_T1": "one_TD is int64 and c_TD float32, which make",
    "n_TD = c_TD.astype(np.float64) * r_T1": "n_TD = c_TD.astype(np.float64) * r_T1, and is not made float32 again",
}


@pytest.mark.parametrize("line", MADE)
def test_the_line_that_makes_float64_is_named(line):
    said = origins("32", "layernorm", (LAST, line))["y"]
    assert re.match(r": (it becomes so |float64 is asked for )?in line \d", said)
    assert MADE[line] in said


def test_float64_is_followed_through_own_functions_lists_and_attributes():
    bias = "def mha_forward(", "def bias(n):\n    return np.triu(np.full((n, n), -np.inf), 1)\n\n\ndef mha_forward("
    called = "np.where(seen_TS, score_HTS, -np.inf)", "score_HTS + bias(n)"
    listed = (
        ("o_HTE = np.zeros_like(v_HTE)", "rows = []"),
        ("o_HTE[:, s] = p_HTS @ v_HTE[:, s]", "rows.append(p_HTS @ v_HTE[:, s])"),
        ("    o_THE = o_HTE", "    o_HTE = np.concatenate(rows, axis=1)\n    o_THE = o_HTE"),
    )
    said = origins("04", "mha_forward", bias, called, *listed)["y"]
    assert "score_HTS + bias(n), float32 meets float64, which is made in line" in said
    assert "np.full makes float64" in said
    said = origins("10", "Cache", ("width), dtype)", "width))"))["k"]
    assert "self.k_KCE = np.empty((kv_heads, capacity, width)); np.empty makes" in said


def test_float64_that_is_made_of_integers_is_not_laid_to_asarray():
    whole = "positions_T[:, None] * frequency_P", "np.asarray(positions_T)[:, None] * frequency_P"
    said = origins(
        "07", "pairing half", whole, (".astype(x_THE.dtype)", ""), ("np.zeros_like(x_THE)", "np.zeros(x_THE.shape)")
    )["y"]
    assert "np.asarray makes" not in said


def test_rows_that_are_0_tell_nothing_of_order():
    want = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert "stand entries [0, 2, 1, 3]" in probes.order("dq", want[[0, 2, 1, 3]], want, np.full((4, 1), 1e-9))
    assert probes.order("dq", want[[0, 1, 2, 0]], want, np.full((4, 1), 1e-9)) == ""


def test_nothing_is_said_of_what_is_float32():
    assert origins("32", "layernorm") == {}


def test_a_bare_number_is_told_with_what_it_stands_in():
    for e in every()[::3]:
        for twist in twists.twists(e):
            assert not re.search(r"^-?[\d.]+ stands where -?[\d.]+ belongs", twist.sentence), twist.sentence


def test_parts_that_are_cut_at_other_places_are_told():
    whole = np.arange(10.0).reshape(5, 2)
    right = [(whole[:2], 0.0), (whole[2:4], 0.0), (whole[4:], 0.0)]
    said = probes.elsewhere("x", [whole[:1], whole[1:2], whole[2:]], right)
    assert said == "x is right, but cut at other places along dim 0: the ranks have 1, 1, 3 of it, and should have 2, 2, 1"
    # A shorter part of one's own is not called a part of the whole.
    assert probes.parts("x", whole[:1], 0, right) == ""
    assert "the whole is asked for" in probes.parts("x", whole[:2], 0, [(whole, 0.0)] * 3)


def test_a_loop_over_experts_is_no_loop_over_tokens():
    lines = ("{} = len(x_TD), len(W1_NDF)", "for n in range({}):", "    a_TF = x_TD @ W1_NDF[n]")
    loop = "\n    ".join(("def moe_forward(x_TD, Wr_DN, W1_NDF, W2_NFD, k):", *lines))
    assert remarks.loops(find("31"), loop.format("T, N", "N")) == []
    assert len(remarks.loops(find("31"), loop.format("N, X", "N"))) == 1


LOST = {
    "32": ("v_T1 = (c_TD**2).mean(axis=1, keepdims=True)", "D, sum_T = x_TD.shape[1], np.einsum('td->t', x_TD)\n"
           "    v_T1 = (np.einsum('td,td->t', x_TD, x_TD) / D - sum_T**2 / D / D)[:, None]"),
    "20": ("y_TD = tp.all_reduce(x_Tf @ W_fD)", "y_TD = tp.all_reduce((x_Tf @ W_fD).astype('float32')).astype(x_Tf.dtype)"),
    "34": ("(reward_G - reward_G.mean()) / (std + 1e-4)", "((reward_G - reward_G.mean()) / (std + 1e-4)).astype(np.float32)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_digits_that_are_lost_are_told(name):
    text, mistakes = spoken(judged(name, LOST[name]))
    assert "digits are lost on the way" in text or mistakes in (["squares_first"], ["float32"])
    assert "No known mistake" not in text


def test_small_mistakes_are_no_lost_digits():
    text, _ = spoken(judged("32", ("np.sqrt(v_T1 + eps)", "np.sqrt(v_T1 + eps / 3)")))
    assert "digits" not in text
