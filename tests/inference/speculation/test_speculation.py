"""Speculative decoding with models: tokens are those of the target alone, whatever drafts."""

from dataclasses import replace
from functools import cache
from math import log

import numpy as np
import pytest
from mpi4py import MPI

from inference.generate import Generator, make_cache
from inference.sampling import Sampler, Sampling
from inference.speculation.drafts import ModelDraft
from inference.speculation.generator import Speculative
from inference.speculation.rule import log_acceptance, residual
from launch import start
from models.build import build
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import even
from tests.apart import on_first
from tests.grids import one_in, thinned
from tests.inference.small import CASES, CONFIGS, V, lone, model_of

pytestmark = pytest.mark.mpi

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1, 5]
# Past two blocks of a paged cache.
MOST = 20
DRAFTS = ("ngram", "layers=1", "layers=2", "same", "other", "whole")
# How many drafts: None is as many as pay.
EVERY = [(*case, draft, (1, 5, 8, None) if case[0] == "llama" else (3, None)) for case in CASES for draft in DRAFTS]
# Each draft with each kind of model, each kind of cache, one draft, several, and as many as pay; latents striped and not.
FEW = [
    (kind, ("contiguous", "paged")[(n + (kind == "llama")) % 2], kind == "latent", draft, gammas)
    for n, draft in enumerate(DRAFTS)
    for kind, gammas in (("gpt2", (None,)), ("llama", (1, (5, 8)[n % 2])), ("latent", (3,)))
] + [("latent", "contiguous", False, "layers=1", (3,)), ("latent", "paged", False, "same", (None,))]
FEW = [case for (case,) in one_in(3, FEW)]


def speculator(mesh, kind, cache, draft, gamma, striped=False):
    model = model_of(kind, mesh, layers=3)
    if draft in ("same", "other", "whole"):
        axis = Mesh(MPI.COMM_SELF, tp=1) if draft == "whole" else mesh
        other = model_of(kind, axis, layers=3, seed=1 if draft == "same" else 2)
        draft = Generator(other, axis, make_cache(other, cache))
    return Speculative(model, mesh, make_cache(model, cache, striped), draft, gamma)


@cache
def plain_tokens(kind):
    """What the target makes alone. All ranks call it together."""
    made = lambda: [g.token for g in lone(kind, layers=3).tokens(PROMPT, Sampling(), MOST)]  # noqa: E731
    return on_first(start.begin(), made)


@pytest.mark.parametrize(("kind", "cache", "striped", "draft", "gammas"), thinned(EVERY, FEW))
def test_greedy_tokens_are_the_plain_ones(mesh, kind, cache, striped, draft, gammas):
    plain = plain_tokens(kind)
    for gamma in gammas:
        it = speculator(mesh, kind, cache, draft, gamma, striped)
        assert [g.token for g in it.tokens(PROMPT, Sampling(), MOST)] == plain
        assert not it.cache.lengths
        account = it.account
        assert account.tokens == MOST - 1 == it.timings.decode_tokens
        if draft == "same":
            assert account.accepted == account.tested == account.drafted


@pytest.mark.parametrize(("draft", "gamma"), one_in(3, ["ngram", "layers=2", "same", "other", "whole"], [1, 4]))
def test_sampled_tokens_do_not_depend_on_the_ranks(comm, mesh, draft, gamma):
    sampling = Sampling(0.9, top_k=20, top_p=0.95, seed=5)
    steps = list(speculator(mesh, "llama", "paged", draft, gamma).tokens(PROMPT, sampling, 25, request=3, logprobs=True))

    def by_itself():
        own = speculator(Mesh(MPI.COMM_SELF, tp=1), "llama", "contiguous", draft, gamma)
        return list(own.tokens(PROMPT, sampling, 25, request=3, logprobs=True)), own.account

    alone, account = on_first(comm, by_itself)
    assert [s.token for s in steps] == [s.token for s in alone]
    np.testing.assert_allclose([s.logprob for s in steps], [s.logprob for s in alone], atol=1e-10)
    if draft == "same":
        # p is q, whatever was accepted before: the draft's cache holds what the target's does.
        assert account.accepted == account.drafted > 0


