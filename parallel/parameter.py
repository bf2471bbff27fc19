"""A parameter: this rank's part of a whole array, its gradient, and how it lies in the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate, pairwise
from math import sqrt

import numpy as np

from parallel.later import Later, put_off
from parallel.mesh import Mesh
from parallel.products import matmul
from parallel.shard import Layout, Place

# Of its entries.
Share = int | Fraction


class Parameter:
    """`data`: this rank's part. `grad`: None, or what backward has added since zero_grad, of the same shape. `decays`: whether
    weight decay is for it. `multiplies`: whether tokens are multiplied by it, as by a matrix. `read`: the share of its entries
    that one token reads. `owed`: axes over which its gradient is a partial sum, data axes aside: what several ranks of them
    hold of it, they have multiplied with different arrays (`parallel.owed`). `home`: what owns the memory, this parameter or
    the `Fused` that it is part of.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        data: np.ndarray,
        *,
        decays: bool,
        multiplies: bool,
        read: Share = 1,
        owed: tuple[str, ...] = (),
    ) -> None:
        self.name, self.layout, self.data = name, layout, data
        self.decays, self.multiplies, self.read, self.owed = decays, multiplies, read, owed
        self.home: Parameter | Fused = self
        self.grad: np.ndarray | None = None
        self._kept: np.ndarray | None = None

    @property
    def parts(self) -> list[tuple[Parameter, tuple[slice, ...]]]:
        """The parameters in this home, with where they are in its data."""
        return [(self, (slice(None),))]

    def move(self, data: np.ndarray, grad: np.ndarray) -> None:
        """Live in `data` from now on, and let gradients be made in `grad`; arrays of data's shape."""
        data[...] = self.data
        self.attach(data)
        self.lend(grad)

    def attach(self, data: np.ndarray) -> None:
        """`data`, of the same shape, has the weights from now on."""
        self.data = data

    def lend(self, grad: np.ndarray) -> None:
        """Let gradients be made in `grad`, of data's shape, until `forget`; what there is moves there."""
        if self.grad is not None:
            grad[...] = self.grad
            self.grad = grad
        self._kept = grad

    def forget(self) -> None:
        """Without a gradient, and without memory for the next."""
        self.grad = self._kept = None

    def zero_where_none(self) -> None:
        if self.grad is None:
            self.add_grad(np.zeros_like(self.data))

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

    def add_grad_product(self, a_TI: np.ndarray, b_TO: np.ndarray, later: Later | None = None) -> None:
        """grad += a^T b, where data has I O entries, in this order: the first product is written in place. Given `later`, it is
        put off."""
        put_off(later, self._add_product, a_TI, b_TO)

    def _add_product(self, a_TI: np.ndarray, b_TO: np.ndarray) -> None:
        if self.grad is not None:
            self.grad += matmul(a_TI.T, b_TO).reshape(self.data.shape)
            return
        grad = np.empty_like(self.data) if self._kept is None else self._kept
        matmul(a_TI.T, b_TO, out=grad.reshape(a_TI.shape[1], -1))
        self.grad = grad

    def whole(self, mesh: Mesh, part: np.ndarray) -> np.ndarray:
        """The whole array on every rank, from the parts (of data, grad or what else lies like them)."""
        for axis, (dim, cut) in self.layout.cuts.items():
            part = getattr(mesh, axis).all_gather(part, dim, cut)
        return part


