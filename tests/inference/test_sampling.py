"""Sampling over vocabulary shards: on whole rows, as a textbook has it."""

import numpy as np
import pytest

from inference.sampling import Sampler, Sampling, gumbel
from parallel.shard import even
from tests.grids import thinned


def textbook(z, s):
    """log p of a whole row after temperature, top-k, top-p and min-p, by sorting it."""
    z = z / s.temperature
    order = np.lexsort((np.arange(len(z)), -z))
    keep = order[: s.top_k] if s.top_k else order
    p = np.exp(z[keep] - z[keep].max())
    p /= p.sum()
    before = np.cumsum(p) - p
    # The likeliest is always kept.
    keep = keep[(before < s.top_p) | (before == 0)]
    keep = keep[z[keep] >= z.max() + np.log(s.min_p)] if s.min_p else keep
    log_p = np.full(len(z), -np.inf)
    log_p[keep] = z[keep] - np.log(np.exp(z[keep] - z.max()).sum()) - z.max()
    return log_p


FILTERS = [
    Sampling(1.0),
    Sampling(0.7, top_k=5),
    Sampling(1.3, top_p=0.8),
    Sampling(0.9, min_p=0.1),
    Sampling(0.8, top_k=50, top_p=0.95, min_p=0.01),
    Sampling(1.0, top_k=1),
    Sampling(2.0, top_p=0.999),
    Sampling(1.0, top_k=10**6, top_p=1e-9),
    Sampling(1.0, top_p=0.0),
]


# Every filter at every size, with and without ties; but not with both at each.
GRID = [(s, ties, size) for s in FILTERS for ties in (False, True) for size in (5, 7, 200)]
FEW = [(s, ties, size) for s, ties, size in GRID if (FILTERS.index(s) + ties + (size == 7)) % 2 == 0]


@pytest.mark.mpi
@pytest.mark.parametrize(("sampling", "ties", "size"), thinned(GRID, FEW), ids=str)
def test_filters_are_exact_over_shards(mesh, sampling, ties, size):
    cut = even(size, mesh.tp.size)
    sampler = Sampler(mesh.tp, cut)
    for seed in range(5):
        z = 2 * np.random.default_rng(seed).standard_normal(size)
        z = np.round(z) if ties else z
        got = mesh.tp.all_gather(sampler.filtered(cut.take(z, 0, mesh.tp.rank), sampling), 0, cut)
        want = textbook(z, sampling)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
        np.testing.assert_allclose(got[np.isfinite(got)], want[np.isfinite(want)], rtol=0, atol=1e-13)


@pytest.mark.mpi
def test_a_draw_does_not_depend_on_the_ranks(mesh):
    cut = even(97, mesh.tp.size)
    sampler = Sampler(mesh.tp, cut)
    z = np.random.default_rng(0).standard_normal((3, 97))
    s = Sampling(0.8, top_k=40, seed=11)
    got = sampler.choose(cut.take(z, 1, mesh.tp.rank), [s, Sampling(), s], [4, 5, 6], [10, 11, 12])
    want = [int(np.argmax(textbook(z[b], s) + gumbel(11, 4 + b, 10 + b, 0, 97))) for b in range(3)]
    want[1] = int(z[1].argmax())
    assert got == want
    sizes = [16 * mesh.tp.size]
    assert all(r["message_bytes"] >= sizes[0] for r in mesh.ledger.report([]))


def test_noise_is_a_function_of_the_token():
    whole = gumbel(1, 2, 3, 0, 1000)
    for first, last in ((0, 10), (7, 500), (501, 1000), (999, 1000)):
        np.testing.assert_array_equal(gumbel(1, 2, 3, first, last), whole[first:last])
    for other in (gumbel(2, 2, 3, 0, 1000), gumbel(1, 3, 3, 0, 1000), gumbel(1, 2, 4, 0, 1000)):
        assert abs(np.corrcoef(whole, other)[0, 1]) < 0.15
    many = gumbel(0, 0, 0, 0, 400_000)
    # Mean and variance of a Gumbel variable: Euler's constant and pi^2 / 6, five standard errors wide.
    assert abs(many.mean() - 0.5772157) < 5 * 1.2825 / np.sqrt(len(many))
    assert abs(many.var() - np.pi**2 / 6) < 0.03


@pytest.mark.mpi
def test_draws_follow_the_distribution(mesh):
    cut = even(6, mesh.tp.size)
    sampler, s = Sampler(mesh.tp, cut), Sampling(1.0)
    p = np.array([0.4, 0.05, 0.3, 0.05, 0.15, 0.05])
    log_p = cut.take(np.log(p), 0, mesh.tp.rank)
    # A draw does not depend on the ranks: several need fewer to show it.
    draws = 1500 if mesh.tp.size == 1 else 300
    counts = np.bincount([sampler.draw(log_p, s, 0, n) for n in range(draws)], minlength=6)
    # Chi-squared with 5 degrees of freedom: 30 is passed by chance once in 70,000; the draws are the same in every run.
    assert ((counts - draws * p) ** 2 / (draws * p)).sum() < 30


@pytest.mark.mpi
def test_greedy_takes_the_lowest_of_equals(mesh):
    cut = even(9, mesh.tp.size)
    z = np.array([[0, 3, 1, 0, 3, 0, 0, 3, 2.0], [5, 5, 5, 5, 5, 5, 5, 5, 5]])
    assert Sampler(mesh.tp, cut).best(cut.take(z, 1, mesh.tp.rank)).tolist() == [1, 0]


def test_what_cannot_be_is_refused():
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": -0.1}, {"top_p": 1.1}, {"min_p": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} .* must be"):
            Sampling(**wrong)
