"""What is right in exercise 26, and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def parts_of(draw, N, ranks):
    """Numbers whose sums are exact, whatever their order, cut anywhere: parts of any length, empty ones too."""
    edges = np.sort(draw.rng.integers(0, N + 1, ranks - 1))
    lengths = np.diff([0, *edges.tolist(), N])
    if 2 * ranks <= N:
        # No two alike where there is room for it.
        lengths = np.array([1, 0, 3, *[2] * (ranks - 3)])
        lengths[-1] += N - lengths.sum()
        # The empty one in the middle, last or first.
        lengths = np.roll(lengths, 2 * (N < 9) + 3 * (N > 20))
    return {"x_N": draw.whole(-99, 100, N), "lengths": lengths.tolist()}


def wholes(draw, N, ranks):
    return {"x_rN": draw.whole(-99, 100, ranks, N)}


def gather(code, a, ring):
    first = sum(a["lengths"][: ring.rank])
    return {"y": code.all_gather(a["x_N"][first : first + a["lengths"][ring.rank]], ring)}


def scatter(code, a, ring):
    return {"y": code.reduce_scatter(a["x_rN"][ring.rank], ring)}


def want_gather(a, ref, ring):
    return {"y": a["x_N"]}


def want_scatter(a, ref, ring):
    return {"y": a["x_rN"].sum(axis=0)[ring.cut(a["x_rN"].shape[1])]}


def terms(a, ref, ring):
    mine = ring.cut(a["x_rN"].shape[1])
    return {"y": {f"x of rank {r}": x_N[mine] for r, x_N in enumerate(a["x_rN"])}}


def gather_limits(a, ring):
    return {
        "ranks sent to": 1,
        "messages": ring.size - 1,
        "largest message": max(a["lengths"]),
        "numbers sent": a["x_N"].size - min(a["lengths"]),
    }


def scatter_limits(a, ring):
    N, p = a["x_rN"].shape[1], ring.size
    mine = ring.cut(N)
    return {"ranks sent to": 1, "messages": p - 1, "largest message": -(-N // p), "numbers sent": N - (mine.stop - mine.start)}


def random_size(rng):
    return int(rng.integers(5, 40)), 4


PARTS = (
    Part("all_gather", ((11, 4), (3, 4), (8, 4), (23, 4)), parts_of, gather, want_gather, None, gather_limits,
         random_size=random_size, exact=("y",)),
    Part("reduce_scatter", ((10, 4), (3, 4), (8, 4), (23, 4)), wholes, scatter, want_scatter, terms, scatter_limits,
         random_size=random_size, exact=("y",)),
)  # fmt: skip

GATHER = "parts[into] = ring.sendrecv(right, parts[out], left)"
SCATTER = "sums[take] = sums[take] + ring.sendrecv(right, sums[give], left)"
MISTAKES = (
    mistake("rotated", "The parts start with your own: put the part of rank r at place r, on every rank.",
            ("return np.concatenate(parts)", "return np.concatenate([parts[(r + i) % p] for i in range(p)])")),
    mistake("as_they_came", "The parts stand in the order in which they came, which is down from your own: put each at its rank's place.",
            ("return np.concatenate(parts)", "return np.concatenate([parts[(r - i) % p] for i in range(p)])")),
    mistake("own_again", "Your own part is sent at every step: after the first step pass on what has just come.",
            ("out, into = (r - step) % p,", "out, into = r,")),
    mistake("step_more", "This is right, but it takes p steps: the last one brings each rank its own part back. p - 1 are enough.",
            ("for step in range(p - 1):\n        out", "for step in range(p):\n        out")),
    mistake("step_short", "all_gather stops a step early: the part of the right neighbour has not come round yet.",
            ("for step in range(p - 1):\n        out", "for step in range(p - 2):\n        out")),
    mistake("equal_parts", "The parts are taken to be equally long: they are not, and what comes tells its own length.",
            ("return np.concatenate(parts)", "return np.stack(parts).reshape(-1)")),
    mistake("gather_all_send", "In all_gather all ranks send before any receives: every send waits for a receiver, and nobody is one.",
            (GATHER, "ring.send(right, parts[out])\n        parts[into] = ring.recv(left)")),
    mistake("next_part", "Rank r ends with part r + 1 of the sum: begin one part earlier, with r - 1, so that it ends with its own.",
            ("(r - step - 1) % p, (r - step - 2) % p", "(r - step) % p, (r - step - 1) % p"), ("return sums[r]", "return sums[(r + 1) % p]")),
    mistake("unfinished", "What is returned has not been round: the part that this rank finishes is another one than it returns.",
            ("return sums[r]", "return sums[(r - 1) % p]")),
    mistake("replaced", "What comes replaces this rank's own part: it is to be added to it.",
            (SCATTER, "sums[take] = ring.sendrecv(right, sums[give], left)")),
    mistake("not_passed_on", "At each step a chunk of this rank's own x is sent, not the sum that has just come with it added: each part is the"
            " sum of two ranks alone.", ("ring.sendrecv(right, sums[give], left)", "ring.sendrecv(right, x_N[ring.cut(len(x_N), give)], left)")),
    mistake("own_twice", "This rank's own part is in the sum twice: it is added when the part passes through, and once more at the end.",
            ("return sums[r]", "return sums[r] + x_N[ring.cut(len(x_N), r)]")),
    mistake("mean", "The sum is divided by the ranks: reduce_scatter sums.", ("return sums[r]", "return sums[r] / p")),
    mistake("whole_arrays", "The sum is right, but whole arrays went round: only one part of it is yours, send parts.",
            ("    for step in range(p - 1):\n        give, take = (r - step - 1) % p, (r - step - 2) % p\n        " + SCATTER,
             "    sent, total = x_N, x_N\n    for step in range(p - 1):\n        sent = ring.sendrecv(right, sent, left)\n"
             "        total = total + sent"),
            ("return sums[r]", "return total[ring.cut(len(x_N), r)]")),
    mistake("remainder", "Parts of N // p leave the last N mod p numbers to nobody: cut with ring.cut.",
            ("x_N[ring.cut(len(x_N), i)]", "x_N[i * (len(x_N) // p) : (i + 1) * (len(x_N) // p)]")),
    mistake("in_place", "x is changed: the parts are views of it, so adding into one adds into the caller's array.",
            (SCATTER, "sums[take] += ring.sendrecv(right, sums[give], left)")),
    mistake("scatter_all_receive", "In reduce_scatter all ranks receive before any sends: nobody begins.",
            (SCATTER, "got = ring.recv(left)\n        ring.send(right, sums[give])\n        sums[take] = sums[take] + got")),
    mistake("own_length", "Every part is taken to be as long as this rank's own: what comes tells its own length, so put the parts together"
            " once all are there.", ("return np.concatenate(parts)", "y_pn = np.zeros((p, len(x_n)), x_n.dtype)\n    for i, part in enumerate(parts):\n"
             "        y_pn[i, : len(part)] = part[: len(x_n)]\n    return y_pn.ravel()")),
    mistake("equal_rows", "Every part is put into a place as long as this rank's own: parts are not equally long, and what comes tells its own"
            " length. Keep them in a list, and put them together at the end.",
            ("parts = [x_n] * p", "parts = np.zeros((p, len(x_n)), x_n.dtype)\n    parts[r] = x_n")),
    mistake("equal_places", "Every part is put into a place as long as this rank's own: parts are not equally long, and what comes tells its"
            " own length. Keep them in a list, and put them together at the end.",
            ("parts = [x_n] * p", "parts, n = [x_n] * p, len(x_n)\n    y_N = np.zeros(p * n, x_n.dtype)\n    y_N[r * n : (r + 1) * n] = x_n"),
            (GATHER, GATHER + "\n        y_N[into * n : (into + 1) * n] = parts[into][:n]"), ("return np.concatenate(parts)", "return y_N")),
    mistake("all_so_far", "This is right, but everything that has come so far is sent at each step: pass on only what has just come.",
            (GATHER, "so_far = [parts[(out + i) % p] for i in range(step + 1)]\n        got = ring.sendrecv(right, np.concatenate(so_far), left)\n"
             "        parts[into] = got[: len(got) - sum(map(len, so_far[:-1]))]")),
    *(mistake(name, "This is right, but a whole all-reduce is done: its second half brings every part to every rank, and only your own is"
              " asked for. Begin one part earlier, and the first half ends with it.", *first,
              ("return sums[r]\n", f"for step in range(p - 1):\n        sums[(r - step - {at}) % p] = ring.sendrecv(right, sums[(r - step + 1 - {at})"
               " % p], left)\n    return sums[r]\n"))
      for name, at, first in (("all_reduced", 1, ()), ("all_reduced_from_own", 0, (
          ("give, take = (r - step - 1) % p, (r - step - 2) % p", "give, take = (r - step) % p, (r - step - 1) % p"),)))),
    mistake("own_missing", "This rank's own numbers are missing from its part: what comes last is to be added to them.",
            ("return sums[r]\n", "return sums[r] - x_N[ring.cut(len(x_N), r)]\n")),
    mistake("rest_to_last", "Parts of N // p with the rest for the last rank: part i is x[ring.cut(N, i)], which deals the rest out.",
            ("x_N[ring.cut(len(x_N), i)]", "x_N[i * (len(x_N) // p) : (i + 1) * (len(x_N) // p) if i < p - 1 else len(x_N)]")),
    mistake("rounded_up", "Parts of N/p rounded up leave little or nothing to the last rank: part i is x[ring.cut(N, i)].",
            ("x_N[ring.cut(len(x_N), i)]", "x_N[i * -(-len(x_N) // p) : (i + 1) * -(-len(x_N) // p)]")),
)  # fmt: skip
