"""Three real steps of a layout beside what its plan says of them, rank by rank: messages, bytes, order of operations, memory by
kind, peak in flight, products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import NamedTuple

from layers.step import Kept
from parallel.axis import Axis
from parallel.call import Watcher
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.products import counted
from plan.training import Noted, Told, Training
from training.text import MicroBatch
from training.trainer import Trainer

STEPS, SPREAD, RATE = 3, 0.1, 1e-2


class Operations(Watcher):
    """Hears which operations of its plan a rank does, in order."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def operation(self, axis: Axis, what: str) -> None:
        if what:
            self.heard.append(what)


class Ran(NamedTuple):
    """What this rank did, what was chosen of experts in each step, and seconds of each."""

    told: Told
    noted: list[Noted | None]
    seconds: list[float]


def ran(training: Training, mesh: Mesh, micro_batches: Sequence[MicroBatch], seed: int) -> Ran:
    """STEPS of them. All ranks of the mesh call it together."""
    trainer = Trainer(training.stages(mesh, drawn(seed, training.dtype, SPREAD)), mesh, training.recipe)
    trainer.plan(len(micro_batches))
    mesh.ledger.rows.clear()
    mesh.watchers.append(operations := Operations())
    noted, seconds, tokens = [], [], training.tokens
    with counted() as made:
        for _ in range(STEPS):
            mesh.control.wait()
            begun = perf_counter()
            trainer.step(micro_batches, tokens, RATE)
            seconds.append(perf_counter() - begun)
            noted.append(trainer.noted or None)
    mesh.watchers.remove(operations)
    sent = {key: (row.calls, row.message_bytes) for key, row in mesh.ledger.rows.items()}
    return Ran(Told(sent, operations.heard, trainer.held, trainer.in_flight, made), noted, seconds)


def together(steps: Sequence[Told]) -> Told:
    """Steps after one another: what is sent and made adds up, of what is held the most counts."""
    sent: dict[tuple[str, str, str], tuple[int, int]] = {}
    for step in steps:
        for key, (calls, size) in step.sent.items():
            before = sent.get(key, (0, 0))
            sent[key] = before[0] + calls, before[1] + size
    fullest = max(steps, key=lambda step: sum(step.memory[kind] for kind in Kept._fields))
    made = sum((step.products for step in steps), Counter())
    return Told(sent, [op for step in steps for op in step.operations], fullest.memory, steps[0].in_flight, made)


def compared(predicted: Told, counted: Told) -> list[dict]:
    """A row of each thing that is counted."""
    rows = []

    def row(what: str, a: object, b: object, equal: bool | None = None) -> None:
        rows.append({"what": what, "predicted": a, "counted": b, "equal": a == b if equal is None else equal})

    for key in dict.fromkeys([*predicted.sent, *counted.sent]):
        for n, unit in enumerate(("messages", "bytes")):
            row(f"{unit}: {' '.join(key)}", *(told.sent.get(key, (0, 0))[n] for told in (predicted, counted)))
    row("order of operations", *(",".join(told.operations) for told in (predicted, counted)))
    for kind in dict.fromkeys([*predicted.memory, *counted.memory]):
        row(f"memory: {kind}", *(told.memory.get(kind) for told in (predicted, counted)))
    row("peak in flight", predicted.in_flight, counted.in_flight)
    of = [predicted.products, counted.products]
    row("products", *(made.total() for made in of), of[0] == of[1])
    return rows


def verified(training: Training, mesh: Mesh, micro_batches: Sequence[MicroBatch], seed: int) -> tuple[list[dict], list[float]]:
    """The rows of all ranks, and seconds of each step on the slowest. All ranks call it together."""
    did = ran(training, mesh, micro_batches, seed)
    own = compared(together([training.told(mesh.rank, noted) for noted in did.noted]), did.told)
    every = mesh.control.everyone(([{"rank": mesh.rank, **row} for row in own], did.seconds))
    return [row for rows, _ in every for row in rows], [max(of) for of in zip(*(s for _, s in every), strict=True)]


def summed(rows: Iterable[dict]) -> list[dict]:
    """A row a rank and kind of thing, of the rows of all things."""
    found: dict[tuple[int, str], dict] = {}
    for row in rows:
        what = row["what"].partition(": ")[0] if row["what"].startswith(("messages", "bytes")) else row["what"]
        if (known := found.get((row["rank"], what))) is None:
            found[row["rank"], what] = {**row, "what": what}
            continue
        for side in ("predicted", "counted"):
            known[side] += row[side]
        known["equal"] = known["equal"] and row["equal"]
    return [*found.values()]
