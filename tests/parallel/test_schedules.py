"""The known schedules: their orders, published tables and closed forms, exactly, or to the printed digits."""

from fractions import Fraction
from itertools import product

import pytest

from parallel import schedules
from parallel.schedule import Op, check
from parallel.schedules import SCHEDULES, interleaved, plan, zero_bubble
from parallel.simulation import Costs, simulate

ONE = Fraction(1)
# F, I, W of which none divides another, and a hop that is short beside them.
F, I, W, HOP = Fraction(7, 3), Fraction(9, 4), Fraction(8, 5), Fraction(1, 50)  # noqa: E741
B = I + W


def timed(plan, F=ONE, I=ONE, W=ONE, hop=0):  # noqa: E741
    return simulate(plan, Costs.alike(plan, F, I, W, Fraction(hop)))


def makespan(name, p, m, *costs, chunks=None):
    return timed(plan(name, p, m, chunks), *costs).makespan


# --- orders, as published

ORDERS = {
    ("gpipe", 2, 2): "0F0,0F1,0B0,0B1 1F0,1F1,1B0,1B1",
    ("1f1b", 1, 3): "0F0,0B0,0F1,0B1,0F2,0B2",
    ("1f1b", 3, 4): "0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3 1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3 2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3",
    ("interleaved", 2, 4): "0F0,0F1,2F0,2F1,0F2,2B0,0F3,2B1,2F2,0B0,2F3,0B1,2B2,2B3,0B2,0B3"
    " 1F0,1F1,3F0,3B0,3F1,3B1,1F2,1B0,1F3,1B1,3F2,3B2,3F3,3B3,1B2,1B3",
    ("zb-h1", 3, 4): "0F0,0F1,0F2,0I0,0W0,0F3,0I1,0W1,0I2,0W2,0I3,0W3"
    " 1F0,1F1,1I0,1F2,1I1,1W0,1F3,1I2,1W1,1I3,1W2,1W3"
    " 2F0,2I0,2F1,2I1,2F2,2I2,2W0,2F3,2I3,2W1,2W2,2W3",
    ("zb-v", 2, 4): "0F0,0F1,0F2,3F0,3I0,3W0,3F1,3I1,3W1,0F3,0I0,0W0,3F2,3I2,3W2,0I1,0W1,3F3,3I3,3W3,0I2,0W2,0I3,0W3"
    " 1F0,2F0,1F1,2F1,2I0,2W0,1F2,1I0,1W0,2F2,2I1,2W1,1F3,1I1,1W1,2F3,2I2,2W2,1I2,2I3,1I3,1W2,2W3,1W3",
    ("dualpipe-v", 2, 4): "0F0,0F1,0F2,3F0,3I0,3W0,3F1,0F3,3B1,3F2,0B0,3B2,3F3,0B1,3B3,0I2,0W2,0I3,0W3"
    " 1F0,2F0,1F1,2F1,1F2,2B0,2F2,1B0,1F3,2B1,2F3,1B1,2B2,1B2,2I3,1I3,2W3,1W3",
}


@pytest.mark.parametrize("at", ORDERS, ids=lambda at: "-".join(map(str, at)))
def test_orders(at):
    assert plan(*at).text().split() == ORDERS[at].split()


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_numbers_run(name):
    """Of micro-batches from 1 on, more or fewer than ranks, on one rank too; what a schedule cannot have is refused by name."""
    for p, m in product(range(1, 6), range(1, 13)):
        if m < SCHEDULES[name].least(p):
            with pytest.raises(ValueError, match=f"{name} needs {2 * p} micro-batches for pp={p}, got {m}: use zb-v"):
                plan(name, p, m)
            continue
        for chunks in (1, 2, 3, 4) if name == "interleaved" else (SCHEDULES[name].chunks,):
            made = plan(name, p, m, chunks)
            check(made, p * chunks, m)
            # A plan is long only where there is work: nothing is there twice.
            assert len(made.place) == sum(map(len, made.ranks))


