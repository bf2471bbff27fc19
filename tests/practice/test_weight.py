"""A counted weight counts the multiplications of its products however they are written, and changes no result."""

from collections import Counter

import numpy as np
import pytest

from practice.weight import counted

X = np.arange(15.0).reshape(5, 3)
# Three experts' (3, 7), and the same number of numbers as two heads of one matrix (3, 2, 7) and as a matrix (3, 14).
EXPERTS, HEADS = np.arange(63.0).reshape(3, 3, 7), np.arange(42.0).reshape(3, 2, 7)
MATRIX = HEADS.reshape(3, 14)
ONE = 5 * 3 * 7
WRITTEN = {
    "matmul": (MATRIX, lambda W: X @ W, 2 * ONE),
    "of a vector": (MATRIX, lambda W: X[0] @ W, 3 * 14),
    "into an array": (MATRIX, lambda W: np.matmul(X, W, out=np.empty((5, 14))), 2 * ONE),
    "all experts": (EXPERTS, lambda W: X @ W, 3 * ONE),
    "expert by expert": (EXPERTS, lambda W: np.stack([X @ w for w in W]), 3 * ONE),
    "no rows": (MATRIX, lambda W: X[:0] @ W, 0),
    "stacked": (EXPERTS, lambda W: X @ np.stack([W[0], W[1]]), 2 * ONE),
    "joined": (EXPERTS, lambda W: X @ np.concatenate([W[0], W[1]], axis=1), 2 * ONE),
    "turned": (EXPERTS, lambda W: X @ np.moveaxis(W, 1, 0), 3 * ONE),
    "transposed": (MATRIX, lambda W: (W.T @ X.T).T, 2 * ONE),
    "einsum": (HEADS, lambda W: np.einsum("td,dke->tke", X, W), 2 * ONE),
    "einsum by numbers": (HEADS, lambda W: np.einsum(X, [0, 1], W, [1, 2, 3], [0, 2, 3]), 2 * ONE),
    "einsum with dots": (EXPERTS, lambda W: np.einsum("...d, nd... -> n...", X[0], W), 3 * 3 * 7),
    "einsum with dots between": (EXPERTS, lambda W: np.einsum("td,...de->...te", X, W), 3 * ONE),
    "einsum of no rows": (HEADS, lambda W: np.einsum("td,dke->tke", X[:0], W), 0),
    "tensordot": (HEADS, lambda W: np.tensordot(X, W, 1), 2 * ONE),
    "dot": (MATRIX, lambda W: np.dot(X, W), 2 * ONE),
    "inner": (MATRIX, lambda W: np.inner(X, W.T), 2 * ONE),
    "outer": (MATRIX, lambda W: np.outer(X[0], W[0]), 3 * 14),
    "multi_dot": (MATRIX, lambda W: np.linalg.multi_dot([X, W]), 2 * ONE),
    "multiplied and summed": (MATRIX, lambda W: (X[:, :, None] * W).sum(axis=1), 2 * ONE),
    "what a product gives is no weight": (MATRIX, lambda W: (X @ W).T @ X, 2 * ONE),
}  # fmt: skip


@pytest.mark.parametrize("what", WRITTEN)
def test_every_way_to_write_a_product_counts_its_multiplications(what):
    W, product, want = WRITTEN[what]
    tally = Counter()
    found = product(counted(W, tally))
    assert type(found) is np.ndarray
    assert np.array_equal(found, product(W))
    assert tally["multiplications"] == want
