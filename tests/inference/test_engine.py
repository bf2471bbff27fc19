"""The engine: what a request gets does not depend on who shares its batch, on real models and ranks."""

import pickle
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from inference.engine import Ask, Engine
from inference.generate import Generator, make_cache
from inference.policies import Apart, Static
from inference.pool import BLOCK, Pool
from inference.sampling import Sampling
from inference.scheduler import QueueFull, Scheduler
from launch.measure.acceptance import tie
from launch.process import launcher
from parallel.ledger import agrees
from tests.grids import FULL, every_other, thinned
from tests.inference.small import CONFIGS, V, lone, model_of

pytestmark = pytest.mark.mpi


def asks_of(random, many, repeats=False):
    """Requests of all kinds, some of which begin alike."""
    shared = [random.randrange(V) for _ in range(2 * BLOCK + 3)]
    asks = []
    for _ in range(many):
        begin = shared[: random.choice((0, 0, BLOCK, 2 * BLOCK, 2 * BLOCK + 3))]
        prompt = begin + [random.randrange(V) for _ in range(random.randint(0 if begin else 1, 20))]
        if repeats:
            prompt = (prompt[:7] * 8)[: len(prompt) + 7]
        hot = random.choice((0.0, 0.0, 0.7, 1.5))
        sampling = Sampling(hot, random.choice((0, 5)), random.choice((1.0, 0.9)), seed=random.randrange(3))
        ends = frozenset(random.sample(range(V), random.choice((0, 2))))
        asks.append(Ask(prompt, random.randint(1, 44), sampling, random.randrange(4), ends, random.choice((None, 0, 3))))
    return asks


def alone(kind, ask, dtype="float64"):
    """The request's tokens by itself: on one rank, contiguous, not batched."""
    made = lone(kind, dtype).tokens(ask.prompt, ask.sampling, ask.max_tokens, request=ask.stream, ends=ask.ends)
    return [g.token for g in made]


def together(model, mesh, control, scheduler, asks, speculate=False, at_once=True):
    """{id: tokens}, {id: [Token]}, {id: reason} on rank 0; None on the others."""
    engine = Engine(model, mesh, control, scheduler, speculate)
    if control.rank:
        engine.follow()
        return None
    waiting, tokens, reasons = list(enumerate(asks)), {n: [] for n in range(len(asks))}, {}
    while waiting or scheduler.requests:
        while waiting and (at_once or scheduler.counts.steps >= 2 * waiting[0][0] or not scheduler.requests):
            engine.add(*waiting.pop(0))
        report = engine.step()
        assert report is not None
        for delivery in report.deliveries:
            tokens[delivery.id] += delivery.tokens
            if delivery.reason:
                assert delivery.id not in reasons
                reasons[delivery.id] = delivery.reason
    engine.stop()
    assert engine.step() is None
    assert scheduler.pool.used == 0
    return {n: [t.id for t in ts] for n, ts in tokens.items()}, tokens, reasons


SHAPES = {
    "roomy": {"slots": 6, "max_batch_tokens": 64},
    "small chunks": {"slots": 4, "max_batch_tokens": 7},
    "small pool": {"blocks": 8, "slots": 5, "max_batch_tokens": 16},
    "no sharing": {"blocks": 9, "slots": 5, "max_batch_tokens": 16, "prefix_caching": False},
    "one by one": {"slots": 1, "max_batch_tokens": 64},
    "static": {"slots": 4, "max_batch_tokens": 32},
    "apart": {"slots": 4, "max_batch_tokens": 32},
}


def shapes_of(kind, speculate, ranks):
    """Every other shape, so that each meets each kind of model and drafts or none, and these each other. What is about
    schedules alone is not run again on several ranks: rank 0 decides."""
    shapes = list(SHAPES) if ranks == 1 or FULL else ["roomy", "small pool"]
    return thinned(shapes, shapes[(list(CONFIGS).index(kind) + speculate) % 2 :: 2])


# On one rank all of them, as only there every shape is run.
GRID = [(kind, speculate) for kind in CONFIGS for speculate in (False, True)]


