"""`--explain`: one rank's view of a step is what the step did, and a step that is looked at gives the same numbers."""

import io
import re
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from launch import dp_train
from launch.explain import boxes, source, text, view
from launch.explain.witness import Witness
from launch.measure import step
from launch.pictures import shards
from layers.attention import Attention
from layers.batch import Batch
from layers.latent_attention import LatentAttention
from layers.linear import RowParallelLinear
from layers.mlp import MLP
from parallel.call import Watcher
from parallel.control import Control
from parallel.ledger import wire_bytes
from parallel.mesh import Mesh
from parallel.parameter import drawn
from tests.grids import every_other
from tests.harness import ROOT
from tests.inside import inside

on_ranks = pytest.mark.mpi
QUICK = {
    "tp_mlp": ("--data", "none", "--tokens", "5", "--d-model", "6", "--timed", "5,6,10", "--d-ff", "61"),
    "tp_attention": ("--heads", "9", "--kv-heads", "3", "--d-model", "36", "--sequences", "1,7", "--qk-norm"),
    "cp_attention": ("--heads", "3", "--d-model", "12", "--sequences", "1", "--tokens", "24"),
    "dp_train": ("--micro-batches", "2", "--sequences", "9", "--steps", "1", "--zero", "--d-model", "12", "--d-ff", "16"),
}


class Heard(Watcher):
    """What a watcher of its own hears of a step."""

    def __init__(self):
        self.calls = []

    def begin(self, axis, call, x):
        sent = (call.message_bytes, wire_bytes(call.verb, call.message_bytes, axis.size))
        self.calls.append((call.verb, call.axis, call.phase, call.site, call.started, list(call.shape), *sent))


def verbs(steps):
    keys = ("verb", "axis", "phase", "site", "started", "shape", "message_bytes", "wire_bytes")
    return [tuple(s[k] for k in keys) for s in steps if s["kind"] == "verb"]


def jobs(comm):
    """A mesh, the parameters and a step: of an MLP; of an attention of uneven heads whose key/value heads several ranks hold;
    of a trainer that sends while it computes."""
    mesh = Mesh(comm, tp=comm.size)
    for layer, run in layers(mesh):
        yield mesh, layer.parameters, run
    args = dp_train.options().parse_args(["--micro-batches", "2", "--sequences", "9", "--steps", "1"])
    mesh = Mesh(comm, dp=comm.size, tp=1)
    steps = dp_train.Steps(args, dp_train.check(args, comm.size), mesh, Control(comm), 2)
    yield mesh, steps.trainer.parameters, steps.step


def layers(mesh):
    x, dy = np.random.default_rng(0).standard_normal((2, 8, 36))
    mlp = MLP(mesh.tp, drawn(0, "float64", 0.1), 36, 61, "swiglu")
    attention = Attention(mesh.tp, drawn(0, "float64", 0.1), 36, 9, 3, bias=True, bias_out=True, qk_norm=1e-6)
    yield mlp, lambda: step.phases(mlp, x, dy, mesh)
    yield attention, lambda: step.phases(attention, x, dy, mesh, Batch([1, 7]))


def explained(comm, mesh, parameters, run, rank=0):
    args = SimpleNamespace(explain=True, rank=rank)
    return view.explained(args, Control(comm), mesh, parameters, run)


def disagree(comm, rank=0):
    """Where the explanation of the rank does not say what a second run, watched by another, and its ledger have. On rank 0."""
    found = []
    for mesh, parameters, run in jobs(comm):
        told = explained(comm, mesh, parameters, run, rank)
        heard = Heard()
        mesh.watchers.append(heard)
        mesh.ledger.rows.clear()
        run()
        mesh.watchers.remove(heard)
        of_rank = Control(comm).everyone(
            (heard.calls, mesh.ledger, [(p.name, p.data.shape, p.data.nbytes) for p in parameters])
        )
        if comm.rank:
            continue
        calls, ledger, held = of_rank[rank]
        sent = {(s["verb"], s["axis"], s["phase"]): (s["calls"], s["message_bytes"]) for s in told["sent"]}
        if verbs(told["steps"]) != calls:
            found.append("verbs")
        if sent != {key: (row.calls, row.message_bytes) for key, row in ledger.rows.items()}:
            found.append("ledger")
        if [(h["name"], tuple(h["shape"]), h["bytes"]) for h in told["holds"]] != held:
            found.append("holds")
    return found


