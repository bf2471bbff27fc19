"""A timed plan in characters: a line a rank, time to the right, each operation led by the letter of its kind."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from parallel.simulation import Timing

IDLE, GOES_ON = ".", "-"
# Pieces in which the time stands under itself where it is long.
BANDS = 3
KINDS = {"F": "F forward", "B": "B backward", "I": "I backward to the input", "W": "W to the weights"}


def chunks(timing: Timing) -> dict[int, int]:
    """Which of its rank's stages each is, counted from 0."""
    held: dict[int, list[int]] = {}
    for stage, rank in timing.plan.rank_of.items():
        held.setdefault(rank, []).append(stage)
    return {stage: n for stages in held.values() for n, stage in enumerate(stages)}


def time(t: float, unit: str = "") -> str:
    """For people: 28.5 ms."""
    return f"{float(t):,.4g} {unit}".rstrip()


def drawn(timing: Timing, width: int, unit: str = "") -> Iterator[str]:
    """Lines of at most `width` characters: the ranks, under one another, in up to `BANDS` pieces of the time; then the key.
    `unit`: of the times, such as ms."""
    names = [f"rank {rank} " for rank in range(len(timing.times))]
    label = len(names[-1])
    scale = _scale(timing, BANDS * (width - label))
    lines = [_line(timing, rank, scale) for rank in range(len(names))]
    for begin in range(0, len(lines[0]), width - label):
        shown = [line[begin : begin + width - label] for line in lines]
        yield from (f"{name:<{label}}{line}" for name, line in zip(names, shown, strict=True))
        from_, to = (time(n / scale, unit) for n in (begin, begin + len(shown[0])))
        yield f"{'':<{label}}{from_}{to:>{max(len(shown[0]) - len(from_), 1 + len(to))}}"
    used, of = {op.kind for op in timing.plan.place}, chunks(timing)
    key = [text for kind, text in KINDS.items() if kind in used]
    key += ["each with its micro-batch where there is room"] * any(c.isdigit() for line in lines for c in line)
    key += ["small letters: chunk 1" + ", 3 and so on" * (max(of.values()) > 2)] * any(of.values())
    yield from textwrap.wrap(", ".join([*key, "dots: idle"]), width, initial_indent=" " * label, subsequent_indent=" " * label)


def _scale(timing: Timing, room: int) -> float:
    """Characters of a unit of time. All but the quarter of the operations that is shortest have room for letter and number, or
    for the letter; or it is what there is."""
    lengths = sorted(end - begin for rank in timing.times for begin, end in rank if end > begin)
    short = lengths[len(lengths) // 4]
    for letters in (1 + len(str(timing.plan.micro_batches - 1)), 1):
        if letters * timing.makespan <= room * short:
            return float(letters / short)
    return float(room / timing.makespan)


def _line(timing: Timing, rank: int, scale: float) -> str:
    of, line = chunks(timing), [IDLE] * round(scale * timing.makespan)
    for op, (begin, end) in zip(timing.plan.ranks[rank], timing.times[rank], strict=True):
        at, room = round(scale * begin), round(scale * end) - round(scale * begin)
        kind = op.kind.lower() if of[op.stage] % 2 else op.kind
        # By its time and not by its room, which is rounded: what takes as long looks alike. Part of a number would be another.
        named = f"{kind}{op.micro_batch}" if len(f"{kind}{op.micro_batch}") <= scale * (end - begin) + 1e-6 else kind
        line[at : at + room] = named[:room].ljust(room, GOES_ON)
    return "".join(line)
