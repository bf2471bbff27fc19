"""Softmax attention in blocks that stay in the cache, never a whole score matrix (arXiv 2205.14135, 2112.05682).

    T query tokens   S key tokens   K key/value heads   g query heads that read one of them   E query and key width
    V value width   N key/value heads at once   Q queries of a block   R = Q g rows   C keys of a block   B sequences at once

All arrays are views with tokens first, of any stride: q (T, K, g, E), k (S, K, E), v (S, K, V), o (T, K, g, V), lse (T, K, g).
Memory grows with the tokens, not with their square: forward keeps only the output and the log-sum-exp of each row of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

import numpy as np

from layers.pieces import Span
from parallel.products import matmul

# Rows of scores and keys of a block: one float32 block is half of a core's L2 cache. Measured, with `launch.bench attention`.
ROWS, KEYS = 256, 512
# How far a score may exceed its row's base before exp: exp(60) times 1e12 is within float32's end.
HEADROOM = 60.0

# What a cache does for a layer: given what it keeps of each new token, it appends that and yields, for one sequence or several
# of as many new tokens each, where these are, what they must not see ((B, T, S): 0 or -inf; None for one sequence, which sees
# all that is before it), and what is kept of all their tokens, (B, S, ...).
Keep = Callable[..., Iterable[tuple]]


def head_chunks(span: Span, heads: int, group: int) -> Iterator[slice]:
    """Key/value heads to take at once: one where sequences are long, several where one would not fill a block."""
    queries, keys = (s.stop - s.start for s in span)
    entries = min(queries * group, ROWS) * min(keys, KEYS)
    at_once = max(1, ROWS * KEYS // max(entries, 1))
    return (slice(h, min(h + at_once, heads)) for h in range(0, heads, at_once))


def tiles(span: Span, group: int, causal: bool, window: int = 0) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of a sequence: queries, and the blocks of keys that they see, last first.

    Where causal, the last block of keys ends at the last query's own: in it every query sees a key, and what is hidden is a
    triangle at its end. Blocks beyond it are never looked at, nor those before the `window` of the first query.
    """
    queries, keys = span
    step, ahead = max(1, ROWS // group), keys.stop - queries.stop
    for first in range(queries.start, queries.stop, step):
        last = min(first + step, queries.stop)
        seen = ahead + last if causal else keys.stop
        begin = max(keys.start, ahead + first - window + 1) if window else keys.start
        yield slice(first, last), [slice(max(begin, end - KEYS), end) for end in range(seen, begin, -KEYS)]


def _rows(x_TKgE: np.ndarray, heads: slice, queries: slice) -> np.ndarray:
    """A block of queries as (N, R, E), contiguous: row by row, a query's heads side by side."""
    x_NQgE = x_TKgE[queries, heads].transpose(1, 0, 2, 3)
    N, Q, g, E = x_NQgE.shape
    return x_NQgE.reshape(N, Q * g, E)


def _as_rows(x_NRE: np.ndarray, group: int) -> np.ndarray:
    """A block of rows as (Q, N, g, E), a view."""
    N, R, E = x_NRE.shape
    return x_NRE.reshape(N, R // group, group, E).transpose(1, 0, 2, 3)


@cache
def _later(queries: int, dtype: np.dtype) -> np.ndarray:
    """(Q, 1, Q): -inf where the key is behind the query, else 0. Adding it is five times as fast as a masked write."""
    return np.triu(np.full((queries, queries), -np.inf, dtype), 1)[:, None]


def _hide(s_NRC: np.ndarray, queries: int) -> None:
    """Scores of the keys behind each query, in the block that ends at the last query's own key, become -inf."""
    N, R, C = s_NRC.shape
    s_NRC.reshape(N, queries, R // queries, C)[..., C - queries :] += _later(queries, s_NRC.dtype)


def _hide_old(s_NRC: np.ndarray, queries: int, seen: int) -> None:
    """Scores of the keys before each query's window become -inf: of the first query those before key `seen` of the block, of
    each next query one more."""
    N, R, C = s_NRC.shape
    if seen + queries - 1 > 0:
        old_QC = np.arange(C) < seen + np.arange(queries)[:, None]
        s_NRC.reshape(N, queries, R // queries, C)[...] += np.where(old_QC, -np.inf, 0).astype(s_NRC.dtype)[:, None]


def _room(group: int, dtype: np.dtype) -> np.ndarray:
    return np.empty(max(ROWS, group) * KEYS, dtype)


def _beside(x_NRE: np.ndarray, column_NR1: np.ndarray) -> np.ndarray:
    """[x | column]."""
    return np.concatenate([x_NRE, column_NR1], axis=-1)


def _beside_ones(x_SNE: np.ndarray) -> np.ndarray:
    """[x | 1] by heads, (N, S, E + 1): `[a | c] @ this^T` is a x^T + c, so that a row's c costs no pass over the scores."""
    S, N, E = x_SNE.shape
    x1_NSE = np.empty((N, S, E + 1), x_SNE.dtype)
    x1_NSE[..., :E] = x_SNE.transpose(1, 0, 2)
    x1_NSE[..., E] = 1
    return x1_NSE


def attend(
    q_TKgE: np.ndarray,
    k_SKE: np.ndarray,
    v_SKV: np.ndarray,
    o_TKgV: np.ndarray,
    lse_TKg: np.ndarray,
    sequences: Sequence[Span],
    scale: float,
    causal: bool = True,
    more: bool = False,
    window: int = 0,
) -> None:
    """Write o = softmax(scale q k^T) v of each span, and the log-sum-exp of its rows of scores.

    Block by block, with a running base m, sum l and output o of each row (Milakov and Gimelshein, arXiv 1805.02867). A row's
    base is the score of the query's own key (of the first one, where none is hidden), and the product itself takes it off; it
    rises to a block's maximum only where that exceeds it by more than HEADROOM, so that most blocks need no pass for it. l is
    at least exp(-HEADROOM), p finite.

    `more`: these keys are added to what o and lse already hold; a row's base is then its lse, and no key is hidden. `window`:
    where causal, how many keys a query sees at most, its own among them; 0: all before it.
    """
    K, g, E = q_TKgE.shape[1:]
    room, ones_C, scale = _room(g, q_TKgE.dtype), np.ones(KEYS, q_TKgE.dtype), q_TKgE.dtype.type(scale)
    for span in sequences:
        start, before = span[1].start, span[1].stop - span[0].stop
        for heads in head_chunks(span, K, g):
            k1_NSE = _beside_ones(k_SKE[span[1], heads])
            for queries, blocks in tiles(span, g, causal, window):
                q_NRE = _rows(q_TKgE, heads, queries) * scale
                N, R, _ = q_NRE.shape
                if more:
                    m_NR1, o_NRV = _rows(lse_TKg[..., None], heads, queries).copy(), _rows(o_TKgV, heads, queries).copy()
                    l_NR1 = np.ones_like(m_NR1)
                else:
                    own = np.s_[queries.start + before - start : queries.stop + before - start] if causal else np.s_[:1]
                    m_NR1 = np.vecdot(q_NRE.reshape(N, R // g, g, E), k1_NSE[:, own, None, :E]).reshape(N, R, 1)
                    l_NR1, o_NRV = np.zeros_like(m_NR1), np.zeros((N, R, v_SKV.shape[-1]), q_NRE.dtype)
                q_NRE = _beside(q_NRE, -m_NR1)
                for keys in blocks:
                    C = keys.stop - keys.start
                    s_NRC = room[: N * R * C].reshape(N, R, C)
                    matmul(q_NRE, k1_NSE[:, keys.start - start : keys.stop - start].transpose(0, 2, 1), out=s_NRC)
                    if causal and keys is blocks[0]:
                        _hide(s_NRC, R // g)
                    if window:
                        _hide_old(s_NRC, R // g, queries.start + before - window + 1 - keys.start)
                    if s_NRC.max() > HEADROOM:
                        rise_NR1 = np.maximum(s_NRC.max(axis=-1, keepdims=True), 0)
                        s_NRC -= rise_NR1
                        shrink_NR1 = np.exp(-rise_NR1)
                        l_NR1 *= shrink_NR1
                        o_NRV *= shrink_NR1
                        m_NR1 += rise_NR1
                        q_NRE[..., E:] = -m_NR1
                    p_NRC = np.exp(s_NRC, out=s_NRC)
                    l_NR1 += (p_NRC @ ones_C[:C])[..., None]
                    o_NRV += matmul(p_NRC, v_SKV[keys, heads].transpose(1, 0, 2))
                o_NRV /= l_NR1
                o_TKgV[queries, heads] = _as_rows(o_NRV, g)
                lse_TKg[queries, heads] = _as_rows(m_NR1 + np.log(l_NR1), g)[..., 0]


def merge(*parts: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(o (..., V), lse (...)) over all keys, from those over parts of them: a part without keys has an lse of -inf.

    lse = log sum_r exp(lse_r);  o = sum_r exp(lse_r - lse) o_r
    """
    o_pV, lse_p = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    top = lse_p.max(axis=0)
    weight_p = np.exp(lse_p - np.where(np.isfinite(top), top, 0))
    total = weight_p.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        o = np.where(total[..., None] > 0, (weight_p[..., None] * o_pV).sum(axis=0) / total[..., None], 0)
        return o.astype(o_pV.dtype, copy=False), top + np.log(total)


# Rows of scores that are computed at once where there are so few of them: a step of decoding, a verified draft.
FEW = 64


def attend_cached(
    q_BTKgE: np.ndarray,
    k_BSKE: np.ndarray,
    v_BSKV: np.ndarray,
    o_BTKgV: np.ndarray,
    scale: float,
    hidden_BTS: np.ndarray | None = None,
    lse_BTKg: np.ndarray | None = None,
    window: int = 0,
) -> None:
    """Write o = softmax(scale q k^T + hidden) v of sequences of T new tokens each; and, if asked, the log-sum-exp.

    `hidden`: 0, or -inf where a query must not look; None for one sequence, whose queries are the last of its S keys and see
    the `window` last ones (0: all). Few queries take their keys in one go: no copy of the cache, memory of T g S a head.
    """
    B, T, K, g, E = q_BTKgE.shape
    R = T * g
    if hidden_BTS is None and R > FEW:
        lse_BTKg = np.empty((B, T, K, g), q_BTKgE.dtype) if lse_BTKg is None else lse_BTKg
        span = slice(0, T), slice(0, k_BSKE.shape[1])
        attend(q_BTKgE[0], k_BSKE[0], v_BSKV[0], o_BTKgV[0], lse_BTKg[0], [span], scale, window=window)
        return
    q_BKRE = q_BTKgE.transpose(0, 2, 1, 3, 4).reshape(B, K, R, E) * q_BTKgE.dtype.type(scale)
    s_BKRS = matmul(q_BKRE, k_BSKE.transpose(0, 2, 3, 1))
    if hidden_BTS is not None:
        s_BKRS.reshape(B, K, T, g, -1)[...] += hidden_BTS[:, None, :, None]
    elif T > 1:
        _hide(s_BKRS[0], T)
    if window and hidden_BTS is None:
        _hide_old(s_BKRS[0], T, k_BSKE.shape[1] - T - window + 1)
    m_BKR1 = s_BKRS.max(axis=-1, keepdims=True)
    s_BKRS -= m_BKR1
    p_BKRS = np.exp(s_BKRS, out=s_BKRS)
    l_BKR1 = p_BKRS.sum(axis=-1, keepdims=True)
    o_BKRV = matmul(p_BKRS, v_BSKV.transpose(0, 2, 1, 3))
    o_BKRV /= l_BKR1
    o_BTKgV[...] = o_BKRV.reshape(B, K, T, g, -1).transpose(0, 2, 1, 3, 4)
    if lse_BTKg is not None:
        lse_BTKg[...] = (m_BKR1 + np.log(l_BKR1)).reshape(B, K, T, g).transpose(0, 2, 1, 3)


def attend_backward(
    do_TKgV: np.ndarray,
    q_TKgE: np.ndarray,
    k_SKE: np.ndarray,
    v_SKV: np.ndarray,
    o_TKgV: np.ndarray,
    lse_TKg: np.ndarray,
    dq_TKgE: np.ndarray,
    dk_SKE: np.ndarray,
    dv_SKV: np.ndarray,
    sequences: Sequence[Span],
    scale: float,
    causal: bool = True,
    window: int = 0,
) -> None:
    """Add into dq, dk and dv, the scores computed again from q, k and the log-sum-exp:

    p   = exp(scale q k^T - lse)
    dv  = p^T do
    ds  = p * (do v^T - sum_V(do * o))      the gradient of softmax: its row sum is already in o
    dq  = scale ds k
    dk  = scale ds^T q
    """
    K, g, E = q_TKgE.shape[1:]
    V = v_SKV.shape[-1]
    rooms = [_room(g, q_TKgE.dtype) for _ in range(2)]
    scale = q_TKgE.dtype.type(scale)
    for span in sequences:
        start, before = span[1].start, span[1].stop - span[0].stop
        for heads in head_chunks(span, K, g):
            k1_NSE, v1_NSV = _beside_ones(k_SKE[span[1], heads]), _beside_ones(v_SKV[span[1], heads])
            dk_NSE, dv_NSV = np.zeros_like(k1_NSE[..., :E]), np.zeros_like(v1_NSV[..., :V])
            for queries, blocks in tiles(span, g, causal, window):
                do_NRV = _rows(do_TKgV, heads, queries)
                delta_NR1 = np.vecdot(do_NRV, _rows(o_TKgV, heads, queries))[..., None]
                q_NRE = _beside(_rows(q_TKgE, heads, queries) * scale, -_rows(lse_TKg[..., None], heads, queries))
                do_NRV = _beside(do_NRV, -delta_NR1)
                N, R, _ = q_NRE.shape
                dq_NRE = np.zeros((N, R, E), q_NRE.dtype)
                for keys in blocks:
                    C = keys.stop - keys.start
                    at = np.s_[:, keys.start - start : keys.stop - start]
                    p_NRC, ds_NRC = (room[: N * R * C].reshape(N, R, C) for room in rooms)
                    matmul(q_NRE, k1_NSE[at].transpose(0, 2, 1), out=p_NRC)
                    if causal and keys is blocks[0]:
                        _hide(p_NRC, R // g)
                    if window:
                        _hide_old(p_NRC, R // g, queries.start + before - window + 1 - keys.start)
                    np.exp(p_NRC, out=p_NRC)
                    dv_NSV[at] += matmul(p_NRC.transpose(0, 2, 1), do_NRV[..., :V])
                    matmul(do_NRV, v1_NSV[at].transpose(0, 2, 1), out=ds_NRC)
                    ds_NRC *= p_NRC
                    dq_NRE += matmul(ds_NRC, k1_NSE[*at, :E])
                    dk_NSE[at] += matmul(ds_NRC.transpose(0, 2, 1), q_NRE[..., :E])
                dq_NRE *= scale
                dq_TKgE[queries, heads] += _as_rows(dq_NRE, g)
            dk_SKE[span[1], heads] += dk_NSE.transpose(1, 0, 2)
            dv_SKV[span[1], heads] += dv_NSV.transpose(1, 0, 2)
