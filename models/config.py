"""What a model is made of, and the model built from it. Nothing here is about parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import sqrt

import numpy as np

from layers.attention import Attention
from layers.embedding import LearnedPositions, TiedHead, VocabParallelEmbedding, untied_head
from layers.latent_attention import LatentAttention
from layers.mlp import MLP
from layers.moe import MoE
from layers.norm import LayerNorm, RMSNorm
from layers.rope import Rope
from layers.transformer import Block, Recomputed, Transformer
from parallel.mesh import Axis
from parallel.parameter import Weights, within
from parallel.shard import Layout


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention, as `LatentAttention` names them. `eps`: of the latents' norms."""

    d_latent: int
    d_nope: int
    d_rope: int
    d_value: int
    d_query_latent: int = 0
    eps: float = 1e-6


@dataclass(frozen=True)
class Experts:
    """Routed MLPs, in the blocks from `first` on; the ones before are dense.

    `active` of `count` experts of hidden width `d_ff` serve a token, and `d_shared` (0: none) is the width of one that serves
    all. `scoring`: "softmax" or "sigmoid"; `normed`: the chosen scores are divided by their sum; `scale` multiplies them.
    `groups`, `active_groups`, `group_top`: experts are first limited to the best groups, a group's worth being the sum of its
    `group_top` best scores. `correction`: scores have a bias that chooses but does not weigh (DeepSeek-V3).
    """

    count: int
    active: int
    d_ff: int
    d_shared: int = 0
    first: int = 0
    scoring: str = "softmax"
    normed: bool = True
    scale: float = 1.0
    groups: int = 1
    active_groups: int = 1
    group_top: int = 1
    correction: bool = False


@dataclass(frozen=True)
class Config:
    """A decoder-only transformer. `positions`: rows of a learned table, or 0; `rope`: what rotates queries and keys, or None.

    `norm`: "rms" or "layer". `d_head`: E, d_model / heads unless given. `bias`, `bias_out`, `bias_mlp`: of queries, keys and
    values, of attention's output, of the MLP. `qk_norm`: RMS norm of each head's queries and keys. `context`: the most tokens
    of a sequence. With `latent`, attention is latent and kv_heads is heads.
    """

    vocabulary: int
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    d_ff: int
    context: int
    d_head: int | None = None
    activation: str = "swiglu"
    norm: str = "rms"
    eps: float = 1e-5
    bias: bool = False
    bias_out: bool = False
    bias_mlp: bool = False
    qk_norm: bool = False
    tied: bool = False
    positions: int = 0
    rope: Rope | None = None
    latent: Latent | None = None
    experts: Experts | None = None


def cache_entries(config: Config) -> int:
    """What a cache keeps of a token of the whole model, in entries: in each layer keys and values of all key/value heads, or
    one latent and one rotated key."""
    c = config
    if c.latent is not None:
        return c.layers * (c.latent.d_latent + c.latent.d_rope)
    return c.layers * 2 * c.kv_heads * (c.d_head or c.d_model // c.heads)


def gpt2_like(vocabulary: int, d_model: int, layers: int, heads: int, d_ff: int, context: int, tied: bool = True) -> Config:
    """Layer norms, biases, tanh GELU, learned positions (Radford et al., 2019)."""
    biases = {"bias": True, "bias_out": True, "bias_mlp": True}
    sizes = (vocabulary, d_model, layers, heads, heads, d_ff, context)
    return Config(*sizes, activation="gelu", norm="layer", **biases, tied=tied, positions=context)


def llama_like(
    vocabulary: int, d_model: int, layers: int, heads: int, kv_heads: int, d_ff: int, context: int, tied: bool = False
) -> Config:
    """RMS norms, no biases, SwiGLU, rotary positions (Touvron et al., arXiv 2302.13971)."""
    rope = Rope(d_model // heads)
    return Config(vocabulary, d_model, layers, heads, kv_heads, d_ff, context, tied=tied, rope=rope)


def _residual(weights: Weights, layers: int) -> Weights:
    """What is added to the residual stream starts smaller, as there are 2 `layers` of it (GPT-2)."""

    def scaled(name: str, layout: Layout, rank: int, mean: float, std: float) -> np.ndarray:
        last = name.rpartition(".")[2]
        return weights(name, layout, rank, mean, std / sqrt(2 * layers) if last in ("Wo", "W2") else std)

    return scaled


def _attention(c: Config, tp: Axis, weights: Weights) -> Attention | LatentAttention:
    correction = 1.0 if c.rope is None else c.rope.softmax_factor
    if c.latent is not None:
        m = c.latent
        sizes = (m.d_latent, m.d_nope, m.d_rope, m.d_value, m.d_query_latent)
        scale = (m.d_nope + m.d_rope) ** -0.5 * correction
        return LatentAttention(tp, weights, c.d_model, c.heads, *sizes, eps=m.eps, scale=scale)
    norm = c.eps if c.qk_norm else None
    scale = (c.d_head or c.d_model // c.heads) ** -0.5 * correction
    biases = {"bias": c.bias, "bias_out": c.bias_out}
    return Attention(tp, weights, c.d_model, c.heads, c.kv_heads, c.d_head, **biases, qk_norm=norm, scale=scale)


def _mlp(c: Config, tp: Axis, weights: Weights, layer: int) -> MLP | MoE:
    if c.experts is None or layer < c.experts.first:
        return MLP(tp, weights, c.d_model, c.d_ff, c.activation, c.bias_mlp)
    e = c.experts
    routing = {"scoring": e.scoring, "normed": e.normed, "scale": e.scale, "correction": e.correction}
    groups = {"groups": e.groups, "active_groups": e.active_groups, "group_top": e.group_top}
    return MoE(tp, weights, c.d_model, e.d_ff, e.count, e.active, d_shared=e.d_shared, **routing, **groups)


def build(config: Config, tp: Axis, weights: Weights, recompute: bool = False) -> Transformer:
    """The model on `tp`, its weights from `weights`. `recompute`: blocks keep their input only.

    Raises ValueError for sizes that cannot be cut over tp, naming both numbers.
    """
    c = config
    norm = partial(RMSNorm if c.norm == "rms" else LayerNorm, eps=c.eps)
    embedding = VocabParallelEmbedding(tp, weights, c.vocabulary, c.d_model)
    blocks: list[Block | Recomputed] = []
    for i in range(c.layers):
        own = within(f"blocks.{i}.", _residual(weights, c.layers))
        inner = norm(own, "n1", c.d_model), _attention(c, tp, own), norm(own, "n2", c.d_model), _mlp(c, tp, own, i)
        blocks.append(Recomputed(Block(*inner)) if recompute else Block(*inner))
    head = TiedHead(embedding) if c.tied else untied_head(tp, weights, c.d_model, c.vocabulary)
    positions = LearnedPositions(weights, c.positions, c.d_model) if c.positions else None
    return Transformer(embedding, blocks, norm(weights, "nf", c.d_model), head, c.rope, positions)
