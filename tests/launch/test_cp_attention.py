"""launch.cp_attention and bench context as a user types them."""

import json

import numpy as np
import pytest

from launch import cp_attention
from launch.measure import attention
from layers.context import KINDS, Ring
from parallel.owed import Owed
from parallel.parameter import Parameter
from tests.grids import every_other
from tests.harness import mpirun
from tests.inside import inside, ran

on_ranks = pytest.mark.mpi
# Grouped: 2 key/value heads of width 4.
SMALL = ("--d-model", "16", "--heads", "4", "--json", "--dtype", "float64")


@pytest.fixture(autouse=True)
def few_entries(monkeypatch):
    """Fewer entries are compared one by one; the direction through all of them stays."""
    monkeypatch.setattr(attention, "BUDGET", 0.01)


def run(comm, *options, **more):
    return inside(comm, cp_attention, *SMALL, *options, **more)


def sent(got):
    """Bytes of all ranks over cp, the sum of gradients aside."""
    rows = [r for r in got["communication"] if r["axis"] == "cp" and r["verb"] != "all_reduce"]
    return sum(r.get("message_bytes_sum", got["ranks"] * r["message_bytes"]) for r in rows)


@on_ranks
@pytest.mark.parametrize(("kind", "layout"), every_other(KINDS, ["zigzag", "contiguous"]))
def test_every_kind_agrees_and_is_what_the_table_says(comm, kind, layout):
    got = run(comm, "--kind", kind, "--layout", layout, "--sequences", "1,7,12")
    assert got["ok"]
    assert got["config"]["kind"] == kind
    assert (got["config"]["attention"], got["config"]["lengths"]) == ("gqa", [1, 7, 12])
    weights = [f"{a}{b}" for a in "Wb" for b in "qkvo"]
    assert {c["tensor"] for c in got["checks"]} == {"y"} | {f"d{n}{all}" for n in [*weights, "x"] for all in ("", ", all")}
    assert max(c["relative_error"] for c in got["checks"]) < 1e-12
    assert all(r["message_bytes"] == r["predicted_message_bytes"] for r in got["communication"])
    assert sum(got["tokens_per_rank"]) == 20
    # Every pair once, for each of 4 heads.
    assert np.dot(got["pairs_per_rank"], got["heads_per_rank"]) == 4 * (1 + 28 + 78)
    held = got["memory"]
    assert held["saved_bytes_per_rank"] == held["predicted_saved_bytes_per_rank"]
    row = next(row for row in got["kinds"] if row["kind"] == kind)
    assert row["saved_bytes_per_rank"] == held["saved_bytes_per_rank"]
    assert sum(row["message_bytes_per_rank"]) == sent(got)
    assert row["balance"] == got["balance"] >= 1
    assert got["seconds"].keys() == {"sharded", "unsharded", "matmul_only"}


@pytest.mark.mpi(min_size=4, max_size=4)
@pytest.mark.parametrize(
    ("options", "pairs", "balance"),
    [
        (("--layout", "zigzag"), [2627, 2617, 2625, 2625], 1.001),
        (("--layout", "contiguous"), [975, 1569, 2725, 5225], 1.992),
        (("--kind", "ulysses"), [10494] * 4, 1.0),
    ],
)
def test_work_is_told_by_rank(comm, monkeypatch, options, pairs, balance):
    """The numbers of `tests/layers/test_context.py`, which compares such sequences."""
    monkeypatch.setattr(attention, "compared", lambda *given: ())
    got = run(comm, *options, "--sequences", "1,7,64,129")
    assert got["pairs_per_rank"] == pairs
    assert round(got["balance"], 3) == balance
    ring, ulysses, gather = got["kinds"]
    # Two key/value heads of width 4, keys and values, in float64: of all 201 tokens, of two ranks', of one head.
    assert max(gather["key_bytes_per_rank"]) == 201 * 2 * 8 * 8
    assert max(ulysses["key_bytes_per_rank"]) == 201 * 8 * 8
    assert max(ring["key_bytes_per_rank"]) <= 105 * 2 * 8 * 8 or "contiguous" in options


@pytest.mark.mpi(min_size=4, max_size=4)
@pytest.mark.parametrize(
    "options",
    [
        ("--mesh", "cp=2,tp=2", "--sequence-parallel"),
        ("--mesh", "tp=2", "--kind", "ulysses", "--attention", "mha"),
        ("--attention", "mla", "--d-query-latent", "5"),
        ("--attention", "mqa", "--kind", "ulysses", "--qk-norm", "--bidirectional"),
    ],
)
def test_with_tensor_parallelism_and_every_attention(comm, options):
    got = run(comm, *options, "--sequences", "5,6")
    assert got["ok"]
    assert got["mesh"] == ({"cp": 2, "tp": 2} if "--mesh" in options else {"cp": 4, "tp": 1})
    assert max(c["relative_error"] for c in got["checks"]) < 1e-12


@on_ranks
def test_fewer_tokens_than_ranks(comm):
    got = run(comm, "--sequences", "1", "1")
    assert got["ok"]
    assert sum(got["tokens_per_rank"]) == 2


@pytest.mark.mpi(min_size=2)
def test_a_gradient_that_is_not_summed_is_seen(comm, monkeypatch):
    monkeypatch.setattr(Owed, "sum", lambda self: None)
    few = "--sequences", "1", "--tokens", "9"
    got = run(comm, *few, status=1)
    wrong = {c["tensor"] for c in got["checks"] if not c["ok"]}
    assert {"dWq", "dWk", "dWv", "dWo"} <= {name.removesuffix(", all") for name in wrong}
    assert not {"y", "dx"} & wrong
    out = ran(comm, cp_attention, *few).out
    assert "\nNOT ALL AGREED: " in out


