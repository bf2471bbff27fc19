"""What is right in exercise 43 (by sorting; times by raising them until they fit), and what is often wrong."""

from practice.part import Part, mistake

COST = {"F": 1, "B": 2}


def right_count(rank, p, v, m):
    """The first forward of the last rank's last chunk is where warming up ends there."""
    forwards = sorted((i // p, chunk, i) for chunk in range(v) for i in range(m))
    last = next(n for n, (_, chunk, _) in enumerate(forwards) if chunk == v - 1)
    return min(last + 2 * (p - 1 - rank), len(forwards))


def right_plan(rank, p, v, m, filled=True):
    """filled: the last group is planned full."""
    there, m = m, m + -m % p if filled else m
    pairs = [(chunk, i) for chunk in range(v) for i in range(m)]
    ahead = [("F", c, i) for c, i in sorted(pairs, key=lambda x: (x[1] // p, x[0], x[1]))]
    back = [("B", c, i) for c, i in sorted(pairs, key=lambda x: (x[1] // p, -x[0], x[1]))]
    first = right_count(rank, p, v, m)
    # In turn: the backward that is `first` forwards behind goes after each forward.
    order = [(n, 0, op) for n, op in enumerate(ahead)] + [(n + first, 1, op) for n, op in enumerate(back)]
    return [op for _, _, op in sorted(order) if op[2] < there]


def need(kind, stage, i, stages):
    """The operation whose result this one takes in."""
    if kind == "F":
        return ("F", stage - 1, i) if stage else None
    return ("B", stage + 1, i) if stage + 1 < stages else ("F", stage, i)


def never_run(plans, v):
    """How many operations of these plans wait for ever."""
    p, done, at = len(plans), {None}, [0] * len(plans)
    while True:
        before = sum(at)
        for r, plan in enumerate(plans):
            while at[r] < len(plan):
                kind, chunk, i = plan[at[r]]
                if need(kind, chunk * p + r, i, p * v) not in done:
                    break
                done.add((kind, chunk * p + r, i))
                at[r] += 1
        if sum(at) == before:
            return sum(map(len, plans)) - before


def in_flight(plan):
    now = most = 0
    for kind, _, _ in plan:
        now += 1 if kind == "F" else -1
        most = max(most, now)
    return most


# --- the parts


def numbers(draw, ranks, chunks, m):
    return {"ranks": ranks, "chunks": chunks, "m": m}


def warm_up(code, a, at):
    m = a["m"] + -a["m"] % a["ranks"]
    return {f"warm_up[{r}]": code.warm_up(r, a["ranks"], a["chunks"], m) for r in range(a["ranks"])}


def want_warm_up(a, ref, at):
    m = a["m"] + -a["m"] % a["ranks"]
    return {f"warm_up[{r}]": right_count(r, a["ranks"], a["chunks"], m) for r in range(a["ranks"])}


def shown(plans, v):
    return {
        "operations that wait for ever": never_run(plans, v),
        "most in flight, by rank": [in_flight(plan) for plan in plans],
    } | {f"plan[{r}]": [list(op) for op in plan] for r, plan in enumerate(plans)}


def schedule(code, a, at):
    found = [code.schedule(r, a["ranks"], a["chunks"], a["m"]) for r in range(a["ranks"])]
    return shown([[(str(kind), int(chunk), int(i)) for kind, chunk, i in plan] for plan in found], a["chunks"])


def want_schedule(a, ref, at):
    return shown([right_plan(r, a["ranks"], a["chunks"], a["m"]) for r in range(a["ranks"])], a["chunks"])


def any_order(draw, p, v, m):
    """Plans that run, of no schedule: at each step one of the operations that could be next."""
    plans, done = [[] for _ in range(p)], {None}
    left = {(kind, s, i) for kind in "FB" for s in range(p * v) for i in range(m)}
    while left:
        able = sorted(op for op in left if need(*op, p * v) in done)
        kind, s, i = able[int(draw.rng.integers(len(able)))]
        left.remove((kind, s, i))
        done.add((kind, s, i))
        plans[s % p].append((kind, s // p, i))
    return plans


def plans(draw, ranks, chunks, m, order):
    """order: 0 the right one, 1 any that runs, 2 all forwards first, 3 backwards first on rank 0, 4 the last group as small as
    it is, 5 one backward before its own forward, 6 one micro-batch after the other."""
    p, v = ranks, chunks
    made = [right_plan(r, p, v, m) for r in range(p)]
    if order == 1:
        made = any_order(draw, p, v, m)
    if order == 2:
        made = [sorted(plan, key=lambda op: op[0] == "B") for plan in made]
    if order == 3:
        made[0] = sorted(made[0], key=lambda op: (op[0] == "F", op[2]))
    if order == 4:
        made = [right_plan(r, p, v, m, filled=False) for r in range(p)]
    if order == 5:
        made[-1].remove(("B", v - 1, 0))
        made[-1].insert(made[-1].index(("F", v - 1, 0)), ("B", v - 1, 0))
    if order == 6:
        made = [sorted(plan, key=lambda op: op[2]) for plan in made]
    return {"plans": made, "chunks": v}


def makespan(code, a, at):
    plans = [list(plan) for plan in a["plans"]]
    return {"when all is done": code.makespan(plans, a["chunks"]), "plans left alone": plans == a["plans"]}


def want_makespan(a, ref, at):
    """Every operation ends at 0 at first; ends are raised until none is too early. Those of a circle would rise for ever."""
    p, v = len(a["plans"]), a["chunks"]
    ops = [[(kind, chunk * p + r, i) for kind, chunk, i in plan] for r, plan in enumerate(a["plans"])]
    behind = {op: {before, need(*op, p * v)} - {None} for own in ops for before, op in zip([None, *own[:-1]], own, strict=True)}
    ends, raised, most = dict.fromkeys(behind, 0), True, 2 * sum(map(len, ops))
    while raised:
        raised = False
        for op, inputs in behind.items():
            end = max([0, *(ends[b] for b in inputs)]) + COST[op[0]]
            if end > most:
                return {"when all is done": None, "plans left alone": True}
            raised, ends[op] = raised or end > ends[op], end
    return {"when all is done": max(ends.values()), "plans left alone": True}


def random_numbers(rng):
    return int(rng.integers(2, 6)), int(rng.integers(2, 4)), int(rng.integers(1, 9))


def random_plans(rng):
    return int(rng.choice([2, 3])), 2, int(rng.integers(2, 5)), 1


SIZES = ((4, 2, 8), (3, 2, 3), (2, 3, 5), (4, 3, 2), (3, 3, 7))
ORDERS = ((3, 2, 6, 0), (2, 2, 3, 1), (2, 3, 2, 2), (3, 2, 3, 3), (4, 3, 5, 4), (2, 2, 4, 5), (2, 2, 2, 6))
PARTS = (
    Part("warm_up", SIZES, numbers, warm_up, want_warm_up, random_size=random_numbers, dtypes=("float64",)),
    Part("schedule", SIZES, numbers, schedule, want_schedule, random_size=random_numbers, dtypes=("float64",)),
    Part("makespan", ORDERS, plans, makespan, want_makespan, random_size=random_plans, dtypes=("float64",)),
)

FIRST = "first = 2 * (ranks - 1 - rank) + (chunks - 1) * ranks"
TURN = "plan += [forwards[n], backwards[n - first]]"
AHEAD = '        for chunk in range(chunks):\n            forwards += [("F", chunk, i) for i in group]\n'
BACK = '        for chunk in reversed(range(chunks)):\n            backwards += [("B", chunk, i) for i in group]\n'
MISTAKES = (
    mistake("one_a_rank", "Each rank warms up by one forward more than the rank behind it, as in 1F1B: here it is two, as a result is on its way"
            " while its rank works on.", (FIRST, "first = ranks - 1 - rank + (chunks - 1) * ranks"), seen="NVIDIA/Megatron-LM #675"),
    mistake("times_chunks", "The distance to the last rank is multiplied by the chunks: all but the last chunk are warmed up whole, and two"
            " forwards come on top a rank.", (FIRST, "first = (ranks - 1 - rank) * chunks"), seen="NVIDIA/Megatron-LM #169"),
    mistake("one_chunk", "The last rank does not warm up at all: the first micro-batches have to go through its other chunks before the last one.",
            (FIRST, "first = 2 * (ranks - 1 - rank)")),
    mistake("all_chunks", "The last rank warms up with its last chunk, too: a backward can follow each forward there.",
            (FIRST, "first = 2 * (ranks - 1 - rank) + chunks * ranks")),
    mistake("by_chunks", "Groups of p micro-batches go through v - 1 chunks in the warming up: you have v - 1 forwards, not (v - 1) p.",
            (FIRST, "first = 2 * (ranks - 1 - rank) + chunks - 1")),
    mistake("plain", "That is the warming up of 1F1B with one chunk a rank: here it is two forwards a rank, and (v - 1) p for the earlier chunks.",
            (FIRST, "first = ranks - 1 - rank")),
    mistake("one_more", "The forward that is followed by a backward is counted as warming up: it is the first of those that go in turn.",
            ("return min(first, m * chunks)", "return min(first + 1, m * chunks)")),
    mistake("wrong_end", "The warming up grows towards the last rank: it is the first one that waits longest for a gradient.",
            (FIRST, "first = 2 * rank + (chunks - 1) * ranks")),
    mistake("past_the_end", "The warming up runs past the last forward: there are m v of them.",
            ("return min(first, m * chunks)", "return first"), ("len(forwards) - first :", "max(len(forwards) - first, 0) :")),
    mistake("up_to_m", "The warming up ends at m: a rank has m forwards a chunk, m v in all.", ("min(first, m * chunks)", "min(first, m)")),
    mistake("all_forwards", "All forwards come first, then all backwards: then all m v are in flight.",
            ("    first = warm_up(rank, ranks, chunks, full)\n", "    first = len(forwards)\n")),
    mistake("chunk_by_chunk", "All micro-batches go through a chunk before the next one begins: they go in groups of p.",
            ("range(0, full, ranks)", "[0]"), ("range(start, start + ranks)", "range(full)")),
    mistake("one_at_a_time", "Each micro-batch goes through all chunks before the next one begins: a group of p goes through a chunk, then through"
            " the next.", (AHEAD, "        forwards += [(\"F\", chunk, i) for i in group for chunk in range(chunks)]\n"),
            (BACK, "        backwards += [(\"B\", chunk, i) for i in group for chunk in reversed(range(chunks))]\n")),
    mistake("forwards_one_at_a_time", "Forwards go through all chunks one micro-batch at a time: a group of p goes through a chunk, then through the"
            " next, as with your backwards.", (AHEAD, "        forwards += [(\"F\", chunk, i) for i in group for chunk in range(chunks)]\n")),
    mistake("groups_of_v", "The groups have v micro-batches: they have p, so that the first comes back from the last rank as the last one leaves.",
            ("range(0, full, ranks)", "range(0, full, chunks)"), ("range(start, start + ranks)", "range(start, start + chunks)")),
    mistake("chunks_forward", "The backwards go through the chunks from the first: gradients come from the end of the model, so the last chunk is first.",
            ("reversed(range(chunks))", "range(chunks)")),
    mistake("newest_first", "In a group the backwards go from the newest micro-batch to the oldest: they keep the order of the forwards.",
            ('[("B", chunk, i) for i in group]', '[("B", chunk, i) for i in reversed(group)]')),
    mistake("backward_first", "In turn, the backward comes before the forward: a forward is first.", (TURN, "plan += [backwards[n - first], forwards[n]]")),
    mistake("no_end", "The backwards that are left at the end are missing.", ("    plan += backwards[len(forwards) - first :]\n", "")),
    mistake("short_group", "The last group is planned as small as it is: then ranks may wait for each other for ever. Plan it full, and leave out"
            " what is not there.", ("    full = -(-m // ranks) * ranks\n", "    full = m\n"), ("range(start, start + ranks)", "range(start, min(start + ranks, full))")),
    mistake("surplus_kept", "There are micro-batches that do not exist: those with which the last group was filled are to be left out.",
            ("for kind, chunk, i in plan if i < m]", "for kind, chunk, i in plan]")),
    mistake("rest_lost", "The last group is left out: m need not be a multiple of p.", ("full = -(-m // ranks) * ranks", "full = m // ranks * ranks")),
    mistake("stages_named", "Stages are named where the rank's own chunks are asked for: chunk s // p, from 0 to v - 1.",
            ("return [(kind, chunk, i) for", "return [(kind, chunk * ranks + rank, i) for")),
    mistake("consecutive", "The times are those of ranks that hold consecutive stages: the next stage is on the next rank, stage s on rank s % p.",
            ("stage = chunk * ranks + rank", "stage = rank * chunks + chunk")),
    mistake("own_chunk", "A forward waits for the chunk before it on its own rank: its input comes from the stage before, which is another rank's.",
            ('need = ("F", stage - 1, i)', 'need = ("F", stage - ranks, i)')),
    mistake("chunks_at_once", "On rank 0 the forwards of every chunk begin at once: only the first chunk's have their input, the others wait for the last"
            " rank's chunk before.", ('need = ("F", stage - 1, i)', 'need = ("F", stage - 1 if rank else -1, i)')),
    mistake("backward_at_once", "A backward of the last stage does not wait for its forward.", ('need = ("F", stage, i)', 'need = ("F", -1, i)')),
    mistake("own_forward", "A backward waits for its own forward alone: it needs the gradient that the stage behind it makes.",
            ('need = ("B", stage + 1, i)', 'need = ("F", stage, i)')),
    mistake("as_long", "A backward takes as long as a forward: it takes 2.", ("(1 if kind == \"F\" else 2)", "1")),
    mistake("never_busy", "An operation begins as its input is there although its rank is still at work.",
            ("begin = max(free[rank], ends.get(need, 0))", "begin = ends.get(need, 0)")),
    mistake("last_of_each_chunk", "Every backward of the last rank waits for its own forward: only the last chunk's does, the others for the backward of"
            " the stage behind, on rank 0.", ("elif stage == last:", "elif rank == ranks - 1:")),
    mistake("never_idle", "An operation begins as its rank is free although its input is not there yet: the times are those of work without waiting.",
            ("begin = max(free[rank], ends.get(need, 0))", "begin = free[rank]")),
    mistake("last_rank", "The time is that of the last rank's last operation: the latest of all ranks is asked for.", ("return max(free)", "return free[-1]")),
    mistake("plans_emptied", "The plans that were given are emptied: leave them as they are, and count how far each rank has come.",
            ("                at[rank] += 1\n", "                plan.pop(0)\n")),
    mistake("no_none", "Where ranks wait for each other for ever, a time is returned: None is asked for.", ("        return None\n", "        return max(free)\n")),
)  # fmt: skip
