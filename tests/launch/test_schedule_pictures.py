"""Timed plans drawn, in characters and as a PNG."""

import io
import re
from fractions import Fraction

import pytest
from matplotlib.axes import Axes

from launch.measure import chart
from launch.pictures import schedule
from parallel.schedule import read
from parallel.schedules import SCHEDULES, plan
from parallel.simulation import Costs, simulate
from tests.harness import ROOT


def timed(name, p, m, *costs, chunks=None):
    made = plan(name, p, m, chunks)
    return simulate(made, Costs.alike(made, *map(Fraction, costs or (1, 1, 1))))


def test_a_plan_in_characters():
    assert [*chart.drawn(timed("zb-h1", 2, 3), 80, "ms")] == [
        "rank 0 F0F1..I0W0F2I1W1I2W2",
        "rank 1 ..F0I0F1I1W0F2I2W1W2",
        "       0 ms           10 ms",
        "       F forward, I backward to the input, W to the weights, each with its",
        "       micro-batch where there is room, dots: idle",
    ]


def test_chunks_and_pieces():
    """What is too wide goes on below; the second chunk has small letters."""
    assert [*chart.drawn(timed("zb-v", 2, 3), 40)] == [
        "rank 0 F0F1F2f0i0w0f1i1w1I0W0f2i2w2I1W1I",
        "rank 1 ..F0f0F1f1i0w0F2I0W0f2i1w1I1i2I2W",
        "       0                            8.25",
        "rank 0 2W2..",
        "rank 1 1w2W2",
        "       8.25 9.5",
        "       F forward, I backward to the",
        "       input, W to the weights, each",
        "       with its micro-batch where there",
        "       is room, small letters: chunk 1,",
        "       dots: idle",
    ]


@pytest.mark.parametrize("width", [40, 80, 133])
def test_it_fits_any_width_and_hides_no_idle_time(width):
    for name in SCHEDULES:
        for p, m, costs in ((1, 1, ()), (2, 5, ()), (4, 8, ("18.5", "18.1", "9.3")), (9, 60, ("1", "2", "0"))):
            t = timed(name, p, m, *costs)
            lines = [*chart.drawn(t, width)]
            assert max(map(len, lines)) <= width
            ranks = [re.sub(r"^rank \d+ +", "", line) for line in lines if line.startswith("rank")]
            idle = sum(row.count(".") for row in ranks) / sum(map(len, ranks))
            # A character at either end of what is drawn may be rounded away.
            if m < 60:
                assert abs(idle - t.bubble(t.makespan)) < 0.12


def test_nothing_is_cut_that_would_name_another():
    """Where F12 has room for two characters, F1 is not it."""
    short, long = (1, 1, 0), (Fraction(3, 2), Fraction(3, 2), 0)
    lines = [*chart.drawn(simulate(plan("1f1b", 5, 13), Costs((short, *4 * [long]))), 133)]
    first, second = ("".join(line[7:] for line in lines if line.startswith(f"rank {rank}")) for rank in (0, 1))
    assert sorted(re.findall(r"[FB]\d+", first)) == sorted(f"{kind}{i}" for kind in "FB" for i in range(10))
    assert sorted(re.findall(r"[FB]\d+", second)) == sorted(f"{kind}{i}" for kind in "FB" for i in range(13))


@pytest.fixture
def written(monkeypatch):
    """The texts that are drawn inside a plan's rows."""
    texts, text = [], Axes.text
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, said, **k: texts.append(said) or text(axes, x, y, said, **k))
    return texts


def picture(timings, unit=""):
    file = io.BytesIO()
    schedule.draw(file, timings, unit)
    return file.getvalue()


def test_a_picture_has_each_operation_with_its_number_and_is_the_same_again(written):
    timings = {name: timed(name, 2, 4) for name in ("1f1b", "zb-h1", "dualpipe-v")}
    one = picture(timings)
    assert one.startswith(b"\x89PNG\r\n\x1a\n")
    numbers = sorted(text for text in written if text.isdigit())
    assert numbers == sorted(str(op.micro_batch) for t in timings.values() for op in t.plan.place)
    assert written.count("5 in flight") == 2
    assert "1 in flight, 2 till W" in written
    assert picture(timings) == one


def test_numbers_that_have_no_room_are_left_out(written):
    picture({"1f1b": timed("1f1b", 2, 120)})
    assert [text for text in written if text.isdigit() and len(text) == 3] == []


def test_what_stands_above_a_plan():
    assert schedule.said("mine", simulate(read("0F0,0B0"), Costs(((1.5, 1.0, 0.5),))), "ms") == (
        "mine: 1 micro-batch, makespan 3 ms, bubble 0.0 %; longest span 3 ms, bubble 0.0 %"
    )
    assert schedule.said("zb-h2", timed("zb-h2", 4, 8)).endswith("makespan 27, bubble 11.1 %; longest span 24, bubble 0.0 %")


# --- docs/pipeline.md


def test_the_pictures_are_what_the_code_draws(tmp_path):
    said = (ROOT / "docs/pipeline.md").read_text()
    for again in schedule.pictures(tmp_path):
        assert again.read_bytes() == (ROOT / "docs" / again.name).read_bytes()
        assert f"]({again.name})" in said


def test_the_table_is_what_the_code_times():
    said = (ROOT / "docs/pipeline.md").read_text()
    for name, t in schedule.page().items():
        messages = sum(len(t.plan.sent(a, b)) for a in range(4) for b in range(4))
        cells = [name]
        for whole in (t.makespan, t.span):
            cells += [f"{float(whole):g}", f"{100 * float(t.bubble(whole)):.1f}"]
        cells += [" ".join(map(str, t.plan.peaks(until))) for until in "IW"]
        assert f"| {' | '.join([*cells, str(messages)])} |\n" in said
