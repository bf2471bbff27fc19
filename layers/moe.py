"""Routed MLPs (mixture of experts, arXiv 1701.06538). Over tp every rank has a part of every expert, so that no token moves;
over ep a rank has some of the experts, and tokens go to them and come back (GShard, 2006.16668).

T tokens   D model width   X experts   A experts active for a token   F hidden width of an expert   S of the shared one
f, s this rank's share of F, S over tp   x of X over ep, whose ranks have tokens of their own   t the rows of one expert
P pairs (token, expert) that leave this rank   Q that come to it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from layers.batch import Batch, rows_of
from layers.dispatch import Dispatch, Moved, beside, by_expert, dispatched, joined
from layers.ops import ACTIVATIONS, product
from layers.routing import Router
from layers.work import WEIGHTS, Work, activated, linear, passes
from parallel.alone import Alone
from parallel.axis import Axis
from parallel.later import Later
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter, Weights
from parallel.products import matmul
from parallel.rows import cut_rows, exchanged, gathered, held, is_whole, own, summed
from parallel.shard import Cut, Layout, even

SWIGLU = ACTIVATIONS["swiglu"]


def gate_up(x_tD: np.ndarray, W1_D2f: np.ndarray) -> np.ndarray:
    """z (t, 2, f), what this rank's hidden units are computed from."""
    return product(x_tD, W1_D2f.reshape(len(W1_D2f), -1)).reshape(len(x_tD), *W1_D2f.shape[1:])


class Routed(NamedTuple):
    """What a forward has found out about a batch: how many pairs have left this rank and come, how many rows each expert of the
    rank has, how often its tokens chose each expert, and, where there is a balance loss, the gradient of the scores' shares and
    this rank's terms of the loss."""

    moved: Moved
    served: tuple[int, ...]
    counts: np.ndarray
    d_shares: np.ndarray | None = None
    loss: float = 0.0


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
        dz_Tn = SWIGLU.backward(matmul(dy_TD, self.W2_sD.data.T), slope_T2s).reshape(len(x_TD), W1_Dn.shape[1])
        self.W1_D2s.add_grad_product(x_TD, dz_Tn, later)
        return matmul(dz_Tn, W1_Dn.T)

    def work(self, tokens: int) -> list[Work]:
        """What forward and backward of `tokens` tokens compute."""
        s, D = self.W2_sD.data.shape
        return [*linear(tokens, D, 2 * s), *activated(SWIGLU, tokens * s), *linear(tokens, s, D)]

    def saved_bytes(self, tokens: int) -> int:
        return message((tokens, 3, len(self.W2_sD.data)), self.W2_sD.data.itemsize)

    def later_bytes(self, tokens: int) -> int:
        """What is kept where the products of weights are put off: x, h, dz and dy."""
        s, D = self.W2_sD.data.shape
        return message((tokens, 2 * D + 3 * s), self.W2_sD.data.itemsize)


