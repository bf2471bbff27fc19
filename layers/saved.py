"""What a layer keeps from forward to backward, in bytes."""

from __future__ import annotations

import numpy as np


def nbytes(saved: object) -> int:
    """Bytes of the arrays in a layer's saved value, each counted once."""
    arrays: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, tuple):
            for part in value:
                visit(part)
        elif isinstance(value, np.ndarray):
            arrays[id(value)] = value.nbytes

    visit(saved)
    return sum(arrays.values())
