"""What is right in exercise 25, and what is often wrong."""

from practice.part import Part, mistake


def inputs(draw, N, ranks):
    # Numbers whose sums are exact, whatever their order, and so far apart that a sum tells of what it is made.
    return {"x_rN": draw.whole(-99_999, 100_000, ranks, N)}


def call(code, a, ring):
    return {"y": code.all_reduce(a["x_rN"][ring.rank], ring)}


def want(a, ref, ring):
    return {"y": a["x_rN"].sum(axis=0)}


def ingredients(a, ref, ring):
    return {"y": {f"x of rank {r}": x_N for r, x_N in enumerate(a["x_rN"])}}


def limits(a, ring):
    N, p = a["x_rN"].shape[1], ring.size
    largest = -(-N // p)
    return {"ranks sent to": 1, "messages": 2 * (p - 1), "largest message": largest, "numbers sent": 2 * (p - 1) * largest}


PARTS = (
    Part(
        "all_reduce",
        ((10, 4), (3, 4), (8, 4), (23, 4)),
        inputs,
        call,
        want,
        ingredients,
        limits,
        random_size=lambda rng: (int(rng.integers(5, 40)), 4),
        exact=("y",),
    ),
)

FIRST = "chunks[into] += ring.sendrecv(right, chunks[out], left)"
SECOND = "chunks[into] = ring.sendrecv(right, chunks[out], left)"
RIGHT = "    right, left = (r + 1) % p, (r - 1) % p\n"
MISTAKES = (
    mistake("all_send", "All ranks send before any receives; MPI lets this pass with 8 numbers and hangs with 1 MB.",
            (FIRST, "ring.send(right, chunks[out])\n        chunks[into] += ring.recv(left)"),
            (SECOND, "ring.send(right, chunks[out])\n        chunks[into] = ring.recv(left)")),
    mistake("all_receive", "All ranks receive before any sends: nobody begins.",
            (FIRST, "got = ring.recv(left)\n        ring.send(right, chunks[out])\n        chunks[into] += got"),
            (SECOND, "got = ring.recv(left)\n        ring.send(right, chunks[out])\n        chunks[into] = got")),
    mistake("index_off", "In the first phase the chunk that arrives is added one place too far: what the left rank sent at this"
            " step is chunk r - step - 1.", ("(r - step) % p, (r - step - 1) % p", "(r - step) % p, (r - step - 2) % p")),
    mistake("no_second_phase", "The second phase is missing: each rank has one finished chunk and nobody passes it on.",
            (f"        {SECOND}", "        pass")),
    mistake("second_adds", "The second phase adds: finished chunks replace what is there.",
            (SECOND, SECOND.replace("=", "+=", 1))),
    mistake("second_from_own", "Chunks with one rank's numbers alone go round in the second phase: either it starts with chunk r, and the one"
            " that this rank has finished is r + 1; or the first phase has replaced what it should add to.",
            ("(r + 1 - step) % p, (r - step) % p", "(r - step) % p, (r - step - 1) % p")),
    mistake("step_short", "A phase has p - 1 steps, here it has p - 2.", ("range(p - 1)", "range(p - 2)")),
    mistake("first_short", "The first phase stops a step early, or is missing: the chunks that go round in the second are not yet complete.",
            ("    for step in range(p - 1):\n        out, into = (r - step) % p, (r - step - 1)",
             "    for step in range(p - 2):\n        out, into = (r - step) % p, (r - step - 1)")),
    mistake("own_twice", "A rank's own numbers are in the chunk that it finishes twice: they are added on the way, and once more at the end.",
            ("    for step in range(p - 1):\n        out, into = (r - step)",
             "    own = chunks[(r + 1) % p].copy()\n    for step in range(p - 1):\n        out, into = (r - step)"),
            ("    for step in range(p - 1):\n        out, into = (r + 1 -",
             "    chunks[(r + 1) % p] += own\n    for step in range(p - 1):\n        out, into = (r + 1 -")),
    mistake("second_short", "The second phase stops a step early: one finished chunk has not come to each rank.",
            ("    for step in range(p - 1):\n        out, into = (r + 1 -", "    for step in range(p - 2):\n        out, into = (r + 1 -")),
    mistake("remainder", "The last N mod p numbers are not summed: chunks of N // p do not cover N.",
            ("np.array_split(x_N, p)", "x_N[: len(x_N) // p * p].reshape(p, -1)"),
            ("return np.concatenate(chunks)", "return np.concatenate([*chunks, x_N[len(x_N) // p * p :]])")),
    mistake("whole_array", "The sum is right, but whole arrays went round: p - 1 messages of N. A ring moves 2 (p - 1) of N/p.",
            ("    for step in range(p - 1):\n        out, into = (r - step) % p, (r - step - 1) % p\n        " + FIRST,
             "    sent, total = x_N, x_N.copy()\n    for step in range(p - 1):\n        sent = ring.sendrecv(right, sent, left)\n"
             "        total += sent"),
            ("    for step in range(p - 1):\n        out, into = (r + 1 - step) % p, (r - step) % p\n        " + SECOND, ""),
            ("return np.concatenate(chunks)", "return total")),
    mistake("first_long", "The first phase takes p steps: in the last one each chunk comes back to the rank that it began with, and is added to it"
            " once more. It takes p - 1.",
            ("    for step in range(p - 1):\n        out, into = (r - step) % p, (r - step - 1) % p\n", "    for step in range(p):\n        out, into = (r - step) % p, (r - step - 1) % p\n"),
            ("out, into = (r + 1 - step) % p, (r - step) % p", "out, into = (r - step) % p, (r - step - 1) % p")),
    mistake("star", "The sum is right, but all ranks send to one, which adds up and sends to all: on a ring each rank sends to its neighbour"
            " alone, chunks and not whole arrays.",
            (RIGHT, "    if r == 0:\n        total = x_N.copy()\n        for i in range(1, p):\n            total += ring.recv(i)\n        for i in range(1, p):\n"
             "            ring.send(i, total)\n        return total\n    ring.send(0, x_N)\n    return ring.recv(0)\n" + RIGHT)),
    mistake("to_everyone", "The sum is right, but each rank sends its whole array to all others: on a ring each rank sends to its neighbour"
            " alone, chunks and not whole arrays.",
            (RIGHT, "    total = x_N.copy()\n    for step in range(1, p):\n        total += ring.sendrecv((r + step) % p, x_N, (r - step) % p)\n    return total\n" + RIGHT)),
    mistake("in_place", "x is changed in place: array_split gives views, so adding to a chunk adds to the caller's array.",
            ("c.copy() for c in", "c for c in")),
)  # fmt: skip