class MoE:
    """y = the chosen experts' outputs, weighed, and the shared expert's: one all-reduce forward and one backward for it all.

        x_TD  = gather_rows(x_oD)                               o: this rank's own rows, where they are cut
        c_TA, g_TA = route(x_TD)                                the same on every rank of tp
        [x|g]_Qn = exchange([x|g]_Pn)                           n = D + 1: the weight travels with its row
        h_tf  = silu(x_tD @ W1_Df[0]) * (x_tD @ W1_Df[1])       of each expert, x_tD the rows of its tokens, own and come
        u_tf  = g_t h_tf
        o_tD  = u_tf @ W2_fD                                    partial over f
        y_PD  = exchange(o_QD)                                  back to where the tokens are
        y_oD  = sum_rows(sum_A [o | y_PD] + shared(x_TD))
        dy_QD = exchange(dy_PD)
        du_tf = dy_tD @ W2_fD^T
        dg_t  = sum_f h_tf du_tf                                partial over f
        dz_t2f = act'(z) g_t du_tf
        dx_tD = dz_t2f @ W1_D2f^T                               partial over f
        [dx|dg]_Pn = exchange([dx|dg]_Qn)
        [dx_oD | dg_oA] = sum_rows([sum_A dx + shared' | dg])
        dx_oD += route'(dg_oA)                                  by own rows: then the router's gradient is owed over tp

    `d_ff` is F, and `active` of `count` experts serve a token; `d_shared` (0: none) is the width of one that serves all.
    `scoring`: "softmax" or "sigmoid"; `normed`: the chosen scores are divided by their sum; `scale` multiplies them. `groups`,
    `active_groups`, `group_top`: experts are first limited to the best groups, a group's worth being the sum of its
    `group_top` best scores. `correction`: scores have a bias that chooses but does not weigh.
    Mixtral (2401.04088): normed. DeepSeek-V2 (2405.04434): not normed, groups, group_top 1, scale. DeepSeek-V3 (2412.19437):
    sigmoid, normed, groups, group_top 2, scale, correction.

    `ep`: the axis whose ranks share the experts out; without it this rank has all of them. Each of its ranks has tokens of its
    own: for all but the experts it is a data axis. The experts' gradients are of all its tokens.

    Rows are sorted by expert, as many as there are: no padding, no capacity, none dropped. Saved for backward: x, the scores
    and the choice, what came, and by expert h and the slope. Raises ValueError for more ranks than hidden units or experts, or
    options that do not fit one another.
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
        ep: Axis | None = None,
        cp: Axis | None = None,
    ) -> None:
        self.tp, self.ep, self.cp, self.d_model = tp, ep or Alone("ep"), cp or Alone("cp"), d_model
        routing = (scoring, normed, scale, correction, groups, active_groups, group_top)
        self.router = Router(weights, d_model, count, active, *routing, owed=(tp.name,) if cuts_rows else ())
        self.cut, hidden = even(count, self.ep.size, "experts"), even(d_ff, tp.size, "hidden units of an expert (d_ff)")
        W1 = Layout((count, d_model, 2, d_ff), {self.ep.name: (0, self.cut), tp.name: (3, hidden)})
        W2 = Layout((count, d_ff, d_model), {self.ep.name: (0, self.cut), tp.name: (1, hidden)})
        # Each beside none but itself: a gradient is made expert by expert, in memory that is kept.
        place, share = self.ep.place | tp.place, Fraction(active, count)
        self.W1_xD2f = weights.matrices({"W1": W1}, 0, place, d_model, read=share)
        self.W2_xfD = weights.matrices({"W2": W2}, 0, place, d_ff, read=share, residual=True)
        self.shared = SharedExpert(tp, weights.within("shared."), d_model, d_shared) if d_shared else None

    @property
    def parameters(self) -> list[Parameter]:
        shared = [] if self.shared is None else self.shared.parameters
        return [self.router.Wr_DX, *self.W1_xD2f.parameters, *self.W2_xfD.parameters, *shared]

    @property
    def buffers(self) -> list[Parameter]:
        """Arrays that belong to the model and are not trained: br (X,), where there is a correction."""
        return [] if self.router.br_X is None else [self.router.br_X]

    def forward(self, x_oD: np.ndarray, batch: Batch | None = None) -> tuple[np.ndarray, tuple]:
        """x (o, D) -> y (o, D), saved. What was chosen is noted in the batch."""
        rows = rows_of(batch)
        x_TD = self.tp.gather_rows(x_oD, rows)
        c_TA, g_TA, saved_router = self.router.forward(x_TD)
        y_TD, saved_shared = (np.zeros_like(x_TD), ()) if self.shared is None else self.shared.forward(x_TD)
        routed = self._add_routed(y_TD, x_TD, c_TA, g_TA, SWIGLU.forward)
        if batch is not None:
            batch.noted[self] = self._noted(c_TA, saved_router[0], routed[0], batch)
        return self.tp.sum_rows(y_TD, rows), (x_oD, batch, saved_router, *routed, saved_shared)

    def _noted(self, c_TA: np.ndarray, s_TX: np.ndarray, way: Dispatch, batch: Batch) -> Routed:
        """What is found out about a batch, and its balance loss, if there is to be one.

        count_SX  = all_reduce(how often the tokens of a sequence chose an expert)    over cp
        f_SX      = X / (A T_S) count_SX                                              T_S: the sequence's tokens
        loss      = alpha / T sum_t sum_X f[sequence of t] shares(s_tX)               this rank's terms of it

        (DeepSeek-V3, arXiv 2412.19437, 2.1.2: a loss for each sequence, here weighed by its tokens, so that it depends neither
        on the mesh nor on micro-batches.)
        """
        n_X = np.bincount(c_TA.reshape(-1), minlength=self.router.count)
        found = way.moved, way.served(self.cut.size(self.ep.rank)), n_X
        if batch.balance is None:
            return Routed(*found)
        count_SX = np.zeros((len(batch.lengths), self.router.count), np.int64)
        np.add.at(count_SX, (np.repeat(batch.sequence_T, self.router.active), c_TA.reshape(-1)), 1)
        tokens_S1 = np.array(batch.lengths)[:, None]
        f_SX = (self.router.count / self.router.active) * self.cp.all_reduce(count_SX) / tokens_S1
        dn_TX = (batch.balance.alpha / batch.balance.tokens) * f_SX[batch.sequence_T]
        return Routed(*found, dn_TX.astype(s_TX.dtype), float(np.vdot(dn_TX, self.router.shares(s_TX))))

    def apply(self, x_TD: np.ndarray) -> np.ndarray:
        """x (T, D) -> y (T, D), where there is no backward."""
        c_TA, g_TA, _ = self.router.forward(x_TD)
        y_TD = np.zeros_like(x_TD) if self.shared is None else self.shared.apply(x_TD)
        self._add_routed(y_TD, x_TD, c_TA, g_TA, lambda z_t2f: (SWIGLU.apply(z_t2f), None))
        return self.tp.all_reduce(y_TD)

    def _add_routed(
        self, y_TD: np.ndarray, x_TD: np.ndarray, c_TA: np.ndarray, g_TA: np.ndarray, hidden: Callable
    ) -> tuple[Dispatch, np.ndarray, tuple]:
        """y += the chosen experts' outputs, weighed, partial over f. What is saved: the way, what came, and by expert h and the
        slope, as `hidden` gives them for z."""
        pairs_N, n_X = by_expert(c_TA, self.router.count)
        n_Rx = self.ep.exchange(n_X, self.cut.sizes, [len(self.W2_xfD.data)] * self.ep.size).reshape(self.ep.size, -1)
        way = dispatched(pairs_N, n_X, n_Rx, self.cut, self.ep.rank)
        xg_Qn = self.ep.exchange(beside(x_TD, g_TA, way.leaving_P), way.sent, way.received)
        D, A, kept = self.d_model, self.router.active, []
        x_QD, g_Q, o_QD = xg_Qn[:, :D], xg_Qn[:, D], np.empty((len(xg_Qn), D), x_TD.dtype)
        for e, pairs, places in way.experts():
            tokens, stay = pairs // A, len(pairs)
            x_tD, g_t = joined(x_TD[tokens], x_QD, places), joined(g_TA.reshape(-1)[pairs], g_Q, places)
            h_tf, slope_t2f = hidden(gate_up(x_tD, self.W1_xD2f.data[e]))
            o_tD = product(g_t[:, None] * h_tf, self.W2_xfD.data[e])
            y_TD[tokens] += o_tD[:stay]
            if len(places):
                o_QD[places] = o_tD[stay:]
            kept.append((h_tf, slope_t2f))
        y_PD = self.ep.exchange(o_QD, way.received, way.sent)
        for pairs, back in way.returned():
            y_TD[pairs // A] += y_PD[back]
        return way, xg_Qn, tuple(kept)

    def backward(self, dy_oD: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dy (o, D), saved -> dx (o, D). Adds into the gradients; the experts' own are not put off."""
        x_oD, batch, saved_router, way, xg_Qn, kept, saved_shared = saved
        rows, noted = rows_of(batch), None if batch is None else batch.noted[self]
        x_TD, dy_TD = self.tp.gather_rows(x_oD, rows), self.tp.gather_rows(dy_oD, rows)
        T, D, A = len(x_TD), self.d_model, self.router.active
        _, _, g_TA = saved_router
        dy_QD = self.ep.exchange(dy_TD[way.leaving_P // A], way.sent, way.received)
        # What is partial over f, side by side: one sum serves both.
        packed_Tn, back_Qn = np.zeros((T, D + A), dy_TD.dtype), np.empty_like(xg_Qn)
        dx_TD, dg_TA = packed_Tn[:, :D], packed_Tn[:, D:]
        if self.shared is not None:
            dx_TD += self.shared.backward(dy_TD, x_TD, saved_shared, later)
        dW1_xD2f, dW2_xfD = self.W1_xD2f.room(), self.W2_xfD.room()
        idle = sorted(set(range(len(dW2_xfD))) - {e for e, *_ in way.here})
        dW1_xD2f[idle] = dW2_xfD[idle] = 0
        for (e, pairs, places), (h_tf, slope_t2f) in zip(way.experts(), kept, strict=True):
            tokens, at, stay = pairs // A, pairs % A, len(pairs)
            x_tD, dy_tD = joined(x_TD[tokens], xg_Qn[:, :D], places), joined(dy_TD[tokens], dy_QD, places)
            g_t1 = joined(g_TA.reshape(-1)[pairs], xg_Qn[:, D], places)[:, None]
            matmul((g_t1 * h_tf).T, dy_tD, out=dW2_xfD[e])
            du_tf = matmul(dy_tD, self.W2_xfD.data[e].T)
            dg_t = np.vecdot(h_tf, du_tf)
            dz_tn = SWIGLU.backward(g_t1 * du_tf, slope_t2f).reshape(len(x_tD), -1)
            matmul(x_tD.T, dz_tn, out=dW1_xD2f[e].reshape(D, -1))
            dx_tD = matmul(dz_tn, self.W1_xD2f.data[e].reshape(D, -1).T)
            dx_TD[tokens] += dx_tD[:stay]
            dg_TA[tokens, at] = dg_t[:stay]
            back_Qn[places, :D], back_Qn[places, D] = dx_tD[stay:], dg_t[stay:]
        self.W1_xD2f.add_grad(dW1_xD2f)
        self.W2_xfD.add_grad(dW2_xfD)
        back_Pn = self.ep.exchange(back_Qn, way.received, way.sent)
        for pairs, back in way.returned():
            dx_TD[pairs // A] += back_Pn[back, :D]
            dg_TA[pairs // A, pairs % A] = back_Pn[back, D]
        whole_on = self.tp.sum_rows(packed_Tn, rows)
        routed = tuple(own(a, rows, self.tp.rank) for a in saved_router)
        dn_oX = None if noted is None or noted.d_shares is None else own(noted.d_shares, rows, self.tp.rank)
        return whole_on[:, :D] + self.router.backward(whole_on[:, D:], x_oD, routed, later, dn_oX)

    @staticmethod
    def moved(saved: tuple) -> Moved:
        """How many pairs left and came in the forward that saved this."""
        return saved[3].moved

    def served(self, saved: tuple) -> tuple[int, ...]:
        """How many rows each expert of this rank had in the forward that saved this."""
        return saved[3].served(self.cut.size(self.ep.rank))

    def traffic(self, tokens: int, rows: Cut | None = None, moved: Moved | None = None) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send. Without `moved`, rows that go to other ranks' experts are left
        out: they depend on the choice."""
        tp, D = self.tp.name, self.d_model
        size = lambda width: message((tokens, width), self.W1_xD2f.data.itemsize)  # noqa: E731
        gathers = [t for phase in ("forward", "backward", "backward") for t in gathered(tp, rows, phase, size(D))]
        sums = {"forward": D, "backward": D + self.router.active}
        routed = [] if moved is None else self.exchanged(moved)
        return [*gathers, *routed, *(t for phase, width in sums.items() for t in summed(tp, rows, phase, size(width)))]

    def exchanged(self, moved: Moved) -> list[Traffic]:
        """What forward and backward send to other ranks' experts, and back."""
        (P, Q), D = moved, self.d_model
        size = lambda n, width: message((n, width), self.W1_xD2f.data.itemsize)  # noqa: E731
        others = self.cut.length - self.cut.size(self.ep.rank)
        leaving = [
            ("forward", message((others,), np.dtype(np.int64).itemsize)),
            ("forward", size(P, D + 1)),
            ("forward", size(Q, D)),
            ("backward", size(P, D)),
            ("backward", size(Q, D + 1)),
        ]
        return [t for phase, n in leaving for t in exchanged(self.ep.name, self.ep.size, phase, n)]

    def work(self, tokens: int, rows: Cut | None = None, served: Sequence[int] | None = None) -> list[Work]:
        """What forward and backward of `tokens` tokens compute. `served`: how many rows each expert of this rank has; without
        it, as many as if each rank of ep had so many tokens, and experts were chosen evenly."""
        T, (_, f, D) = tokens, self.W2_xfD.data.shape
        dealt = cut_rows(self._pairs(T), self.router.count).sizes[slice(*self.cut.bounds[self.ep.rank])]
        work = self.router.work(T, held(T, rows, self.tp.rank))
        for t, times in Counter(dealt if served is None else served).items():
            one = [*linear(t, D, 2 * f), *activated(SWIGLU, t * f), *linear(t, f, D)]
            one += passes("rows", (2 * t * D, 2 * t * D), (3 * t * D, 3 * t * D))
            # Their gradients are not put off.
            work += [w._replace(phase="backward" if w.phase == WEIGHTS else w.phase, times=times) for w in one]
        return work + ([] if self.shared is None else self.shared.work(T))

    def _pairs(self, tokens: int) -> int:
        """How many pairs the ranks of ep have together, if each has so many tokens."""
        return self.ep.size * tokens * self.router.active

    def balance_traffic(self, batch: Batch) -> list[Traffic]:
        """What the balance loss sends: counts, over cp."""
        size = message((len(batch.lengths), self.router.count), np.dtype(np.int64).itemsize)
        alone = batch.balance is None or isinstance(self.cp, Alone)
        return [] if alone else [Traffic("all_reduce", self.cp.name, "forward", size)]

    def _moved(self, moved: Moved | None) -> Moved:
        if moved is None and self.ep.size > 1:
            raise ValueError(f"{self.ep.size} ranks share the experts: what moves depends on the choice, give `moved`")
        return moved or Moved(0, 0)

    def saved_bytes(self, tokens: int, rows: Cut | None = None, moved: Moved | None = None) -> int:
        """What this rank keeps from forward to backward. `moved`: as for `traffic`; else it is the same whatever the choice."""
        b, (P, Q), (_, f, D) = self.W1_xD2f.data.itemsize, self._moved(moved), self.W2_xfD.data.shape
        pairs = tokens * self.router.active
        experts = message((pairs - P + Q, 3, f), b) + message((Q, D + 1), b) + message((pairs + Q,), np.dtype(np.intp).itemsize)
        shared = 0 if self.shared is None else self.shared.saved_bytes(tokens)
        return message((held(tokens, rows, self.tp.rank), D), b) + self.router.saved_bytes(tokens) + experts + shared

    def later_bytes(self, tokens: int, rows: Cut | None = None) -> int:
        """What is kept where the products of router and shared expert are put off. With whole rows both read the same x."""
        own, b = held(tokens, rows, self.tp.rank), self.W1_xD2f.data.itemsize
        x = 0 if self.shared is not None and is_whole(rows) else message((own, self.d_model), b)
        return x + self.router.later_bytes(own) + (0 if self.shared is None else self.shared.later_bytes(tokens))
