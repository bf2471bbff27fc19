"""Rows, whole or cut: the two verbs of an axis are each the other's backward, and what they send is predicted."""

import numpy as np
import pytest

from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.ordered import in_rank_order
from parallel.rows import cut_rows, gathered, held, is_whole, own, summed
from parallel.shard import replicated
from parallel.sums import of_mpi
from parallel.watch.messages import Messages


@pytest.mark.parametrize(("tokens", "sizes"), [(7, (3, 2, 2)), (2, (1, 1, 0)), (0, (0, 0, 0)), (9, (3, 3, 3))])
def test_rows_are_dealt_out_also_where_there_are_fewer_than_ranks(tokens, sizes):
    rows = cut_rows(tokens, 3)
    assert rows.sizes == sizes
    assert rows.is_partition
    assert [held(tokens, rows, r) for r in range(3)] == list(sizes)
    assert held(tokens, None, 1) == tokens
    assert [len(own(np.zeros((tokens, 2)), rows, r)) for r in range(3)] == list(sizes)


def test_whole_rows_by_either_name():
    assert is_whole(None)
    assert is_whole(replicated(5, 3))
    assert is_whole(cut_rows(5, 1))
    assert not is_whole(cut_rows(5, 2))


@pytest.mark.mpi
@pytest.mark.parametrize("tokens", [1, 3, 7, 48])
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("sums", [of_mpi, in_rank_order])
def test_each_is_the_others_adjoint(comm, tokens, cut, started, sums):
    """<gather x, y> == <x, sum y>, over all ranks, with small integers: so that == holds."""
    with Mesh(comm, check=True, watchers=[Messages()], sums=sums, tp=comm.size) as mesh:
        tp, random = mesh.tp, np.random.default_rng(tokens)
        rows = cut_rows(tokens, tp.size) if cut else replicated(tokens, tp.size)
        x = random.integers(-9, 9, (tokens, 5)).astype(float)
        y = random.integers(-9, 9, (tp.size, tokens, 5)).astype(float)
        mine = own(x, rows, tp.rank)
        with mesh.phase("forward"):
            gathered_x = tp.start_gather_rows(mine, rows).wait() if started else tp.gather_rows(mine, rows)
        with mesh.phase("backward"):
            # In place, where the rows are whole.
            partial = y[tp.rank].copy()
            summed_y = tp.start_sum_rows(partial, rows).wait() if started else tp.sum_rows(partial, rows)
        assert (gathered_x == x).all()
        assert (summed_y == own(y.sum(axis=0), rows, tp.rank)).all()
        left = comm.allreduce(float(np.vdot(gathered_x, y[tp.rank])))
        # Of whole rows each rank has the same: they are one.
        right = float(np.vdot(own(x, rows, tp.rank), summed_y))
        right = right if is_whole(rows) else comm.allreduce(right)
        assert left == right
        size = 8 * x.size
        assert agrees(mesh.ledger.report([*gathered("tp", rows, "forward", size), *summed("tp", rows, "backward", size)]))
