"""How long one operation takes on a GPU: products in tiles, attention, passes over memory (docs/planning.md, "A kernel").

The time of a product is the larger of what its tiles compute, in whole waves over the SMs, and what it moves. Constants are the
machine's; the shares of a tile's shape and of a width's alignment are the same for all of them, guesses in the direction that
CUTLASS's and NVIDIA's guides describe.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, exp

from plan.account import AGAIN, FORWARD, Operation
from plan.machine import Machine
from plan.strategy import DTYPES

# (m, n, share of the rate) of the tiles that libraries choose from.
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (256, 64, 0.85), (64, 256, 0.85), (128, 64, 0.80),
         (64, 128, 0.80), (64, 64, 0.62))  # fmt: skip
# A width that is no multiple of 64 entries leaves units idle or loads half lines.
ALIGNED = ((64, 1.0), (32, 0.95), (16, 0.88), (8, 0.78), (1, 0.35))
SPLITS, LEAST_K = (1, 2, 4, 8), 512
# Flash attention: heads narrower than this fill its tiles worse; rows of a block.
WIDE, NARROWER, ROWS = 128, 0.35, 128


class Gpu:
    """The device of a machine file."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.kernel, self.host = machine.kernel, machine.host
        self._product = lru_cache(8192)(self._product_seconds)

    def seconds(self, operation: Operation, dtype: str) -> float:
        """Of all its times, launches apart. Raises ValueError where the machine has no such peak or kernel."""
        m, kind, shape = self.machine, operation.kind, operation.shape
        if kind == "pass":
            one = shape[0] / (m.memory * m.passes)
        elif kind in ("product", "unfused"):
            one = self._product(kind, *map(ceil, shape), _dtype(dtype, kind), DTYPES[dtype])
        elif kind.startswith("flash"):
            one = self._flash(operation, _dtype(dtype, kind))
        else:
            raise ValueError(f"a GPU has no time of a {kind}")
        return operation.times * one

    def explained(self, operation: Operation, dtype: str) -> tuple[float, float, str]:
        """Seconds, bytes moved, and what limits it."""
        m, kind, b = self.machine, operation.kind, DTYPES[dtype]
        took = self.seconds(operation, dtype)
        if kind == "pass":
            return took, operation.times * operation.shape[0], "memory"
        if kind.startswith("flash"):
            heads, queries, _, widths = operation.shape
            return took, operation.times * heads * queries * widths * 2 * b, "attention's rate"
        M, N, K, batch = operation.shape
        moved = operation.times * batch * (M * K + K * N + M * N) * b
        if took <= moved / (m.memory * m.passes) * 1.0001:
            return took, moved, "memory"
        ideal = (
            operation.times
            * 2
            * M
            * N
            * K
            * batch
            / (m.peak(_dtype(dtype, kind)) * (m.product if kind == "product" else m.unfused))
        )
        lost = 1 - ideal / took
        reason = "widths" if _aligned(ceil(N), ceil(K)) < 1 else "tiles"
        return took, moved, "rate of products" if lost < 0.1 else f"{reason}: {100 * lost:.0f} % lost"

    def _product_seconds(self, kind: str, M: int, N: int, K: int, batch: int, dtype: str, b: int) -> float:
        m = self.machine
        if not (M and N and K and batch):
            return 0.0
        share = m.product if kind == "product" else m.unfused
        rate = m.peak(dtype) / m.sms * share * _aligned(N, K)
        moved = m.memory * m.passes
        best = float("inf")
        for tile_m, tile_n, reached in TILES:
            tiles = ceil(M / tile_m) * ceil(N / tile_n) * batch
            for split in SPLITS:
                if split > 1 and K / split < LEAST_K:
                    break
                waves = ceil(tiles * split / m.sms)
                one = waves * 2 * tile_m * tile_n * (K / split + m.product_k0) / (rate * reached)
                best = min(best, one + (8 * M * N * batch / moved if split > 1 else 0.0))
        return max(best, batch * (M * K + K * N + M * N) * b / moved)

    def _flash(self, operation: Operation, dtype: str) -> float:
        m, name, (heads, queries, pairs, widths) = self.machine, operation.kind, operation.shape
        if name not in m.flash:
            raise ValueError(f"{m.name} has no {name}: use one of {', '.join(['unfused', *m.flash])}")
        forward, backward = m.flash[name]
        ahead = operation.phase in (FORWARD, AGAIN)
        operations = 2 * heads * pairs * widths * (1 if ahead else 2.5)
        share = (forward if ahead else backward) * min(1.0, (widths / 2 / WIDE) ** NARROWER)
        filled = 1 - exp(-heads * queries / ROWS / m.sms)
        return operations / (m.peak(dtype) * share * filled)


def _dtype(dtype: str, kind: str) -> str:
    """Attention beside fp8 products is in bf16."""
    return "bf16" if dtype == "fp8" and kind != "product" else dtype


def _aligned(N: int, K: int) -> float:
    return min(next(share for multiple, share in ALIGNED if n % multiple == 0) for n in (N, K))
