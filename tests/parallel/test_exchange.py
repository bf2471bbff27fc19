"""Rows that go where each is for: as many as there are, none where there are none, and back again."""

import re

import numpy as np
import pytest

from parallel.alone import Alone
from parallel.guard import CollectiveMismatch
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.ordered import in_rank_order
from parallel.rows import exchanged
from parallel.sums import of_mpi
from parallel.watch.messages import Messages

pytestmark = pytest.mark.mpi

# How many rows rank s sends to rank r, of four ranks or the first of them.
COUNTS = {
    "uneven": [[2, 0, 3, 1], [1, 4, 0, 2], [5, 1, 1, 0], [0, 2, 6, 3]],
    "a rank without rows": [[0, 0, 0, 0], [3, 1, 2, 2], [1, 0, 2, 4], [2, 2, 0, 1]],
    "a rank that gets none": [[2, 0, 1, 3], [1, 0, 2, 1], [4, 0, 0, 1], [1, 0, 3, 2]],
    "all to one": [[0, 3, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 5, 0, 0]],
    "what stays alone": [[3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]],
    "nothing": [[0] * 4] * 4,
}


@pytest.fixture(params=[of_mpi, in_rank_order])
def mesh(comm, request):
    with Mesh(comm, check=True, watchers=[Messages()], sums=request.param, ep=comm.size) as mesh:
        yield mesh


def counts_of(name, p):
    return np.array(COUNTS[name])[:p, :p]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("row", [(), (3,), (2, 2)])
def test_rows_arrive_and_its_adjoint_brings_them_back(mesh, comm, name, row):
    """<exchange x, y> == <x, exchange' y> over all ranks, with small integers: so that == holds."""
    n, r = counts_of(name, comm.size), comm.rank
    sent, received = n[r].tolist(), n[:, r].tolist()
    # Each row says where it is from, for whom, and which it is.
    every = [[np.random.default_rng((s, to)).integers(-9, 9, (n[s, to], *row)).astype(float) for to in range(comm.size)]
             for s in range(comm.size)]  # fmt: skip
    x = np.concatenate(every[r])
    y = np.random.default_rng(50 + r).integers(-9, 9, (sum(received), *row)).astype(float)
    with mesh.phase("forward"):
        got = mesh.ep.exchange(x, sent, received)
    with mesh.phase("backward"):
        back = mesh.ep.exchange(y, received, sent)
    np.testing.assert_array_equal(got, np.concatenate([every[s][r] for s in range(comm.size)]), strict=True)
    assert back.shape == x.shape
    assert comm.allreduce(float((got * y).sum())) == comm.allreduce(float((x * back).sum()))
    b = 8 * int(np.prod(row))
    leave, come = b * (sum(sent) - sent[r]), b * (sum(received) - received[r])
    p = comm.size
    report = mesh.ledger.report([*exchanged("ep", p, "forward", leave), *exchanged("ep", p, "backward", come)])
    assert agrees(report)
    assert [row["wire_bytes"] for row in report] == [leave, come][: 2 * (p > 1)]


def test_any_order_in_memory_and_integers(mesh, comm):
    p, r = comm.size, comm.rank
    x = np.asfortranarray(np.arange(3 * p, dtype="int64").reshape(p, 3) + 100 * r)
    got = mesh.ep.exchange(x, [1] * p, [1] * p)
    np.testing.assert_array_equal(got, [[3 * r + i + 100 * s for i in range(3)] for s in range(p)])


def test_on_one_rank_nothing_is_sent_or_copied(comm):
    x = np.ones((3, 2))
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        for axis in (mesh.ep, Alone("ep")):
            assert (axis.name, axis.size, axis.rank, axis.place) == ("ep", 1, 0, {"ep": 0})
            assert axis.exchange(x, [3], [3]) is x
        assert not mesh.ledger.rows


def test_counts_that_do_not_fit_are_refused_before_anything_is_sent(mesh, comm):
    p, x = comm.size, np.ones((2, 3))
    for sent, received in (([1] * p, [1] * (p + 1)), ([3] + [0] * (p - 1), [0] * p)):
        wanted = f"rank {comm.rank} of ep ({p} ranks) cannot send {sent} of 2 rows and receive {received}: use a count for each"
        with pytest.raises(ValueError, match=re.escape(wanted)):
            mesh.ep.exchange(x, sent, received)


@pytest.mark.mpi(min_size=2)
def test_the_guard_sees_rows_that_are_not_expected_and_rows_of_another_shape(mesh, comm):
    p, r = comm.size, comm.rank
    with pytest.raises(CollectiveMismatch, match=r"on ep, rank 1 sends 1 rows to rank 0, which expects 2, in exchange \(3,\) "):
        mesh.ep.exchange(np.ones((p, 3)), [1] * p, [1, 1 + (r == 0), *[1] * (p - 2)])
    with pytest.raises(CollectiveMismatch, match=r"exchange \(4,\) float64 .* where .* exchange \(3,\) float64 "):
        mesh.ep.exchange(np.ones((p, 4 if r == 0 else 3)), [1] * p, [1] * p)
    # The number of rows is each rank's own.
    n = counts_of("uneven", p)
    assert mesh.ep.exchange(np.ones((n[r].sum(), 1)), n[r], n[:, r]).sum() == n[:, r].sum()
