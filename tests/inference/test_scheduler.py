"""The scheduler alone: plain data, and an engine whose model is a hash."""

import pickle
from random import Random

import pytest

from inference import blocks, workload
from inference.blocks import BLOCK, BlockPool, Link, Opened, needed
from inference.cache import OutOfBlocks
from inference.scheduler import QueueFull, Scheduler

IDS = 50  # of the hash model


def key(before, token):
    """What the hash model keeps of a token: as in a transformer, it depends on all tokens before."""
    return hash((before, token))


def keys(tokens):
    held, before = [], 0
    for token in tokens:
        held.append(before := key(before, token))
    return held


def choice(kept):
    """The token after one of which this is kept."""
    return kept % 1009 % IDS


def expected(prompt, max_tokens, ends=()):
    """What a request gets, however it is scheduled."""
    kept, out = keys(prompt)[-1], []
    while len(out) < max_tokens and not (out and out[-1] in ends):
        out.append(choice(kept))
        kept = key(kept, out[-1])
    return out


class Engine:
    """Runs steps with blocks of what the hash model keeps, and looks at every position that a request sees."""

    def __init__(self, scheduler, random=None, guesses=0):
        self.scheduler, self.random, self.guesses = scheduler, random or Random(0), guesses
        self.memory = {}
        self.texts, self.prompts, self.due, self.ended, self.gone = {}, {}, {}, {}, set()
        self.drafted = []
        self.steps = 0

    def add(self, id, prompt, max_tokens, **options):
        self.scheduler.add(id, prompt, max_tokens, **options)
        self.texts[id], self.prompts[id] = list(prompt), len(prompt)
        self.due[id] = expected(prompt, max_tokens, options.get("ends", ()))

    def delivered(self, id):
        return self.texts[id][self.prompts[id] :]

    def cancel(self, id):
        assert self.scheduler.cancel(id)
        self.gone.add(id)

    def guess(self):
        """Drafts that go wrong somewhere, or nowhere."""
        for id in self.scheduler.requests:
            drafts = expected(self.texts[id], self.random.randint(0, self.guesses)) if self.guesses else []
            if drafts and self.random.random() < 0.7:
                drafts[self.random.randrange(len(drafts))] = self.random.randrange(IDS)
            if drafts:
                self.scheduler.propose(id, drafts)

    def step(self, cancel=0.0):
        scheduler = self.scheduler
        self.guess()
        before = [r for r in scheduler.running if r.decoding]
        first, last_prefilled = scheduler.running[:1], scheduler._after_prefill
        step = scheduler.schedule()
        assert bool(step) == bool(scheduler.requests)
        obeys(scheduler, step, before, first, last_prefilled)
        self.forward(step)
        new = {run.id: self.sampled(run) for run in step.runs if run.sample}
        for id in list(scheduler.requests):
            if self.random.random() < cancel:
                self.cancel(id)
        for id, tokens, reason in scheduler.commit(step, new):
            assert id not in self.gone
            assert id not in self.ended
            self.texts[id] += tokens
            assert self.delivered(id) == self.due[id][: len(self.delivered(id))], f"request {id} got something else"
            if reason:
                self.ended[id] = reason
                assert self.delivered(id) == self.due[id]
        sound(scheduler)
        self.steps += 1
        return step

    def forward(self, step):
        pool = self.scheduler.pool
        for block in [b for b in self.memory if not pool.users[b] and b not in pool._links]:
            self.memory[block] = [None] * BLOCK
        sources = [self.memory[source].copy() for source, _ in step.copies]
        for (_, to), kept in zip(step.copies, sources, strict=True):
            self.memory[to] = kept
        for run in step.runs:
            for n, token in enumerate(run.tokens, run.first):
                block = self.memory.setdefault(run.table[n // BLOCK], [None] * BLOCK)
                block[n % BLOCK] = key(self.read(run, n - 1) if n else 0, token)
        for run in step.runs:
            known = len(run.tokens) - run.drafts
            text = self.texts[run.id]
            assert run.tokens[:known] == text[run.first : run.first + known]
            seen = text[: run.first] + run.tokens
            assert [self.read(run, n) for n in range(len(seen))] == keys(seen), f"request {run.id} sees what is not its own"
            assert run.sample == (run.first + known == len(text))
            if run.drafts:
                self.drafted.append(seen)

    def read(self, run, n):
        return self.memory[run.table[n // BLOCK]][n % BLOCK]

    def sampled(self, run):
        came, last = [], run.first + len(run.tokens) - 1
        for n, guess in enumerate([*run.tokens[len(run.tokens) - run.drafts :], None], last - run.drafts):
            came.append(choice(self.read(run, n)))
            if came[-1] != guess:
                return came

    def finish(self, most=20_000):
        while self.scheduler.requests:
            self.step()
            assert self.steps < most, "it does not get on"
        assert all(self.delivered(id) == self.due[id] for id in self.ended)
        assert set(self.texts) == set(self.ended) | self.gone
        assert self.scheduler.pool.used == 0
        return self


def obeys(scheduler, step, decoding, first, after_prefill):
    """The rules of any step; `decoding`, `first`: the requests that decoded, and the first of the running, before it."""
    runs = {run.id: run for run in step.runs}
    assert len(runs) == len(step.runs) <= len(scheduler.running) <= scheduler.slots
    assert sum(len(run.tokens) for run in step.runs) <= scheduler.max_batch_tokens
    assert all(len(run.tokens) - run.drafts > 0 for run in step.runs)
    assert all(len(run.table) == needed(run.first + len(run.tokens)) or run.prefill for run in step.runs)
    assert [r.order for r in scheduler.running] == sorted(r.order for r in scheduler.running)
    assert not first or first[0].id not in step.preempted
    assert not (step.preempted and step.admitted)
    targets = [to for _, to in step.copies]
    assert len(set(targets)) == len(targets)
    assert not any(source in targets[:n] for n, (source, _) in enumerate(step.copies))
    prefill = any(run.prefill for run in step.runs)
    if scheduler.mixed or not prefill or after_prefill:
        assert {r.id for r in decoding} <= set(runs) | set(step.preempted), "a decode was starved"
    if scheduler.mixed:
        assert not scheduler.running or scheduler.running[0].id in runs
    else:
        assert len({run.prefill for run in step.runs}) <= 1


def sound(scheduler):
    """Every block is free, kept or in use, and has as many users as tables name it."""
    pool = scheduler.pool
    users = [0] * len(pool.users)
    for request in scheduler.requests.values():
        assert len(set(request.table)) == len(request.table)
        assert bool(request.table) == (request in scheduler.running) != (request in scheduler.waiting)
        assert len(request.table) <= needed(len(request.tokens))
        for block in request.table:
            users[block] += 1
    assert users == pool.users
    idle = [*pool._free, *pool._kept]
    assert sorted(idle) == [block for block, n in enumerate(users) if not n]
    assert set(pool._kept) <= set(pool._links) == set(pool._published.values())
    assert not set(pool._free) & set(pool._links)


def run_through(scheduler, prompts, max_tokens):
    """All at once, any tokens -> the scheduler and how many each got."""
    got = [0] * len(prompts)
    for id, (prompt, most) in enumerate(zip(prompts, max_tokens, strict=True)):
        scheduler.add(id, prompt, most)
    while scheduler.requests:
        step = scheduler.schedule()
        for id, tokens, _ in scheduler.commit(step, {run.id: [1] for run in step.runs if run.sample}):
            got[id] += len(tokens)
    return scheduler, got


# --- the workload of nano-vllm: 256 requests, and its small twin

FULL, SCALED = workload.full(), workload.scaled()
DECODE_STEPS = [
    (FULL, 4, 52925, 33494),
    (FULL, 8, 29318, 17142),
    (FULL, 16, 15588, 9025),
    (FULL, 32, 7949, 4888),
    (FULL, 64, 4008, 2743),
    (SCALED, 4, 808, 586),
    (SCALED, 8, 429, 305),
    (SCALED, 16, 238, 179),
]
CASES = [pytest.param(*case, id=f"{len(case[0].prompts)} requests, {case[1]} slots") for case in DECODE_STEPS]


def test_the_workloads_are_the_published_ones():
    assert [sum(map(len, FULL.prompts)), sum(FULL.max_tokens)] == [142_827, 133_966]
    assert (len(FULL.prompts[0]), FULL.prompts[0][:3]) == (964, [6311, 6890, 663])
    assert FULL.max_tokens[:5] == [845, 312, 607, 843, 500]
    assert [sum(map(len, SCALED.prompts)), sum(SCALED.max_tokens)] == [2109, 2315]
    assert (len(SCALED.prompts[0]), SCALED.prompts[0][:3]) == (62, [197, 215, 20])
    assert SCALED.max_tokens[:5] == [50, 12, 41, 25, 44]
    lengths = [len(p) + m for p, m in zip(*FULL, strict=True)]
    assert max(lengths) == 2011
    assert sum(map(needed, lengths)) == 17422
    assert 1 - sum(lengths) / (17422 * BLOCK) == pytest.approx(0.0070, abs=5e-5)


def test_arrivals_are_a_poisson_process():
    times = workload.arrivals(20_000, 4.0, seed=1)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    # Mean and deviation of the gaps are both 1/4; six standard errors.
    assert mean == pytest.approx(0.25, abs=6 * 0.25 / len(gaps) ** 0.5)
    assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 == pytest.approx(0.25, rel=0.1)
    with pytest.raises(ValueError, match="0 requests per second must be more than 0"):
        workload.arrivals(1, 0)


@pytest.mark.parametrize(("load", "slots", "static", "continuous"), CASES)
def test_decode_steps_of_static_and_continuous_batches(load, slots, static, continuous):
    """A step takes any prompts and gives their first tokens; only steps without prefill count: max_tokens - 1 a request."""
    tokens = sum(load.max_tokens) - len(load.prompts)
    for policy, steps in (("static", static), ("continuous", continuous)):
        scheduler, got = run_through(Scheduler(slots=slots, max_batch_tokens=10**6, policy=policy, mixed=False), *load)
        assert got == load.max_tokens
        assert scheduler.counts.decode_steps == steps
        assert scheduler.counts.decode_tokens == tokens
        assert scheduler.counts.prefill_tokens == sum(map(len, load.prompts))
        assert scheduler.counts.finished == {"length": len(load.prompts)}


def test_mixed_steps_need_no_steps_for_prefill():
    for slots, steps in ((4, 603), (8, 313), (16, 183), (64, 64)):
        # The steps of a machine with as many lanes, each request max_tokens long, first come, first served.
        lanes = [0] * slots
        for most in SCALED.max_tokens:
            lanes[lanes.index(min(lanes))] += most
        scheduler, got = run_through(Scheduler(slots=slots, max_batch_tokens=10**6), *SCALED)
        assert got == SCALED.max_tokens
        assert scheduler.counts.steps == max(lanes) == steps


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


# --- one thing at a time


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


def test_prefill_apart_takes_turns_with_decodes():
    engine = Engine(Scheduler(slots=3, max_batch_tokens=20, mixed=False))
    engine.add(0, range(12), 9)
    engine.step()
    engine.add(1, range(40, 85), 3)
    steps = [[(r.id, len(r.tokens)) for r in engine.step().runs] for _ in range(7)]
    assert steps == [[(0, 1)], [(1, 20)], [(0, 1)], [(1, 20)], [(0, 1)], [(1, 5)], [(0, 1), (1, 1)]]
    engine.finish()


def test_a_static_batch_ends_before_another_begins():
    # The budget is less than the prompts of a batch: it is filled all the same.
    engine = Engine(Scheduler(slots=3, max_batch_tokens=16, policy="static"))
    for id, most in enumerate([2, 9, 4, 2, 3]):
        engine.add(id, range(id, id + 14), most)
    admitted = {}
    while engine.scheduler.requests:
        for id, _ in engine.step().admitted:
            admitted[id] = set(engine.ended)
    assert admitted == {0: set(), 1: set(), 2: set(), 3: {0, 1, 2}, 4: {0, 1, 2}}


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


@pytest.mark.parametrize("mixed", [True, False])
def test_preempted_again_and_again_the_tokens_are_the_same(mixed):
    def outcome(pool):
        engine = Engine(Scheduler(pool, slots=8, max_batch_tokens=40, mixed=mixed), Random(3), guesses=3)
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


def drafting(**options):
    """A scheduler with request 0 at 10 computed tokens of 11, the last of which is to be run."""
    options = {"blocks": 4, "slots": 2, "max_batch_tokens": 16, "max_tokens": 20} | options
    most = options.pop("max_tokens")
    scheduler = Scheduler(**options)
    scheduler.add(0, range(10), most)
    scheduler.commit(scheduler.schedule(), {0: [7]})
    return scheduler


def test_drafts_are_verified_and_rolled_back():
    scheduler = drafting()
    scheduler.propose(0, [1, 2, 3, 4, 5, 6, 7, 8])
    step = scheduler.schedule()
    (run,) = step.runs
    assert (run.first, run.tokens, run.drafts, run.sample, len(run.table)) == (10, [7, 1, 2, 3, 4, 5, 6, 7, 8], 8, True, 2)
    assert scheduler.commit(step, {0: [1, 2, 9]}) == [(0, [1, 2, 9], None)]
    request = scheduler.requests[0]
    assert (request.computed, request.tokens[10:], len(request.table), request.published) == (13, [7, 1, 2, 9], 1, 0)
    # A draft is for one step.
    step = scheduler.schedule()
    assert (step.runs[0].tokens, step.runs[0].drafts) == ([9], 0)
    scheduler.commit(step, {0: [8]})
    # All accepted, and a block filled by them.
    scheduler.propose(0, [5, 5])
    scheduler.commit(scheduler.schedule(), {0: [5, 5, 6]})
    assert (request.computed, len(request.tokens), request.published) == (17, 18, 1)
    counts = scheduler.counts
    assert (counts.draft_tokens, counts.accepted_tokens, counts.decode_tokens) == (10, 4, 3)


def test_drafts_are_shortened():
    cases = [
        ({}, [2] * 30, 15),  # the budget
        ({"max_batch_tokens": 64}, [2] * 30, 18),  # tokens to come, less the one that comes anyway
        ({"max_tokens": 2}, [2] * 30, 0),
        ({"blocks": 1, "max_tokens": 6}, [2] * 30, 4),
        ({"blocks": 2, "max_batch_tokens": 64}, [2] * 9, 9),
        ({}, [], 0),
    ]
    for options, draft, run in cases:
        scheduler = drafting(**options)
        scheduler.propose(0, draft)
        assert scheduler.schedule().runs[0].drafts == run
    # Two other requests take the last blocks, and that of the first has room for four tokens more.
    scheduler = drafting(blocks=5, slots=3, max_batch_tokens=64)
    scheduler.add(1, range(40, 56), 3)
    scheduler.add(2, range(60, 76), 3)
    scheduler.commit(scheduler.schedule(), {0: [1], 1: [1], 2: [1]})
    scheduler.propose(0, [2] * 30)
    step = scheduler.schedule()
    assert [(r.id, r.drafts, len(r.table)) for r in step.runs] == [(0, 4, 1), (1, 0, 2), (2, 0, 2)]
    # New prompts come before drafts.
    scheduler = drafting()
    scheduler.add(1, range(30), 2)
    scheduler.propose(0, [2] * 5)
    step = scheduler.schedule()
    assert [(r.id, len(r.tokens), r.drafts) for r in step.runs] == [(0, 1, 0), (1, 15, 0)]
    scheduler.propose(77, [1])


def test_a_block_with_refused_drafts_is_not_known():
    engine = Engine(Scheduler(slots=2, max_batch_tokens=99))
    engine.add(0, range(12), 20)
    engine.step()
    wrong = [(token + 1) % IDS for token in engine.due[0][1:7]]
    engine.scheduler.propose(0, wrong)
    engine.step()
    engine.add(1, [*engine.texts[0][:13], *wrong], 5)
    engine.finish()
    # Now that the first has the block's own tokens, these are known and those are not.
    engine.add(2, [*range(12), engine.due[0][0], *wrong], 5)
    engine.add(3, engine.texts[0], 5)
    assert engine.step().admitted == [(2, 16), (3, 16)]
    engine.finish()


def test_an_end_among_accepted_drafts():
    scheduler = Scheduler(slots=1, max_batch_tokens=16)
    scheduler.add(0, [1, 2], 9, ends={5})
    scheduler.commit(scheduler.schedule(), {0: [3]})
    scheduler.propose(0, [4, 5, 6])
    assert scheduler.commit(scheduler.schedule(), {0: [4, 5, 6, 7]}) == [(0, [4, 5], "stop")]
    assert not scheduler.requests
    assert scheduler.counts.finished == {"stop": 1}
    scheduler.add(0, [1], 1)
    assert scheduler.commit(scheduler.schedule(), {0: [5]}) == [(0, [5], "length")]


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
        (0, 5, "request 7 has 0 tokens and asks for 5: both must be 1 or more"),
        (5, 0, "request 7 has 5 tokens and asks for 0: both must be 1 or more"),
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
        ({"policy": "dynamic"}, "policy 'dynamic' must be one of continuous, static"),
    ):
        with pytest.raises(ValueError, match=said):
            Scheduler(**options)


def test_a_step_is_committed_once_with_tokens_that_can_come_of_it():
    scheduler = drafting()
    scheduler.propose(0, [1, 2])
    step = scheduler.schedule()
    with pytest.raises(RuntimeError, match="step 1 has not been committed"):
        scheduler.schedule()
    for new in ({}, {0: []}, {0: [2, 3]}, {0: [1, 3, 2]}, {0: [1, 2, 3, 4]}):
        with pytest.raises(ValueError, match=r"request 0 with drafts \[1, 2\] got .*: expected some of these drafts and one"):
            scheduler.commit(step, new)
    scheduler.commit(step, {0: [1, 9]})
    with pytest.raises(ValueError, match="step 1 is not under way"):
        scheduler.commit(step, {0: [1, 9]})
    scheduler.add(1, range(30), 3)
    step = scheduler.schedule()
    with pytest.raises(ValueError, match=r"request 1 with drafts \[\] got \[4\]: expected no token"):
        scheduler.commit(step, {0: [9], 1: [4]})
    assert scheduler.commit(step, {0: [9]}) == [(0, [9], None)]


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


# --- anything at any time


def anything(seed, guesses=4):
    """Arrivals with prefixes of each other, tiny pools, drafts, ends, priorities and cancellations; all end well."""
    random = Random(seed)
    slots, longest = random.randint(1, 8), random.choice([3, 7, 7])
    scheduler = Scheduler(
        random.choice([None, longest, longest + 1, longest + 3, longest + 5, 2 * longest]),
        slots=slots,
        max_batch_tokens=slots + random.choice([0, 3, 20, 100]),
        policy=random.choice(["continuous", "continuous", "continuous", "static"]),
        mixed=random.random() < 0.7,
        prefix_caching=random.random() < 0.9,
        aging=random.choice([1, 10]),
    )
    engine = Engine(scheduler, random, random.choice([0, guesses]))
    texts = [[random.randrange(IDS) for _ in range(60)] for _ in range(2)]
    added = 0
    for _ in range(40):
        while added < 25 and random.random() < 0.5:
            # The beginning of something seen, a draft that was refused too, often to a block's end; at times something new.
            text = random.choice(texts + list(engine.texts.values())[-3:] + engine.drafted[-3:])
            text = text[random.choice([0, 0, 0, 0, BLOCK]) :] or text
            length = random.choice([random.randint(1, 60), random.randint(1, 20), BLOCK, 2 * BLOCK, len(text)])
            prompt = text[:length] + [random.randrange(IDS) for _ in range(random.choice([0, 0, 1, 20]))]
            prompt = prompt[: random.choice([(longest - 1) * BLOCK, 33, 16, 5])]
            most = min(random.choice([random.randint(1, 40), 100]), longest * BLOCK + 1 - len(prompt))
            ends = {random.randrange(IDS) for _ in range(random.choice([0, 0, 0, 3]))}
            engine.add(added, prompt, most, ends=ends, priority=random.choice([0, 0, 0, 2, -1]), reuse=random.random() < 0.9)
            added += 1
        if scheduler.requests:
            engine.step(cancel=random.choice([0, 0, 0.05]))
    engine.finish()
    assert not scheduler.waiting
    assert not scheduler.running
    return engine


def test_anything_at_any_time_ends_well():
    ran = [anything(seed) for seed in range(60)]
    assert sum(e.steps for e in ran) > 10_000
    # It is not empty of what it is about.
    counts = [e.scheduler.counts for e in ran]
    for what, least in (("preemptions", 100), ("hit_tokens", 1000), ("accepted_tokens", 1000), ("draft_tokens", 3000)):
        assert sum(getattr(c, what) for c in counts) > least, what
    assert {reason for c in counts for reason in c.finished} == {"stop", "length", "cancelled"}


def test_equal_hashes_share_nothing_wrong(monkeypatch):
    monkeypatch.setattr(blocks, "chain", lambda before, tokens: 5)
    for seed in range(15):
        anything(seed)
    # Not even the same tokens after others, where the hash says nothing at all.
    monkeypatch.setattr(blocks, "chain", lambda before, tokens: hash(tokens))
    pool = BlockPool(4)
    a, b = tuple(range(16)), tuple(range(16, 32))
    _, link = pool.publish(pool.take(), None, a)
    pool.publish(pool.take(), link, b)
    assert pool.find(a + b) == [0, 1]
    assert pool.find(b) == []
    # One that comes second with a hash stays with its user, and is nobody else's.
    block, other = pool.publish(pool.take(), None, b)
    assert block == 2
    assert other is not link
    assert pool.find(b) == []
    pool.drop(block)
    assert (pool.free, pool.kept) == (2, 0)


# --- sabotage: each of these turns a check red


def hash_unaccepted_drafts(monkeypatch):
    commit = Scheduler.commit

    def publish_first(self, step, new):
        for run, request in zip(step.runs, self._flight[1], strict=True):
            if run.drafts and self.requests.get(run.id) is request:
                kept = request.tokens, request.computed
                request.tokens = request.tokens + run.tokens[-run.drafts :]
                request.computed = len(request.tokens)
                self._publish(request)
                request.tokens, request.computed = kept
        return commit(self, step, new)

    monkeypatch.setattr(Scheduler, "commit", publish_first)


def keep_no_token(monkeypatch):
    opened = BlockPool.open

    def whole(self, tokens, *options):
        got = opened(self, tokens, *options)
        return got._replace(computed=len(tokens)) if got and got.copy else got

    monkeypatch.setattr(BlockPool, "open", whole)


def free_what_is_shared(monkeypatch):
    drop = BlockPool.drop

    def at_once(self, block):
        self.users[block] = min(self.users[block], 1)
        drop(self, block)

    monkeypatch.setattr(BlockPool, "drop", at_once)


def deliver_again(monkeypatch):
    preempt = Scheduler._preempt

    def from_the_prompt(self, request):
        del request.tokens[request.prompt :]
        return preempt(self, request)

    monkeypatch.setattr(Scheduler, "_preempt", from_the_prompt)


def resume_after_the_prompt_only(monkeypatch):
    admit = Scheduler._admit

    def short(self, step):
        request = admit(self, step)
        if request is not None:
            request.goal = max(request.computed + 1, request.prompt)
        return request

    monkeypatch.setattr(Scheduler, "_admit", short)


def believe_hashes(monkeypatch):
    """A block's tokens are compared, but not what is before it."""

    def find(self, tokens):
        found = []
        for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
            part = tuple(tokens[first : first + BLOCK])
            block = self._published.get(blocks.chain(None, part))
            if block is None or self._links[block].tokens != part:
                break
            found.append(block)
        return found

    monkeypatch.setattr(blocks, "chain", lambda before, tokens: hash(tokens))
    monkeypatch.setattr(BlockPool, "find", find)


def forget_the_roll_back(monkeypatch):
    commit = Scheduler.commit

    def long(self, step, new):
        outputs = commit(self, step, new)
        for run in step.runs:
            if run.drafts and run.id in self.requests:
                self.requests[run.id].computed = run.first + len(run.tokens)
        return outputs

    monkeypatch.setattr(Scheduler, "commit", long)


def draft_without_blocks(monkeypatch):
    monkeypatch.setattr(Scheduler, "_drafts", lambda self, request, spare: len(request.draft[:spare]))


def copy_nothing(monkeypatch):
    forward = Engine.forward

    def without(self, step):
        step.copies.clear()
        forward(self, step)

    monkeypatch.setattr(Engine, "forward", without)


def publish_what_is_not_full(monkeypatch):
    def early(self, request):
        while self.prefix_caching and request.published < request.computed // BLOCK + (request.computed % BLOCK > 12):
            n = request.published
            tokens = (*request.tokens[n * BLOCK : (n + 1) * BLOCK], *[0] * BLOCK)[:BLOCK]
            request.table[n], request.link = self.pool.publish(request.table[n], request.link, tokens)
            request.published += 1

    monkeypatch.setattr(Scheduler, "_publish", early)


def preempt_the_first(monkeypatch):
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, request: preempt(self, self.running[0]))


SABOTAGES = [
    hash_unaccepted_drafts,
    keep_no_token,
    free_what_is_shared,
    deliver_again,
    resume_after_the_prompt_only,
    believe_hashes,
    forget_the_roll_back,
    draft_without_blocks,
    copy_nothing,
    publish_what_is_not_full,
    preempt_the_first,
]


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda f: f.__name__)
def test_sabotage_is_seen(monkeypatch, sabotage):
    sabotage(monkeypatch)

    def checks():
        test_a_block_with_refused_drafts_is_not_known()
        for seed in range(100):
            anything(seed)

    with pytest.raises((AssertionError, ValueError, IndexError)):
        checks()


def test_a_link_knows_all_before_it():
    part = tuple(range(16))
    first, second = Link(None, part), Link(Link(None, tuple(range(1, 17))), part)
    assert first.hash != second.hash
    assert first.hash == Link(None, part).hash
