"""That speculation loses nothing is shown by going through every random choice, not by sampling."""

from itertools import product

import numpy as np
import pytest
from mpi4py import MPI

from inference.sampling import Sampler, Sampling
from inference.speculation import rule
from inference.speculation.drafts import Ngram
from inference.speculation.gain import Gamma, expected_tokens, operations, speedup
from inference.speculation.rule import Drafted, residual, verified
from parallel.mesh import Mesh
from parallel.shard import even

# --- the paper's numbers

TABLE_1 = [
    (0.6, 2, 1.53, 1.96),
    (0.7, 3, 1.58, 2.53),
    (0.8, 2, 1.23, 2.44),
    (0.8, 5, 1.63, 3.69),
    (0.9, 2, 1.11, 2.71),
    (0.9, 10, 1.60, 6.86),
]


@pytest.mark.parametrize(("alpha", "gamma", "ops", "speed"), TABLE_1)
def test_theorems_give_the_papers_table_1(alpha, gamma, ops, speed):
    assert round(operations(alpha, gamma, 0), 2) == ops
    assert round(speedup(alpha, gamma, 0), 2) == speed


def test_the_ends_of_the_formulas():
    assert expected_tokens(1.0, 4) == 5
    assert expected_tokens(0.0, 4) == 1
    # Corollary 3.9: one drafted token of cost c gains (1 + alpha) / (1 + c).
    assert speedup(0.6, 1, 0.2) == pytest.approx(1.6 / 1.2)
    # Section 4: a bigram model, alpha about .2, gamma 3.
    assert speedup(0.2, 3, 0) == pytest.approx(1.248)


# --- every draft, every acceptance, every residual


class Choices:
    """Goes through every way in which random choices can come out, with its probability."""

    def __init__(self):
        self.script = []

    def each(self, run):
        """Calls run() once for each way; yields (what it returned, the probability)."""
        while True:
            self.at, self.chance, self.open = 0, 1.0, []
            got = run()
            yield got, self.chance
            while self.open and self.script[len(self.open) - 1] + 1 == self.open[-1]:
                self.open.pop()
            if not self.open:
                return
            self.script = [*self.script[: len(self.open) - 1], self.script[len(self.open) - 1] + 1]

    def choose(self, chances):
        """The index of one of them, by the script."""
        possible = [(i, float(c)) for i, c in enumerate(chances) if c > 0]
        if self.at == len(self.script):
            self.script = [*self.script, 0]
        index, chance = possible[self.script[self.at]]
        self.open.append(len(possible))
        self.at += 1
        self.chance *= chance
        return index


def law(monkeypatch, sampling, V, gamma, q_sampling=None, certain=False):
    """The distribution of the first gamma + 1 tokens, by way of speculation and by the target alone."""
    random = np.random.default_rng(V * 10 + gamma)
    sampler = Sampler(Mesh(MPI.COMM_SELF, tp=1).tp, even(V, 1))
    paths = [path for n in range(gamma + 1) for path in product(range(V), repeat=n)]
    target, draft = ({path: 1.5 * random.standard_normal(V) for path in paths} for _ in range(2))
    choices = Choices()

    def accept(log_p, log_q, true=rule.log_acceptance):
        chance = np.exp(true(log_p, log_q))
        return np.inf if choices.choose([chance, 1 - chance]) == 0 else -np.inf

    def draw(log_p_v, *_):
        return choices.choose(np.exp(log_p_v))

    monkeypatch.setattr(rule, "log_acceptance", accept)
    monkeypatch.setattr(sampler, "draw", draw)

    def round_of():
        tokens, log_q = [], []
        for _ in range(gamma):
            seen = sampler.filtered(draft[tuple(tokens)], q_sampling or sampling)
            # What the draft is believed to have drawn from.
            believed = sampler.filtered(draft[tuple(tokens)], sampling)
            x = int(np.argmax(seen)) if certain else draw(seen)
            tokens.append(x)
            log_q.append(None if certain else believed)
        rows = np.stack([target[tuple(tokens[:n])] for n in range(gamma + 1)])
        return verified(sampler, rows, Drafted(tokens, log_q), sampling, 0, 0)

    p = {path: np.exp(sampler.filtered(z, sampling)) for path, z in target.items()}
    got, want = {}, {(): 1.0}
    for _ in range(gamma + 1):
        want = {(*path, x): c * p[path][x] for path, c in want.items() for x in range(V)}
    for tokens, chance in choices.each(round_of):
        # A round that ends early is gone on with by the target.
        ends = {tuple(tokens): chance}
        for _ in range(gamma + 1 - len(tokens)):
            ends = {(*path, x): c * p[path][x] for path, c in ends.items() for x in range(V)}
        for path, c in ends.items():
            got[path] = got.get(path, 0.0) + c
    return max(abs(got.get(path, 0.0) - c) for path, c in want.items()), sum(got.values())


