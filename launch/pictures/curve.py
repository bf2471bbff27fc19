"""The picture of a training run's loss."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import BinaryIO

import numpy as np


def draw(file: BinaryIO, losses: Sequence[float], validation_bits: float) -> None:
    """Bits per byte by step, as a PNG; `losses`: in nats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bits = np.array(losses) / log(2)
    wide = max(1, len(bits) // 50)
    smooth = np.convolve(bits, np.ones(wide) / wide, "valid")
    steps = np.arange(1, len(bits) + 1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, bits, color="0.8", linewidth=0.8, label="each step")
    axes.plot(steps[wide - 1 :], smooth, color="C0", label=f"mean of {wide} steps")
    axes.axhline(validation_bits, color="C3", linestyle="--", label=f"validation: {validation_bits:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte", title="Training loss", ylim=(min(bits.min(), validation_bits) * 0.95, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    plt.close(figure)
