"""What a layer computes, as closed forms: beside each layer's `traffic` stands its `work`.

    [Work("product", "forward", (T, O, I, 1)), Work("product", "backward", (T, I, O, 1)), ...]

Its products are held to those that `parallel.products` counts, as bytes are to the ledger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

from layers.attend import head_chunks, tiles
from layers.ops import Activation
from layers.pieces import Span, pairs
from parallel.products import Product

# Of the half of backward that may be put off (`parallel.later`), and of a forward that backward makes again.
WEIGHTS, AGAIN = "weights", "again"


class Work(NamedTuple):
    """One thing that is computed, `times` over. `phase`: forward, backward, WEIGHTS or AGAIN. By `kind`, the `shape` is

    product     M, N, K, batch: so many products of M K by K N entries, at once
    attend      K, g, Q, S, E, V, causal, window: softmax attention of K key/value heads, each read by g query heads, from Q
                queries to S keys of width E and values of width V; causal (1 or 0): the queries are the last of the keys,
                of which each sees at most a window (0: all before it)
    pass        read, written: entries, of arrays that are gone through once; `what` is done with them
    table       rows, width: rows that are read from a table, or added into one
    """

    kind: str
    phase: str
    shape: tuple[int, ...]
    times: int = 1
    what: str = ""


def linear(tokens: int, d_in: int, d_out: int) -> list[Work]:
    """x @ W (T, O), dy @ W^T (T, I) and x^T @ dy (I, O)."""
    T, I, O = tokens, d_in, d_out  # noqa: E741
    shapes = {"forward": (T, O, I, 1), "backward": (T, I, O, 1), WEIGHTS: (I, O, T, 1)}
    return [Work("product", phase, shape) for phase, shape in shapes.items()]


def passes(what: str, forward: tuple[int, int], backward: tuple[int, int]) -> list[Work]:
    """Entries read and written, forward and backward."""
    return [Work("pass", "forward", forward, what=what), Work("pass", "backward", backward, what=what)]


def looked_up(rows: int, width: int, held: int) -> list[Work]:
    """So many rows of a table that holds `held`, whose gradient is made whole."""
    table = [Work("table", phase, (rows, width)) for phase in ("forward", WEIGHTS)]
    return [*table, Work("pass", WEIGHTS, (0, held * width), what="zero")]


def activated(activation: Activation, entries: int) -> list[Work]:
    """So many entries h of a hidden layer, and their slopes."""
    z = activation.inputs * entries
    return passes(activation.name, (z, z + entries), (z + entries, z))


def attended(
    blocks: Iterable[tuple[Sequence[Span], bool]], heads: Iterable[tuple[int, int]], E: int, V: int, window: int = 0
) -> list[Work]:
    """Attention to each block of spans, causal or not, by key/value heads and how many query heads read each of these."""
    sizes = Counter((q.stop - q.start, k.stop - k.start, int(causal)) for spans, causal in blocks for q, k in spans)
    shapes = [((K, g, Q, S, E, V, causal, window), times) for K, g in heads for (Q, S, causal), times in sizes.items()]
    return [Work("attend", phase, shape, times) for phase in ("forward", "backward") for shape, times in shapes]


def again(work: Iterable[Work]) -> list[Work]:
    """What of it is done once more where forward is made again in backward."""
    return [w._replace(phase=AGAIN) for w in work if w.phase == "forward"]


def condensed(work: Iterable[Work]) -> list[Work]:
    """The same, like things added up."""
    times: Counter[Work] = Counter()
    for w in work:
        times[w._replace(times=1)] += w.times
    return [w._replace(times=n) for w, n in times.items()]


def products(work: Iterable[Work]) -> Counter[Product]:
    """How often each product is made, those of attention included, those of nothing not."""
    made: Counter[Product] = Counter()
    for w in work:
        if w.kind == "product" and all(w.shape):
            made[w.shape] += w.times
        elif w.kind == "attend":
            for shape, times in _of_attention(w.phase == "backward", *w.shape).items():
                made[shape] += times * w.times
    return made


@cache
def _of_attention(backward: bool, K: int, g: int, Q: int, S: int, E: int, V: int, causal: int, window: int) -> Counter[Product]:
    """Those of `attend` or `attend_backward` of one span."""
    made: Counter[Product] = Counter()
    span = slice(0, Q), slice(0, S)
    for heads in head_chunks(span, K, g):
        N = heads.stop - heads.start
        for queries, keys in tiles(span, g, bool(causal), window):
            R = (queries.stop - queries.start) * g
            for C in (k.stop - k.start for k in keys):
                if backward:
                    made.update([(R, C, E + 1, N), (C, V, R, N), (R, C, V + 1, N), (R, E, C, N), (C, E, R, N)])
                else:
                    made.update([(R, C, E + 1, N), (R, V, C, N)])
    return made


def operations(work: Iterable[Work]) -> int:
    """Multiplications and additions of products and attention, as model-FLOPs utilisation counts them (arXiv 2204.02311,
    appendix B): 2 M N K, and for each key that a query sees 2 (E + V) a head forward, twice that backward. What a recomputed
    block does again is not counted."""
    return sum(w.times * _operations(w) for w in work if w.phase != AGAIN)


def _operations(w: Work) -> int:
    if w.kind == "product":
        M, N, K, batch = w.shape
        return 2 * M * N * K * batch
    if w.kind == "attend":
        K, g, Q, S, E, V, causal, window = w.shape
        return 2 * (1 + (w.phase == "backward")) * K * g * (E + V) * pairs([(slice(0, Q), slice(0, S))], bool(causal), window)
    return 0