SAMPLINGS = [Sampling(1.0), Sampling(0.6), Sampling(1.0, top_k=2), Sampling(0.8, top_p=0.7), Sampling(1.2, top_k=3, top_p=0.9)]


@pytest.mark.parametrize(("V", "gamma"), [(2, 1), (2, 3), (3, 2), (3, 3), (4, 1), (4, 2)])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_every_way_together_is_the_targets_distribution(monkeypatch, sampling, V, gamma):
    for certain in (False, True):
        with monkeypatch.context() as patch:
            off, total = law(patch, sampling, V, gamma, certain=certain)
        assert off < 1e-14
        assert total == pytest.approx(1, abs=1e-13)


def test_four_tokens_and_three_drafts(monkeypatch):
    assert law(monkeypatch, Sampling(0.9, top_p=0.95), 4, 3)[0] < 1e-14


# Sabotages: each must leave the target's distribution.


def test_an_unnormalised_residual_is_seen(monkeypatch):
    true = residual
    spoilt = lambda s, p, q: true(s, p, q) + np.log(np.maximum(np.exp(p) - np.exp(q), 0).sum())  # noqa: E731
    monkeypatch.setattr(rule, "residual", spoilt)
    off, total = law(monkeypatch, Sampling(1.0), 3, 2)
    assert off > 1e-3
    assert total < 1 - 1e-3


def test_a_q_from_before_filtering_is_seen(monkeypatch):
    """The draft draws from all of its distribution, and tells the filtered one, where what it drew can be log 0."""
    with np.errstate(invalid="ignore"):
        assert law(monkeypatch, Sampling(1.0, top_p=0.7), 4, 1, q_sampling=Sampling(1.0))[0] > 1e-3


def test_a_residual_of_p_alone_is_seen(monkeypatch):
    monkeypatch.setattr(rule, "residual", lambda s, p, q: p)
    assert law(monkeypatch, Sampling(1.0), 3, 1)[0] > 1e-3


def test_drafts_that_are_always_accepted_are_seen(monkeypatch):
    monkeypatch.setattr(rule, "log_acceptance", lambda p, q: 0.0)
    assert law(monkeypatch, Sampling(1.0), 3, 2)[0] > 1e-3


# --- drafts, and how many


def test_prompt_lookup_takes_the_latest_and_longest():
    draft = Ngram(longest=3, shortest=2)
    s = Sampling()
    assert draft.propose([1, 2, 3, 9, 1, 2, 3], 2, s, 0).tokens == [9, 1]
    assert draft.propose([1, 2, 3, 9, 1, 2, 3, 7], 2, s, 0).tokens == []
    assert draft.propose([1, 2, 3, 9, 1, 2, 3, 7, 2, 3], 4, s, 0).tokens == [7, 2, 3]
    # The longer ending wins over the later one.
    assert draft.propose([1, 2, 3, 9, 1, 2, 3, 7, 2, 3, 8, 9, 1, 2], 2, s, 0).tokens == [3, 7]
    draft.close()
    assert draft.propose([5, 6], 3, s, 0).tokens == []


def test_gamma_follows_acceptance_and_costs():
    def settled(acceptance, each, draft):
        gamma, random = Gamma(None), np.random.default_rng(0)
        asked = []
        for _ in range(400):
            g = gamma.next()
            accepted = 0
            while accepted < g and random.random() < acceptance:
                accepted += 1
            gamma.learn(g, g, accepted, g * draft, 1 + each * g)
            asked.append(g)
        return asked[200:]

    # Rows that cost next to nothing, drafts that are right: many. Rows that cost as much as a step: none, but for a trial now
    # and then.
    assert np.mean(settled(0.95, 0.05, 0.0)) > 6
    assert np.mean(settled(0.5, 0.3, 0.1)) < 3
    silent = settled(0.1, 0.9, 0.5)
    assert np.mean(np.array(silent) > 0) < 0.05
    assert Gamma(3).next() == 3
