"""What Megatron or FSDP keep on a rank of pp, by kind, at the peak of a step: the formulas of papers.

Weights, gradients and AdamW's state: 1910.02054, Megatron's distributed optimizer. Saved of a block: 2205.05198, table 2, and
the same counting of tensors for SwiGLU, grouped heads and flash attention. In flight: `parallel/schedule` 's own closed forms
(2104.04473, 2401.10241). Bytes of one rank of tp; the vocabulary is padded to a multiple of 128 tp, as Megatron does.

S sequence   b sequences of a micro-batch   T = S b / cp   D width   F hidden width   t = tp, o = t under SP, else 1
"""

from __future__ import annotations

from functools import lru_cache

from parallel.schedules import plan as planned
from plan.sizes import Sizes
from plan.strategy import DTYPES, GRAD_DTYPES, Strategy, V, blocks_by_stage, kinds_of, ranks_of

# Master weights and AdamW's two moments in float32.
OPTIMIZER = 12
# What a library's context and communication keep.
COMMUNICATION = 2**30
# Of a GPU's memory, what a plan may use: allocators fragment by 2 to 8 %.
USABLE = 0.94


def padded(s: Strategy) -> int:
    """Entries of the vocabulary as Megatron holds them."""
    return -(-s.config.vocabulary // (128 * s.tp)) * 128 * s.tp


def held(s: Strategy, rank: int) -> tuple[float, float]:
    """Entries of one rank of tp on this rank of pp: those that all data ranks share, and those of its experts."""
    return _held(s.sizes, padded(s) * s.config.d_model, s.pp, s.chunks, s.schedule in V, s.stage_layers, s.tp, s.ep, rank)


@lru_cache(4096)
def _held(
    size: Sizes, table: int, pp: int, chunks: int, v: bool, by_hand: tuple | None, tp: int, ep: int, rank: int
) -> tuple[float, float]:
    """`table`: entries of the padded vocabulary's."""
    dense = experts = 0.0
    stages, ranks, blocks_of = pp * chunks, ranks_of(pp, chunks, v), blocks_by_stage(size.layers, pp * chunks, by_hand)
    for stage in (n for n, on in enumerate(ranks) if on == rank):
        blocks = blocks_of[stage]
        few = len(range(blocks.start, min(blocks.stop, size.first)))
        for part, n in ((size.dense, few), (size.routed, len(blocks) - few)):
            dense += n * (part.weights - part.experts) / tp
            experts += n * part.experts / (tp * ep)
        if stage == 0:
            dense += table / tp + size.positions.weights
        if stage == stages - 1:
            # A tied table is there once where both ends are on one rank.
            dense += size.norm.weights + table / tp * (size.held or ranks[0] != rank)
    return dense, experts


def bytes_a_parameter(s: Strategy) -> tuple[float, float, float]:
    """Of weights, gradients and optimizer, of an entry that all data ranks share (1910.02054: 2 + 2 + 12, and parts of it)."""
    b, g, n = DTYPES[s.dtype], GRAD_DTYPES[s.grad_dtype], s.shards
    # Float32 weights are their own masters.
    state = OPTIMIZER if b == 2 else OPTIMIZER - 4
    return b / (n if s.zero == 3 else 1), g / (n if s.zero >= 2 else 1), state / (n if s.zero >= 1 else 1)


def saved_of_block(s: Strategy, routed: bool = False, again: bool = False) -> float:
    """Bytes that one block keeps of one micro-batch (2205.05198, table 2; Llama's by the same counting)."""
    c, t, S = s.config, s.tp, s.sequence_length
    o, T, D = (t if s.sequence_parallel else 1), s.tokens, c.d_model
    wide = DTYPES[s.dtype] / 2
    if again:
        return wide * 2 * T * D / o
    heads = c.heads / t
    quadratic = 5 * s.micro_batch * S * S / s.cp * heads if s.attention == "unfused" and s.recompute != "selective" else 0.0
    E = c.d_head or D / c.heads
    if c.latent is not None:
        m = c.latent
        entries = c.heads * (2 * m.d_nope + 2 * m.d_rope + 2 * m.d_value) / t + m.d_latent + m.d_rope + m.d_query_latent
        attention = 2 * T * entries
    else:
        attention = 2 * T * E * (2 * c.heads + 2 * max(c.kv_heads, t)) / t
    hidden = c.d_ff
    if routed:
        hidden = c.experts.active * c.experts.d_ff + c.experts.d_shared
    # GELU keeps what it was given, SwiGLU both halves; the product after it its result. Where SwiGLU is two kernels, the second
    # keeps what the first has made, too.
    mlp = (4 if c.activation != "swiglu" else 6 if s.fused else 8) * T * hidden / t
    if routed:
        mlp += 4 * T * D * c.experts.active / o
    # The inputs of two norms and of two products, 8; with masks of dropout, a byte each, 10.
    outside = 10 if c.norm == "layer" else 8
    return wide * (outside * T * D / o + attention + mlp + quadratic)


def logits(s: Strategy) -> float:
    """Bytes beside the head, of one micro-batch: logits, their float32, and its gradient."""
    return s.tokens * padded(s) / s.tp * (2 + 4 + 4)


def in_flight(schedule: str, p: int, m: int, chunks: int, rank: int) -> int:
    """The most chunks in flight on a rank until W, in closed form where that holds, else by the plan."""
    r = rank
    if schedule == "gpipe":
        return m
    if schedule == "1f1b":
        return min(m, p - r)
    if schedule == "interleaved" and m % p == 0:
        return min(m * chunks, 2 * (p - 1 - r) + (chunks - 1) * p + 1)
    if m >= 2 * p + 1 and schedule in (closed := {"zb-h1": p, "zb-h2": 2 * p - 1, "zb-v": 2 * p, "dualpipe-v": 2 * p + 1}):
        return closed[schedule]
    return _peaks(schedule, p, min(m, 3 * p + m % p), chunks)[r]


@lru_cache(1024)
def _peaks(schedule: str, p: int, m: int, chunks: int) -> list[int]:
    return planned(schedule, p, m, chunks).peaks("W")


def by_kind(s: Strategy, rank: int) -> dict[str, float]:
    """Bytes of this rank of pp, by kind (`plan.account.KINDS`)."""
    dense, experts = held(s, rank)
    w, g, state = bytes_a_parameter(s)
    b, full = DTYPES[s.dtype], GRAD_DTYPES[s.grad_dtype]
    shards = s.shards if s.zero else 1
    own = max(1, shards // s.ep)
    each = [(dense, 1.0), (experts, shards / own)]
    found = {
        "weights": sum(n * w * (f if s.zero == 3 else 1) for n, f in each),
        "gradients": sum(n * g * (f if s.zero >= 2 else 1) for n, f in each),
        "optimizer": sum(n * state * (f if s.zero >= 1 else 1) for n, f in each),
    }
    found["saved"], working, largest = _activations(s, rank)
    largest = largest if s.zero >= 2 else 0.0
    found["gathered"] = 2 * largest * (b + full) if s.zero == 3 else largest * full if s.zero >= 2 else 0.0
    last = s.rank_of[-1] == rank
    found["logits"] = logits(s) if last else 0.0
    found["working"] = working if s.recompute == "full" or s.recomputed_every else 0.0
    found["communication"] = float(COMMUNICATION)
    return {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0, "saved": 0.0, "later": 0.0, "unsummed": 0.0} | found


def _activations(s: Strategy, rank: int) -> tuple[float, float, float]:
    """Bytes of what is saved at the peak, and of the largest block while it is computed again; entries of the largest block.
    Kept with the layout: those that differ from it in ZeRO alone have the same."""
    key = rank, s.recompute, s.stage_layers, s.sequence_parallel, s.attention, s.fused, s.dtype
    if (known := s.family.get(key)) is None:
        stages, blocks = s.stages_of(rank), s.blocks
        # Many stages of a rank are alike.
        alike = {blocks[n]: kinds_of(blocks[n], s.sizes.first, s.recomputed_every) for n in stages}
        each = {kinds: (_kept(s, kinds), _plain(s, kinds), _unit(s, kinds)) for kinds in set(alike.values())}
        flight = in_flight(s.schedule, s.pp, s.micro_batches, s.chunks, rank)
        saved = flight * sum(each[alike[blocks[n]]][0] for n in stages) / len(stages)
        known = s.family[key] = saved, *(max(of[n] for of in each.values()) for n in (1, 2))
    return known


def _kept(s: Strategy, kinds: tuple) -> float:
    half = 0.5 if s.recompute == "half" else 1.0
    return half * sum(n * saved_of_block(s, routed, again) for routed, again, n in kinds)


def _plain(s: Strategy, kinds: tuple) -> float:
    """The most that a block holds while it is computed again."""
    return max((saved_of_block(s, routed) for routed, *_ in kinds), default=0.0)


def _unit(s: Strategy, kinds: tuple) -> float:
    """Entries of the largest block of one rank of tp."""
    of = {False: s.sizes.dense, True: s.sizes.routed}
    return max((of[routed].on_rank(s.tp, s.ep) for routed, *_ in kinds), default=0.0)
