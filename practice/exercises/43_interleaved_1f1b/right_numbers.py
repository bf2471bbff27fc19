"""Chunk and micro-batch from the number of an operation, as Megatron has it; time goes by in ticks."""


def warm_up(rank, ranks, chunks, m):
    count = (chunks - 1) * ranks
    for _ in range(rank + 1, ranks):
        count += 2
    return count if count < m * chunks else m * chunks


def schedule(rank, ranks, chunks, m):
    total = (m + ranks - 1) // ranks * ranks * chunks
    ahead = warm_up(rank, ranks, chunks, total // chunks)
    plan = []

    def add(kind, n):
        group, within = divmod(n, ranks * chunks)
        chunk, i = within // ranks, group * ranks + within % ranks
        if i < m:
            plan.append((kind, chunk if kind == "F" else chunks - 1 - chunk, i))

    for n in range(total + ahead):
        if n < total:
            add("F", n)
        if n >= ahead:
            add("B", n - ahead)
    return plan


def makespan(plans, chunks):
    queues = [list(plan)[::-1] for plan in plans]
    busy = [None] * len(plans)
    done, time = set(), 0
    ranks = len(plans)
    while any(queues) or any(busy):
        for rank, work in enumerate(busy):
            if work and work[1] == time:
                done.add(work[0])
                busy[rank] = None
        for rank, queue in enumerate(queues):
            if queue and not busy[rank]:
                kind, chunk, i = queue[-1]
                s = rank + chunk * ranks
                if kind == "F":
                    may = s == 0 or ("F", s - 1, i) in done
                else:
                    may = (("B", s + 1, i) if s + 1 < ranks * chunks else ("F", s, i)) in done
                if may:
                    queue.pop()
                    busy[rank] = ((kind, s, i), time + (1 if kind == "F" else 2))
        if not any(busy) and any(queues):
            return None
        time += any(busy)
    return time
