"""What a model is made of. Nothing here is about parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from layers.rope import Rope


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention, as `LatentAttention` names them. `eps` belongs to the norms of its latents."""

    d_latent: int
    d_nope: int
    d_rope: int
    d_value: int
    d_query_latent: int = 0
    eps: float = 1e-6


@dataclass(frozen=True)
class Experts:
    """Routed MLPs, in the blocks from `first` on; the blocks before have dense ones.

    `active` of `count` experts of hidden width `d_ff` serve a token. One more expert, of width `d_shared` (0: none), serves
    all tokens. `scoring`: "softmax" or "sigmoid". `normed`: the chosen scores are divided by their sum. `scale` multiplies
    them. A token's experts come from the `active_groups` best of `groups` groups; a group is worth the sum of its `group_top`
    best scores. `correction`: a bias of the scores helps to choose, but does not weigh (DeepSeek-V3).
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

    `norm`: "rms" or "layer". `d_head`: E; without it, d_model / heads. `bias`, `bias_out`, `bias_mlp`: whether queries, keys
    and values, attention's output, and the MLP have biases. `qk_norm`: an RMS norm of each head's queries and keys.
    `context`: the most tokens of a sequence. With `latent`, attention is latent and kv_heads is heads. `windows`: of each
    layer, how many tokens a query sees at most, itself among them, or 0 for all; () for all in all layers. `unrotated`: layers
    that rotate nothing.
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
    windows: tuple[int, ...] = ()
    unrotated: tuple[int, ...] = ()

    @property
    def window(self) -> int:
        """How many tokens any layer sees at most, or 0 where one sees all."""
        return max(self.windows) if self.windows and all(self.windows) else 0


def cache_entries(config: Config) -> int:
    """How many entries a cache of the whole model keeps of a token. A layer has keys and values of all key/value heads, or one
    latent and one rotated key."""
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
