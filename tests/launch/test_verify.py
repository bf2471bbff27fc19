"""launch.plan --verify: what is planned is what is counted; and a plan that is wrong turns it red."""

from collections import Counter

import pytest

from launch.measure.equal import Case, Job
from layers.loss import VocabParallelCrossEntropy
from layers.stage import Stage
from parallel import pipeline
from parallel.data import Buckets
from parallel.parameter import Weights
from parallel.schedule import Plan
from parallel.shares import Shares
from plan import training
from plan.dry import DryMesh
from tests.inside import inside, ran

pytestmark = [pytest.mark.mpi, pytest.mark.limit(120)]

# By ranks: layouts of which each is verified.
CASES = {
    1: ["--model routed --recompute full", "--family llama --layers 2 --d-model 32 --heads 4 --vocabulary 61 --zero 3"],
    2: ["--model tied --mesh pp=2 --schedule zb-v", "--model mla --mesh tp=2 --sequence-parallel", "--mesh dp=2 --zero 3"],
    3: ["--model mla --mesh cp=3 --context gather", "--mesh tp=3 --zero 1"],
    4: ["--model routed --mesh dp=2,ep=2 --zero 3 --recompute full", "--model tied --mesh pp=2,dp=2 --zero 2"],
}


@pytest.mark.parametrize("n", [0, 1])
def test_what_is_planned_is_what_is_counted(comm, n):
    got = inside(comm, "plan", "--verify", "--json", *_on(comm.size, CASES[comm.size][n]))
    assert got["ok"]
    assert got["mode"] == "verify"
    rows = got["verify"]["rows"]
    assert all(row["equal"] and row["predicted"] == row["counted"] for row in rows)
    assert {row["rank"] for row in rows} == set(range(comm.size))
    said = Counter(row["what"].partition(":")[0] for row in rows)
    assert said.keys() == {"messages", "bytes", "order of operations", "memory", "peak in flight", "products"}
    assert len(got["verify"]["seconds"]["measured"]) == 3
    for row in rows:
        assert row["counted"] or row["what"].startswith(("memory", "bytes")), row


def _on(ranks, options):
    words = options.split()
    return words if "--mesh" in words else ["--mesh", f"dp={ranks}", *words]


def test_without_a_mesh_it_is_every_mesh_and_way(comm, monkeypatch):
    """Here of two meshes, in one way each."""
    from launch.planning import verify

    monkeypatch.setattr(verify, "meshes", lambda ranks: [{"pp": 1, "dp": ranks, "ep": 1, "cp": 1, "tp": 1},
                                                         {"pp": 1, "dp": 1, "ep": 1, "cp": ranks, "tp": 1}])  # fmt: skip
    monkeypatch.setattr(verify, "ways", lambda axes: [{}])
    got = inside(comm, "plan", "--verify", "--json")
    assert [case["ok"] for case in got["verify"]["cases"]] == [True, True]
    assert len(got["verify"]["rows"]) >= 2 * 10 * comm.size


# --- sabotages: on 2 ranks, the layout, and what is said to be wrong


def with_peaks(patch):
    patch.setattr(Plan, "peaks", lambda self, until="I": [min(self.micro_batches, len(self.ranks)) for _ in self.ranks])


def with_rank_0_everywhere(patch):
    patch.setattr(training, "DryMesh", lambda sizes, rank: DryMesh(sizes, 0))


def with_sums_of_each_micro_batch(patch):
    plain = Buckets.traffic
    patch.setattr(Buckets, "traffic", lambda self: 2 * plain(self))


def without_what_is_put_off(patch):
    patch.setattr(Stage, "later_bytes", lambda self, batch: 0)


def with_a_unit_less(patch):
    plain = Shares.most
    patch.setattr(Shares, "most", lambda self, ops: {kind: n - 8 for kind, n in plain(self, ops).items()})


SABOTAGES = {
    "in flight min(m, p) on every rank": ("pp=2", with_peaks, "peak in flight of rank 1"),
    "a hop that nobody is charged for": (
        "pp=2",
        lambda patch: patch.setattr(pipeline, "traffic", lambda *of: []),
        "messages: send pp forward of rank 0",
    ),
    "the last stage's loss left out": (
        "pp=2",
        lambda patch: patch.setattr(VocabParallelCrossEntropy, "saved_bytes", lambda *of: 0),
        "memory: saved of rank 1",
    ),
    "gradients summed after every micro-batch": (
        "dp=2",
        with_sums_of_each_micro_batch,
        "bytes: all_reduce dp backward of rank 0",
    ),
    "rank 0 everywhere": ("pp=2", with_rank_0_everywhere, "order of operations of rank 1"),
    "products put off that nobody keeps": ("pp=2 --schedule zb-h1", without_what_is_put_off, "memory: later of rank 0"),
    "a unit that is smaller": ("dp=2 --zero 3", with_a_unit_less, "memory: gathered of rank 0"),
    "a product of weights left out": (
        "tp=2",
        lambda patch: patch.setattr("layers.linear.linear", lambda *of: training_linear(*of)[:2]),
        "products of rank 0",
    ),
}


def training_linear(*of):
    from layers.work import linear

    return linear(*of)


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("name", SABOTAGES)
def test_a_closed_form_that_is_wrong_turns_it_red(comm, monkeypatch, name):
    layout, sabotage, what = SABOTAGES[name]
    sabotage(monkeypatch)
    done = ran(comm, "plan", "--verify", "--mesh", *layout.split())
    assert done.status == 1
    assert what in " ".join(done.out.rpartition("NOT ALL AGREED: ")[2].split())


def test_weights_without_memory_take_none(comm):
    """A sabotage: zero-stride weights that allocate."""
    job = Job("dense", 1, 1, 0)
    case = Case("dense", dict.fromkeys(("pp", "dp", "ep", "cp", "tp"), 1), {})
    step = job.training(case).step(0)
    assert all(set(p.data.strides) == {0} for p in step.parameters)
    assert isinstance(training.dry_weights("float64"), Weights)


@pytest.mark.mpi(max_size=1)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model llama3-8b", "--verify of --model llama3-8b needs a mesh"),
        ("--mesh dp=2", "is for 2 ranks, these are 1: use for instance dp=1"),
        ("--mesh dp=1 --recompute half", "--recompute half is nothing that launch.train does"),
        ("--mesh dp=1 --batch 4", "--batch does nothing with the small model"),
        ("--mesh dp=1 --family llama --layers 1 --d-model 32 --heads 4 --vocabulary 9 --dtype bf16", "use one of float32"),
        ("--mesh ep=1,dp=1 --context gather --model nosuch", "--model nosuch is not known"),
    ],
)
def test_bad_input_is_one_line(comm, options, said):
    done = ran(comm, "plan", "--verify", *options.split())
    assert done.status == 2
    assert said in done.err
    assert done.err.count("\n") <= 1
