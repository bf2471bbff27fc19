"""docs/context-parallel.md: its pictures are what the code draws, its tables what the layers say."""

import io
from statistics import mean

import pytest

from launch.pictures import context
from layers.attention import Attention
from layers.batch import Batch
from layers.context import KINDS, Ring
from layers.pieces import LAYOUTS, count, pairs
from parallel.ledger import wire_bytes
from plan.dry import DryAxis, dry_weights
from tests.harness import ROOT

PAGE = (ROOT / "docs/context-parallel.md").read_text()
T, H, K, E, RANKS = 1024, 8, 2, 32, 4


def test_the_pictures_are_what_the_code_draws(tmp_path):
    for again in context.pictures(tmp_path):
        kept = ROOT / "docs" / again.name
        assert again.read_bytes() == kept.read_bytes(), "python -m launch.pictures.context draws them again"
        assert kept.stat().st_size < 100_000
        assert PAGE.count(f"]({again.name})") == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [(16,), (1, 7, 5)])
def test_every_pair_is_drawn_once_by_the_rank_that_has_the_query(layout, lengths):
    every = LAYOUTS[layout](lengths, RANKS)
    drawn = [pair for rank in range(RANKS) for hop in range(RANKS) for pair in context.pairs(lengths, every, rank, hop)]
    assert len(drawn) == len({*drawn}) == sum(n * (n + 1) // 2 for n in lengths)
    assert all(key <= query for query, key in drawn)
    file = io.BytesIO()
    context.tiles(file, lengths)
    assert file.getvalue().startswith(b"\x89PNG")


def table(heading):
    """The rows of a table under a heading, as cells."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]


def batches(lengths, layout, ranks):
    every = LAYOUTS[layout](lengths, ranks)
    return [Batch(lengths, None, None, every, rank) for rank in range(ranks)]


def layer(rank, ranks, kind=Ring):
    around = kind(DryAxis("cp", ranks, rank))
    return Attention(DryAxis("tp", 1), dry_weights("float32"), H * E, H, K, E, context=around)


def work(of, batch):
    return sum(pairs(*block) for block in of.context.blocks(of.core, batch))


def sent(of, batch, phase):
    """Bytes over cp, on the wire."""
    return sum(wire_bytes(t.verb, t.message_bytes, RANKS) for t in of.traffic(batch) if t.axis == "cp" and t.phase == phase)


def test_the_work_is_that_of_the_blocks():
    rows = table("How much work each rank has")
    assert len(rows) == 8
    for sequences, ranks, layout, tokens, told, balance in rows:
        lengths, ranks = [*map(int, sequences.split())], int(ranks)
        held = batches(lengths, layout, ranks)
        done = [work(layer(b.rank, ranks), b) for b in held]
        assert (told, tokens) == (" ".join(map(str, done)), " ".join(f"{count(b.mine)}" for b in held)), sequences
        assert balance == f"{max(done) / mean(done):.3f}"


def test_what_the_kinds_cost_are_the_layers_closed_forms():
    rows = {kind: cells for kind, *cells in table("Ring, Ulysses or gather")}
    assert rows.keys() == KINDS.keys()
    for kind, cells in rows.items():
        found = set()
        for batch in batches([T], "zigzag", RANKS):
            it = layer(batch.rank, RANKS, KINDS[kind])
            kept = it.context.saved_bytes(it.core, batch, (E, E), 4)
            found.add(
                (
                    *(sent(it, batch, phase) for phase in ("forward", "backward")),
                    kept,
                    it.context.held(it.core, batch) * 2 * E * 4,
                )
            )
        # All ranks alike.
        assert [f"{n:,}" for n in found.pop()] == cells[:4]
        assert not found
