"""The two-layer MLP, tensor-parallel: the first layer column-parallel, the second row-parallel.

T tokens   D model width   O output width   F hidden width   f, t this rank's share over tp of F and, where rows are cut, of T
"""

from __future__ import annotations

import numpy as np

from layers.batch import Batch, rows_of
from layers.linear import ColumnParallelLinear, RowParallelLinear
from layers.ops import ACTIVATIONS
from layers.work import Work, activated
from parallel.axis import Axis
from parallel.later import Later
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter, Weights
from parallel.shard import Cut, even


class MLP:
    """y = act(x W1 + b1) W2 + b2, with one sum forward and one backward, whatever the activation.

        z_Tf  = gather_rows(x_tD) @ W1_Df + b1_f
        h_Tf  = act(z_Tf)
        y_tO  = sum_rows(h_Tf @ W2_fO) + b2_O
        dh_Tf = gather_rows(dy_tO) @ W2_fO^T
        dz_Tf = act'(z_Tf) * dh_Tf
        dx_tD = sum_rows(dz_Tf @ W1_Df^T)

    SwiGLU has W1 (D, 2, F): gate and up side by side, `h = silu(z[:, 0]) * z[:, 1]`. `d_ff` need not divide by the ranks.
    `cuts_rows`: whether it will be called with rows that are cut over tp (`layers.linear`). Saved for backward: x, h and the
    slope act'(z). Raises ValueError for more ranks than d_ff or an unknown activation.
    """

    def __init__(
        self,
        tp: Axis,
        weights: Weights,
        d_model: int,
        d_ff: int,
        activation: str = "gelu",
        bias: bool = True,
        d_out: int | None = None,
        cuts_rows: bool = False,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        cut = even(d_ff, tp.size, "hidden units (d_ff)")
        up = (d_ff,) if self.activation.inputs == 1 else (self.activation.inputs, d_ff)
        self.up = ColumnParallelLinear(tp, weights, "1", d_model, up, cut, bias)
        self.down = RowParallelLinear(tp, weights, "2", (d_ff,), d_out or d_model, cut, bias, cuts_rows)
        self.d_ff_local = cut.size(tp.rank)

    @property
    def parameters(self) -> list[Parameter]:
        return [*self.up.parameters, *self.down.parameters]

    def forward(self, x_tD: np.ndarray, batch: Batch | None = None) -> tuple[np.ndarray, tuple]:
        """x (t, D) -> y (t, O), saved."""
        rows = rows_of(batch)
        z_Tf, saved_up = self.up.forward(x_tD, rows)
        h_Tf, slope_Tf = self.activation.forward(z_Tf)
        y_tO, saved_down = self.down.forward(h_Tf, rows)
        return y_tO, (saved_up, slope_Tf, saved_down)

    def apply(self, x_TD: np.ndarray) -> np.ndarray:
        """x (T, D) -> y (T, O), where there is no backward."""
        z_Tf, _ = self.up.forward(x_TD)
        return self.down.forward(self.activation.apply(z_Tf))[0]

    def backward(self, dy_tO: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dy (t, O), saved -> dx (t, D). Adds into the gradients."""
        saved_up, slope_Tf, saved_down = saved
        dh_Tf = self.down.backward(dy_tO, saved_down, later)
        dz_Tf = self.activation.backward(dh_Tf, slope_Tf)
        return self.up.backward(dz_Tf, saved_up, later)

    def traffic(self, tokens: int, rows: Cut | None = None) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send."""
        return [*self.down.traffic(tokens, rows), *self.up.traffic(tokens, rows)]

    def work(self, tokens: int, rows: Cut | None = None) -> list[Work]:
        """What forward and backward of `tokens` tokens compute."""
        return [*self.up.work(tokens), *activated(self.activation, tokens * self.d_ff_local), *self.down.work(tokens, rows)]

    def saved_bytes(self, tokens: int, rows: Cut | None = None) -> int:
        """What this rank keeps from forward to backward."""
        slope_bytes = self.activation.slope_bytes or self.up.W_Io.data.itemsize
        slope = message((tokens, self.activation.inputs, self.d_ff_local), slope_bytes)
        return self.up.saved_bytes(tokens, rows) + slope + self.down.saved_bytes(tokens)

    def later_bytes(self, tokens: int, rows: Cut | None = None) -> int:
        """What is kept where the products of weights are put off."""
        return self.up.later_bytes(tokens) + self.down.later_bytes(tokens)
