"""Which experts serve a token, and with what weight.

T tokens   D model width   X experts   A experts active for a token
"""

from __future__ import annotations

import numpy as np

from layers.work import Work, linear, passes
from parallel.later import Later
from parallel.ledger import message
from parallel.parameter import Weights
from parallel.products import matmul
from parallel.shard import Layout

# DeepSeek adds it to the sum of the chosen scores, as sigmoids may all be 0; of a softmax's it does not change a bit.
TINY = 1e-20


class Router:
    """Which experts serve a token and what each weighs: whole on every rank, and so are its gradients, unless they are `owed`.

        s_TX  = softmax(x_TD @ Wr_DX), or the sigmoid
        c_TA  = the best by s_TX + br_X, among the experts of the best groups; of equals the lower index
        g_TA  = scale s_TA / sum_A s_TA                    s_TA those chosen, without br; not normed: scale s_TA
        ds_TA = (scale dg_TA - sum_A g dg) / sum_A s_TA    not normed: scale dg_TA
        dz_TX = s (ds - sum_X s ds), or s (1 - s) ds       ds is 0 where an expert was not chosen
        dWr_DX += x_TD^T @ dz_TX
        dx_TD = dz_TX @ Wr_DX^T

    The options are those of `MoE`. br, the correction, is a buffer: whoever trains sets it from the experts' load
    (arXiv 2408.15664), as a choice has no gradient. Saved for backward: s, c and g; x is the caller's.
    """

    def __init__(
        self,
        weights: Weights,
        d_model: int,
        count: int,
        active: int,
        scoring: str = "softmax",
        normed: bool = True,
        scale: float = 1.0,
        correction: bool = False,
        groups: int = 1,
        active_groups: int = 1,
        group_top: int = 1,
        owed: tuple[str, ...] = (),
    ) -> None:
        if scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown scoring {scoring!r}: use 'softmax' or 'sigmoid'")
        if groups < 1 or count % groups:
            raise ValueError(f"cannot put {count} experts into {groups} groups: use a divisor of {count}")
        if not 1 <= active_groups <= groups:
            raise ValueError(f"cannot choose {active_groups} of {groups} groups: use 1 to {groups}")
        if not 1 <= group_top <= count // groups:
            raise ValueError(f"cannot add the best {group_top} of a group's {count // groups}: use 1 to {count // groups}")
        if not 1 <= active <= active_groups * count // groups:
            most = active_groups * count // groups
            raise ValueError(f"cannot choose {active} of {most} experts ({active_groups} of {groups} groups): use 1 to {most}")
        self.count, self.active, self.sigmoid, self.normed, self.scale = count, active, scoring == "sigmoid", normed, scale
        self.groups, self.active_groups, self.group_top = groups, active_groups, group_top
        self.Wr_DX = weights.matrix("Wr", Layout((d_model, count)), {}, d_model, owed=owed)
        self.br_X = weights.bias("br", Layout((count,)), {}) if correction else None

    def forward(self, x_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple]:
        """x (T, D) -> c (T, A) and g (T, A), best first, and what is saved."""
        s_TX = self._scores(matmul(x_TD, self.Wr_DX.data))
        c_TA = self._choice(s_TX if self.br_X is None else s_TX + self.br_X.data)
        s_TA = np.take_along_axis(s_TX, c_TA, axis=1)
        g_TA = self.scale * (s_TA / self._sum(s_TA) if self.normed else s_TA)
        return c_TA, g_TA, (s_TX, c_TA, g_TA)

    def backward(
        self, dg_TA: np.ndarray, x_TD: np.ndarray, saved: tuple, later: Later | None = None, dn_TX: np.ndarray | None = None
    ) -> np.ndarray:
        """dg (T, A), summed over the ranks, x, saved -> dx (T, D), the same on every rank. Adds into the gradients. `dn`: the
        gradient of the scores divided by their sum, if a loss has one."""
        s_TX, c_TA, g_TA = saved
        s_TA = np.take_along_axis(s_TX, c_TA, axis=1)
        ds_TA = self.scale * dg_TA
        if self.normed:
            ds_TA = (ds_TA - np.vecdot(g_TA, dg_TA)[:, None]) / self._sum(s_TA)
        sds_TA = s_TA * ds_TA
        if self.sigmoid:
            dz_TX, dz_TA = np.zeros_like(s_TX), (1 - s_TA) * sds_TA
        else:
            dz_TX = -s_TX * sds_TA.sum(axis=1, keepdims=True)
            dz_TA = np.take_along_axis(dz_TX, c_TA, axis=1) + sds_TA
        np.put_along_axis(dz_TX, c_TA, dz_TA, axis=1)
        if dn_TX is not None:
            dz_TX += self._balance_backward(dn_TX, s_TX)
        self.Wr_DX.add_grad_product(x_TD, dz_TX, later)
        return matmul(dz_TX, self.Wr_DX.data.T)

    @staticmethod
    def shares(s_TX: np.ndarray) -> np.ndarray:
        """A token's scores, divided by their sum over all experts."""
        return s_TX / s_TX.sum(axis=1, keepdims=True)

    def _balance_backward(self, dn_TX: np.ndarray, s_TX: np.ndarray) -> np.ndarray:
        """From the gradient of `shares` to that of what the scores are made of."""
        n_TX = self.shares(s_TX)
        ndn_TX = n_TX * (dn_TX - np.vecdot(n_TX, dn_TX)[:, None])
        # Softmax's shares are its scores; d s / d z of the sigmoid is s (1 - s), and the sum falls out of n.
        return ndn_TX * (1 - s_TX) if self.sigmoid else ndn_TX

    def _scores(self, z_TX: np.ndarray) -> np.ndarray:
        if not self.sigmoid:
            s_TX = np.exp(z_TX - z_TX.max(axis=1, keepdims=True))
            return s_TX / s_TX.sum(axis=1, keepdims=True)
        # Not by tanh, as in ops: small scores are divided by their sum, so that their relative error counts.
        e_TX = np.exp(-np.abs(z_TX))
        return np.where(z_TX < 0, e_TX, 1) / (1 + e_TX)

    def _choice(self, worth_TX: np.ndarray) -> np.ndarray:
        """The experts (T, A) worth most, best first."""
        if self.active_groups < self.groups:
            # G groups of W experts.
            worth_TGW = worth_TX.reshape(len(worth_TX), self.groups, self.count // self.groups).copy()
            worth_TG = np.sort(worth_TGW, axis=2)[..., -self.group_top :].sum(axis=2)
            dropped = np.argsort(-worth_TG, axis=1, kind="stable")[:, self.active_groups :]
            np.put_along_axis(worth_TGW, dropped[..., None], -np.inf, axis=1)
            worth_TX = worth_TGW.reshape(worth_TX.shape)
        return np.argsort(-worth_TX, axis=1, kind="stable")[:, : self.active].copy()

    @staticmethod
    def _sum(s_TA: np.ndarray) -> np.ndarray:
        return s_TA.sum(axis=1, keepdims=True) + TINY

    def work(self, tokens: int, own: int) -> list[Work]:
        """What forward of `tokens` tokens, and backward of this rank's own of them, compute."""
        D, X = self.Wr_DX.data.shape
        back = [w for w in linear(own, D, X) if w.phase != "forward"]
        return [*linear(tokens, D, X)[:1], *back, *passes("router", (tokens * X, tokens * X), (own * X, own * X))]

    def saved_bytes(self, tokens: int) -> int:
        chosen = message((tokens, self.active), np.dtype(np.intp).itemsize)
        return chosen + message((tokens, self.count + self.active), self.Wr_DX.data.itemsize)

    def later_bytes(self, tokens: int) -> int:
        """What is kept, beside x, where the product of the weights is put off."""
        return message((tokens, self.count), self.Wr_DX.data.itemsize)
