"""Caches, decoding with them, and sampling over vocabulary shards."""

from dataclasses import replace

import numpy as np
import pytest

from inference.cache import BLOCK, ContiguousCache, OutOfBlocks, PagedCache, Striped
from inference.generate import Generator, make_cache
from inference.sampling import Sampler, Sampling, gumbel
from layers.rope import Rope
from models.build import build
from models.config import Latent, gpt2_like, llama_like
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import even

pytestmark = pytest.mark.mpi

V = 31
LATENT = replace(
    llama_like(V, 20, 2, 5, 5, 14, 64), latent=Latent(6, 5, 4, 3, 7), rope=Rope(4, pairing="interleaved"), d_head=9
)
CONFIGS = {"gpt2": gpt2_like(V, 20, 2, 5, 12, 64), "llama": llama_like(V, 24, 2, 6, 3, 14, 64), "latent": LATENT}
CASES = [(kind, cache, False) for kind in CONFIGS for cache in ("contiguous", "paged")]
CASES += [("latent", "contiguous", True), ("latent", "paged", True)]


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


def model_of(kind, mesh, dtype="float64"):
    return build(CONFIGS[kind], mesh.tp, drawn(1, dtype, 0.25))


@pytest.mark.parametrize("chunk", [1, 5, 17, None])
@pytest.mark.parametrize(("kind", "cache", "striped"), CASES)
def test_cached_decoding_is_the_full_forward_at_every_position(mesh, kind, cache, striped, chunk):
    model = model_of(kind, mesh)
    generator = Generator(model, mesh, make_cache(model, cache, striped))
    ids = np.random.default_rng(0).integers(0, V, 40)
    full, _ = model.forward(ids, [40])
    mesh.ledger.rows.clear()
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
    for s in (0, 1):
        generator.cache.open(s)
    # Several sequences at once, of which all rows are asked for.
    got = generator.forward([(0, a[:20]), (1, b[:3])], rows=range(23))
    full = np.concatenate([model.forward(a[:20], [20])[0], model.forward(b[:3], [3])[0]])
    np.testing.assert_allclose(got, full, rtol=0, atol=1e-12)
    generator.cache.branch(0, 2)
    generator.forward([(0, b[:9])])
    generator.cache.truncate(2, 17)
    got = generator.forward([(1, b[3:5]), (2, a[17:19])])
    want = [model.forward(b[:5], [5])[0][-1], model.forward(a[:19], [19])[0][-1]]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    got = generator.forward([(0, a[:1])])
    want = model.forward(np.concatenate([a[:20], b[:9], a[:1]]), [30])[0][-1]
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-12)
    for s in (0, 1, 2):
        generator.cache.free(s)
    assert not generator.cache.lengths


def filled(cache, sequence, tokens, value):
    cache.extend(sequence, tokens)
    for store in cache.stores([(sequence, tokens)]):
        list(store(*(np.full((tokens, *shape), float(value)) for shape in cache.shapes[0])))


def test_paged_blocks_are_shared_copied_on_write_and_given_back():
    cache = PagedCache([[(2, 3), (2, 3)]] * 2, "float64", blocks=5)
    cache.open(0)
    filled(cache, 0, BLOCK + 2, 1)
    cache.branch(0, 1)
    assert cache.blocks.free == 3
    filled(cache, 1, 1, 2)
    # The shared last block was copied; the full first one is still shared.
    assert cache.blocks.free == 2
    assert cache.tables[0][0] == cache.tables[1][0]
    assert cache.tables[0][1] != cache.tables[1][1]
    (first, _), (second, _) = (cache._read(1, s) for s in (0, 1))
    assert first.shape == (BLOCK + 2, 2, 3)
    assert (first == 1).all()
    assert second[-1, 0, 0] == 2
    assert (second[:-1] == 1).all()
    with pytest.raises(OutOfBlocks, match="sequence 0 needs 3 blocks of 16 tokens, 2 are free"):
        cache.extend(0, 3 * BLOCK)
    assert cache.lengths[0] == BLOCK + 2
    cache.truncate(1, BLOCK)
    assert cache.blocks.free == 3
    cache.free(0)
    cache.free(1)
    assert cache.blocks.free == 5
    assert cache.bytes_per_token == 2 * 2 * 6 * 8