def test_stages_lie_on_a_loop_or_a_v():
    assert plan("interleaved", 3, 4, 3).rank_of == {s: s % 3 for s in range(9)}
    for name in ("zb-v", "dualpipe-v"):
        assert plan(name, 3, 6).rank_of == {0: 0, 1: 1, 2: 2, 3: 2, 4: 1, 5: 0}


# --- unit costs: F = I = W = 1 a rank

UNIT = {  # GPipe and 1F1B, ZB-H1, ZB-H2 and its span, interleaved, ZB-V and its span
    (2, 4): (15, 13, 13, 12, 13.5, 12.5, 12),
    (3, 6): (24, 20, 20, 18, 21, 19, 18),
    (4, 8): (33, 27, 27, 24, 28.5, 25.5, 24),
    (4, 12): (45, 39, 39, 36, 40.5, 37.5, 36),
    (8, 16): (69, 55, 55, 48, 58.5, 51.5, 48),
}


@pytest.mark.parametrize(("at", "want"), UNIT.items(), ids=str)
def test_unit_costs(at, want):
    times = {name: timed(plan(name, *at)) for name in SCHEDULES}
    one, h1, h2, h2_span, inter, v, v_span = want
    assert {name: t.makespan for name, t in times.items()} == {
        "gpipe": one, "1f1b": one, "interleaved": inter, "zb-h1": h1, "zb-h2": h2, "zb-v": v, "dualpipe-v": v
    }  # fmt: skip
    spans = {name: t.span for name, t in times.items() if t.span != t.makespan}
    assert spans == {"zb-h2": h2_span, "zb-v": v_span}
    bubble = 1 - Fraction(3 * at[1]) / times["1f1b"].makespan
    assert times["1f1b"].bubble(times["1f1b"].makespan) == bubble


@pytest.mark.parametrize(("name", "want"), {"1f1b": (12, 15, 18), "zb-h1": (9, 11, 13), "zb-v": (9, 11, 13)}.items())
def test_fewer_micro_batches_than_ranks(name, want):
    assert tuple(makespan(name, 4, m) for m in (1, 2, 3)) == want
    assert plan("1f1b", 4, 2).peaks() == [2, 2, 2, 1]


def test_a_smaller_last_group():
    for (p, m), want in {(4, 6): 27.5, (4, 10): 39.5, (2, 3): 11.5}.items():
        assert timed(interleaved(p, m, 2)).makespan == makespan("interleaved", p, m) == want


def test_a_last_group_that_is_too_small_is_planned_as_if_full():
    for p, m, chunks in ((4, 5, 3), (5, 7, 2), (8, 21, 2), (4, 9, 4)):
        with pytest.raises(ValueError, match="waits at"):
            check(interleaved(p, m, chunks), p * chunks, m)
        assert plan("interleaved", p, m, chunks) == interleaved(p, m, chunks, filled=True)
    # Where both run, that is never slower.
    for p, m, chunks, hop in product((2, 4), range(1, 12), (2, 3), (0, Fraction(1, 10))):
        filled = interleaved(p, m, chunks, filled=True)
        assert filled.peaks() <= interleaved(p, m, chunks).peaks()
        assert timed(filled, hop=hop).makespan <= timed(plan("interleaved", p, m, chunks), hop=hop).makespan
    assert timed(interleaved(4, 6, 2, filled=True)).makespan == 24.5


