"""Plans as data: text, what each operation needs and sends, what is wrong with a plan, and that `check` is right about it."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from parallel.schedule import Op, Plan, check, forward_only, in_order, read
from parallel.schedules import SCHEDULES, interleaved, plan
from parallel.simulation import Costs, simulate
from tests.parallel.on_threads import runs

ONE_F_ONE_B = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def refusal(what, *arguments, **options):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        what(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- text


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_and_back(name):
    made = plan(name, 3, 7)
    assert read(made.text()) == made
    assert plan("1f1b", 2, 2).text() == ONE_F_ONE_B


def test_blanks_say_nothing():
    """PyTorch's files have empty words where a rank idles."""
    assert read("0F0, 0F1,,0B0,0B1,\r\n,1F0,1B0 ,1F1,,1B1\n\n") == read(ONE_F_ONE_B)


@pytest.mark.parametrize("word", ["3X1", "F1", "3F", "3f1", "-1F0", "0F0 0F1", "٣F1"])
def test_a_mistake_is_named(word):
    said = f"line 2: {word!r} is no operation: write stage, F, I, W or B, and micro-batch, as in 3F1"
    assert refusal(read, f"0F0,0B0\n1F0,{word},1B0\n") == said


# --- what goes where


def test_needs_and_sends():
    v = plan("dualpipe-v", 2, 4)
    assert v.needs(Op("F", 0, 1)) is v.needs(Op("B", 3, 1)) is v.needs(Op("W", 0, 2)) is None
    assert v.needs(Op("F", 2, 1)) == Op("F", 1, 1)
    # A backward is named as the plan has it, whole or in halves.
    assert (v.needs(Op("B", 1, 0)), v.needs(Op("I", 1, 3))) == (Op("B", 2, 0), Op("I", 2, 3))
    assert (v.to(Op("F", 0, 0)), v.to(Op("F", 1, 0)), v.to(Op("F", 3, 0)), v.to(Op("I", 0, 2))) == (1, 1, None, None)
    # At the turn nothing is sent: F1 and B2 stay on rank 1.
    assert ",".join(map(str, v.sent(1, 0))) == "2F0,2F1,2F2,1B0,2F3,1B1,1B2,1I3"
    assert v.sent(1, 1) == []


@pytest.mark.parametrize("name", SCHEDULES)
def test_as_many_messages_as_stages_say(name):
    p, m = 3, 6
    made = plan(name, p, m)
    messages = sum(len(made.sent(a, b)) for a in range(p) for b in range(p))
    assert messages == (2 * m * (2 * p - 2) if name in ("zb-v", "dualpipe-v") else 2 * m * (made.stages - 1))


def test_forward_only():
    made = forward_only(plan("zb-v", 2, 4).rank_of, 2)
    assert made.text() == "0F0,0F1,3F0,3F1\n1F0,2F0,1F1,2F1\n"
    check(made, 4, 2, backward=False)
    assert refusal(check, made, 4, 2) == "stage 0 has F of micro-batch 0: give it one F and either B, or I and W"
    for name in SCHEDULES:
        # Nobody waits but for the first micro-batch to come: on a V each rank's second chunk comes p stages later.
        p, m = 4, 16
        whole = plan(name, p, m)
        made = forward_only(whole.rank_of, m)
        assert made.rank_of == whole.rank_of
        least = m * made.stages // p + p - 1
        assert least <= simulate(made, Costs(((1, 0, 0),) * made.stages)).makespan <= least + p - 1


# --- what is wrong with a plan


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "0F0,0B0\n1F0,1B0,1F1": "rank 1 has 1F1: use stages 0 to 1 and micro-batches 0 to 0",
        "0F0,0B0\n1F0,1B0,2F0": "rank 1 has 2F0: use stages 0 to 1 and micro-batches 0 to 0",
        "0F0,0B0,0F0\n1F0,1B0": "0F0 is there twice, the second time on rank 0: leave one out",
        "0F0,1B0\n1F0,0B0": "stage 0 is on ranks 0 and 1: put all its operations on one",
        "0F0,0B0\n1F0": "stage 1 has F of micro-batch 0: give it one F and either B, or I and W",
        "0F0,0B0\n1F0,1I0": "stage 1 has F and I of micro-batch 0: give it one F and either B, or I and W",
        "0F0,0B0\n1F0,1I0,1W0,1B0": "stage 1 has F and I and W and B of micro-batch 0: give it one F and either B, or I and W",
        "0F0,0B0": "stage 1 has nothing of micro-batch 0: give it one F and either B, or I and W",
        "": "stage 0 has nothing of micro-batch 0: give it one F and either B, or I and W",
        "0F0,0B0\n1B0,1F0": "rank 1 has 1B0 before 1F0, which it needs: exchange them",
        "0F0,0B0\n1F0,1W0,1I0": "rank 1 has 1W0 before 1I0, which it needs: exchange them",
        "1F0,0F0,1B0,0B0": "rank 0 has 1F0 before 0F0, which it needs: exchange them",
    }.items(),
)
def test_what_is_wrong(text, said):
    assert refusal(check, read(text), 2, 1) == said


