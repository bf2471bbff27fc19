"""Sums that gradients are owed: each entry over exactly the ranks that hold it, what goes together in one message."""

import numpy as np
import pytest

from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import Parameter, given
from parallel.shard import Layout, covering, even

pytestmark = pytest.mark.mpi


def filled(p, value):
    p.add_grad(np.full_like(p.data, value))
    return p


def test_each_entry_is_summed_over_those_who_hold_it(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        tp = mesh.tp
        heads = covering(even(max(9, 2 * tp.size), tp.size), 3 if 2 * tp.size < 9 else 1)
        layouts = {"Wq": Layout((2, 9), {"tp": (1, even(9, tp.size))}), "Wk": Layout((2, heads.length), {"tp": (1, heads)})}
        weights = given({n: np.zeros(layout.shape) for n, layout in layouts.items()} | {"wn": np.zeros(5)})
        fused = weights.matrices(layouts, 1, tp.place, 2, owed=("tp",))
        norm = weights.norm("wn", 5, owed=("tp",))
        other = weights.norm("wn", 5)
        for p in (*fused.parameters, norm, other):
            filled(p, 10.0**tp.rank)
        owed = Owed(mesh, [*fused.parameters, norm, other])
        mesh.ledger.rows.clear()
        with mesh.phase("backward"):
            owed.sum()
        assert agrees(mesh.ledger.report(owed.traffic()))
        q, k = fused.parameters
        # One rank alone holds a column of queries.
        assert (q.grad == 10.0**tp.rank).all()
        start, stop = heads.bounds[tp.rank]
        holders = [[r for r, (a, b) in enumerate(heads.bounds) if a <= i < b] for i in range(start, stop)]
        assert (k.grad == [sum(10.0**r for r in ranks) for ranks in holders]).all()
        assert (norm.grad == int("1" * tp.size)).all()
        assert (other.grad == 10.0**tp.rank).all()


def test_what_is_summed_over_the_same_ranks_is_one_message(comm):
    with Mesh(comm, dp=1, tp=comm.size) as mesh:
        weights = given({"a": np.zeros(3), "b": np.zeros(4)})
        parameters = [filled(weights.norm(n, size, owed=("tp",)), 1.0) for n, size in (("a", 3), ("b", 4))]
        owed = Owed(mesh, parameters)
        assert [(t.axis, t.calls, t.message_bytes) for t in owed.traffic()] == [("tp", 1, 7 * 8)]
        owed.sum()
        assert all((p.grad == comm.size).all() for p in parameters)


def test_a_parameter_without_a_gradient_counts_as_zero(comm):
    with Mesh(comm, tp=comm.size) as mesh:
        p = Parameter("w", Layout((2,)), np.zeros(2), decays=False, multiplies=False, owed=("tp",))
        if comm.rank == 0:
            p.add_grad(np.ones(2))
        Owed(mesh, [p]).sum()
        assert (p.grad == 1).all()
