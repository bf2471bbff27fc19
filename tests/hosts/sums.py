"""An all-reduce over hosts by MPI and in three steps, in turn: seconds, and bytes by each host's own counter.

    python -m tests.hosts run -- mpirun -n 4 python -m tests.hosts.sums [BYTES [ROUNDS [RANK,RANK,...]]]

The ranks in another order are laid out on the hosts in that order.
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import sys
from statistics import median
from time import perf_counter

import numpy as np

from parallel.host_sums import by_host
from parallel.ledger import wire_bytes
from parallel.mesh import Mesh
from parallel.sums import of_mpi


def sent() -> int:
    """Bytes that have left this host. Of what is mounted here, /sys shows the front's network; /proc shows this host's."""
    with open("/proc/net/dev") as file:
        return next(int(line.partition(":")[2].split()[8]) for line in file if "eth0" in line)


def main(size: int = 2**24, rounds: int = 5, order: str = "") -> None:
    world = start.begin()
    if order:
        world = world.Create(world.Get_group().Incl([int(rank) for rank in order.split(",")]))
    meshes = {name: Mesh(world, sums=sums, dp=world.size) for name, sums in (("MPI", of_mpi), ("three steps", by_host(0)))}
    hosts = meshes["MPI"].hosts
    first = [hosts.index(host) for host in range(max(hosts) + 1)]
    x = np.ones(size // 4, "f4")
    y, seconds, left = np.empty_like(x), {name: [] for name in meshes}, {}
    for number in range(rounds + 1):
        for name, mesh in meshes.items():
            world.Barrier()
            before, begun = sent(), perf_counter()
            mesh.dp.all_reduce(x, out=y)
            took = max(world.allgather(perf_counter() - begun))
            world.Barrier()
            every = world.allgather(sent() - before)
            left[name] = [round(every[rank] / size, 3) for rank in first]
            # The first round warms up.
            seconds[name] += [took] * (number > 0)
            if (y != world.size).any():
                raise ValueError(f"{name}: the sum is wrong")
    crossed = world.allgather(meshes["three steps"].ledger.rows["all_reduce", "dp", "none"].crossed_bytes // (rounds + 1))
    if world.rank == 0:
        print(f"{size:,} bytes, hosts of the ranks {hosts}")
        for name in meshes:
            print(f"{name}: median {1e3 * median(seconds[name]):.1f} ms; of the bytes, each host sent {left[name]}")
        counted = [sum(n for n, at in zip(crossed, hosts, strict=True) if at == host) for host in range(len(first))]
        print(f"counted of each host {counted}, closed form {wire_bytes('all_reduce', size, len(first)):,}")
    for mesh in meshes.values():
        mesh.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
