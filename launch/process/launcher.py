"""What the launcher that started this rank says in the environment, before MPI starts. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# What launchers say in the environment: ranks in all, this rank, this rank and all ranks on this host.
_SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "SLURM_NTASKS")
_RANK = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
_LOCAL_RANK = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
_LOCAL = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")


def _number(names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
    return next((int(environ[n]) for n in names if environ.get(n, "").isdecimal()), None)


def size(environ: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks the launcher says it started; None without a launcher."""
    return _number(_SIZE[:3], environ)


def absent(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether something else has set PMI_SIZE: a launcher also says how it is reached."""
    return _number(_SIZE[:1], environ) is not None and not {"PMI_FD", "PMI_PORT", *_SIZE[1:]} & environ.keys()


def by_open_mpi(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether it is Open MPI's."""
    return "OMPI_COMM_WORLD_SIZE" in environ


def job(environ: Mapping[str, str] = os.environ) -> str:
    """The entry of the environment that all ranks of this job have and no others, where its launcher makes one; else ""."""
    return f"PMIX_NAMESPACE={environ['PMIX_NAMESPACE']}" if "PMIX_NAMESPACE" in environ else ""


def rank(environ: Mapping[str, str] = os.environ) -> int:
    """This rank, as the launcher says; 0 without one. For use before MPI starts."""
    return _number(_RANK, environ) or 0


def local_size(environ: Mapping[str, str] = os.environ) -> int:
    """Ranks on this host, as far as the environment tells."""
    return _number(_LOCAL, environ) or _of_slurm(environ) or size(environ) or 1


def _of_slurm(environ: Mapping[str, str]) -> int | None:
    """Ranks on this host as srun says it: 2(x3),1 are four hosts, by their numbers."""
    counts: list[int] = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = _number(("SLURM_NODEID",), environ) or 0
    return counts[node] if node < len(counts) else None


def local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """This rank among those of this host; 0 without a launcher."""
    found = _number(_LOCAL_RANK, environ)
    return rank(environ) if found is None else found


def several_hosts(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ranks are on other hosts too, as far as the environment tells."""
    return local_size(environ) < (size(environ) or 1)


def host(environ: Mapping[str, str] = os.environ) -> str:
    """The name of this host, where there are several; else ""."""
    return os.uname().nodename if several_hosts(environ) else ""
