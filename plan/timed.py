"""The operations of a step, each made once in arrays of its own, so that it can be timed: by the functions that layers call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from layers.attend import attend, attend_backward
from layers.embedding import LearnedPositions
from layers.loss import VocabParallelCrossEntropy
from layers.norm import LayerNorm, rms_norm, rms_norm_backward
from layers.ops import ACTIVATIONS, product
from layers.optimizer import AdamW, squared_norm
from layers.rope import Rope
from parallel.alone import Alone
from parallel.flat import Flat
from parallel.parameter import drawn
from parallel.shard import Layout, even
from plan.account import INPUT, WEIGHTS, Operation

Run = Callable[[], object]
# Entries of an optimizer's pass that is timed: more take as long each.
MOST = 2**20


def made(op: Operation, dtype: str, width: int, tokens: int) -> Run | None:
    """What does the operation once, or None for what nobody times. `width`, `tokens`: of the model and of a micro-batch."""
    make = {"product": _product, "attend": _attend, "table": _table, "adamw": _adamw, "norm": _norm, "batch": _batch}.get(
        op.kind
    )
    if make is not None:
        return make(op, dtype)
    return _pass(op, dtype, width, tokens) if op.kind == "pass" else None


def _ones(dtype: str, *shape: int) -> np.ndarray:
    """Numbers that are all finite, whatever is done with them once."""
    return np.full(shape, 0.01, dtype)


def _product(op: Operation, dtype: str) -> Run | None:
    M, N, K, batch = op.shape
    if batch > 1:
        a, b = _ones(dtype, batch, M, K), _ones(dtype, batch, K, N)
        return lambda: np.matmul(a, b)
    if op.phase == INPUT:
        dy, W = _ones(dtype, M, K), _ones(dtype, N, K)
        return lambda: np.matmul(dy, W.T)
    if op.phase == WEIGHTS:
        x, dy, grad = _ones(dtype, K, M), _ones(dtype, K, N), _ones(dtype, M, N)
        return lambda: np.matmul(x.T, dy, out=grad)
    x, W = _ones(dtype, M, K), _ones(dtype, K, N)
    return lambda: product(x, W)


def _attend(op: Operation, dtype: str) -> Run:
    K, g, Q, S, E, V, causal, window = op.shape
    of = lambda *shape: _ones(dtype, *shape)  # noqa: E731
    q, k, v, o, lse = of(Q, K, g, E), of(S, K, E), of(S, K, V), of(Q, K, g, V), of(Q, K, g)
    spans, scale = [(slice(0, Q), slice(0, S))], E**-0.5
    if op.phase != INPUT:
        return lambda: attend(q, k, v, o, lse, spans, scale, bool(causal), window=window)
    attend(q, k, v, o, lse, spans, scale, bool(causal), window=window)
    do, dq, dk, dv = (np.zeros_like(a) for a in (o, q, k, v))
    return lambda: attend_backward(do, q, k, v, o, lse, dq, dk, dv, spans, scale, bool(causal), window)


def _table(op: Operation, dtype: str) -> Run:
    rows, width = op.shape
    layer = LearnedPositions(drawn(0, dtype), max(1, rows), width)
    x, at = _ones(dtype, rows, width), np.arange(rows)
    if op.phase != WEIGHTS:
        return lambda: layer.table_PD.data[at]
    return lambda: layer.backward(x, at)


def _adamw(op: Operation, dtype: str) -> Run:
    n = int(min(op.shape[0], MOST))
    flat = Flat([drawn(0, dtype).matrix("W", Layout((n,)), {}, 1)] if n else [], dtype)
    optimizer = AdamW(flat, flat.owned([slice(0, n)]))
    return lambda: optimizer.step(1e-3)


def _norm(op: Operation, dtype: str) -> Run:
    n = int(min(op.shape[0], MOST))
    flat = Flat([drawn(0, dtype).matrix("W", Layout((n,)), {}, 1)] if n else [], dtype)
    owned, every = flat.owned([slice(0, n)]), [np.ones(n, bool)]
    return lambda: squared_norm(owned, every)


def times(op: Operation) -> float:
    """How often the operation holds what `made` does of it."""
    return max(1.0, op.shape[0] / MOST) if op.kind in ("adamw", "norm") else 1.0


def _batch(op: Operation, dtype: str) -> Run:
    tokens, pairs = op.shape
    rope = Rope(2 * pairs) if pairs else None
    return lambda: None if rope is None else rope.at(np.arange(tokens), dtype)


def _pass(op: Operation, dtype: str, width: int, tokens: int) -> Run:
    read, written = map(int, op.shape)
    ahead, of = op.phase not in (INPUT, WEIGHTS), lambda n, *more: _ones(dtype, max(1, n), *more)
    if op.name in ACTIVATIONS:
        a = ACTIVATIONS[op.name]
        entries = (written if ahead else read) - (read if ahead else written)
        z = of(entries // 64, *([2] if a.inputs == 2 else []), 64)
        if ahead:
            return lambda: a.forward(z)
        h, slope = a.forward(z)
        return lambda: a.backward(h, slope)
    if op.name == "rms norm":
        x, w = of((read if ahead else read // 2) // width, width), _ones(dtype, width)
        y, r = rms_norm(x, w, 1e-5)
        return (lambda: rms_norm(x, w, 1e-5)) if ahead else lambda: rms_norm_backward(y, x, r, w)
    if op.name == "layer norm":
        layer, x = LayerNorm(drawn(0, dtype), "n", width), of((read if ahead else read // 2) // width, width)
        y, saved = layer.forward(x)
        return (lambda: layer.forward(x)) if ahead else lambda: layer.backward(y, saved)
    if op.name == "loss":
        layer, targets = VocabParallelCrossEntropy(Alone("tp"), even(max(1, read // tokens), 1)), np.zeros(tokens, int)
        z = of(tokens, max(1, read // tokens))
        nll, saved = _loss(layer, z, targets)
        return (lambda: _loss(layer, z, targets)) if ahead else lambda: layer.backward(nll, saved)
    if op.name == "rotation":
        rotation = Rope(32).at(np.arange(max(1, read // 256)), dtype)
        x = of(read // 256, 8, 32)
        return (lambda: rotation.forward(x)) if ahead else lambda: rotation.backward(x)
    if op.name == "zero":
        # What adds rows into a table makes it whole, too.
        return lambda: None
    if op.name == "bias":
        x, b = of(max(1, read // width), width), _ones(dtype, width)
        return (lambda: x.__iadd__(b)) if ahead else lambda: x.sum(axis=0)
    if op.name == "residual":
        a, b = of(read // 2), of(read // 2)
        return lambda: a + b
    return _copied(of(read), written)


def _loss(layer: VocabParallelCrossEntropy, z: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, tuple]:
    """As its forward without the sums over tp, which are verbs."""
    top = z.max(axis=1)
    p = z - top[:, None]
    np.exp(p, out=p)
    return np.log(p.sum(axis=1)), (p, p.sum(axis=1), targets)


def _copied(x: np.ndarray, written: int) -> Run:
    out = np.empty(max(1, written), x.dtype)
    n = min(x.size, out.size)
    return lambda: np.copyto(out[:n], x[:n])
