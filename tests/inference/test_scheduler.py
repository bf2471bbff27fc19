"""The scheduler, one thing at a time: who runs, in what order, and what it refuses."""

import pickle

import pytest

from inference.scheduler import QueueFull, Scheduler
from tests.inference.hashed import Engine, sound


def test_metrics():
    scheduler = Scheduler(40, slots=2, max_batch_tokens=64)
    assert scheduler.metrics()["slot_use"] == scheduler.metrics()["kv_waste"] == 0
    engine = Engine(scheduler)
    for id in range(3):
        engine.add(id, range(30), 5)
    engine.step()
    got = scheduler.metrics()
    assert (got["waiting"], got["running"], got["blocks_used"], got["blocks_kept"], got["blocks_free"]) == (1, 2, 3, 0, 37)
    assert (got["prefill_tokens"], got["slot_use"], got["kv_waste"]) == (60, 1.0, 4 / 64)
    engine.finish()
    got = scheduler.metrics()
    # Two requests at 5 steps each, one after them; of its tokens one block was found.
    assert (got["steps"], got["decode_steps"], got["slot_use"]) == (10, 8, 0.75)
    assert (got["hit_tokens"], got["finished"]) == (16, {"length": 3})
    assert got["blocks_used"] == 0
    assert got["blocks_kept"] + got["blocks_free"] == 40
    assert Scheduler().metrics()["blocks_free"] is None


def test_a_prompt_in_chunks_beside_decodes():
    engine = Engine(Scheduler(slots=3, max_batch_tokens=20))
    engine.add(0, range(12), 12)
    engine.step()
    engine.add(1, range(40, 85), 9)
    engine.step()
    # What is computed of it is known already.
    assert len(engine.scheduler.pool.find(range(40, 85))) == 1
    steps = [[(r.id, r.first, len(r.tokens), r.sample, r.prefill) for r in engine.step().runs] for _ in range(3)]
    assert steps == [
        [(0, 13, 1, True, False), (1, 19, 19, False, True)],
        [(0, 14, 1, True, False), (1, 38, 7, True, True)],
        [(0, 15, 1, True, False), (1, 45, 1, True, False)],
    ]
    engine.finish()


def test_first_come_first_served():
    engine = Engine(Scheduler(30, slots=3, max_batch_tokens=16))
    for id in range(12):
        engine.add(id, [id] * (5 + 7 * (id % 4)), 3)
    order = []
    while engine.scheduler.requests:
        order += [id for id, _ in engine.step().admitted]
    assert order == list(range(12))


def test_lower_numbers_first_and_nobody_waits_for_ever():
    engine = Engine(Scheduler(slots=1, max_batch_tokens=16, aging=10))
    engine.add(0, [1], 2)
    for id, priority in enumerate([1, 0, -1, 0], 1):
        engine.add(id, [2], 2, priority=priority)
    order = []
    while engine.scheduler.requests:
        order += [id for id, _ in engine.step().admitted]
    assert order == [3, 0, 2, 4, 1]
    # One that may wait, and always another that may not: the first is overtaken by those of 5 * 10 steps, at 2 steps each.
    engine = Engine(Scheduler(slots=1, max_batch_tokens=16, aging=10))
    engine.add(0, [1], 2, priority=5)
    while 0 not in engine.ended:
        engine.add(engine.steps + 1, [2], 2)
        engine.step()
        assert engine.steps < 200
    assert 100 <= engine.steps <= 104


def test_ended_from_outside_in_any_state():
    scheduler = Scheduler(8, slots=2, max_batch_tokens=20)
    for id in range(4):
        scheduler.add(id, range(30), 5)
    assert scheduler.cancel(3)
    step = scheduler.schedule()
    # At its prompt, and with a step under way: what comes of that is left aside, and the id is free for another request.
    assert scheduler.finish(0)
    scheduler.add(0, range(5), 5)
    assert scheduler.commit(step, {}) == []
    assert scheduler.requests[0].computed == 0
    sound(scheduler)
    assert [scheduler.finish(id) for id in (0, 1, 2, 3)] == [True, True, True, False]
    sound(scheduler)
    assert not scheduler.schedule()
    assert scheduler.counts.finished == {"cancelled": 1, "stop": 4}
    assert scheduler.pool.used == 0


def test_a_step_is_small_and_plain():
    scheduler = Scheduler(slots=64, max_batch_tokens=4096)
    for id in range(64):
        scheduler.add(id, range(60), 5)
    scheduler.commit(scheduler.schedule(), {id: [1] for id in range(64)})
    step = scheduler.schedule()
    assert pickle.loads(pickle.dumps(step)).runs == step.runs
    assert len(pickle.dumps(step)) < 64 * 80
    # A step's tables do not change with the request's.
    table = step.runs[0].table.copy()
    scheduler.cancel(0)
    assert step.runs[0].table == table


def test_what_cannot_be_is_refused():
    scheduler = Scheduler(4, slots=2, max_batch_tokens=8, context=100, queue_limit=2)
    for prompt, most, said in (
        (60, 6, r"request 7 of 60 \+ 6 tokens needs 5 blocks of 16, the pool has 4: shorten it or add some"),
        (60, 41, r"request 7 of 60 \+ 41 tokens is longer than the context of 100: shorten it by 1"),
        (0, 5, "request 7 has 0 tokens, use 1 or more, and asks for 5, use 0 or more"),
        (5, -1, "request 7 has 5 tokens, use 1 or more, and asks for -1, use 0 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            scheduler.add(7, range(prompt), most)
    scheduler.add(7, range(60), 5)
    with pytest.raises(ValueError, match="request 7 is there already"):
        scheduler.add(7, [1], 1)
    scheduler.add(8, [1], 1)
    with pytest.raises(QueueFull, match="2 requests wait, of at most 2"):
        scheduler.add(9, [1], 1)
    assert set(scheduler.requests) == {7, 8}
    for options, said in (
        ({"slots": 0}, "slots 0 must be 1 or more"),
        ({"blocks": 0}, "blocks 0 must be 1 or more"),
        ({"slots": 9, "max_batch_tokens": 8}, "max_batch_tokens 8 must be 9 or more: each of 9 slots may need one"),
    ):
        with pytest.raises(ValueError, match=said):
            Scheduler(**options)
