"""The rule of speculative decoding (Leviathan, Kalman and Matias, arXiv 2211.17192): which drafted tokens are accepted.

    g drafted tokens (gamma)   p, q the target's and the draft's distribution, after temperature and filters   v a rank's ids

A drafted token x is accepted with probability min(1, p(x) / q(x)). The first rejected one is drawn again from the residual
norm(max(0, p - q)); if all are accepted, one more is drawn from p. What comes out is distributed as the target's own tokens,
whatever the draft. Only one rank has a token's p and q, and sends them to all. Greedy is the case of one-hot p and q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inference.sampling import NotFinite, Sampler, Sampling, uniform

MOST = 8


def log_acceptance(log_p: float, log_q: float) -> float:
    """log min(1, p / q) of a token that was drawn from q, so that q is not 0."""
    return min(0.0, log_p - log_q)


def residual(sampler: Sampler, log_p_v: np.ndarray, log_q_v: np.ndarray) -> np.ndarray:
    """log of norm(max(0, p - q)) at this rank's ids. The sum is 1 - sum min(p, q), and 0 only if nothing can be rejected."""
    rest_v = np.maximum(np.exp(log_p_v) - np.exp(log_q_v), 0)
    with np.errstate(divide="ignore"):
        log_rest_v = np.log(rest_v)
    return log_rest_v - sampler.log_normaliser(log_rest_v)


@dataclass(frozen=True)
class Drafted:
    """Tokens, and the distribution that each was drawn from: log q at this rank's ids, or None if the token was certain."""

    tokens: list[int]
    log_q: list[np.ndarray | None]


def matched(best: list[int], drafted: Sequence[int]) -> list[int]:
    """The greedy case: of the best token of each row, as many as equal the drafted ones, and one more."""
    same = [a == b for a, b in zip(best, drafted, strict=False)]
    return best[: (same.index(False) if False in same else len(same)) + 1]


def verified(
    sampler: Sampler,
    logits_gv: np.ndarray,
    drafted: Drafted,
    sampling: Sampling,
    request: int,
    position: int,
) -> list[int]:
    """The tokens of a round, from the target's logits of g + 1 rows: the accepted ones and one more.

    Raises NotFinite where a token is to be chosen by numbers that are none.

    `position`: that of the first. Random numbers are functions of (seed, request, position), the same on every rank.
    """
    if sampling.temperature == 0:
        best, ranks = sampler.best_or_none(logits_gv)
        tokens = matched(best.tolist(), drafted.tokens)
        if (last := len(tokens) - 1) in ranks:
            raise NotFinite(ranks[last], request, position + last)
        return tokens
    tokens = []
    for i, (x, log_q_v) in enumerate(zip(drafted.tokens, drafted.log_q, strict=True)):
        log_p_v = _filtered(sampler, logits_gv[i], sampling, request, position + i)
        log_q_v = sampler.certain(x) if log_q_v is None else log_q_v
        log_p, log_q = sampler.of_token(np.stack([log_p_v, log_q_v], axis=1), x)
        if np.log(uniform(sampling.seed, request, position + i)) < log_acceptance(log_p, log_q):
            tokens.append(x)
            continue
        left_v = residual(sampler, log_p_v, log_q_v)
        return [*tokens, sampler.draw(left_v, sampling, request, position + i, "residual")]
    log_p_v = _filtered(sampler, logits_gv[-1], sampling, request, position + len(tokens))
    return [*tokens, sampler.draw(log_p_v, sampling, request, position + len(tokens))]


def _filtered(sampler: Sampler, logits_v: np.ndarray, sampling: Sampling, request: int, position: int) -> np.ndarray:
    try:
        return sampler.filtered(logits_v, sampling)
    except NotFinite as error:
        raise error.at(request, position) from None
