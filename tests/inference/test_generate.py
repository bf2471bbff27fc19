"""Decoding with caches: logits and tokens are those of the full forward, on any ranks."""

from functools import cache

import numpy as np
import pytest

from inference.generate import Generator, make_cache
from inference.sampling import Sampling, gumbel
from launch import start
from parallel.ledger import agrees
from tests.apart import on_first
from tests.grids import thinned
from tests.inference.small import CASES, CONFIGS, V, full_logits, model_of
from tests.inference.test_sampling import textbook

pytestmark = pytest.mark.mpi

CHUNKS = (1, 5, 17, None)
KINDS = list(CONFIGS)


def turned(case, ways):
    """Half of the ways, by the case: each kind of model and each kind of cache meets all of them."""
    kind, cache, striped = case
    return ways[(KINDS.index(kind) + (cache == "paged") + striped) % 2 :: 2]


@pytest.mark.parametrize(
    ("case", "chunk"),
    thinned([(case, chunk) for case in CASES for chunk in CHUNKS], [(c, chunk) for c in CASES for chunk in turned(c, CHUNKS)]),
    ids=str,
)
def test_cached_decoding_is_the_full_forward_at_every_position(mesh, case, chunk):
    kind, cache, striped = case
    model = model_of(kind, mesh)
    generator = Generator(model, mesh, make_cache(model, cache, striped))
    ids = np.random.default_rng(0).integers(0, V, 40)
    full = model.embedding.cut.take(full_logits(kind, ids), 1, mesh.tp.rank)
    generator.cache.open(7)
    got = generator.prefill(7, ids[:33], chunk)
    np.testing.assert_allclose(got[0], full[32], rtol=0, atol=1e-12)
    for n in range(33, 40):
        with mesh.phase("decode"):
            got = generator.forward([(7, ids[n : n + 1])])
        np.testing.assert_allclose(got[0], full[n], rtol=0, atol=1e-12)
    sizes = [33] if chunk is None else [min(chunk, 33 - first) for first in range(0, 33, chunk)]
    predicted = [t for n in sizes for t in generator.traffic(n, "prefill")]
    predicted += [t for _ in range(7) for t in generator.traffic(1, "decode")]
    assert agrees(mesh.ledger.report(predicted))


@pytest.mark.parametrize(("kind", "cache", "striped"), CASES)
def test_a_ragged_batch_truncation_and_branches(mesh, kind, cache, striped):
    model = model_of(kind, mesh)
    generator = Generator(model, mesh, make_cache(model, cache, striped))
    a, b = (np.random.default_rng(n).integers(0, V, 50) for n in range(2))

    def full(*parts):
        return model.embedding.cut.take(full_logits(kind, np.concatenate(parts)), 1, mesh.tp.rank)

    for s in (0, 1):
        generator.cache.open(s)
    # Several sequences at once, of which all rows are asked for.
    got = generator.forward([(0, a[:20]), (1, b[:3])], rows=range(23))
    np.testing.assert_allclose(got, np.concatenate([full(a[:20]), full(b[:3])]), rtol=0, atol=1e-12)
    generator.cache.branch(0, 2)
    generator.forward([(0, b[:9])])
    generator.cache.truncate(2, 17)
    got = generator.forward([(1, b[3:5]), (2, a[17:19])])
    np.testing.assert_allclose(got, [full(b[:5])[-1], full(a[:19])[-1]], rtol=0, atol=1e-12)
    got = generator.forward([(0, a[:1])])
    np.testing.assert_allclose(got[0], full(a[:20], b[:9], a[:1])[-1], rtol=0, atol=1e-12)
    for s in (0, 1, 2):
        generator.cache.free(s)
    assert not generator.cache.lengths


def test_a_striped_cache_is_for_latents(mesh):
    with pytest.raises(ValueError, match="a striped cache is for latent attention"):
        make_cache(model_of("llama", mesh), "contiguous", striped=True)


@cache
def continued(kind, sampling):
    """Tokens by a full forward for each, and the logits of the last. All ranks call it together."""

    def work():
        ids = [3, 1, 4, 1, 5]
        for n in range(12):
            logits = full_logits(kind, ids)[-1]
            if sampling.temperature:
                ids.append(int(np.argmax(textbook(logits, sampling) + gumbel(3, 9, 5 + n, 0, V))))
            else:
                ids.append(int(logits.argmax()))
        return ids, logits

    return on_first(start.begin(), work)


SAMPLINGS = [Sampling(), Sampling(0.9, top_k=20, top_p=0.9, seed=3)]


@pytest.mark.parametrize(
    ("case", "sampling"),
    thinned([(case, s) for case in CASES for s in SAMPLINGS], [(case, s) for case in CASES for s in turned(case, SAMPLINGS)]),
    ids=str,
)
def test_tokens_are_those_of_the_full_forward(mesh, case, sampling):
    kind, cache, striped = case
    model, prompt = model_of(kind, mesh), [3, 1, 4, 1, 5]
    ids, logits = continued(kind, sampling)
    for chunk in thinned((None, 2), [(None, 2)[mesh.tp.size % 2]]):
        generator = Generator(model, mesh, make_cache(model, cache, striped))
        made = list(generator.tokens(prompt, sampling, 12, request=9, chunk=chunk, logprobs=True))
        assert [g.token for g in made] == ids[5:]
        assert not generator.cache.lengths
        assert (generator.timings.prefill_tokens, generator.timings.decode_tokens) == (5, 11)
    ended = list(Generator(model, mesh, make_cache(model, cache)).tokens(prompt, sampling, 12, request=9, ends={ids[7]}))
    assert [g.token for g in ended] == ids[5 : 5 + 1 + ids[5:].index(ids[7])]
    z = logits - logits.max()
    want = (z - np.log(np.exp(z).sum()))[ids[-1]]
    assert made[-1].logprob == pytest.approx(want, abs=1e-12)