@on_ranks
def test_the_view_is_what_another_watcher_and_the_ledger_have(comm):
    for rank in {0, comm.size - 1}:
        assert disagree(comm, rank) == []


@on_ranks
def test_a_collective_left_out_of_the_view_would_be_seen(comm, monkeypatch):
    begin = Witness.begin
    monkeypatch.setattr(Witness, "begin", lambda self, axis, call, x: call.phase == "forward" or begin(self, axis, call, x))
    assert disagree(comm) == ([] if comm.rank else ["verbs", "ledger"] * 3)


@on_ranks
def test_a_step_that_is_looked_at_computes_the_same(comm):
    mesh = Mesh(comm, tp=comm.size)
    for layer, run in layers(mesh):
        before = sys.gettrace()
        y, _, dx = run()
        gradients = [p.grad.copy() for p in layer.parameters]
        for p in layer.parameters:
            p.zero_grad()
        seen = []
        explained(comm, mesh, layer.parameters, lambda run=run, seen=seen: seen.extend(run()), comm.size - 1)
        assert np.array_equal(seen[0], y)
        assert np.array_equal(seen[2], dx)
        assert all(np.array_equal(p.grad, g) for p, g in zip(layer.parameters, gradients, strict=True))
        assert sys.gettrace() is before
        assert not [w for w in mesh.watchers if isinstance(w, Witness)]


@on_ranks
@pytest.mark.parametrize("command", [command for (command,) in every_other(QUICK)])
def test_every_command_explains_what_its_ledger_counted(comm, command):
    """The rows that the command reports of its own run, which nobody looked at, beside the sums of the view."""
    # The rows of dp_train are those of its rank 0, whose tokens are its own.
    rank = 0 if command == "dp_train" else comm.size - 1
    got = inside(comm, command, *QUICK[command], "--json", "--explain", "--rank", rank)
    told = got["explain"]
    assert (told["rank"], told["mesh"]) == (rank, got["mesh"])
    # The report has the groups of all ranks; a rank has its own.
    mine = {s["axis"] for s in told["sent"]}
    counted = {(r["verb"], r["axis"], r["phase"]): (r["calls"], r["message_bytes"]) for r in got["communication"]}
    sums = {(s["verb"], s["axis"], s["phase"]): (s["calls"], s["message_bytes"]) for s in told["sent"]}
    assert sums == {key: row for key, row in counted.items() if key[1] in mine}
    assert {axis for _, axis, _ in counted if "[" not in axis} <= mine
    bytes_held = got["memory"]["weights_bytes_per_rank"][rank]
    assert sum(h["bytes"] for h in told["holds"]) == bytes_held
    for h in told["holds"]:
        assert h["shape"] == [stop - start for start, stop in h["bounds"][rank]]
    # Every verb and every line stands where it says.
    for s in told["steps"]:
        file, _, line = s["site"].rpartition(":")
        if s["kind"] in ("line", "verb"):
            assert source.text_at(str(ROOT / file), int(line)) == s["text"] != ""


@pytest.mark.mpi(min_size=3)
def test_people_read_of_the_mlp_on_the_whiteboard(comm):
    page = inside(comm, "tp_mlp", "--data", "none", "--timed", "5,6,10", "--d-ff", "96", "--explain", "--rank", "1", ranks=3)
    lines = page.splitlines()
    assert "  W1[:, 32:64]  64 x 32  of 64 x 96   8,192" in lines
    assert "  W2[32:64, :]  32 x 64  of 96 x 64   8,192" in lines
    assert "  b2                 64  whole          256  every rank has it" in lines
    assert "|  0  |# 1 #|  2  |" in page
    met = "* all_reduce of 48 x 64 on tp with ranks 0, 2: 12,288 bytes, 16,384 over the wire layers/linear.py:"
    assert " ".join(page.split()).count(met) == 2
    assert page.count("MLP.forward") == page.count("MLP.backward") == 1
    assert lines[-1] == "all agreed"
    assert "max abs error" not in page


