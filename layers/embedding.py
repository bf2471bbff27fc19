"""Token and position embeddings, and the output head: rows of the table, columns of the head, cut over tp by vocabulary.

T tokens   D model width   V vocabulary   P positions   v, t this rank's share over tp of V and, where rows are cut, of T
"""

from __future__ import annotations

import numpy as np

from layers.linear import ColumnParallelLinear
from layers.ops import product
from layers.work import WEIGHTS, Work, linear, looked_up
from parallel.axis import Axis
from parallel.later import Later, put_off
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter, Weights
from parallel.products import matmul
from parallel.rows import gathered, held, summed
from parallel.shard import Cut, Layout, even

# The spread of an untrained table (GPT-2).
STD = 0.02


def _add_rows(table: Parameter, rows_T: np.ndarray, dx_TD: np.ndarray) -> None:
    """table.grad[rows] += dx, a row as often as it is named: rows sorted, then summed run by run, always in token order."""
    grad = np.zeros_like(table.data)
    if len(rows_T):
        order = np.argsort(rows_T, kind="stable")
        sorted_T = rows_T[order]
        starts = np.flatnonzero(np.r_[True, sorted_T[1:] != sorted_T[:-1]])
        grad[sorted_T[starts]] = np.add.reduceat(dx_TD[order], starts, axis=0)
    table.add_grad(grad)


class VocabParallelEmbedding:
    """x = table[ids], each rank knowing its rows of it (Megatron-LM, arXiv 1909.08053, section 3).

        x_tD    = sum_rows(Wte_vD[ids], 0 where another rank has the row)
        dWte_vD += gather_rows(dx_tD), added up by row

    Any vocabulary size: rows are dealt out evenly or not. Saved for backward: this rank's rows and where in T they are.
    Raises ValueError for more ranks than rows.
    """

    def __init__(self, tp: Axis, weights: Weights, vocabulary: int, d_model: int) -> None:
        self.tp, self.cut = tp, even(vocabulary, tp.size, "rows of the vocabulary")
        self.table_vD = weights.table("Wte", Layout((vocabulary, d_model), {tp.name: (0, self.cut)}), tp.place, STD)

    @property
    def parameters(self) -> list[Parameter]:
        return [self.table_vD]

    def forward(self, ids_T: np.ndarray, rows: Cut | None = None) -> tuple[np.ndarray, tuple]:
        """ids (T,), integers in 0..V-1 -> x (t, D), saved."""
        first, last = self.cut.bounds[self.tp.rank]
        here = np.flatnonzero((ids_T >= first) & (ids_T < last))
        at = ids_T[here] - first
        x_TD = np.zeros((len(ids_T), self.table_vD.data.shape[1]), self.table_vD.data.dtype)
        x_TD[here] = self.table_vD.data[at]
        return self.tp.sum_rows(x_TD, rows), (here, at, rows)

    def backward(self, dx_tD: np.ndarray, saved: tuple, later: Later | None = None) -> None:
        """dx (t, D), saved. Adds into the gradient."""
        here, at, rows = saved
        add = lambda dx_TD: _add_rows(self.table_vD, at, dx_TD[here])  # noqa: E731
        put_off(later, add, self.tp.gather_rows(dx_tD, rows))

    def traffic(self, tokens: int, rows: Cut | None = None) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send."""
        size, tp = message((tokens, self.table_vD.data.shape[1]), self.table_vD.data.itemsize), self.tp.name
        return [*summed(tp, rows, "forward", size), *gathered(tp, rows, "backward", size)]

    def work(self, tokens: int) -> list[Work]:
        """What forward and backward of `tokens` tokens compute: as many rows as this rank's share of the table would have, and
        all of its gradient."""
        v, D = self.table_vD.data.shape
        return looked_up(-(-tokens * v // self.cut.length), D, v)

    def later_bytes(self, tokens: int) -> int:
        """What is kept where the table's rows are put off: dx, all rows."""
        return message((tokens, self.table_vD.data.shape[1]), self.table_vD.data.itemsize)


