"""Blocks: found by what they hold, shared, short, lost and computed again."""

from random import Random

import pytest

from inference.blocks import BlockPool, Link, Opened, OutOfBlocks
from inference.policies import Apart
from inference.scheduler import Scheduler
from tests.inference.hashed import IDS, Engine


def test_a_prefix_is_found_and_one_token_is_always_computed():
    engine = Engine(Scheduler(slots=4, max_batch_tokens=100))
    engine.add(0, range(48), 3)
    engine.finish()
    # Two full blocks and a part of one; other tokens from the second block on; the same tokens elsewhere.
    engine.add(1, range(40), 2)
    engine.add(2, [*range(16), *range(17, 48)], 2)
    engine.add(3, range(16, 48), 2)
    step = engine.step()
    assert step.admitted == [(1, 32), (2, 16), (3, 0)]
    assert not step.copies
    engine.finish()
    # All of it: one token is computed, in a copy of the last block.
    engine.add(4, range(48), 2)
    step = engine.step()
    ((source, to),) = step.copies
    assert [(r.first, len(r.tokens), r.sample, r.prefill) for r in step.runs] == [(47, 1, True, True)]
    assert step.runs[0].table[2] == to != source
    # The copy now holds what the block that it was copied from holds: that one is shared, the copy is given back.
    assert engine.scheduler.requests[4].table[2] == source
    engine.finish()
    engine.add(5, range(48), 2, reuse=False)
    assert engine.step().admitted == [(5, 0)]
    engine.finish()


def test_what_was_generated_is_found_too():
    engine = Engine(Scheduler(slots=1, max_batch_tokens=100))
    engine.add(0, range(10), 30)
    engine.finish()
    # 10 + 29 tokens were run; the next turn of a conversation begins with all of them.
    engine.add(1, [*engine.texts[0], 1, 2, 3], 2)
    assert engine.step().admitted == [(1, 32)]
    engine.finish()
    other = Engine(Scheduler(slots=1, max_batch_tokens=100, prefix_caching=False))
    for id in range(2):
        other.add(id, range(40), 3)
        other.finish()
    assert other.scheduler.counts.hit_tokens == other.scheduler.pool.kept == 0


def test_the_same_prompt_at_once_ends_in_the_same_blocks():
    engine = Engine(Scheduler(20, slots=4, max_batch_tokens=200))
    for id in range(4):
        engine.add(id, range(40), 5)
    engine.step()
    assert engine.scheduler.pool.used == 2 + 4
    engine.finish()


def test_a_whole_prefix_in_a_pool_without_room_for_a_copy():
    engine = Engine(Scheduler(2, slots=2, max_batch_tokens=64))
    engine.add(0, range(31), 2)
    engine.finish()
    engine.add(1, [*range(31), engine.texts[0][31]], 1)
    engine.add(2, range(32), 1)
    step = engine.step()
    assert step.admitted == [(1, 16)]
    assert not step.copies
    engine.finish()


def test_the_prefix_used_longest_ago_goes_first_from_its_end():
    engine = Engine(Scheduler(6, slots=1, max_batch_tokens=200))
    for id, first in enumerate([100, 200, 100]):
        engine.add(id, range(first, first + 33), 1)
        engine.finish()
    # 100 and 200 keep two blocks each. A request of four takes the two free ones and both of 200.
    engine.add(3, range(300, 349), 1)
    engine.finish()
    pool = engine.scheduler.pool
    assert [len(pool.find(range(first, first + 48))) for first in (100, 200, 300)] == [2, 0, 3]
    # Three free or of 100: from the end of what was used longest ago.
    engine.add(4, range(400, 417), 1)
    engine.finish()
    assert [len(pool.find(range(first, first + 48))) for first in (100, 300)] == [1, 3]


@pytest.mark.parametrize("kind", [Scheduler, Apart])
def test_preempted_again_and_again_the_tokens_are_the_same(kind):
    def outcome(pool):
        engine = Engine(kind(pool, slots=8, max_batch_tokens=40), Random(3), guesses=3)
        random = Random(5)
        for id in range(24):
            engine.add(id, [random.randrange(IDS) for _ in range(random.randint(1, 16))], random.randint(50, 90))
        engine.finish()
        return engine.scheduler.counts.preemptions, [engine.delivered(id) for id in range(24)]

    (many, small), (none, unlimited) = outcome(8), outcome(None)
    assert small == unlimited
    assert many > 20
    assert none == 0


def test_the_latest_is_preempted_and_its_tokens_are_computed_again():
    # Two requests of 20 + 28 tokens need 3 blocks each.
    engine = Engine(Scheduler(5, slots=2, max_batch_tokens=64, prefix_caching=False))
    engine.add(0, range(20), 28)
    engine.add(1, range(20, 40), 28)
    while not (step := engine.step()).preempted:
        assert len(step.runs) == 2
    assert step.preempted == [1]
    assert (step.runs[0].id, step.runs[0].first) == (0, 32)
    # It had 12 tokens since its prompt and the step gave it none: nothing of it is lost.
    assert len(engine.delivered(1)) == 13
    while not (step := engine.step()).admitted:
        assert [run.id for run in step.runs] == [0]
    assert [(r.id, r.first, len(r.tokens), r.sample, r.prefill) for r in step.runs] == [(1, 0, 33, True, True)]
    assert len(engine.delivered(1)) == 14
    engine.finish()


def test_nobody_is_admitted_at_the_last_blocks():
    # The second needs two of the three that are free, the third one of two: one more for each that runs must be left.
    engine = Engine(Scheduler(5, slots=3, max_batch_tokens=64))
    for id, length in enumerate([20, 20, 10]):
        engine.add(id, range(30 * id, 30 * id + length), 2)
    assert engine.step().admitted == [(0, 0), (1, 0)]
    assert engine.step().admitted == []
    assert engine.step().admitted == [(2, 0)]
    engine.finish()


def test_a_preempted_request_finds_its_own_blocks():
    engine = Engine(Scheduler(5, slots=2, max_batch_tokens=64))
    engine.add(0, range(20), 28)
    engine.add(1, range(20, 40), 28)
    engine.finish()
    assert engine.scheduler.counts.preemptions
    assert engine.scheduler.counts.hit_tokens >= 16


def test_blocks_are_taken_and_dropped_once():
    pool = BlockPool(2)
    a, b = pool.take(), pool.take()
    with pytest.raises(OutOfBlocks, match="all 2 blocks of 16 tokens are in use"):
        pool.take()
    pool.use(a)
    pool.drop(a)
    assert pool.free == 0
    pool.drop(a)
    with pytest.raises(ValueError, match=f"block {a} is free already"):
        pool.drop(a)
    assert (pool.free, pool.used, pool.take()) == (1, 1, a)
    pool.drop(b)
    assert pool.open(range(17)) is None
    assert pool.open(range(16), reserve=1) is None
    assert pool.open(range(16)) == Opened([b], 0, None, 0, None)


def test_a_link_knows_all_before_it():
    part = tuple(range(16))
    first, second = Link(None, part), Link(Link(None, tuple(range(1, 17))), part)
    assert first.hash != second.hash
    assert first.hash == Link(None, part).hash