class Fused:
    """Parameters side by side in one array `data`, so that one product serves them all. `Weights` makes them, with equal facts.

    `parts`: each with where it is in data; its own data is a view of this, and so is its gradient.
    """

    def __init__(self, data: np.ndarray, parts: list[tuple[Parameter, tuple[slice, ...]]]) -> None:
        self.data, self.parts = data, parts
        self.parameters = [p for p, _ in parts]
        for p in self.parameters:
            p.home = self
        self._kept: np.ndarray | None = None

    @property
    def decays(self) -> bool:
        return self.parameters[0].decays

    def move(self, data: np.ndarray, grad: np.ndarray) -> None:
        """As Parameter.move, for all of them; so are the next four."""
        data[...] = self.data
        self.attach(data)
        self.lend(grad)

    def attach(self, data: np.ndarray) -> None:
        self.data = data
        for p, at in self.parts:
            p.data = data[at]

    def lend(self, grad: np.ndarray) -> None:
        for p, at in self.parts:
            if p.grad is not None:
                grad[at] = p.grad
                p.grad = grad[at]
        self._kept = grad

    def forget(self) -> None:
        self._kept = None
        for p in self.parameters:
            p.grad = None

    def zero_where_none(self) -> None:
        if any(p.grad is None for p in self.parameters):
            self.add_grad(np.zeros_like(self.data))

    def room(self) -> np.ndarray:
        """An array for the next gradient, of data's shape: memory that is kept, unless a gradient stands in it."""
        if any(p.grad is not None for p in self.parameters):
            return np.empty_like(self.data)
        if self._kept is None:
            self._kept = np.empty_like(self.data)
        return self._kept

    def add_grad_product(self, a_TI: np.ndarray, b_TO: np.ndarray, later: Later | None = None) -> None:
        """Each one's gradient += its part of a^T b, of data's I O entries, in this order. Given `later`, it is put off."""
        put_off(later, self._add_product, a_TI, b_TO)

    def _add_product(self, a_TI: np.ndarray, b_TO: np.ndarray) -> None:
        grad = self.room()
        matmul(a_TI.T, b_TO, out=grad.reshape(a_TI.shape[1], -1))
        self.add_grad(grad)

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


MATRIX = {"decays": True, "multiplies": True}
TABLE = {"decays": True, "multiplies": False, "read": 0}
VECTOR = {"decays": False, "multiplies": False}


