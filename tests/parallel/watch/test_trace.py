"""The trace: one clock, every verb, spans that nest, waiting told from transfer, and a command that computes the same."""

import json
import os
from collections import Counter
from pathlib import Path
from threading import Thread
from time import perf_counter

import numpy as np
import pytest
from mpi4py import MPI

from launch import trace
from launch.measure import timeline
from launch.process.traced import problem, see
from layers.block import Block
from layers.mlp import MLP
from layers.norm import RMSNorm
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import even
from parallel.watch.clock import Clock, Reading, read
from parallel.watch.trace import Record, Span, Trace, TracedCall
from parallel.watch.trace_file import write
from tests.harness import command, mpirun
from tests.parallel.watch.trace_format import asked, events_of

HERE = Clock(Reading(0.0, 0.0, 0.0))


# --- one clock


@pytest.mark.mpi
def test_clocks_are_read_within_the_stated_uncertainty(comm):
    """The ranks of one host share a clock; what is put off by a known time must be found so."""
    off = 0.25 * comm.rank
    reading = read(comm, lambda: perf_counter() + off)
    assert abs(reading.offset - off) <= reading.uncertainty
    assert reading.uncertainty < 0.1


def test_a_clock_that_drifts_is_followed():
    """This one is 1 s ahead at its 100 and 2 s at its 200."""
    clock = Clock(Reading(100.0, 1.0, 1e-6), Reading(200.0, 2.0, 3e-6))
    assert [clock.on_first(at) for at in (100.0, 150.0, 200.0)] == [99.0, 148.5, 198.0]
    assert (clock.drift, clock.uncertainty) == (0.01, 3e-6)
    assert Clock(Reading(100.0, 1.0, 1e-6)).on_first(150.0) == 149.0


# --- what is recorded


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
                group.send(x_TD, 1)
            else:
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
    found = [Counter() for _ in records]
    for e in events:
        if e.get("cat") in ("verb", "started"):
            key = e["args"]["verb"].removeprefix("start_"), e["args"]["axis"], e["args"]["phase"]
            found[e["pid"] - 1][key] += e["args"]["message_bytes"] * 1j + 1
    assert [{k: (int(n.real), int(n.imag)) for k, n in f.items()} for f in found] == counted
    # Of each collective and message of more than one rank: as many ends as ranks.
    ends = Counter(e["bind_id"] for e in events if "bind_id" in e)
    ranks = {e["bind_id"]: len(e["args"]["ranks"]) for e in events if "bind_id" in e}
    assert ends == ranks
    assert len(ends) == (0 if comm.size == 1 else 6 + 1)
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


# --- what is written, from records made by hand


def verb(entered, left, ranks=(0, 1), number=0, verb="all_reduce", started=False, peer=None, waited=None, message_bytes=8000):
    what = (number, verb, started, (1000,), "float64", "sum", peer, message_bytes, "forward", "here.py:1")
    return TracedCall("tp", ranks, 0, *what, entered, left, waited)


def written(path, *verbs, spans=(), clocks=None):
    of_ranks = zip(verbs, clocks or [HERE] * len(verbs), strict=True)
    records = [Record(n, len(verbs), "host", c, list(spans), list(v), []) for n, (v, c) in enumerate(of_ranks)]
    write(path, records, {"command": ["made", "by", "hand"]})
    events_of(path)
    return timeline.read(path)


def times(slices):
    return [(round(s.wait, 9), round(s.transfer, 9)) for s in slices]


def test_waiting_is_until_the_last_has_entered(tmp_path):
    line = written(tmp_path / "t", [verb(1.0, 4.0)], [verb(3.0, 4.5)])
    assert [times(r.verbs) for r in line.ranks.values()] == [[(2.0, 1.0)], [(0.0, 1.5)]]
    (cost,) = timeline.costs(line)
    # A ring of two sends 8000 bytes a rank for 8000: in 1.25 s on average.
    assert (cost.calls, cost.wait, cost.transfer, cost.bandwidth) == (1, 1.0, 1.25, 2 * 8000 / 2.5)
    assert timeline.kept_waiting(line) == {0: 0.0, 1: 2.0}
    assert timeline.straggler(timeline.kept_waiting(line), 2.0) == 1
    assert timeline.straggler({0: 1.0, 1: 1.5}, 2.5) is None
    states = timeline.shares(line)
    assert [round(states[0][s], 9) for s in (timeline.WAITING, timeline.TRANSFERRING, timeline.OUTSIDE)] == [2.0, 1.0, 0.5]


