"""launch.score and launch.generate, on tiny models of every family with Transformers' own results."""

import numpy as np
import pytest

import models.default
from inference.generate import Generator, make_cache
from inference.sampling import Sampling
from launch import start
from models.build import build
from models.open import open_model
from parallel.mesh import Mesh
from tests.grids import thinned
from tests.harness import ROOT, command
from tests.inside import inside
from tests.launch.serving import tiny_model

FAMILIES = ROOT / "tests/oracles/families"
NAMES = sorted(p.parent.name for p in FAMILIES.glob("*/expected.npz"))
on_ranks = pytest.mark.mpi


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


def expected_of(name):
    return np.load(FAMILIES / name / "expected.npz")


@on_ranks
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(mesh, name):
    expected, source = expected_of(name), open_model(FAMILIES / name)
    model = build(source.config, mesh.tp, source.weights("float64"))
    kinds = [("contiguous", False, None), ("paged", False, 2)] + [("paged", True, 3)] * (source.config.latent is not None)
    # One on each number of ranks, where one of the models with latents stripes them.
    for cache, striped, chunk in thinned(kinds, [kinds[(NAMES.index(name) + mesh.tp.size) % len(kinds)]]):
        generator = Generator(model, mesh, make_cache(model, cache, striped))
        steps = generator.tokens(expected["prompt"].tolist(), Sampling(), len(expected["greedy"]), chunk=chunk)
        assert [s.token for s in steps] == expected["greedy"].tolist()


@on_ranks
@pytest.mark.parametrize("name", ["gpt2", "llama-tied-odd", "mixtral", "deepseek_v3"])
def test_score_gives_transformers_loss_logits_and_gradients(comm, shared, name):
    expected = expected_of(name)
    if comm.rank == 0:
        np.save(shared / "ids.npy", expected["ids"])
    comm.Barrier()
    mesh = {1: (), 2: ("--mesh", "tp=1,dp=2"), 3: ("--mesh", "tp=3"), 4: ("--mesh", "tp=2,dp=2")}[comm.size]
    files = ["--logits", shared / "z.npy", "--gradients", shared / "g.npz"]
    what = ["--model", FAMILIES / name, "--tokens-file", shared / "ids.npy", "--dtype", "float64", "--json"]
    got = inside(comm, "score", *what, *files, *mesh)
    assert got["ok"]
    assert got["loss"] == pytest.approx(float(expected["loss"]), rel=1e-12)
    assert got["perplexity"] == pytest.approx(np.exp(float(expected["loss"])), rel=1e-11)
    assert got["bits_per_byte"] is None
    np.testing.assert_allclose(np.load(shared / "z.npy"), expected["logits"], rtol=0, atol=1e-11)
    with np.load(shared / "g.npz") as gradients:
        assert {f"grad.{key}" for key in gradients} == {key for key in expected if key.startswith("grad.")}
        for key, g in gradients.items():
            want = expected[f"grad.{key}"]
            np.testing.assert_allclose(g, want, rtol=0, atol=1e-10 * max(1, abs(want).max()), err_msg=key)
    assert len(got["memory"]["peak_bytes_per_rank"]) == comm.size


def asked(name):
    prompt = ",".join(map(str, expected_of(name)["prompt"]))
    return ("--model", FAMILIES / name, "--tokens", prompt, "--dtype", "float64", "--json", "--max-new-tokens", "20")


# By turns, on 3, 4 (and 1) and 2 ranks.
TOKENLESS = ["qwen3", "llama-tied-odd", "deepseek_v2"]


@on_ranks
@pytest.mark.parametrize("name", thinned(TOKENLESS, [TOKENLESS[start.begin().size % 3]]))
def test_generate_from_token_ids_without_a_tokenizer(comm, name):
    striped = ["--mla-cache", "striped"] if name == "deepseek_v2" else []
    got = inside(comm, "generate", *asked(name), "--cache", "paged", *striped)
    assert got["ok"]
    assert got["tokens"] == expected_of(name)["greedy"][:20].tolist()
    assert got["text"] is None
    assert got["kv_bytes_per_token_per_rank_counted"] == pytest.approx(got["kv_bytes_per_token_per_rank"], rel=0.05)
    assert {r["phase"] for r in got["communication"]} == {"prefill", "decode"}
    assert all(r["message_bytes"] == r["predicted_message_bytes"] for r in got["communication"])
    if striped:
        replicated, striped = got["latent_layouts"]
        assert replicated["kv_bytes_per_token_per_rank"] == comm.size * striped["kv_bytes_per_token_per_rank"]
        assert comm.size == 1 or striped["mpi_bytes_per_token"] > replicated["mpi_bytes_per_token"]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", thinned(TOKENLESS, ["llama-tied-odd"]))
