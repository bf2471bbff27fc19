"""The table of verbs: it has every verb of an axis, a call is described as its row says, and its shares are a ring's."""

import inspect

import numpy as np
import pytest

from parallel.axis import Axis
from parallel.call import Watcher
from parallel.ledger import wire_bytes
from parallel.mesh import Mesh
from parallel.parameter import Parameter
from parallel.shard import Layout, even
from parallel.verbs import METHODS, VERBS, method_name

ROWS = {"gather_rows", "sum_rows", "start_gather_rows", "start_sum_rows"}


class Calls(Watcher):
    def __init__(self):
        self.heard = []

    def begin(self, axis, call, x):
        self.heard.append(call)


def test_the_table_has_the_verbs_of_an_axis():
    public = {name for name, _ in inspect.getmembers(Axis, inspect.isfunction) if not name.startswith("_")}
    # Of rows they are the verbs that the table has, or none.
    assert public - {"group", "duplicate", "close", "operation", "poke", *ROWS} == set(METHODS)
    partners = {name: verb.partner for name, verb in VERBS.items() if verb.partner}
    assert all(partners[partner] == name for name, partner in partners.items())


@pytest.mark.mpi
def test_each_call_is_described_as_its_row_says(comm):
    calls, p = Calls(), comm.size
    x, cut = np.arange(4.0 * p).reshape(p, 4), even(p, p)
    with Mesh(comm, watchers=[calls], tp=p) as mesh:
        tp = mesh.tp
        tp.all_reduce(x)
        tp.start_all_reduce(x.copy()).wait()
        tp.reduce_scatter(x, 0, cut)
        tp.start_reduce_scatter(x, cut).wait()
        tp.all_gather(x[:1], 0, cut)
        tp.start_all_gather(x[:1], cut).wait()
        tp.all_to_all(x[:, :1], 0, cut, 1, cut)
        tp.shift(x[:1], [1] * p)
        tp.start_shift(x[:1], [1] * p).wait()
        tp.exchange(x, [1] * p, [1] * p)
        tp.broadcast(x)
        if p > 1 and tp.rank == 0:
            tp.send(x, 1)
            tp.receive(x.shape, x.dtype, 1)
            tp.start_send(x, 1).wait()
        if tp.rank == 1:
            tp.receive(x.shape, x.dtype, 0)
            tp.send(x, 0)
            tp.receive(x.shape, x.dtype, 0)
    methods = [method_name(call.verb, call.started) for call in calls.heard]
    between_two = ["send", "start_send", "receive"]
    here = [["send", "receive", "start_send"], ["receive", "send", "receive"]][tp.rank] if p > 1 and tp.rank < 2 else []
    # On an axis of one rank nothing is exchanged.
    absent = [*between_two, *(["exchange"] if p == 1 else [])]
    assert methods == [m for m in METHODS if m not in absent] + here
    for call, name in zip(calls.heard, methods, strict=True):
        shape = "(4,)" if name == "exchange" else f"({p}, {p if 'to_all' in name else 4})"
        assert str(call).startswith(" ".join([name, shape, "float64", *VERBS[call.verb].how[:1]]))
        assert call.rows == (((1,) * p, (1,) * p) if name == "exchange" else ())
        assert call.peer == (1 - tp.rank if VERBS[call.verb].partner else None)
    assert [call.number for call in calls.heard] == [*range(len(methods) - len(here)), 0, 0, 1][: len(methods)]


@pytest.mark.mpi
def test_a_verb_called_inside_parallel_has_the_line_outside(comm):
    calls = Calls()
    with Mesh(comm, watchers=[calls], tp=comm.size) as mesh:
        weight = Parameter(
            "W", Layout((comm.size,), {"tp": (0, even(comm.size, comm.size))}), np.ones(1), decays=True, multiplies=True
        )
        line = inspect.currentframe().f_lineno + 1
        weight.whole(mesh, weight.data)
    (call,) = calls.heard
    here = "test_a_verb_called_inside_parallel_has_the_line_outside"
    assert (call.site, call.function) == (f"tests/parallel/test_verbs.py:{line}", here)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_shares_are_those_of_a_ring(ranks):
    """Of a message of one number a rank: a turn round the ring is ranks - 1 numbers from each."""
    turn = ranks - 1
    whole = {"send": ranks, "exchange": ranks, "shift": ranks * (ranks > 1)}
    sent = {"all_reduce": 2 * turn, "receive": 0} | whole
    for verb in VERBS:
        assert wire_bytes(verb, ranks, ranks) == sent.get(verb, turn), verb
