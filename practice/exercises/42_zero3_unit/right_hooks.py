"""A class that is a unit while it is entered, as hooks would have it; its gradients are written into one flat array."""

import math

import numpy as np


class Whole:
    def __init__(self, w_n, shapes, dp):
        self.w_n, self.shapes, self.dp, self.arrays = w_n, list(shapes), dp, []
        self.ends = np.cumsum([math.prod(s) for s in self.shapes]).tolist()

    def __enter__(self):
        flat = self.dp.all_gather(self.w_n, dim=0)
        pieces = np.split(flat, self.ends[:-1])
        self.arrays = [piece.reshape(s) for piece, s in zip(pieces, self.shapes, strict=True)]
        return self

    def __exit__(self, *_):
        self.arrays = []

    def reduced(self, grads):
        flat = np.empty(self.ends[-1], self.w_n.dtype)
        start = 0
        for end, grad in zip(self.ends, grads, strict=True):
            flat[start:end] = grad.flatten()
            start = end
        return self.dp.reduce_scatter(flat, dim=0)


def gather(w_n, shapes, dp):
    with Whole(w_n, shapes, dp) as whole:
        return whole.arrays


def forward(x_tD, parts, units, dp):
    all_saved = {}
    for i, unit in enumerate(units):
        with Whole(parts[i], unit.shapes, dp) as whole:
            x_tD, all_saved[i] = unit.forward(x_tD, whole.arrays)
    return x_tD, all_saved


def backward(dy_tD, kept, parts, units, dp):
    found = []
    for i, unit in reversed(list(enumerate(units))):
        with Whole(parts[i], unit.shapes, dp) as whole:
            dy_tD, grads = unit.backward(dy_tD, kept[i], whole.arrays)
        found.insert(0, whole.reduced(grads))
    return dy_tD, found
