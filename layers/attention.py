"""Self-attention over ragged sequences, tensor-parallel by heads: multi-head, multi-query and grouped-query.

T tokens   D model width   H query heads   K key/value heads   E head width
h, k, t this rank's share over tp of H, K and, where rows are cut, of T
n = h + 2 k: queries, keys and values side by side, from one product
"""

from __future__ import annotations

import numpy as np

from layers.attend import Keep, attend_cached
from layers.batch import Batch
from layers.context import Core, Local, runs_of
from layers.linear import RowParallelLinear
from layers.norm import rms_norm, rms_norm_backward
from layers.ops import flattened, product
from layers.rope import Rotation
from layers.work import Work, linear, passes
from parallel.axis import Axis
from parallel.later import Later
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter, Weights
from parallel.products import matmul
from parallel.rows import gathered, held, summed
from parallel.shard import Layout, covering, even, group_sizes


class Attention:
    """y = softmax(q k^T / sqrt(E)) v Wo (arXiv 1706.03762; grouped: 2305.13245), cut by heads (1909.08053, section 3).

        q_ThE | k_TkE | v_TkE = gather_rows(x_tD) @ [Wq_DhE | Wk_DkE | Wv_DkE] + [bq | bk | bv]
        q, k    = rotate(norm(q)), rotate(norm(k))       where the options say so
        o_ThE   = softmax(scale q k^T) v
        y_tD    = sum_rows(o_ThE @ Wo_hED) + bo_D
        do_ThE  = gather_rows(dy_tD) @ Wo_hED^T
        dWk_DkE, dWv_DkE                                 owed over tp where a head is on several ranks
        dx_tD   = sum_rows([dq | dk | dv]_TnE @ [Wq | Wk | Wv]_DnE^T)

    Query heads are dealt out as evenly as they go; a rank holds the key/value heads that its query heads read. `kv_heads`: H
    (multi-head, the default), 1 (multi-query) or a divisor of H. `qk_norm`: None, or eps of an RMS norm of each head's queries
    and keys, before rotation (as Qwen3); its weights are shared by the heads, so that their gradients are owed over tp too.
    `scale`: of the scores, E^-0.5 unless given. `window`: how many tokens a query sees at most, itself among them (0: all
    before it; arXiv 2310.06825). `rotates` False: queries and keys stay as they are, whatever the batch has (2501.18795).
    `context`: how tokens that are cut over cp meet (`layers.context`). `cuts_rows`: whether it will be called with rows that
    are cut. Saved for backward: x, q, k, v, o and the log-sum-exp (and, normed, q and k as they were and a number a head).
    Raises ValueError for more ranks than heads, kv_heads that do not divide heads, a window that the context cannot have, or no
    `d_head` and heads that do not divide d_model.
    """

    def __init__(
        self,
        tp: Axis,
        weights: Weights,
        d_model: int,
        heads: int,
        kv_heads: int | None = None,
        d_head: int | None = None,
        *,
        bias: bool = False,
        bias_out: bool = False,
        qk_norm: float | None = None,
        causal: bool = True,
        scale: float | None = None,
        window: int = 0,
        rotates: bool = True,
        cuts_rows: bool = False,
        context: Local | None = None,
    ) -> None:
        kv_heads = kv_heads or heads
        if d_head is None and d_model % heads:
            raise ValueError(f"cannot cut a width of {d_model} into {heads} heads: use a divisor of {d_model}, or give d_head")
        if heads % kv_heads:
            raise ValueError(f"cannot share {kv_heads} key/value heads among {heads} heads: use a divisor of {heads}")
        E = d_head or d_model // heads
        self.tp, self.d_model, self.causal, self.qk_norm = tp, d_model, causal, qk_norm
        self.scale, self.window, self.rotates = E**-0.5 if scale is None else scale, window, rotates
        cut = even(heads, tp.size, "heads")
        self.kv_cut = covering(cut, heads // kv_heads)
        self.h, self.k, self.E = cut.size(tp.rank), self.kv_cut.size(tp.rank), E
        cuts = {"q": cut, "k": self.kv_cut, "v": self.kv_cut}
        W = {f"W{c}": Layout((d_model, of.length, E), {tp.name: (1, of)}) for c, of in cuts.items()}
        b = {f"b{c}": Layout((of.length, E), {tp.name: (0, of)}) for c, of in cuts.items()}
        # Of heads that several ranks hold, each rank has the gradient by its own queries.
        self.W_DnE = weights.matrices(W, 1, tp.place, d_model, owed=(tp.name,))
        self.b_nE = weights.biases(b, 0, tp.place, owed=(tp.name,)) if bias else None
        self.norms = [] if qk_norm is None else [weights.norm(name, E, owed=(tp.name,)) for name in ("wqn", "wkn")]
        self.out = RowParallelLinear(tp, weights, "o", (heads, E), d_model, cut, bias_out, cuts_rows)
        self.runs = runs_of(group_sizes(cut, heads // kv_heads, tp.rank))
        self.context = context or Local()
        self.context.require(self.h, window)

    @property
    def parameters(self) -> list[Parameter]:
        biases = [] if self.b_nE is None else self.b_nE.parameters
        return [*self.W_DnE.parameters, *biases, *self.norms, *self.out.parameters]

    def forward(self, x_tD: np.ndarray, batch: Batch) -> tuple[np.ndarray, tuple]:
        """x (t, D) -> y (t, D), saved."""
        x_TD = self.tp.gather_rows(x_tD, batch.rows)
        batch.require(len(x_TD))
        z_TnE, qk_TnE, saved_norm = self._projected(x_TD, batch.rotation)
        o_ThE, kept = self.context.forward(*self._by_heads(qk_TnE, z_TnE), self.core, batch)
        y_tD, saved_out = self.out.forward(o_ThE, batch.rows)
        return y_tD, (x_tD, batch, z_TnE, saved_norm, kept, saved_out)

    def cached(self, x_TD: np.ndarray, rotation: Rotation | None, keep: Keep) -> np.ndarray:
        """x (T, D), new tokens of some sequences -> y (T, D): their queries read the keys and values that a cache has, and
        their own. It keeps k_TkE and v_TkE of this rank's k key/value heads."""
        z_TnE, qk_TnE, _ = self._projected(x_TD, rotation)
        o_ThE = np.empty((len(x_TD), self.h, self.E), x_TD.dtype)
        q_ThE, k_TkE, v_TkE = self._by_heads(qk_TnE, z_TnE)
        for at, hidden_BTS, k_BSkE, v_BSkE in keep(k_TkE, v_TkE):
            B = len(k_BSkE)
            shape = B, (at.stop - at.start) // B, -1
            for q, kv, g in self.runs:
                q_BTkgE, o_BTkgE = (a[at, q].reshape(*shape, g, self.E) for a in (q_ThE, o_ThE))
                attend_cached(q_BTkgE, k_BSkE[:, :, kv], v_BSkE[:, :, kv], o_BTkgE, self.scale, hidden_BTS, window=self.window)
        return self.out.forward(o_ThE)[0]

    @property
    def core(self) -> Core:
        return Core(self.runs, self.scale, self.causal, self.window)

    @property
    def cache_shapes(self) -> list[tuple[int, ...]]:
        """What a cache keeps of a token on this rank: a key and a value of each of its heads."""
        return [(self.k, self.E), (self.k, self.E)]

    def backward(self, dy_tD: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dy (t, D), saved -> dx (t, D). Adds into the gradients."""
        x_tD, batch, z_TnE, saved_norm, kept, saved_out = saved
        do_ThE = self.out.backward(dy_tD, saved_out, later)
        o_ThE = saved_out[0].reshape(do_ThE.shape)
        qk_TnE = saved_norm[0] if saved_norm else self._queries_keys(z_TnE)
        dz_TnE = np.zeros_like(z_TnE)
        qkv, into = self._by_heads(qk_TnE, z_TnE), self._by_heads(dz_TnE, dz_TnE)
        self.context.backward(do_ThE, o_ThE, qkv, into, self.core, batch, kept)
        if batch.rotation is not None and self.rotates:
            batch.rotation.backward(self._queries_keys(dz_TnE))
        self._normed_backward(dz_TnE, z_TnE, saved_norm)
        x_TD, dz_Tn = self.tp.gather_rows(x_tD, batch.rows), flattened(dz_TnE)
        self.W_DnE.add_grad_product(x_TD, dz_Tn, later)
        if self.b_nE is not None:
            self.b_nE.add_grad(dz_TnE.sum(axis=0))
        return self.tp.sum_rows(matmul(dz_Tn, self.W_DnE.data.reshape(self.d_model, -1).T), batch.rows)

    def _projected(self, x_TD: np.ndarray, rotation: Rotation | None) -> tuple[np.ndarray, np.ndarray, tuple]:
        """z (T, n, E), the queries and keys in it (or in an array of their own, if normed) rotated, and what is saved."""
        z_TnE = product(x_TD, self.W_DnE.data.reshape(self.d_model, -1)).reshape(len(x_TD), *self.W_DnE.data.shape[1:])
        if self.b_nE is not None:
            z_TnE += self.b_nE.data
        qk_TnE, saved_norm = self._normed(z_TnE)
        if rotation is not None and self.rotates:
            rotation.forward(qk_TnE)
        return z_TnE, qk_TnE, saved_norm

    def _queries_keys(self, z_TnE: np.ndarray) -> np.ndarray:
        return z_TnE[:, : self.h + self.k]

    def _normed(self, z_TnE: np.ndarray) -> tuple[np.ndarray, tuple]:
        """Queries and keys, normed if so asked, and what backward needs of it."""
        if not self.norms:
            return self._queries_keys(z_TnE), ()
        wq_E, wk_E = (p.data for p in self.norms)
        qk_TnE = np.empty((len(z_TnE), self.h + self.k, self.E), z_TnE.dtype)
        _, rq_Th1 = rms_norm(z_TnE[:, : self.h], wq_E, self.qk_norm, out=qk_TnE[:, : self.h])
        _, rk_Tk1 = rms_norm(self._queries_keys(z_TnE)[:, self.h :], wk_E, self.qk_norm, out=qk_TnE[:, self.h :])
        return qk_TnE, (qk_TnE, rq_Th1, rk_Tk1)

    def _normed_backward(self, dz_TnE: np.ndarray, z_TnE: np.ndarray, saved_norm: tuple) -> None:
        """From gradients of normed queries and keys to those before, in place. Adds into the norms' gradients."""
        if not self.norms:
            return
        at = (slice(0, self.h), slice(self.h, self.h + self.k))
        for p, r, heads in zip(self.norms, saved_norm[1:], at, strict=True):
            dz_TnE[:, heads], dw_E = rms_norm_backward(dz_TnE[:, heads], z_TnE[:, heads], r, p.data)
            p.add_grad(dw_E)

    def _by_heads(self, qk_TnE: np.ndarray, z_TnE: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views q (T, h, E), k and v (T, k, E): queries and keys of the first array, values of the second."""
        h, k = self.h, self.k
        return qk_TnE[:, :h], qk_TnE[:, h : h + k], z_TnE[:, h + k :]

    def traffic(self, batch: Batch) -> list[Traffic]:
        """What forward and backward of the batch send."""
        size, tp, b = message((batch.tokens, self.d_model), self.W_DnE.data.itemsize), self.tp.name, self.W_DnE.data.itemsize
        gathers = [t for phase in ("forward", "backward") for t in gathered(tp, batch.rows, phase, size)]
        around = self.context.traffic(self.core, batch, (self.E, self.E), b)
        return [*gathers, *around, *self.out.traffic(batch.tokens, batch.rows), *summed(tp, batch.rows, "backward", size)]

    def work(self, batch: Batch) -> list[Work]:
        """What forward and backward of the batch compute."""
        (h, k, E), T, n = (self.h, self.k, self.E), batch.tokens, self.W_DnE.data.size // self.d_model
        bias = [] if self.b_nE is None else passes("bias", (T * n, T * n), (T * n, 0))
        qk = T * (h + k) * E
        norms = passes("rms norm", (qk, qk), (2 * qk, qk)) if self.norms else []
        turns = [] if batch.rotation is None or not self.rotates else batch.rotation.work(h + k)
        inside = self.context.work(self.core, batch, (E, E))
        return [*linear(T, self.d_model, n), *bias, *norms, *turns, *inside, *self.out.work(T, batch.rows)]

    def saved_bytes(self, batch: Batch) -> int:
        """What this rank keeps from forward to backward. The rotation belongs to the batch and is not counted."""
        (h, k, E), tokens, b = (self.h, self.k, self.E), batch.tokens, self.W_DnE.data.itemsize
        normed = (h + k) * (E + 1) if self.norms else 0
        x = message((held(tokens, batch.rows, self.tp.rank), self.d_model), b)
        kept = self.context.saved_bytes(self.core, batch, (E, E), b)
        return x + message((tokens, (h + 2 * k) * E + normed), b) + kept + self.out.saved_bytes(tokens)

    def later_bytes(self, batch: Batch) -> int:
        """What is kept where the products of weights are put off."""
        size = message((batch.tokens, self.d_model + (self.h + 2 * self.k) * self.E), self.W_DnE.data.itemsize)
        return size + self.out.later_bytes(batch.tokens)
