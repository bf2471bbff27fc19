"""How large a model is, part by part: asked of real layers on a dry axis, one of each kind."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import NamedTuple

from models.build import build
from models.config import Config
from plan.dry import DryAxis, dry_weights


class Size(NamedTuple):
    """Entries of a part: all; those of routed experts; of the matrices that one token is multiplied by; all that serve it."""

    weights: int
    experts: int = 0
    active: int = 0
    met: int = 0

    def on_rank(self, tp: int, ep: int) -> float:
        """Entries that a rank of tp and ep holds."""
        return (self.weights - self.experts) / tp + self.experts / (tp * ep)


class Sizes(NamedTuple):
    """`table`: of tokens; `positions`: a learned table; `norm`: the last one; `head`: the output's matrix, which a tied model
    does not hold a second time (`held`). `dense`, `routed`: of one block; `first`: how many blocks are dense."""

    table: Size
    positions: Size
    norm: Size
    head: Size
    dense: Size
    routed: Size
    first: int
    layers: int
    held: bool

    def block(self, number: int) -> Size:
        return self.dense if number < self.first else self.routed

    @property
    def _blocks(self) -> list[tuple[Size, int]]:
        return [(self.dense, self.first), (self.routed, self.layers - self.first)]

    @property
    def parameters(self) -> int:
        ends = self.table.weights + self.positions.weights + self.norm.weights + self.held * self.head.weights
        return ends + sum(n * size.weights for size, n in self._blocks)

    @property
    def multiplied(self) -> int:
        """Entries of the matrices that one token is multiplied by."""
        return self.head.active + sum(n * size.active for size, n in self._blocks)

    @property
    def met(self) -> int:
        """Entries that serve one token: all but those of idle experts."""
        ends = self.table.weights + self.positions.weights + self.norm.weights + self.held * self.head.weights
        return ends + sum(n * size.met for size, n in self._blocks)


@lru_cache(256)
def sizes(config: Config) -> Sizes:
    """Raises ValueError for a config of which no model can be built."""
    first = config.layers if config.experts is None else min(config.experts.first, config.layers)
    few = min(config.layers, first + 1) if config.experts is not None and first < config.layers else min(config.layers, 1)
    model = build(replace(config, layers=max(few, 1)), DryAxis("tp", 1), dry_weights("float16"))
    beginning, end = model.beginning, model.end

    def size(parameters: list) -> Size:
        each = [(prod(p.layout.shape), p.read, p.multiplies) for p in parameters]
        active, met = (int(sum(n * read for n, read, by in each if by or not only)) for only in (True, False))
        return Size(sum(n for n, *_ in each), sum(n for n, read, _ in each if read != 1), active, met)

    head = prod(end.head.matrix.layout.shape)
    return Sizes(
        size(beginning.embedding.parameters),
        size(beginning.positions.parameters) if beginning.positions is not None else Size(0),
        size(end.norm.parameters),
        Size(head, 0, head),
        size(model.blocks[0].parameters),
        size(model.blocks[-1].parameters),
        first,
        config.layers,
        not config.tied,
    )


def head_widths(c: Config) -> tuple[int, int]:
    """E of queries and keys, V of values."""
    if c.latent is not None:
        return c.latent.d_nope + c.latent.d_rope, c.latent.d_value
    E = c.d_head or c.d_model // c.heads
    return E, E
