"""Routed MLPs (mixture of experts, arXiv 1701.06538), tensor-parallel by the experts' hidden width: every rank has a part of
every expert, so that no token moves.

T tokens   D model width   X experts   A experts active for a token   F hidden width of an expert   S of the shared one
f, s this rank's share of F, S over tp   t the tokens of one expert
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from layers.ops import ACTIVATIONS, product
from layers.routing import Router
from parallel.axis import Axis
from parallel.later import Later
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter, Weights
from parallel.rows import gathered, held, is_whole, own, summed
from parallel.shard import Cut, Layout, even

SWIGLU = ACTIVATIONS["swiglu"]


def gate_up(x_tD: np.ndarray, W1_D2f: np.ndarray) -> np.ndarray:
    """z (t, 2, f), what this rank's hidden units are computed from."""
    return product(x_tD, W1_D2f.reshape(len(W1_D2f), -1)).reshape(len(x_tD), *W1_D2f.shape[1:])


class SharedExpert:
    """The MLP that serves every token: one that leaves its sums to the routed experts', with which its own travel.

    h_Ts  = silu(x_TD @ W1_Ds[0]) * (x_TD @ W1_Ds[1])
    y_TD  = h_Ts @ W2_sD                 partial over s
    dh_Ts = dy_TD @ W2_sD^T
    dx_TD = dz_T2s @ W1_D2s^T            partial over s
    """

    def __init__(self, tp: Axis, weights: Weights, d_model: int, d_shared: int) -> None:
        cut = even(d_shared, tp.size, "hidden units of the shared expert (d_shared)")
        W1, W2 = Layout((d_model, 2, d_shared), {tp.name: (2, cut)}), Layout((d_shared, d_model), {tp.name: (0, cut)})
        self.W1_D2s = weights.matrix("W1", W1, tp.place, d_model)
        self.W2_sD = weights.matrix("W2", W2, tp.place, d_shared, residual=True)

    @property
    def parameters(self) -> list[Parameter]:
        return [self.W1_D2s, self.W2_sD]

    def forward(self, x_TD: np.ndarray) -> tuple[np.ndarray, tuple]:
        """x (T, D) -> y (T, D), partial, and what is saved beside x."""
        h_Ts, slope_T2s = SWIGLU.forward(gate_up(x_TD, self.W1_D2s.data))
        return product(h_Ts, self.W2_sD.data), (h_Ts, slope_T2s)

    def apply(self, x_TD: np.ndarray) -> np.ndarray:
        """x (T, D) -> y (T, D), partial, where there is no backward."""
        return product(SWIGLU.apply(gate_up(x_TD, self.W1_D2s.data)), self.W2_sD.data)

    def backward(self, dy_TD: np.ndarray, x_TD: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dy (T, D), x, saved -> dx (T, D), partial. Adds into the gradients."""
        h_Ts, slope_T2s = saved
        W1_Dn = self.W1_D2s.data.reshape(x_TD.shape[1], -1)
        self.W2_sD.add_grad_product(h_Ts, dy_TD, later)
        dz_Tn = SWIGLU.backward(dy_TD @ self.W2_sD.data.T, slope_T2s).reshape(len(x_TD), W1_Dn.shape[1])
        self.W1_D2s.add_grad_product(x_TD, dz_Tn, later)
        return dz_Tn @ W1_Dn.T

    def saved_bytes(self, tokens: int) -> int:
        return message((tokens, 3, len(self.W2_sD.data)), self.W2_sD.data.itemsize)

    def later_bytes(self, tokens: int) -> int:
        """What is kept where the products of weights are put off: x, h, dz and dy."""
        s, D = self.W2_sD.data.shape
        return message((tokens, 2 * D + 3 * s), self.W2_sD.data.itemsize)


class MoE:
    """y = the chosen experts' outputs, weighed, and the shared expert's: one all-reduce forward and one backward for it all.

        x_TD  = gather_rows(x_oD)                               o: this rank's own rows, where they are cut
        c_TA, g_TA = route(x_TD)                                the same on every rank
        h_tf  = silu(x_tD @ W1_Df[0]) * (x_tD @ W1_Df[1])       of each expert, x_tD the rows of its tokens
        u_tf  = g_t h_tf
        y_oD  = sum_rows(sum_A u_tf @ W2_fD + shared(x_TD))
        du_tf = dy_tD @ W2_fD^T
        dg_t  = sum_f h_tf du_tf                                partial over f
        dz_t2f = act'(z) g_t du_tf
        dx_tD = dz_t2f @ W1_D2f^T                               partial over f
        [dx_oD | dg_oA] = sum_rows([sum_A dx + shared' | dg])
        dx_oD += route'(dg_oA)                                  by own rows: then the router's gradient is owed over tp

    `d_ff` is F, and `active` of `count` experts serve a token; `d_shared` (0: none) is the width of one that serves all.
    `scoring`: "softmax" or "sigmoid"; `normed`: the chosen scores are divided by their sum; `scale` multiplies them. `groups`,
    `active_groups`, `group_top`: experts are first limited to the best groups, a group's worth being the sum of its
    `group_top` best scores. `correction`: scores have a bias that chooses but does not weigh.
    Mixtral (2401.04088): normed. DeepSeek-V2 (2405.04434): not normed, groups, group_top 1, scale. DeepSeek-V3 (2412.19437):
    sigmoid, normed, groups, group_top 2, scale, correction.

    Tokens are sorted by expert, as many as there are: no padding, no capacity, none dropped. Saved for backward: x, the scores
    and the choice, and by expert its tokens, h and the slope. Raises ValueError for more ranks than hidden units or options
    that do not fit one another.
    """

    def __init__(
        self,
        tp: Axis,
        weights: Weights,
        d_model: int,
        d_ff: int,
        count: int,
        active: int,
        d_shared: int = 0,
        scoring: str = "softmax",
        normed: bool = True,
        scale: float = 1.0,
        correction: bool = False,
        groups: int = 1,
        active_groups: int = 1,
        group_top: int = 1,
        cuts_rows: bool = False,
    ) -> None:
        self.tp, self.d_model = tp, d_model
        routing = (scoring, normed, scale, correction, groups, active_groups, group_top)
        self.router = Router(weights, d_model, count, active, *routing, owed=(tp.name,) if cuts_rows else ())
        cut = even(d_ff, tp.size, "hidden units of an expert (d_ff)")
        W1, W2 = Layout((count, d_model, 2, d_ff), {tp.name: (3, cut)}), Layout((count, d_ff, d_model), {tp.name: (1, cut)})
        # Each beside none but itself: a gradient is made expert by expert, in memory that is kept.
        share = Fraction(active, count)
        self.W1_XD2f = weights.matrices({"W1": W1}, 0, tp.place, d_model, read=share)
        self.W2_XfD = weights.matrices({"W2": W2}, 0, tp.place, d_ff, read=share, residual=True)
        self.shared = SharedExpert(tp, weights.within("shared."), d_model, d_shared) if d_shared else None

    @property
    def parameters(self) -> list[Parameter]:
        shared = [] if self.shared is None else self.shared.parameters
        return [self.router.Wr_DX, *self.W1_XD2f.parameters, *self.W2_XfD.parameters, *shared]

    @property
    def buffers(self) -> list[Parameter]:
        """Arrays that belong to the model and are not trained: br (X,), where there is a correction."""
        return [] if self.router.br_X is None else [self.router.br_X]

    def forward(self, x_oD: np.ndarray, rows: Cut | None = None) -> tuple[np.ndarray, tuple]:
        """x (o, D) -> y (o, D), saved."""
        x_TD = self.tp.gather_rows(x_oD, rows)
        c_TA, g_TA, saved_router = self.router.forward(x_TD)
        y_TD, saved_shared = (np.zeros_like(x_TD), ()) if self.shared is None else self.shared.forward(x_TD)
        experts = []
        for e, pairs in by_expert(c_TA, self.router.count):
            tokens = pairs // self.router.active
            h_tf, slope_t2f = SWIGLU.forward(gate_up(x_TD[tokens], self.W1_XD2f.data[e]))
            y_TD[tokens] += product(g_TA.reshape(-1)[pairs, None] * h_tf, self.W2_XfD.data[e])
            experts.append((e, pairs, h_tf, slope_t2f))
        return self.tp.sum_rows(y_TD, rows), (x_oD, rows, saved_router, tuple(experts), saved_shared)

    def apply(self, x_TD: np.ndarray) -> np.ndarray:
        """x (T, D) -> y (T, D), where there is no backward."""
        c_TA, g_TA, _ = self.router.forward(x_TD)
        y_TD = np.zeros_like(x_TD) if self.shared is None else self.shared.apply(x_TD)
        for e, pairs in by_expert(c_TA, self.router.count):
            tokens = pairs // self.router.active
            h_tf = SWIGLU.apply(gate_up(x_TD[tokens], self.W1_XD2f.data[e]))
            y_TD[tokens] += product(g_TA.reshape(-1)[pairs, None] * h_tf, self.W2_XfD.data[e])
        return self.tp.all_reduce(y_TD)

    def backward(self, dy_oD: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dy (o, D), saved -> dx (o, D). Adds into the gradients; the experts' own are not put off."""
        x_oD, rows, saved_router, experts, saved_shared = saved
        x_TD, dy_TD = self.tp.gather_rows(x_oD, rows), self.tp.gather_rows(dy_oD, rows)
        T, D, A = len(x_TD), self.d_model, self.router.active
        _, _, g_TA = saved_router
        # What is partial over f, side by side: one sum serves both.
        packed_Tn = np.zeros((T, D + A), dy_TD.dtype)
        dx_TD, dg_TA = packed_Tn[:, :D], packed_Tn[:, D:]
        if self.shared is not None:
            dx_TD += self.shared.backward(dy_TD, x_TD, saved_shared, later)
        dW1_XD2f, dW2_XfD = self.W1_XD2f.room(), self.W2_XfD.room()
        idle = sorted(set(range(self.router.count)) - {e for e, *_ in experts})
        dW1_XD2f[idle] = dW2_XfD[idle] = 0
        for e, pairs, h_tf, slope_t2f in experts:
            tokens, at = pairs // A, pairs % A
            x_tD, dy_tD, g_t1 = x_TD[tokens], dy_TD[tokens], g_TA.reshape(-1)[pairs, None]
            np.matmul((g_t1 * h_tf).T, dy_tD, out=dW2_XfD[e])
            du_tf = dy_tD @ self.W2_XfD.data[e].T
            dg_TA[tokens, at] = np.vecdot(h_tf, du_tf)
            dz_tn = SWIGLU.backward(g_t1 * du_tf, slope_t2f).reshape(len(tokens), -1)
            np.matmul(x_tD.T, dz_tn, out=dW1_XD2f[e].reshape(D, -1))
            dx_TD[tokens] += dz_tn @ self.W1_XD2f.data[e].reshape(D, -1).T
        self.W1_XD2f.add_grad(dW1_XD2f)
        self.W2_XfD.add_grad(dW2_XfD)
        whole_on = self.tp.sum_rows(packed_Tn, rows)
        routed = tuple(own(a, rows, self.tp.rank) for a in saved_router)
        return whole_on[:, :D] + self.router.backward(whole_on[:, D:], x_oD, routed, later)

    def traffic(self, tokens: int, rows: Cut | None = None) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send."""
        tp, D = self.tp.name, self.d_model
        size = lambda width: message((tokens, width), self.W1_XD2f.data.itemsize)  # noqa: E731
        gathers = [t for phase in ("forward", "backward", "backward") for t in gathered(tp, rows, phase, size(D))]
        sums = {"forward": D, "backward": D + self.router.active}
        return [*gathers, *(t for phase, width in sums.items() for t in summed(tp, rows, phase, size(width)))]

    def saved_bytes(self, tokens: int, rows: Cut | None = None) -> int:
        """What this rank keeps from forward to backward, whatever the choice."""
        b, pairs, f = self.W1_XD2f.data.itemsize, tokens * self.router.active, self.W2_XfD.data.shape[1]
        experts = message((pairs, 3, f), b) + message((pairs,), np.dtype(np.intp).itemsize)
        shared = 0 if self.shared is None else self.shared.saved_bytes(tokens)
        return message((held(tokens, rows, self.tp.rank), self.d_model), b) + self.router.saved_bytes(tokens) + experts + shared

    def later_bytes(self, tokens: int, rows: Cut | None = None) -> int:
        """What is kept where the products of router and shared expert are put off. With whole rows both read the same x."""
        own, b = held(tokens, rows, self.tp.rank), self.W1_XD2f.data.itemsize
        x = 0 if self.shared is not None and is_whole(rows) else message((own, self.d_model), b)
        return x + self.router.later_bytes(own) + (0 if self.shared is None else self.shared.later_bytes(tokens))


def by_expert(c_TA: np.ndarray, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each expert that was chosen, with the places in c, flat and ascending, where it was: token * A + which of its A."""
    pairs = np.argsort(c_TA, axis=None, kind="stable")
    sizes = np.bincount(c_TA.reshape(-1), minlength=count)
    ends = np.cumsum(sizes)
    for e in np.flatnonzero(sizes):
        yield int(e), pairs[ends[e] - sizes[e] : ends[e]]
