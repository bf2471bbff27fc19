"""Where the ranks run, and what joins them: hosts, threads, clocks, latency and bandwidth, sums; and a machine file of that."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import os
from functools import partial
from typing import NamedTuple

from mpi4py import MPI
from threadpoolctl import threadpool_info

from launch import report
from launch.measure import hosts
from launch.options import UsageError, parser
from launch.planning import here
from launch.terminal import targets
from launch.terminal.lines import size
from parallel import threads
from parallel.control import Control
from parallel.watch import clock
from plan import calibrate
from plan.wired import Link, Wired, written

LARGEST = calibrate.SIZES[-1]
# Each way to sum over an axis, as what makes a mesh that sums like that.
WAYS = {way: partial(start.make_mesh, sums=way) for way in ("mpi", "shared")}


class Rank(NamedTuple):
    """What a rank says of itself. `first`: of its host. Seconds: how far its clock is from rank 0's, and how sure that is."""

    rank: int
    host: str
    first: int
    cores: int
    threads: int
    offset: float
    uncertainty: float
    memory_gib: float


def options() -> argparse.ArgumentParser:
    p = parser(
        "hosts",
        "Show where the ranks run and what joins them: hosts, threads, clocks, latency and bandwidth inside a host and between "
        "hosts, sums by size and way.",
        (
            "mpirun -n 8 -hosts h1:4,h2:4 python -m launch.hosts",
            "mpirun -n 4 python -m launch.hosts --write-machine my.toml",
            "python -m launch.plan --machine my.toml --model llama3-8b --batch 8 --ranks 8",
        ),
        without=("dtype", "seed"),
    )
    p.add_argument("--largest", type=int, choices=calibrate.SIZES[1:], default=LARGEST, metavar="BYTES",
                   help="of messages and sums: 4096, 65536, 1048576 or 16777216")  # fmt: skip
    p.add_argument("--write-machine", metavar="FILE.toml", type=targets.File, help="write what launch.plan --machine reads")
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    if args.write_machine is not None and args.write_machine.suffix != ".toml":
        raise UsageError(f"--write-machine {args.write_machine} is no name of a machine's file: use FILE.toml")


def main(args: argparse.Namespace, comm: MPI.Intracomm, opened: None) -> int:
    control = Control(comm)
    every = control.everyone(_myself(comm))
    by_host = [[r.rank for r in every if r.first == first] for first in sorted({r.first for r in every})]
    require_even(every, by_host)
    links = _links(args, comm, control, by_host)
    sums = {way: _sums(args, comm, control, by_host, make) for way, make in WAYS.items()}
    machine = _machine(control, every, by_host, links, sums["mpi"], args.largest)
    if comm.rank:
        return 0
    why = None
    if args.write_machine is not None:
        text = written(machine, f"launch.hosts, on {len(by_host)} hosts of {machine.ranks} ranks")
        why = targets.write(args.write_machine, lambda file: file.write(text.encode()))
    result = report.header("hosts") | {
        "ranks": comm.size,
        "hosts": [_host([every[r] for r in ranks]) for ranks in by_host],
        "links": [
            {"from": {"rank": a, "host": every[a].host}, "to": {"rank": b, "host": every[b].host}, **found._asdict()}
            for (a, b), found in links.items()
        ],
        "all_reduce": [
            {"way": way, "over": over, "ranks": ranks, "bytes": n, "seconds": took}
            for way, scopes in sums.items()
            for over, (ranks, curve) in scopes.items()
            for n, took in curve.items()
        ],
        "machine": None if args.write_machine is None else str(args.write_machine),
    }
    return report.publish(args.json, result, partial(show, result), agreed=None, unwritten=[why])


def _myself(comm: MPI.Intracomm) -> Rank:
    host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first = host.bcast(comm.rank)
    host.Free()
    blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    reading = clock.read(comm)
    gib = here.memory_gib(comm.size)
    return Rank(comm.rank, os.uname().nodename, first, threads.cores(), max(blas, default=1), *reading[1:], gib)


def require_even(every: list[Rank], by_host: list[list[int]]) -> None:
    """Raises UsageError where hosts have not as many ranks each, one after another: these make no mesh of hosts."""
    counts = {every[ranks[0]].host: len(ranks) for ranks in by_host}
    if len({len(ranks) for ranks in by_host}) > 1:
        said = ", ".join(f"{host} has {n}" for host, n in counts.items())
        raise UsageError(f"hosts have not as many ranks each: {said}: give each the same, as in -hosts h1:2,h2:2")
    if [r for ranks in by_host for r in ranks] != list(range(len(every))):
        raise UsageError("the ranks of a host do not follow one another: let mpirun fill a host before it goes to the next")