@pytest.mark.parametrize(("kind", "speculate"), GRID if launcher.size() in (None, 1) else every_other(CONFIGS, [False, True]))
def test_a_requests_tokens_are_those_of_running_it_alone(mesh, control, kind, speculate):
    model = model_of(kind, mesh)
    asks = asks_of(Random(3), 11 if mesh.tp.size == 1 or FULL else 6, repeats=speculate)
    want = None if control.rank else {n: alone(kind, ask) for n, ask in enumerate(asks)}
    accepted = 0
    for name in shapes_of(kind, speculate, mesh.tp.size):
        scheduler = {"static": Static, "apart": Apart}.get(name, Scheduler)(**SHAPES[name])
        done = together(model, mesh, control, scheduler, asks, speculate, at_once=name != "roomy")
        if control.rank:
            continue
        got, _, reasons = done
        assert got == want, name
        for n, ask in enumerate(asks):
            assert reasons[n] == ("stop" if got[n][-1] in ask.ends else "length")
        assert (scheduler.counts.hit_tokens > 0) == (name != "no sharing")
        accepted += scheduler.counts.accepted_tokens
    if control.rank == 0:
        assert (accepted > 0) == speculate


@pytest.mark.parametrize("kind", [kind for (kind,) in every_other(["llama", "latent"])])
def test_preempted_again_and_again_the_tokens_stay(mesh, control, kind):
    model = model_of(kind, mesh)
    asks = [Ask([n, 2 * n, 7], 40, Sampling(n % 2, seed=n), n) for n in range(6)]
    scheduler = Scheduler(4, slots=6, max_batch_tokens=16, prefix_caching=kind != "llama")
    tiny = together(model, mesh, control, scheduler, asks)
    if control.rank == 0:
        assert tiny[0] == {n: alone(kind, ask) for n, ask in enumerate(asks)}
        assert all(len(tokens) == 40 for tokens in tiny[0].values())
        assert scheduler.counts.preemptions >= 3


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_wrong_block_is_seen(mesh, control, monkeypatch):
    """That the comparison can fail: a table read one block off."""
    model = model_of("llama", mesh)
    asks = [a._replace(sampling=Sampling(), ends=frozenset()) for a in asks_of(Random(3), 6)]
    want = {n: alone("llama", ask) for n, ask in enumerate(asks)}
    right = Pool.read
    monkeypatch.setattr(Pool, "read", lambda self, layer, tables, *of: right(self, layer, tables[:, ::-1], *of))
    done = together(model, mesh, control, Scheduler(slots=6, max_batch_tokens=64), asks)
    if control.rank == 0:
        assert done[0] != want


def test_log_probabilities_are_those_of_the_full_forward(mesh, control):
    model = model_of("llama", mesh)
    asks = [ask._replace(top_logprobs=4) for ask in asks_of(Random(8), 5 if mesh.tp.size == 1 or FULL else 3)]
    done = together(model, mesh, control, Scheduler(6, slots=5, max_batch_tokens=16), asks)
    tokens = control.from_first(done and [[tuple(t) for t in done[1][n]] for n in range(len(asks))])
    for ask, made in zip(asks, tokens, strict=True):
        ids = np.array(ask.prompt + [id for id, _, _ in made])
        z_Tv, _ = model.forward(ids, model.batch([len(ids)]))
        z_TV = np.concatenate(control.everyone(z_Tv), axis=1)
        log_TV = z_TV - np.log(np.exp(z_TV).sum(axis=1, keepdims=True))
        for n, (id, logprob, top) in enumerate(made):
            row = log_TV[len(ask.prompt) - 1 + n]
            assert logprob == pytest.approx(row[id], abs=1e-11)
            assert [i for i, _ in top] == np.argsort(-row)[:4].tolist()
            assert [p for _, p in top] == pytest.approx(np.sort(row)[::-1][:4], abs=1e-11)


def test_float32_differs_only_where_two_logits_are_within_rounding(mesh, control):
    model = model_of("llama", mesh, "float32")
    asks = [
        a._replace(sampling=Sampling(), ends=frozenset(), max_tokens=40)
        for a in asks_of(Random(5), 12 if mesh.tp.size == 1 else 4)
    ]
    want = [alone("llama", ask, "float32") for ask in asks]
    done = together(model, mesh, control, Scheduler(9, slots=6, max_batch_tokens=16), asks)
    got = control.from_first(done and [done[0][n] for n in range(len(asks))])
    generator = Generator(model, mesh, make_cache(model, "contiguous"))
    for ask, plain, mine in zip(asks, want, got, strict=True):
        difference = tie(generator, ask.prompt, plain, mine, CONFIGS["llama"])
        assert difference is None or difference["explained"], difference


