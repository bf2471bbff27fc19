"""The matrix products of a layer's step, alone, into buffers that are kept: the limit of its speed.

Names of dims are those of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from statistics import median

import numpy as np
from mpi4py import MPI

from launch.measure.step import timed
from layers.attend import head_chunks, tiles
from layers.attention import Attention
from layers.batch import Batch
from layers.context import all_spans
from layers.latent_attention import LatentAttention
from layers.mlp import MLP
from layers.moe import MoE
from layers.pieces import Span


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


def flat(W: np.ndarray, d_in: int) -> np.ndarray:
    return W.reshape(d_in, -1)


def mlp(layer: MLP, x: np.ndarray) -> Callable[[], None]:
    W1, W2 = flat(layer.up.W_Io.data, layer.up.d_in), layer.down.W_iO.data
    return together(linear(x, W1), linear(np.ones((len(x), len(W2)), x.dtype), W2))


def moe(layer: MoE, x: np.ndarray, rows: Sequence[int]) -> Callable[[], None]:
    """x (T, D), this rank's tokens. `rows`: of each of its experts, how many tokens it serves."""
    ones = lambda t, n: np.ones((t, n), x.dtype)  # noqa: E731
    f, D = layer.W2_xfD.data.shape[1:]
    pairs = zip(rows, layer.W1_xD2f.data, layer.W2_xfD.data, strict=True)
    steps = [step for t, W1, W2 in pairs for step in (linear(ones(t, D), flat(W1, D)), linear(ones(t, f), W2))]
    if layer.shared is not None:
        W1, W2 = layer.shared.W1_D2s.data, layer.shared.W2_sD.data
        steps += [linear(x, flat(W1, D)), linear(ones(len(x), len(W2)), W2)]
    return together(linear(x, layer.router.Wr_DX.data), *steps)


def attention(layer: Attention, x: np.ndarray, batch: Batch) -> Callable[[], None]:
    """x: as many rows as the batch has tokens on this rank."""
    Wo, around, inside = flat(layer.out.W_iO.data, layer.h * layer.E), layer.context, layer.context.inside(layer.core)
    blocks = around.blocks(inside, batch)
    runs = [scores(x.dtype, blocks, kv.stop - kv.start, g, layer.E, layer.E) for _, kv, g in inside.runs]
    out = linear(np.ones((len(x), len(Wo)), x.dtype), Wo)
    return together(linear(x, flat(layer.W_DnE.data, layer.d_model)), *runs, out)


def latent_attention(layer: LatentAttention, x: np.ndarray, batch: Batch) -> Callable[[], None]:
    """x: as many rows as the batch has tokens on this rank. Keys and values are made of all tokens."""
    up = lambda rows, W: linear(np.ones((rows, len(W)), x.dtype), W)  # noqa: E731
    down = [layer.Wdkv_DC, layer.Wkr_DR, *([] if layer.Wdq_DQ is None else [layer.Wdq_DQ])]
    steps = [linear(x, p.data) for p in down]
    steps += [up(n, flat(p.data, len(p.data))) for n, p in ((sum(batch.lengths), layer.Wukv_Chn), (len(x), layer.Wq_Qhn))]
    steps.append(up(len(x), flat(layer.out.W_iO.data, layer.h * layer.V)))
    blocks = [(all_spans(batch, layer.causal), layer.causal)]
    return together(*steps, scores(x.dtype, blocks, layer.h, 1, layer.N + layer.R, layer.V))


def scores(
    dtype: np.dtype, blocks: Sequence[tuple[Sequence[Span], bool]], K: int, g: int, E: int, V: int
) -> Callable[[], None]:
    """Those of blocked softmax attention, block by block as `attend` and `attend_backward` go through them: 2 and 5."""
    v = np.ones((max((span[1].stop for spans, _ in blocks for span in spans), default=0), 3 * K, V), dtype)[:, :K]
    every = [(span, causal) for spans, causal in blocks for span in spans]

    @cache
    def kept(name: str, *shape: int) -> np.ndarray:
        return np.ones(shape, dtype)

    def run() -> None:
        for span, causal in every:
            start, S = span[1].start, span[1].stop - span[1].start
            for heads in head_chunks(span, K, g):
                N = heads.stop - heads.start
                k1_NSE, v1_NSV = kept("k1", N, S, E + 1), kept("v1", N, S, V + 1)
                for queries, blocks in tiles(span, g, causal):
                    R = (queries.stop - queries.start) * g
                    q_NRE, do_NRV = kept("q", N, R, E + 1), kept("do", N, R, V + 1)
                    for keys in blocks:
                        C = keys.stop - keys.start
                        at = np.s_[:, keys.start - start : keys.stop - start]
                        p_NRC, ds_NRC = kept("p", N, R, C), kept("ds", N, R, C)
                        np.matmul(q_NRE, k1_NSE[at].transpose(0, 2, 1), out=p_NRC)
                        np.matmul(p_NRC, v[keys, heads].transpose(1, 0, 2), out=kept("o", N, R, V))
                        np.matmul(q_NRE, k1_NSE[at].transpose(0, 2, 1), out=p_NRC)
                        np.matmul(p_NRC.transpose(0, 2, 1), do_NRV[..., :V], out=kept("dv", N, C, V))
                        np.matmul(do_NRV, v1_NSV[at].transpose(0, 2, 1), out=ds_NRC)
                        np.matmul(ds_NRC, k1_NSE[*at, :E], out=kept("dq", N, R, E))
                        np.matmul(ds_NRC.transpose(0, 2, 1), q_NRE[..., :E], out=kept("dk", N, C, E))

    return run


def together(*steps: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run
