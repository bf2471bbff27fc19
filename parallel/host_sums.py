"""Sums that know the hosts: inside a host through memory that its ranks share, between hosts as little as can be.

    mesh = Mesh(comm, sums=by_host(), dp=2, tp=2)

A sum takes three steps. The ranks of a host add theirs, each leader a part of it; the leaders of one number add these over
the hosts; the ranks of a host give one another what is known. Of S bytes over h hosts every host sends 2 (h-1)/h S to others in
an all-reduce, (h-1)/h S in a reduce-scatter or an all-gather: what a ring of hosts would send. On one host the second step is
empty.

The order of every sum is fixed: by rank inside a host, then by host, on every MPI. On one host that is rank order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter, sleep
from typing import NoReturn

import numpy as np
from mpi4py import MPI

from parallel.hosts import Hosts
from parallel.ordered import OrderedSums, added, dealt
from parallel.sums import BySize, Maker, Request, Sums
from parallel.window import SLOT, Steps, Window

# Seconds for which a rank that waits looks again and again, as MPI does, before it sleeps between looks, and for how long then.
AWAKE, ASLEEP = 1e-3, 1e-4
UFUNCS = {"sum": np.add, "max": np.maximum, "min": np.minimum}
# From so many bytes on, the window is faster than the MPIs' own: docs/sums.md.
LEAST = 2**16


class Script:
    """One verb under way, as steps; `crossed`: bytes that this rank has sent to other hosts for it."""

    def __init__(self, sums: HostSums, steps: Callable[[Script], Steps]) -> None:
        self._sums, self.steps, self.done, self.crossed = sums, steps(self), False, 0

    def Test(self) -> bool:
        self._sums.go_on()
        return self.done

    def Wait(self) -> None:
        self._sums.finish(self)


class HostSums(Sums):
    """`slot`: bytes of a slot of the window.

    Verbs go one after another, in the order in which they are called, which is the same on all ranks: who waits for one works
    on those before it too. A rank works on them in calls of verbs, `poke` and `wait` alone. So ranks that have started one
    wait for it at the same place of what else they exchange. Others may write into an array that is being summed at any time.
    """

    def __init__(self, comm: MPI.Intracomm, hosts: Hosts, slot: int = SLOT) -> None:
        super().__init__(comm)
        self.hosts = hosts
        host = self.comm.Split(hosts.host, hosts.rank)
        self.window = Window(host, slot)
        host.Free()
        several = hosts.count > 1
        self._between = self.comm.Split(hosts.number if hosts.leads else MPI.UNDEFINED, hosts.host) if several else None
        self._scripts: deque[Script] = deque()

    def close(self) -> None:
        if self._between:
            self._between.Free()
        # Those who have seen the axis may keep it.
        self.window = None

    def all_reduce(self, x: np.ndarray, y: np.ndarray, op: str, mpi_op: MPI.Op) -> int:
        return self._run(lambda script: self._all_reduce(script, x.reshape(-1), y.reshape(-1), UFUNCS[op]))

    def start_all_reduce(self, x: np.ndarray) -> Request:
        flat = x.reshape(-1)
        return self._started(lambda script: self._all_reduce(script, flat, flat, np.add))

    def reduce_scatter(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> int:
        return self._run(lambda script: self._reduce_scatter(script, x.reshape(-1), y.reshape(-1), counts))

    def start_reduce_scatter(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> Request:
        return self._started(lambda script: self._reduce_scatter(script, x.reshape(-1), y.reshape(-1), counts))

    def all_gather(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> int:
        return self._run(lambda script: self._all_gather(script, x.reshape(-1), y.reshape(-1), counts))

    def start_all_gather(self, x: np.ndarray, y: np.ndarray, counts: list[int]) -> Request:
        return self._started(lambda script: self._all_gather(script, x.reshape(-1), y.reshape(-1), counts))

    # --- one verb after another

    def _started(self, steps: Callable[[Script], Steps]) -> Script:
        script = Script(self, steps)
        self._scripts.append(script)
        self.go_on()
        return script

    def _run(self, steps: Callable[[Script], Steps]) -> int:
        script = self._started(steps)
        self.finish(script)
        return script.crossed

    def _ends(self) -> bool:
        """Go on with the first until it waits or ends, and say whether it has ended."""
        script = self._scripts[0]
        try:
            next(script.steps)
        except StopIteration:
            self._scripts.popleft().done = True
            return True
        except BaseException as error:
            # Who waits for it again is told again, and does not take it for done.
            script.steps = iter(partial(_raise, error), None)
            raise
        return False

    def go_on(self) -> None:
        """As far as it goes without waiting."""
        while self._scripts and self._ends():
            pass

    def finish(self, script: Script) -> None:
        """Wait until it is done. A rank that waits long sleeps between looks, so that others get the core. It lets MPI go on
        meanwhile: another rank may need what this one has sent."""
        since = perf_counter()
        while not script.done:
            if self._ends():
                since = perf_counter()
                continue
            self.comm.Iprobe()
            if perf_counter() - since < AWAKE:
                os.sched_yield()
            else:
                sleep(ASLEEP)

    # --- the three steps

    def _all_reduce(self, script: Script, x: np.ndarray, y: np.ndarray, add: np.ufunc) -> Steps:
        hosts, window = self.hosts, self.window
        at_once = window.entries(x.dtype) // hosts.most * hosts.most
        if hosts.count == 1 and window.directly(x.nbytes):
            yield from window.sum_directly(x, y, dealt(x.size, window.size), add)
            return
        if hosts.count == 1 and x.size <= at_once:
            # Every rank adds more, but half as many rounds are enough.
            yield from window.sum(x, y, add)
            return
        # Piece by piece, so that what is added on one host is given while it is in the caches, and that between hosts one piece
        # is on its way out, and another back, while the ranks work on a third.
        pieces = [_Piece(self, script, x[n : n + at_once], y[n : n + at_once], add) for n in range(0, x.size, at_once)]
        lag = int(hosts.count > 1)
        for n in range(len(pieces) + 2 * lag):
            for step in range(3):
                if 0 <= n - step * lag < len(pieces):
                    yield from pieces[n - step * lag].steps[step]

    def _reduce_scatter(self, script: Script, x: np.ndarray, y: np.ndarray, counts: list[int]) -> Steps:
        hosts, window, parts = self.hosts, self.window, list(_ranges(counts))
        if hosts.count == 1:
            yield from window.reduce([x[part] for part in parts], y, np.add)
            return
        # By leader: the parts of all ranks that it speaks for, by host.
        packed = [np.concatenate([x[parts[r]] for ranks in led for r in ranks]) for led in hosts.led]
        packed += [packed[0][:0]] * (window.size - hosts.leaders)
        mine = np.empty_like(packed[hosts.number])
        yield from window.reduce(packed, mine, np.add)
        total = mine
        if hosts.leads:
            led = hosts.led[hosts.number]
            request, room = self.start_exchange(script, mine, [sum(counts[r] for r in ranks) for ranks in led])
            yield from _until(request)
            total = added(room)
            y[...] = total[: y.size]
        # A host with more ranks than leaders: these get their parts from who spoke for them.
        rest = [led[hosts.host][1:] for led in hosts.led]
        if any(rest):
            sizes = [sum(counts[r] for r in ranks) for ranks in rest] + [0] * (window.size - hosts.leaders)
            of = next((j for j, ranks in enumerate(rest) if hosts.rank in ranks), None)
            room = [np.empty(n, x.dtype) if j == of else None for j, n in enumerate(sizes)]
            yield from window.gather(total[y.size :] if hosts.leads else mine, room, sizes)
            if of is not None:
                begin = sum(counts[r] for r in rest[of][: rest[of].index(hosts.rank)])
                y[...] = room[of][begin : begin + y.size]

    def _all_gather(self, script: Script, x: np.ndarray, y: np.ndarray, counts: list[int]) -> Steps:
        hosts, window, parts = self.hosts, self.window, list(_ranges(counts))
        yield from window.gather(x, [y[parts[r]] for r in hosts.here], [counts[r] for r in hosts.here])
        if hosts.count == 1:
            return
        # By leader: what it gets from each host; its own host has that already.
        sizes = [[sum(counts[r] for r in ranks) for ranks in led] for led in hosts.led]
        came = [np.empty(sum(of_hosts), x.dtype) for of_hosts in sizes]
        came += [came[0][:0]] * (window.size - hosts.leaders)
        mine = came[hosts.number]
        came[hosts.number] = None
        if hosts.leads:
            own = np.concatenate([y[parts[r]] for r in hosts.led[hosts.number][hosts.host]])
            yield from _until(self.start_gather(script, own, mine, sizes[hosts.number]))
        yield from window.gather(mine, came, [*map(sum, sizes), *[0] * (window.size - hosts.leaders)])
        came[hosts.number] = mine
        for led, from_hosts in zip(hosts.led, came, strict=False):
            begin = 0
            for r in (r for ranks in led for r in ranks):
                if hosts.of[r] != hosts.host:
                    y[parts[r]] = from_hosts[begin : begin + counts[r]]
                begin += counts[r]

    # --- between the leaders of one number, a piece for each host

    def start_exchange(self, script: Script, x: np.ndarray, counts: list[int]) -> tuple[MPI.Request, np.ndarray]:
        """What comes: every host's of this one's piece of x, (hosts, entries)."""
        mine = counts[self.hosts.host]
        room = np.empty((self.hosts.count, mine), x.dtype)
        script.crossed += (x.size - mine) * x.itemsize
        return self._between.Ialltoallv([x, counts], [room, [mine] * self.hosts.count]), room

    def start_gather(self, script: Script, x: np.ndarray, y: np.ndarray, counts: list[int]) -> MPI.Request:
        """What comes to y: every host's x."""
        script.crossed += (self.hosts.count - 1) * x.nbytes
        return self._between.Iallgatherv(x, [y, counts])


