"""What a model's makers want, and a draft of the same tokens, as commands take them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.grids import at
from tests.harness import ROOT
from tests.inside import inside, ran
from tests.launch.serving import TOKENS, tiny_model

CASE = ROOT / "tests/cases/models/yarn-beyond"
pytestmark = [pytest.mark.mpi, at(1, 3)]
ASKED = ["--tokens", "83,62,63,77", "--max-new-tokens", 12, "--json"]


@pytest.fixture
def folder(comm, shared):
    """The model of the case, with other wishes, on every rank."""
    path = shared / "model"
    if comm.rank == 0:
        path.mkdir()
        for file in ("config.json", "model.safetensors"):
            (path / file).write_bytes((CASE / file).read_bytes())
        wishes = {"do_sample": True, "temperature": 0.7, "top_k": 5, "eos_token_id": [2, 20]}
        (path / "generation_config.json").write_text(json.dumps(wishes))
    comm.Barrier()
    return path


def test_sampling_that_the_makers_want_holds_unless_an_option_says_otherwise(comm, folder):
    asked = ["--model", folder, *ASKED, "--ignore-eos", "--seed", 7]
    said = inside(comm, "generate", *asked, "--temperature", 0.7, "--top-k", 5)
    unsaid = inside(comm, "generate", *asked)
    assert unsaid["tokens"] == said["tokens"]
    assert len(unsaid["notes"]) == 1
    assert "asks for temperature 0.7, top_k 5, which holds where no option says otherwise" in unsaid["notes"][0]
    greedy = inside(comm, "generate", *asked, "--temperature", 0)
    assert greedy["notes"] == []
    assert greedy["tokens"] == inside(comm, "generate", *asked, "--top-k", 1)["tokens"] != said["tokens"]
    assert greedy["tokens"] == inside(comm, "generate", "--model", CASE, *asked[2:])["tokens"]
    error = inside(comm, "generate", *asked, "--temperature", 0, "--top-p", 0.5, status=2)
    assert "--top-p does nothing without --temperature: leave it out, or give one" in error


def test_each_token_that_ends_a_text_does(comm, folder):
    got = inside(comm, "generate", "--model", folder, *ASKED, "--temperature", 0)
    assert got["tokens"][-1] in (2, 20)
    assert got["finish_reason"] == "end token"


def rounded(comm, shared, name, rows, tokens=TOKENS):
    """The tiny model with more rows in its tables."""
    path = shared / name
    if comm.rank == 0:
        path.mkdir()
        tiny_model(path)
        tensors = load_file(path / "model.safetensors")
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            more = np.random.default_rng(rows).standard_normal((rows, 12), "f4")
            tensors[key] = np.concatenate([tensors[key], more])
        save_file(tensors, path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"vocab_size": 17 + rows}))
        if tokens != TOKENS:
            backend = json.loads((path / "tokenizer.json").read_text())
            backend["model"]["vocab"] = {t: i for i, t in enumerate(tokens)}
            (path / "tokenizer.json").write_text(json.dumps(backend))
    comm.Barrier()
    return path


def test_a_draft_of_the_same_tokens_may_have_more_rows(comm, shared):
    target, draft = rounded(comm, shared, "target", 3), rounded(comm, shared, "draft", 7)
    asked = ["--model", target, "--tokens", "4,5,6", "--max-new-tokens", 20, "--ignore-eos", "--dtype", "float64", "--json"]
    plain = inside(comm, "generate", *asked)
    drafted = inside(comm, "generate", *asked, "--draft", draft, "--gamma", 3)
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["speculation"]["drafted"] > 0
    assert inside(comm, "generate", *asked, "--draft", draft, "--temperature", 0.8)["ok"]
    other = rounded(comm, shared, "other", 9, [*TOKENS[:4], TOKENS[5], TOKENS[4], *TOKENS[6:]])
    assert "their tokens are not the same, as 4 is not" in inside(comm, "generate", *asked, "--draft", other, status=2)
    bare = ["--draft", ROOT / "tests/oracles/families/qwen3"]
    assert "without tokenizers nothing shows that" in inside(comm, "generate", *asked, *bare, status=2)


def test_a_tokenizer_that_cannot_be_used_leaves_token_ids(comm, shared):
    path = rounded(comm, shared, "broken", 0)
    if comm.rank == 0:
        (path / "tokenizer.json").write_text("{}")
    comm.Barrier()
    done = ran(comm, "generate", "--model", path, "--tokens", "4,5", "--max-new-tokens", 3, "--json")
    assert done.status == 0
    assert len(json.loads(done.out)["tokens"]) == 3
    assert "note: its tokenizer cannot be used, only token ids: " in done.err
    error = inside(comm, "generate", "--model", path, "--prompt", "a", status=2)
    assert "has no tokenizer: its tokenizer cannot be used, only token ids: " in error