def test_a_rank_that_left_before_the_last_entered_only_waited(tmp_path):
    """As broadcast's root may; and clocks are never quite one."""
    line = written(tmp_path / "t", [verb(1.0, 2.0)], [verb(3.0, 4.0)])
    assert times(line.ranks[0].verbs) == [(1.0, 0.0)]


def test_clocks_are_brought_together(tmp_path):
    ahead = Clock(Reading(0.0, 100.0, 1e-6), Reading(1000.0, 100.0, 2e-6))
    line = written(tmp_path / "t", [verb(1.0, 4.0)], [verb(103.0, 104.5)], clocks=[HERE, ahead])
    assert times(line.ranks[0].verbs) == [(2.0, 1.0)]
    assert line.about["uncertainty_us"] == 2.0


def test_a_message_is_linked_to_its_own_receive(tmp_path):
    """The second send to the second receive, though other verbs of the axis lie between them on one rank only."""
    sends = [verb(1.0, 1.1, verb="send", peer=1, number=n) for n in (0, 1)]
    receives = [verb(0.5, 1.5, verb="receive", peer=0, number=n) for n in (3, 7)]
    sends[1] = sends[1]._replace(entered=5.0, left=5.1)
    receives[1] = receives[1]._replace(entered=2.0, left=5.2)
    line = written(tmp_path / "t", sends, receives)
    assert times(line.ranks[1].verbs) == [(0.5, 0.5), (3.0, 0.2)]
    assert timeline.kept_waiting(line) == {0: 3.5, 1: 0.0}


def test_what_a_started_verb_hides(tmp_path):
    """On its way from 1 to 5, waited for from 4; two at once have tracks of their own; nothing else was computed."""
    calls = [verb(1.0, 5.0, started=True, waited=4.0), verb(2.0, 6.0, started=True, number=1, waited=5.5)]
    late = [calls[0]._replace(entered=4.2, waited=4.5), calls[1]]
    line = written(tmp_path / "t", calls, late, spans=[Span("step", "phase", 0.0, 7.0)])
    assert times(line.ranks[0].started) == [(0.2, 0.8), (0.0, 0.5)]
    over = timeline.overlap(line)
    assert (over.calls, over.seconds, over.exposed) == (4, pytest.approx(12.8), pytest.approx(2.5))
    tracks = {e["tid"] for e in json.loads((tmp_path / "t").read_text())["traceEvents"] if e.get("cat") == "started"}
    assert tracks == {1001, 1002, 2001, 2002}
    states = timeline.shares(line)[0]
    assert [round(states[s], 9) for s in ("step", timeline.WAITING, timeline.TRANSFERRING)] == [5.5, 0.2, 1.3]


def test_the_strip_shows_what_took_most_of_a_column(tmp_path):
    spans = [Span("forward", "phase", 0.0, 4.0), Span("backward", "phase", 4.0, 8.0), Span("mlp forward", "forward", 5.0, 6.0)]
    line = written(tmp_path / "t", [verb(1.0, 3.0)], [verb(2.0, 3.0)], spans=spans)
    letters = ["".join(trace.LETTERS[s] for s in timeline.strip(r, 0.0, 10.0, 10)) for r in line.ranks.values()]
    assert letters == ["F~=FBBBB..", "FF=FBBBB.."]
    part = line.between(1.0, 3.0)
    assert [timeline.strip(part.ranks[0], 1.0, 3.0, 4)] == [[timeline.WAITING] * 2 + [timeline.TRANSFERRING] * 2]


