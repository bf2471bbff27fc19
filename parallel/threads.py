"""How many BLAS threads a rank gets: its host's cores / its host's ranks. Standard library only, for use before NumPy loads."""

from __future__ import annotations

import os

BLAS_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "OMP_NUM_THREADS",
)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas_threads(cores: int, local_ranks: int) -> int:
    """Threads for each of `local_ranks` ranks that share a host's `cores`: at least one, and never more than fit."""
    return max(1, cores // local_ranks)
