"""Softmax cross-entropy, over whole logits and over logits cut by vocabulary.

T tokens (or images)   V vocabulary (or classes)   v this rank's share of V over tp
"""

from __future__ import annotations

import numpy as np

from layers.work import Work, passes
from parallel.axis import Axis
from parallel.ledger import Traffic, message
from parallel.shard import Cut


def cross_entropy(logits_TV: np.ndarray, targets_T: np.ndarray) -> tuple[float, tuple]:
    """The mean of -log softmax(logits)[target], in nats, and what backward needs. targets: integers in 0..V-1."""
    shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    exp_TV = np.exp(shifted_TV)
    sum_T = exp_TV.sum(axis=1)
    rows_T = np.arange(len(targets_T))
    loss = float(np.mean(np.log(sum_T) - shifted_TV[rows_T, targets_T]))
    return loss, (exp_TV / sum_T[:, None], targets_T)


def cross_entropy_backward(saved: tuple) -> np.ndarray:
    """dlogits (T, V) of the mean: (softmax - one-hot) / T."""
    p_TV, targets_T = saved
    dlogits_TV = p_TV.copy()
    dlogits_TV[np.arange(len(targets_T)), targets_T] -= 1
    dlogits_TV /= len(targets_T)
    return dlogits_TV


class VocabParallelCrossEntropy:
    """nll = log sum_V exp(logits) - logits[target], logits cut along V and never gathered (arXiv 1909.08053, section 3).

        top_T           = all_reduce(max_v logits_Tv, "max")
        p_Tv            = exp(logits_Tv - top_T)
        sum_T, picked_T = all_reduce([sum_v p_Tv, (logits_Tv - top_T)[target], 0 where another rank has it])
        nll_T           = log(sum_T) - picked_T
        dlogits_Tv      = dnll_T (p_Tv / sum_T - one-hot(target))          nothing to send

    Two collectives of T and 2 T numbers, where gathering logits would take T V. `cut`: of V over tp. A target of -1 is not
    counted: its nll is 0. Saved for backward: p, the sums and the targets.
    """

    def __init__(self, tp: Axis, cut: Cut) -> None:
        self.tp, self.cut = tp, cut

    def forward(self, logits_Tv: np.ndarray, targets_T: np.ndarray) -> tuple[np.ndarray, tuple]:
        """logits (T, v), targets (T,) -> nll (T,) in nats, saved."""
        first, last = self.cut.bounds[self.tp.rank]
        here = np.flatnonzero((targets_T >= first) & (targets_T < last))
        top_T = self.tp.all_reduce(logits_Tv.max(axis=1), "max")
        p_Tv = logits_Tv - top_T[:, None]
        sum_picked_2T = np.zeros((2, len(targets_T)), logits_Tv.dtype)
        sum_picked_2T[1, here] = p_Tv[here, targets_T[here] - first]
        np.exp(p_Tv, out=p_Tv)
        sum_picked_2T[0] = p_Tv.sum(axis=1)
        sum_T, picked_T = self.tp.all_reduce(sum_picked_2T)
        nll_T = np.where(targets_T < 0, 0, np.log(sum_T) - picked_T).astype(logits_Tv.dtype)
        return nll_T, (p_Tv, sum_T, targets_T)

    def backward(self, dnll_T: np.ndarray, saved: tuple) -> np.ndarray:
        """dnll (T,), saved -> dlogits (T, v). With dnll = 1 / (tokens of the whole batch), of the mean."""
        p_Tv, sum_T, targets_T = saved
        first, last = self.cut.bounds[self.tp.rank]
        here = np.flatnonzero((targets_T >= first) & (targets_T < last))
        counted_T = np.where(targets_T < 0, 0, dnll_T).astype(p_Tv.dtype)
        dlogits_Tv = p_Tv * (counted_T / sum_T)[:, None]
        dlogits_Tv[here, targets_T[here] - first] -= counted_T[here]
        return dlogits_Tv

    def traffic(self, tokens: int, itemsize: int) -> list[Traffic]:
        """What forward and backward of `tokens` tokens send."""
        sent = lambda n: Traffic("all_reduce", self.tp.name, "forward", message((n, tokens), itemsize))  # noqa: E731
        return [sent(1), sent(2)]

    def work(self, tokens: int) -> list[Work]:
        """What forward and backward of `tokens` tokens compute."""
        n = tokens * self.cut.size(self.tp.rank)
        return passes("loss", (n, n), (n, n))

    def saved_bytes(self, tokens: int, itemsize: int) -> int:
        """The targets are the batch's and are not counted."""
        return message((tokens, self.cut.size(self.tp.rank) + 1), itemsize)
