"""Interleaved 1F1B (Megatron, 2104.04473, section 2.2): the order in which a rank works that has several pieces of the model.

p ranks, v >= 2 chunks a rank: stage s of the p v stages is chunk s // p of rank s % p. The m micro-batches go in groups of p. Forwards of
a rank: group after group, in a group chunk after chunk, in a chunk by micro-batches. Its backwards likewise, but the chunks from the
last to the first. It runs some forwards alone, warming up, then a forward and a backward in turn, then the backwards that are left.
The last rank warms up until the first forward of its last chunk is next; each rank before it warms up by two forwards more than the
rank behind it, for the way there and the way back. A rank never has more than m v forwards. If m is no multiple of p, the plan is that of
the next multiple, without the micro-batches that are not there: planned otherwise, ranks may wait for each other for ever.

makespan: an operation begins as soon as its rank has done the one before it in the plan, and its input has been made: the forward of
the stage before, for a backward that of the stage behind it, at the last stage its own forward. A forward takes 1, a backward 2,
a message no time. None if ranks wait for each other, so that not all is done. Leave the plans as they are.
"""


def warm_up(rank, ranks, chunks, m):
    """m: a multiple of ranks -> how many forwards the rank runs alone, before forwards and backwards go in turn."""
    # --- yours ---
    first = 2 * (ranks - 1 - rank) + (chunks - 1) * ranks
    return min(first, m * chunks)
    # --- end ---


def schedule(rank, ranks, chunks, m):
    """-> what the rank does, in order: a list of ("F", chunk, i) and ("B", chunk, i), each chunk and micro-batch i once."""
    # --- yours ---
    full = -(-m // ranks) * ranks
    forwards, backwards = [], []
    for start in range(0, full, ranks):
        group = range(start, start + ranks)
        for chunk in range(chunks):
            forwards += [("F", chunk, i) for i in group]
        for chunk in reversed(range(chunks)):
            backwards += [("B", chunk, i) for i in group]
    first = warm_up(rank, ranks, chunks, full)
    plan = forwards[:first]
    for n in range(first, len(forwards)):
        plan += [forwards[n], backwards[n - first]]
    plan += backwards[len(forwards) - first :]
    return [(kind, chunk, i) for kind, chunk, i in plan if i < m]
    # --- end ---


def makespan(plans, chunks):
    """plans: what each rank does, in order, as `schedule` has it -> when all is done, or None."""
    # --- yours ---
    ranks, last = len(plans), len(plans) * chunks - 1
    ends, at, free = {}, [0] * ranks, [0] * ranks
    moved = True
    while moved:
        moved = False
        for rank, plan in enumerate(plans):
            while at[rank] < len(plan):
                kind, chunk, i = plan[at[rank]]
                stage = chunk * ranks + rank
                if kind == "F":
                    need = ("F", stage - 1, i)
                elif stage == last:
                    need = ("F", stage, i)
                else:
                    need = ("B", stage + 1, i)
                if need not in ends and need[1] >= 0:
                    break
                begin = max(free[rank], ends.get(need, 0))
                free[rank] = begin + (1 if kind == "F" else 2)
                ends[kind, stage, i] = free[rank]
                at[rank] += 1
                moved = True
    if any(at[rank] < len(plan) for rank, plan in enumerate(plans)):
        return None
    return max(free)
    # --- end ---
