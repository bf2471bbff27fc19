"""What is made once for the tokens of a batch, and read by every layer that they pass through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layers.rope import Rope, Rotation
from parallel.shard import Cut


@dataclass(frozen=True)
class Batch:
    """Sequences of `lengths`, one after another. `rotation`: of their positions, where queries and keys are rotated. `rows`:
    how the tokens are cut over tp between products (sequence parallelism), or None where every rank has all of them."""

    lengths: Sequence[int]
    rotation: Rotation | None = None
    rows: Cut | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], rope: Rope | None, dtype: np.dtype | str, rows: Cut | None = None) -> Batch:
        """With the rotation by `rope`, if there is one."""
        return cls(lengths, None if rope is None else rope.at(positions(lengths), dtype), rows)

    @property
    def positions_T(self) -> np.ndarray:
        """Each token's place in its sequence."""
        return positions(self.lengths)


def positions(lengths: Sequence[int]) -> np.ndarray:
    """0, 1, ... of each sequence (T,)."""
    return np.concatenate([np.arange(n) for n in lengths])
