"""Models made after public reports of wrong answers, and what is right of them; cases/models has a folder for each."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from inference.engine import Ask, Engine
from inference.generate import Generator, make_cache
from inference.sampling import NotFinite, Sampling
from inference.scheduler import Scheduler
from inference.speculation.generator import Speculative
from models.build import build
from models.open import open_model
from parallel.control import Control
from parallel.mesh import Mesh
from tests.grids import at
from tests.harness import ROOT
from tests.inside import inside, ran
from tests.launch.serving import Served, events

CASES = ROOT / "tests/cases/models"
SOUND = ["no-model-prefix", "tied-but-different", "yarn-beyond"]
PROMPT = (83, 62, 63, 77, 38, 38, 8, 89)
pytestmark, on_ranks = at(1, 3), pytest.mark.mpi


def asked(name, count=8):
    tokens = np.load(CASES / name / "oracle.npz")["tokens"][0, :count]
    return ["--model", CASES / name, "--tokens", ",".join(map(str, tokens)), "--json"]


@on_ranks
@pytest.mark.parametrize("name", SOUND)
def test_logits_are_those_of_transformers(comm, shared, name):
    right = np.load(CASES / name / "oracle.npz")
    got = inside(comm, "score", *asked(name, 128), "--dtype", "float64", "--logits", shared / "z.npy")
    # Transformers' tables are float32, and an angle's error grows with the position.
    atol = 2e-6 * (1 + right["tokens"].size / 64)
    np.testing.assert_allclose(np.load(shared / "z.npy"), right["logits"], rtol=0, atol=atol)
    assert len(got["notes"]) == (name == "tied-but-different")


@on_ranks
@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_greedy_tokens_end_where_transformers_ends(comm, name, cache):
    """At the token that config.json names: there is no tokenizer. As far as the oracle goes."""
    right = np.load(CASES / name / "oracle.npz")["greedy"][0].tolist()
    got = inside(comm, "generate", *asked(name), "--max-new-tokens", len(right) - 8, "--dtype", "float64", "--cache", cache)
    assert [*PROMPT, *got["tokens"]] == right
    assert got["finish_reason"] == ("end token" if right[-1] == 2 else "length")


@on_ranks
def test_a_head_that_differs_is_named_in_a_line(comm):
    done = ran(comm, "generate", *asked("tied-but-different"), "--max-new-tokens", 2)
    notes = [line for line in done.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "lm_head.weight is used: it differs from model.embed_tokens.weight, though tie_word_embeddings is true" in notes[0]


# --- numbers that are none


@on_ranks
@pytest.mark.parametrize(
    ("command", "options", "where"),
    [
        ("generate", [], "has no finite logits for position 8 of request 0"),
        ("generate", ["--temperature", 0.8], "has no finite logits for position 8 of request 0"),
        ("generate", ["--temperature", 0.8, "--top-k", 5, "--logprobs"], "has no finite logits for position 8 of request 0"),
        ("generate", ["--temperature", 0.8, "--top-p", 0.9], "has no finite logits for position 8 of request 0"),
        ("generate", ["--temperature", 0.8, "--min-p", 0.1], "has no finite logits for position 8 of request 0"),
        ("score", [], "has a loss that is no finite number, of the token at position 1 of sequence 0"),
    ],
)
def test_a_row_that_is_nan_ends_in_one_error(comm, command, options, where):
    done = ran(comm, command, *asked("nan-row"), *options)
    said = json.loads(done.out, parse_constant=lambda constant: pytest.fail(f"JSON has {constant}"))
    assert done.status == 1
    assert not said["ok"]
    assert where in said["error"]
    assert f"error: {said['error']}" in done.err.splitlines()


def poisoned(folder, row):
    """A sound model, but of one token's row of the table: only who has that token gets NaN."""
    folder.mkdir()
    for file in ("config.json", "generation_config.json"):
        (folder / file).write_bytes((CASES / "no-model-prefix" / file).read_bytes())
    tensors = load_file(CASES / "no-model-prefix/model.safetensors")
    # Untied, so that the head stays sound.
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].copy()
    tensors["embed_tokens.weight"][row] = np.nan
    save_file(tensors, folder / "model.safetensors")
    # Whoever says nothing gets the likeliest token.
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "do_sample": true, "top_k": 1}')
    return folder


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


