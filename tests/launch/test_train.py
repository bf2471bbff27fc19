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

from tests.harness import ROOT, launcher_free, mpirun
from tests.launch.test_start import alive

TRAIN = ("-m", "launch.train")
# Small enough for a step in some ms. 5 sequences: unequal parts.
QUICK = ("--layers", "2", "--d-model", "16", "--heads", "4", "--kv-heads", "2", "--d-ff", "22", "--sequence-length", "24")
QUICK += ("--batch-tokens", "120", "--steps", "12", "--warmup", "2", "--sample", "9", "--dtype", "float64", "--json")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text whose validation part is short, so that validating takes no time."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes((ROOT / "README.md").read_bytes()[:6000])
    return path


def train(ranks, folder, text, *args, status=0):
    done = mpirun(ranks, *TRAIN, *QUICK, "--text", str(text), "--output", str(folder / "out"), *args, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout) if not status else done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The same run, never interrupted, on one process."""
    return train(0, tmp_path_factory.mktemp("whole"), text)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, ("--mesh", "dp=2,tp=2", "--zero", "--micro-batches", "2")),
        (3, ("--mesh", "tp=3", "--recompute")),
        (2, ("--overlap", "off", "--bucket-mib", "0.001")),
    ],
)
def test_the_same_losses_on_every_mesh(tmp_path, text, whole, ranks, options):
    got = train(ranks, tmp_path, text, *options)
    assert got["ok"]
    np.testing.assert_allclose(got["loss"], whole["loss"], rtol=0, atol=1e-10)
    assert got["validation_bits_per_byte"] == pytest.approx(whole["validation_bits_per_byte"], abs=1e-10)
    assert got["sample"] == whole["sample"]
    assert len(got["memory"]["weights_bytes_per_rank"]) == ranks
    if "--zero" in options:
        assert max(got["memory"]["optimizer_bytes_per_rank"]) < 0.6 * max(got["memory"]["weights_bytes_per_rank"]) * 2
    if "--recompute" in options:
        assert max(got["memory"]["saved_bytes_per_rank"]) < 0.5 * whole["memory"]["saved_bytes_per_rank"][0]


def test_curve_and_report_are_written(tmp_path, text, whole):
    done = mpirun(2, *TRAIN, *QUICK[:-1], "--text", str(text), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "all agreed"
    with open(tmp_path / "out" / "loss.csv") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose([float(r["loss_nats"]) for r in rows], whole["loss"], rtol=0, atol=1e-10)
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_killed_at_any_step_and_taken_up_on_other_meshes(tmp_path, text, whole):
    """kill -9 of one rank, three times, each time resumed on another mesh: as if nothing had happened."""
    folder = tmp_path / "kept"
    meshes = [(4, "dp=2,tp=2"), (2, "tp=2"), (3, "dp=3"), (1, "dp=1")]
    random = np.random.default_rng(0)
    for n, (ranks, mesh) in enumerate(meshes[:-1]):
        command = [*QUICK, "--text", str(text), "--output", str(tmp_path / "out"), "--mesh", mesh, "--save-every", "1"]
        command += ["--checkpoint", str(folder), *(["--resume"] if n else []), *(["--zero"] if n != 1 else [])]
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks), sys.executable, *TRAIN, *command],
            cwd=ROOT,
            env=launcher_free(dict(os.environ)),
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
    ranks, mesh = meshes[-1]
    got = train(ranks, tmp_path, text, "--checkpoint", str(folder), "--resume", "--mesh", mesh)
    assert 1 < got["first_step"] <= 12
    np.testing.assert_allclose(got["loss"], whole["loss"][got["first_step"] - 1 :], rtol=0, atol=1e-10)
    with open(tmp_path / "out" / "loss.csv") as file:
        every = [float(r["loss_nats"]) for r in csv.DictReader(file)]
    np.testing.assert_allclose(every, whole["loss"], rtol=0, atol=1e-10)
    assert got["validation_bits_per_byte"] == pytest.approx(whole["validation_bits_per_byte"], abs=1e-10)


def test_what_cannot_be_resumed_is_refused(tmp_path, text):
    folder = tmp_path / "kept"
    assert "holds no checkpoint to resume" in train(2, tmp_path, text, "--checkpoint", str(folder), "--resume", status=2)
    train(2, tmp_path, text, "--checkpoint", str(folder))
    refused = train(2, tmp_path, text, "--checkpoint", str(folder), status=2)
    assert "holds step-00000012: use --resume, or another folder" in refused
    refused = train(2, tmp_path, text, "--checkpoint", str(folder), "--resume", "--layers", "3", status=2)
    assert "the checkpoint has layers 2, this run 3" in refused
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes()[::-1])
    refused = train(2, tmp_path, other, "--checkpoint", str(folder), "--resume", status=2)
    assert "was made from another text" in refused
    shard = next(folder.glob("step-*/rank-0001*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 4
    shard.write_bytes(data)
    refused = train(3, tmp_path, text, "--checkpoint", str(folder), "--resume", status=2)
    errors = [line for line in refused.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert shard.name in errors[0]
    assert "Traceback" not in refused


@pytest.mark.parametrize(
    ("ranks", "args", "message"),
    [
        (3, ("--mesh", "dp=2,tp=2"), "--mesh dp=2,tp=2 is for 4 ranks, these are 3: use for instance dp=3,tp=1"),
        (4, ("--mesh", "tp=2"), "--mesh dp=1,tp=2 is for 2 ranks, these are 4: use for instance dp=2,tp=2"),
        (0, ("--mesh", "pp=2"), "argument --mesh: 'pp=2' is no axis of a mesh: use for instance dp=2,tp=2"),
        (0, ("--text", "/no/such/file"), "--text /no/such/file: No such file or directory"),
        (0, ("--heads", "5"), "--heads 5 does not divide --d-model 16: use a divisor of 16"),
        (0, ("--batch-tokens", "100"), "--batch-tokens 100 is not a multiple of --sequence-length 24: use 96"),
        (3, ("--batch-tokens", "48"), "cannot deal 2 sequences to dp=3 ranks in 1 micro-batches: use --batch-tokens 72"),
        (0, ("--resume",), "--resume needs to know from where: use --checkpoint DIR"),
        (0, ("--lr", "-1"), "argument --lr: '-1' is not an amount: use a number of 0 or more"),
        (0, ("--family", "gpt2"), "--family gpt2 has as many kv-heads as heads, not 2: leave --kv-heads out"),
    ],
)
def test_bad_input_is_one_line_and_status_two(text, ranks, args, message):
    done = mpirun(ranks, *TRAIN, *QUICK, "--text", str(text), *args)
    assert (done.returncode, done.stdout) == (2, "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"short", "the last tenth of them")])
def test_too_little_text_is_refused(tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    done = mpirun(2, *TRAIN, *QUICK, "--text", str(path))
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(0, ("--family", "gpt2")), (3, ("--zero", "--micro-batches", "2")), (4, ("--dtype", "float64", "--recompute"))],
)
def test_dp_train_agrees_with_the_reference_and_with_one_process(ranks, options):
    done = mpirun(ranks, "-m", "launch.dp_train", "--json", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    got = json.loads(done.stdout)
    assert got["ok"]
    assert len(got["loss"]) == 5
    assert got["loss"][-1] < got["loss"][0]
    kinds = {c["tensor"].split(",")[-1] for c in got["checks"]}
    assert kinds >= {" all", " step 5"}
    if "float64" in options:
        assert max(c["relative_error"] for c in got["checks"]) < 1e-10
    if ranks == 4:
        assert len(set(got["tokens_per_rank"])) > 1


def test_dp_train_refuses_what_it_cannot_deal_out():
    done = mpirun(3, "-m", "launch.dp_train", "--sequences", "2")
    assert done.returncode == 2
    assert "error: cannot deal --sequences 2 to 3 ranks in 1 micro-batches: use 3 or more" in done.stderr
