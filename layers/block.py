"""A block of the transformer, pre-norm: what is added to the residual stream is computed from its norm (arXiv 2002.04745).

T tokens   D model width
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from layers.attention import Attention
from layers.latent_attention import LatentAttention
from layers.mlp import MLP
from layers.moe import MoE
from layers.norm import LayerNorm, RMSNorm
from layers.rope import Rotation
from layers.store import Store
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter


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

    def cached(self, x_TD: np.ndarray, rotation: Rotation | None, store: Store) -> np.ndarray:
        """x (T, D), new tokens of sequences whose earlier ones `store` keeps -> y (T, D)."""
        h_TD = x_TD + store.attended(self.attention, self.norm1.forward(x_TD)[0], rotation)
        return h_TD + self.mlp.apply(self.norm2.forward(h_TD)[0])

    def traffic(self, tokens: int) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send."""
        return [*self.attention.traffic(tokens), *self.mlp.traffic(tokens)]

    def flops(self, sequence_length: int) -> float:
        """Operations a token of forward and backward: 6 for each weight that multiplies, and 6 H (E + V) for each key that a
        causal query sees on average."""
        weights = sum(prod(p.layout.shape) for p in self.parameters if p.multiplies)
        return 6.0 * (weights + self.attention.score_width * (sequence_length + 1) / 2)

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

    def flops(self, sequence_length: int) -> float:
        """The block's: what is computed again is not counted."""
        return self.block.flops(sequence_length)

    def saved_bytes(self, tokens: int) -> int:
        width, itemsize = len(self.block.norm1.w_D.data), self.block.norm1.w_D.data.itemsize
        return message((tokens, width), itemsize)
