"""A mesh of ranks: dp copies of a model, each cut over tp ranks.

Ranks 0, 1, ... dp x tp - 1 fill a grid row by row. Row i is one copy of the model, its tp ranks hold different shards;
column j holds the same shard in all dp copies. Neighbours in a row are neighbours in rank: tp talks most, so it counts fastest.

    dp = 2, tp = 3:     0 1 2       rank 5 is at (1, 2)
                        3 4 5       its tp group is [3, 4, 5], its dp group [2, 5]

coordinates: where a rank stands. members: the ranks that `rank` talks to along an axis, itself included, in the order of
their coordinate; so all of a group hold the same list. The groups are then tried out: every rank sends its number round its group.
"""


def coordinates(rank, dp, tp):
    """rank in 0 .. dp * tp - 1 -> (i, j), its places along dp and tp."""
    # --- yours ---
    i, j = divmod(rank, tp)
    return i, j
    # --- end ---


def members(rank, axis, dp, tp):
    """axis "dp" or "tp" -> the ranks of this rank's group along it, ascending."""
    # --- yours ---
    i, j = divmod(rank, tp)
    if axis == "tp":
        return [i * tp + n for n in range(tp)]
    return [n * tp + j for n in range(dp)]
    # --- end ---
