"""A step as plain data: what runs in it, what came of it, and what is counted of all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Run(NamedTuple):
    """A request's part of a step: `tokens` take the positions from `first` on. They see all before them, in the blocks of
    `table`, but the first `behind`.

    The last `drafts` of them are guesses. `sample`: the logits of the last 1 + `drafts` tokens are wanted, else of none.
    """

    id: int
    first: int
    tokens: list[int]
    drafts: int
    sample: bool
    prefill: bool
    table: list[int]
    behind: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """`copies`: blocks to copy before the forward, as (from, to). `admitted`: ids, with how many of their tokens were computed
    already. `preempted`: ids that lost their blocks. A step with nothing to run is False."""

    number: int
    runs: list[Run]
    copies: list[tuple[int, int]]
    admitted: list[tuple[int, int]]
    preempted: list[int]

    def __bool__(self) -> bool:
        return bool(self.runs)


class Output(NamedTuple):
    """New tokens of a request; `reason` when it is finished: "stop" (the last one is an end token) or "length"."""

    id: int
    tokens: list[int]
    reason: str | None


@dataclass
class Counts:
    """Since the start. A decode step has no prefill in it; a hit is a token that an admitted request need not compute; a
    position is room for a token."""

    steps: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    hit_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    slots_used: int = 0
    positions_held: int = 0
    positions_empty: int = 0