def test_groups_of_another_size():
    """PyTorch's: m // max(1, m // p) micro-batches a group, and Megatron-LM's, of any size from p on."""
    for p, m in ((2, 5), (3, 7), (4, 9), (4, 11)):
        for group in (m // max(1, m // p), p, p + 1, m):
            check(interleaved(p, m, 2, group, filled=True), 2 * p, m)
    assert interleaved(4, 8, 2, 8).peaks() == [15, 13, 11, 9]
    assert timed(interleaved(4, 8, 2, 8)).makespan == 28.5


def test_half_the_warm_up_holds_less_and_waits_for_messages():
    whole, half = interleaved(4, 8, 2), interleaved(4, 8, 2, ahead=1)
    assert (timed(whole).makespan, timed(half).makespan) == (28.5, 28.5)
    assert (whole.peaks()[0], half.peaks()[0]) == (11, 8)
    lost = {c: timed(half, hop=c).makespan / timed(whole, hop=c).makespan - 1 for c in (Fraction(1, 20), Fraction(1, 5))}
    assert {float(c): round(float(part), 3) for c, part in lost.items()} == {0.05: 0.027, 0.2: 0.102}


# --- uneven stages: F = I = W of a stage


def uneven(name, *stages, m=8):
    return simulate(plan(name, len(stages), m), Costs(tuple((n, n, n) for n in stages))).makespan


@pytest.mark.parametrize(
    ("stages", "want"),
    {(1, 2, 1, 1): (57, 53, 49), (2, 1, 1, 1): (57, 51, 48), (1, 1, 1, 2): (57, 57, 51)}.items(),
)
def test_uneven_stages(stages, want):
    assert tuple(uneven(name, *stages) for name in ("gpipe", "1f1b", "zb-h1")) == want


def test_a_head_worth_two_blocks():
    """Blocks 2 2 2 2 and others; the last stage has the head too, and may have no block."""
    for blocks, want in {(2, 2, 2, 2): (114, 102), (3, 2, 2, 1): (93, 79), (3, 3, 2, 0): (87, 77)}.items():
        assert tuple(uneven(name, *blocks[:3], blocks[3] + 2) for name in ("1f1b", "zb-h1")) == want


# --- Zero Bubble (2401.10241), tables 5 and 6: F, I, W and a hop in ms, and the bubbles by the span

ZERO_BUBBLE = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674, 0.0444),
    (8, 32, 29.802, 29.428, 19.53, 0.577, 0.1898, 0.1045, 0.0559),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397, 0.0672),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421, 0.0641),
]


@pytest.mark.parametrize("row", ZERO_BUBBLE, ids=lambda row: f"{row[0]}-{row[1]}")
def test_tables_of_zero_bubble(row):
    p, m, *costs = row[:6]
    times = [simulate(made, Costs.alike(made, *costs)) for made in (plan(n, p, m) for n in ("1f1b", "zb-h1", "zb-h2"))]
    assert [round(t.bubble(t.span), 4) for t in times] == list(row[6:])


def test_gpipe_waits_for_fewer_messages():
    made = plan("gpipe", 8, 24)
    t = simulate(made, Costs.alike(made, *ZERO_BUBBLE[0][2:6]))
    assert round(t.bubble(t.span), 4) == 0.2304


# --- closed forms

GRID = list(product((2, 3, 4, 5), range(1, 16)))


def test_gpipe():
    for p, m in [(1, 3), *GRID]:
        made = plan("gpipe", p, m)
        assert timed(made, F, I, W, HOP).makespan == (m + p - 1) * (F + B) + 2 * (p - 1) * HOP
        assert made.peaks() == [m] * p


def test_one_f_one_b():
    for p, m in GRID:
        made = plan("1f1b", p, m)
        if m % p == 0:
            hops = Fraction(2 * (p - 1) * m, p) + 2 * (p - 2)
            assert timed(made, F, I, W, HOP).makespan == (m + p - 1) * (F + B) + hops * HOP
        assert timed(made, F, I, W).makespan == (m + p - 1) * (F + B)
        assert made.peaks() == [min(m, p - r) for r in range(p)]


@pytest.mark.parametrize("v", [2, 3, 4])
def test_interleaved(v):
    for p, m in GRID:
        if m % p == 0:
            made = plan("interleaved", p, m, v)
            want = m * (F + B) + (p - 1) * (F + B) / v + 2 * (p * v - 1) * HOP
            assert timed(made, F, I, W, HOP).makespan == want
            assert made.peaks() == [min(m * v, 2 * (p - 1 - r) + (v - 1) * p + 1) for r in range(p)]


def test_zb_h1():
    for p, m in GRID:
        made = plan("zb-h1", p, m)
        if m >= p:
            assert timed(made, F, I, W).makespan == m * (F + B) + (p - 1) * (F + I - W)
        if m <= p:
            assert timed(made, F, I, W).makespan == (m + p - 1) * (F + I) + W
        if m >= 2 * p:
            assert timed(made, F, I, W, HOP).makespan == m * (F + B) + (p - 1) * (F + I - W) + 4 * (p - 1) * HOP
        assert made.peaks() == [min(m, p - r) for r in range(p)]
        assert made.peaks("W") == [min(m, p)] * p