def test_drawn_tokens_are_those_of_one_rank(comm, name):
    warm = ("--temperature", "0.9", "--top-p", "0.9", "--seed", "4", "--logprobs")
    alone, sampled = (inside(comm, "generate", *asked(name), *warm, ranks=n) for n in (1, comm.size))
    assert sampled["tokens"] == alone["tokens"] != expected_of(name)["greedy"][:20].tolist()
    np.testing.assert_allclose(sampled["logprobs"], alone["logprobs"], atol=1e-10)


LLAMA = ("--model", str(FAMILIES / "llama"))


@on_ranks
@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("generate", (*LLAMA, "--tokens", "1,17"), "token id 17 is outside of the vocabulary: use 0 to 16"),
        ("generate", (*LLAMA, "--tokens", "1,x"), "argument --tokens: '1,x' is no list of token ids"),
        ("generate", (*LLAMA, "--prompt", "hello"), "has no tokenizer: give token ids with --tokens"),
        ("generate", (*LLAMA, "--tokens", "1", "--max-new-tokens", "9999"), "is beyond the model's context of"),
        (
            "generate",
            (*LLAMA, "--tokens", "1", "--temperature", "1", "--top-p", "1.5"),
            "top_p 1.5 must be from 0 to 1",
        ),
        ("generate", (*LLAMA, "--tokens", "1", "--mla-cache", "striped"), "--mla-cache striped is for latent attention"),
        ("generate", (*LLAMA, "--tokens", "1", "--stop", "x"), "--stop needs a tokenizer"),
        ("generate", ("--model", "/no/such", "--tokens", "1"), "/no/such: no such file or folder"),
        ("generate", ("--model", ROOT / "docs", "--tokens", "1"), "no config.json and no .gguf file"),
        ("score", (*LLAMA, "--tokens", "5"), "1 token predicts nothing that could be scored: use 2 or more"),
        ("score", (*LLAMA, "--tokens", "5,6", "--mesh", "dp=5"), "--mesh dp=5,tp=1 is for 5 ranks, these are"),
        ("score", (*LLAMA, "--tokens-file", "/no/f.npy"), "--tokens-file /no/f.npy"),
        (
            "score",
            (*LLAMA, "--tokens", "5,6", "--logits", "/no/z.npy"),
            "cannot write --logits /no/z.npy: there is no folder",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_two(comm, command, args, message):
    assert message in inside(comm, command, *args, status=2)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("mesh", "message"),
    [("dp=2", "cannot deal 1 sequence to dp=2"), ("dp=3", "--mesh dp=3,tp=1 is for 3 ranks, these are 2")],
)
def test_a_mesh_that_does_not_fit_is_refused(comm, mesh, message):
    assert message in inside(comm, "score", *LLAMA, "--tokens", "5,6", "--mesh", mesh, status=2, ranks=2)


def test_more_ranks_than_heads_are_refused():
    refused = command("generate", 7, *LLAMA, "--tokens", "1", status=2)
    assert "cannot cut the model's 6 heads over tp=7: use at most 6 ranks" in refused


@on_ranks
def test_a_truncated_file_is_refused(comm, shared):
    if comm.rank == 0:
        for file in (FAMILIES / "llama").iterdir():
            data = file.read_bytes()
            (shared / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    comm.Barrier()
    assert "model.safetensors" in inside(comm, "generate", "--model", shared, "--tokens", "1", status=2)


@on_ranks
def test_without_the_default_model_its_command_is_named(comm, monkeypatch):
    monkeypatch.setattr(models.default, "find_spec", lambda *_: None)
    assert "make models" in inside(comm, "generate", "--tokens", "1", status=2)


@on_ranks
def test_control_tokens_in_a_text_are_read_as_the_options_say(comm, shared):
    if comm.rank == 0:
        tiny_model(shared)
    comm.Barrier()
    what = ("--model", shared, "--max-new-tokens", "1", "--json", "--dtype", "float64")
    for more, ids in (((), [2, 0, 3]), (("--no-parse-special",), None)):
        got = inside(comm, "generate", *what, "--prompt", "a<|im_end|>b", *more)["prompt_tokens"]
        assert got == ids if ids else 0 not in got
        scored = inside(comm, "score", "--model", shared, "--text", "a<|im_end|>b", "--json", *more)
        assert scored["tokens"] == len(got)
    # A conversation by the model's template; what is typed in it ends no turn.
    chat = inside(comm, "generate", *what, "--chat", "a<|im_end|>")["prompt_tokens"]
    assert (chat.count(0), chat.count(1)) == (1, 2)
