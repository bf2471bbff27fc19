"""The transformer, pre-norm: what is added to the residual stream is computed from its norm (arXiv 2002.04745).

T tokens   D model width   V vocabulary   v this rank's share of V over tp
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from layers.attend import Store
from layers.attention import Attention
from layers.embedding import LearnedPositions, TiedHead, VocabParallelEmbedding
from layers.latent_attention import LatentAttention
from layers.linear import ColumnParallelLinear
from layers.loss import VocabParallelCrossEntropy
from layers.mlp import MLP
from layers.moe import MoE
from layers.norm import LayerNorm, RMSNorm
from layers.rope import Rope, Rotation
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter, named


class Block:
    """h = x + attention(norm1(x)); y = h + mlp(norm2(h)). Four all-reduces, two forward and two backward.

    dh = dy + norm2'(mlp'(dy))
    dx = dh + norm1'(attention'(dh))

    The residual stream and the norms are whole on every rank. Saved for backward: what its four layers save.
    """

    def __init__(
        self, norm1: RMSNorm | LayerNorm, attention: Attention | LatentAttention, norm2: RMSNorm | LayerNorm, mlp: MLP | MoE
    ) -> None:
        self.norm1, self.attention, self.norm2, self.mlp = norm1, attention, norm2, mlp

    @property
    def parameters(self) -> list[Parameter]:
        return [p for layer in (self.norm1, self.attention, self.norm2, self.mlp) for p in layer.parameters]

    def forward(self, x_TD: np.ndarray, lengths: Sequence[int], rotation: Rotation | None = None) -> tuple[np.ndarray, tuple]:
        """x (T, D), sequences of `lengths` one after another, rotation of their positions -> y (T, D), saved."""
        n_TD, saved_norm1 = self.norm1.forward(x_TD)
        a_TD, saved_attention = self.attention.forward(n_TD, lengths, rotation)
        h_TD = x_TD + a_TD
        n_TD, saved_norm2 = self.norm2.forward(h_TD)
        m_TD, saved_mlp = self.mlp.forward(n_TD)
        y_TD = h_TD + m_TD
        return y_TD, (saved_norm1, saved_attention, saved_norm2, saved_mlp)

    def backward(self, dy_TD: np.ndarray, saved: tuple) -> np.ndarray:
        """dy (T, D), saved -> dx (T, D). Adds into the gradients."""
        saved_norm1, saved_attention, saved_norm2, saved_mlp = saved
        dn_TD = self.mlp.backward(dy_TD, saved_mlp)
        dh_TD = dy_TD + self.norm2.backward(dn_TD, saved_norm2)
        dn_TD = self.attention.backward(dh_TD, saved_attention)
        dx_TD = dh_TD + self.norm1.backward(dn_TD, saved_norm1)
        return dx_TD

    def cached(self, x_TD: np.ndarray, rotation: Rotation | None, store: Store, striped: bool = False) -> np.ndarray:
        """x (T, D), new tokens of sequences whose earlier ones `store` keeps -> y (T, D)."""
        attention = self.attention.cached_striped if striped else self.attention.cached
        h_TD = x_TD + attention(self.norm1.forward(x_TD)[0], rotation, store)
        return h_TD + self.mlp.apply(self.norm2.forward(h_TD)[0])

    def traffic(self, tokens: int) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send."""
        return [*self.attention.traffic(tokens), *self.mlp.traffic(tokens)]

    def saved_bytes(self, tokens: int) -> int:
        """What this rank keeps from forward to backward."""
        return sum(layer.saved_bytes(tokens) for layer in (self.norm1, self.attention, self.norm2, self.mlp))


def forward_only(traffic: Iterable[Traffic], phase: str) -> list[Traffic]:
    """What of it is sent where there is no backward, in a phase of its own."""
    return [replace(t, phase=phase) for t in traffic if t.phase == "forward"]


class Recomputed:
    """A block that keeps only its input and computes the rest again in backward (arXiv 1604.06174): the same gradients to the
    bit, for one more forward, whose collectives are then sent in the backward phase too."""

    def __init__(self, block: Block) -> None:
        self.block = block

    @property
    def parameters(self) -> list[Parameter]:
        return self.block.parameters

    @property
    def attention(self) -> Attention | LatentAttention:
        return self.block.attention

    def forward(self, x_TD: np.ndarray, lengths: Sequence[int], rotation: Rotation | None = None) -> tuple[np.ndarray, tuple]:
        y_TD, _ = self.block.forward(x_TD, lengths, rotation)
        return y_TD, (x_TD, lengths, rotation)

    def backward(self, dy_TD: np.ndarray, saved: tuple) -> np.ndarray:
        _, again = self.block.forward(*saved)
        return self.block.backward(dy_TD, again)

    def traffic(self, tokens: int) -> list[Traffic]:
        sent = self.block.traffic(tokens)
        return [*sent, *(replace(t, phase="backward") for t in sent if t.phase == "forward")]

    def saved_bytes(self, tokens: int) -> int:
        width, itemsize = len(self.block.norm1.w_D.data), self.block.norm1.w_D.data.itemsize
        return message((tokens, width), itemsize)


