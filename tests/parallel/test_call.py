"""The gate of every verb: what a watcher hears, in which order, and that nobody watching costs nothing and changes no bit."""

import time

import numpy as np
import pytest
from mpi4py import MPI

import parallel.axis
from parallel.call import Watcher
from parallel.guard import Agreement
from parallel.mesh import Mesh
from parallel.shard import even


class Listening(Watcher):
    def __init__(self):
        self.heard = []

    def begin(self, axis, call, x):
        self.heard.append(("begin", str(call), None if x is None else x.copy()))

    def wait(self, axis, call):
        self.heard.append(("wait", str(call), None))

    def end(self, axis, call, y, entered, left):
        assert entered <= left <= time.perf_counter()
        self.heard.append(("end", str(call), None if y is None else y.copy()))


@pytest.mark.mpi
def test_a_watcher_hears_of_every_verb_in_the_order_in_which_it_happens(comm):
    listening = Listening()
    with Mesh(comm, watchers=[listening], tp=comm.size) as mesh:
        tp, p, x = mesh.tp, comm.size, np.arange(3.0)
        going = tp.start_all_reduce(x.copy())
        tp.broadcast(x, p - 1)
        going.wait()
        going.wait()
        if p > 1:
            if tp.rank == 0:
                tp.send(np.zeros(4), 1)
            if tp.rank == 1:
                with pytest.raises(ValueError, match="receive expected"):
                    tp.receive((3,), "f4", 0)
    verbs = [(what, call.split(" (")[0]) for what, call, _ in listening.heard]
    started = [("begin", "start_all_reduce"), ("begin", "broadcast"), ("end", "broadcast"), ("wait", "start_all_reduce")]
    assert verbs[:5] == [*started, ("end", "start_all_reduce")]
    assert (listening.heard[4][2] == p * x).all()
    assert (listening.heard[1][2] is None) == (tp.rank != p - 1), "what a broadcast sends is root's"
    if p > 1 and tp.rank < 2:
        both = [("begin", "send"), ("end", "send")] if tp.rank == 0 else [("begin", "receive"), ("end", "receive")]
        assert verbs[5:] == both
        assert listening.heard[-1][2] is None, "nothing came of it"


def test_without_watchers_no_call_is_described(monkeypatch):
    monkeypatch.setattr(parallel.axis, "site", lambda: pytest.fail("described"))
    with Mesh(MPI.COMM_SELF, tp=1) as mesh:
        assert mesh.watchers == []
        mesh.tp.all_reduce(np.zeros(2))
        mesh.tp.start_all_reduce(np.zeros(2)).wait()
        mesh.watchers.append(Watcher())
        with pytest.raises(pytest.fail.Exception):
            mesh.tp.all_reduce(np.zeros(2))


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_watching_changes_no_bit(comm, dtype):
    x = np.random.default_rng(comm.rank).standard_normal((7, 5)).astype(dtype)
    rows = even(7, comm.size) if comm.size <= 7 else None
    seen = []
    for watchers in ([], [Agreement()], [Agreement(100), Listening()]):
        with Mesh(comm, watchers=watchers, tp=comm.size) as mesh:
            tp = mesh.tp
            part = tp.reduce_scatter(x, 0, rows)
            results = (
                tp.all_reduce(x),
                part,
                tp.all_gather(part, 0, rows),
                tp.broadcast(x),
                tp.start_all_reduce(x.copy()).wait(),
            )
            seen.append([r.tobytes() for r in results])
    assert seen[0] == seen[1] == seen[2]
