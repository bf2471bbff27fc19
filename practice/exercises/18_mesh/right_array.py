"""The grid as an array: where the rank stands in it, and the line through that place."""

import numpy as np


def coordinates(rank, dp, tp):
    return np.unravel_index(rank, (dp, tp))


def members(rank, axis, dp, tp):
    grid = np.arange(dp * tp).reshape(dp, tp)
    (i, j) = np.argwhere(grid == rank)[0]
    return grid[i] if axis == "tp" else grid[:, j]