def test_zb_h2():
    for p, m in GRID:
        made = plan("zb-h2", p, m)
        t = timed(made, F, I, W)
        if m >= 2 * p:
            assert makespan("zb-h2", p, m) == makespan("zb-h1", p, m)
            assert makespan("zb-h2", p, m, F, I, I) == makespan("zb-h1", p, m, F, I, I)
        if m >= 2 * p - 1:
            # Where I takes longer than W, less than ZB-H1.
            assert t.makespan == m * (F + B) + (p - 1) * max(F, F + I - 2 * W)
            assert t.span == m * (F + B) + (p - 1) * (F + I - 2 * W)
            assert timed(made, F, I, W, HOP).span == t.span + 2 * (p - 1) * HOP
        assert made.peaks() == [min(m, 2 * (p - 1 - r) + 1) for r in range(p)]
        assert made.peaks("W") == [min(m, 2 * p - 1)] * p


@pytest.mark.parametrize("name", ["zb-v", "dualpipe-v"])
def test_the_v(name):
    for p, m in GRID:
        if m >= (2 * p if name == "dualpipe-v" else 2 * p - 1):
            made = plan(name, p, m)
            assert timed(made).makespan == 3 * m + Fraction(p - 1, 2)
            assert made.peaks() == made.peaks("W") == [2 * p + (name == "dualpipe-v")] * p
            if name == "zb-v":
                assert timed(made).span == 3 * m


def test_peaks_of_four_ranks():
    peaks = {name: plan(name, 4, 8).peaks() for name in SCHEDULES}
    assert peaks["1f1b"] == peaks["zb-h1"] == [4, 3, 2, 1]
    assert peaks["interleaved"] == [11, 9, 7, 5]
    assert plan("interleaved", 4, 8, 3).peaks() == [15, 13, 11, 9]
    assert plan("zb-h1", 4, 8).peaks("W") == [4, 4, 4, 4]
    assert peaks["zb-v"] == [8, 8, 8, 8]


# --- a known mistake, and refusals


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1"])
def test_a_warm_up_that_is_too_short_shows(monkeypatch, name):
    right = plan(name, 4, 8)
    turns = schedules._by_turns
    monkeypatch.setattr(schedules, "_by_turns", lambda warm, *rest: turns(max(0, warm - 1), *rest))
    if name == "interleaved":
        # The last rank's first backward comes before the forward that it needs.
        with pytest.raises(ValueError, match="rank 3 has 7B0 before 7F0, which it needs"):
            check(interleaved(4, 8, 2), 8, 8)
        return
    wrong = plan(name, 4, 8)
    assert timed(wrong).makespan > timed(right).makespan
    assert wrong.peaks()[0] == right.peaks()[0] - 1


def test_zero_bubble_puts_off_what_it_says():
    ops = zero_bubble(4, 8, 2).ranks[3]
    assert ops.index(Op("W", 3, 0)) == ops.index(Op("I", 3, 6)) + 1


@pytest.mark.parametrize(
    ("asked", "said"),
    {
        ("dualpipe-v", 4, 6): "dualpipe-v needs 8 micro-batches for pp=4, got 6: use zb-v",
        ("1f2b", 2, 2): "there is no schedule 1f2b: use gpipe, 1f1b, interleaved, zb-h1, zb-h2, zb-v, dualpipe-v",
        ("1f1b", 2, 2, 2): "1f1b has 1 chunk a rank, got 2: use interleaved",
        ("zb-v", 2, 4, 3): "zb-v has 2 chunks a rank, got 3: use interleaved",
        ("gpipe", 2, 0): "cannot plan 0 micro-batches: use 1 or more",
        ("gpipe", 0, 2): "cannot plan 0 ranks: use 1 or more",
        ("interleaved", 2, 2, -1): "cannot plan -1 chunks: use 1 or more",
    }.items(),
)
def test_refusals(asked, said):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        plan(*asked)
    assert str(refused.value) == said