def test_two_traces_lie_side_by_side(tmp_path, capsys):
    """Row by row, what one of them lacks as 0; what both lack is left out."""
    spans = [Span("forward", "phase", 0.0, 4.0)]
    lines = {
        "a": written(tmp_path / "a", [verb(1.0, 3.0)], [verb(2.0, 3.0)], spans=spans),
        "b": written(tmp_path / "b", [], [], spans=[*spans, Span("training step", "step", 4.0, 6.0)]),
    }
    a, b = (trace.summary(tmp_path / name, line) for name, line in lines.items())
    rows = {name: (x, y) for name, x, y in trace.compared(a, b)}
    assert rows["the whole"] == (4.0, 6.0)
    # Of the 4 s of a, rank 0 passed 2 in the sum, one of them waiting, and rank 1 passed 1.
    assert rows["computing"] == (2.5, 6.0)
    assert rows["waiting"] == (0.5, 0.0)
    assert rows["all_reduce tp 1000"] == (1.5, 0.0)
    assert rows["training step (median)"] == (0.0, 2.0)
    assert "backward" not in rows
    trace.show_compared(a, b)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["waiting", "500.00", "0.00", "-500.00", "0.00"] in said
    assert ["training", "step", "(median)", "0.00", "2000.00", "+2000.00", "-"] in said


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


