"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm (Ba et al., arXiv 1607.06450).

T tokens   D width   ... anything between, such as heads: the last dim is normed

The weights are whole on every rank. Where x is too, so is every gradient, and nothing is sent; where its rows are cut (t of T),
a rank's gradient is that of its own rows, and is `owed` a sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from layers.ops import BLOCK
from layers.work import Work, passes
from parallel.ledger import message
from parallel.parameter import Parameter, Weights
from parallel.shard import Layout


def _row_blocks(x: np.ndarray) -> Iterator[slice]:
    step = max(1, BLOCK // max(x[:1].size, 1))
    return (slice(t, t + step) for t in range(0, len(x), step))


def rms_norm(x: np.ndarray, w_D: np.ndarray, eps: float, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """y = w x r, r = 1 / sqrt(mean_D(x^2) + eps); returns y and r (..., 1). `out` may not be x."""
    if x.size <= BLOCK and out is None:
        # A step of decoding: no array is large enough to be worth a block.
        r = (1 / np.sqrt(np.vecdot(x, x) / x.shape[-1] + eps))[..., None].astype(x.dtype, copy=False)
        y = x * r
        y *= w_D
        return y, r
    y = np.empty_like(x) if out is None else out
    r = np.empty((*x.shape[:-1], 1), x.dtype)
    for at in _row_blocks(x):
        x_at, y_at, r_at = x[at], y[at], r[at]
        # vecdot: sums of products by the BLAS, without an array of the products.
        r_at[..., 0] = 1 / np.sqrt(np.vecdot(x_at, x_at) / x.shape[-1] + eps)
        np.multiply(x_at, r_at, out=y_at)
        y_at *= w_D
    return y, r


def rms_norm_backward(dy: np.ndarray, x: np.ndarray, r: np.ndarray, w_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dx = r (w dy - n mean_D(n w dy)), n = x r; dw = sum of n dy over all but the last dim. Returns dx and dw."""
    dx, dw_D = np.empty_like(x), np.zeros_like(w_D)
    for at in _row_blocks(x):
        n, g = x[at] * r[at], dx[at]
        np.multiply(n, dy[at], out=g)
        dw_D += g.reshape(-1, len(w_D)).sum(axis=0)
        np.multiply(dy[at], w_D, out=g)
        n *= (np.vecdot(n, g) / len(w_D))[..., None]
        g -= n
        g *= r[at]
    return dx, dw_D


class RMSNorm:
    """y = w x / sqrt(mean(x^2) + eps), each token by itself. Saved for backward: x and a number a token."""

    def __init__(self, weights: Weights, name: str, width: int, eps: float = 1e-5, owed: tuple[str, ...] = ()) -> None:
        self.eps, self.w_D = eps, weights.norm(f"w{name}", width, owed)

    @property
    def parameters(self) -> list[Parameter]:
        return [self.w_D]

    def forward(self, x_TD: np.ndarray) -> tuple[np.ndarray, tuple]:
        """x (T, D) -> y (T, D), saved."""
        y_TD, r_T1 = rms_norm(x_TD, self.w_D.data, self.eps)
        return y_TD, (x_TD, r_T1)

    def backward(self, dy_TD: np.ndarray, saved: tuple) -> np.ndarray:
        """dy (T, D), saved -> dx (T, D). Adds into the gradient."""
        x_TD, r_T1 = saved
        dx_TD, dw_D = rms_norm_backward(dy_TD, x_TD, r_T1, self.w_D.data)
        self.w_D.add_grad(dw_D)
        return dx_TD

    def work(self, tokens: int) -> list[Work]:
        """What forward and backward of `tokens` tokens compute."""
        n = tokens * len(self.w_D.data)
        return passes("rms norm", (n, n), (2 * n, n))

    def saved_bytes(self, tokens: int) -> int:
        return message((tokens, len(self.w_D.data) + 1), self.w_D.data.itemsize)


class LayerNorm:
    """y = w (x - mean) / sqrt(variance + eps) + b, each token by itself. Saved for backward: n = (x - mean) r, and r."""

    def __init__(self, weights: Weights, name: str, width: int, eps: float = 1e-5, owed: tuple[str, ...] = ()) -> None:
        self.eps = eps
        self.w_D, self.b_D = weights.norm(f"w{name}", width, owed), weights.bias(f"b{name}", Layout((width,)), {}, owed)

    @property
    def parameters(self) -> list[Parameter]:
        return [self.w_D, self.b_D]

    def forward(self, x_TD: np.ndarray) -> tuple[np.ndarray, tuple]:
        """x (T, D) -> y (T, D), saved."""
        y_TD, n_TD = np.empty_like(x_TD), np.empty_like(x_TD)
        r_T1 = np.empty((len(x_TD), 1), x_TD.dtype)
        mean_D = np.full(x_TD.shape[1], 1 / x_TD.shape[1], x_TD.dtype)
        for at in _row_blocks(x_TD):
            n, y, r = n_TD[at], y_TD[at], r_T1[at]
            np.subtract(x_TD[at], (x_TD[at] @ mean_D)[:, None], out=n)
            r[:, 0] = 1 / np.sqrt(np.vecdot(n, n) / x_TD.shape[1] + self.eps)
            n *= r
            np.multiply(n, self.w_D.data, out=y)
            y += self.b_D.data
        return y_TD, (n_TD, r_T1)

    def backward(self, dy_TD: np.ndarray, saved: tuple) -> np.ndarray:
        """dy (T, D), saved -> dx (T, D): r (g - mean(g) - n mean(g n)), g = w dy. Adds into the gradients."""
        n_TD, r_T1 = saved
        dx_TD, dw_D = np.empty_like(dy_TD), np.zeros_like(self.w_D.data)
        mean_D = np.full(dy_TD.shape[1], 1 / dy_TD.shape[1], dy_TD.dtype)
        for at in _row_blocks(dy_TD):
            n, g = n_TD[at], dx_TD[at]
            np.multiply(dy_TD[at], n, out=g)
            dw_D += g.sum(axis=0)
            np.multiply(dy_TD[at], self.w_D.data, out=g)
            along = np.vecdot(g, n) / g.shape[1]
            g -= (g @ mean_D)[:, None]
            g -= n * along[:, None]
            g *= r_T1[at]
        self.w_D.add_grad(dw_D)
        self.b_D.add_grad(dy_TD.sum(axis=0))
        return dx_TD

    def work(self, tokens: int) -> list[Work]:
        """What forward and backward of `tokens` tokens compute."""
        n = tokens * len(self.w_D.data)
        return passes("layer norm", (n, 2 * n), (2 * n, n))

    def saved_bytes(self, tokens: int) -> int:
        return message((tokens, len(self.w_D.data) + 1), self.w_D.data.itemsize)
