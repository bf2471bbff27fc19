"""The picture of how often each expert was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np


def draw(file: BinaryIO, load: Mapping[str, Sequence[int]]) -> None:
    """Tokens of each expert beside the mean, a layer a row, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, rows = plt.subplots(
        len(load), 1, figsize=(7, 0.6 + 1.3 * len(load)), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, (layer, counts) in zip(rows[:, 0], load.items(), strict=True):
        mean = np.mean(counts)
        axes.bar(range(len(counts)), counts, color=["C3" if n == max(counts) else "C0" for n in counts])
        axes.axhline(mean, color="0.4", linestyle="--", linewidth=0.8)
        axes.set_title(f"{layer}: the busiest has {max(counts) / mean:.2f} times the mean", fontsize=9, loc="left")
        axes.set_ylabel("tokens")
    rows[-1, 0].set_xlabel("expert")
    figure.savefig(file, dpi=120)
    plt.close(figure)
