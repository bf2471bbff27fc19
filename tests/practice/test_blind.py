"""What answers that were written from the scaffolds alone have shown: each a kind, on an answer unlike those."""

import json
import re

import numpy as np
import pytest

from practice import blind, dev, noted
from practice.exercise import every
from tests.practice.test_named import judged, spoken


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


def test_two_costs_have_a_mistake_each():
    scatter, moments = "dp.reduce_scatter(g_N) / dp.size", "    m_n = b1 * m_n + (1 - b1) * g_n\n"
    whole = "    m_N = np.zeros_like(w_N)\n    m_N[dp.cut(len(w_N))] = m_n\n"
    edits = (scatter, "dp.all_reduce(g_N)[dp.cut(len(g_N))] / dp.size"), (moments, whole + moments)
    _, mistakes = spoken(judged("27", *edits))
    assert sorted(mistakes) == ["all_reduced", "whole_inside"]


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
        assert sum(f[k] for k in ("accepted", "cause", "ingredients", "numbers", "misleading")) == f["wrong"] == 10
        assert 0 <= f["refused"] <= f["right"] == 3