@pytest.mark.mpi(min_size=2)
def test_a_gradient_that_differs_on_one_rank_is_seen(comm, monkeypatch):
    """Rank 0, which is compared with the reference, has it right."""
    plain = Parameter.whole

    def spoilt(self, mesh, part):
        if self.name == "Wq" and part is self.grad and comm.rank == 1:
            part += 1
        return plain(self, mesh, part)

    monkeypatch.setattr(Parameter, "whole", spoilt)
    done = ran(comm, cp_attention, "--sequences", "1", "--tokens", "9")
    assert done.status == 1
    assert done.out.startswith("NOT OK: dWq; 10 of 10 tensors agree with the reference")


@pytest.mark.mpi(min_size=2)
def test_a_lost_block_is_seen(comm, monkeypatch):
    monkeypatch.setattr(Ring, "_seen", lambda self, hop, core, batch: [])
    got = run(comm, "--sequences", "1", "--tokens", "9", status=1)
    assert not next(c["ok"] for c in got["checks"] if c["tensor"] == "y")


@pytest.mark.mpi(min_size=2, max_size=3)
def test_a_trace_shows_the_hop_beside_the_block(comm, shared, monkeypatch):
    monkeypatch.setattr(attention, "compared", lambda *given: ())
    run(comm, "--sequences", "1", "--tokens", "256", "--trace", shared / "t.json")
    events = json.loads((shared / "t.json").read_text())["traceEvents"]
    for rank in range(1, comm.size + 1):
        mine = [e for e in events if e["pid"] == rank and e["ph"] == "X"]
        # The first hop is under way from before the rank's own block until after it.
        hop = next(e for e in mine if e["name"] == "start_shift cp")
        waited = next(e for e in mine if e["name"] == "wait for start_shift cp")
        inside = next(e for e in mine if e["name"] == "context forward")
        assert inside["ts"] < hop["ts"] < waited["ts"] < hop["ts"] + hop["dur"] < inside["ts"] + inside["dur"]
        assert hop["args"]["hidden_us"] > 0


@pytest.mark.mpi(min_size=2)
def test_people_get_tables_and_a_last_line(comm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    done = ran(comm, cp_attention, "--heads", "2", "--d-model", "8", "--sequences", "1,5", "--kind", "ring")
    assert done.status == 0, done.err
    assert done.out.startswith("ok: 10 of 10 tensors agree with the reference")
    assert f"Context-parallel attention (gqa) by ring, zigzag, on cp={comm.size}, tp=1: T 6 tokens" in done.out
    assert "Work by rank: worst over mean " in done.out
    rows = {line.split()[0]: line.split() for line in done.out.splitlines() if line.split()[:1] and line.split()[0] in KINDS}
    assert [rows[kind][-1] for kind in ("ring", "gather")] == ["none", "none"]
    assert rows["ulysses"][-3:] == ["at", "most", "cp=2"]
    # Three ranks are too many for two heads.
    assert ("-" in rows["ulysses"]) == (comm.size > 2)
    assert done.out.splitlines()[-1] == "all agreed"


@pytest.mark.mpi(min_size=4, max_size=4)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kind", "ulysses", "--heads", "3", "--d-model", "24"], "cannot cut 3 heads over cp=4: use --kind ring"),
        (
            ["--kind", "ulysses", "--heads", "3", "--d-model", "24", "--mesh", "tp=2"],
            "cannot cut 1 of 3 heads over cp=2: use --kind",
        ),
        (["--heads", "2", "--mesh", "tp=4"], "cannot cut --heads 2 over tp=4: use at most tp=2"),
        (["--mesh", "dp=4"], "--mesh dp=4: this command lays ranks out along cp and tp"),
        (["--mesh", "cp=2"], "--mesh cp=2,tp=1 is for 2 ranks, these are 4: use for instance cp=4,tp=1"),
        (["--mesh", "cp=3,tp=2"], "--mesh cp=3,tp=2 is for 6 ranks, these are 4: use for instance cp=2,tp=2"),
        (["--sequences", "3,0,2"], "argument --sequences: '0' is not a size: use a whole number of 1 or more"),
        (["--sequences", "9", "--tokens", "8"], "cannot cut --tokens 8 into 9 sequences: use at most 8"),
        (
            ["--attention", "mqa", "--kv-heads", "2"],
            "--attention mqa has 1 kv-heads, not 2: use --attention gqa, or no --kv-heads",
        ),
        (["--d-latent", "8"], "--d-latent does nothing without --attention mla: leave --d-latent out"),
        (["--layout", "striped"], "argument --layout: invalid choice: 'striped' (choose from"),
    ],
)
def test_bad_input_is_one_line_and_status_two(comm, args, message):
    assert message in inside(comm, cp_attention, *args, status=2)


def test_bench_measures_the_ring_and_its_memory():
    bench = ("-m", "launch.bench", "context", "--tokens", "256", "--d-model", "16", "--heads", "2", "--json")
    timed, held = (json.loads(mpirun(2, *bench, *more).stdout) for more in (("--rounds", "1"), ("--memory",)))
    assert timed["seconds"].keys() == {"alone", "each", "blocks", "ring", "ulysses", "gather"}
    assert timed["ratios"].keys() >= {"ring_to_share_of_alone", "ring_to_share_of_each", "ring_to_blocks"}
    assert all(0 < share < 1 for share in timed["hidden_share_per_rank"])
    assert [m["tokens"] for m in held["memory"]] == [32, 64, 128, 256]
    assert all(m["ring_bytes"] < m["gather_bytes"] for m in held["memory"])
