"""A layer's output and gradients beside the reference's, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from reference.compare import Comparison, compare
from reference.gradient import Loss, along, at_entries, grid
from reference.rounding import Traced, bounds


def compared(
    parts: Sequence[Callable[[dict], np.ndarray | Traced]],
    loss: Loss,
    whole: dict[str, np.ndarray],
    dy: np.ndarray,
    most: Callable[[str], int] = lambda name: 64,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Comparison]:
    """y, and for each array its gradient: on a grid of its entries, and along a direction that reaches all of them.

    `parts`: forward programs whose results add up to y. `whole`: y, the arrays by name, and their gradients led by d.
    `loss`: of dy, as `gradient` wants it. `most`: how many entries of an array may be derived one by one.
    `share`: which of how many shares of the tensors to compare: ranks may divide them.
    """
    dtype, dy = whole["y"].dtype, dy.astype(np.float64)
    arrays = {n: a.astype(np.float64) for n, a in whole.items() if f"d{n}" in whole}
    allowed = bounds(parts, arrays, dy, dtype)
    first, of = share
    if first == 0:
        yield compare("y", "forward", whole["y"], sum(part(arrays) for part in parts), float(allowed["y"].max()))
    random = np.random.default_rng(0)
    # Drawn for all, so that each has the same direction in any share.
    signs = {name: np.abs(random.standard_normal(a.shape)) for name, a in arrays.items()}
    for name in list(arrays)[first::of]:
        a = arrays[name]
        got, at = whole[f"d{name}"], grid(a.shape, max(most(name), 2**a.ndim))
        yield compare(f"d{name}", "backward", got, at_entries(loss, arrays, name, at), float(allowed[name].max()), at)
        # With the gradient's own signs, nothing cancels in the sum; it is made to be 1. In float64 it is as good as exact.
        direction = np.copysign(signs[name], got)
        off = float(np.sum(allowed[name] * np.abs(direction)))
        size = max(float(np.sum(got * direction)), off) or 1.0
        direction /= size
        summed, want = np.array([np.sum(got * direction)]), np.array([along(loss, arrays, name, direction)])
        yield compare(f"d{name}, all", "backward", summed, want, off / size)
