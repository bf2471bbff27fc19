"""What a trace records: every verb of the ledger, spans that nest, and no bit of the numbers changed."""

from collections import Counter
from threading import Thread

import numpy as np
import pytest
from mpi4py import MPI

from launch.measure import timeline
from launch.process.traced import see
from layers.block import Block
from layers.mlp import MLP
from layers.norm import RMSNorm
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import even
from parallel.watch.trace import Trace
from parallel.watch.trace_file import write
from tests.parallel.watch.trace_format import events_of


class Doubling:
    """A layer with parts, in the way of layers/."""

    def __init__(self, tp):
        weights = drawn(0, "float64", 0.1)
        self.norm = RMSNorm(weights, "norm", 12)
        self.mlps = [MLP(tp, weights, 12, 4 * tp.size) for _ in range(2)]

    def forward(self, x_TD):
        n_TD, saved_norm = self.norm.forward(x_TD)
        y0_TD, saved0 = self.mlps[0].forward(n_TD)
        y1_TD, saved1 = self.mlps[1].forward(n_TD)
        return y0_TD + y1_TD, (saved_norm, saved0, saved1)

    def backward(self, dy_TD, saved):
        saved_norm, saved0, saved1 = saved
        dn_TD = self.mlps[0].backward(dy_TD, saved0) + self.mlps[1].backward(dy_TD, saved1)
        return self.norm.backward(dn_TD, saved_norm)


def step(mesh, layer, x_TD):
    with mesh.phase("forward"):
        y_TD, saved = layer.forward(x_TD)
    with mesh.phase("backward"):
        dx_TD = layer.backward(y_TD, saved)
    with mesh.phase("step"):
        pending = mesh.tp.start_all_reduce(dx_TD.copy())
        mesh.tp.all_gather(x_TD[:1], 0, even(mesh.tp.size, mesh.tp.size))
        pending.wait()
        if mesh.tp.size > 1 and mesh.tp.rank < 2:
            group = mesh.tp.group(range(2))
            if mesh.tp.rank == 0:
                going = group.start_send(x_TD, 1)
                group.send(x_TD, 1)
                going.wait()
            else:
                group.receive(x_TD.shape, x_TD.dtype, 0)
                group.receive(x_TD.shape, x_TD.dtype, 0)
    return dx_TD


@pytest.mark.mpi
def test_every_verb_of_the_ledger_is_a_span_and_the_numbers_are_the_same(comm, tmp_path):
    """Calls and bytes by verb, axis and phase; spans nest; links have as many ends as ranks; no rank leaves a sum before the
    last has entered it, but for what the clocks are uncertain by."""
    x_TD = np.random.default_rng(1).standard_normal((5, 12))
    plain = Mesh(comm, tp=comm.size)
    untraced = step(plain, Doubling(plain.tp), x_TD)
    recorder = Trace(comm)
    before = dict(vars(MLP))
    see(recorder)
    recorder.watch_layers([Doubling])
    # Others that talk before MPI is entered.
    mesh = Mesh(comm, check=True, tp=comm.size)
    recorder.watch(mesh)
    assert np.array_equal(step(mesh, Doubling(mesh.tp), x_TD), untraced)
    records = recorder.finish()
    assert dict(vars(MLP)) == before
    assert recorder not in mesh.watchers
    mesh.tp.all_reduce(x_TD)
    counted = Control(comm).everyone({k: (r.calls, r.message_bytes) for k, r in plain.ledger.rows.items()})
    if comm.rank:
        assert records is None
        return
    path = tmp_path / "t.json"
    write(path, records, {"command": ["test"]})
    events = events_of(path)
    by_rank = [Counter() for _ in records]
    for e in events:
        if e.get("cat") in ("verb", "started"):
            key = e["args"]["verb"].removeprefix("start_"), e["args"]["axis"], e["args"]["phase"]
            by_rank[e["pid"] - 1][key] += e["args"]["message_bytes"] * 1j + 1
    assert [{k: (int(n.real), int(n.imag)) for k, n in f.items()} for f in by_rank] == counted
    # Of each collective and message of more than one rank: as many ends as ranks.
    ends = Counter(e["bind_id"] for e in events if "bind_id" in e)
    ranks = {e["bind_id"]: len(e["args"]["ranks"]) for e in events if "bind_id" in e}
    assert ends == ranks
    assert len(ends) == (0 if comm.size == 1 else 6 + 2)
    names = [e["name"] for e in events if e.get("cat") in ("forward", "backward") and e["pid"] == 1]
    assert names[:4] == ["Doubling forward", "norm forward", "mlps.0 forward", "mlps.0.up forward"]
    assert "mlps.1.down backward" in names
    line = timeline.read(path)
    uncertain = 2e-6 * line.about["uncertainty_us"]
    sums = [[s for s in r.verbs if s.args["verb"] == "all_reduce"] for r in line.ranks.values()]
    assert len(sums[0]) == 4
    for calls in zip(*sums, strict=True):
        assert min(c.ended for c in calls) >= max(c.begun for c in calls) - uncertain


def test_a_block_shows_its_parts():
    """The layers' own classes are found where they are loaded, by what they have."""
    recorder = Trace(MPI.COMM_SELF)
    see(recorder)
    try:
        assert {Block, MLP, RMSNorm} <= set(recorder._layers)
        assert "Rotation" not in {cls.__name__ for cls in recorder._layers}
    finally:
        recorder.stop()


def test_more_spans_than_a_trace_keeps_are_told_of():
    recorder = Trace(MPI.COMM_SELF, limit=3)
    for n in range(5):
        with recorder.span(f"s{n}", "phase"):
            pass
    (record,) = recorder.finish()
    assert ([s.name for s in record.spans], record.dropped) == (["s0", "s1", "s2"], 2)


def test_the_thread_that_calls_verbs_is_the_one_that_is_seen():
    """A server's engine has a thread beside the one that talks to clients: spans of both would not nest."""
    recorder, mesh = Trace(MPI.COMM_SELF), Mesh(MPI.COMM_SELF, tp=1)
    recorder.watch(mesh)

    def engine():
        with mesh.phase("decode"):
            mesh.tp.all_reduce(np.ones(2))

    thread = Thread(target=engine)
    thread.start()
    thread.join()
    with recorder.span("a client", "phase"):
        pass
    (record,) = recorder.finish()
    assert ([s.name for s in record.spans], len(record.verbs)) == (["decode"], 1)
