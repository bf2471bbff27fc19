"""Biases, penalties and ends that may not come yet: Transformers' numbers, and the same tokens in any company."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from inference.engine import Ask, Engine
from inference.penalties import NONE, Penalties
from inference.sampling import Sampling, gumbel
from inference.scheduler import Scheduler
from parallel.shard import even
from tests.grids import thinned
from tests.harness import ROOT
from tests.inference.small import V, full_logits, model_of
from tests.inference.test_engine import together

pytestmark = pytest.mark.mpi
ORACLES = np.load(ROOT / "tests/oracles/processors.npz")
CASES = sum(key.startswith("prompt_") for key in ORACLES)


def case(i):
    """Penalties, prompt, answer, ends and the right row."""
    repetition, fewest = ORACLES[f"numbers_{i}"]
    ids, values = ORACLES[f"bias_{i}"]
    bias = tuple(zip(ids.astype(int).tolist(), values.tolist(), strict=True))
    so_far = (ORACLES[f"{name}_{i}"].tolist() for name in ("prompt", "answer", "ends"))
    return Penalties(float(repetition), min_tokens=int(fewest), bias=bias), *so_far, ORACLES[f"z_{i}"]


def changed(mesh, penalties, prompt, answer, ends):
    """The whole row, each rank having changed its part."""
    z_V = ORACLES["z"]
    cut = even(len(z_V), mesh.tp.size)
    first, _ = cut.bounds[mesh.tp.rank]
    mine = penalties.applied(cut.take(z_V, 0, mesh.tp.rank), first, prompt, answer, ends)
    return mesh.tp.all_gather(mine, 0, cut)


def test_rows_are_those_of_transformers_processors(mesh):
    for i in range(CASES):
        penalties, prompt, answer, ends, want = case(i)
        np.testing.assert_allclose(changed(mesh, penalties, prompt, answer, ends), want, rtol=0, atol=1e-12, err_msg=str(i))
    assert CASES == 40


def test_presence_and_frequency_are_openais_formula(mesh):
    """https://platform.openai.com/docs/api-reference: mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence."""
    for i in range(0, CASES, 4):
        _, prompt, answer, ends, _ = case(i)
        got = changed(mesh, Penalties(presence=0.7, frequency=-0.3), prompt, answer, ends)
        counts = Counter(answer)
        want = [z - counts[j] * -0.3 - float(counts[j] > 0) * 0.7 for j, z in enumerate(ORACLES["z"])]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_nothing_is_changed_without(mesh):
    assert not NONE
    assert not Penalties(bias=())
    assert Penalties(min_tokens=1)
    np.testing.assert_array_equal(changed(mesh, NONE, [1, 2], [3], [4]), ORACLES["z"])
    with pytest.raises(ValueError, match=r"repetition penalty 0 must be above 0"):
        Penalties(0)


def textbook(kind, ask):
    """The tokens of one request, chosen on whole rows of logits without a cache."""
    p, answer = ask.penalties, []
    while len(answer) < ask.max_tokens and not (answer and answer[-1] in ask.ends):
        z = full_logits(kind, ask.prompt + answer)[-1].astype(np.float64)
        for i, bias in p.bias:
            z[i] += bias
        if len(answer) < p.min_tokens:
            z[list(ask.ends)] = -np.inf
        for i in {*ask.prompt, *answer}:
            z[i] = z[i] * p.repetition if z[i] <= 0 else z[i] / p.repetition
        for i, n in Counter(answer).items():
            z[i] -= p.frequency * n + p.presence
        if ask.sampling.temperature:
            z = z / ask.sampling.temperature + gumbel(ask.sampling.seed, ask.stream, len(ask.prompt) + len(answer), 0, V)
        answer.append(int(z.argmax()))
    return answer


def asks():
    random = Random(5)
    made = []
    for n in range(8):
        prompt = ([random.randrange(V) for _ in range(random.randint(2, 6))] * 6)[: random.randint(3, 13)]
        penalties = Penalties(
            *random.choice([(1.0, 0.0, 0.0), (1.4, 0.0, 0.0), (1.0, 0.8, 0.4), (0.8, -0.5, 0.1)]),
            min_tokens=random.choice([0, 7]),
            bias=random.choice([(), ((random.randrange(V), 2.5), (random.randrange(V), -100.0))]),
        )
        sampling = Sampling(random.choice([0.0, 0.0, 0.9]), seed=n)
        made.append(Ask(prompt, 24, sampling, n, frozenset(random.sample(range(V), 3)), 0, penalties=penalties))
    assert sum(bool(a.penalties) for a in made) >= 6
    return made


@pytest.mark.parametrize("speculate", thinned([False, True], [True]))
def test_tokens_are_the_same_alone_and_in_company(mesh, control, speculate):
    """With drafts, and in so few blocks that requests are preempted: those of the formulas on whole rows."""
    asked = asks()
    want = [textbook("llama", ask) for ask in asked] if control.rank == 0 else None
    model, scheduler = model_of("llama", mesh), Scheduler(4, slots=6, max_batch_tokens=40)
    done = together(model, mesh, control, scheduler, asked, speculate)
    alone = together(model, mesh, control, Scheduler(), [asked[1]], speculate)
    if control.rank == 0:
        got = [done[0][n] for n in range(len(asked))]
        assert got == want
        assert alone[0][0] == got[1]
        assert scheduler.counts.preemptions > 0
        assert (scheduler.counts.draft_tokens > 0) == speculate
        # What is told is how likely the model itself finds a token.
        z = full_logits("llama", asked[1].prompt)[-1]
        assert done[1][1][0].logprob == pytest.approx(z[got[1][0]] - np.log(np.exp(z).sum()), abs=1e-11)


@pytest.mark.mpi(max_size=1)
def test_penalties_matter():
    """That the comparison can fail: without them the tokens are others."""
    asked = [ask for ask in asks() if ask.penalties]
    assert sum(textbook("llama", ask) != textbook("llama", ask._replace(penalties=NONE)) for ask in asked) >= len(asked) - 2


def test_log_probabilities_of_prompts(mesh, control):
    """In chunks, preempted, from a prompt that others have run, and without a new token."""
    random = Random(2)
    prompts = [[random.randrange(V) for _ in range(n)] for n in (1, 2, 33, 40, 17)]
    prompts.append(prompts[3])
    asked = [Ask(p, 14 if n % 2 else 0, Sampling(), prompt_logprobs=3 if n else 0) for n, p in enumerate(prompts)]
    asked += [Ask([n, 3, 4], 40) for n in range(4)]
    scheduler, told, lengths = Scheduler(6, slots=6, max_batch_tokens=13), {}, Counter()
    engine = Engine(model_of("gpt2", mesh), mesh, control, scheduler)
    if control.rank:
        engine.follow()
        return
    for n, ask in enumerate(asked):
        engine.add(n, ask)
    while report := engine.step():
        for delivery in report.deliveries:
            lengths[delivery.id] += len(delivery.tokens)
            if delivery.prompt:
                assert delivery.id not in told
                told[delivery.id] = delivery.prompt
    engine.stop()
    assert scheduler.counts.preemptions > 0
    assert [lengths[n] for n in range(len(asked))] == [ask.max_tokens for ask in asked]
    for n, prompt in enumerate(prompts):
        z = full_logits("gpt2", prompt)
        log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        assert [t.id for t in told.get(n, [])] == prompt[1:]
        for at, token in enumerate(told.get(n, []), 1):
            assert token.logprob == pytest.approx(log_p[at - 1, token.id], abs=1e-11)
            assert [i for i, _ in token.top] == np.argsort(-log_p[at - 1])[:3].tolist()
