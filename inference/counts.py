"""What a scheduler counts, for a monitor."""

from __future__ import annotations

from dataclasses import dataclass, field


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
