"""Cuts and layouts: pure logic."""

from itertools import product

import numpy as np
import pytest

from parallel.shard import Cut, Layout, covering, even, group_sizes, replicated


@pytest.mark.parametrize("length", [1, 2, 7, 9, 64, 1001])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_even_cuts_are_partitions_that_differ_by_one_at_most(length, ranks):
    if length < ranks:
        with pytest.raises(ValueError, match=f"cannot cut {length} entries over {ranks} ranks: use at most {length}"):
            even(length, ranks)
        return
    cut = even(length, ranks)
    assert cut.is_partition
    assert sum(cut.sizes) == length
    assert max(cut.sizes) - min(cut.sizes) <= 1
    assert list(cut.sizes) == sorted(cut.sizes, reverse=True)


def test_nine_heads_on_two_ranks_are_five_and_four():
    assert even(9, 2).sizes == (5, 4)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_join_undoes_take_in_any_dim(dim):
    whole = np.arange(5 * 6 * 7).reshape(5, 6, 7)
    cut = even(whole.shape[dim], 4)
    assert (cut.join([cut.take(whole, dim, r) for r in range(4)], dim) == whole).all()


def test_overlapping_parts_join_too_and_belong_to_the_lowest_rank():
    whole = np.arange(12.0).reshape(3, 4)
    cut = Cut(3, ((0, 2), (1, 3)))
    assert not cut.is_partition
    assert (cut.join([cut.take(whole, 0, r) for r in range(2)], 0) == whole).all()
    assert [cut.owner(i) for i in range(3)] == [0, 0, 1]
    with pytest.raises(IndexError, match="index 3 is on no rank"):
        cut.owner(3)


def test_a_cut_with_a_gap_is_no_partition():
    assert not Cut(4, ((0, 1), (2, 4))).is_partition
    assert not Cut(4, ((0, 2), (2, 3))).is_partition
    assert not replicated(4, 2).is_partition


def test_take_refuses_another_length():
    with pytest.raises(ValueError, match="it has 5 entries, the cut 6"):
        even(6, 2).take(np.zeros(5), 0, 0)


def test_layout_takes_parts_that_are_contiguous_and_their_own():
    whole = np.arange(21.0).reshape(3, 7)
    layout = Layout((3, 7), {"tp": (1, even(7, 2))})
    part = layout.take(whole, {"tp": 1})
    assert part.shape == layout.local_shape({"tp": 1}) == (3, 3)
    assert part.flags.c_contiguous
    assert not np.shares_memory(part, whole)
    assert layout.owner((0, 3)) == {"tp": 0}
    assert layout.owner((0, 4)) == {"tp": 1}
    assert Layout((3, 7)).owner((0, 4)) == {}
    with pytest.raises(ValueError, match=r"expected an array of shape \(3, 7\), got \(7, 3\)"):
        layout.take(whole.T, {"tp": 1})


def test_a_layout_may_be_cut_over_two_axes():
    """Experts over ep, and what each of them has over tp: uneven, and in part held by several."""
    layout = Layout((5, 2, 4), {"ep": (0, even(5, 2)), "tp": (2, covering(even(8, 3), 2))})
    assert layout.cuts["tp"][1].bounds == ((0, 2), (1, 3), (3, 4))
    whole = np.arange(40).reshape(5, 2, 4)
    counted = np.zeros(whole.shape, int)
    for ep in range(2):
        for tp in range(3):
            place = {"ep": ep, "tp": tp, "dp": 0}
            part = layout.take(whole, place)
            assert part.shape == layout.local_shape(place)
            assert (part == whole[tuple(slice(*b) for b in layout.bounds(place))]).all()
            for x, y, z in product(*layout.first(place)):
                counted[slice(*x), slice(*y), slice(*z)] += 1
    assert (counted == 1).all()
    # Another rank of an axis that is not named holds the same, and is not the first.
    assert layout.first({"ep": 0, "tp": 0, "dp": 1}) == [[], [], []]
    assert layout.owner((3, 0, 1)) == {"ep": 1, "tp": 0}
    with pytest.raises(ValueError, match="can be cut over one axis"):
        Layout((4,), {"ep": (0, even(4, 2)), "tp": (0, even(4, 2))})


def test_layout_refuses_a_cut_of_another_length():
    with pytest.raises(ValueError, match="is not the cut's length 6"):
        Layout((3, 7), {"tp": (1, even(6, 2))})


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "held", "grouped", "together"),
    [
        (9, 3, 1, [(0, 3)], [[3, 3, 3]], []),
        (9, 3, 2, [(0, 2), (1, 3)], [[3, 2], [1, 3]], [(range(1, 2), range(0, 2))]),
        (9, 3, 3, [(0, 1), (1, 2), (2, 3)], [[3], [3], [3]], []),
        (
            9,
            3,
            4,
            [(0, 1), (1, 2), (1, 3), (2, 3)],
            [[3], [2], [1, 1], [2]],
            [(range(1, 2), range(1, 3)), (range(2, 3), range(2, 4))],
        ),
        (
            9,
            3,
            9,
            [(n // 3, n // 3 + 1) for n in range(9)],
            [[1]] * 9,
            [(range(n, n + 1), range(3 * n, 3 * n + 3)) for n in range(3)],
        ),
        (8, 2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)], [[2]] * 4, [(range(0, 1), range(0, 2)), (range(1, 2), range(2, 4))]),
        (
            8,
            2,
            8,
            [(n // 4, n // 4 + 1) for n in range(8)],
            [[1]] * 8,
            [(range(n, n + 1), range(4 * n, 4 * n + 4)) for n in range(2)],
        ),
        (4, 1, 3, [(0, 1)] * 3, [[2], [1], [1]], [(range(0, 1), range(0, 3))]),
    ],
)
def test_heads_and_the_key_value_heads_that_they_read(heads, kv_heads, ranks, held, grouped, together):
    cut = even(heads, ranks)
    kv = covering(cut, heads // kv_heads)
    assert list(kv.bounds) == held
    assert [group_sizes(cut, heads // kv_heads, r) for r in range(ranks)] == grouped
    assert kv.shared() == together


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12])
def test_a_rank_holds_exactly_what_its_heads_read(kv_heads):
    for ranks in range(1, 13):
        cut = even(12, ranks)
        kv = covering(cut, 12 // kv_heads)
        for rank, (start, stop) in enumerate(cut.bounds):
            assert set(range(*kv.bounds[rank])) == {h // (12 // kv_heads) for h in range(start, stop)}
        for i in range(kv_heads):
            holders = [r for r, (a, b) in enumerate(kv.bounds) if a <= i < b]
            shared = [list(ranks) for indices, ranks in kv.shared() if i in indices]
            assert shared == ([holders] if len(holders) > 1 else [])


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="cannot group 9 entries by 4: use a divisor of 9"):
        covering(even(9, 2), 4)