def test_random_days(mesh, control):
    """Arrivals, cancellations at any moment, a tiny pool, shared beginnings, drafts: all end, nothing leaks, nobody is given
    another's tokens."""
    model = model_of("gpt2", mesh)
    for seed in range(6) if mesh.tp.size == 1 or FULL else [mesh.tp.size]:
        random = Random(seed)
        asks = asks_of(random, 10, repeats=seed % 2 == 1)
        scheduler = Scheduler(
            random.randint(8, 10), slots=4, max_batch_tokens=random.choice((4, 9, 30)), queue_limit=7, context=128
        )
        engine = Engine(model, mesh, control, scheduler, speculate=seed % 2 == 1)
        if control.rank:
            engine.follow()
            continue
        got, ended, n, refused = {}, {}, 0, 0
        while n < len(asks) or scheduler.requests:
            while n < len(asks) and random.random() < 0.4:
                try:
                    engine.add(n, asks[n])
                except QueueFull:
                    refused += 1
                    break
                got[n] = []
                n += 1
            if scheduler.requests and random.random() < 0.08:
                id = random.choice(list(scheduler.requests))
                assert engine.cancel(id)
                assert not engine.cancel(id)
                ended[id] = "cancelled"
            report = engine.step()
            for delivery in () if report is None else report.deliveries:
                assert delivery.id not in ended
                got[delivery.id] += [t.id for t in delivery.tokens]
                if delivery.reason:
                    ended[delivery.id] = delivery.reason
        engine.stop()
        assert sorted(ended) == list(range(len(asks)))
        for id, reason in ended.items():
            want = alone("gpt2", asks[id])
            assert got[id] == (want[: len(got[id])] if reason == "cancelled" else want)
        assert scheduler.pool.used == 0


def test_what_a_step_sends_is_predicted_and_its_message_is_small(mesh, control):
    model = model_of("llama", mesh)
    engine = Engine(model, mesh, control, Scheduler(slots=4, max_batch_tokens=16))
    generator = Generator(model, mesh, make_cache(model, "contiguous"))
    sent = []
    engine.control.from_first, tell = (lambda said: sent.append(said) or tell(said)), engine.control.from_first
    if control.rank:
        engine.follow()
    else:
        for n in range(3):
            engine.add(n, Ask([1, 2, 3, n], 5))
        while engine.step():
            pass
        engine.stop()
    predicted = [*generator.traffic(12, "prefill"), *generator.traffic_greedy("prefill", 3)]
    predicted += [
        replace(t, calls=4 * t.calls) for t in (*generator.traffic(3, "decode"), *generator.traffic_greedy("decode", 3))
    ]
    assert agrees(mesh.ledger.report(predicted))
    if control.rank == 0:
        # A decoding request: its id, position, token and flags.
        assert len(pickle.dumps(sent[2], 5)) < 3 * 40


def test_requests_that_cannot_be_served(mesh, control):
    model = model_of("llama", mesh)
    engine = Engine(model, mesh, control, Scheduler(2, slots=2, max_batch_tokens=8, context=64, queue_limit=1))
    if control.rank:
        return
    for ask, words in (
        (Ask([1, V], 3), f"token id {V} is outside of the vocabulary: use 0 to {V - 1}"),
        (Ask([-1], 3), "token id -1"),
        (Ask([], 3), "0 tokens"),
        (Ask([1] * 60, 5), "context of 64: shorten it by 1"),
        (Ask([1] * 30, 5), "3 blocks of 16, the pool has 2"),
        (Ask([1], 3, top_logprobs=V + 1), f"use 0 to {V}"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.add(0, ask)
    engine.add(0, Ask([1], 3))
    with pytest.raises(QueueFull, match="1 requests wait"):
        engine.add(1, Ask([1], 3))
    assert engine.cancel(0)
    assert engine.step() is None
