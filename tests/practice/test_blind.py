"""What answers that were written from the scaffolds alone have shown: each a kind, on an answer unlike those."""

import json
import re
import warnings

import numpy as np
import pytest

from practice import blind, dev, kept, noted, origin, repairs, translate, twists
from practice.exercise import SOLUTION, every, find, load
from tests.practice.test_named import changed, examiner, judged, spoken


def kept_by_a_global(made, back, names):
    return (f"return {made}, ({names})", f"globals()['kept'] = {names}\n    return {made}, None"), (
        back,
        back.replace("saved", "kept"),
    )


GLOBAL = {
    "20": (("return y_Tf, x_TD", "globals()['kept'] = x_TD\n    return y_Tf, None"), ("dW_Df = saved.T", "dW_Df = kept.T")),
    "21": kept_by_a_global("y_TD", "x_TD, a_Tf, h_Tf = saved", "x_TD, a_Tf, h_Tf"),
    "28": kept_by_a_global("y_tD", "h_tD, r_t1, a_Tf, slope_Tf = saved", "h_tD, r_t1, a_Tf, slope_Tf"),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_what_a_global_keeps_for_backward_is_another_forwards(name):
    text, mistakes = spoken(judged(name, *GLOBAL[name]))
    assert mistakes == ["state"]
    assert "something is kept from one call to the next" in text


def test_no_argument_may_be_changed_even_if_it_is_a_copy_of_the_inputs():
    edit = ("    far_Tv = z_Tv - high_T[:, None]\n", "    z_Tv -= high_T[:, None]\n    far_Tv = z_Tv\n")
    text, _ = spoken(judged("23", edit))
    assert "This line changes the argument z_Tv in place" in text


def test_parts_of_all_ranks_or_of_one_are_told_from_the_shape():
    text, _ = spoken(judged("20", ("dx_Tf = dy_TD @ W_fD.T", "dx_Tf = tp.all_gather(dy_TD @ W_fD.T, 1)")))
    assert "dx is that of all ranks, one part after another along dim 1: this rank's alone is asked for" in text
    text, _ = spoken(judged("20", ("return y_TD + b_D, x_Tf", "return tp.reduce_scatter(x_Tf @ W_fD) + b_D, x_Tf")))
    assert "y is this rank's part along dim 0 only: the whole is asked for, on every rank" in text


def test_a_mistake_that_would_spoil_an_earlier_part_gives_way_to_what_spoils_this_one():
    """`gelu_last` has this dW2 too, and with it another y; here y is right."""
    text, mistakes = spoken(judged("21", ("dW2_fD = h_Tf.T @ dy_TD", "dW2_fD = a_Tf.T @ dy_TD")))
    assert mistakes[0].startswith("twist: ")
    assert "the output" not in text


def test_a_cost_is_not_explained_by_a_mistake_that_makes_answers_wrong():
    """`copies_mean` sends as many messages as two sums do, and its gradients are wrong."""
    copies = "dWk_DkE, dWv_DkE = tp.all_reduce(both_2DKE)[:, :, k]"
    twice = "dWk_DkE = tp.all_reduce(both_2DKE[0])[:, k]\n    dWv_DkE = tp.all_reduce(both_2DKE[1])[:, k]"
    text, mistakes = spoken(judged("22", (copies, twice)))
    assert mistakes == ["copies_two_sums"]
    assert "right, but rank 0: 6 rounds" in text


def test_two_costs_are_told_by_the_lines_that_mend_them(monkeypatch):
    monkeypatch.setattr(repairs, "SECONDS", 4.0)
    scatter, moments = "dp.reduce_scatter(g_N) / dp.size", "    m_n = b1 * m_n + (1 - b1) * g_n\n"
    whole = "    m_N = np.zeros_like(w_N)\n    m_N[dp.cut(len(w_N))] = m_n\n"
    edits = (scatter, "dp.all_reduce(g_N)[dp.cut(len(g_N))] / dp.size"), (moments, whole + moments)
    text, _ = spoken(judged("27", *edits))
    assert "with dp.reduce_scatter(g_N), which gives each rank its part, in place of dp.all_reduce(g_N)" in text
    assert "m_N[dp.cut(len(w_N))] = m_n\nAll is right without it." in text


def test_who_receives_from_where_it_sends_is_told_so():
    text, _ = spoken(judged("25", ("right, left = (r + 1) % p, (r - 1) % p", "right = left = (r + 1) % p")))
    assert "Each rank receives from the rank that it sends to" in text
    assert "Every rank waits in a send" not in text


def test_who_waits_for_a_rank_that_has_returned_is_told_so():
    """An empty part that is not sent, as though nothing need be."""
    send = "parts[into] = ring.sendrecv(right, parts[out], left)"
    ifs = "if parts[out].size:\n            ring.send(right, parts[out])\n        parts[into] = ring.recv(left)"
    first = "if r == 0:\n            parts[into] = ring.recv(left)\n        " + ifs.replace(
        "        parts[into] = ring.recv(left)", "        if r:\n            parts[into] = ring.recv(left)"
    )
    text, _ = spoken(judged("26", (send, first)))
    assert re.search(r"Rank \d waits for a message of rank \d, which has returned: each receive needs a send", text)


def test_memory_that_was_not_written_is_nan():
    """It may hold what is right by luck, or a block that was let go, which counts as kept."""
    text, _ = spoken(judged("24", ("np.zeros_like(g) for g in grads", "np.empty_like(g) for g in grads")))
    assert "got nan" in text
    with noted.watched():
        assert np.isnan(np.empty((2, 3))).all()
        assert np.isnan(np.empty_like(np.ones(3, np.float32))).all()
    assert np.empty is noted.USUAL["empty"]


def test_layers_that_are_kept_are_no_numbers_kept():
    assert dev.passes(judged("37", ("rng.bit_generator.state))", "rng.bit_generator.state | {'layers': layers}))")))


def test_the_figures_are_whole():
    figures = json.loads(blind.FILE.read_text())
    assert set(figures) <= {e.name for e in every()}
    for f in figures.values():
        assert sum(f[k] for k in ("accepted", "cause", "ingredients", "numbers", "misleading")) == f["wrong"]
        # Ten were written; one that the task's text allows is not counted.
        assert f["wrong"] in (9, 10)
        assert 0 <= f["refused"] <= f["right"] == 3


SEEN_ONLY = "np.where(np.tri(n, dtype=bool), s_TS, -np.inf)"
LARGE = {
    "masked after exp": ("05", ("s_TS = " + SEEN_ONLY, "mask_TS = np.tri(n, dtype=q_TE.dtype)"),
                         ("lse_TH[t, h, None])\n", "lse_TH[t, h, None]) * mask_TS\n"), "mask_after"),
    "keys": ("08", ("score_KGTS - score_KGTS.max(axis=3, keepdims=True)", "score_KGTS - 0"), "no_maximum"),
    "a latent": ("09", ("score_HS - score_HS.max(axis=1, keepdims=True)", "score_HS - 0"), "no_maximum"),
    "a cache": ("10", ("s_KGNS - s_KGNS.max(axis=-1, keepdims=True)", "s_KGNS - 0"), "no_maximum"),
    "later keys": ("08", ("score_KGTS.max(axis=3, keepdims=True))", "top)"),
                   ("score_KGTS = np.where(", "top = score_KGTS.max(axis=3, keepdims=True)\n        score_KGTS = np.where("),
                   "maximum_of_all"),
}  # fmt: skip


@pytest.mark.parametrize("what", LARGE)
def test_scores_are_so_large_that_exp_overflows(what):
    name, *edits, mistake = LARGE[what]
    _, mistakes = spoken(judged(name, *edits))
    assert mistakes == [mistake]


def test_the_argument_that_a_line_writes_to_is_named():
    text, mistakes = spoken(judged("02", ("dh_TF = dy_TD @ W2_FD.T", "dh_TF = np.matmul(dy_TD, W2_FD.T, out=a_TF)")))
    assert "This line changes the argument saved[1] in place" in text
    assert mistakes == []
    names = ["dy", "h", "a"]
    lines = ("np.matmul(dy, W, out=h)", "h[dy > 0] += 1", "h -= dy", "np.add.at(h, dy, 1)", "h.sort()", "h[0] = dy")
    assert {translate.written(line, names) for line in lines} == {"h"}
    assert translate.written("y = f(dy == h)", names) == "dy"


SHAPES = {
    "a dim left": ("02", ("dy_TD.sum(axis=0)", "dy_TD.sum(axis=0, keepdims=True)"), "db2 are right, but a dim of 1 is left"),
    "an empty list": ("01", ("    return y_TD, (", "    y_TD = np.array([y for y in y_TD], x_TD.dtype)\n    return y_TD, ("),
                      "An array made of an empty list has shape (0,)"),
    "dims in another order": ("08", ("return o_TKGE.reshape(T, H, E)", "return o_TKGE.reshape(T, H, E).transpose(1, 0, 2)"),
                              "o is right but for the order of its dims: transpose it by (1, 0, 2)."),
    "no last reshape": ("16", ("return dz_TV / count", "return (dz_TV / count).reshape(-1)"),
                        "are right, and in the right order: reshape it."),
}  # fmt: skip


@pytest.mark.parametrize("what", SHAPES)
def test_a_shape_is_told_with_what_it_comes_of(what):
    name, edit, said = SHAPES[what]
    text, _ = spoken(judged(name, edit))
    assert said in text


def test_what_is_float32_on_the_way_is_told_from_its_error():
    edit = (
        "h_TF = 0.5 * a_TF * (1 + np.tanh(u_TF))",
        "h_TF = (0.5 * a_TF * (1 + np.tanh(u_TF))).astype(np.float32).astype(a_TF.dtype)",
    )
    text, mistakes = spoken(judged("01", edit))
    assert mistakes == ["float32"]
    assert "an array on the way is float32." in text
    assert re.search(r"line \d+: h_TF = ", text)


def test_a_reshape_for_a_transpose_is_named_also_within_einsum():
    text, _ = spoken(judged("02", ("da_TF @ W1_DF.T", "da_TF @ W1_DF.reshape(W1_DF.shape[::-1])")))
    assert "W1 is reshaped where it must be transposed" in text
    edit = ('"he,che->hc", qn_HE, Wuk_CHE', '"he,hce->hc", qn_HE, Wuk_CHE.reshape(len(qn_HE), -1, E)')
    text, _ = spoken(judged("09", edit))
    assert "Wuk is reshaped where it must be transposed" in text


def test_a_bracket_that_is_lost_is_named_and_no_constant():
    said = "The factor sqrt(2 / pi) is of a alone: it is of all of a + 0.044715 * a ** 3."
    assert said in {t.sentence for t in twists.twists(find("01"))}
    # Of what is given no twists are made: it is found in the file.
    text, _ = spoken(judged("21", ("C * (a + 0.044715 * a**3)", "C * a + 0.044715 * a**3")))
    assert "All is right with C * (a + 0.044715 * a ** 3) in place of C * a + 0.044715 * a ** 3." in text


def test_a_mask_of_a_large_number_is_told_with_the_number():
    text, _ = spoken(judged("03", ("np.where(seen_TS, x_TS, -np.inf)", "np.where(seen_TS, x_TS, -1e20)")))
    assert "What is not seen gets the score -1e+20, a number, and not -inf" in text


def test_a_table_that_is_kept_by_too_little_is_no_other_base():
    edit = ("    frequency_P = float(base) ** (-2 * i_P / E)\n",
            "    frequency_P = globals().setdefault('kept', {}).setdefault(E, float(base) ** (-2 * i_P / E))\n")  # fmt: skip
    text, mistakes = spoken(judged("07", edit))
    assert mistakes == ["state"]
    assert "base is that of an earlier call" in text


def test_of_mistakes_with_one_error_one_that_leaves_earlier_parts_right_is_named():
    edit = ("            table[place] = copy\n", "            table = [*table]\n            table[place] = copy\n")
    _, mistakes = spoken(judged("11", edit))
    assert mistakes == ["table_replaced"]


def test_a_word_of_the_text_is_no_name_of_a_result():
    assert "sum" not in twists.symbols(find("09").scaffold)
    assert {"k", "qn", "qn_HE", "o", "p"} <= twists.symbols(find("09").scaffold)


def test_a_sum_over_all_axes_is_told_in_words():
    said = "The sum of p * dp is taken over all axes at once: it goes over one, and the others stay apart."
    assert said in {t.sentence for t in twists.twists(find("05"))}


def test_entries_of_a_row_are_no_rows_and_nothing_warns():
    text, _ = spoken(judged("12", ("sorted_V[before_V >= top_p] = 0", "sorted_V[before_V > top_p + 0.2] = 0")))
    assert "of p, rows" not in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("x = [0][1, 2] if 0 else 1\n", SOLUTION)


def test_a_list_that_is_handed_over_may_not_be_changed():
    loop = "    for n in lengths:\n", "    while lengths:\n        n = lengths.pop(0)\n"
    text, _ = spoken(judged("04", loop))
    assert "mha_forward changes the argument lengths in line" in text
    assert "n = lengths.pop(0)" in text
    own = "    lengths = list(lengths)\n    lengths.append(0)\n    for n in lengths[:-1]:\n"
    assert {j.status for j in judged("04", (loop[0], own))} == {"ok"}


def test_what_a_function_has_returned_is_its_own_and_a_table_may_be_written_to():
    own, table = {}, [1]

    def write(table, saved):
        table.append(saved)

    before = kept.before(write, (table, own), ("table",), {id(own)})
    write(table, 3)
    own["x"] = 1
    assert kept.first_changed(before, (table, own)) is None
    before = kept.before(write, (table, {}), (), set())
    table[0] = np.float64(1)
    assert kept.first_changed(before, (table, {})) == 0


def test_a_mask_that_is_a_number_is_no_mask():
    old = "np.where(seen_TS, score_HTS, -np.inf)"
    for new, names in (
        ("score_HTS - np.where(seen_TS, 0, 10000)", ["mask_finite"]),
        ("np.where(seen_TS, score_HTS, -10000)", ["mask_low"]),
        (
            "np.where(seen_TS, score_HTS, -20000)",
            [f"repair: All is right with {old} in place of {old.replace('-np.inf', '-20000')}."],
        ),
    ):
        assert spoken(judged("04", (old, new)))[1] == names


def test_a_refused_append_has_taken_nothing():
    check = "        if end > self.k_KCE.shape[1]:\n"
    early = (
        check
        + "            self.length = max(self.length, self.k_KCE.shape[1] - 1 + (self.length == self.k_KCE.shape[1] - 1))\n"
    )
    text, _ = spoken(judged("10", (check, early)))
    assert "length after these" in text


def test_float32_on_the_way_of_exact_sums_is_seen_and_named():
    """Integers alone float32 holds too: beside each stands a fraction that it cannot hold."""
    wire = 'return tp.all_reduce(x.astype("float32")).astype(x.dtype)'
    _, mistakes = spoken(judged("19", ("return tp.all_reduce(x)", wire)))
    assert mistakes == ["float32"]


def test_a_maximum_that_starts_from_0_is_another_than_one_of_all_rows():
    _, mistakes = spoken(judged("30", ("x_tHs.max(axis=2)", "x_tHs.max(axis=2, initial=0)")))
    assert mistakes == ["maximum_from_zero"]
    for name, old in (("16", "z_TV.max(axis=1, keepdims=True"), ("23", "z_Tv.max(axis=1")):
        verdict = judged(name, (old, f"{old}, initial=0"))
        assert [j.mistakes for j in verdict if j.lines and j.mistakes] == [["maximum_from_zero"]]


def test_no_copy_where_there_is_nothing_to_do_is_seen():
    """With wd = 0 the decay is left out, and what follows writes to the caller's weights."""
    edits = ("    w = w - lr * wd * w\n", "    w = w - lr * wd * w if wd else w\n"), ("w = w - lr * mc /", "w -= lr * mc /")
    text, _ = spoken(judged("17", *edits))
    assert "This line changes the argument w in place" in text


def test_a_small_number_in_a_divisor_is_told():
    text, mistakes = spoken(judged("27", ("clip / norm", "clip / (norm + 1e-6)")))
    assert mistakes == ["small"]
    assert "1e-06 is added to the divisor norm: nothing belongs there." in text


def test_an_index_promotes_nothing():
    """np.eye(n)[ids] is float64 because of np.eye, whatever ids are."""
    kinds = {"ids": "int64", "x": "float32"}

    def said(text):
        return origin.said({"line": 1, "text": text, "kinds": kinds, "numbers": []})

    for line in ("hot = np.eye(x.shape[1])[ids]", "y = np.zeros((len(ids), x.shape[1]))"):
        assert "makes float64 unless dtype= says otherwise" in said(line)
        assert "give ids" not in said(line)
    assert "give ids the dtype of x first" in said("y = np.zeros((3, 2), x.dtype) + ids * x")
    assert "give ids" not in said("y = x[ids] * scale")


def test_an_argument_that_comes_in_what_forward_saved_need_not_be_read():
    """The scale is in saved, which is right; what is wrong is a buffer that the next forward writes over."""
    room = "ROOM.setdefault((x_TD.shape, A_DR.shape, str(x_TD.dtype)), x_TD @ A_DR)"
    edits = (
        ("def lora_forward(", "ROOM = {}\n\n\ndef lora_forward("),
        ("    z_TR = x_TD @ A_DR\n", f"    z_TR = np.matmul(x_TD, A_DR, out={room})\n"),
        ("return y_TF, (x_TD, z_TR)", "return y_TF, (s, x_TD, z_TR)"),
        ("    x_TD, z_TR = saved\n    s = alpha / A_DR.shape[1]\n", "    s, x_TD, z_TR = saved\n"),
    )
    text, mistakes = spoken(judged("33", *edits))
    assert mistakes == ["state"]
    assert "must go by the argument" not in text


def test_an_error_is_not_told_by_what_would_spoil_an_earlier_part():
    """`taken_early` ends with this error too, and with another append; here append is right."""
    text, _ = spoken(judged("39", ("if more > len(self.free) - len(woken):", "if more > len(self.free) - len(woken) + 1:")))
    assert "pop from empty list" in text
    assert "append takes a block" not in text


def test_a_cost_far_beyond_that_of_a_mistake_is_another_one():
    again = (
        "            x_TD, one = layer.forward(x_TD, rng)\n",
        "            now_ = rng.bit_generator.state\n            for _ in range(9):\n"
        "                rng.bit_generator.state = now_\n"
        "                y_TD, one = layer.forward(x_TD, rng)\n            x_TD = y_TD\n",
    )
    text, mistakes = spoken(judged("37", again))
    assert "45 layers run where 5 are enough" in text
    assert all(m.startswith("repair: ") for m in mistakes)


def test_numbers_that_went_as_float16_are_told_as_that():
    text, mistakes = spoken(judged("44", ("came = cp.all_to_all(parts)", HALF_SENT)))
    assert mistakes == ["float16"]
    assert "an array on the way is float16." in text


HALF_SENT = "came = [y.astype(x_tHE.dtype) for y in cp.all_to_all([x.astype(np.float16) for x in parts])]"


def test_a_slope_far_below_0_may_round_otherwise():
    """Where all that is left of 1 + tanh is rounding: draws on which this was refused."""
    edits = (
        ("c * (a_TF + 0.044715 * a_TF**3)", "c * a_TF * (1 + 0.044715 * a_TF**2)"),
        ("0.5 * (1 + t_TF) + 0.5 * a_TF * (1 - t_TF**2)", "0.5 * (1 + t_TF) + 0.5 * a_TF * (1 - t_TF * t_TF)"),
    )
    assert all(dev.passes(dev.judged(examiner("02"), changed("02", *edits), seed)) for seed in (104, 115, 194))
