"""How many BLAS threads a rank gets: its host's cores / its host's ranks. Standard library only, for use before NumPy loads."""

from __future__ import annotations

import os
from collections.abc import Mapping

BLAS_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "OMP_NUM_THREADS",
)

# What launchers say in the environment: ranks in all, this rank, ranks on this host.
_SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "SLURM_NTASKS")
_RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
_LOCAL = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


def _number(names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
    return next((int(environ[n]) for n in names if environ.get(n, "").isdecimal()), None)


def launched_size(environ: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks the launcher says it started; None without a launcher."""
    return _number(_SIZE[:3], environ)


def launched_rank(environ: Mapping[str, str] = os.environ) -> int:
    """This rank, as the launcher says; 0 without one. For use before MPI starts."""
    return _number(_RANK, environ) or 0


def launched_local_size(environ: Mapping[str, str] = os.environ) -> int:
    """Ranks on this host, as far as the environment tells."""
    return _number(_LOCAL, environ) or launched_size(environ) or 1


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas_threads(cores: int, local_ranks: int) -> int:
    """Threads for each of `local_ranks` ranks that share a host's `cores`: at least one, and never more than fit."""
    return max(1, cores // local_ranks)
