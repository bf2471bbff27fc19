"""Attention within a window, block by block, beside whole matrices of scores."""

import numpy as np
import pytest

from layers.attend import KEYS, ROWS, attend, attend_backward, attend_cached
from layers.work import attended, products
from parallel.products import counted

K, G, E = 2, 3, 4


def dense(q, k, v, scale, window):
    """o (T, K, G, E), p (K, G, T, S): by a mask over all scores. The queries are the last of the keys."""
    T, S = len(q), len(k)
    own = np.arange(S - T, S)[:, None]
    seen = (np.arange(S) <= own) & (np.arange(S) > own - window)
    s = np.where(seen, scale * np.einsum("tkge,ske->kgts", q, k), -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return np.einsum("kgts,ske->tkge", p, v), p


def drawn(T, S, seed=0):
    random = np.random.default_rng(seed)
    return [2 * random.standard_normal(shape) for shape in ((T, K, G, E), (S, K, E), (S, K, E), (T, K, G, E))]


@pytest.mark.parametrize("window", [1, 5, ROWS // G, KEYS, KEYS + 40, 2000])
def test_forward_and_backward_are_those_of_a_mask(window):
    """Two sequences, the second with keys before its queries, both longer than the blocks."""
    lengths, S = [(700, 700), (90, 650)], 1350
    q, k, v, do = drawn(790, S)
    spans = [(slice(0, 700), slice(0, 700)), (slice(700, 790), slice(700, 1350))]
    o, lse = np.empty_like(q), np.empty(q.shape[:3])
    grads = [np.zeros_like(a) for a in (q, k, v)]
    with counted() as made:
        attend(q, k, v, o, lse, spans, 0.7, window=window)
        attend_backward(do, q, k, v, o, lse, *grads, spans, 0.7, window=window)
    assert made == products(attended([(spans, True)], [(K, G)], E, E, window))
    for (queries, keys), (T, n) in zip(spans, lengths, strict=True):
        want, p = dense(q[queries], k[keys], v[keys], 0.7, window)
        assert p.shape[2:] == (T, n)
        np.testing.assert_allclose(o[queries], want, rtol=0, atol=1e-13)
        dp = np.einsum("tkge,ske->kgts", do[queries], v[keys])
        ds = 0.7 * p * (dp - (p * dp).sum(axis=-1, keepdims=True))
        wanted = np.einsum("kgts,ske->tkge", ds, k[keys]), np.einsum("kgts,tkge->ske", ds, q[queries])
        for got, w in zip((grads[0][queries], grads[1][keys]), wanted, strict=True):
            np.testing.assert_allclose(got, w, rtol=0, atol=1e-11)
        np.testing.assert_allclose(grads[2][keys], np.einsum("kgts,tkge->ske", p, do[queries]), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("T", "S", "window"), [(1, 30, 7), (8, 30, 7), (8, 8, 3), (5, 9, 20), (200, 300, 33)])
def test_few_queries_and_many(T, S, window):
    q, k, v, _ = drawn(T, S, 1)
    o = np.empty((1, *q.shape))
    attend_cached(q[None], k[None], v[None], o, 0.7, window=window)
    np.testing.assert_allclose(o[0], dense(q, k, v, 0.7, window)[0], rtol=0, atol=1e-13)
