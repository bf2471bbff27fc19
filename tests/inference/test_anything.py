"""Anything at any time, and sabotages: each of them turns a check red."""

import pytest

from inference import blocks
from inference.blocks import BLOCK, BlockPool
from inference.scheduler import Scheduler
from tests.inference import test_drafts
from tests.inference.hashed import Engine, anything


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

    def find(self, tokens, owner):
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
    monkeypatch.setattr(BlockPool, "grow", lambda self, table, tokens: None)


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
        test_drafts.test_a_block_with_refused_drafts_is_not_known()
        for seed in range(100):
            anything(seed)

    with pytest.raises((AssertionError, ValueError, IndexError)):
        checks()