def _links(
    args: argparse.Namespace, comm: MPI.Intracomm, control: Control, by_host: list[list[int]]
) -> dict[tuple[int, int], Link]:
    """By their two ranks: the first two of each host, and the first of each two hosts that are neighbours."""
    pairs = [(ranks[0], ranks[1]) for ranks in by_host if len(ranks) > 1]
    pairs += [tuple(sorted((by_host[a][0], by_host[b][0]))) for a, b in hosts.neighbours(by_host)]
    make = partial(start.make_mesh, args)
    return {(a, b): hosts.link(comm, control, make, a, b, args.largest) for a, b in pairs}


def _sums(
    args: argparse.Namespace, comm: MPI.Intracomm, control: Control, by_host: list[list[int]], make: object
) -> dict[str, tuple[int, dict[int, float]]]:
    """By what is summed over: how many ranks, and seconds by bytes."""
    many, each = len(by_host), len(by_host[0])
    found = {}
    with make(args, comm, dp=many, tp=each) as mesh:
        if each > 1:
            found["inside a host"] = each, hosts.all_reduce(mesh.tp, control, args.largest)
        if many > 1:
            found["between hosts"] = many, hosts.all_reduce(mesh.dp, control, args.largest)
        if each > 1 and many > 1:
            found["all ranks"] = comm.size, hosts.all_reduce(mesh.over("dp", "tp"), control, args.largest)
    return found


def _machine(control: Control, every: list[Rank], by_host: list[list[int]], links: dict, sums: dict, largest: int) -> Wired:
    mine = calibrate.rate("float32"), calibrate.bandwidth("float32"), calibrate.call()
    rates, bandwidths, calls = zip(*control.everyone(mine), strict=True)
    rate, bandwidth, call = min(rates), min(bandwidths), max(calls)
    within = [found for (a, b), found in links.items() if every[a].first == every[b].first]
    beyond = [found for (a, b), found in links.items() if every[a].first != every[b].first]
    inside = _slowest(within) or Link(call, bandwidth)
    between, each, many = _slowest(beyond), len(by_host[0]), len(by_host)
    summed = sums.get("inside a host", (1, {}))[1]
    bus = hosts.bus(each, largest, summed[largest]) if each > 1 else inside.rate
    reached = 1.0
    if between is not None:
        reached = min(1.0, each * hosts.bus(many, largest, sums["between hosts"][1][largest]) / between.rate)
    small = summed[hosts.SMALL] if each > 1 else inside.seconds
    memory = min(r.memory_gib for r in every)
    return Wired("hosts", each, memory, rate, bandwidth, call, inside, bus, small, between, reached)


def _slowest(links: list[Link]) -> Link | None:
    return Link(max(one.seconds for one in links), min(one.rate for one in links)) if links else None


def _host(ranks: list[Rank]) -> dict:
    return {
        "host": ranks[0].host,
        "ranks": [r.rank for r in ranks],
        "cores": ranks[0].cores,
        "threads_per_rank": max(r.threads for r in ranks),
        "free_memory_gib_per_rank": min(r.memory_gib for r in ranks),
        "clock_offset_seconds": ranks[0].offset,
        "clock_uncertainty_seconds": max(r.uncertainty for r in ranks),
    }


def show(result: dict) -> None:
    """The report for people."""
    report.table(
        f"{result['ranks']} ranks on {len(result['hosts'])} host{'s' * (len(result['hosts']) > 1)}",
        ("host", "ranks", "cores", "threads a rank", "GiB free a rank", "clock ms off", "+- us"),
        [
            (h["host"], f"{h['ranks'][0]} to {h['ranks'][-1]}" if len(h["ranks"]) > 1 else h["ranks"][0], h["cores"],
             h["threads_per_rank"], f"{h['free_memory_gib_per_rank']:.1f}", f"{1e3 * h['clock_offset_seconds']:,.3f}",
             f"{1e6 * h['clock_uncertainty_seconds']:,.0f}")
            for h in result["hosts"]
        ],
    )  # fmt: skip
    if links := result["links"]:
        ends = [[f"{link[end]['rank']} on {link[end]['host']}" for end in ("from", "to")] for link in links]
        report.table(
            "A message from one rank to another",
            ("from", "to", "latency us", "GB/s"),
            [(*of, f"{1e6 * link['seconds']:,.0f}", f"{link['rate'] / 1e9:.3f}") for of, link in zip(ends, links, strict=True)],
            keys=2,
        )
    rows = result["all_reduce"]
    if rows:
        wire = [hosts.bus(r["ranks"], r["bytes"], r["seconds"]) for r in rows]
        report.table(
            "Sums (all_reduce), and what a rank sends a second on a ring",
            ("over", "way", "ranks", "message", "ms", "GB/s"),
            [(r["over"], r["way"], r["ranks"], size(r["bytes"]), f"{1e3 * r['seconds']:,.3f}", f"{w / 1e9:.3f}")
             for r, w in zip(rows, wire, strict=True)],
            keys=2,
        )  # fmt: skip
    if result["machine"]:
        report.say(f"machine: {result['machine']}, for launch.plan --machine {result['machine']}")


if __name__ == "__main__":
    start.run(options(), check, main)
