"""A block of the transformer, pre-norm: what is added to the residual stream is computed from its norm (arXiv 2002.04745).

T tokens   D model width   t this rank's share of T over tp, where rows are cut
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from layers.attention import Attention
from layers.batch import Batch
from layers.latent_attention import LatentAttention
from layers.mlp import MLP
from layers.moe import MoE
from layers.norm import LayerNorm, RMSNorm
from layers.rope import Rotation
from layers.store import Store
from layers.work import Work, again, passes
from parallel.later import Later
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter
from parallel.rows import held


class Block:
    """h = x + attention(norm1(x)); y = h + mlp(norm2(h)). Four sums, two forward and two backward.

    dh = dy + norm2'(mlp'(dy))
    dx = dh + norm1'(attention'(dh))

    The residual stream is whole on every rank, or cut by `rows` (sequence parallelism, 2205.05198); so is what the norms keep.
    Saved for backward: what its four layers save.
    """

    def __init__(
        self, norm1: RMSNorm | LayerNorm, attention: Attention | LatentAttention, norm2: RMSNorm | LayerNorm, mlp: MLP | MoE
    ) -> None:
        self.norm1, self.attention, self.norm2, self.mlp = norm1, attention, norm2, mlp

    @property
    def parameters(self) -> list[Parameter]:
        return [p for layer in (self.norm1, self.attention, self.norm2, self.mlp) for p in layer.parameters]

    def forward(self, x_tD: np.ndarray, batch: Batch) -> tuple[np.ndarray, tuple]:
        """x (t, D) -> y (t, D), saved."""
        n_tD, saved_norm1 = self.norm1.forward(x_tD)
        a_tD, saved_attention = self.attention.forward(n_tD, batch)
        h_tD = x_tD + a_tD
        n_tD, saved_norm2 = self.norm2.forward(h_tD)
        m_tD, saved_mlp = self.mlp.forward(n_tD, batch)
        y_tD = h_tD + m_tD
        return y_tD, (saved_norm1, saved_attention, saved_norm2, saved_mlp)

    def backward(self, dy_tD: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dy (t, D), saved -> dx (t, D). Adds into the gradients."""
        saved_norm1, saved_attention, saved_norm2, saved_mlp = saved
        dn_tD = self.mlp.backward(dy_tD, saved_mlp, later)
        dh_tD = dy_tD + self.norm2.backward(dn_tD, saved_norm2)
        dn_tD = self.attention.backward(dh_tD, saved_attention, later)
        dx_tD = dh_tD + self.norm1.backward(dn_tD, saved_norm1)
        return dx_tD

    def cached(self, x_TD: np.ndarray, rotation: Rotation | None, store: Store) -> np.ndarray:
        """x (T, D), new tokens of sequences whose earlier ones `store` keeps -> y (T, D)."""
        h_TD = x_TD + store.attended(self.attention, self.norm1.forward(x_TD)[0], rotation)
        return h_TD + self.mlp.apply(self.norm2.forward(h_TD)[0])

    def traffic(self, batch: Batch) -> list[Traffic]:
        """What forward and backward of the batch send."""
        sums = self.mlp.balance_traffic(batch) if isinstance(self.mlp, MoE) else []
        return [*self.attention.traffic(batch), *sums, *self.mlp.traffic(batch.tokens, batch.rows)]

    def exchanged(self, batch: Batch) -> list[Traffic]:
        """What forward and backward of the batch send beyond `traffic`: rows to their experts, as they were chosen."""
        return self.mlp.exchanged(batch.noted[self.mlp].moved) if self.mlp in batch.noted else []

    def work(self, batch: Batch) -> list[Work]:
        """What forward and backward of the batch compute. How many rows each expert has is what has been noted in the batch;
        else all are alike."""
        served = [batch.noted[self.mlp].served] if self.mlp in batch.noted else []
        own = held(batch.tokens, batch.rows, self.attention.tp.rank)
        n = own * len(self.norm1.w_D.data)
        residual = [w for _ in range(2) for w in passes("residual", (2 * n, n), (2 * n, n))]
        inside = [*self.attention.work(batch), *self.mlp.work(batch.tokens, batch.rows, *served)]
        return [*self.norm1.work(own), *self.norm2.work(own), *inside, *residual]

    def saved_bytes(self, batch: Batch) -> int:
        """What this rank keeps from forward to backward."""
        moved = [batch.noted[self.mlp].moved] if self.mlp in batch.noted else []
        own = held(batch.tokens, batch.rows, self.attention.tp.rank)
        norms = self.norm1.saved_bytes(own) + self.norm2.saved_bytes(own)
        return norms + self.attention.saved_bytes(batch) + self.mlp.saved_bytes(batch.tokens, batch.rows, *moved)

    def later_bytes(self, batch: Batch) -> int:
        """What is kept where the products of weights are put off."""
        return self.attention.later_bytes(batch) + self.mlp.later_bytes(batch.tokens, batch.rows)


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

    @property
    def mlp(self) -> MLP | MoE:
        return self.block.mlp

    def forward(self, x_tD: np.ndarray, batch: Batch) -> tuple[np.ndarray, tuple]:
        y_tD, _ = self.block.forward(x_tD, batch)
        return y_tD, (x_tD, batch)

    def backward(self, dy_tD: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        _, again = self.block.forward(*saved)
        return self.block.backward(dy_tD, again, later)

    def traffic(self, batch: Batch) -> list[Traffic]:
        sent = self.block.traffic(batch)
        return [*sent, *(replace(t, phase="backward") for t in sent if t.phase == "forward")]

    def exchanged(self, batch: Batch) -> list[Traffic]:
        sent = self.block.exchanged(batch)
        return [*sent, *(replace(t, phase="backward") for t in sent if t.phase == "forward")]

    def work(self, batch: Batch) -> list[Work]:
        work = self.block.work(batch)
        return [*work, *again(work)]

    def saved_bytes(self, batch: Batch) -> int:
        width, itemsize = len(self.block.norm1.w_D.data), self.block.norm1.w_D.data.itemsize
        return message((held(batch.tokens, batch.rows, self.attention.tp.rank), width), itemsize)

    def later_bytes(self, batch: Batch) -> int:
        return self.block.later_bytes(batch)
