"""Attention over tokens that are cut over cp: the same as on one process, for sequences of any length, byte by byte."""

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from layers import context, pieces
from layers.attend import attend, merge
from layers.attention import Attention
from layers.batch import Batch
from layers.context import KINDS, Local, Ring, Ulysses
from layers.latent_attention import LatentAttention
from layers.pieces import LAYOUTS, count, own_spans, pairs, positions, seen_spans, whole
from layers.rope import Llama3, Rope
from layers.saved import nbytes
from layers.work import products
from parallel.control import Control
from parallel.ledger import agrees, merged
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.products import counted
from tests.grids import every_other, one_in

D, H, E = 12, 6, 4
LENGTHS = {"one": [1], "ones": [1, 1, 1], "few": [3, 2, 1, 1, 5], "odd": [37], "ragged": [1, 7, 64, 129]}
ROPE = Rope(4, 500.0, "half", Llama3(8.0, 1.0, 4.0, 64))
# Multi-head; grouped, with biases and normed; without rotation, in both directions; latents, with compression and without.
MODELS = {
    "mha": lambda tp, context: Attention(tp, drawn(1, "float64", 0.1), D, H, H, E, context=context),
    "gqa": lambda tp, context: Attention(
        tp, drawn(1, "float64", 0.1), D, H, 3, E, bias=True, bias_out=True, qk_norm=1e-6, context=context
    ),
    "both ways": lambda tp, context: Attention(tp, drawn(1, "float64", 0.1), D, H, 2, E, causal=False, context=context),
    "mla": lambda tp, context: LatentAttention(tp, drawn(1, "float64", 0.1), D, H, 5, 6, 4, 3, 7, context=context),
    "mla plain": lambda tp, context: LatentAttention(tp, drawn(1, "float64", 0.1), D, H, 5, 6, 4, 3, 0, context=context),
}


def inputs(lengths, sharp=2.0):
    x, dy = np.random.default_rng(sum(lengths)).standard_normal((2, sum(lengths), D))
    return sharp * x, dy


def batch_of(lengths, layout, cp, rope):
    every = LAYOUTS[layout](lengths, cp.size)
    batch = Batch(lengths, None, None, every, cp.rank)
    return replace(batch, rotation=None if rope is None else rope.at(batch.positions_T, "float64"))


def alone(model, lengths, x, dy, rope):
    """The same on one process: y, dx and gradients by name."""
    lone = Mesh(MPI.COMM_SELF, tp=1)
    layer = MODELS[model](lone.tp, None)
    y, saved = layer.forward(x, Batch.of(lengths, rope, "float64"))
    dx = layer.backward(dy, saved)
    return {"y": y, "dx": dx} | {p.name: p.grad for p in layer.parameters}


def cut(comm, mesh, model, lengths, layout, kind, x, dy, rope):
    """Gathered: y, dx, and gradients summed over cp; the ledger's report; counted and predicted, bytes kept and
    products."""
    layer, batch = MODELS[model](mesh.tp, KINDS[kind](mesh.cp)), batch_of(lengths, layout, mesh.cp, rope)
    with counted() as made, mesh.phase("forward"):
        y, saved = layer.forward(batch.take(x), batch)
    with counted() as more, mesh.phase("backward"):
        dx = layer.backward(batch.take(dy), saved)
    report = merged(Control(comm).everyone(mesh.ledger.report(layer.traffic(batch))))
    counts = (nbytes(saved), made + more), (layer.saved_bytes(batch), products(layer.work(batch)))
    whole = {"y": np.empty_like(x), "dx": np.empty_like(x)}
    for own, y_own, dx_own in comm.allgather((batch.mine, y, dx)):
        at = pieces.places(lengths, own)
        whole["y"][at], whole["dx"][at] = y_own, dx_own
    grads = {p.name: sum(comm.allgather(p.grad)) for p in layer.parameters}
    return whole | grads, report, counts


