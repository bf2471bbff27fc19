"""Rotary positions: published values, invariants, and the reference's own formulas."""

import numpy as np
import pytest

from layers.rope import Linear, Llama3, Rope, Yarn, pairing_permutation
from reference import rope as reference


@pytest.mark.parametrize(
    ("pairing", "want"),
    [
        ("interleaved", [2.20151073, -0.3915999, 2.7963341, 4.14493855]),
        ("half", [3.16043501, 1.79758384, -0.10793772, 4.09495938]),
    ],
)
def test_known_values(pairing, want):
    x = np.array([[[1.0, 2.0, 3.0, 4.0]]])
    Rope(4, 10000.0, pairing).at([5], "float64").forward(x)
    np.testing.assert_allclose(x[0, 0], want, rtol=0, atol=5e-9)


def test_llama_3_1_frequencies():
    plain, scaled = Rope(128, 500000.0).frequencies_P, Rope(128, 500000.0, scaling=Llama3()).frequencies_P
    np.testing.assert_array_equal(scaled[:29], plain[:29])
    np.testing.assert_array_equal(scaled[35:], plain[35:] / 8)
    assert ((scaled < plain) & (scaled > plain / 8))[29:35].all()
    np.testing.assert_allclose([plain[32], scaled[32]], [0.0014142136, 0.00052484616], rtol=5e-8)
    np.testing.assert_allclose(scaled[29:35] / plain[29:35], [0.82817, 0.64374, 0.49351, 0.37112, 0.27143, 0.19021], atol=5e-6)


def test_llama_3_2_frequencies():
    plain, scaled = Rope(64, 500000.0).frequencies_P, Rope(64, 500000.0, scaling=Llama3(factor=32.0)).frequencies_P
    np.testing.assert_array_equal(scaled[:15], plain[:15])
    np.testing.assert_array_equal(scaled[18:], plain[18:] / 32)
    assert ((scaled < plain) & (scaled > plain / 32))[15:18].all()


def test_deepseek_yarn():
    """Two corrections: on the tables, and on the scale of the scores."""
    plain = Rope(64).frequencies_P
    v3 = Rope(64, scaling=Yarn(mscale=1.0, mscale_all_dim=1.0))
    lite = Rope(64, scaling=Yarn(mscale=0.707, mscale_all_dim=0.707))
    np.testing.assert_array_equal(v3.frequencies_P[:11], plain[:11])
    np.testing.assert_allclose(v3.frequencies_P[23:], plain[23:] / 40, rtol=1e-15)
    assert (v3.frequencies_P[11:23] < plain[11:23]).all()
    np.testing.assert_allclose([v3.softmax_factor, lite.softmax_factor], [1.87385421, 1.58962617], rtol=5e-9)
    np.testing.assert_allclose(
        192**-0.5 * np.array([1, v3.softmax_factor, lite.softmax_factor]), [0.07216878, 0.13523378, 0.11472139], atol=5e-9
    )
    assert Yarn(mscale=1.0, mscale_all_dim=1.0).table_factor == 1.0
    np.testing.assert_allclose(Yarn(mscale=1.0, mscale_all_dim=0.0).table_factor, 1.36888795, rtol=5e-9)
    np.testing.assert_allclose(Yarn(mscale=0.707, mscale_all_dim=0.0).table_factor, 1.26080378, rtol=5e-9)


SCALINGS = {
    "none": (None, None),
    "linear": (Linear(4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        Llama3(original=64),
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "yarn": (
        Yarn(original=64, mscale_all_dim=0.7),
        {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
}


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("name", SCALINGS)
def test_the_reference_turns_alike_and_backward_is_the_transpose(name, pairing):
    ours, theirs = SCALINGS[name]
    theirs = theirs and theirs | {"original_max_position_embeddings": 64}
    x, dy = np.random.default_rng(0).standard_normal((2, 50, 3, 10))
    y, dx = x.copy(), dy.copy()
    turn = Rope(8, 100.0, pairing, ours).at(np.arange(50), "float64")
    turn.forward(y)
    turn.backward(dx)
    for head in range(3):
        want = reference.rotated(x[:, head, :8], pairing, 100.0, theirs)
        np.testing.assert_allclose(y[:, head, :8], want, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])
    np.testing.assert_allclose(np.sum(y * dy), np.sum(x * dx), rtol=1e-13)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_scores_depend_on_differences_of_positions_only(pairing):
    q, k = np.random.default_rng(0).standard_normal((2, 16))
    rope = Rope(16, 10000.0, pairing)

    def score(m, n):
        turned = np.array([[q], [k]])
        rope.at([m, n], "float64").forward(turned)
        return turned[0, 0] @ turned[1, 0]

    for m, n in [(0, 0), (7, 3), (3, 7), (100, 1)]:
        for further in (1, 50, 10000):
            np.testing.assert_allclose(score(m + further, n + further), score(m, n), rtol=0, atol=1e-11)
    assert abs(score(7, 3) - score(3, 7)) > 0.1
    assert abs(score(7, 3) - score(8, 3)) > 0.1


def test_a_permutation_leads_from_one_pairing_to_the_other():
    x = np.random.default_rng(0).standard_normal((5, 2, 8))
    order = pairing_permutation(8)
    one, other = x.copy(), x[..., order].copy()
    Rope(8, pairing="interleaved").at(np.arange(5), "float64").forward(one)
    Rope(8, pairing="half").at(np.arange(5), "float64").forward(other)
    np.testing.assert_array_equal(other, one[..., order])


def test_float32_tables_are_of_float64_angles():
    """At position 100,000 a float32 angle would be wrong in the third digit."""
    turn = Rope(64).at([100_000], "float32")
    want = np.cos(100_000 * 10000.0 ** (-np.arange(32) / 32))
    np.testing.assert_allclose(turn.cos_TP[0], want, rtol=0, atol=1e-7)


def test_odd_widths_and_unknown_pairings_are_refused():
    with pytest.raises(ValueError, match="cannot rotate a width of 7: use an even one, 2 or more"):
        Rope(7)
    with pytest.raises(ValueError, match="unknown pairing 'halves': use one of half, interleaved"):
        Rope(8, pairing="halves")
