"""What is right in exercise 18 (by filling the grid and looking it up), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def inputs(draw, dp, tp):
    return {"dp": dp, "tp": tp, "number_r": draw.whole(-99, 100, dp * tp)}


def coordinates(code, a, at):
    dp, tp = a["dp"], a["tp"]
    return {f"coordinates({rank}, {dp}, {tp})": list(code.coordinates(rank, dp, tp)) for rank in range(dp * tp)}


def members(code, a, at):
    dp, tp = a["dp"], a["tp"]
    named = [(rank, axis) for rank in range(dp * tp) for axis in ("dp", "tp")]
    return {f"members({rank}, {axis!r}, {dp}, {tp})": list(code.members(rank, axis, dp, tp)) for rank, axis in named}


def exchange(code, a, at):
    """Every rank's number to all of its group, along both axes; what each got, in the order of the group."""
    return {axis: gathered(code.members(at.rank, axis, a["dp"], a["tp"]), a["number_r"], at) for axis in ("dp", "tp")}


def gathered(group, number_r, at):
    group, n = list(group), len(group)
    mine, got = group.index(at.rank), {at.rank: number_r[at.rank]}
    for shift in range(1, n):
        to, source = group[(mine + shift) % n], group[mine - shift]
        got[source] = at.sendrecv(to, np.array(number_r[at.rank]), source)
    return np.array([got[rank] for rank in group])


def filled(a):
    """The grid as rows, counted out."""
    rank, grid = 0, []
    for _ in range(a["dp"]):
        row = []
        for _ in range(a["tp"]):
            row.append(rank)
            rank += 1
        grid.append(row)
    return grid


def group(a, rank, axis):
    lines = filled(a) if axis == "tp" else list(map(list, zip(*filled(a), strict=True)))
    return next(line for line in lines if rank in line)


def want_coordinates(a, ref, at):
    places = {rank: [i, j] for i, row in enumerate(filled(a)) for j, rank in enumerate(row)}
    return {f"coordinates({rank}, {a['dp']}, {a['tp']})": places[rank] for rank in sorted(places)}


def want_members(a, ref, at):
    dp, tp = a["dp"], a["tp"]
    named = [(rank, axis) for rank in range(dp * tp) for axis in ("dp", "tp")]
    return {f"members({rank}, {axis!r}, {dp}, {tp})": group(a, rank, axis) for rank, axis in named}


def want_exchange(a, ref, at):
    return {axis: a["number_r"][group(a, at.rank, axis)] for axis in ("dp", "tp")}


def random_size(rng):
    return tuple(rng.choice([2, 3, 4, 5, 7], 2, replace=False).tolist())


def four(rng):
    return ((2, 2), (1, 4), (4, 1))[int(rng.integers(3))]


SIZES = ((2, 3), (3, 2), (5, 3), (1, 7), (7, 1))
PLAIN = ("float64",)
PARTS = (
    Part("coordinates", SIZES, inputs, coordinates, want_coordinates, random_size=random_size, dtypes=PLAIN),
    Part("members", SIZES, inputs, members, want_members, random_size=random_size, dtypes=PLAIN),
    Part("exchange", ((2, 2), (1, 4), (4, 1)), inputs, exchange, want_exchange, random_size=four, exact=("dp", "tp"),
         dtypes=PLAIN),
)  # fmt: skip

TP, DP = "[i * tp + n for n in range(tp)]", "[n * tp + j for n in range(dp)]"
PLACE = "i, j = divmod(rank, tp)\n    return i, j"
MISTAKES = (
    mistake("dp_fastest", "coordinates counts dp fastest: ranks 0 and 1 would be two copies of one shard. tp counts fastest here, so"
            " that the ranks that talk most are neighbours.", (PLACE, "j, i = divmod(rank, dp)\n    return i, j")),
    mistake("by_dp", "coordinates divides by dp: a row is tp long, so how many ranks stand before a row's first depends on tp alone.",
            (PLACE, "i, j = divmod(rank, dp)\n    return i, j")),
    mistake("turned", "coordinates gives (j, i): the place along dp, the row, comes first.", (PLACE, "i, j = divmod(rank, tp)\n    return j, i")),
    mistake("row_only", "coordinates leaves i unreduced: rank % tp is the place within the row, rank // tp which row it is.",
            (PLACE, "return rank, rank % tp")),
    mistake("members_dp_fastest", "members counts dp fastest: its rows are columns. rank = i x tp + j.",
            (TP, "[n * dp + rank % dp for n in range(tp)]"), (DP, "[rank // dp * dp + n for n in range(dp)]")),
    mistake("other_axis", "members gives the other axis's group: along tp the row i stays and j runs, along dp the other way round.",
            ('axis == "tp"', 'axis == "dp"')),
    mistake("neighbours", "dp's group is taken as ranks that follow each other: in a column ranks are tp apart.",
            (DP, "[rank // dp * dp + n for n in range(dp)]")),
    mistake("stride_dp", "dp's group steps by dp: from one row to the next it is tp ranks.", (DP, "[n * dp + j for n in range(dp)]")),
    mistake("places", "members gives places within the group, 0 .. n - 1: the ranks of the whole mesh are asked for.",
            (TP, "list(range(tp))"), (DP, "list(range(dp))")),
    mistake("own_first", "Each list begins with the rank itself: members of one group must hold the same list, or the parts that they"
            " gather stand in different orders.",
            (TP, "[i * tp + (j + n) % tp for n in range(tp)]"), (DP, "[(i + n) % dp * tp + j for n in range(dp)]")),
    mistake("backwards", "The groups are listed backwards: ascending is asked for.", (TP, TP + "[::-1]"), (DP, DP + "[::-1]")),
    mistake("without_itself", "The rank itself is missing from its group: its own part is one of those that are summed.",
            (TP, "[i * tp + n for n in range(tp) if n != j]"), (DP, "[n * tp + j for n in range(dp) if n != i]")),
    mistake("first_group", "members gives the first group's ranks to everyone: the row's or the column's own start is missing.",
            (TP, "[n for n in range(tp)]"), (DP, "[n * tp for n in range(dp)]")),
    mistake("from_own_row", "dp's group begins at the rank itself: the ranks above it in its column are missing.",
            (DP, "[n * tp + j for n in range(i, dp)]")),
    mistake("second_row", "A column's first rank is missing: it begins in row 0.", (DP, "[n * tp + j for n in range(1, dp)]")),
    mistake("second_column", "A row's first rank is missing: it begins in column 0.", (TP, "[i * tp + n for n in range(1, tp)]")),
    mistake("from_itself", "The row is counted from the rank itself: it begins at i tp, its own first rank.",
            (TP, "[rank + n for n in range(tp)]")),
    mistake("from_itself_on", "The row is counted from the rank itself, as far as there are ranks: it begins at i tp, its own first rank.",
            (TP, "[*range(rank, min(rank + tp, dp * tp))]")),
    mistake("last_row", "A column ends a row too early: its last rank is missing.", (DP, "[n * tp + j for n in range(dp - 1)]")),
    mistake("last_column", "A row ends a rank too early: its last rank is missing.", (TP, "[i * tp + n for n in range(tp - 1)]")),
    mistake("remembered", "Groups are remembered by rank and axis alone: another mesh, of another dp or tp, is given those of the mesh before.",
            ('    i, j = divmod(rank, tp)\n    if axis == "tp":', '    kept = members.__dict__.setdefault("kept", {})\n'
             '    dp, tp = kept.setdefault((rank, axis), (dp, tp))\n    i, j = divmod(rank, tp)\n    if axis == "tp":')),
)  # fmt: skip
