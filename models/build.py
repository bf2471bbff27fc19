"""The model that a configuration describes, built on the ranks of an axis."""

from __future__ import annotations

from functools import partial

from layers.attention import Attention
from layers.block import Block, Recomputed
from layers.embedding import LearnedPositions, TiedHead, UntiedHead, VocabParallelEmbedding
from layers.latent_attention import LatentAttention
from layers.mlp import MLP
from layers.moe import MoE
from layers.norm import LayerNorm, RMSNorm
from layers.transformer import Transformer
from models.config import Config
from parallel.axis import Axis
from parallel.parameter import Weights


def _attention(c: Config, tp: Axis, weights: Weights, cuts_rows: bool) -> Attention | LatentAttention:
    correction = 1.0 if c.rope is None else c.rope.softmax_factor
    if c.latent is not None:
        m = c.latent
        sizes = (m.d_latent, m.d_nope, m.d_rope, m.d_value, m.d_query_latent)
        scale = (m.d_nope + m.d_rope) ** -0.5 * correction
        return LatentAttention(tp, weights, c.d_model, c.heads, *sizes, eps=m.eps, scale=scale, cuts_rows=cuts_rows)
    norm = c.eps if c.qk_norm else None
    scale = (c.d_head or c.d_model // c.heads) ** -0.5 * correction
    more = {"bias": c.bias, "bias_out": c.bias_out, "qk_norm": norm, "scale": scale, "cuts_rows": cuts_rows}
    return Attention(tp, weights, c.d_model, c.heads, c.kv_heads, c.d_head, **more)


def _mlp(c: Config, tp: Axis, weights: Weights, layer: int, cuts_rows: bool) -> MLP | MoE:
    if c.experts is None or layer < c.experts.first:
        return MLP(tp, weights, c.d_model, c.d_ff, c.activation, c.bias_mlp, cuts_rows=cuts_rows)
    e = c.experts
    routing = {"scoring": e.scoring, "normed": e.normed, "scale": e.scale, "correction": e.correction}
    groups = {"groups": e.groups, "active_groups": e.active_groups, "group_top": e.group_top}
    more = {"d_shared": e.d_shared, "cuts_rows": cuts_rows}
    return MoE(tp, weights, c.d_model, e.d_ff, e.count, e.active, **more, **routing, **groups)


def build(config: Config, tp: Axis, weights: Weights, recompute: bool = False, cuts_rows: bool = False) -> Transformer:
    """The model on `tp`, its weights from `weights`. `recompute`: blocks keep their input only. `cuts_rows`: sequence
    parallelism.

    Raises ValueError for sizes that cannot be cut over tp, naming both numbers.
    """
    c = config
    owed = (tp.name,) if cuts_rows else ()
    norm = partial(RMSNorm if c.norm == "rms" else LayerNorm, eps=c.eps, owed=owed)
    embedding = VocabParallelEmbedding(tp, weights, c.vocabulary, c.d_model)
    blocks: list[Block | Recomputed] = []
    for i in range(c.layers):
        # Each block adds twice to the residual stream.
        own = weights.within(f"blocks.{i}.", summed=2 * c.layers)
        attention, mlp = _attention(c, tp, own, cuts_rows), _mlp(c, tp, own, i, cuts_rows)
        inner = norm(own, "n1", c.d_model), attention, norm(own, "n2", c.d_model), mlp
        blocks.append(Recomputed(Block(*inner)) if recompute else Block(*inner))
    head = TiedHead(embedding) if c.tied else UntiedHead(tp, weights, c.d_model, c.vocabulary)
    positions = LearnedPositions(weights, c.positions, c.d_model, owed) if c.positions else None
    return Transformer(embedding, blocks, norm(weights, "nf", c.d_model), head, c.rope, positions, cuts_rows)
