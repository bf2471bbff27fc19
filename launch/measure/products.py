"""The matrix products of a layer's step, alone, into buffers that are kept: the limit of its speed.

Names of dims are those of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from statistics import median

import numpy as np
from mpi4py import MPI

from launch.measure.step import timed
from layers.attend import head_chunks, tiles
from layers.work import Work


def rate(comm: MPI.Intracomm, dtype: str, size: int = 768) -> float:
    """Operations a second of square matrix products on all ranks at once. A multiplication and its addition are two."""
    a = np.ones((size, size), dtype)
    out = np.empty_like(a)
    return comm.allreduce(2 * size**3 / median(timed(lambda: np.matmul(a, a, out=out), comm)))


def read_bandwidth(comm: MPI.Intracomm, rows: int = 2048, columns: int = 16384) -> float:
    """Bytes a second that this rank reads from memory while all do: 128 MiB, as an inner product with themselves and as a
    matrix that multiplies a row. The faster median counts."""
    W = np.ones((rows, columns), np.float32)
    flat, x, out = W.reshape(-1), np.ones(rows, np.float32), np.empty(columns, np.float32)
    reads = (lambda: np.dot(flat, flat), lambda: np.matmul(x, W, out=out))
    return W.nbytes / min(median(timed(read, comm)) for read in reads)


def linear(x: np.ndarray, W: np.ndarray) -> Callable[[], None]:
    """A product and the two of its backward. x (T, I), W (I, O)."""
    y = np.ones((len(x), W.shape[1]), x.dtype)
    dW, dx = np.empty_like(W), np.empty(x.shape, x.dtype)

    def run() -> None:
        np.matmul(x, W, out=y)
        np.matmul(x.T, y, out=dW)
        np.matmul(y, W.T, out=dx)

    return run


def of(work: Iterable[Work], dtype: str | np.dtype) -> Callable[[], None]:
    """Each product of forward, and the two of its backward, in arrays of its own; and those of attention."""
    steps: list[Callable[[], None]] = []
    for w in (w for w in work if w.phase == "forward"):
        if w.kind == "product":
            M, N, K, _ = w.shape
            steps += [linear(np.ones((M, K), dtype), np.ones((K, N), dtype)) for _ in range(w.times)]
        elif w.kind == "attend":
            steps += [scores(dtype, *w.shape)] * w.times

    def run() -> None:
        for step in steps:
            step()

    return run


def scores(
    dtype: str | np.dtype, K: int, g: int, Q: int, S: int, E: int, V: int, causal: int, window: int = 0
) -> Callable[[], None]:
    """Those of blocked softmax attention, block by block as `attend` and `attend_backward` go through them: 2 and 5."""
    span, v = (slice(0, Q), slice(0, S)), np.ones((S, 3 * K, V), dtype)[:, :K]

    @cache
    def kept(name: str, *shape: int) -> np.ndarray:
        return np.ones(shape, dtype)

    def run() -> None:
        for heads in head_chunks(span, K, g):
            N = heads.stop - heads.start
            k1_NSE, v1_NSV = kept("k1", N, S, E + 1), kept("v1", N, S, V + 1)
            for queries, blocks in tiles(span, g, bool(causal), window):
                R = (queries.stop - queries.start) * g
                q_NRE, do_NRV = kept("q", N, R, E + 1), kept("do", N, R, V + 1)
                for keys in blocks:
                    C = keys.stop - keys.start
                    p_NRC, ds_NRC = kept("p", N, R, C), kept("ds", N, R, C)
                    np.matmul(q_NRE, k1_NSE[:, keys].transpose(0, 2, 1), out=p_NRC)
                    np.matmul(p_NRC, v[keys, heads].transpose(1, 0, 2), out=kept("o", N, R, V))
                    np.matmul(q_NRE, k1_NSE[:, keys].transpose(0, 2, 1), out=p_NRC)
                    np.matmul(p_NRC.transpose(0, 2, 1), do_NRV[..., :V], out=kept("dv", N, C, V))
                    np.matmul(do_NRV, v1_NSV[:, keys].transpose(0, 2, 1), out=ds_NRC)
                    np.matmul(ds_NRC, k1_NSE[:, keys, :E], out=kept("dq", N, R, E))
                    np.matmul(ds_NRC.transpose(0, 2, 1), q_NRE[..., :E], out=kept("dk", N, C, E))

    return run
