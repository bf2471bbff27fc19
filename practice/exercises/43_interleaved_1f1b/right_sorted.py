"""All operations, sorted; the makespan is the longest path, by recursion with a mark against circles."""


def warm_up(rank, ranks, chunks, m):
    return min(m * chunks, ranks * (chunks + 1) - 2 * (rank + 1))


def schedule(rank, ranks, chunks, m):
    pairs = [(c, i) for c in range(chunks) for i in range(m + -m % ranks)]
    ahead = [("F", c, i) for c, i in sorted(pairs, key=lambda x: (x[1] // ranks, x[0], x[1]))]
    back = [("B", c, i) for c, i in sorted(pairs, key=lambda x: (x[1] // ranks, -x[0], x[1]))]
    w = warm_up(rank, ranks, chunks, m + -m % ranks)
    steady = [op for pair in zip(ahead[w:], back, strict=False) for op in pair]
    return [op for op in ahead[:w] + steady + back[len(ahead) - w :] if op[2] in range(m)]


def makespan(plans, chunks):
    p = len(plans)
    before, found = {}, {}
    for rank, plan in enumerate(plans):
        previous = None
        for kind, chunk, i in plan:
            op = (kind, chunk * p + rank, i)
            before[op] = previous
            previous = op

    def end(op):
        if op is None:
            return 0.0
        if op not in before:
            return float("inf")
        if op not in found:
            found[op] = float("inf")
            kind, s, i = op
            behind = ("B", s + 1, i) if s < p * chunks - 1 else ("F", s, i)
            need = behind if kind == "B" else ("F", s - 1, i) if s else None
            found[op] = max(end(before[op]), end(need)) + (2 if kind == "B" else 1)
        return found[op]

    latest = max(end(op) for op in before)
    return None if latest == float("inf") else int(latest)