@pytest.mark.mpi
@pytest.mark.parametrize(("model", "kind", "layout", "lengths"), one_in(3, MODELS, KINDS, LAYOUTS, LENGTHS))
def test_cut_over_cp_is_the_same(comm, model, kind, layout, lengths):
    lengths, rope = LENGTHS[lengths], None if model == "both ways" else ROPE
    x, dy = inputs(lengths)
    with Mesh(comm, check=True, cp=comm.size, tp=1) as mesh:
        got, report, (counts, predicted) = cut(comm, mesh, model, lengths, layout, kind, x, dy, rope)
    for name, a in alone(model, lengths, x, dy, rope).items():
        np.testing.assert_allclose(got[name], a, rtol=0, atol=1e-12 * max(1, np.abs(a).max()), err_msg=name)
    assert agrees(report)
    assert counts == predicted


@pytest.mark.mpi
@pytest.mark.parametrize(("kind", "lengths"), [("gather", "ragged"), ("ulysses", "odd")])
def test_within_a_window_cut_over_cp_is_the_same(comm, monkeypatch, kind, lengths):
    """But for the ring, as a piece of a sequence would be seen in part."""
    make = lambda tp, context: Attention(tp, drawn(1, "float64", 0.1), D, H, 3, E, window=9, context=context)  # noqa: E731
    monkeypatch.setitem(MODELS, "window", make)
    x, dy = inputs(LENGTHS[lengths])
    of = "window", LENGTHS[lengths]
    with Mesh(comm, check=True, cp=comm.size, tp=1) as mesh:
        got, report, _ = cut(comm, mesh, *of, "zigzag", kind, x, dy, ROPE)
        if comm.size > 1:
            with pytest.raises(ValueError, match="cannot attend within a window of 9 by the ring: use ulysses or gather"):
                make(mesh.tp, Ring(mesh.cp))
    for name, a in alone(*of, x, dy, ROPE).items():
        np.testing.assert_allclose(got[name], a, rtol=0, atol=1e-12 * max(1, np.abs(a).max()), err_msg=name)
    assert agrees(report)


