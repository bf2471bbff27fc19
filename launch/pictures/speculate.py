"""The picture of what speculation gains: predicted curves and measured points."""

from __future__ import annotations

from typing import BinaryIO

from inference.speculation.gain import speedup


def picture(file: BinaryIO, rows: list[dict], verify: list[float], c: dict[str, float]) -> None:
    """Speed-up against gamma, a panel for each draft. Lines: alpha at these costs; dotted: by the theorem; points: measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, gammas = list(dict.fromkeys(r["prompt"] for r in rows)), range(1, len(verify))
    figure, panels = plt.subplots(1, len(c), figsize=(5.6 * len(c), 4.6), layout="constrained", sharey=True, squeeze=False)
    for axes, (kind, cost) in zip(panels[0], c.items(), strict=True):
        for n, alpha in enumerate((0.5, 0.7, 0.8, 0.9, 1.0)):
            grey = str(0.75 - 0.15 * n)
            here = [speedup(alpha, g, cost, verify[g]) for g in gammas]
            axes.plot(gammas, here, color=grey, linewidth=1.2)
            axes.plot(gammas, [speedup(alpha, g, cost) for g in gammas], color=grey, linewidth=0.8, linestyle=":")
            axes.annotate(f"{alpha:g}", (gammas[-1], here[-1]), (4, 0), textcoords="offset points", va="center", color=grey)
        for n, name in enumerate(names):
            own = [r for r in rows if r["prompt"] == name and r["draft"] == kind]
            alpha = own[0]["alpha"]
            label = f"{name}, alpha {alpha:.2f}" if alpha is not None else f"{name}, nothing drafted"
            axes.plot([r["gamma"] for r in own], [r["factor_measured"] for r in own], f"C{n}o", markersize=5, label=label)
        axes.axhline(1, color="C3", linewidth=0.8)
        axes.set(xlabel="gamma, tokens drafted", title=f"{kind}: c = {cost:.2f}", xticks=list(gammas))
        axes.grid(alpha=0.2)
        axes.legend(title="measured", fontsize=8, loc="upper left")
    highest = max(max(speedup(1.0, g, cost, verify[g]) for g in gammas) for cost in c.values())
    top = 1.15 * max(highest, *(r["factor_measured"] for r in rows))
    panels[0][0].set(ylabel="speed-up over plain decoding", ylim=(0, top))
    figure.suptitle(
        "Lines: alpha at the measured costs; dotted: where any number of rows costs as one (theorem 3.8)", fontsize=10
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)