def test_random_use_of_a_paged_cache_loses_and_doubles_no_block():
    random = np.random.default_rng(0)
    paged, plain = PagedCache([[(3,)]], "float64", blocks=40), ContiguousCache([[(3,)]], "float64")
    value = new = 0
    for _ in range(1500):
        held = list(paged.lengths)
        what = random.integers(0, 5)
        if what == 0 or not held:
            for cache in (paged, plain):
                cache.open(new)
            new += 1
            continue
        s = held[random.integers(len(held))]
        tokens = int(random.integers(0, 40))
        if what in (1, 2) and paged.needed(s, tokens) <= paged.blocks.free:
            value += 1
            for cache in (paged, plain):
                filled(cache, s, tokens, value)
        elif what == 3:
            length = int(random.integers(0, paged.lengths[s] + 1))
            for cache in (paged, plain):
                cache.truncate(s, length)
        elif what == 4:
            branch = bool(random.integers(2))
            for cache in (paged, plain):
                cache.branch(s, new) if branch else cache.free(s)
            new += branch
        used = [block for table in paged.tables.values() for block in table]
        assert paged.blocks.free == 40 - len(set(used))
        for s in paged.lengths:
            if paged.lengths[s]:
                np.testing.assert_array_equal(paged._read(0, s)[0], plain._read(0, s)[0])
    assert value > 100


def test_striped_positions_are_dealt_out_in_turn():
    caches = [Striped(ContiguousCache([[(1,)]], "float64"), 3, rank) for rank in range(3)]
    for cache in caches:
        cache.open(0)
        cache.extend(0, 5)
        cache.truncate(0, 4)
        cache.extend(0, 4)
    assert [c.own.lengths[0] for c in caches] == [3, 3, 2]
    assert caches[0].bytes_per_token == 8 / 3


def test_what_cannot_be_is_refused():
    cache = ContiguousCache([[(1,)]], "float64")
    cache.open(3)
    with pytest.raises(ValueError, match="sequence 3 is open already"):
        cache.open(3)
    with pytest.raises(ValueError, match="cannot cut sequence 3 to 1 tokens: it has 0"):
        cache.truncate(3, 1)
    for wrong in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} .* must be"):
            Sampling(**wrong)


def test_a_striped_cache_is_for_latents(mesh):
    with pytest.raises(ValueError, match="a striped cache is for latent attention"):
        make_cache(model_of("llama", mesh), "contiguous", striped=True)


# --- sampling: on whole rows, as a textbook has it


def textbook(z, s):
    """log p of a whole row after temperature, top-k, top-p and min-p, by sorting it."""
    z = z / s.temperature
    order = np.lexsort((np.arange(len(z)), -z))
    keep = order[: s.top_k] if s.top_k else order
    p = np.exp(z[keep] - z[keep].max())
    p /= p.sum()
    before = np.cumsum(p) - p
    keep = keep[before < s.top_p]
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
]


@pytest.mark.parametrize("size", [5, 7, 200])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sampling", FILTERS, ids=str)
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


def test_draws_follow_the_distribution(mesh):
    cut = even(6, mesh.tp.size)
    sampler, s = Sampler(mesh.tp, cut), Sampling(1.0)
    p = np.array([0.4, 0.05, 0.3, 0.05, 0.15, 0.05])
    log_p = cut.take(np.log(p), 0, mesh.tp.rank)
    counts = np.bincount([sampler.draw(log_p, s, 0, n) for n in range(1500)], minlength=6)
    # Chi-squared with 5 degrees of freedom: 30 is passed by chance once in 70,000; the draws are the same in every run.
    assert ((counts - 1500 * p) ** 2 / (1500 * p)).sum() < 30


def test_greedy_takes_the_lowest_of_equals(mesh):
    cut = even(9, mesh.tp.size)
    z = np.array([[0, 3, 1, 0, 3, 0, 0, 3, 2.0], [5, 5, 5, 5, 5, 5, 5, 5, 5]])
    assert Sampler(mesh.tp, cut).best(cut.take(z, 1, mesh.tp.rank)).tolist() == [1, 0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=20, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("kind", "cache", "striped"), CASES)
def test_tokens_are_those_of_the_full_forward(mesh, kind, cache, striped, sampling):
    model = model_of(kind, mesh)
    prompt, ids = [3, 1, 4, 1, 5], [3, 1, 4, 1, 5]
    for n in range(12):
        logits = mesh.tp.all_gather(model.forward(np.array(ids), [len(ids)])[0][-1], 0, model.embedding.cut)
        if sampling.temperature:
            ids.append(int(np.argmax(textbook(logits, sampling) + gumbel(3, 9, 5 + n, 0, V))))
        else:
            ids.append(int(logits.argmax()))
    for chunk in (None, 2):
        generator = Generator(model, mesh, make_cache(model, cache, striped))
        steps = list(generator.tokens(prompt, sampling, 12, request=9, chunk=chunk, logprobs=True))
        assert [s.token for s in steps] == ids[5:]
        assert not generator.cache.lengths
        assert (generator.clock.prefill_tokens, generator.clock.decode_tokens) == (5, 11)
    ended = list(Generator(model, mesh, make_cache(model, cache)).tokens(prompt, sampling, 12, request=9, ends={ids[7]}))
    assert [s.token for s in ended] == ids[5 : 5 + 1 + ids[5:].index(ids[7])]
    z = logits - logits.max()
    want = (z - np.log(np.exp(z).sum()))[ids[-1]]
    assert steps[-1].logprob == pytest.approx(want, abs=1e-12)