class LearnedPositions:
    """x + Wpe[positions], a table that is whole on every rank (GPT-2). Where rows are cut, a rank adds those of its own, and
    the table's gradient is `owed`. Saved for backward: the positions."""

    def __init__(self, weights: Weights, context: int, d_model: int, owed: tuple[str, ...] = ()) -> None:
        self.table_PD = weights.table("Wpe", Layout((context, d_model)), {}, STD, owed)

    @property
    def parameters(self) -> list[Parameter]:
        return [self.table_PD]

    def forward(self, x_TD: np.ndarray, positions_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x (T, D), positions (T,), whole numbers below P -> x (T, D), saved."""
        return x_TD + self.table_PD.data[positions_T], positions_T

    def backward(self, dx_TD: np.ndarray, positions_T: np.ndarray, later: Later | None = None) -> np.ndarray:
        """dx (T, D), saved -> dx (T, D). Adds into the gradient."""
        put_off(later, lambda dx_TD: _add_rows(self.table_PD, positions_T, dx_TD), dx_TD)
        return dx_TD

    def work(self, tokens: int) -> list[Work]:
        """What forward and backward of `tokens` tokens compute."""
        P, D = self.table_PD.data.shape
        return looked_up(tokens, D, P)


class TiedHead:
    """logits = h table^T, with the token embedding's own table: its gradient has a part from either end.

        logits_Tv = gather_rows(h_tD) @ Wte_vD^T     cut along V, never gathered
        dh_tD     = sum_rows(dlogits_Tv @ Wte_vD)
        dWte_vD  += dlogits_Tv^T @ gather_rows(h_tD)

    It has no parameters of its own; but `apart`, where the tokens are embedded on another rank, it has a copy of the table.
    Saved for backward: h, this rank's rows.
    """

    def __init__(self, embedding: VocabParallelEmbedding, apart: bool = False) -> None:
        self.tp, self.cut, self.table_vD = embedding.tp, embedding.cut, embedding.table_vD
        self.parameters = embedding.parameters if apart else []
        self._turned_Dv: np.ndarray | None = None

    @property
    def matrix(self) -> Parameter:
        """What tokens are multiplied by."""
        return self.table_vD

    def keep_turned(self) -> None:
        """For decoding with weights that stay as they are: keep the table a second time, turned, as (in, out) is read 1.6 times
        as fast for a single row. Costs its memory again."""
        self._turned_Dv = np.ascontiguousarray(self.table_vD.data.T)

    def apply(self, h_TD: np.ndarray) -> np.ndarray:
        """h (T, D) -> logits (T, v), where there is no backward."""
        return product(h_TD, self.table_vD.data.T if self._turned_Dv is None else self._turned_Dv)

    def forward(self, h_tD: np.ndarray, rows: Cut | None = None) -> tuple[np.ndarray, tuple]:
        """h (t, D) -> logits (T, v), saved."""
        return matmul(self.tp.gather_rows(h_tD, rows), self.table_vD.data.T), (h_tD, rows)

    def backward(self, dlogits_Tv: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dlogits (T, v), saved -> dh (t, D). Adds into the gradient."""
        h_tD, rows = saved
        self.table_vD.add_grad_product(dlogits_Tv, self.tp.gather_rows(h_tD, rows), later)
        return self.tp.sum_rows(matmul(dlogits_Tv, self.table_vD.data), rows)

    def traffic(self, tokens: int, rows: Cut | None = None) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send."""
        size, tp = message((tokens, self.table_vD.data.shape[1]), self.table_vD.data.itemsize), self.tp.name
        gathers = [t for phase in ("forward", "backward") for t in gathered(tp, rows, phase, size)]
        return [*gathers, *summed(tp, rows, "backward", size)]

    def work(self, tokens: int) -> list[Work]:
        """What forward and backward of `tokens` tokens compute."""
        v, D = self.table_vD.data.shape
        # The gradient is made as the table lies, (v, D).
        return [*linear(tokens, D, v)[:2], Work("product", WEIGHTS, (v, D, tokens, 1))]

    def saved_bytes(self, tokens: int, rows: Cut | None = None) -> int:
        own = held(tokens, rows, self.tp.rank)
        return message((own, self.table_vD.data.shape[1]), self.table_vD.data.itemsize)

    def later_bytes(self, tokens: int) -> int:
        """What is kept where the product of the table is put off: dlogits and h, all rows."""
        return message((tokens, sum(self.table_vD.data.shape)), self.table_vD.data.itemsize)


class UntiedHead(ColumnParallelLinear):
    """logits = h Whead, a column-parallel layer of its own."""

    def __init__(self, tp: Axis, weights: Weights, d_model: int, vocabulary: int) -> None:
        self.cut = even(vocabulary, tp.size, "rows of the vocabulary")
        super().__init__(tp, weights, "head", d_model, (vocabulary,), self.cut, bias=False)

    @property
    def matrix(self) -> Parameter:
        """What tokens are multiplied by."""
        return self.W_Io

    def keep_turned(self) -> None:
        """Nothing to do: its matrix is (in, out) already."""


Head = TiedHead | UntiedHead
