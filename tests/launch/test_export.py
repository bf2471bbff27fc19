"""launch.export, launch.train --model and runs that go on beyond their end."""

import json

import numpy as np
import pytest

from launch.process import launcher
from tests.grids import at, thinned
from tests.inside import inside, ran
from tests.launch.serving import tiny_model

pytestmark = [pytest.mark.mpi, at(1, 3)]
TEXT = "abc ast bats cast tabs sat cab a\n" * 60
QUICK = ("--sequence-length", 24, "--batch-tokens", 120, "--sample", 5, "--json")
SMALL = ("--layers", 2, "--d-model", 16, "--heads", 4, "--d-ff", 22, "--dtype", "float64")


@pytest.fixture
def text(comm, shared):
    if comm.rank == 0:
        (shared / "text").write_text(TEXT)
    comm.Barrier()
    return shared / "text"


def train(comm, shared, text, *options, status=0):
    fixed = (*QUICK, "--text", text, "--output", shared / "out", "--checkpoint", shared / "kept")
    return inside(comm, "train", *fixed, *options, status=status)


KINDS = [(), ("--tied",), ("--experts", "4"), ("--family", "gpt2")]


@pytest.mark.parametrize("kind", thinned(KINDS, KINDS[(launcher.size() or 1) // 2 :: 2]), ids=" ".join)
def test_what_was_trained_is_scored_the_same_where_it_is_exported(comm, shared, text, kind):
    """Bits a byte of the validation text, which the trainer and score reach by different ways."""
    heads = () if "gpt2" in kind else ("--kv-heads", 2)
    got = train(comm, shared, text, *SMALL, *heads, *kind, "--mesh", f"tp={comm.size}", "--steps", 6, "--warmup", 1)
    done = inside(comm, "export", shared / "kept", shared / "published", "--json")
    assert done["step"] == 6
    assert done["parameters"] == got["parameters"]
    assert set(done["files"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    data = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int64)
    held_out = data[int(0.9 * len(data)) :]
    count = (len(held_out) - 1) // 24
    ids = held_out[np.arange(count)[:, None] * 24 + np.arange(25)]
    if comm.rank == 0:
        np.save(shared / "ids.npy", ids[:, :24])
    comm.Barrier()
    files = ("--tokens-file", shared / "ids.npy", "--logits", shared / "z.npy")
    inside(comm, "score", "--model", shared / "published", *files, "--dtype", "float64", "--json")
    z = np.load(shared / "z.npy")
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    bits = -np.take_along_axis(log_p, ids[:, 1:, None], axis=2).mean() / np.log(2)
    assert bits == pytest.approx(got["validation_bits_per_byte"], rel=1e-12)
    said = inside(comm, "generate", "--model", shared / "published", "--prompt", "abc", "--max-new-tokens", 4, "--json")
    assert (said["prompt_tokens"], len(said["tokens"])) == ([97, 98, 99], 4)


def test_training_begins_from_a_published_model_and_its_tokens(comm, shared, text):
    if comm.rank == 0:
        (shared / "tiny").mkdir()
        tiny_model(shared / "tiny")
    comm.Barrier()
    begun = ("--model", shared / "tiny", "--lr", 0.01, "--warmup", 1, "--mesh", f"tp={comm.size}", "--dtype", "float64")
    got = train(comm, shared, text, *begun, "--steps", 1)
    # The first loss is that of the published weights, on sequences of the text's tokens.
    assert got["config"]["family"] == "llama"
    assert got["config"]["model"] == "tiny"
    again = train(comm, shared, text, *begun, "--steps", 10, "--resume")
    assert again["first_step"] == 2
    assert again["loss"][-1] < got["loss"][0]
    inside(comm, "export", shared / "kept", shared / "published", "--json")
    files = {f.name: f.read_bytes() for f in (shared / "published").iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert files[name] == (shared / "tiny" / name).read_bytes()
    ids = ("--tokens", "4,5,6,7,5,4,8", "--dtype", "float64", "--json")
    before, after = (inside(comm, "score", "--model", shared / name, *ids)["loss"] for name in ("tiny", "published"))
    assert before != after
    for option, wrong in (("--d-model", 8), ("--family", "gpt2"), ("--tied", None)):
        given = (option,) if wrong is None else (option, wrong)
        assert f"{option} does nothing with --model" in train(comm, shared, text, *begun, *given, status=2)
    said = train(comm, shared, text, *begun, "--layers", 3, "--resume", status=2)
    assert "has 2 layers: use counts of that sum" in said
    said = train(comm, shared, text, *begun[:2], "--sequence-length", 1000, "--batch-tokens", 8000, status=2)
    assert "--sequence-length 1000 is beyond the model's context: use at most 512" in said


def test_a_run_goes_on_beyond_its_end_by_the_cosine_to_the_new_one(comm, shared, text):
    options = (*SMALL, "--warmup", 2, "--lr", 0.01, "--mesh", f"tp={comm.size}", "--save-every", 3)
    first = train(comm, shared, text, *options, "--steps", 3)
    done = ran(
        comm,
        "train",
        *(*QUICK, "--text", text, "--output", shared / "out", "--checkpoint", shared / "kept"),
        *(*options, "--steps", 8, "--resume"),
    )
    assert done.status == 0
    notes = [line for line in done.err.splitlines() if line.startswith("note: ")]
    assert notes == ["note: the run was to end at step 3: its learning rate goes on by the cosine that ends at step 8"]
    assert len(json.loads(done.out)["loss"]) == 5
    assert len(first["loss"]) == 3
    assert "the checkpoint has steps 8, this run 7" in train(comm, shared, text, *options, "--steps", 7, "--resume", status=2)


def test_what_cannot_be_exported_is_refused(comm, shared, text):
    said = inside(comm, "export", shared / "nowhere", shared / "p", status=2)
    assert "nowhere: no such folder: give what launch.train --checkpoint names" in said
    assert "holds no checkpoint" in inside(comm, "export", shared, shared / "p", status=2)
    train(comm, shared, text, *SMALL, "--experts", 4, "--shared", 1, "--steps", 1, "--mesh", f"tp={comm.size}")
    said = inside(comm, "export", shared / "kept", shared / "p", status=2)
    assert "cannot be exported: its layers are those of no published family that is written" in said
    assert not (shared / "p").exists()
    assert "is not empty: give a new folder" in inside(comm, "export", shared / "kept", shared / "kept", status=2)
