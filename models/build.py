"""The model that a configuration describes, built on the ranks of an axis."""

from __future__ import annotations

from dataclasses import dataclass, field

from layers.alike import AlikeMoE
from layers.attention import Attention
from layers.block import Block, Recomputed
from layers.context import Local
from layers.embedding import LearnedPositions, TiedHead, UntiedHead, VocabParallelEmbedding
from layers.latent_attention import LatentAttention
from layers.mlp import MLP
from layers.moe import MoE
from layers.norm import LayerNorm, RMSNorm
from layers.stage import Beginning, End
from layers.transformer import Transformer
from models.config import Config
from parallel.axis import Axis
from parallel.parameter import Weights


@dataclass(frozen=True)
class Parts:
    """Makes the parts of a model on `tp`, each from the weights that it is given. `recompute`: blocks keep their input only.
    `cuts_rows`: sequence parallelism. `context`: how tokens that are cut over cp meet. `ep`: the axis whose ranks share routed
    experts out; without it none do. `alike`: its ranks all have the same tokens, and there is no backward.

    Raises ValueError for sizes that cannot be cut over tp, naming both numbers.
    """

    config: Config
    tp: Axis
    recompute: bool = False
    cuts_rows: bool = False
    context: Local = field(default_factory=Local)
    ep: Axis | None = None
    alike: bool = False

    @property
    def _owed(self) -> tuple[str, ...]:
        return (self.tp.name,) if self.cuts_rows else ()

    def embedding(self, weights: Weights) -> VocabParallelEmbedding:
        return VocabParallelEmbedding(self.tp, weights, self.config.vocabulary, self.config.d_model)

    def positions(self, weights: Weights) -> LearnedPositions | None:
        c = self.config
        return LearnedPositions(weights, c.positions, c.d_model, self._owed) if c.positions else None

    def block(self, weights: Weights, i: int) -> Block | Recomputed:
        """The block number `i` of the whole model."""
        # Each block adds twice to the residual stream.
        own = weights.within(f"blocks.{i}.", summed=2 * self.config.layers)
        block = Block(self._norm(own, "n1"), self._attention(own, i), self._norm(own, "n2"), self._mlp(own, i))
        return Recomputed(block) if self.recompute else block

    def end(self, weights: Weights, head: TiedHead | UntiedHead) -> End:
        return End(self._norm(weights, "nf"), head)

    def untied_head(self, weights: Weights) -> UntiedHead:
        return UntiedHead(self.tp, weights, self.config.d_model, self.config.vocabulary)

    def _norm(self, weights: Weights, name: str) -> RMSNorm | LayerNorm:
        kind = RMSNorm if self.config.norm == "rms" else LayerNorm
        return kind(weights, name, self.config.d_model, self.config.eps, self._owed)

    def _attention(self, weights: Weights, i: int) -> Attention | LatentAttention:
        c, tp, more = self.config, self.tp, {"cuts_rows": self.cuts_rows, "context": self.context}
        correction = 1.0 if c.rope is None else c.rope.softmax_factor
        if c.latent is not None:
            m = c.latent
            sizes = (m.d_latent, m.d_nope, m.d_rope, m.d_value, m.d_query_latent)
            scale = (m.d_nope + m.d_rope) ** -0.5 * correction
            return LatentAttention(tp, weights, c.d_model, c.heads, *sizes, eps=m.eps, scale=scale, **more)
        norm = c.eps if c.qk_norm else None
        scale = (c.d_head or c.d_model // c.heads) ** -0.5 * correction
        more |= {"bias": c.bias, "bias_out": c.bias_out, "qk_norm": norm, "scale": scale}
        more |= {"window": c.windows[i] if c.windows else 0, "rotates": i not in c.unrotated}
        return Attention(tp, weights, c.d_model, c.heads, c.kv_heads, c.d_head, **more)

    def _mlp(self, weights: Weights, i: int) -> MLP | MoE:
        c, tp = self.config, self.tp
        if c.experts is None or i < c.experts.first:
            return MLP(tp, weights, c.d_model, c.d_ff, c.activation, c.bias_mlp, cuts_rows=self.cuts_rows)
        e = c.experts
        routing = {"scoring": e.scoring, "normed": e.normed, "scale": e.scale, "correction": e.correction}
        groups = {"groups": e.groups, "active_groups": e.active_groups, "group_top": e.group_top}
        more = {"d_shared": e.d_shared, "cuts_rows": self.cuts_rows, "ep": self.ep, "cp": self.context.cp}
        kind = AlikeMoE if self.alike else MoE
        return kind(tp, weights, c.d_model, e.d_ff, e.count, e.active, **more, **routing, **groups)


def build(
    config: Config,
    tp: Axis,
    weights: Weights,
    recompute: bool = False,
    cuts_rows: bool = False,
    ep: Axis | None = None,
    alike: bool = False,
) -> Transformer:
    """The whole model on `tp`, its experts over `ep`; else as Parts."""
    parts = Parts(config, tp, recompute, cuts_rows, ep=ep, alike=alike)
    embedding = parts.embedding(weights)
    blocks = [parts.block(weights, i) for i in range(config.layers)]
    head = TiedHead(embedding) if config.tied else parts.untied_head(weights)
    beginning = Beginning(embedding, parts.positions(weights))
    return Transformer(beginning, blocks, parts.end(weights, head), config.rope, cuts_rows)
