"""Pieces: what each rank writes of an array, and what is none."""

import numpy as np
import pytest

from parallel.checkpoint import CheckpointError, Piece, pieces
from parallel.shard import Cut, Layout, covering, even


@pytest.mark.parametrize("seed", range(30))
def test_together_the_ranks_write_each_index_once(seed):
    rng = np.random.default_rng(seed)
    ranks, length = rng.integers(1, 6), 12
    bounds = [tuple(int(b) for b in np.sort(rng.integers(0, length + 1, 2))) for _ in range(ranks)]
    bounds[rng.integers(ranks)] = 0, length
    x = rng.standard_normal((2, length, 3))
    layout = Layout(x.shape, {"tp": (1, Cut(length, tuple(bounds)))})
    copies, back = np.zeros(length, int), np.full_like(x, np.nan)
    for rank in range(ranks):
        for p in pieces("x", layout, {"tp": rank}, layout.take(x, {"tp": rank})):
            (_, (start, stop), _) = p.box
            assert bounds[rank][0] <= start < stop <= bounds[rank][1]
            copies[start:stop] += 1
            back[:, start:stop] = p.data
    assert copies.tolist() == [1] * length
    assert (back == x).all()


def test_shared_heads_are_the_lowest_ranks_to_write():
    cut = covering(even(9, 4), 3)
    layout, places = Layout((3, 2), {"tp": (0, cut)}), [{"tp": rank} for rank in range(4)]
    assert cut.bounds == ((0, 1), (1, 2), (1, 3), (2, 3))
    keys = [[p.key for p in pieces("Wk", layout, at, np.zeros(layout.local_shape(at)))] for at in places]
    assert keys == [["Wk[0:1]"], ["Wk[1:2]"], ["Wk[2:3]"], []]
    assert [len(pieces("b", Layout((3,)), at, np.zeros(3))) for at in places] == [1, 0, 0, 0]
    with pytest.raises(CheckpointError, match=r"Wk: the part of tp 2 should be \(2, 2\), it is \(3, 2\)"):
        pieces("Wk", layout, places[2], np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (("", (2,), (0,), np.zeros(2)), "'' cannot be the name"),
        (("__metadata__", (2,), (0,), np.zeros(2)), "cannot be the name"),
        (("x", (), (), np.zeros(())), "x has no dims: keep single numbers in the state"),
        (("x", (2,), (0,), np.zeros(2, complex)), "x is of dtype complex128: use one that safetensors has, F64, F32"),
        (("x", (2, 3), (0, 0), np.zeros((2, 4))), r"x: \(2, 4\) from \(0, 0\) on is no part of \(2, 3\)"),
        (("x", (2, 3), (0, 2), np.zeros((2, 2))), r"x: \(2, 2\) from \(0, 2\) on is no part of \(2, 3\)"),
        (("x", (2, 3), (0, -1), np.zeros((2, 2))), "no part of"),
        (("x", (2, 3), (0, 0), np.zeros(2)), "no part of"),
        (("x", (2, 3), (0, 0, 0), np.zeros((2, 3))), "no part of"),
    ],
)
def test_what_is_no_piece_is_refused(piece, text):
    with pytest.raises(CheckpointError, match=text):
        Piece(*piece)
