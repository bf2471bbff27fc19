"""The loss curve of a training run, as CSV and as PNG."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from math import log
from pathlib import Path

import numpy as np


def write(folder: Path, losses: Sequence[float], tokens: int, validation_bits: float) -> list[Path]:
    """folder/loss.csv (step, tokens, loss in nats, bits per byte) and folder/loss.png; `tokens`: of a step. Returns both."""
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / "loss.csv", folder / "loss.png"
    with open(table, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("step", "tokens", "loss_nats", "bits_per_byte"))
        rows.writerows((n + 1, (n + 1) * tokens, repr(loss), repr(loss / log(2))) for n, loss in enumerate(losses))

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
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return [table, picture]
