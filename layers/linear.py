"""Column- and row-parallel linear layers (Megatron-LM, arXiv 1909.08053, section 3).

    T tokens   I input width   O output width   i, o, t this rank's share over tp of I, O and, where rows are cut, of T

A product that contracts a small letter is a partial sum; the next thing in its line is a collective. `rows`: how T is cut over
tp between the layers (sequence parallelism, 2205.05198), or None where every rank has all rows: then t is T, gather_rows is the
identity and sum_rows an all_reduce.
"""

from __future__ import annotations

from math import prod

import numpy as np

from layers.ops import flattened, product
from layers.work import Work, linear, passes
from parallel.axis import Axis
from parallel.later import Later
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter, Weights
from parallel.products import matmul
from parallel.rows import gathered, held, summed
from parallel.shard import Cut, Layout


class ColumnParallelLinear:
    """Columns of W cut over tp: every rank reads all of x and owns some outputs.

        x_TI   = gather_rows(x_tI)                 again in backward, and not kept
        z_To   = x_TI @ W_Io + b_o
        dx_tI  = sum_rows(dz_To @ W_Io^T)          partial over o
        dW_Io += x_TI^T @ dz_To
        db_o  += sum_T dz_To

    `d_out`: the whole output dims, of which `cut` cuts the last: (F,), or (2, F) where two arrays are produced side by side
    (one product and one backward sum for both). Saved for backward: x.
    """

    def __init__(
        self, tp: Axis, weights: Weights, name: str, d_in: int, d_out: tuple[int, ...], cut: Cut, bias: bool = True
    ) -> None:
        self.tp, self.d_in = tp, d_in
        W, b = Layout((d_in, *d_out), {tp.name: (len(d_out), cut)}), Layout(d_out, {tp.name: (len(d_out) - 1, cut)})
        self.W_Io = weights.matrix(f"W{name}", W, tp.place, d_in)
        self.b_o = weights.bias(f"b{name}", b, tp.place) if bias else None

    @property
    def parameters(self) -> list[Parameter]:
        return [self.W_Io] if self.b_o is None else [self.W_Io, self.b_o]

    def forward(self, x_tI: np.ndarray, rows: Cut | None = None) -> tuple[np.ndarray, tuple]:
        """x (t, I) -> z (T, ...o), saved."""
        x_TI = self.tp.gather_rows(x_tI, rows)
        z_To = product(x_TI, self.W_Io.data.reshape(self.d_in, -1)).reshape(-1, *self.W_Io.data.shape[1:])
        if self.b_o is not None:
            z_To += self.b_o.data
        return z_To, (x_tI, rows)

    def apply(self, x_TI: np.ndarray) -> np.ndarray:
        """x (T, I) -> z (T, ...o), where there is no backward."""
        return self.forward(x_TI)[0]

    def backward(self, dz_To: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dz (T, ...o), saved -> dx (t, I). Adds into the gradients."""
        x_tI, rows = saved
        x_TI = self.tp.gather_rows(x_tI, rows)
        if self.b_o is not None:
            self.b_o.add_grad(dz_To.sum(axis=0))
        dz_To = flattened(dz_To)
        self.W_Io.add_grad_product(x_TI, dz_To, later)
        return self.tp.sum_rows(matmul(dz_To, self.W_Io.data.reshape(self.d_in, -1).T), rows)

    def traffic(self, tokens: int, rows: Cut | None = None) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send."""
        size, tp = message((tokens, self.d_in), self.W_Io.data.itemsize), self.tp.name
        gathers = [t for phase in ("forward", "backward") for t in gathered(tp, rows, phase, size)]
        return [*gathers, *summed(tp, rows, "backward", size)]

    def work(self, tokens: int) -> list[Work]:
        """What forward and backward of `tokens` tokens compute."""
        d_out = self.W_Io.data.size // self.d_in
        bias = [] if self.b_o is None else passes("bias", (tokens * d_out,) * 2, (tokens * d_out, 0))
        return linear(tokens, self.d_in, d_out) + bias

    def saved_bytes(self, tokens: int, rows: Cut | None = None) -> int:
        return message((held(tokens, rows, self.tp.rank), self.d_in), self.W_Io.data.itemsize)

    def later_bytes(self, tokens: int) -> int:
        """What is kept where the product of the weights is put off: x and dz, all rows."""
        return message((tokens, self.d_in + self.W_Io.data.size // self.d_in), self.W_Io.data.itemsize)


class RowParallelLinear:
    """Rows of W cut over tp: every rank owns some inputs, and the outputs are summed.

        y_tO   = sum_rows(x_Ti @ W_iO) + b_O          the bias is added once, after the sum
        dy_TO  = gather_rows(dy_tO)
        dx_Ti  = dy_TO @ W_iO^T
        dW_iO += x_Ti^T @ dy_TO
        db_O  += sum_t dy_tO                          of this rank's rows: owed over tp where they are cut

    `d_in`: the whole input dims, of which `cut` cuts the first: (F,), or (H, E) where heads are cut. A block adds y to its
    residual stream. `cuts_rows`: whether it will be called with rows that are cut. Saved for backward: x, this rank's part.
    """

    def __init__(
        self,
        tp: Axis,
        weights: Weights,
        name: str,
        d_in: tuple[int, ...],
        d_out: int,
        cut: Cut,
        bias: bool = True,
        cuts_rows: bool = False,
    ) -> None:
        self.tp, self.d_out = tp, d_out
        W, b = Layout((*d_in, d_out), {tp.name: (0, cut)}), Layout((d_out,))
        self.W_iO = weights.matrix(f"W{name}", W, tp.place, prod(d_in), residual=True)
        self.b_O = weights.bias(f"b{name}", b, tp.place, owed=(tp.name,) if cuts_rows else ()) if bias else None

    @property
    def parameters(self) -> list[Parameter]:
        return [self.W_iO] if self.b_O is None else [self.W_iO, self.b_O]

    def forward(self, x_Ti: np.ndarray, rows: Cut | None = None) -> tuple[np.ndarray, tuple]:
        """x (T, ...i) -> y (t, O), saved."""
        x_Ti = flattened(x_Ti)
        y_tO = self.tp.sum_rows(product(x_Ti, self.W_iO.data.reshape(-1, self.d_out)), rows)
        if self.b_O is not None:
            y_tO += self.b_O.data
        return y_tO, (x_Ti, rows)

    def backward(self, dy_tO: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dy (t, O), saved -> dx (T, ...i). Adds into the gradients."""
        x_Ti, rows = saved
        if self.b_O is not None:
            self.b_O.add_grad(dy_tO.sum(axis=0))
        dy_TO = self.tp.gather_rows(dy_tO, rows)
        self.W_iO.add_grad_product(x_Ti, dy_TO, later)
        return matmul(dy_TO, self.W_iO.data.reshape(-1, self.d_out).T).reshape(-1, *self.W_iO.data.shape[:-1])

    def traffic(self, tokens: int, rows: Cut | None = None) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send."""
        size, tp = message((tokens, self.d_out), self.W_iO.data.itemsize), self.tp.name
        return [*summed(tp, rows, "forward", size), *gathered(tp, rows, "backward", size)]

    def work(self, tokens: int, rows: Cut | None = None) -> list[Work]:
        """What forward and backward of `tokens` tokens compute."""
        own = held(tokens, rows, self.tp.rank) * self.d_out
        bias = [] if self.b_O is None else passes("bias", (own, own), (own, 0))
        return linear(tokens, self.W_iO.data.size // self.d_out, self.d_out) + bias

    def saved_bytes(self, tokens: int) -> int:
        return message((tokens, *self.W_iO.data.shape[:-1]), self.W_iO.data.itemsize)

    def later_bytes(self, tokens: int) -> int:
        """What is kept where the product of the weights is put off: x and dy, all rows."""
        return message((tokens, self.W_iO.data.size // self.d_out + self.d_out), self.W_iO.data.itemsize)
