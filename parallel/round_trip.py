"""What a message between two ranks takes."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from parallel.axis import Axis
from parallel.control import Control


def half_round_trips(axis: Axis, control: Control, x: np.ndarray, many: int) -> list[float]:
    """Seconds of x from the first rank of an axis to the second, by sending it there and back so many times after one to warm
    up: on these two; none on others. All ranks of `control` call it together."""
    took = []
    control.wait()
    if axis.rank < 2 <= axis.size:
        with axis.ledger.phase("compare"):
            for _ in range(many + 1):
                begun = perf_counter()
                if axis.rank == 0:
                    axis.start_send(x, 1).wait()
                    axis.receive(x.shape, x.dtype, 1)
                else:
                    axis.receive(x.shape, x.dtype, 0)
                    axis.start_send(x, 0).wait()
                took.append((perf_counter() - begun) / 2)
    control.wait()
    return took[1:]
