"""Experts over ranks that all have the same tokens, as in generating: no row travels, and what experts make is summed.

T tokens   D model width   x of the X experts   t the rows of one expert
"""

from __future__ import annotations

import numpy as np

from layers.batch import Batch
from layers.dispatch import Moved
from layers.moe import SWIGLU, MoE, gate_up
from layers.ops import product
from parallel.ledger import Traffic, message
from parallel.shard import Cut


class AlikeMoE(MoE):
    """MoE where ep is no data axis: every rank of it has the same tokens. It has no backward.

    c_TA, g_TA = route(x_TD)                          the same on every rank
    o_tD  = (g_t silu(x_tD @ W1_Df[0]) * (x_tD @ W1_Df[1])) @ W2_fD      of this rank's experts, all their tokens
    y_TD  = all_reduce(sum_x o_tD)                    over ep
    y_TD  = all_reduce(y_TD + shared(x_TD))           over tp

    To dispatch would compute each token once for every rank that has it. The shared expert is whole on ep, and added once.
    """

    def forward(self, x_oD: np.ndarray, batch: Batch | None = None) -> tuple[np.ndarray, tuple]:
        raise TypeError("tokens that are alike on ep have no backward: use `apply`, or MoE")

    def apply(self, x_TD: np.ndarray) -> np.ndarray:
        """x (T, D), the same on every rank of ep and tp -> y (T, D)."""
        c_TA, g_TA, _ = self.router.forward(x_TD)
        o_TD, first = np.zeros_like(x_TD), self.cut.bounds[self.ep.rank][0]
        for e, (W1_D2f, W2_fD) in enumerate(zip(self.W1_xD2f.data, self.W2_xfD.data, strict=True)):
            tokens, at = np.nonzero(c_TA == first + e)
            if len(tokens):
                h_tf = SWIGLU.apply(gate_up(x_TD[tokens], W1_D2f))
                o_TD[tokens] += product(g_TA[tokens, at][:, None] * h_tf, W2_fD)
        y_TD = self.ep.all_reduce(o_TD)
        if self.shared is not None:
            y_TD += self.shared.apply(x_TD)
        return self.tp.all_reduce(y_TD)

    def _pairs(self, tokens: int) -> int:
        return tokens * self.router.active

    def traffic(self, tokens: int, rows: Cut | None = None, moved: Moved | None = None) -> list[Traffic]:
        """What `apply` to `tokens` tokens sends."""
        size = message((tokens, self.d_model), self.W1_xD2f.data.itemsize)
        return [Traffic("all_reduce", axis.name, "forward", size) for axis in (self.ep, self.tp)]
