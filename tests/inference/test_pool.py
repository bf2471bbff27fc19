"""Arrays in blocks: what is read is what was written, by one sequence or several at once; and what a row costs."""

from itertools import pairwise

import numpy as np
import pytest

from inference.drafting import cost
from inference.pool import BLOCK, Extent, Pool, bundled
from layers.attend import attend_cached


def test_a_pool_reads_what_was_written():
    pool = Pool([[(2,), (3, 2)]], "float64")
    pool.hold(5)
    new = [np.arange(2 * n * BLOCK, dtype=float).reshape(-1, *s) for n, s in ((1, (2,)), (3, (3, 2)))]
    extents = [Extent(3, BLOCK - 1, [4, 1]), Extent(0, 1, [2])]
    (store,) = pool.stores(extents)
    pieces = list(store(*new))
    assert [p[0] for p in pieces] == [slice(0, BLOCK - 1), slice(BLOCK - 1, BLOCK)]
    for (at, hidden, *held), (first, _, _) in zip(pieces, extents, strict=True):
        assert hidden is None
        for a, b in zip(held, new, strict=True):
            np.testing.assert_array_equal(a[0, first:], b[at])
    pool.copy(4, 0)
    pool.hold(9)
    np.testing.assert_array_equal(pool.read(0, np.array([[0, 1]]), 3 + BLOCK - 1)[0][0, 3:], new[0][: BLOCK - 1])


@pytest.mark.parametrize("tokens", [1, 3])
def test_sequences_read_at_once_get_what_each_gets_alone(tokens):
    rng = np.random.default_rng(4)
    pool = Pool([[(2, 5), (2, 4)]], "float64", 16)
    # What stands behind a sequence's end is another's.
    everywhere = np.divmod(np.arange(16 * BLOCK), BLOCK)
    pool.write(0, *everywhere, [np.full((16 * BLOCK, *shape), np.nan) for shape in pool.shapes[0]])
    lengths, tables = [5, 17, 40, 33, 3], [[3], [5, 1], [0, 8, 9], [15, 2, 4], [7]]
    kept = [[rng.normal(size=(n, *shape)) for shape in pool.shapes[0]] for n in lengths]
    for n, table, (k, v) in zip(lengths, tables, kept, strict=True):
        at = np.arange(n)
        pool.write(0, np.array(table)[at // BLOCK], at % BLOCK, [k, v])
    extents = [Extent(n - tokens, tokens, table) for n, table in zip(lengths, tables, strict=True)]
    assert [len(bundle) for bundle in bundled(extents)] == [4, 1]
    new = [np.concatenate([both[i][-tokens:] for both in kept]) for i in (0, 1)]
    q = 3 * rng.normal(size=(5, tokens, 2, 3, 5))
    got, want = np.full((2, 5 * tokens, 2, 3, 4), np.nan)
    (store,) = pool.stores(extents)
    for at, hidden, k, v in store(*new):
        of = slice(at.start // tokens, at.stop // tokens)
        attend_cached(q[of], k, v, got.reshape(5, tokens, 2, 3, 4)[of], 0.7, hidden)
    for n, (k, v) in enumerate(kept):
        attend_cached(q[n : n + 1], k[None], v[None], want.reshape(5, tokens, 2, 3, 4)[n : n + 1], 0.7)
    np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)


def test_prompts_and_unlike_sequences_are_read_one_by_one():
    def sizes(*extents):
        return [len(bundle) for bundle in bundled([Extent(*extent, []) for extent in extents])]

    assert sizes((40, 1), (41, 1), (45, 1), (0, 45), (0, 45), (30, 2), (30, 2), (40, 1)) == [3, 1, 1, 2, 1]
    # 3 x 100 places for 130 tokens.
    assert sizes((9, 1), (19, 1), (99, 1), (99, 1)) == [2, 2]
    # Of long ones no more than the cache can hold.
    assert sizes(*[(399, 1)] * 5, (1999, 1), (1999, 1)) == [2, 2, 1, 1, 1]
    assert sizes() == []


def test_a_rows_cost_falls_and_never_turns():
    costs = [cost(n) for n in range(1, 40)]
    assert costs[0] == 1
    assert all(a < b for a, b in pairwise(costs))