@pytest.mark.mpi(min_size=2, max_size=2)
def test_pages_fit_and_pictures_are_the_same_again(comm):
    views = [explained(comm, *job, comm.size - 1) for job in jobs(comm)]
    for told in views if comm.rank == 0 else []:
        for width in (60, 80, 200):
            assert max(map(len, text.lines(told, width))) <= width
        one, two = io.BytesIO(), io.BytesIO()
        shards.draw(one, told)
        shards.draw(two, told)
        assert one.getvalue().startswith(b"\x89PNG")
        assert one.getvalue() == two.getvalue()


@pytest.mark.mpi(min_size=4, max_size=4)
def test_the_page_of_tensor_parallelism_shows_what_is_printed(comm, shared):
    picture, page = shared / "rank1.png", (ROOT / "docs/tensor-parallel.md").read_text()
    printed = inside(comm, "tp_mlp", "--data", "none", "--explain", "--rank", "1", "--explain-picture", picture)
    shown = printed[printed.index("Rank 1 of 4") : printed.index("\nBACKWARD\n")]
    # Where a line stands changes too often for a page: dots there.
    shown = re.sub(r"(?m)^ +\d+(?=  )|(?<=\.py:)\d+$", lambda number: re.sub(r"\d", ".", number[0]), shown)
    assert f"```\n{shown}```\n" in page, "put it there as it is printed, with dots for the numbers of lines"
    assert picture.read_bytes() == (ROOT / "docs/explain.png").read_bytes()


@pytest.mark.mpi(min_size=4, max_size=4)
def test_a_group_of_ranks_is_named(comm):
    uneven = ("--heads", "9", "--d-model", "27", "--d-head", "6", "--sequences", "1,7", "--kind", "gqa", "--kv-heads", "3")
    told = inside(comm, "tp_attention", *uneven, "--json", "--explain", "--rank", "2")["explain"]
    assert {s["axis"] for s in told["sent"]} == {"tp", "tp[1..2]", "tp[2..3]"}


@pytest.mark.mpi(min_size=2, max_size=2)
def test_verbs_that_go_on_are_waited_for(comm):
    told = inside(comm, "tp_attention", *QUICK["tp_attention"], "--json", "--explain", "--rank", "1")["explain"]
    shared = next(h for h in told["holds"] if h["name"] == "Wk")
    assert (shared["part"], shared["also_on"]) == ("Wk[:, 1:3, :]", [0])
    told = inside(comm, "dp_train", *QUICK["dp_train"], "--json", "--explain")["explain"]
    started = [n for n, s in enumerate(told["steps"]) if s.get("started")]
    assert [s["of"] for s in told["steps"] if s["kind"] == "wait"] == started != []
    assert {told["steps"][n]["verb"] for n in started} == {"reduce_scatter"}


@on_ranks
def test_options_that_cannot_be_followed_are_one_line(comm, shared):
    there = "0 to" if comm.size > 1 else "only 0"
    refused = inside(comm, "tp_mlp", "--explain", "--rank", comm.size, status=2)
    assert refused.startswith(f"error: --rank {comm.size}: no such rank among {comm.size}: use {there}")
    assert "--rank does nothing without --explain" in inside(comm, "dp_train", "--rank", "0", status=2)
    assert "-picture does nothing without --explain" in inside(comm, "tp_attention", "--explain-picture", "a.png", status=2)
    missing = shared / "none" / "deeper" / "a.png"
    assert "cannot write --explain-picture" in inside(comm, "tp_mlp", "--explain", "--explain-picture", missing, status=2)


