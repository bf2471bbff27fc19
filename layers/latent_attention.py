"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), tensor-parallel by heads.

T tokens   D model width   H heads   h this rank's share of H over tp   C latent width   Q query latent width
N width of a head's queries and keys without position   R rotated width, one key of it for all heads   V value width
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from layers.attend import Keep, attend_cached, merge
from layers.batch import Batch
from layers.context import Core, Local, all_spans, runs_of
from layers.linear import RowParallelLinear
from layers.norm import RMSNorm
from layers.ops import flattened
from layers.pieces import own_spans
from layers.rope import Rotation
from layers.work import Work, attended, linear, passes
from parallel.axis import Axis
from parallel.later import Later
from parallel.ledger import Traffic, message
from parallel.parameter import Parameter, Weights
from parallel.products import matmul
from parallel.rows import gathered, held, is_whole, summed
from parallel.shard import Layout, even


class LatentAttention:
    """Keys and values of all heads come from a latent c of width C; a cache need hold c and one rotated key, C + R a token.

        [c_TC | kr_TR | cq_TQ] = gather_rows([norm(x_tD @ Wdkv_DC) | x_tD @ Wkr_DR | norm(x_tD @ Wdq_DQ)])
        kr_TR = rotate(kr_TR)                            one key for all heads
                                                         cq is x where there is no query compression
        q_Th(N+R) = cq_TQ @ Wuq_Qh(N+R), its last R rotated
        kn_ThN | v_ThV = c_TC @ Wukv_Ch(N+V)
        o_ThV = softmax(scale [q] [kn | kr]^T) v
        y_tD  = sum_rows(o_ThV @ Wo_hVD)
        do_ThV = gather_rows(dy_tD) @ Wo_hVD^T
        [dc_tC | dkr_tR | dcq_tQ] = sum_rows([dkv @ Wukv^T | sum_h dk | dq @ Wuq^T])    partial over h
        dx_tD  = their gradients through the norms @ [Wdkv | Wkr | Wdq]^T

    `d_query_latent`: Q, or 0 for no compression (then Wq is (D, H, N+R) and dx has its part). `scale`: (N+R)^-0.5 unless given
    (yarn multiplies it by its own factor). The down-projections are whole on every rank, and so are their gradients; where rows
    are cut (`cuts_rows`), each rank makes the latents of its own rows, and they are owed over tp. Saved for backward: x, the
    latents before and after their norms, kr, q, kn | v, o and the log-sum-exp. Raises ValueError for more ranks than heads or
    an odd rotated width.
    """

    window = 0

    def __init__(
        self,
        tp: Axis,
        weights: Weights,
        d_model: int,
        heads: int,
        d_latent: int,
        d_nope: int,
        d_rope: int,
        d_value: int,
        d_query_latent: int = 0,
        *,
        eps: float = 1e-6,
        causal: bool = True,
        scale: float | None = None,
        cuts_rows: bool = False,
        context: Local | None = None,
    ) -> None:
        if d_rope < 2 or d_rope % 2:
            raise ValueError(f"cannot rotate a width of {d_rope}: use an even one, 2 or more")
        self.tp, self.causal, self.d_model = tp, causal, d_model
        self.C, self.N, self.R, self.V = d_latent, d_nope, d_rope, d_value
        self.scale = (d_nope + d_rope) ** -0.5 if scale is None else scale
        cut = even(heads, tp.size, "heads")
        self.cut, self.h = cut, cut.size(tp.rank)
        self.context = context or Local()

        owed = (tp.name,) if cuts_rows else ()

        def whole(name: str, width: int) -> Parameter:
            return weights.matrix(name, Layout((d_model, width)), {}, d_model, owed=owed)

        def by_heads(name: str, d_in: int, width: int) -> Parameter:
            return weights.matrix(name, Layout((d_in, heads, width), {tp.name: (1, cut)}), tp.place, d_in)

        self.Wdkv_DC, self.Wkr_DR = whole("Wdkv", d_latent), whole("Wkr", d_rope)
        self.norm = RMSNorm(weights, "ckv", d_latent, eps, owed)
        self.Wukv_Chn = by_heads("Wukv", d_latent, d_nope + d_value)
        self.Wdq_DQ = whole("Wdq", d_query_latent) if d_query_latent else None
        self.norm_q = RMSNorm(weights, "cq", d_query_latent, eps, owed) if d_query_latent else None
        self.Wq_Qhn = by_heads("Wuq" if d_query_latent else "Wq", d_query_latent or d_model, d_nope + d_rope)
        self.out = RowParallelLinear(tp, weights, "o", (heads, d_value), d_model, cut, bias=False)

    @property
    def parameters(self) -> list[Parameter]:
        compressed = [] if self.Wdq_DQ is None else [self.Wdq_DQ, *self.norm_q.parameters]
        down = [self.Wdkv_DC, self.Wkr_DR, *self.norm.parameters]
        return [*down, self.Wukv_Chn, *compressed, self.Wq_Qhn, *self.out.parameters]

    @property
    def core(self) -> Core:
        return Core(runs_of([1] * self.h), self.scale, self.causal)

    def forward(self, x_tD: np.ndarray, batch: Batch) -> tuple[np.ndarray, tuple]:
        """x (t, D) -> y (t, D), saved. Expanded form."""
        rows = batch.rows
        c_tC, kr_tR, cq_tQ, saved_norms = self._down(x_tD)
        c_TC, kr_TR, cq_TQ = (self.tp.gather_rows(a, rows) for a in (c_tC, kr_tR, cq_tQ))
        batch.require(len(c_TC))
        q_Thn = self._rotated(cq_TQ, kr_TR, batch.rotation)
        c_SC, kr_SR = (self.context.gathered(a, batch) for a in (c_TC, kr_TR))
        kv_Shn = matmul(c_SC, self.Wukv_Chn.data.reshape(self.C, -1)).reshape(len(c_SC), *self.Wukv_Chn.data.shape[1:])
        o_ThV, lse_Th = self.core.attend(q_Thn, *self._heads(kv_Shn, kr_SR), all_spans(batch, self.causal))
        y_tD, saved_out = self.out.forward(o_ThV, rows)
        return y_tD, (x_tD, batch, saved_norms, cq_tQ, c_tC, kr_SR, q_Thn, kv_Shn, lse_Th, saved_out)

    def backward(self, dy_tD: np.ndarray, saved: tuple, later: Later | None = None) -> np.ndarray:
        """dy (t, D), saved -> dx (t, D). Adds into the gradients."""
        x_tD, batch, saved_norms, cq_tQ, c_tC, kr_SR, q_Thn, kv_Shn, lse_Th, saved_out = saved
        rows, rotation = batch.rows, batch.rotation
        c_TC, cq_TQ = (self.tp.gather_rows(a, rows) for a in (c_tC, cq_tQ))
        c_SC = self.context.gathered(c_TC, batch)
        do_ThV = self.out.backward(dy_tD, saved_out, later)
        k_Shn, v_ShV = self._heads(kv_Shn, kr_SR)
        dq_Thn, dk_Shn, dkv_Shn = np.zeros_like(q_Thn), np.zeros_like(k_Shn), np.zeros_like(kv_Shn)
        of = (do_ThV, saved_out[0].reshape(do_ThV.shape), lse_Th), (q_Thn, k_Shn, v_ShV)
        self.core.backward(*of, (dq_Thn, dk_Shn, dkv_Shn[..., self.N :]), all_spans(batch, self.causal), self.causal)
        dkv_Shn[..., : self.N] = dk_Shn[..., : self.N]
        if rotation is not None:
            rotation.backward(dq_Thn[..., self.N :])
        # The latents and the rotated key feed the heads of every rank: what comes back through this rank's is partial.
        dq_Tn, dkv_Sn = flattened(dq_Thn), flattened(dkv_Shn)
        self.Wq_Qhn.add_grad_product(cq_TQ, dq_Tn, later)
        self.Wukv_Chn.add_grad_product(c_SC, dkv_Sn, later)
        dc_SC = matmul(dkv_Sn, self.Wukv_Chn.data.reshape(self.C, -1).T)
        dckr_TM = self.context.summed(np.concatenate([dc_SC, dk_Shn[..., self.N :].sum(axis=1)], axis=1), batch)
        dcq_TQ = matmul(dq_Tn, self.Wq_Qhn.data.reshape(cq_TQ.shape[1], -1).T)
        if rotation is not None:
            rotation.backward(dckr_TM[:, None, self.C :])
        whole_tn = self.tp.sum_rows(np.concatenate([dckr_TM, dcq_TQ], axis=1), rows)
        dc_tC, dkr_tR, dcq_tQ = np.split(whole_tn, [self.C, self.C + self.R], axis=1)
        saved_c, saved_q = saved_norms
        dx_tD = self._down_backward(self.Wdkv_DC, self.norm.backward(dc_tC, saved_c), x_tD, later)
        dx_tD += self._down_backward(self.Wkr_DR, np.ascontiguousarray(dkr_tR), x_tD, later)
        if self.Wdq_DQ is None:
            return dx_tD + dcq_tQ
        return dx_tD + self._down_backward(self.Wdq_DQ, self.norm_q.backward(dcq_tQ, saved_q), x_tD, later)

    def forward_absorbed(self, x_TD: np.ndarray, batch: Batch) -> np.ndarray:
        """The same y (T, D), its up-projections folded into the query and the output: all heads read the latent itself.

        qc_ThC = q_ThN @ Wuk_ChN^T        scores are [qc | qr] [c | kr]^T, at the scale of the expanded form
        oc_ThC = softmax(...) c_TC
        o_ThV  = oc_ThC @ Wuv_ChV
        """
        q_ThM, c_TM = self._absorbed(x_TD, batch.rotation)
        # One key/value head, the latent, that all query heads read.
        core, c_T1M = self.core._replace(runs=runs_of([self.h])), c_TM[:, None]
        oc_ThC, _ = core.attend(q_ThM, c_T1M, c_T1M[..., : self.C], own_spans(batch.mine, self.causal))
        return self._out_absorbed(oc_ThC)

    def cached(self, x_TD: np.ndarray, rotation: Rotation | None, keep: Keep) -> np.ndarray:
        """x (T, D), new tokens of some sequences -> y (T, D), absorbed. A cache keeps c | kr (T, C + R) on every rank."""
        q_ThM, c_TM = self._absorbed(x_TD, rotation)
        oc_ThC = np.empty((len(x_TD), self.h, self.C), x_TD.dtype)
        for at, hidden_BTS, c_BSM in keep(c_TM):
            B, c_BS1M = len(c_BSM), c_BSM[:, :, None]
            q_BT1hM, oc_BT1hC = (a[at].reshape(B, -1, 1, *a.shape[1:]) for a in (q_ThM, oc_ThC))
            attend_cached(q_BT1hM, c_BS1M, c_BS1M[..., : self.C], oc_BT1hC, self.scale, hidden_BTS)
        return self._out_absorbed(oc_ThC)

    def cached_striped(self, x_TD: np.ndarray, rotation: Rotation | None, keep: Keep) -> np.ndarray:
        """The same, each rank keeping every p-th position only: C + R numbers a token on one rank, not on all.

        q_THM           = all_gather(q_ThM)                          every rank's queries read this rank's positions
        oc_THC, lse_TH  = softmax over these positions
        [oc | lse]      = all_to_all                                 to the rank whose heads they are, from every rank
        oc_ThC          = sum_r exp(lse_r - max lse) oc_r / sum_r exp(lse_r - max lse)

        `keep` yields, sequence by sequence, how many of this rank's positions each new token sees, and these positions.
        """
        q_ThM, c_TM = self._absorbed(x_TD, rotation)
        T, p = len(x_TD), self.tp.size
        q_THM = self.tp.all_gather(q_ThM, 1, self.cut)
        part_TH = np.zeros((T, self.cut.length, self.C + 1), x_TD.dtype)
        part_TH[..., self.C] = -np.inf
        for at, seen, c_BSM in keep(c_TM):
            for t, many in zip(range(at.start, at.stop), seen, strict=True):
                if many:
                    c_BS1M = c_BSM[:, :many, None]
                    of = q_THM[None, t : t + 1, None], c_BS1M, c_BS1M[..., : self.C]
                    part_BT1H = part_TH[None, t : t + 1, None]
                    attend_cached(*of, part_BT1H[..., : self.C], self.scale, lse_BTKg=part_BT1H[..., self.C])
        ranks = even(p * T, p)
        back = self.tp.all_to_all(part_TH, 1, self.cut, 0, ranks)
        parts_pThC = back.reshape(p, T, self.h, self.C + 1)
        oc_ThC, _ = merge(*((part_ThC[..., : self.C], part_ThC[..., self.C]) for part_ThC in parts_pThC))
        return self._out_absorbed(oc_ThC)

    @property
    def cache_shapes(self) -> list[tuple[int, ...]]:
        """What a cache keeps of a token: the latent and the rotated key, side by side."""
        return [(self.C + self.R,)]

    def _absorbed(self, x_TD: np.ndarray, rotation: Rotation | None) -> tuple[np.ndarray, np.ndarray]:
        """q (T, h, C + R), folded, and c | kr (T, C + R)."""
        c_TC, kr_TR, cq_TQ, _ = self._down(x_TD)
        q_Thn = self._rotated(cq_TQ, kr_TR, rotation)
        Wuk_hNC = self.Wukv_Chn.data[..., : self.N].transpose(1, 2, 0)
        q_ThM = np.empty((len(x_TD), self.h, self.C + self.R), x_TD.dtype)
        matmul(q_Thn[..., : self.N].transpose(1, 0, 2), Wuk_hNC, out=q_ThM[..., : self.C].transpose(1, 0, 2))
        q_ThM[..., self.C :] = q_Thn[..., self.N :]
        return q_ThM, np.concatenate([c_TC, kr_TR], axis=1)

    def _out_absorbed(self, oc_ThC: np.ndarray) -> np.ndarray:
        Wuv_hCV = self.Wukv_Chn.data[..., self.N :].transpose(1, 0, 2)
        return self.out.forward(matmul(oc_ThC.transpose(1, 0, 2), Wuv_hCV).transpose(1, 0, 2))[0]

    def _down(self, x_tD: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple]:
        """Of own rows: the latent c (t, C), the key kr (t, R) before its rotation, what queries are projected from (the query
        latent, or x), and what is saved of the norms."""
        c_tC, saved_c = self.norm.forward(matmul(x_tD, self.Wdkv_DC.data))
        cq_tQ, saved_q = (x_tD, ()) if self.Wdq_DQ is None else self.norm_q.forward(matmul(x_tD, self.Wdq_DQ.data))
        return c_tC, matmul(x_tD, self.Wkr_DR.data), cq_tQ, (saved_c, saved_q)

    def _rotated(self, cq_TQ: np.ndarray, kr_TR: np.ndarray, rotation: Rotation | None) -> np.ndarray:
        """q (T, h, N + R) with its last R rotated; kr is rotated in place."""
        q_Thn = matmul(cq_TQ, self.Wq_Qhn.data.reshape(cq_TQ.shape[1], -1)).reshape(len(cq_TQ), *self.Wq_Qhn.data.shape[1:])
        if rotation is not None:
            rotation.forward(q_Thn[..., self.N :])
            rotation.forward(kr_TR[:, None])
        return q_Thn

    def _heads(self, kv_Thn: np.ndarray, kr_TR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """k (T, h, N + R) with the one rotated key beside each head's own, v (T, h, V)."""
        k_Thn = np.empty((*kv_Thn.shape[:2], self.N + self.R), kv_Thn.dtype)
        k_Thn[..., : self.N] = kv_Thn[..., : self.N]
        k_Thn[..., self.N :] = kr_TR[:, None]
        return k_Thn, kv_Thn[..., self.N :]

    @staticmethod
    def _down_backward(W_DI: Parameter, d_tI: np.ndarray, x_tD: np.ndarray, later: Later | None) -> np.ndarray:
        """Through a projection that is whole on every rank: its gradient by own rows, and its part of dx (t, D)."""
        W_DI.add_grad_product(x_tD, d_tI, later)
        return matmul(d_tI, W_DI.data.T)

    def traffic(self, batch: Batch) -> list[Traffic]:
        """What forward and backward of the batch send."""
        b, tp, Q, rows, C = self.Wq_Qhn.data.itemsize, self.tp.name, len(self.Wq_Qhn.data), batch.rows, self.C
        size = lambda width: message((batch.tokens, width), b)  # noqa: E731
        again = [("forward", C), ("forward", self.R), ("forward", Q), ("backward", C), ("backward", Q)]
        gathers = [t for phase, width in again for t in gathered(tp, rows, phase, size(width))]
        c, kr, both = (self.context.traffic_gathered(batch, width, b) for width in (C, self.R, C + self.R))
        around = [*c[:1], *kr[:1], *(replace(t, phase="backward") for t in c[:1]), *both[1:]]
        return [*gathers, *around, *self.out.traffic(batch.tokens, rows), *summed(tp, rows, "backward", size(C + self.R + Q))]

    def work(self, batch: Batch) -> list[Work]:
        """What forward and backward of the batch compute. Keys and values are made of all tokens of the sequences."""
        T, S, h, n, C = batch.tokens, sum(batch.lengths), self.h, self.N + self.R, self.C
        own, Q = held(T, batch.rows, self.tp.rank), len(self.Wq_Qhn.data)
        queries = [] if self.norm_q is None else [*linear(own, self.d_model, Q), *self.norm_q.work(own)]
        down = [*linear(own, self.d_model, C), *linear(own, self.d_model, self.R), *self.norm.work(own), *queries]
        up = [*linear(T, Q, h * n), *linear(S, C, h * (self.N + self.V))]
        turns = [] if batch.rotation is None else batch.rotation.work(h + 1)
        keys = passes("heads", (S * h * n, S * h * n), (S * h * (n + self.N), S * h * (n + self.N)))
        inside = attended([(all_spans(batch, self.causal), self.causal)], [(h, 1)], n, self.V)
        return [*down, *up, *turns, *keys, *inside, *self.out.work(T, batch.rows)]

    def traffic_striped(self, tokens: int, phase: str) -> list[Traffic]:
        """What `cached_striped` sends beside what `cached` does: all queries to all, partial outputs to their heads' ranks."""
        H, b = self.cut.length, self.Wq_Qhn.data.itemsize
        queries = message((tokens, H, self.C + self.R), b)
        back = message((tokens, H, self.C + 1), b)
        return [Traffic("all_gather", self.tp.name, phase, queries), Traffic("all_to_all", self.tp.name, phase, back)]

    def saved_bytes(self, batch: Batch) -> int:
        """What this rank keeps from forward to backward. The rotation belongs to the batch and is not counted."""
        b, tokens, every = self.Wq_Qhn.data.itemsize, batch.tokens, sum(batch.lengths)
        own = held(tokens, batch.rows, self.tp.rank)
        kept = message((own, self.d_model + self.C), b) + message((tokens, self.h * (self.N + self.R + 1)), b)
        kept += (
            message((every, self.R + self.h * (self.N + self.V)), b) + self.norm.saved_bytes(own) + self.out.saved_bytes(tokens)
        )
        if self.norm_q is None:
            return kept
        return kept + message((own, len(self.norm_q.w_D.data)), b) + self.norm_q.saved_bytes(own)

    def later_bytes(self, batch: Batch) -> int:
        """What is kept where the products of weights are put off. The down-projections share x, this rank's rows of it, which
        is also what queries are projected from where they are not compressed."""
        tokens, rows, b, Q = batch.tokens, batch.rows, self.Wq_Qhn.data.itemsize, len(self.Wq_Qhn.data)
        shared = is_whole(rows) and self.Wdq_DQ is None
        queries = message((tokens, self.h * (self.N + self.R) + (0 if shared else Q)), b)
        keys = message((sum(batch.lengths), self.h * (self.N + self.V) + self.C), b)
        down = (held(tokens, rows, self.tp.rank), self.d_model + self.C + self.R + (0 if self.Wdq_DQ is None else Q))
        return queries + keys + message(down, b) + self.out.later_bytes(tokens)
