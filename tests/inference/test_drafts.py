"""Guesses of the next tokens: how many are run, what is taken back, and what can come of a step."""

import pytest

from inference.scheduler import Scheduler
from tests.inference.hashed import IDS, Engine


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