class Transformer:
    """logits = head(norm(blocks(embedding(ids) + positions))): a whole language model, its vocabulary cut over tp.

        x_TD      = embedding(ids_T) (+ Wpe[positions])
        x_TD      = block(x_TD), one after another
        logits_Tv = norm(x_TD) @ head

    `rope` rotates queries and keys by the positions 0, 1, ... of each sequence; `positions` adds a learned row to each token.
    Names of parameters are led by their block: blocks.0.Wq. Saved for backward: what the parts save.
    """

    def __init__(
        self,
        embedding: VocabParallelEmbedding,
        blocks: Sequence[Block | Recomputed],
        norm: RMSNorm | LayerNorm,
        head: TiedHead | ColumnParallelLinear,
        rope: Rope | None = None,
        positions: LearnedPositions | None = None,
    ) -> None:
        self.embedding, self.positions, self.blocks, self.norm, self.head = embedding, positions, list(blocks), norm, head
        self.rope = rope
        self.loss = VocabParallelCrossEntropy(embedding.tp, embedding.cut)
        for i, block in enumerate(self.blocks):
            named(f"blocks.{i}.", block.parameters)

    @property
    def parameters(self) -> list[Parameter]:
        """In the order of forward."""
        blocks = [p for block in self.blocks for p in block.parameters]
        return [*self._first, *blocks, *self.norm.parameters, *self.head.parameters]

    @property
    def _first(self) -> list[Parameter]:
        return [*self.embedding.parameters, *([] if self.positions is None else self.positions.parameters)]

    def forward(self, ids_T: np.ndarray, lengths: Sequence[int]) -> tuple[np.ndarray, tuple]:
        """ids (T,) of sequences of `lengths`, one after another -> logits (T, v), this rank's columns, saved."""
        positions_T = np.concatenate([np.arange(n) for n in lengths])
        x_TD, saved_embedding = self.embedding.forward(ids_T)
        if self.positions is not None:
            x_TD, positions_T = self.positions.forward(x_TD, positions_T)
        rotation = None if self.rope is None else self.rope.at(positions_T, x_TD.dtype)
        saved_blocks = []
        for block in self.blocks:
            x_TD, saved = block.forward(x_TD, lengths, rotation)
            saved_blocks.append(saved)
        h_TD, saved_norm = self.norm.forward(x_TD)
        logits_Tv, saved_head = self.head.forward(h_TD)
        return logits_Tv, ((saved_embedding, positions_T), tuple(saved_blocks), saved_norm, saved_head)

    def cached(
        self, ids_T: np.ndarray, positions_T: np.ndarray, stores: Sequence[Store], rows: np.ndarray, striped: bool = False
    ) -> np.ndarray:
        """ids (T,) of new tokens at `positions` of their sequences -> logits (len(rows), v) of those `rows` of them.

        `stores`: a cache's side of each block; of fewer blocks, only these are run.
        """
        x_TD, _ = self.embedding.forward(ids_T)
        if self.positions is not None:
            x_TD, _ = self.positions.forward(x_TD, positions_T)
        rotation = None if self.rope is None else self.rope.at(positions_T, x_TD.dtype)
        for block, store in zip(self.blocks, stores, strict=False):
            x_TD = block.cached(x_TD, rotation, store, striped)
        return self.head.apply(self.norm.forward(x_TD[rows])[0])

    def backward(
        self, dlogits_Tv: np.ndarray, saved: tuple, filled: Callable[[list[Parameter]], None] = lambda parameters: None
    ) -> None:
        """dlogits (T, v), saved. Adds into the gradients. `filled` is told of parameters whose gradients are complete."""
        (saved_embedding, positions_T), saved_blocks, saved_norm, saved_head = saved
        dh_TD = self.head.backward(dlogits_Tv, saved_head)
        filled(list(self.head.parameters))
        dx_TD = self.norm.backward(dh_TD, saved_norm)
        filled(self.norm.parameters)
        for block, saved_block in zip(reversed(self.blocks), reversed(saved_blocks), strict=True):
            dx_TD = block.backward(dx_TD, saved_block)
            filled(block.parameters)
        if self.positions is not None:
            dx_TD = self.positions.backward(dx_TD, positions_T)
        self.embedding.backward(dx_TD, saved_embedding)
        filled(self._first)

    @property
    def filling_order(self) -> list[Parameter]:
        """The parameters in the order in which backward completes their gradients."""
        blocks = [p for block in reversed(self.blocks) for p in block.parameters]
        return [*self.head.parameters, *self.norm.parameters, *blocks, *self._first]

    def traffic_of_logits(self, tokens: int) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send, without a loss."""
        return [t for part in (self.embedding, *self.blocks, self.head) for t in part.traffic(tokens)]

    def traffic(self, tokens: int) -> list[Traffic]:
        """What forward, loss and backward of `tokens` tokens send."""
        return [*self.traffic_of_logits(tokens), *self.loss.traffic(tokens, self.embedding.table_vD.data.itemsize)]

    def flops(self, sequence_length: int) -> float:
        """Operations a token of forward and backward, as model-FLOPs utilisation counts them (arXiv 2204.02311, appendix B):
        6 for each weight that multiplies, and 6 H (E + V) for each key that a causal query sees on average. Nothing for
        what is computed again."""
        table = 0 if isinstance(self.head, TiedHead) else prod(self.embedding.table_vD.layout.shape)
        matrices = sum(prod(p.layout.shape) for p in self.parameters if p.decays) - table
        matrices -= 0 if self.positions is None else prod(self.positions.table_PD.layout.shape)
        keys = (sequence_length + 1) / 2
        return 6.0 * matrices + sum(6 * block.attention.score_width * keys for block in self.blocks)

    def saved_bytes(self, tokens: int) -> int:
        """What this rank keeps from forward to backward, the loss included; the batch's ids and positions are not counted."""
        parts = (*self.blocks, self.norm, self.head)
        return sum(part.saved_bytes(tokens) for part in parts) + self.loss.saved_bytes(
            tokens, self.embedding.table_vD.data.itemsize
        )