@pytest.mark.mpi(min_size=2, max_size=2)
def test_a_picture_is_drawn_beside_the_page(comm, shared, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = inside(comm, "tp_mlp", *QUICK["tp_mlp"], "--explain", "--explain-picture", shared / "a.png")
    assert max(map(len, page.splitlines())) <= 80
    assert (shared / "a.png").exists()


# --- no ranks needed


def held(name, whole, bounds, rank):
    part = [stop - start for start, stop in bounds[rank]]
    return {"name": name, "part": name, "whole": whole, "shape": part, "bytes": 0, "bounds": bounds, "also_on": []}


def test_boxes_lie_as_the_layout_says():
    rows = held("W2", [8, 4], [[[0, 5], [0, 4]], [[5, 8], [0, 4]]], 0)
    shared = held("Wk", [6, 3, 2], [[[0, 6], [0, 2], [0, 2]], [[0, 6], [1, 3], [0, 2]]], 0)
    whole = held("b", [4], [[[0, 4]], [[0, 4]]], 0)
    seen = {"rank": 0, "holds": [rows, shared, whole]}
    W2, Wk = boxes.cut(seen)
    assert [(p.start, p.stop, boxes.named(p.ranks)) for p in W2.rows] == [(0, 5, "0"), (5, 8, "1")]
    assert [boxes.named(p.ranks) for p in Wk.columns] == ["0", "0,1", "1"]
    assert (len(W2.columns), len(Wk.rows)) == (1, 1)
    assert boxes.whole(seen) == ["b"]


def test_a_cut_over_two_dims_is_a_grid():
    """As a parameter will be that is cut over two axes."""
    bounds = [[[x, x + 2], [0, 4], [f, f + 3]] for x in (0, 2) for f in (0, 3)]
    (box,) = boxes.cut({"rank": 3, "holds": [held("W", [4, 4, 6], bounds, 3)]})
    assert [[boxes.named(r.ranks & c.ranks) for c in box.columns] for r in box.rows] == [["0", "1"], ["2", "3"]]


def test_of_many_ranks_the_neighbours_are_drawn():
    bounds = [[[r, r + 1]] for r in range(64)]
    (line,) = [p for p in boxes.drawn({"rank": 40, "holds": [held("b", [64], bounds, 40)]}, 80) if "#" in p]
    cells = [cell.strip(" #") for cell in line.strip("|").split("|")]
    assert cells == ["0", "...", "39", "40", "41", "42", "...", "63"]
    assert len(line) <= 80


def test_repeats_are_found():
    assert [*text.repeats("abcabcabcd")] == [(0, 3, 2), (9, 1, 0)]
    assert [*text.repeats("aaab")] == [(0, 1, 2), (3, 1, 0)]
    assert [*text.repeats("")] == []


def test_statements_say_what_they_read_and_make():
    by_line = source.statements(RowParallelLinear.backward.__code__)
    unpacked, bias, gathered, weights, returned = list(dict.fromkeys(by_line[line] for line in sorted(by_line)))
    assert unpacked.makes == (("x_Ti",), ("rows",))
    assert gathered.makes == (("dy_TO",),)
    assert (bias.asks, bias.makes) == (("self", "b_O"), ())
    assert weights.text == "self.W_iO.add_grad_product(x_Ti, dy_TO, later)"
    assert weights.reads == (("self", "W_iO", "add_grad_product"), ("x_Ti",), ("dy_TO",), ("later",))
    assert (returned.returns, returned.makes) == (True, (("",),))
    of = lambda function: {s.text.split(" = ")[0]: s for s in source.statements(function.__code__).values()}  # noqa: E731
    cached = of(Attention.cached)
    assert cached["q_ThE, k_TkE, v_TkE"].makes == (("q_ThE",), ("k_TkE",), ("v_TkE",))
    # An array that gives its length, shape or dtype alone is not read.
    assert cached["o_ThE"].reads == (("np", "empty"), ("self", "h"), ("self", "E"))
    assert of(LatentAttention._heads)["k_Thn"].reads == (("np", "empty"), ("self", "N"), ("self", "R"))


def test_one_rank_meets_no_other():
    told = explained(*_alone())
    assert Counter(s["kind"] for s in told["steps"]).keys() == {"enter", "line", "verb"}
    page = " ".join(" ".join(text.lines(told, 80)).split())
    assert page.count("with no other rank: 2,304 bytes, none over the wire") == 2
    assert "WHO HOLDS WHAT" not in page


def _alone():
    from mpi4py import MPI

    return MPI.COMM_SELF, *next(jobs(MPI.COMM_SELF))