def test_a_draft_cache_one_short_after_full_acceptance_is_seen(mesh, monkeypatch):
    def one_short(self, context, many):
        for request, length in list(self.generator.cache.lengths.items()):
            self.generator.cache.truncate(request, min(length, len(context) + many))
            if length < len(context) + many:
                # The last drafted token, which was not run, is believed to have been.
                self.generator.cache.extend(request, 1)
                # What the memory held before may be right by chance.
                for layer in self.generator.cache._arrays[request]:
                    for kept in layer:
                        kept[length] = 0

    monkeypatch.setattr(ModelDraft, "accepted", one_short)
    it = speculator(mesh, "llama", "contiguous", "same", 3)
    list(it.tokens(PROMPT, Sampling(0.9, seed=5), 25))
    assert it.account.accepted < it.account.tested


def test_ends_limits_and_stops_inside_an_accepted_run(mesh):
    it = speculator(mesh, "llama", "paged", "same", 6)
    whole = [s.token for s in it.tokens(PROMPT, Sampling(), 25)]
    for most in range(1, 12):
        assert [s.token for s in it.tokens(PROMPT, Sampling(), most)] == whole[:most]
        assert not it.cache.lengths
    end = whole[9]
    cut = whole[: whole.index(end) + 1]
    assert [s.token for s in it.tokens(PROMPT, Sampling(), 25, ends=frozenset({end}))] == cut
    # A reader that stops reading (at a stop text) leaves nothing behind.
    steps = it.tokens(PROMPT, Sampling(), 25)
    assert [next(steps).token for _ in range(7)] == whole[:7]
    steps.close()
    assert not it.cache.lengths


def test_acceptance_and_residual_of_a_small_case(mesh):
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.3, 0.4, 0.2, 0.1])
    cut = even(4, mesh.tp.size)
    sampler = Sampler(mesh.tp, cut)
    log_p, log_q = (cut.take(np.log(a), 0, mesh.tp.rank) for a in (p, q))
    accepted = sum(q[x] * np.exp(log_acceptance(log(p[x]), log(q[x]))) for x in range(4))
    assert accepted == pytest.approx(0.8, abs=1e-15)
    left = mesh.tp.all_gather(np.exp(residual(sampler, log_p, log_q)), 0, cut)
    np.testing.assert_allclose(left, [1, 0, 0, 0], atol=1e-15)
    # A certain draft of token 1: accepted with p(1), else one of the others by their own shares.
    one = sampler.certain(1)
    left = mesh.tp.all_gather(np.exp(residual(sampler, log_p, one)), 0, cut)
    np.testing.assert_allclose(left, [0.5 / 0.7, 0, 0.15 / 0.7, 0.05 / 0.7], atol=1e-15)


def test_what_cannot_be_is_refused(mesh):
    with pytest.raises(ValueError, match="cannot draft with 3 of the model's 3 layers: use 1 to 2"):
        speculator(mesh, "llama", "paged", "layers=3", 2)


@pytest.mark.parametrize("rows", [V + 13, V - 4])
@pytest.mark.parametrize("whole", [False, True])
def test_a_draft_whose_table_is_padded_otherwise(mesh, comm, rows, whole):
    """Greedy tokens are plain ones, and drafts are accepted; sampled ones come from a q that sums to 1, of tokens that are."""
    model = build(CONFIGS["llama"], mesh.tp, drawn(1, "float64", 0.25))
    axes = Mesh(MPI.COMM_SELF, tp=1) if whole else mesh
    other = build(replace(CONFIGS["llama"], vocabulary=rows, layers=1), axes.tp, drawn(1, "float64", 0.25))
    want = [g.token for g in Generator(model, mesh, make_cache(model, "paged")).tokens(PROMPT, Sampling(), 30)]
    drafting = Generator(other, axes, make_cache(other, "paged"))
    generator = Speculative(model, mesh, make_cache(model, "paged"), drafting, 3)
    assert [g.token for g in generator.tokens(PROMPT, Sampling(), 30)] == want
    assert generator.account.drafted > 20
    drafted = generator.draft.propose(PROMPT, 4, Sampling(0.9, top_p=0.95), 0)
    for token, log_q_v in zip(drafted.tokens, drafted.log_q, strict=True):
        q = mesh.tp.all_gather(np.exp(log_q_v), 0, model.embedding.cut)
        assert q.shape == (V,)
        assert q.sum() == pytest.approx(1, abs=1e-12)
        assert q[token] > 0
    generator.draft.close()
