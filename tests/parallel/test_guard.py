"""The guard: what ranks disagree on is told on all of them, with who differs and the line of each."""

import re

import numpy as np
import pytest

from parallel.guard import Agreement, CollectiveMismatch
from parallel.mesh import Mesh
from parallel.shard import Cut, even
from parallel.text import named

SITE = r"tests/parallel/test_guard\.py:\d+ in \w+"


@pytest.fixture
def tp(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh.tp


def verb(tp, x, odd):
    return tp.broadcast(x) if odd else tp.all_reduce(x)


def shape(tp, x, odd):
    return tp.all_reduce(x.reshape(4, 2) if odd else x)


def dtype(tp, x, odd):
    return tp.all_reduce(x.astype("i8") if odd else x)


def op(tp, x, odd):
    return tp.all_reduce(x, "max" if odd else "sum")


def root(tp, x, odd):
    return tp.broadcast(x, 1 if odd else 0)


def dim(tp, x, odd):
    x = np.zeros((tp.size, tp.size))
    return tp.reduce_scatter(x, 1 if odd else 0, even(tp.size, tp.size))


def cut(tp, x, odd):
    backwards = Cut(4, tuple((min(r, 3), min(r, 3) + 1) for r in reversed(range(tp.size))))
    forwards = Cut(4, tuple((min(r, 3), min(r, 3) + 1) for r in range(tp.size)))
    return tp.reduce_scatter(np.zeros(4), 0, backwards if odd else forwards)


def started(tp, x, odd):
    return tp.start_all_reduce(x).wait() if odd else tp.all_reduce(x)


def another_function(tp, x, odd):
    return elsewhere(tp, x) if odd else tp.all_reduce(x)


def elsewhere(tp, x):
    return tp.all_reduce(x)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("difference", [verb, shape, dtype, op, root, dim, cut, started, another_function])
def test_a_difference_on_any_rank_is_told_on_all_with_the_line_of_each(tp, difference):
    called = {verb: "broadcast", shape: r"all_reduce \(4, 2\)", dtype: "all_reduce .* int64", op: "all_reduce .* op max",
              root: "broadcast .* root 1", dim: "reduce_scatter .* dim 1", cut: "reduce_scatter", started: "start_all_reduce",
              another_function: "all_reduce"}[difference]  # fmt: skip
    for odd in range(tp.size):
        with pytest.raises(CollectiveMismatch) as raised:
            difference(tp, np.zeros((2, 4)), tp.rank == odd)
        sentence, *table = str(raised.value).splitlines()
        others = named([r for r in range(tp.size) if r != odd])
        mine, theirs = rf"rank {odd} called {called}.* at {SITE}", rf"{others} called \w+ \(.*\) \w+.* at {SITE}"
        # Of two, nobody knows which one is odd.
        assert re.fullmatch(f"on tp, ({mine} where {theirs}|{theirs} where {mine})", sentence), sentence
        if tp.size > 2:
            assert sentence.startswith(f"on tp, rank {odd} called")
        assert [row.split()[0] for row in table] == ["rank", *map(str, range(tp.size))]
        assert all(re.search(rf"#\d+ .* at|#\d+ .*{SITE}", row) for row in table[1:])
    # After it has been told, the ranks can go on.
    assert tp.all_reduce(np.array([1.0])) == tp.size


@pytest.mark.mpi(min_size=2)
def test_a_call_left_out_is_seen_where_the_next_one_is_another(tp):
    def forward():
        if tp.rank:
            tp.all_reduce(np.ones(3))

    def backward():
        tp.all_reduce(np.ones(3))

    with pytest.raises(CollectiveMismatch, match=r"rank 0 called .* in test_\w+\.<locals>\.backward"):
        forward() or backward()


@pytest.mark.mpi(min_size=2)
def test_two_sums_of_one_shape_in_another_order_are_told(tp):
    def both(order):
        for which in order:
            if which == "weights":
                tp.all_reduce(np.ones(3))
            else:
                tp.all_reduce(np.zeros(3))

    for odd in range(tp.size):
        with pytest.raises(CollectiveMismatch, match=rf"rank {odd} called all_reduce .*both"):
            both(["biases", "weights"] if tp.rank == odd else ["weights", "biases"])


@pytest.mark.mpi(min_size=2)
def test_a_broadcast_may_stand_on_two_lines_and_orders_in_memory_may_differ(tp):
    x = np.arange(6.0).reshape(2, 3)
    if tp.rank == 0:
        tp.broadcast(x)
    else:
        assert (tp.broadcast(np.empty_like(x)) == x).all()
    assert (tp.all_reduce(np.asfortranarray(x) if tp.rank == 0 else x) == tp.size * x).all()


@pytest.mark.mpi(min_size=2)
def test_ranks_that_lay_out_different_meshes_are_told(comm):
    axes = {"tp": comm.size, "dp": 1} if comm.rank else {"tp": 1, "dp": comm.size}
    with pytest.raises(CollectiveMismatch, match=f"rank 0 as tp=1 x dp={comm.size}"):
        Mesh(comm, **axes)


@pytest.mark.mpi(min_size=2)
def test_auto_checks_the_first_bytes_of_each_axis_on_all_ranks_alike(comm):
    x = np.zeros(8)
    for calls in range(4):
        with Mesh(comm, watchers=[Agreement(3 * x.nbytes)], dp=1, tp=comm.size) as mesh:
            for _ in range(calls):
                mesh.tp.all_reduce(x)
            mesh.dp.all_reduce(x)
            if calls < 3:
                with pytest.raises(CollectiveMismatch):
                    another_function(mesh.tp, x, comm.rank == 0)
            else:
                # Past the limit nobody looks; MPI itself has nothing against this one.
                another_function(mesh.tp, x, comm.rank == 0)
