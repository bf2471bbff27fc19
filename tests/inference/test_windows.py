"""Attention within a window of the last tokens: what is cached, forgotten and shared changes no token."""

from random import Random

import numpy as np
import pytest

from inference.blocks import BLOCK
from inference.cache import SLACK, ContiguousCache, PagedCache
from inference.engine import Ask
from inference.generate import Generator, make_cache
from inference.sampling import Sampling
from inference.scheduler import Scheduler
from inference.speculation.generator import Speculative
from parallel.mesh import Mesh
from tests.grids import at
from tests.inference.small import WINDOWED, V, full_logits, lone, model_of
from tests.inference.test_engine import alone, asks_of, together

pytestmark = [pytest.mark.mpi, at(1, 3)]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7] * 3


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
@pytest.mark.parametrize("kind", WINDOWED)
def test_cached_logits_are_those_of_a_full_forward(mesh, kind, cache):
    generator = Generator(model_of(kind, mesh), mesh, make_cache(model_of(kind, mesh), cache))
    generator.cache.open(0)
    want, cut = full_logits(kind, PROMPT), generator.model.embedding.cut
    at = 0
    # A long piece, one beyond the window, drafts of which five are taken back, single tokens.
    for n, back in ((18, 0), (11, 0), (8, 5), *((1, 0),) * 10):
        got_v = generator.forward([(0, PROMPT[at : at + n])], rows=range(n))
        np.testing.assert_allclose(mesh.tp.all_gather(got_v, 1, cut), want[at : at + n], rtol=0, atol=1e-12)
        at += n - back
        generator.cache.truncate(0, at)


@pytest.mark.parametrize("draft", ["ngram", "layers=1"])
@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_drafts_are_taken_back(mesh, cache, draft):
    model = model_of("window", mesh)
    want = [g.token for g in lone("window").tokens(PROMPT, Sampling(), 40)]
    generator = Speculative(model, mesh, make_cache(model, cache), draft, 8)
    assert [g.token for g in generator.tokens(PROMPT, Sampling(), 40)] == want
    assert generator.account.drafted > generator.account.accepted


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_requests_tokens_are_those_of_running_it_alone(mesh, control, kind):
    """In chunks, with drafts, with shared beginnings, and preempted."""
    model, asks = model_of(kind, mesh), asks_of(Random(5), 8, repeats=True)
    want = None if control.rank else {n: alone(kind, ask) for n, ask in enumerate(asks)}
    scheduler = Scheduler(blocks=8, slots=5, max_batch_tokens=16)
    done = together(model, mesh, control, scheduler, asks, speculate=True)
    if control.rank == 0:
        assert done[0] == want
        # Where every layer has a window, what is given back suffices.
        assert (scheduler.counts.preemptions > 0) == (kind == "mixed")
        assert scheduler.counts.hit_tokens


def test_a_request_of_any_length_holds_the_blocks_of_a_window(mesh, control):
    model, scheduler, most = model_of("window", mesh), Scheduler(slots=2, max_batch_tokens=16), 0
    right = scheduler.commit

    def commit(step, new):
        nonlocal most
        outputs = right(step, new)
        most = max([most, *(len(r.table) for r in scheduler.running if r.decoding)])
        return outputs

    scheduler.commit = commit
    done = together(model, mesh, control, scheduler, [Ask([n], 100) for n in range(2)])
    if control.rank == 0:
        assert all(len(tokens) == 100 for tokens in done[0].values())
        # A window of 9 tokens lies in two blocks at most, and one may be there for the next token.
        assert most == 2


@pytest.mark.parametrize("kind", [ContiguousCache, PagedCache])
def test_what_is_behind_the_window_is_forgotten(comm, kind):
    cache = kind([[(2,)], [(2,)]], "float64", windows=[20, 20])
    cache.open(7)
    for length in range(1, 200):
        cache.extend(7, 1)
        for layer in range(2):
            cache._write(layer, 7, [np.array([[length, -length]])])
        kept = cache._read(1, 7)[0][:, 0]
        assert kept.tolist() == list(range(length - len(kept) + 1, length + 1))
        assert len(kept) >= min(length, 20)
    assert cache.bytes_of(7) <= 2 * 16 * (2 * (20 + SLACK) + BLOCK)
    cache.truncate(7, 199 - SLACK + 1)
    with pytest.raises(ValueError, match="cannot cut sequence 7 to 100 tokens: what is before them has been forgotten"):
        cache.truncate(7, 100)
    cache.branch(7, 8)
    cache.extend(8, 30)
    cache.free(7)
    cache.free(8)
    if kind is PagedCache:
        assert cache.blocks.used == 0


def test_a_window_read_wrongly_is_seen(mesh):
    model = model_of("window", mesh)
    for block in model.blocks:
        block.attention.window += 1
    generator = Generator(model, mesh, make_cache(model, "paged"))
    generator.cache.open(0)
    got_v = generator.forward([(0, PROMPT)], rows=range(len(PROMPT)))
    got = mesh.tp.all_gather(got_v, 1, model.embedding.cut)
    assert abs(got - full_logits("window", PROMPT)).max() > 1e-6
    assert got.shape[1] == V
