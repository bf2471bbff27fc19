"""The verbs: what they return, what they refuse, what they enter in the ledger. Data differs by rank and by entry."""

import numpy as np
import pytest

from parallel.buffer import DTYPES
from parallel.control import Control
from parallel.guard import CollectiveMismatch
from parallel.ledger import Ledger, Traffic, agrees, merged, wire_bytes
from parallel.mesh import Mesh
from parallel.rows import cut_rows
from parallel.shard import Cut, even, replicated
from tests.grids import thinned

pytestmark = pytest.mark.mpi


@pytest.fixture
def tp(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh.tp


def whole(shape, dtype=np.float64, seed=0):
    """Small integers, so that sums are exact and == holds."""
    return np.random.default_rng(seed).integers(0, 9, shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_sums_every_dtype(tp, dtype):
    parts = [whole((3, 5), dtype, seed=r) for r in range(tp.size)]
    mine = parts[tp.rank].copy()
    assert (tp.all_reduce(mine) == sum(parts)).all()
    assert (mine == parts[tp.rank]).all()
    assert (tp.all_reduce(mine, "max") == np.maximum.reduce(parts)).all()
    assert (tp.all_reduce(mine, "min") == np.minimum.reduce(parts)).all()


@pytest.mark.parametrize("order", ["C", "F", "strided", "negative"])
def test_any_memory_order_on_any_rank_gives_the_same_sum(tp, order):
    # One F-ordered rank among C-ordered ones is what MPI permutes without a word.
    parts = [whole((4, 3), seed=r) for r in range(tp.size)]
    mine = parts[tp.rank]
    if tp.rank == tp.size - 1:
        layouts = {"C": mine, "F": np.asfortranarray(mine), "strided": np.repeat(mine, 2, axis=1)[:, ::2]}
        mine = layouts.get(order, mine[::-1].copy()[::-1])
    assert (tp.all_reduce(mine) == sum(parts)).all()


@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_nan_on_one_rank_is_kept(tp, op, dtype):
    x = np.full(4, tp.rank, dtype)
    if tp.rank == tp.size - 1:
        x[1] = np.nan
    assert np.isnan(tp.all_reduce(x, op)).tolist() == [False, True, False, False]


def test_all_reduce_fills_out_and_refuses_one_that_does_not_fit(tp):
    x = whole((2, 3), seed=tp.rank)
    out = np.full((2, 3), -1.0)
    assert tp.all_reduce(x, out=out) is out
    assert (out == sum(whole((2, 3), seed=r) for r in range(tp.size))).all()
    for wrong in (np.empty((3, 2)), np.empty((2, 3), "f4"), np.empty((3, 2)).T):
        with pytest.raises(ValueError, match="out must be C-contiguous"):
            tp.all_reduce(x, out=wrong)
    with pytest.raises(ValueError, match="shares memory"):
        tp.all_reduce(x, out=x)


@pytest.mark.parametrize(
    "bad", [np.zeros(2, "f2"), np.zeros(2, complex), np.zeros(2, bool), np.zeros(2, ">f8"), [1.0], 3.0], ids=repr
)
def test_what_mpi_would_not_treat_alike_is_refused_by_name(tp, bad):
    with pytest.raises(TypeError, match="cannot send"):
        tp.all_reduce(bad)


def test_an_unknown_reduction_is_refused(tp):
    with pytest.raises(ValueError, match="unknown reduction 'mean'"):
        tp.all_reduce(np.zeros(2), "mean")


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("order", ["C", "F"])
def test_all_gather_puts_uneven_parts_together(tp, dim, order):
    x = whole((5, 6, 7))
    cut = even(x.shape[dim], tp.size)
    assert (tp.all_gather(np.array(cut.take(x, dim, tp.rank), order=order), dim, cut) == x).all()


def test_all_gather_of_overlapping_parts(tp):
    x = whole((tp.size + 1, 3))
    cut = Cut(tp.size + 1, tuple((r, r + 2) for r in range(tp.size)))
    assert (tp.all_gather(cut.take(x, 0, tp.rank), 0, cut) == x).all()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("rows", [2, 7, 48])
def test_a_gathering_that_is_started(tp, rows, order):
    x, cut = whole((rows, 3, 2)), cut_rows(rows, tp.size)
    mine = np.array(cut.take(x, 0, tp.rank), order=order)
    pending = tp.start_all_gather(mine, cut)
    assert (tp.all_reduce(np.ones(1)) == tp.size).all()
    assert (pending.wait() == x).all()
    assert (mine == cut.take(x, 0, tp.rank)).all()
    if tp.size > 1:
        with pytest.raises(ValueError, match="start_all_gather takes only a partition"):
            tp.start_all_gather(x, replicated(rows, tp.size))


@pytest.mark.parametrize("dim", [0, 1])
def test_reduce_scatter_is_a_part_of_the_sum(tp, dim):
    parts = [whole((5, 7), seed=r) for r in range(tp.size)]
    cut = even(parts[0].shape[dim], tp.size)
    assert (tp.reduce_scatter(parts[tp.rank], dim, cut) == cut.take(sum(parts), dim, tp.rank)).all()


@pytest.mark.parametrize(("split_dim", "join_dim"), [(0, 1), (1, 0), (2, 0)])
def test_all_to_all_moves_the_cut(tp, split_dim, join_dim):
    x = whole((5, 6, 7))
    split, join = even(x.shape[split_dim], tp.size), even(x.shape[join_dim], tp.size)
    got = tp.all_to_all(join.take(x, join_dim, tp.rank), split_dim, split, join_dim, join)
    assert (got == split.take(x, split_dim, tp.rank)).all()


def test_broadcast_from_every_root(tp):
    for root in range(tp.size):
        assert (tp.broadcast(whole((3, 4), seed=tp.rank), root) == whole((3, 4), seed=root)).all()
    with pytest.raises(ValueError, match=f"no rank {tp.size} on axis tp: use 0 to {tp.size - 1}"):
        tp.broadcast(np.zeros(1), tp.size)


def test_a_part_that_is_not_what_the_cut_says_is_refused(tp):
    cut = even(8, tp.size)
    with pytest.raises(ValueError, match="should have"):
        tp.all_gather(np.zeros((9, 2)), 0, cut)
    with pytest.raises(ValueError, match="should have 8 entries"):
        tp.reduce_scatter(np.zeros((9, 2)), 0, cut)
    with pytest.raises(ValueError, match=f"axis tp has {tp.size}"):
        tp.all_gather(np.zeros((1, 2)), 0, even(8, tp.size + 1))


@pytest.mark.mpi(min_size=2)
def test_send_and_receive_in_order(tp):
    to, source = (tp.rank + 1) % tp.size, (tp.rank - 1) % tp.size
    mine = [whole((2, 3), "f4", tp.rank), whole((4,), "i8", 10 + tp.rank)]
    for n, (shape, dtype) in enumerate([((2, 3), "f4"), ((4,), "i8")]):
        # Rank 0 sends first, the others when they have received: no cycle of blocking sends.
        if tp.rank == 0:
            tp.send(mine[n], to)
        got = tp.receive(shape, dtype, source)
        if tp.rank:
            tp.send(mine[n], to)
        assert (got == whole(shape, dtype, 10 * n + source)).all()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("difference", ["dtype", "shape", "op", "root", "verb"])
def test_ranks_that_mean_different_collectives_all_hear_of_it(tp, difference):
    odd = tp.rank == tp.size - 1
    x = np.zeros((2, 4))
    calls = {
        "dtype": lambda: tp.all_reduce(x.astype("i8") if odd else x),
        "shape": lambda: tp.all_reduce(x.T if odd else x),
        "op": lambda: tp.all_reduce(x, "max" if odd else "sum"),
        "root": lambda: tp.broadcast(x, 1 if odd else 0),
        "verb": lambda: tp.broadcast(x) if odd else tp.all_reduce(x),
    }
    with pytest.raises(CollectiveMismatch, match=f"rank {tp.size - 1} called"):
        calls[difference]()


def test_the_ledger_counts_messages_and_ring_bytes_by_phase(tp, comm):
    p = tp.size
    cut = even(5, p)
    with Mesh(comm, tp=p) as mesh:
        with mesh.phase("forward"):
            mesh.tp.all_reduce(np.zeros((3, 4), "f4"))
            mesh.tp.all_reduce(np.zeros((3, 4), "f4"))
            with mesh.phase("backward"):
                mesh.tp.all_gather(np.zeros((cut.size(tp.rank), 2)), 0, cut)
                mesh.tp.start_all_gather(np.zeros((cut.size(tp.rank), 2)), cut).wait()
        with mesh.phase("backward"):
            mesh.tp.reduce_scatter(np.zeros((5, 2)), 0, cut)
        rows = {
            key: (row.calls, row.message_bytes, wire_bytes(key[0], row.message_bytes, row.ranks))
            for key, row in mesh.ledger.rows.items()
        }
    assert rows == {
        ("all_reduce", "tp", "forward"): (2, 96, pytest.approx(2 * (p - 1) / p * 96)),
        ("all_gather", "tp", "backward"): (2, 160, pytest.approx((p - 1) / p * 160)),
        ("reduce_scatter", "tp", "backward"): (1, 80, pytest.approx((p - 1) / p * 80)),
    }


@pytest.mark.mpi(min_size=4, max_size=4)
def test_two_axes_are_a_grid_with_the_last_varying_fastest(comm):
    with Mesh(comm, dp=2, tp=2) as mesh:
        assert (mesh.dp.rank, mesh.tp.rank) == divmod(comm.rank, 2)
        assert mesh.tp.all_reduce(np.array([comm.rank])).item() == (1 if comm.rank < 2 else 5)
        assert mesh.dp.all_reduce(np.array([comm.rank])).item() == (2 if comm.rank % 2 == 0 else 4)


def test_a_mesh_must_fit_the_ranks(comm):
    with pytest.raises(ValueError, match=f"cannot lay {comm.size} ranks out as dp=3 x tp=5: the product must be {comm.size}"):
        Mesh(comm, dp=3, tp=5)
    with pytest.raises(ValueError, match="no axes"):
        Mesh(comm)
    with Mesh(comm, tp=comm.size) as mesh, pytest.raises(AttributeError, match="no axis 'rows', only tp"):
        _ = mesh.rows


def test_an_axis_that_is_not_given_has_one_rank(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        assert (mesh.pp.size, mesh.pp.rank, mesh.pp.members, mesh.place) == (
            1,
            0,
            (comm.rank,),
            {"pp": 0, "dp": 0, "ep": 0, "cp": 0, "tp": comm.rank},
        )
        assert mesh.pp is mesh.pp
        assert mesh.pp.all_reduce(np.array([3.0])).item() == 3.0
        assert mesh.over("pp", "dp").size == 1


@pytest.mark.mpi(max_size=thinned(4, 2))
def test_meshes_are_freed(comm):
    # MPICH has 2,046 communicators: a leak would end here.
    for _ in range(1200):
        Mesh(comm, check=True, tp=comm.size).close()


def test_adjoints(tp):
    """<F x, y> == <x, F* y> with integers in float64: all_gather and reduce_scatter, all_reduce and itself."""
    cut = even(7, tp.size)
    x, y = whole((cut.size(tp.rank), 3), seed=tp.rank), whole((7, 3), seed=100 + tp.rank)
    total = lambda a, b: tp.all_reduce(np.array([(a * b).sum()])).item()  # noqa: E731
    assert total(tp.all_gather(x, 0, cut), y) == total(x, tp.reduce_scatter(y, 0, cut))
    z = whole((7, 3), seed=200 + tp.rank)
    assert total(tp.all_reduce(z), y) == total(z, tp.all_reduce(y))
    split = even(6, tp.size)
    a, b = whole((cut.size(tp.rank), 6), seed=tp.rank), whole((7, split.size(tp.rank)), seed=50 + tp.rank)
    assert total(tp.all_to_all(a, 1, split, 0, cut), b) == total(a, tp.all_to_all(b, 0, cut, 1, split))


def test_axes_are_joined(comm):
    sizes = {1: (1, 1, 1), 2: (2, 1, 1), 3: (1, 3, 1), 4: (2, 1, 2)}[comm.size]
    with Mesh(comm, check=True, dp=sizes[0], ep=sizes[1], tp=sizes[2]) as mesh:
        data = mesh.over("ep", "dp")
        assert data is mesh.over("ep", "dp")
        # An axis of one rank adds nothing.
        name = {1: "dp", 2: "dp", 3: "ep", 4: "dp"}[comm.size]
        assert (data.name, data.size) == (name, sizes[0] * sizes[1])
        assert mesh.over("tp") is mesh.tp
        # Of axes that are not given there is one rank, whatever the others have.
        assert mesh.over("cp", "pp") is mesh.cp
        assert mesh.cp.size == 1
        same = [r for r in range(comm.size) if mesh.place_of(r)["tp"] == mesh.place["tp"]]
        assert data.members == tuple(same)
        assert same[data.rank] == comm.rank == mesh.rank_at(mesh.place)
        assert data.all_reduce(np.array([10.0**comm.rank]))[0] == sum(10.0**r for r in same)
        assert mesh.over(*mesh.sizes).size == comm.size
        assert mesh.over(*mesh.sizes).name == {1: "dp", 2: "dp", 3: "ep", 4: "dp*tp"}[comm.size]
        assert agrees(mesh.ledger.report([Traffic("all_reduce", name, "none", 8)]))


def test_a_group_sums_over_its_own_ranks_and_is_counted_by_its_name(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        tp = mesh.tp
        # Neighbours overlap: each rank is in up to two groups, made in ascending order.
        pairs = [range(r, r + 2) for r in range(tp.size - 1)]
        for pair in pairs:
            if tp.rank in pair:
                group = tp.group(pair)
                assert (group.size, group.rank) == (2, tp.rank - pair.start)
                assert group is tp.group(pair)
                assert group.all_reduce(np.array([10.0**tp.rank]))[0] == 10.0**pair.start + 10.0 ** (pair.start + 1)
        mine = [p for p in pairs if tp.rank in p]
        predicted = [Traffic("all_reduce", f"tp[{p.start}..{p.stop - 1}]", "none", 8) for p in mine]
        report = merged(Control(comm).everyone(mesh.ledger.report(predicted)))
        assert agrees(report)
        assert len(report) == len(pairs)


@pytest.mark.mpi(min_size=3)
def test_a_group_may_leave_out_ranks_between(comm):
    with Mesh(comm, check=True, pp=comm.size) as mesh:
        if mesh.pp.rank in (0, comm.size - 1):
            ends = mesh.pp.group((0, comm.size - 1))
            assert (ends.name, ends.members) == (f"pp[0,{comm.size - 1}]", (0, comm.size - 1))
            assert ends.all_reduce(np.array([10.0**comm.rank])).item() == 1 + 10.0 ** (comm.size - 1)


@pytest.mark.parametrize("ranks", [range(0, 0), (3, 2, 1, 0), range(-1, 2), range(0, 99)])
def test_a_group_that_is_none_is_refused(tp, ranks):
    with pytest.raises(ValueError, match=f"rank {tp.rank} of tp \\({tp.size} ranks\\) cannot make a group of ranks"):
        tp.group(ranks)


def test_ranks_may_send_different_amounts_each_as_its_own_closed_form_says():
    ledgers = [Ledger(), Ledger(), Ledger()]
    for ledger, size in zip(ledgers, (8, 8, 16), strict=True):
        ledger.add("all_reduce", "tp", size, 3, size / 100)
    said = lambda *sizes: [  # noqa: E731
        ledger.report([Traffic("all_reduce", "tp", "none", n)]) for ledger, n in zip(ledgers, sizes, strict=False)
    ]
    (same,) = merged(said(8, 8))
    assert same["message_bytes"] == 8
    assert not {"rank", "message_bytes_sum"} & same.keys()
    (row,) = merged(said(8, 8, 16))
    assert agrees([row])
    assert (row["message_bytes"], row["message_bytes_sum"], row["message_bytes_range"]) == (16, 32, [8, 16])
    assert (row["wire_bytes"], row["seconds"]) == (64 / 3, 0.16)
    # As many in all, and yet not what each of them should have sent.
    (row,) = merged(said(8, 16, 8))
    assert not agrees([row])
    assert (row["rank"], row["message_bytes"], row["predicted_message_bytes"]) == (1, 8, 16)
