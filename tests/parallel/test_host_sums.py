"""Sums that know the hosts, over every way in which these ranks could lie on hosts: the same numbers, bits and bytes."""

import gc
from functools import reduce
from itertools import product
from operator import add

import numpy as np
import pytest

from parallel import peers, window
from parallel.host_sums import HostSums, by_host
from parallel.hosts import numbered
from parallel.ledger import wire_bytes
from parallel.mesh import Mesh
from parallel.ordered import OrderedSums
from parallel.shard import Cut, even
from parallel.sums import BySize, Sums
from parallel.watch.messages import Messages

on_ranks = pytest.mark.mpi
# Slots of a page, so that arrays of a few pages take several rounds.
SLOT = 4096


def every_way(ranks):
    """Where so many ranks can lie; of four, what two and three have not shown."""
    ways = [hosts for hosts in product(range(ranks), repeat=ranks) if numbered(hosts) == hosts]
    return ways if ranks < 4 else [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 1, 0), (0, 1, 1, 1), (0, 1, 0, 2)]


@pytest.fixture(params=["slots", "directly"])
def way(request, monkeypatch):
    """Through the slots of the window, or from memory to memory."""
    monkeypatch.setattr(window, "DIRECT", {"slots": 2**60, "directly": 0}[request.param])
    return request.param


def meshes(comm, least=0, **more):
    sums = by_host(least, slot=SLOT, **more)
    for hosts in every_way(comm.size):
        with Mesh(comm, check=True, watchers=[Messages()], sums=sums, hosts=hosts, tp=comm.size) as mesh:
            yield hosts, mesh


def every(comm, shape, dtype, seed=0):
    """Each rank's array, by rank: small integers, so that sums are exact."""
    return [np.random.default_rng([seed, r]).integers(-9, 9, shape).astype(dtype) for r in range(comm.size)]


