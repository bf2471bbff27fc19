"""What is made once for the tokens of a batch, and read by every layer that they pass through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from layers import pieces
from layers.pieces import Pieces
from layers.rope import Rope, Rotation
from parallel.rows import cut_rows
from parallel.shard import Cut


class Balance(NamedTuple):
    """A loss for experts that are chosen unevenly: its weight, and the tokens of the whole batch, over all ranks."""

    alpha: float
    tokens: int


@dataclass(frozen=True)
class Batch:
    """Sequences of `lengths`, one after another.

    `rotation`: of this rank's tokens' positions, where queries and keys are rotated. `rows`: how its tokens are cut over tp
    between products (sequence parallelism), or None where every rank of tp has all of them. `every`: the pieces of the
    sequences that each rank of cp has, and `rank`, which of these this one is; one rank has all, whole. `balance`: what routed
    layers are to add to the loss. `noted`: what layers have found out about these tokens, by layer.
    """

    lengths: Sequence[int]
    rotation: Rotation | None = None
    rows: Cut | None = None
    every: tuple[Pieces, ...] = ()
    rank: int = 0
    balance: Balance | None = None
    noted: dict[object, object] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.every:
            object.__setattr__(self, "every", (pieces.whole(self.lengths),))

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        rope: Rope | None,
        dtype: np.dtype | str | None,
        cut_over: int | None = None,
        **more: object,
    ) -> Batch:
        """With the rotation by `rope`, if there is one, and rows that are cut over so many ranks of tp, where they are; `more`:
        as the class has it."""
        plain = cls(lengths, **more)
        rows = None if cut_over is None else cut_rows(plain.tokens, cut_over)
        return replace(plain, rows=rows, rotation=None if rope is None else rope.at(plain.positions_T, dtype))

    @property
    def mine(self) -> Pieces:
        return self.every[self.rank]

    @property
    def tokens(self) -> int:
        """This rank's, before tp cuts them."""
        return pieces.count(self.mine)

    @property
    def positions_T(self) -> np.ndarray:
        """Each token's place in its sequence."""
        return pieces.positions(self.mine)

    @property
    def sequence_T(self) -> np.ndarray:
        """The number of each token's sequence."""
        return np.repeat([p.sequence for p in self.mine], [len(p) for p in self.mine]).astype(np.intp)

    def take(self, whole_T: np.ndarray) -> np.ndarray:
        """This rank's tokens of an array of all."""
        return whole_T if len(self.every) == 1 else whole_T[pieces.places(self.lengths, self.mine)]

    def require(self, tokens: int) -> None:
        """Raises ValueError unless the pieces sum to so many tokens."""
        if self.tokens != tokens:
            raise ValueError(f"sequences of {self.tokens} tokens together cannot be read from {tokens} tokens")


def rows_of(batch: Batch | None) -> Cut | None:
    """How the batch's tokens are cut over tp; without a batch they are whole."""
    return None if batch is None else batch.rows