def test_who_waits_for_whom():
    two = read("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1")
    assert refusal(check, two, 2, 2) == "rank 0 waits at 0B0 for 1B0 of rank 1, which waits at 1F1 for 0F1 of rank 0"
    assert refusal(simulate, two, Costs.alike(two, 1, 1, 1)).startswith("rank 0 waits at 0B0")
    # Rank 0 waits too, and is in no circle.
    three = read("0F0,0F1,0I0,0W0,0B1\n1F0,1I0,1F1,1W0,1I1,1W1\n2F0,2F1,2I0,2W0,2B1")
    assert refusal(check, three, 3, 2) == "rank 1 waits at 1I0 for 2I0 of rank 2, which waits at 2F1 for 1F1 of rank 1"


# --- `check` beside threads


def mixed(made, rng, swaps):
    """The same with some operations exchanged, each with one near it, on one rank and, as a rule, of another micro-batch."""
    ranks = [list(ops) for ops in made.ranks]
    for _ in range(swaps):
        ops = rng.choice([ops for ops in ranks if ops])
        i = rng.randrange(len(ops))
        j = min(len(ops) - 1, max(0, i + rng.randint(-4, 4)))
        if ops[i].micro_batch != ops[j].micro_batch or rng.random() < 0.2:
            ops[i], ops[j] = ops[j], ops[i]
    return Plan(tuple(map(tuple, ranks)))


def anything(rng):
    """A plan of any schedule, or one that nobody thought of: any placement, any order in which one process could do it."""
    p, m = rng.choice((1, 2, 2, 3, 3, 4)), rng.randint(1, 6)
    name = rng.choice([*SCHEDULES, "any", "ragged"])
    if name == "ragged":
        return interleaved(p, m, rng.randint(1, 4), rng.randint(1, 4), rng.randint(0, 2))
    if name != "any":
        return plan(name, p, max(m, SCHEDULES[name].least(p)), rng.randint(1, 3) if name == "interleaved" else None)
    stages = rng.randint(1, 6)
    home = [rng.randrange(p) for _ in range(stages)]
    left = [[*_way(rng, stages)] for _ in range(m)]
    ranks = [[] for _ in range(p)]
    while any(left):
        i = rng.choice([i for i, way in enumerate(left) if way])
        kind, s = left[i].pop(0)
        ranks[home[s]].append(Op(kind, s, i))
    return Plan(tuple(map(tuple, ranks)))


def _way(rng, stages):
    """One micro-batch's operations, in an order in which they can be done."""
    yield from (("F", s) for s in range(stages))
    for s in reversed(range(stages)):
        yield from [("B", s)] if rng.random() < 0.5 else [("I", s), ("W", s)]


def ends(made):
    """Whether `check` lets it pass, and if not, why."""
    try:
        check(made, made.stages, made.micro_batches)
    except ValueError as error:
        return False, "circle" if "waits at" in str(error) else "order"
    return True, "runs"


def test_check_lets_pass_exactly_what_threads_run(pool):
    rng = random.Random(5)
    seen = Counter()
    for _ in range(2000):
        made = mixed(anything(rng), rng, rng.choice((0, 0, 1, 2, 4, 6)))
        passes, why = ends(made)
        seen[why] += 1
        assert runs(made, pool) == passes, (why, made.text())
        if passes:
            holds(made, rng)
    assert min(seen.values()) > 100, seen


def holds(made, rng):
    """Of any costs: each operation takes its time, as soon as what it needs is there and the one before it has ended."""
    part = lambda: Fraction(rng.randint(0, 12), rng.randint(1, 5))  # noqa: E731
    costs = Costs(tuple((part(), part(), part()) for _ in range(made.stages)), part())
    t = simulate(made, costs)
    ends = {op: end for ops, times in zip(made.ranks, t.times, strict=True) for op, (_, end) in zip(ops, times, strict=True)}
    for rank, (ops, times) in enumerate(zip(made.ranks, t.times, strict=True)):
        before = 0
        for op, (begin, end) in zip(ops, times, strict=True):
            need = made.needs(op)
            come = 0 if need is None else ends[need] + (costs.hop if made.place[need] != rank else 0)
            assert (begin, end) == (max(before, come), begin + costs.of(op))
            before = end
    assert t.makespan == max(ends.values()) >= t.span >= max(t.busy)
    assert len([*in_order(made)]) == len(made.place)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sends_that_wait_deadlock_in_every_schedule_but_gpipe(pool, name):
    for p in (2, 3, 4):
        assert name == "dualpipe-v" or runs(plan(name, p, 1), pool, rendezvous=True)
        # Interleaved is as GPipe while all forwards are warm-up.
        first = max(3 if name == "interleaved" else 2, SCHEDULES[name].least(p))
        for m in range(first, first + 4):
            made = plan(name, p, m)
            assert runs(made, pool)
            assert runs(made, pool, rendezvous=True) == (name == "gpipe"), (p, m)
