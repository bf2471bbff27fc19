"""Sliding window attention with sinks, whole and with a rolling cache (Longformer, 2004.05150; StreamingLLM, 2309.17453).

Query i sees key j <= i if j is one of the last `window` tokens, i itself among them, or one of the first `sinks` tokens; a key that
is both counts once. Scores are q k / sqrt(E), and may be as large as 1e4.
prefill has all T tokens at once and makes no T x T array of numbers. The cache has room for sinks + window tokens, for ever: a new token
takes the place of the one that nobody will see any more, the first `sinks` tokens stay where they are. append writes into the arrays
that were made once and moves nothing else; what was never written is NaN. attend is the newest token's query: what it gives is what
prefill gives for it.
H heads of width E; window >= 1, sinks >= 0. Keep the dtype; leave the arguments as they are.
"""

import math

import numpy as np


def mask(T, window, sinks):
    """-> (T, T) of bool: whether query i (row) sees key j (column)."""
    # --- yours ---
    i_T1, j_1T = np.arange(T)[:, None], np.arange(T)[None, :]
    near_TT = i_T1 - j_1T < window
    sink_TT = j_1T < sinks
    return (j_1T <= i_T1) & (near_TT | sink_TT)
    # --- end ---


def prefill(q_THE, k_THE, v_THE, window, sinks):
    """q, k, v (T, H, E) -> o (T, H, E)."""
    # --- yours ---
    scale = 1 / math.sqrt(q_THE.shape[2])
    o_THE = np.empty(q_THE.shape, q_THE.dtype)
    for i, q_HE in enumerate(q_THE):
        first = max(0, i + 1 - window)
        seen = [*range(min(sinks, first)), *range(first, i + 1)]
        s_HS = np.einsum("he,she->hs", q_HE, k_THE[seen]) * scale
        w_HS = np.exp(s_HS - s_HS.max(axis=1, keepdims=True))
        p_HS = w_HS / w_HS.sum(axis=1, keepdims=True)
        o_THE[i] = np.einsum("hs,she->he", p_HS, v_THE[seen])
    return o_THE
    # --- end ---


class Cache:
    def __init__(self, heads, width, window, sinks, dtype):
        """Given. `length` counts all tokens that ever came."""
        self.window, self.sinks, self.length = window, sinks, 0
        self.k_HSE = np.full((heads, sinks + window, width), np.nan, dtype)
        self.v_HSE = np.full((heads, sinks + window, width), np.nan, dtype)

    def slot(self, n):
        """The place of token n (from 0): its own number as long as there is room, then that of the token it replaces."""
        # --- yours ---
        if n < self.sinks:
            return n
        return self.sinks + (n - self.sinks) % self.window
        # --- end ---

    def append(self, k_HE, v_HE):
        """The next token's key and value (H, E)."""
        # --- yours ---
        at = self.slot(self.length)
        self.k_HSE[:, at] = k_HE
        self.v_HSE[:, at] = v_HE
        self.length += 1
        # --- end ---

    def attend(self, q_HE):
        """The newest token's query (H, E) -> o (H, E)."""
        # --- yours ---
        held = min(self.length, self.sinks + self.window)
        k_HSE, v_HSE = self.k_HSE[:, :held], self.v_HSE[:, :held]
        s_HS = np.einsum("he,hse->hs", q_HE, k_HSE) / math.sqrt(q_HE.shape[1])
        w_HS = np.exp(s_HS - s_HS.max(axis=1, keepdims=True))
        p_HS = w_HS / w_HS.sum(axis=1, keepdims=True)
        return np.einsum("hs,hse->he", p_HS, v_HSE)
        # --- end ---
