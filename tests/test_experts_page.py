"""docs/experts.md: its numbers are the layers' closed forms, its pictures what the code draws."""

import re

import numpy as np
import pytest

from launch.measure.experts import Job, laid_out
from launch.pictures import experts
from tests.harness import ROOT

PAGE = (ROOT / "docs/experts.md").read_text()
T, D, F, X = 1024, 256, 1024, 8


def laid(active, ep, tp):
    """The page's layer, whose tokens choose at random."""
    c_TA = np.random.default_rng(0).permuted(np.tile(np.arange(X), (T, 1)), axis=1)[:, :active]
    return laid_out(Job((T,), D, F, X, active, 0, {}, "float32", 0), c_TA, ep, tp)


def rows(heading):
    """The cells of the table that begins with this heading."""
    table = PAGE.split(f"| {heading} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_layouts_are_the_closed_forms():
    want = []
    for ep, tp in experts.LAYOUTS:
        a = laid(2, ep, tp)
        t, d, n = a["product"]
        sent = f"{max(a['wire_bytes_per_rank']):,}"
        product = f"{t}x{d} @ {d}x{n:,}"
        numbers = (a["experts_per_rank"], product, sent, f"{a['gradient_wire_bytes']:,}", f"{a['busiest']:.2f}")
        want.append([f"ep={ep}, tp={tp}", *map(str, numbers)])
    assert rows("layout") == want


def test_ep_sends_about_a_p_th_of_tp_for_each_expert():
    want = []
    for A in (1, 2, 4, 8):
        ep, tp = (max(laid(A, *layout)["wire_bytes_per_rank"]) for layout in ((4, 1), (1, 4)))
        assert ep / tp == pytest.approx(A / 4, rel=0.1)
        want.append([str(A), f"{ep / tp:.2f}"])
    assert rows("experts for a token") == want


def test_the_pictures_are_what_the_code_draws(tmp_path):
    for name in experts.PICTURES:
        kept, again = ROOT / f"docs/{name}.png", tmp_path / f"{name}.png"
        experts.draw(again, name)
        assert again.read_bytes() == kept.read_bytes(), "python -m launch.pictures.experts draws them again"
        assert kept.stat().st_size < 150_000
        assert len(re.findall(rf"\]\({name}\.png\)", PAGE)) == 1


def test_rows_stand_by_expert_and_then_by_rank():
    rows = {expert: (rank, of) for rank, expert, of in experts.rows_of(experts.CHOICE, experts.EXPERTS)}
    assert rows[0] == (0, [(0, 0), (0, 1), (0, 3), (1, 1), (2, 2)])
    assert rows[5] == (2, [(2, 0), (2, 2), (0, 2), (1, 3)])
    assert sum(len(of) for _, of in rows.values()) == experts.CHOICE.size
