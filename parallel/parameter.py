"""A parameter: this rank's part of a whole array, its gradient, and how it lies in the whole."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from parallel.axis import Axis
from parallel.shard import Layout


class Parameter:
    """`data`: this rank's part. `grad`: None, or what backward has added since zero_grad, of the same shape.

    `home`: what owns the memory, this parameter or the `Fused` that it is part of. A name's last word starts with W for a
    matrix or a table (these decay), with b for a bias, with w for a norm's weights.
    """

    def __init__(self, name: str, layout: Layout, data: np.ndarray) -> None:
        self.name, self.layout, self.data = name, layout, data
        self.home: Parameter | Fused = self
        self.grad: np.ndarray | None = None
        self._kept: np.ndarray | None = None

    @property
    def decays(self) -> bool:
        """Whether weight decay is for it: matrices and tables, not norms and biases."""
        return self.name.rpartition(".")[2].startswith("W")

    @property
    def parts(self) -> list[tuple[Parameter, tuple[slice, ...]]]:
        """The parameters in this home, with where they are in its data."""
        return [(self, (slice(None),))]

    def move(self, data: np.ndarray, grad: np.ndarray) -> None:
        """Live in `data` from now on, and let gradients be made in `grad`; arrays of data's shape."""
        data[...] = self.data
        self.data, self._kept = data, grad

    def zero_grad(self) -> None:
        """Forget the gradient, keeping its memory for the next."""
        self._kept = self.grad if self.grad is not None else self._kept
        self.grad = None

    def add_grad(self, g: np.ndarray) -> None:
        """grad += g. g: of data's shape."""
        if self.grad is None:
            self.grad = g.copy() if self._kept is None else self._kept
            self.grad[...] = g
        else:
            self.grad += g

    def add_grad_product(self, a_TI: np.ndarray, b_TO: np.ndarray) -> None:
        """grad += a^T b, where data has I O entries, in this order: the first product is written in place."""
        if self.grad is not None:
            self.grad += (a_TI.T @ b_TO).reshape(self.data.shape)
            return
        grad = np.empty_like(self.data) if self._kept is None else self._kept
        np.matmul(a_TI.T, b_TO, out=grad.reshape(a_TI.shape[1], -1))
        self.grad = grad

    def whole(self, axis: Axis, part: np.ndarray) -> np.ndarray:
        """The whole array on every rank, from the parts (of data, grad or what else lies like them) on `axis`."""
        if self.layout.cut is None:
            return part
        return axis.all_gather(part, self.layout.dim, self.layout.cut)


class Fused:
    """Parameters side by side along `dim` in one array `data`, so that one product serves them all.

    From here on each one's data is a view of its part, and so is its gradient.
    """

    def __init__(self, parameters: list[Parameter], dim: int) -> None:
        self.parameters = parameters
        self.data = np.concatenate([p.data for p in parameters], axis=dim)
        ends = [0, *np.cumsum([p.data.shape[dim] for p in parameters])]
        self._at = [(slice(None),) * dim + (slice(*between),) for between in pairwise(ends)]
        for p, at in zip(parameters, self._at, strict=True):
            p.data, p.home = self.data[at], self
        self._kept: np.ndarray | None = None

    @property
    def parts(self) -> list[tuple[Parameter, tuple[slice, ...]]]:
        return list(zip(self.parameters, self._at, strict=True))

    def move(self, data: np.ndarray, grad: np.ndarray) -> None:
        """As Parameter.move, for all of them."""
        data[...] = self.data
        self.data, self._kept = data, grad
        for p, at in self.parts:
            p.data = data[at]

    def room(self) -> np.ndarray:
        """An array for the next gradient, of data's shape: memory that is kept, unless a gradient stands in it."""
        if any(p.grad is not None for p in self.parameters):
            return np.empty_like(self.data)
        if self._kept is None:
            self._kept = np.empty_like(self.data)
        return self._kept

    def add_grad(self, g: np.ndarray) -> None:
        """Each one's gradient += its part of g. g: of data's shape."""
        if self._kept is None:
            self._kept = np.empty_like(self.data)
        for p, at in self.parts:
            if p.grad is not None:
                p.grad += g[at]
                continue
            p.grad = self._kept[at]
            if g is not self._kept:
                p.grad[...] = g[at]


# Where a layer's weights come from: called with the name, the layout and this rank on the axis, and the mean and standard
# deviation that an untrained weight should have; returns this rank's part.
Weights = Callable[[str, Layout, int, float, float], np.ndarray]


def drawn(seed: int, dtype: np.dtype | str, spread: float = 0.0) -> Weights:
    """Weights drawn normally, whole and by name, then cut: the same on every mesh, and in every dtype up to rounding.

    `spread` is the least standard deviation: with 0, biases start at zero; comparisons use more, so that none is zero.
    """

    def draw(name: str, layout: Layout, rank: int, mean: float, std: float) -> np.ndarray:
        key = int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=16).digest())
        whole = mean + max(std, spread) * np.random.Generator(np.random.Philox(key=key)).standard_normal(layout.shape)
        return layout.take(whole.astype(dtype), rank)

    return draw


def within(prefix: str, weights: Weights) -> Weights:
    """The weights of a part of a model, whose names are led by `prefix`."""
    return lambda name, layout, rank, mean, std: weights(prefix + name, layout, rank, mean, std)


def named(prefix: str, parameters: list[Parameter]) -> None:
    """Lead the names of a part's parameters by `prefix`, as the whole model calls them."""
    for p in parameters:
        p.name = prefix + p.name


def given(whole: dict[str, np.ndarray]) -> Weights:
    """Weights from whole arrays by name."""
    return lambda name, layout, rank, mean, std: layout.take(whole[name], rank)