@on_ranks
@pytest.mark.parametrize("speculate", [False, True])
def test_others_of_the_batch_get_their_tokens(comm, shared, mesh, speculate):
    if comm.rank == 0:
        poisoned(shared / "p", 17)
    control = Control(comm)
    control.wait()
    source = open_model(shared / "p")
    model = build(source.config, mesh.tp, source.weights("float64"))
    prompts = [[83, 62, 63], [8, 17, 9], [77] * 9, [17], [38, 38, 8, 89]]
    asks = [Ask(p, 12, Sampling(0.9 * (n % 2), seed=n), n, top_logprobs=n % 3 or None) for n, p in enumerate(prompts)]
    want = {}
    for n in (0, 2, 4):
        generator = Generator(model, mesh, make_cache(model, "contiguous"))
        want[n] = [g.token for g in generator.tokens(prompts[n], asks[n].sampling, 12, request=n)]
    engine = Engine(model, mesh, control, Scheduler(6, slots=5, max_batch_tokens=32), speculate)
    if comm.rank:
        engine.follow()
        control.close()
        return
    tokens, failed = {n: [] for n in range(5)}, {}
    for n, ask in enumerate(asks):
        engine.add(n, ask)
    while report := engine.step():
        failed |= report.failed
        for delivery in report.deliveries:
            tokens[delivery.id] += [t.id for t in delivery.tokens]
    engine.stop()
    control.close()
    assert tokens == want | {1: [], 3: []}
    assert {id: (error.request, error.position) for id, error in failed.items()} == {1: (1, 3), 3: (3, 1)}
    assert engine.scheduler.counts.finished == {"error": 2, "length": 3}
    assert engine.scheduler.pool.used == 0


@on_ranks
def test_what_a_failed_request_has_computed_is_nobodys(comm, shared, mesh):
    """A good beginning that was computed beside a bad token: who shares it computes it again, and nobody finds it later."""
    if comm.rank == 0:
        poisoned(shared / "p", 17)
    control = Control(comm)
    control.wait()
    source = open_model(shared / "p")
    model = build(source.config, mesh.tp, source.weights("float64"))
    begin = [3 * n + 20 for n in range(20)]
    prompts = [[*begin, 17, *range(30, 49)], [*begin[:16], 9, 8], [*begin[:16], 9, 8, 7]]
    want = [[g.token for g in generated(model, mesh, prompt)] for prompt in prompts[1:]]
    engine = Engine(model, mesh, control, Scheduler(12, slots=2, max_batch_tokens=24))
    if comm.rank:
        engine.follow()
        control.close()
        return
    tokens, failed = {n: [] for n in range(3)}, set()
    for n, prompt in enumerate(prompts):
        engine.add(n, Ask(prompt, 6))
    while report := engine.step():
        failed |= report.failed.keys()
        for delivery in report.deliveries:
            tokens[delivery.id] += [t.id for t in delivery.tokens]
    engine.stop()
    control.close()
    assert failed == {0}
    assert [tokens[1], tokens[2]] == want
    assert engine.scheduler.counts.preemptions == 1
    assert engine.scheduler.counts.hit_tokens > 0
    assert engine.scheduler.pool.used == 0


def generated(model, mesh, prompt):
    return Generator(model, mesh, make_cache(model, "contiguous")).tokens(prompt, Sampling(), 6)


@on_ranks
def test_the_rank_is_named_whose_logits_they_are(comm, mesh):
    """One row of the head: only the rank that has it makes the NaN."""
    source = open_model(CASES / "tied-but-different")
    model = build(source.config, mesh.tp, source.weights("float32"))
    if comm.rank == comm.size - 1:
        model.head.matrix.data[..., -1] = np.nan
    for draft in (None, "ngram", "layers=1"):
        made = (mesh, make_cache(model, "paged"))
        generator = Speculative(model, *made, draft, 4) if draft else Generator(model, *made)
        for hot in (0.0, 0.7):
            with pytest.raises(NotFinite) as error:
                list(generator.tokens(PROMPT, Sampling(hot), 8, request=3))
            assert (error.value.rank, error.value.request, error.value.position) == (comm.size - 1, 3, 8)


def test_a_request_fails_and_the_server_lives_on(tmp_path):
    with_nan = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    server = Served(2, "--model", poisoned(tmp_path / "p", 17), "--served-model-name", "org/poisoned")
    try:
        assert server.name == "org/poisoned"
        right = server.complete([83, 62, 63], **with_nan, return_token_ids=True)["choices"][0]["token_ids"]
        unsaid = server.complete([83, 62, 63], max_tokens=6, ignore_eos=True, return_token_ids=True)
        assert unsaid["choices"][0]["token_ids"] == right
        for fields in ({}, {"temperature": 1.0, "top_k": 4}, {"logprobs": 3}, {"n": 2, "temperature": 1.0}):
            status, text, _ = server.post("/v1/completions", {"prompt": [8, 17, 9], **with_nan, **fields})
            error = json.loads(text, parse_constant=pytest.fail)["error"]
            assert (status, error["code"], error["type"]) == (500, "not_finite", "server_error")
            assert "has no finite logits for position 3 of request" in error["message"]
        status, text, _ = server.post("/v1/completions", {"prompt": [17], **with_nan, "stream": True})
        assert status == 200
        assert "has no finite logits for position 1" in text
        assert "[DONE]" not in text
        again = server.complete([83, 62, 63], **with_nan, return_token_ids=True)
        assert again["choices"][0]["token_ids"] == right
        assert again["model"] == "org/poisoned"
        streamed = {"prompt": [83], **with_nan, "stream": True, "return_token_ids": True}
        came = events(server.post("/v1/completions", streamed)[1])
        assert sum(len(event["choices"][0]["token_ids"]) for event in came) == 6
    finally:
        assert server.stop() == 0
