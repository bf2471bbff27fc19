"""Sharded attention against the reference, entry by entry; its blocks; and the sabotages that must turn these checks red."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from launch import tp_attention
from launch.measure import attention as command
from launch.measure import step
from layers import attend
from layers.attention import Attention
from layers.batch import Batch
from layers.latent_attention import LatentAttention
from layers.pieces import own_spans, whole
from layers.rope import Rope, Yarn
from parallel.control import Control
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn, given
from reference import attention as reference
from tests.apart import shared
from tests.grids import every_other
from tests.layers.deaf import Deaf

pytestmark = pytest.mark.mpi

LENGTHS = "1,7,20"
# 9 heads are every_other out unevenly over 2 and 4 ranks, and 3 kv_heads are then held by several.
SIZES = ("--heads", "9", "--d-model", "27", "--d-head", "6", "--sequences", LENGTHS)
CASES = {
    "mha": ("--kind", "mha"),
    "gqa": ("--kind", "gqa", "--rope", "interleaved"),
    "gqa normed": ("--kind", "gqa", "--qk-norm", "--bidirectional", "--no-bias"),
    "mqa": ("--kind", "mqa", "--rope", "none"),
    "gqa llama3": ("--kind", "gqa", "--rope-scaling", "llama3:original=16"),
    "mla": ("--kind", "mla", "--d-nope", "5", "--d-value", "3", "--d-rope", "4", "--rope", "interleaved"),
    "mla yarn": ("--kind", "mla", "--d-query-latent", "8", "--d-rope", "6", "--rope-scaling", "yarn:original=8,factor=4"),
}


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


@pytest.fixture
def run(mesh, comm, monkeypatch):
    """run(*options, sabotage, check): the step of launch.tp_attention, its comparisons by tensor, on every rank."""
    # Fewer entries one by one; the direction through all of them stays.
    monkeypatch.setattr(command, "BUDGET", 0.03)

    def run(*options, sabotage=None, check=True):
        args = tp_attention.options().parse_args([*SIZES, *options])
        sizes = tp_attention.check(args, comm.size)
        layer = command.build(args, sizes, mesh.tp)
        x, dy = command.inputs(sizes.tokens, args.d_model, args.dtype, args.seed)
        rope = command.rope(args, sizes)
        batch = Batch.of(sizes.lengths, rope, args.dtype)
        if sabotage:
            batch = replace(batch, rotation=sabotage(layer, batch.rotation) or batch.rotation)
        mesh.ledger.rows.clear()
        ran = step.run(layer, x, dy, mesh, Control(comm), batch)
        asked = command.reference_options(args, sizes.lengths)
        compared = lambda share: command.compared(asked, args.heads, ran.whole | {"x": x}, dy, share)  # noqa: E731
        return shared(comm, compared) if check else None, ran

    return run


@pytest.mark.parametrize(("case", "dtype"), every_other(CASES, ["float32", "float64"]))
def test_every_tensor_equals_the_reference_and_bytes_are_as_predicted(run, mesh, case, dtype):
    checks, ran = run(*CASES[case], "--dtype", dtype)
    assert not [c.worst for c in checks.values() if not c.ok]
    if dtype == "float64":
        assert max(c.relative_error for c in checks.values()) < 1e-12
        assert max(c.max_abs_error / c.tolerance for c in checks.values()) < 0.3
    assert agrees(ran.communication)
    assert not ran.wrong
    assert ran.memory["saved_bytes_per_rank"] == ran.memory["predicted_saved_bytes_per_rank"]
    assert ran.memory["weights_bytes_per_rank"] == ran.memory["predicted_weights_bytes_per_rank"]
    whole_sums = [(r["phase"], r["calls"]) for r in ran.communication if r["axis"] == "tp"]
    # What all ranks hold in common is owed one sum: norms of heads, and a key/value head that all of them read.
    owed = "normed" in case or (case == "mqa" and mesh.tp.size > 1) or ("gqa" in case and mesh.tp.size == 2)
    assert whole_sums == [("forward", 1), ("backward", 1 + owed)]


def test_gradients_of_replicated_heads_are_summed_by_those_who_hold_them(run, mesh):
    _, ran = run(*CASES["gqa"], check=False)
    # Beside the sum of dx: one key and one value head of width 6, for 27 inputs and a bias, in float32.
    sums = {r["axis"]: r["message_bytes"] for r in ran.communication if r["phase"] == "backward"}
    sums["tp"] -= 28 * 27 * 4
    owed = {2: ["tp"], 4: ["tp[1..2]", "tp[2..3]"]}.get(mesh.tp.size, [])
    assert {axis: size for axis, size in sums.items() if size} == dict.fromkeys(owed, (27 + 1) * 2 * 6 * 4)


@pytest.mark.parametrize(("kv_heads", "kind"), [("9", "mha"), ("1", "mqa")])
def test_grouped_query_attention_has_both_others_as_its_ends(run, kv_heads, kind):
    (_, grouped), (_, plain) = (
        run(*options, check=False) for options in (("--kind", "gqa", "--kv-heads", kv_heads), ("--kind", kind))
    )
    assert grouped.whole.keys() == plain.whole.keys()
    for name in plain.whole:
        np.testing.assert_array_equal(grouped.whole[name], plain.whole[name])


def test_grouped_queries_are_multi_head_attention_with_equal_keys_and_values(mesh):
    grouped = Attention(mesh.tp, drawn(1, "float64", 0.1), 10, 6, 3, 4, bias=True)
    whole = {p.name: p.whole(mesh, p.data) for p in grouped.parameters}
    repeated = {n: a if n in ("Wq", "bq", "Wo") else np.repeat(a, 2, axis=-2) for n, a in whole.items()}
    plain = Attention(mesh.tp, given(repeated), 10, 6, 6, 4, bias=True)
    x = np.random.default_rng(0).standard_normal((9, 10))
    np.testing.assert_allclose(grouped.forward(x, Batch([2, 7]))[0], plain.forward(x, Batch([2, 7]))[0], rtol=0, atol=1e-14)


def test_absorbed_latent_attention_is_the_expanded(mesh):
    for query_latent in (0, 7):
        layer = LatentAttention(mesh.tp, drawn(1, "float64"), 20, 5, 9, 6, 4, 3, query_latent)
        x = 2 * np.random.default_rng(0).standard_normal((40, 20))
        batch = Batch.of([13, 27], Rope(4, scaling=Yarn(original=8)), "float64")
        y, _ = layer.forward(x, batch)
        np.testing.assert_allclose(layer.forward_absorbed(x, batch), y, rtol=0, atol=1e-12)


def test_backward_adds_into_gradients_of_several_micro_batches(mesh):
    layer = Attention(mesh.tp, drawn(1, "float64", 0.1), 10, 6, 3, 4, bias=True, bias_out=True, qk_norm=1e-6)
    x, dy = np.random.default_rng(0).standard_normal((2, 9, 10))
    (_, first), (_, second) = layer.forward(x, Batch([9])), layer.forward(2 * x, Batch([4, 5]))
    once = []
    for saved in (first, second):
        layer.backward(dy, saved)
        once.append([p.grad.copy() for p in layer.parameters])
        for p in layer.parameters:
            p.zero_grad()
    for saved in (first, second):
        layer.backward(dy, saved)
    for p, a, b in zip(layer.parameters, *once, strict=True):
        np.testing.assert_array_equal(p.grad, a + b)


def test_what_cannot_be_is_refused(mesh):
    make = lambda *sizes: Attention(mesh.tp, drawn(0, "float32"), *sizes)  # noqa: E731
    with pytest.raises(ValueError, match="cannot share 4 key/value heads among 6 heads: use a divisor of 6"):
        make(12, 6, 4)
    with pytest.raises(ValueError, match="cannot cut a width of 12 into 5 heads: use a divisor of 12, or give d_head"):
        make(12, 5)
    if mesh.tp.size > 1:
        with pytest.raises(ValueError, match=f"cannot cut 1 heads over {mesh.tp.size} ranks: use at most 1 ranks"):
            make(12, 1)
    if mesh.tp.size < 4:
        layer, x = make(12, 3), np.zeros((5, 12), "float32")
        with pytest.raises(ValueError, match="sequence 1 has 0 tokens: use 1 or more"):
            layer.forward(x, Batch([3, 0, 2]))
        with pytest.raises(ValueError, match="sequences of 4 tokens together cannot be read from 5 tokens"):
            layer.forward(x, Batch([4]))


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 3, 11])
@pytest.mark.parametrize(("rows", "keys"), [(8, 16), (5, 7), (256, 512)])
def test_blocks_give_what_a_query_at_a_time_gives(monkeypatch, rows, keys, group, causal):
    """Also where the queries are the last of the keys, as with a cache, and where scores are huge."""
    monkeypatch.setattr(attend, "ROWS", rows)
    monkeypatch.setattr(attend, "KEYS", keys)
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(s) for s in ((40, 2, group, 4), (61, 2, 4), (61, 2, 3)))
    q[3] *= 300
    spans = [(slice(0, 1), slice(0, 1)), (slice(1, 12), slice(1, 23)), (slice(12, 40), slice(23, 61))]
    o, lse = np.empty((40, 2, group, 3)), np.empty((40, 2, group))
    attend.attend(q, k, v, o, lse, spans, 0.7, causal)
    for queries, keys_of in spans:
        before = (keys_of.stop - keys_of.start) - (queries.stop - queries.start)
        for j, g in np.ndindex(2, group):
            ahead = np.concatenate([np.zeros((before, 4)), q[queries, j, g]])
            want = reference.head(ahead, k[keys_of, j], v[keys_of, j], 0.7, causal)[before:]
            np.testing.assert_allclose(o[queries, j, g], want, rtol=0, atol=1e-13)


def test_memory_grows_with_the_tokens_not_with_their_square(comm):
    if comm.rank:
        return
    peaks = []
    for tokens in (2048, 4096):
        q, k, v, o, do, dq, dk, dv = np.zeros((8, tokens, 1, 4), "float32")
        lse = np.zeros((tokens, 1, 1), "float32")
        tracemalloc.start()
        attend.attend(q[:, :, None], k, v, o[:, :, None], lse, own_spans(whole([tokens]), True), 1.0)
        many = (do[:, :, None], q[:, :, None], k, v, o[:, :, None], lse, dq[:, :, None], dk, dv)
        attend.attend_backward(*many, own_spans(whole([tokens]), True), 1.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4096 * 4096
    assert peaks[1] - peaks[0] < 2048 * 200


# Sabotages: each spoils one thing that public implementations have got wrong, and must turn its check red.


def scale_by_the_model_width(layer, turn):
    layer.scale = 27**-0.5


def gradients_of_replicated_heads_not_summed(layer, turn):
    for p in layer.parameters:
        p.owed = ()


def latent_gradients_not_summed(layer, turn):
    layer.tp = Deaf(layer.tp)


def interleaved_for_half_split(layer, turn):
    turn.pairing = "interleaved"


def positions_off_by_one_sequence(layer, turn):
    return Rope(6).at(np.arange(28), turn.cos_TP.dtype)


def forgotten_eps(layer, turn):
    layer.qk_norm = 0.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("sabotage", "case", "red"),
    [
        (scale_by_the_model_width, ("--kind", "gqa"), {"y", "dWq", "dWk", "dWv", "dx"}),
        (interleaved_for_half_split, ("--kind", "mha"), {"y", "dWq", "dWk", "dWv", "dx"}),
        (positions_off_by_one_sequence, ("--kind", "mha"), set()),
        (forgotten_eps, ("--kind", "gqa", "--qk-norm"), {"y"}),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_sabotage_is_seen(run, sabotage, case, red, dtype):
    checks, _ = run(*case, "--dtype", dtype, sabotage=sabotage)
    wrong = {n for n, c in checks.items() if not c.ok}
    if sabotage is positions_off_by_one_sequence:
        # No sabotage: scores depend on differences of positions only, so that running on through the batch is the same.
        assert not wrong
    elif sabotage is forgotten_eps and dtype == "float32":
        # 1e-6 of the mean square is within float32's rounding of all that follows.
        assert not wrong
    else:
        assert red <= wrong


@pytest.mark.parametrize("late", [0, 2])
def test_a_mask_off_by_one_is_seen(run, monkeypatch, late):
    """Seeing one key too many, and not seeing one's own (but the first, which has no other)."""
    spoilt = lambda n, dtype: np.where(np.tri(n, k=late - 1, dtype=bool) | (np.arange(n) == 0), 0, -np.inf)[:, None]  # noqa: E731
    monkeypatch.setattr(attend, "_later", spoilt)
    checks, _ = run("--kind", "mha")
    assert {"y", "dWq", "dWk", "dWv", "dx"} <= {n for n, c in checks.items() if not c.ok}


def test_unsummed_gradients_of_replicated_heads_are_seen(run, mesh):
    checks, ran = run("--kind", "gqa", sabotage=gradients_of_replicated_heads_not_summed)
    # The grid of entries may miss the one head that is wrong; the direction through all of them cannot.
    wrong = {n.removesuffix(", all") for n, c in checks.items() if not c.ok}
    if mesh.tp.size in (1, 3):
        # 9 heads in threes: no rank shares a key/value head.
        assert not wrong
        assert agrees(ran.communication)
    else:
        assert {"dWk", "dWv", "dbv"} <= wrong
        assert set(ran.wrong) >= {"dWk", "dWv", "dbv"}


def test_unsummed_latent_gradients_are_seen(run, mesh):
    checks, ran = run("--kind", "mla", sabotage=latent_gradients_not_summed)
    wrong = {n for n, c in checks.items() if not c.ok}
    if mesh.tp.size == 1:
        assert not wrong
    else:
        assert {"dWdkv", "dWkr", "dwckv", "dx"} <= wrong
        assert not agrees(ran.communication)
