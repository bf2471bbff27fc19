"""ZeRO-3, FSDP (arXiv 1910.02054, 2304.11277): weights are cut over dp, and a unit's are whole only while it runs.

A model is a list of units, run one after another. A unit's arrays, each flattened row by row, one after another, are its N numbers;
a rank keeps dp.cut(N) of them, its part w (n), which may be empty. x has the rank's own tokens, perhaps none.
    unit.shapes: a list of its arrays' shapes                        unit.forward(x_tD, arrays) -> y_tD, saved
    unit.backward(dy_tD, saved, arrays) -> dx_tD, a list of the arrays' gradients, in their order; `saved` holds no weights
dy comes from a loss that is divided by all ranks' tokens already: gradients are summed over the ranks, not averaged.
Gather a unit's weights before it runs, and again in backward, in one message each time. Never may two units' weights be whole on a
rank, nor one's after forward: let them go before the next gather (a variable holds its arrays until it is deleted or set anew).
As soon as a unit's backward has run, sum its gradients over the ranks, in one message, and keep the part. Send no more than you must.
"""

import numpy as np


def gather(w_n, shapes, dp):
    """w (n) -> a list of the unit's arrays."""
    # --- yours ---
    w_N = dp.all_gather(w_n)
    arrays, start = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        arrays.append(w_N[start : start + size].reshape(shape))
        start += size
    return arrays
    # --- end ---


def forward(x_tD, parts, units, dp):
    """x (t, D), parts: a w (n) a unit -> y (t, D), kept: what your backward needs, other runs may come between."""
    # --- yours ---
    kept = []
    for w_n, unit in zip(parts, units, strict=True):
        x_tD, saved = unit.forward(x_tD, gather(w_n, unit.shapes, dp))
        kept.append(saved)
    return x_tD, kept
    # --- end ---


def backward(dy_tD, kept, parts, units, dp):
    """dy (t, D), kept, parts -> dx (t, D), dws: a list of each unit's dw (n)."""
    # --- yours ---
    dws = [None] * len(units)
    for i in reversed(range(len(units))):
        dy_tD, grads = units[i].backward(dy_tD, kept[i], gather(parts[i], units[i].shapes, dp))
        dw_N = np.concatenate([g.ravel() for g in grads])
        dws[i] = dp.reduce_scatter(dw_N)
    return dy_tD, dws
    # --- end ---