def uneven(length, ranks):
    """Parts of which the first is much the largest, and the last is empty."""
    ends = [length - length // 3, *[length] * (ranks - 1)] if ranks > 1 else [length]
    return Cut(length, tuple(zip([0, *ends[:-1]], ends, strict=True)))


@on_ranks
@pytest.mark.parametrize("dtype", ["f4", "i1"])
@pytest.mark.parametrize("rows", [1, 1500])
def test_sums_and_what_is_gathered_are_exact_wherever_the_ranks_are(comm, way, dtype, rows):
    parts = every(comm, (rows, 3), dtype)
    want, mine, rank = reduce(add, parts), parts[comm.rank], comm.rank
    for hosts, mesh in meshes(comm):
        tp, before = mesh.tp, mine.copy()
        np.testing.assert_array_equal(tp.all_reduce(mine), want, str(hosts), strict=True)
        for op, fold in (("max", np.maximum), ("min", np.minimum)):
            np.testing.assert_array_equal(tp.all_reduce(mine, op), reduce(fold, parts), str(hosts))
        np.testing.assert_array_equal(tp.start_all_reduce(mine.copy()).wait(), want, str(hosts), strict=True)
        for cut in [uneven(rows, comm.size), *([even(rows, comm.size)] if rows >= comm.size else [])]:
            own = cut.take(want, 0, rank)
            np.testing.assert_array_equal(tp.reduce_scatter(mine, 0, cut), own, str(hosts), strict=True)
            np.testing.assert_array_equal(tp.start_reduce_scatter(mine, cut).wait(), own, str(hosts), strict=True)
            np.testing.assert_array_equal(tp.all_gather(own, 0, cut), want, str(hosts), strict=True)
            np.testing.assert_array_equal(tp.start_all_gather(own, cut).wait(), want, str(hosts), strict=True)
        np.testing.assert_array_equal(mine, before)


@on_ranks
def test_each_is_the_others_adjoint(comm, way):
    """<Fx, y> == <x, F*y>, over all ranks, of small integers: gathering and scattering are each other's, a sum its own."""
    x, y = every(comm, (700, 2), "f8", 1), every(comm, (700, 2), "f8", 2)
    cut, r = even(700, comm.size), comm.rank
    both = lambda a, b: comm.allreduce(float((a * b).sum()))  # noqa: E731
    for hosts, mesh in meshes(comm):
        tp, own = mesh.tp, cut.take(x[r], 0, r)
        assert both(tp.all_gather(own, 0, cut), y[r]) == both(own, tp.reduce_scatter(y[r], 0, cut)), hosts
        assert both(tp.all_reduce(x[r]), y[r]) == both(x[r], tp.all_reduce(y[r])), hosts


def of_many_sizes(comm, entries):
    """Each rank's array, by rank: of sizes so different that the order of their sum shows."""
    random = np.random.default_rng(7)
    return [(random.standard_normal(entries) * 10.0 ** random.integers(-3, 4, entries)).astype("f4") for _ in range(comm.size)]


@on_ranks
def test_the_order_is_by_rank_on_a_host_and_then_by_host(comm, way):
    parts = of_many_sizes(comm, 4099)
    for hosts, mesh in meshes(comm):
        by = [reduce(add, [p for p, host in zip(parts, hosts, strict=True) if host == h]) for h in range(max(hosts) + 1)]
        got = mesh.tp.all_reduce(parts[comm.rank])
        if len(by) < comm.size:
            np.testing.assert_array_equal(got, reduce(add, by), str(hosts))
        assert len(set(comm.allgather(got.tobytes()))) == 1, hosts


@on_ranks
def test_where_rank_order_is_asked_for_it_is_kept_on_any_hosts(comm, way):
    parts = of_many_sizes(comm, 4099)
    for hosts, mesh in meshes(comm, ordered=True):
        np.testing.assert_array_equal(mesh.tp.all_reduce(parts[comm.rank]), reduce(add, parts), str(hosts))
        several, shares = len(set(hosts)) > 1, len(set(hosts)) < comm.size
        assert type(getattr(mesh.tp._sums, "large", mesh.tp._sums)) is (HostSums if shares and not several else OrderedSums)


@on_ranks
def test_a_nan_of_one_rank_is_kept(comm, way):
    x = np.full(3000, np.nan if comm.rank == comm.size - 1 else comm.rank, "f4")
    for _, mesh in meshes(comm):
        for op in ("sum", "max", "min"):
            assert np.isnan(mesh.tp.all_reduce(x, op)).all()


@on_ranks
def test_what_crosses_hosts_is_the_wire_of_a_ring_of_hosts(comm, way):
    """Counted of all ranks of a host together; and the logical verb is counted as ever."""
    p, rows = comm.size, 1440
    cut = even(rows, p)
    x = np.ones((rows, 2), "f8")
    for hosts, mesh in meshes(comm):
        tp = mesh.tp
        tp.all_reduce(x)
        tp.start_all_reduce(x.copy()).wait()
        tp.reduce_scatter(x, 0, cut)
        tp.all_gather(x[: cut.size(comm.rank)], 0, cut)
        rows_of = {verb: mesh.ledger.rows[verb, "tp", "none"] for verb in ("all_reduce", "reduce_scatter", "all_gather")}
        assert {v: (row.calls, row.message_bytes) for v, row in rows_of.items()} == {
            "all_reduce": (2, 2 * x.nbytes), "reduce_scatter": (1, x.nbytes), "all_gather": (1, x.nbytes)
        }  # fmt: skip
        for verb, row in rows_of.items():
            counted = comm.allgather(row.crossed_bytes)
            of_hosts = [sum(n for n, h in zip(counted, hosts, strict=True) if h == host) for host in range(max(hosts) + 1)]
            if 1 < len(of_hosts) < p:
                # Over three hosts pieces are as even as they go.
                alike = len({hosts.count(h) for h in hosts}) == 1
                if len(of_hosts) == 2 and (verb == "all_reduce" or alike):
                    assert of_hosts == [wire_bytes(verb, row.message_bytes, len(of_hosts))] * len(of_hosts), (hosts, verb)
                assert sum(of_hosts) == len(of_hosts) * wire_bytes(verb, row.message_bytes, len(of_hosts)), (hosts, verb)
            else:
                assert not any(counted)


@on_ranks
def test_several_under_way_that_some_ranks_poke(comm, way):
    """With verbs that wait, and small ones that MPI does, in between."""
    lengths = (3001, 17, 2640)
    for hosts, mesh in meshes(comm, least=1000):
        tp, pending, wanted = mesh.tp, [], []
        for n in lengths:
            parts = every(comm, (n,), "f8", n)
            pending.append(tp.start_all_reduce(parts[comm.rank].copy()))
            wanted.append(reduce(add, parts))
            for _ in range(3 * comm.rank):
                pending[0].poke()
                pending[-1].poke()
            assert tp.all_reduce(np.ones(2000))[0] == comm.size
            assert tp.all_reduce(np.ones(3))[0] == comm.size
        for p, want in zip(reversed(pending), reversed(wanted), strict=True):
            np.testing.assert_array_equal(p.wait(), want, str(hosts))


@on_ranks
def test_small_messages_go_as_before_and_so_do_ranks_that_share_no_host(comm):
    for hosts, mesh in meshes(comm, least=1024):
        sums = mesh.tp._sums
        assert type(sums) is (BySize if len(set(hosts)) < comm.size else Sums)
        if type(sums) is BySize:
            assert type(sums.large) is HostSums
            window = sums.large.window
            mesh.tp.all_reduce(np.ones(127))
            assert window._rounds == 0
            mesh.tp.all_reduce(np.ones(128))
            assert window._rounds > 0 or window.size == 1


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_waits_here_lets_mpi_go_on(comm):
    """What it has sent before is read by another one, which comes only after that."""
    with Mesh(comm, sums=by_host(0), tp=comm.size) as mesh:
        tp, large = mesh.tp, np.arange(2.0**20)
        if tp.rank == 0:
            sent = tp.start_send(large, 1)
        if tp.rank == 1:
            assert (tp.receive(large.shape, large.dtype, 0) == large).all()
        assert tp.all_reduce(np.ones(5000))[0] == comm.size
        if tp.rank == 0:
            sent.wait()


@on_ranks
def test_axes_groups_and_meshes_beside_one_another(comm):
    """Each has a window of its own."""
    n, other = comm.size, 2 if comm.size % 2 == 0 else 1
    x = np.full(3000, 10.0**comm.rank)
    with (
        Mesh(comm, sums=by_host(0, slot=SLOT), dp=n // other, tp=other) as mesh,
        Mesh(comm, sums=by_host(0, slot=SLOT), tp=n) as second,
    ):
        for axis in (mesh.dp, mesh.tp, second.tp, mesh.over("dp", "tp")):
            assert (axis.all_reduce(x) == sum(10.0**r for r in axis.members)).all()
        started = [axis.start_all_reduce(x.copy()) for axis in (mesh.tp, second.tp, mesh.dp)]
        for pending, axis in zip(started, (mesh.tp, second.tp, mesh.dp), strict=True):
            assert (pending.wait() == sum(10.0**r for r in axis.members)).all()
        if n > 2 and comm.rank < 2:
            assert (second.tp.group([0, 1]).all_reduce(x) == 11).all()


def windows():
    gc.collect()
    with open("/proc/self/maps") as maps:
        return sum("memfd:rankwise" in line for line in maps)


@on_ranks
def test_no_window_is_left(comm):
    before = windows()
    with Mesh(comm, sums=by_host(0), tp=comm.size) as mesh:
        mesh.tp.all_reduce(np.ones(5000))
        assert windows() == before + (comm.size > 1)
    del mesh
    assert windows() == before


def wrong(comm, got, x):
    """Whether any rank has not got the sum of x times 1, 10, 100, ..."""
    return comm.allreduce(int((got != x * sum(10.0**r for r in range(comm.size))).any())) > 0


class Hasty(window.Window):
    """A window in which nobody waits until the others have put."""

    def _round(self, put, take, dtype):
        others, self._put = self._put, []
        yield from super()._round(put, take, dtype)
        self._put = others


@pytest.mark.mpi(min_size=2)
def test_a_wait_left_out_shows(comm, monkeypatch):
    monkeypatch.setattr("parallel.host_sums.Window", Hasty)
    x = np.arange(500.0)
    with Mesh(comm, sums=by_host(0), tp=comm.size) as mesh:
        if comm.rank == 0:
            comm.Barrier()
        got = mesh.tp.all_reduce(x * 10.0**comm.rank)
        if comm.rank:
            comm.Barrier()
        assert wrong(comm, got, x)


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_goes_on_before_all_have_written_shows(comm, monkeypatch):
    monkeypatch.setattr(window, "DIRECT", 0)
    begun = window.Window._directly

    def hasty(self, what, arrays, take):
        others, self._taken = self._taken, []
        yield from begun(self, what, arrays, take)
        self._taken = others

    monkeypatch.setattr(window.Window, "_directly", hasty)
    x, y, write = np.arange(3000.0), np.zeros(3000), peers.Peers.write
    with Mesh(comm, sums=by_host(0, slot=SLOT), tp=comm.size) as mesh:
        if comm.rank == 1:
            monkeypatch.setattr(peers.Peers, "write", lambda *args: (comm.Barrier(), write(*args)))
        mesh.tp.all_reduce(x * 10.0**comm.rank, out=y)
        early = y.copy()
        if comm.rank != 1:
            for _ in range(comm.size - 1):
                comm.Barrier()
        assert wrong(comm, early, x)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("other", ["size", "dtype", "op", "verb"])
def test_ranks_that_do_not_agree_write_nothing(comm, monkeypatch, other):
    """Where nobody looks at the agreement of verbs, the sums themselves do, before they write into another's arrays."""
    monkeypatch.setattr(window, "DIRECT", 0)
    x, room = np.ones(3000), np.full(9000, 7.0)
    out, odd = room[3000:6000], comm.rank == comm.size - 1
    with Mesh(comm, check=False, sums=by_host(0, slot=SLOT), tp=comm.size) as mesh:
        others = {
            "size": lambda: mesh.tp.all_reduce(np.ones(3300)),
            "dtype": lambda: mesh.tp.all_reduce(np.ones(6000, "f4")),
            "op": lambda: mesh.tp.all_reduce(x, "max", out=out),
            "verb": lambda: mesh.tp.reduce_scatter(x, 0, even(3000, comm.size)),
        }
        call = others[other] if odd else lambda: mesh.tp.all_reduce(x, out=out)
        with pytest.raises(ValueError, match="something else"):
            call()
    assert (room == 7).all()
    assert (x == 1).all()


@pytest.mark.mpi(min_size=2)
def test_a_rank_whose_sum_fails_keeps_what_others_write_into(comm, monkeypatch):
    """And is told so again when it waits again."""
    monkeypatch.setattr(window, "DIRECT", 0)
    with Mesh(comm, sums=by_host(0, slot=SLOT), tp=comm.size) as mesh:
        sums, read = mesh.tp._sums.large, peers.Peers.read
        if comm.rank == 0:
            monkeypatch.setattr(peers.Peers, "read", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
            y = np.ones(3000)
            for again in (lambda: mesh.tp.all_reduce(np.ones(3000), out=y), lambda: sums.finish(sums._scripts[0])):
                with pytest.raises(MemoryError):
                    again()
                assert any(np.shares_memory(y, lent) for lent in sums.window._lent)
            # The others wait for it no more.
            sums.window._counters[sums.window._mine[1]] = sums.window._rounds
            sums._scripts.clear()
            monkeypatch.setattr(peers.Peers, "read", read)
        else:
            mesh.tp.all_reduce(np.ones(3000))
            assert sums.window._lent == ()


@on_ranks
@pytest.mark.parametrize("verb", ["_read", "_write"])
def test_where_no_memory_can_be_reached_the_slots_are_used(comm, monkeypatch, verb):
    monkeypatch.setattr(window, "DIRECT", 0)
    # One rank is enough.
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(peers, verb, None)
    monkeypatch.setattr(window.Window, "_directly", None)
    with Mesh(comm, sums=by_host(0, slot=SLOT), tp=comm.size) as mesh:
        assert (mesh.tp.all_reduce(np.full(3000, comm.rank + 1.0)) == comm.size * (comm.size + 1) / 2).all()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["reduce", "gather"])
def test_a_piece_at_the_wrong_offset_shows(comm, monkeypatch, name):
    right = getattr(window.Window, name)

    def shifted(self, first, *more):
        return right(self, [np.roll(p, 1) for p in first] if name == "reduce" else np.roll(first, 1), *more)

    monkeypatch.setattr(window.Window, name, shifted)
    x = np.arange(3000.0)
    with Mesh(comm, sums=by_host(0, slot=SLOT), tp=comm.size) as mesh:
        assert wrong(comm, mesh.tp.all_reduce(x * 10.0**comm.rank), x)


@pytest.mark.mpi(min_size=4)
def test_a_sum_over_the_wrong_ranks_shows(comm):
    """Leaders that add with one of another number."""
    x, hosts = np.arange(3000.0), [0, 0, *[1] * (comm.size - 2)]
    with Mesh(comm, sums=by_host(0, slot=SLOT), hosts=hosts, tp=comm.size) as mesh:
        sums = mesh.tp._sums.large
        assert not wrong(comm, mesh.tp.all_reduce(x * 10.0**comm.rank), x)
        known = sums.hosts
        other = (known.number + known.host) % 2 if known.leads else 2
        right, sums._between = sums._between, comm.Split(other, known.host)
        got = mesh.tp.all_reduce(x * 10.0**comm.rank)
        sums._between.Free()
        sums._between = right
        assert wrong(comm, got, x)
