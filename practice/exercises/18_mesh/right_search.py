"""A group is all ranks that stand alike along the other axis."""


def coordinates(rank, dp, tp):
    return [rank // tp, rank - rank // tp * tp]


def members(rank, axis, dp, tp):
    other = 0 if axis == "tp" else 1
    own = coordinates(rank, dp, tp)[other]
    return tuple(r for r in range(dp * tp) if coordinates(r, dp, tp)[other] == own)