@dataclass(frozen=True)
class Weights:
    """Where parameters come from. Each method makes one, or several in one array: this rank's part, and what is known of it.

    `room(name, shape)` gives memory. `fill(name, layout, place, mean, std, out)` writes the part; untrained weights have this
    mean and standard deviation. `prefix` leads every name. `summed`: how many layers' results the residual stream adds up.
    `held`: which ranks of an axis hold them, where not all do; where several do, their gradients are owed a sum.

    `place`: this rank's, on the axes that the layout names. `d_in`: how many inputs a matrix has; untrained, its std is
    d_in^-0.5. `residual`: its product is added to the residual stream; untrained, its std is smaller by the root of `summed`
    (GPT-2). `read`: the share of its entries that one token reads.
    """

    room: Callable[[str, tuple[int, ...]], np.ndarray]
    fill: Callable[[str, Layout, Place, float, float, np.ndarray], None]
    prefix: str = ""
    summed: int = 1
    held: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def within(self, prefix: str, summed: int | None = None) -> Weights:
        """The weights of a part of a model, whose names are led by `prefix`."""
        return replace(self, prefix=self.prefix + prefix, summed=self.summed if summed is None else summed)

    def on(self, **held: Sequence[int]) -> Weights:
        """The weights of what only these ranks of an axis hold: weights.on(pp=[0, 3])."""
        return replace(self, held={axis: tuple(ranks) for axis, ranks in held.items()})

    def matrix(
        self,
        name: str,
        layout: Layout,
        place: Place,
        d_in: int,
        residual: bool = False,
        read: Share = 1,
        owed: tuple[str, ...] = (),
    ) -> Parameter:
        return self._alone(name, layout, place, 0.0, self._std(d_in, residual), MATRIX | {"read": read, "owed": owed})

    def matrices(
        self,
        layouts: Mapping[str, Layout],
        dim: int,
        place: Place,
        d_in: int,
        residual: bool = False,
        read: Share = 1,
        owed: tuple[str, ...] = (),
    ) -> Fused:
        """Matrices side by side along `dim` in one array."""
        return self._beside(layouts, dim, place, self._std(d_in, residual), MATRIX | {"read": read, "owed": owed})

    def table(self, name: str, layout: Layout, place: Place, std: float, owed: tuple[str, ...] = ()) -> Parameter:
        """A token reads one row of it, which counts as nothing."""
        return self._alone(name, layout, place, 0.0, std, TABLE | {"owed": owed})

    def bias(self, name: str, layout: Layout, place: Place, owed: tuple[str, ...] = ()) -> Parameter:
        return self._alone(name, layout, place, 0.0, 0.0, VECTOR | {"owed": owed})

    def biases(self, layouts: Mapping[str, Layout], dim: int, place: Place, owed: tuple[str, ...] = ()) -> Fused:
        """Biases side by side along `dim` in one array."""
        return self._beside(layouts, dim, place, 0.0, VECTOR | {"owed": owed})

    def norm(self, name: str, width: int, owed: tuple[str, ...] = ()) -> Parameter:
        """Weights of a norm, whole on every rank."""
        return self._alone(name, Layout((width,)), {}, 1.0, 0.0, VECTOR | {"owed": owed})

    def _std(self, d_in: int, residual: bool) -> float:
        return d_in**-0.5 / sqrt(self.summed) if residual else d_in**-0.5

    def _alone(self, name: str, layout: Layout, place: Place, mean: float, std: float, facts: dict = VECTOR) -> Parameter:
        name, data = self.prefix + name, self.room(self.prefix + name, layout.local_shape(place))
        self.fill(name, layout, place, mean, std, data)
        return self._made(name, layout, data, facts)

    def _made(self, name: str, layout: Layout, data: np.ndarray, facts: dict) -> Parameter:
        owed = (*facts.get("owed", ()), *(axis for axis, ranks in self.held.items() if len(ranks) > 1))
        return Parameter(name, replace(layout, held=self.held), data, **facts | {"owed": owed})

    def _beside(self, layouts: Mapping[str, Layout], dim: int, place: Place, std: float, facts: dict = VECTOR) -> Fused:
        layouts = {self.prefix + name: layout for name, layout in layouts.items()}
        shapes = [layout.local_shape(place) for layout in layouts.values()]
        ends = [0, *accumulate(shape[dim] for shape in shapes)]
        data = self.room(next(iter(layouts)), (*shapes[0][:dim], ends[-1], *shapes[0][dim + 1 :]))
        parts = []
        for (name, layout), between in zip(layouts.items(), pairwise(ends), strict=True):
            at = (slice(None),) * dim + (slice(*between),)
            self.fill(name, layout, place, 0.0, std, data[at])
            parts.append((self._made(name, layout, data[at], facts), at))
        return Fused(data, parts)


def drawn(seed: int, dtype: np.dtype | str, spread: float = 0.0) -> Weights:
    """Weights drawn normally, whole and by name, then cut: the same on every mesh, and in every dtype up to rounding.

    `spread` is the least standard deviation: with 0, biases start at zero; comparisons use more, so that none is zero.
    """

    def draw(name: str, layout: Layout, place: Place, mean: float, std: float, out: np.ndarray) -> None:
        key = int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=16).digest())
        whole = mean + max(std, spread) * np.random.Generator(np.random.Philox(key=key)).standard_normal(layout.shape)
        out[...] = layout.take(whole, place)

    return Weights(lambda name, shape: np.empty(shape, dtype), draw)


def given(whole: Mapping[str, np.ndarray]) -> Weights:
    """Weights from whole arrays by name."""

    def take(name: str, layout: Layout, place: Place, mean: float, std: float, out: np.ndarray) -> None:
        out[...] = layout.take(whole[name], place)

    return Weights(lambda name, shape: np.empty(shape, whole[name].dtype), take)
