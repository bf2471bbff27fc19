"""A model in stages: consecutive blocks on the ranks of a pipeline (GPipe, arXiv 1811.06965)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from layers.embedding import TiedHead
from layers.stage import Beginning, Stage
from models.build import Parts
from parallel.parameter import Weights
from parallel.shard import even


def dealt(layers: int, stages: int) -> list[range]:
    """The blocks of each stage, as evenly as it goes. Raises ValueError where a stage would have none."""
    if layers < stages:
        raise ValueError(f"cannot put {layers} layers on {stages} stages: give --layers, 0 for stages without blocks")
    return [range(*bounds) for bounds in even(layers, stages).bounds]


def by_hand(counts: Sequence[int]) -> list[range]:
    """The blocks of each stage, by how many it has."""
    return [range(*bounds) for bounds in pairwise([0, *accumulate(counts)])]


def stages(parts: Parts, weights: Weights, blocks: Sequence[range], rank_of: Sequence[int], rank: int) -> dict[int, Stage]:
    """The stages that this `rank` of pp holds, by number. `blocks`: of each stage; `rank_of`: each stage's rank.

    The first stage embeds tokens, the last has norm, head and loss. A tied table is on both their ranks, and is owed a sum over
    them; where that is one rank, it is there once.
    """
    ends, own = weights.on(pp=sorted({rank_of[0], rank_of[-1]})), weights.on(pp=[rank])
    c, last = parts.config, len(blocks) - 1
    embedding = parts.embedding(ends if c.tied else own) if rank in (rank_of[0], *(rank_of[-1:] if c.tied else [])) else None
    held = {}
    for stage in (s for s, r in enumerate(rank_of) if r == rank):
        beginning = Beginning(embedding, parts.positions(own)) if stage == 0 else None
        end = None
        if stage == last:
            head = TiedHead(embedding, apart=rank != rank_of[0]) if c.tied else parts.untied_head(own)
            end = parts.end(own, head)
        inside = [parts.block(own, i) for i in blocks[stage]]
        held[stage] = Stage(parts.tp, c.d_model, inside, beginning, end, c.rope, parts.cuts_rows)
    return held
