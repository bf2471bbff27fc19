"""What speculative decoding gains (Leviathan, Kalman and Matias, arXiv 2211.17192, section 3).

A draft of gamma tokens from q is verified in one run of the target p; each draft is accepted with probability min(1, p/q), up to
the first that is not; one token comes in any case (the replacement, or a bonus after gamma). One run of the draft model takes c
times as long as one of the target, which takes the same for gamma + 1 tokens as for 1. Acceptances are independent.
Numbers in, numbers out; alpha may be 0 and 1.
"""

import numpy as np


def alpha(p_V, q_V):
    """Probability that a token drawn from q is accepted, p (V), q (V)."""
    # --- yours ---
    both_V = np.minimum(p_V, q_V)
    return float(both_V.sum())
    # --- end ---


def expected_tokens(alpha, gamma):
    """Mean number of tokens from one run of the target; each draft is accepted with probability alpha."""
    # --- yours ---
    tokens = gamma + 1
    if alpha == 1:
        return float(tokens)
    return (1 - alpha**tokens) / (1 - alpha)
    # --- end ---


def speedup(alpha, gamma, c):
    """How many times faster than the target alone."""
    # --- yours ---
    tokens = expected_tokens(alpha, gamma)
    cost = gamma * c + 1
    return tokens / cost
    # --- end ---


def best_gamma(alpha, c):
    """The gamma of 0, 1, ..., 64 with the largest speed-up; the smallest, if several have it. 0: do not speculate."""
    # --- yours ---
    gains = [speedup(alpha, gamma, c) for gamma in range(65)]
    return int(np.argmax(gains))
    # --- end ---