class _Piece:
    """Of an all-reduce, as its three `steps`, each to be gone through after the one before."""

    def __init__(self, sums: HostSums, script: Script, x: np.ndarray, y: np.ndarray, add: np.ufunc) -> None:
        self.sums, self.script, self.add = sums, script, add
        hosts, size = sums.hosts, sums.window.size
        self.between = hosts.count > 1 and hosts.leads
        self.counts = [*dealt(x.size, hosts.leaders), *[0] * (size - hosts.leaders)]
        ranges = list(_ranges(self.counts))
        self.x, self.y = [x[r] for r in ranges], [y[r] for r in ranges]
        self.mine = self.y[hosts.number]
        self.by_host = dealt(self.mine.size, hosts.count)
        self.steps = [self.reduce(), self.between_hosts(), self.gather()]

    def reduce(self) -> Steps:
        yield from self.sums.window.reduce(self.x, self.mine, self.add)
        if self.between:
            self.request, self.room = self.sums.start_exchange(self.script, self.mine, self.by_host)

    def between_hosts(self) -> Steps:
        if self.between:
            yield from _until(self.request)
            self.room = added(self.room, self.add)
            self.request = self.sums.start_gather(self.script, self.room, self.mine, self.by_host)

    def gather(self) -> Steps:
        if self.between:
            yield from _until(self.request)
        # This rank's is there already.
        self.y[self.sums.hosts.number] = None
        yield from self.sums.window.gather(self.mine, self.y, self.counts)


def _raise(error: BaseException) -> NoReturn:
    raise error


def _until(request: MPI.Request) -> Steps:
    while not request.Test():
        yield


def _ranges(counts: Sequence[int], begin: int = 0) -> Iterator[slice]:
    for count in counts:
        yield slice(begin, begin + count)
        begin += count


def by_host(least: int = LEAST, ordered: bool = False, slot: int = SLOT) -> Maker:
    """Makes sums that know the hosts, of messages of `least` bytes or more. `ordered`: in rank order wherever the ranks are, so
    that an axis over several hosts adds as OrderedSums does."""

    def make(comm: MPI.Intracomm, hosts: Sequence[int]) -> Sums:
        own, known = OrderedSums(comm) if ordered else Sums(comm), Hosts(hosts, comm.rank)
        if not known.shares or (ordered and known.count > 1):
            return own
        return BySize(own, HostSums(comm, known, slot), least)

    return make
