"""An engine whose model is a hash, what holds of any step, and days on which anything happens."""

from random import Random

from inference.blocks import BLOCK, needed
from inference.policies import APART, POLICIES, Apart

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
        self.scheduler, self.random, self.guesses, self.prefilled = scheduler, random or Random(0), guesses, False
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
        first = scheduler.running[:1]
        step = scheduler.schedule()
        assert bool(step) == bool(scheduler.requests)
        obeys(scheduler, step, before, first, self.prefilled)
        self.prefilled = any(run.prefill for run in step.runs)
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
    """The rules of any step; `decoding`, `first`: the requests that decoded, and the first of the running, before it;
    `after_prefill`: whether the step before it ran prompts."""
    mixed, runs = not isinstance(scheduler, Apart), {run.id: run for run in step.runs}
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
    if mixed or not prefill or after_prefill:
        assert {r.id for r in decoding} <= set(runs) | set(step.preempted), "a decode was starved"
    if mixed:
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


def anything(seed, guesses=4):
    """Arrivals with prefixes of each other, tiny pools, drafts, ends, priorities and cancellations; all end well."""
    random = Random(seed)
    slots, longest = random.randint(1, 8), random.choice([3, 7, 7])
    pool = random.choice([None, longest, longest + 1, longest + 3, longest + 5, 2 * longest])
    budget = slots + random.choice([0, 3, 20, 100])
    policy = random.choice(["continuous", "continuous", "continuous", "static"])
    kind = (POLICIES if random.random() < 0.7 else APART)[policy]
    scheduler = kind(
        pool,
        slots=slots,
        max_batch_tokens=budget,
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