@pytest.mark.mpi
@pytest.mark.parametrize(("kind", "layout"), every_other(KINDS, LAYOUTS))
def test_a_rank_compares_the_pairs_that_its_blocks_say(comm, monkeypatch, kind, layout):
    counted, plain = [], context.attend

    def counts(q, k, v, o, lse, spans, scale, causal=True, more=False, window=0):
        counted.append(pairs(spans, causal) * q.shape[1] * q.shape[2])
        plain(q, k, v, o, lse, spans, scale, causal, more, window)

    monkeypatch.setattr(context, "attend", counts)
    lengths = LENGTHS["ragged"]
    with Mesh(comm, cp=comm.size, tp=1) as mesh:
        around, batch = KINDS[kind](mesh.cp), batch_of(lengths, layout, mesh.cp, ROPE)
        layer = MODELS["gqa"](mesh.tp, around)
        layer.forward(batch.take(inputs(lengths)[0]), batch)
    inside = around.inside(layer.core)
    mine = sum(pairs(*block) for block in around.blocks(inside, batch)) * inside.heads
    assert sum(counted) == mine
    assert comm.allreduce(mine) == H * sum(n * (n + 1) // 2 for n in lengths)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", KINDS)
def test_sharp_scores_do_not_overflow(comm, kind):
    """Scores of +-80, whose rows see their largest one in another rank's block."""
    lengths = [41, 3]
    x, dy = inputs(lengths, sharp=14.0)
    with Mesh(comm, check=True, cp=comm.size, tp=1) as mesh:
        got, *_ = cut(comm, mesh, "mha", lengths, "zigzag", kind, x, dy, ROPE)
    for name, a in alone("mha", lengths, x, dy, ROPE).items():
        np.testing.assert_allclose(got[name], a, rtol=0, atol=1e-12 * max(1, np.abs(a).max()), err_msg=name)


@pytest.mark.mpi(min_size=4, max_size=4)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_over_tp_and_tokens_over_cp(comm, kind):
    lengths = [3, 20, 5]
    x, dy = inputs(lengths)
    with Mesh(comm, check=True, cp=2, tp=2) as mesh:
        layer, batch = MODELS["gqa"](mesh.tp, KINDS[kind](mesh.cp)), batch_of(lengths, "zigzag", mesh.cp, ROPE)
        y, saved = layer.forward(batch.take(x), batch)
        dx = layer.backward(batch.take(dy), saved)
        want = alone("gqa", lengths, x, dy, ROPE)
        np.testing.assert_allclose(y, batch.take(want["y"]), rtol=0, atol=1e-12)
        np.testing.assert_allclose(dx, batch.take(want["dx"]), rtol=0, atol=1e-12)


@pytest.mark.mpi(min_size=4, max_size=4)
def test_bytes_of_the_ring_are_those_of_the_paper(comm):
    """p 4, T 1024, K 2, E 32, float32: hop 131,072, forward 393,216, backward 786,432."""
    with Mesh(comm, cp=4, tp=1) as mesh:
        layer = Attention(mesh.tp, drawn(0, "float32"), 64, 2, 2, 32, context=Ring(mesh.cp))
        sent = [t for t in layer.traffic(batch_of([1024], "zigzag", mesh.cp, None)) if t.verb == "shift"]
        assert {t.message_bytes for t in sent} == {131_072}
        assert [sum(t.message_bytes for t in sent if t.phase == phase) for phase in ("forward", "backward")] == [
            393_216,
            786_432,
        ]


def test_more_ranks_than_heads_are_the_rings():
    class Four:
        size, rank, name = 4, 0, "cp"

    with pytest.raises(ValueError, match="cannot cut 3 heads over cp=4: use the ring"):
        Ulysses(Four()).require(3)


# --- pieces


def work(lengths, ranks, layout, causal=True):
    """Pairs of query and key that each rank computes."""
    every = LAYOUTS[layout](lengths, ranks)
    return [
        pairs(own_spans(mine, causal), causal) + sum(pairs(seen_spans(mine, o, causal), False) for o in every if o is not mine)
        for mine in every
    ]


def test_work_by_rank_is_that_of_the_notes():
    assert work([64], 4, "contiguous") == [136, 392, 648, 904]
    assert work([64], 4, "zigzag") == [520] * 4
    assert work([64], 3, "zigzag") == [661, 682, 737]
    assert work([37], 4, "zigzag") == [157, 166, 175, 205]
    assert work([1, 7, 64, 129], 4, "zigzag") == [2627, 2617, 2625, 2625]
    assert work([1, 7, 64, 129], 4, "contiguous") == [975, 1569, 2725, 5225]
    # Short sequences begin at different ranks.
    assert work([5] * 4, 4, "zigzag") == [15] * 4
    assert [count(own) for own in LAYOUTS["zigzag"]([1] * 8, 4)] == [2] * 4
    # A hop is as much work as the next.
    every = LAYOUTS["zigzag"]([64], 4)
    assert [pairs(seen_spans(every[0], other, True), False) for other in every[1:]] == [128] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_token_is_somewhere_once_and_every_pair_too(layout, ranks):
    random = np.random.default_rng(ranks)
    for _ in range(50):
        lengths = random.integers(1, 30, random.integers(1, 6)).tolist()
        every = LAYOUTS[layout](lengths, ranks)
        assert len(every) == ranks
        places = np.concatenate([pieces.places(lengths, own) for own in every])
        assert sorted(places) == [*range(sum(lengths))]
        assert sum(work(lengths, ranks, layout)) == sum(n * (n + 1) // 2 for n in lengths)
        assert sum(work(lengths, ranks, layout, causal=False)) == sum(n * n for n in lengths)
        at = np.concatenate([np.arange(n) for n in lengths])
        for own in every:
            np.testing.assert_array_equal(positions(own), at[pieces.places(lengths, own)])


def test_one_rank_has_whole_sequences():
    assert LAYOUTS["zigzag"]([3, 1], 1) == LAYOUTS["contiguous"]([3, 1], 1) == (whole([3, 1]),)


# --- merging


def part(q, k, v):
    o, lse = np.zeros((len(q), 1, 1, v.shape[-1])), np.full((len(q), 1, 1), -np.inf)
    if len(k):
        attend(q[:, None, None], k[:, None], v[:, None], o, lse, [(slice(0, len(q)), slice(0, len(k)))], 1.0, causal=False)
    return o, lse


def test_parts_of_the_keys_merge_in_any_order_and_none_is_neutral():
    q, k, v = np.random.default_rng(0).standard_normal((3, 9, 5))
    k *= 30
    a, b, c, none = (part(q, k[at], v[at]) for at in (slice(0, 2), slice(2, 5), slice(5, 9), slice(0, 0)))
    for got in (merge(a, b, c), merge(merge(a, b), c), merge(a, merge(c, b)), merge(none, a, merge(b, none), c)):
        for x, y in zip(got, part(q, k, v), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-13)
    assert all(np.array_equal(x, y) for x, y in zip(merge(none, none), none, strict=True))
    for x, y in zip(merge(a, none), a, strict=True):
        np.testing.assert_array_equal(x, y)


def test_more_keys_are_merged_as_they_come():
    q, k, v = np.random.default_rng(0).standard_normal((3, 9, 5))
    o, lse = part(q, k[:4], v[:4])
    attend(q[:, None, None], k[:, None], v[:, None], o, lse, [(slice(0, 9), slice(4, 9))], 1.0, causal=False, more=True)
    for x, y in zip((o, lse), part(q, k, v), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-13, atol=1e-13)


# --- sabotages


def home_one_hop_too_early(monkeypatch):
    """dk and dv are sent on once less."""
    shift = Ring._shift
    less = lambda self, x, hop, until, batch: shift(self, x, hop, min(until, self.cp.size - 1), batch)  # noqa: E731
    monkeypatch.setattr(Ring, "_shift", less)


def merged_without_rescaling(monkeypatch):
    """What was there keeps its weight, whatever is added."""
    plain = context.attend

    def spoilt(q, k, v, o, lse, spans, scale, causal=True, more=False, window=0):
        lse_before = lse.copy()
        plain(q, k, v, o, lse, spans, scale, causal, more)
        if more:
            lse[...] = lse_before

    monkeypatch.setattr(context, "attend", spoilt)


def delta_from_the_own_block(monkeypatch):
    forward = Ring.forward

    def spoilt(self, q, k, v, core, batch):
        o, kept = forward(self, q, k, v, core, batch)
        self.own = Local.forward(self, q, k, v, core, batch)[0]
        return o, kept

    backward = Ring.backward
    monkeypatch.setattr(Ring, "forward", spoilt)
    monkeypatch.setattr(Ring, "backward", lambda self, do, o, *more: backward(self, do, self.own, *more))


def contiguous_positions(monkeypatch):
    monkeypatch.setattr(Batch, "positions_T", property(lambda self: np.arange(self.tokens)))


def a_full_block_left_out(monkeypatch):
    from layers.context import Core

    monkeypatch.setattr(Core, "attend_more", lambda self, q, k, v, o, lse, spans: None)


def a_triangle_for_a_full_block(monkeypatch):
    from layers import context

    plain = context.attend

    def bent(q, k, v, o, lse, spans, scale, causal=True, more=False, window=0):
        for queries, keys in spans:
            wrong = more and queries.stop - queries.start <= keys.stop - keys.start
            plain(q, k, v, o, lse, [(queries, keys)], scale, causal or wrong, more)

    monkeypatch.setattr(context, "attend", bent)


def a_hop_skipped(monkeypatch):
    monkeypatch.setattr(Ring, "_seen", lambda self, hop, core, batch: [])


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    "sabotage",
    [
        home_one_hop_too_early,
        merged_without_rescaling,
        delta_from_the_own_block,
        contiguous_positions,
        a_full_block_left_out,
        a_triangle_for_a_full_block,
        a_hop_skipped,
    ],
    ids=lambda s: s.__name__,
)
def test_a_sabotage_is_seen(comm, monkeypatch, sabotage):
    lengths = [37]
    x, dy = inputs(lengths)
    want = alone("mha", lengths, x, dy, ROPE)
    sabotage(monkeypatch)
    with Mesh(comm, cp=comm.size, tp=1) as mesh:
        got, *_ = cut(comm, mesh, "mha", lengths, "zigzag", "ring", x, dy, ROPE)
    assert any(np.abs(got[name] - a).max() > 1e-9 for name, a in want.items())