# --- what cannot be read or written


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "is no 'rankwise trace 1'"),
        ('{"traceEvents": []}', "is no 'rankwise trace 1'"),
        ('{"otherData": {"format": "rankwise trace 1"}, "traceEvents": []}', "has no spans"),
        ('{"otherData": {"format": "rankwise trace 1"}}', "is damaged"),
        ('{"otherData": {"format": "rankwise trace 1"}, "traceEvents": [{"ph": "X", "pid": 1}]}', "is damaged"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_in_a_line(tmp_path, content, said):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(timeline.TraceError, match=said):
        timeline.read(path)


def test_a_path_that_cannot_be_written_is_found_before_the_work(tmp_path):
    assert problem(tmp_path / "new.json") is None
    assert os.listdir(tmp_path) == []
    assert "it is a folder" in problem(tmp_path)
    assert "there is no folder" in problem(tmp_path / "none" / "t.json")
    assert "cannot write --trace" in problem(Path("/proc/t.json"))


# --- commands

SMALL = ("--tokens", "32", "--d-model", "16", "--d-ff", "64", "--data", "none", "--json")


def test_a_slow_rank_is_named_and_perfetto_reads_the_file(tmp_path):
    """Rank 1 sleeps before its third sum: the two others wait for it, in the trace's own numbers and in Perfetto's."""
    path = tmp_path / "slow.json"
    slow = {"RANKWISE_FAULT": "rank=1,at=all_reduce:3,kind=sleep:0.8"}
    done = mpirun(3, "-m", "launch.tp_mlp", *SMALL, "--trace", str(path), **slow)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    told = command("trace", 0, str(path), "--json")
    assert told["straggler"] == 1
    by_rank = told["seconds_by_rank"]
    assert by_rank[1]["kept_others_waiting"] > 1.4
    assert min(by_rank[0]["waiting"], by_rank[2]["waiting"]) > 0.7
    assert by_rank[1]["waiting"] < by_rank[0]["waiting"]
    events = events_of(path)
    verbs = [e for e in events if e.get("cat") == "verb"]
    sums = [v for v in verbs if v["pid"] == 1 and v["args"]["phase"] == "forward"]
    assert len(sums) == next(r["calls"] for r in result["communication"] if r["phase"] == "forward")
    slices, ends, waited, bad, memory, names = asked(
        path,
        "select category, count(*) as n from slice group by 1",
        "select count(*) as n from flow",
        "select p.name, sum(s.dur) as ns from slice s join thread_track t on s.track_id = t.id join thread using (utid) "
        "join process p using (upid) where s.category = 'wait' group by 1 order by 2",
        "select name, value from stats where severity != 'info' and value > 0",
        "select count(*) as n from counter c join process_counter_track t on c.track_id = t.id where t.name like 'memory%'",
        "select name from process where pid > 0 order by pid",
    )
    assert {r["category"]: r["n"] for r in slices} == Counter(e["cat"] for e in events if e["ph"] == "X")
    # A link of three ranks is two arrows.
    assert ends == [{"n": 2 * len({v["bind_id"] for v in verbs if "bind_id" in v})}]
    assert waited[0]["name"].startswith("rank 1 ")
    assert bad == []
    assert memory[0]["n"] == sum(e["ph"] == "C" for e in events)
    assert [r["name"].split(" on ")[0] for r in names] == ["rank 0", "rank 1", "rank 2"]


def test_training_computes_the_same_with_a_trace(tmp_path):
    sizes = ("--layers", "1", "--d-model", "32", "--heads", "2", "--sequence-length", "32", "--batch-tokens", "128")
    args = (*sizes, "--steps", "3", "--sample", "0", "--output", str(tmp_path), "--dtype", "float64", "--mesh", "dp=2,tp=1")
    text = tmp_path / "text"
    text.write_text("all work and no play " * 80)
    plain = command("train", 2, *args, "--text", str(text), "--json")
    path = tmp_path / "t.json"
    seen = command("train", 2, *args, "--text", str(text), "--json", "--trace", str(path))
    for key in ("loss", "validation_bits_per_byte", "config", "memory"):
        assert seen[key] == plain[key], key
    line = timeline.read(path)
    events_of(path)
    assert timeline.steps(line)["training step"][0] == 3
    assert timeline.overlap(line).calls > 0
    assert {"blocks.0.attention forward", "blocks.0.mlp backward", "AdamW"} <= {s.name for s in line.ranks[1].work}
    picture = tmp_path / "t.png"
    told = mpirun(0, "-m", "launch.trace", str(path), "--png", str(picture), COLUMNS="60")
    assert told.returncode == 0, told.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    strips = [line for line in told.stdout.splitlines() if line.startswith("rank ")][:2]
    assert all(len(strip) <= 60 and {"F", "B"} <= set(strip) for strip in strips)


def test_a_rank_that_fails_leaves_what_it_has(tmp_path):
    path = tmp_path / "t.json"
    fault = {"RANKWISE_FAULT": "rank=1,at=all_reduce:2,kind=raise"}
    done = mpirun(2, "-m", "launch.tp_mlp", *SMALL, "--trace", str(path), timeout=30, **fault)
    assert done.returncode != 0
    assert not path.exists()
    line = timeline.read(tmp_path / "t.rank1.json")
    assert list(line.about["failed"]) == ["1"]
    assert [s.name for s in line.ranks[1].verbs] == ["all_reduce tp"]


def test_unusable_paths_are_one_line(tmp_path):
    nowhere = str(tmp_path / "none" / "t.json")
    assert "there is no folder" in command("tp_mlp", 2, *SMALL, "--trace", nowhere, status=2)
    assert "cannot read" in command("trace", 0, nowhere, status=2)
    full = {"RANKWISE_FAULT": "rank=0,at=all_reduce:1,kind=disk:1000"}
    done = mpirun(2, "-m", "launch.tp_mlp", *SMALL, "--trace", str(tmp_path / "t.json"), **full)
    assert (done.returncode, os.listdir(tmp_path)) == (2, [])
    assert done.stderr.splitlines()[-1] == f"error: cannot write --trace {tmp_path / 't.json'}: File too large"


def test_the_bench_counts_the_spans_of_a_step():
    """Times are for people; that a step traced is the step untraced, with as many spans each time, is for a test."""
    sizes = ("--tokens", "32", "--sequence-length", "16", "--d-model", "16", "--d-ff", "32", "--heads", "2", "--layers", "1")
    told = command("bench", 2, "trace", *sizes, "--rounds", "2", "--json")
    # The same number each round, or the mean of three would be no whole number.
    calls, verbs = told["calls_a_step"], told["verbs_a_step"]
    assert (calls, verbs) == (int(calls), int(verbs))
    # Layers on top of one another, and the sums of a block, of the loss and of the step.
    assert min(calls, verbs) > 8
    assert told["ratios"].keys() == {"untraced_again_to_untraced", "traced_to_untraced"}
    cost = calls * told["call_seconds"] + verbs * told["verb_seconds"]
    assert told["worked_out"] == cost / told["seconds"]["untraced"]
