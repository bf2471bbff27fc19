"""Names of ranks and tables, as people read them."""

from parallel.text import aligned, named


def test_ranks_are_named():
    assert named([2]) == "rank 2"
    assert named([0, 1, 3]) == "ranks 0, 1 and 3"
    assert named(range(8)) == "ranks 0..7"


def test_cells_stand_under_one_another_and_no_line_ends_in_blanks():
    rows = [("rank", "is", "where"), ("0", "waiting", ""), ("1", "", "here")]
    assert aligned(rows) == ["rank  is       where", "0     waiting", "1              here"]
