"""launch.train and launch.dp_train as a user types them: killed and taken up again on another mesh, and what they refuse."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch import start
from parallel.manifest import sealed
from tests.grids import thinned
from tests.harness import ROOT, launcher_free
from tests.inside import inside
from tests.launch.test_start import alive

TRAIN = ("-m", "launch.train")
# Small enough for a step in some ms. 5 sequences: unequal parts.
QUICK = ("--layers", "2", "--d-model", "16", "--heads", "4", "--kv-heads", "2", "--d-ff", "22", "--sequence-length", "24")
QUICK += ("--batch-tokens", "120", "--steps", "12", "--warmup", "2", "--sample", "9", "--dtype", "float64", "--json")


on_ranks = pytest.mark.mpi


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text whose validation part is short, so that validating takes no time."""
    world = start.begin()
    path = world.bcast(tmp_path_factory.mktemp("text") / "text.txt")
    if world.rank == 0:
        path.write_bytes((ROOT / "README.md").read_bytes()[:6000])
    world.Barrier()
    return path


def train(comm, folder, text, *args, **ends):
    return inside(comm, "train", *QUICK, "--text", text, "--output", folder / "out", *args, **ends)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The same run, never interrupted, on one rank."""
    return train(start.begin(), tmp_path_factory.mktemp("whole"), text, ranks=1)


# By the number of ranks, how they go about it.
MESHES = {
    2: [
        ("--overlap", "off", "--bucket-mib", "0.001"),
        ("--mesh", "pp=2", "--schedule", "zb-h1"),
        ("--mesh", "cp=2"),
    ],
    3: [
        ("--mesh", "tp=3", "--recompute"),
        ("--mesh", "pp=3", "--layers", "1,0,1"),
        ("--mesh", "cp=3", "--context", "gather"),
    ],
    4: [
        ("--mesh", "dp=2,tp=2", "--zero", "--micro-batches", "2"),
        ("--mesh", "pp=2,cp=2"),
        ("--mesh", "cp=2,tp=2", "--sequence-parallel", "--zero"),
        ("--mesh", "dp=2,cp=2", "--context", "ulysses", "--layout", "contiguous"),
    ],
}


@on_ranks
@pytest.mark.parametrize("options", MESHES.get(start.begin().size, []), ids=" ".join)
def test_the_same_numbers_on_every_mesh(comm, shared, text, whole, options):
    """Losses, bits of the validation text, and the sample byte for byte."""
    got = train(comm, shared, text, *options)
    assert got["ok"]
    np.testing.assert_allclose(got["loss"], whole["loss"], rtol=0, atol=1e-10)
    assert got["validation_bits_per_byte"] == pytest.approx(whole["validation_bits_per_byte"], abs=1e-10)
    assert got["sample"] == whole["sample"]
    assert got["parameters"] == whole["parameters"]
    assert len(got["memory"]["weights_bytes_per_rank"]) == comm.size
    if "dp=2,tp=2" in options:
        assert max(got["memory"]["optimizer_bytes_per_rank"]) < 0.6 * max(got["memory"]["weights_bytes_per_rank"]) * 2
    if "--recompute" in options:
        assert max(got["memory"]["saved_bytes_per_rank"]) < 0.5 * whole["memory"]["saved_bytes_per_rank"][0]


ROUTED = ("--experts", "5", "--shared", "1", "--balance", "bias")
ROUTED_MESHES = {
    2: ("--mesh", "ep=2"),
    3: ("--mesh", "ep=3", "--recompute"),
    4: ("--mesh", "pp=2,ep=2", "--micro-batches", "2"),
}


@pytest.fixture(scope="module")
def routed(tmp_path_factory, text):
    """A run with experts, on one rank."""
    return train(start.begin(), tmp_path_factory.mktemp("routed"), text, *ROUTED, ranks=1)


@pytest.mark.mpi(min_size=2)
def test_a_routed_model_trains_the_same_over_ep(comm, shared, text, routed):
    got = train(comm, shared, text, *ROUTED, *ROUTED_MESHES[comm.size])
    np.testing.assert_allclose(got["loss"], routed["loss"], rtol=0, atol=1e-10)
    for name in ("sample", "parameters", "tokens_per_expert"):
        assert got[name] == routed[name]
    assert [sum(n) for n in got["tokens_per_expert"].values()] == [240, 240]
    assert (shared / "out" / "load.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpi(min_size=2, max_size=thinned(4, 2))
def test_curve_and_report_are_written(comm, shared, text, whole):
    out = inside(comm, "train", *QUICK[:-1], "--text", text, "--output", shared / "out")
    assert out.splitlines()[-1] == "all agreed"
    with open(shared / "out" / "loss.csv") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(r["loss_nats"]) for r in rows], whole["loss"], rtol=0, atol=1e-10)
    assert (shared / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_killed_at_any_step_and_taken_up_on_other_meshes(comm, tmp_path, text, whole):
    """kill -9 of one rank, three times, each time resumed on another mesh: as if nothing had happened."""
    folder = tmp_path / "kept"
    meshes = [(4, "dp=2,tp=2"), (2, "pp=2"), (3, "cp=3")]
    random = np.random.default_rng(0)
    for n, (ranks, mesh) in enumerate(meshes):
        command = [*QUICK, "--text", str(text), "--output", str(tmp_path / "out"), "--mesh", mesh, "--save-every", "1"]
        command += ["--checkpoint", str(folder), *(["--resume"] if n else []), *(["--zero"] if n != 1 else [])]
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), sys.executable, *TRAIN, *command],
            cwd=ROOT,
            env=launcher_free(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        # Until a new step is there, and a little longer: some time within the next step or save.
        before = {p.name for p in folder.glob("step-*")}
        while {p.name for p in folder.glob("step-*")} <= before and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.02 * random.random())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks_of = [c for p in children for c in Path(f"/proc/{p}/task/{p}/children").read_text().split()] or children
        os.kill(int(ranks_of[random.integers(len(ranks_of))]), signal.SIGKILL)
        assert process.wait(timeout=20) != 0
        assert not alive(ranks_of)
    got = train(comm, tmp_path, text, "--checkpoint", folder, "--resume", "--mesh", "dp=1")
    assert 1 < got["first_step"] <= 12
    np.testing.assert_allclose(got["loss"], whole["loss"][got["first_step"] - 1 :], rtol=0, atol=1e-10)
    with open(tmp_path / "out" / "loss.csv") as file:
        every = [float(r["loss_nats"]) for r in csv.DictReader(file)]
    np.testing.assert_allclose(every, whole["loss"], rtol=0, atol=1e-10)
    assert got["validation_bits_per_byte"] == pytest.approx(whole["validation_bits_per_byte"], abs=1e-10)


@pytest.mark.mpi(max_size=thinned(4, 2))
def test_what_cannot_be_resumed_is_refused(comm, shared, text):
    folder = shared / "kept"
    kept, resumed = ("--checkpoint", folder), ("--checkpoint", folder, "--resume")
    assert "holds no checkpoint to resume" in train(comm, shared, text, *resumed, status=2)
    # Shards of other ranks than those that are to take them up.
    train(comm, shared, text, *kept, ranks=max(1, comm.size - 1))
    refused = train(comm, shared, text, *kept, status=2)
    assert "holds step-00000012: use --resume, or another folder" in refused
    refused = train(comm, shared, text, *resumed, "--layers", "3", status=2)
    assert "the checkpoint has layers 2, this run 3" in refused
    other, shard = shared / "other.txt", max(folder.glob("step-*/rank-*"))
    if comm.rank == 0:
        other.write_bytes(text.read_bytes()[::-1])
    comm.Barrier()
    refused = train(comm, shared, other, *resumed, status=2)
    assert "was made from another text" in refused
    if comm.rank == 0:
        data = bytearray(shard.read_bytes())
        data[-5] ^= 4
        shard.write_bytes(data)
    comm.Barrier()
    assert shard.name in train(comm, shared, text, *resumed, status=2)


@pytest.mark.mpi(max_size=thinned(4, 2))
def test_a_state_that_is_no_training_run_s_is_refused(comm, shared, text):
    folder = shared / "kept"
    train(comm, shared, text, "--checkpoint", folder)
    (manifest,) = folder.glob("step-*/manifest.json")
    right = json.loads(manifest.read_text())
    del right["sha256"]
    order = right["state"]["order"]
    # All have read it before it is written over.
    comm.Barrier()
    for wrong in (
        {"run": None},
        {"losses": ["low"] * 12},
        {"losses": [1.0]},
        {"order": {}},
        {"order": order | {"position": 10**9}},
        {"order": order | {"random": order["random"] | {"buffer": [-1]}}},
    ):
        if comm.rank == 0:
            manifest.write_bytes(b"".join(sealed(right | {"state": right["state"] | wrong})))
        comm.Barrier()
        refused = train(comm, shared, text, "--checkpoint", folder, "--resume", status=2)
        assert f"{manifest.parent}: its state is not that of a training run" in refused


BAD = [
    (3, ("--mesh", "dp=2,tp=2"), "--mesh dp=2,tp=2 is for 4 ranks, these are 3: use for instance dp=3,tp=1"),
    (4, ("--mesh", "dp=2"), "--mesh dp=2,tp=1 is for 2 ranks, these are 4: use for instance dp=4,tp=1"),
    (3, ("--mesh", "tp=2"), "--mesh dp=1,tp=2 is for 2 ranks, these are 3: use for instance dp=3,tp=1"),
    (4, ("--mesh", "ep=4", "--experts", "3"), "cannot cut 3 experts over ep=4: use at most ep=3"),
    (1, ("--experts", "3", "--active", "4"), "cannot choose --active 4 of --experts 3: use at most 3"),
    (1, ("--balance", "loss"), "--balance does nothing without --experts or --model: leave --balance out"),
    (
        4,
        ("--mesh", "cp=4,tp=1", "--context", "ulysses", "--heads", "2"),
        "cannot cut 2 heads of a rank over cp=4",
    ),
    (2, ("--mesh", "pp=2", "--layers", "1"), "cannot put 1 layers on 2 stages: give --layers, 0 for stages without blocks"),
    (2, ("--mesh", "pp=2", "--layers", "1,1,1"), "--layers 1,1,1 is for 3 stages, 1f1b on pp=2 has 2: give so many"),
    (1, ("--layers", "1,-1"), "argument --layers: '1,-1' is no number of layers: use for instance 8, or 3,3,2,0"),
    (1, ("--chunks", "2"), "1f1b has 1 chunk a rank, got 2: use interleaved"),
    (2, ("--mesh", "pp=2", "--schedule", "dualpipe-v"), "dualpipe-v needs 4 micro-batches for pp=2, got 1: use zb-v"),
    (1, ("--mesh", "xp=2"), "argument --mesh: 'xp=2' is no axis of a mesh: use for instance dp=2,tp=2"),
    (1, ("--text", "/no/such/file"), "--text /no/such/file: No such file or directory"),
    (1, ("--heads", "5"), "--heads 5 does not divide --d-model 16: use a divisor of 16"),
    (1, ("--batch-tokens", "100"), "--batch-tokens 100 is not a multiple of --sequence-length 24: use 96"),
    (3, ("--batch-tokens", "48"), "cannot deal 2 sequences to dp=3 ranks in 1 micro-batches: use --batch-tokens 72"),
    (1, ("--resume",), "--resume does nothing without --checkpoint: leave --resume out"),
    (1, ("--lr", "-1"), "argument --lr: '-1' is not an amount: use a number of 0 or more"),
    (1, ("--family", "gpt2"), "--family gpt2 has as many kv-heads as heads, not 2: leave --kv-heads out"),
]


@pytest.mark.parametrize(
    ("ranks", "args", "message"), [pytest.param(*case, marks=pytest.mark.mpi(min_size=case[0])) for case in BAD]
)
def test_bad_input_is_one_line_and_status_two(comm, text, ranks, args, message):
    # One that says how many ranks there are is said by so many, the others by all that are there.
    assert message in inside(comm, "train", *QUICK, "--text", text, *args, status=2, ranks=ranks if ranks > 1 else None)


@on_ranks
@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"short", "the last tenth of them")])
def test_too_little_text_is_refused(comm, tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert message in inside(comm, "train", *QUICK, "--text", path, status=2)


DP = {1: ("--family", "gpt2"), 3: ("--zero", "--micro-batches", "2"), 4: ("--dtype", "float64", "--recompute")}


@on_ranks
def test_dp_train_agrees_with_the_reference_and_with_one_process(comm):
    for options in thinned(DP.values(), [DP.get(comm.size, DP[3])]):
        got = inside(comm, "dp_train", "--json", *options)
        assert got["ok"]
        assert len(got["loss"]) == 5
        assert got["loss"][-1] < got["loss"][0]
        kinds = {c["tensor"].split(",")[-1] for c in got["checks"]}
        assert kinds >= {" all", " step 5"}
        if "float64" in options:
            assert max(c["relative_error"] for c in got["checks"]) < 1e-10
        if comm.size in (2, 4):
            assert len(set(got["tokens_per_rank"])) > 1


@pytest.mark.mpi(min_size=3)
def test_dp_train_refuses_what_it_cannot_deal_out(comm):
    refused = inside(comm, "dp_train", "--sequences", "2", status=2, ranks=3)
    assert refused == "error: cannot deal --sequences 2 to 3 ranks in 1 micro-batches: use 3 or more"


@pytest.mark.mpi(min_size=2, max_size=3)
def test_bench_measures_what_a_step_holds_with_rows_whole_and_cut(comm):
    sizes = ("--tokens", "288", "--sequence-length", "48", "--d-model", "48", "--d-ff", "96", "--heads", "4", "--layers", "2")
    bench = inside(comm, "bench.__main__", "train", *sizes, "--rounds", "1", "--sequence-parallel", "--json")
    whole, cut = bench["memory"]["sharded_tp"], bench["memory"]["rows_tp"]
    for key in ("kept_bytes_per_rank", "peak_bytes_per_rank"):
        assert [c < w for c, w in zip(cut[key], whole[key], strict=True)] == [True] * comm.size
    for held in (whole, cut):
        assert all(p > k for p, k in zip(held["peak_bytes_per_rank"], held["kept_bytes_per_rank"], strict=True))
