"""The first account: what rankwise itself computes, sends and keeps in a step of launch.train, exactly: its layers are asked,
on a dry mesh. No formula is written here a second time; launch.plan --verify compares with real ranks by ==.

Experts are chosen alike, as nobody knows their choice beforehand. Memory is what launch.train counts: what a layer takes while
it computes is not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import layers.work
from layers.batch import Batch
from layers.stage import Beginning, End
from layers.step import Recipe, Step, crossing
from layers.work import Work
from models.build import build
from parallel import pipeline
from parallel.ledger import Traffic
from parallel.schedules import plan as planned
from parallel.shard import DATA
from plan.account import AGAIN, FORWARD, INPUT, KINDS, WEIGHTS, Facts, Once, Operation, Part, Place, Transfer
from plan.dry import DryAxis, DryMesh, dry_weights
from plan.strategy import Strategy
from plan.training import Training, sequences

# Of the layers' words for when something is done.
_PHASES = {"forward": FORWARD, layers.work.AGAIN: AGAIN, "backward": INPUT, layers.work.WEIGHTS: WEIGHTS}
# When operations of a plan are, where a backward comes whole or in halves.
_KINDS = {"F": FORWARD, "B": INPUT, "I": INPUT, "W": WEIGHTS}
NOTHING: Mapping[str, Iterable[Traffic]] = {}


@dataclass(frozen=True)
class How:
    """What of launch.train's options a Strategy has no word for."""

    context: str = "ring"
    layout: str = "zigzag"
    bucket_bytes: int = 4 * 2**20
    zero_over: tuple[str, ...] = DATA
    clip: float = 1.0
    alpha: float = 0.0


AS_USUAL = How()


def training(s: Strategy, how: How = AS_USUAL) -> Training:
    """The step of launch.train that has this layout. Raises ValueError for what it cannot do."""
    refused = {"recompute": s.recompute in ("none", "full"), "dtype": s.dtype == "float32", "tp_overlap": not s.tp_overlap}
    if wrong := [name for name, fine in refused.items() if not fine]:
        right = {"recompute": "none or full", "dtype": "float32", "tp_overlap": "off"}[wrong[0]]
        option = f"--{wrong[0].replace('_', '-')}"
        raise ValueError(f"{option} {getattr(s, wrong[0])} is nothing that launch.train does: use {right}, or --account theirs")
    plan = planned(s.schedule, s.pp, s.micro_batches, s.chunks)
    own = {"schedule": plan, "layout": how.layout, "alpha": how.alpha}
    recipe = Recipe(how.clip, s.zero, how.zero_over, s.overlap, how.bucket_bytes, **own)
    dealt = sequences(s.batch, s.sequence_length, s.data, s.micro_batches)
    more = s.recompute == "full", s.sequence_parallel, how.context
    return Training(s.config, s.mesh, plan, s.blocks, dealt, recipe, s.dtype, *more)


class Ours:
    """`how`: what all layouts that it is asked about share."""

    name = "ours"

    def __init__(self, how: How = AS_USUAL) -> None:
        self.how = how
        self._step = lru_cache(256)(self._made)
        self._parts: dict[Hashable, Part] = {}

    def places(self, s: Strategy) -> list[Place]:
        """Of tp all, where heads are dealt out unevenly, else the first, which has the most of whatever is; of cp all, where
        tokens are."""
        tp = range(s.tp) if s.config.heads % s.tp else range(1)
        cp = range(s.cp) if self.how.layout == "contiguous" else range(1)
        return [{"cp": c, "tp": t} for c in cp for t in tp]

    def fullest(self, s: Strategy) -> list[int]:
        return list(range(s.pp))

    def alike(self, s: Strategy) -> Hashable:
        return s

    def _made(self, s: Strategy, rank: int, place: tuple) -> tuple[Training, Step, list[Batch]]:
        """A rank's step, and its first micro-batch: all are alike."""
        training_ = training(s, self.how)
        mesh = DryMesh(s.mesh, 0)
        step = training_.step(mesh.rank_at({"pp": rank, **dict(place)}))
        return training_, step, training_.batches(step)

    def step(self, s: Strategy, rank: int, place: Place) -> tuple[Training, Step, list[Batch]]:
        return self._step(s, rank, tuple(place.items()))

    def parts(self, s: Strategy, place: Place) -> list[tuple[tuple[Part, int], ...]]:
        return [self._of_stage(s, stage, place) for stage in range(s.stages)]

    def _of_stage(self, s: Strategy, stage: int, place: Place) -> tuple[tuple[Part, int], ...]:
        rank = s.rank_of[stage]
        training_, step, batches = self.step(s, rank, place)
        found: Counter[Part] = Counter()
        held, batch = step.stages[stage], batches[0]
        units = step.holder.within(step.ops(training_.plan), pipeline.PHASES)
        for n, part in enumerate(held.parts):
            loss = []
            sent, work = part.traffic(batch), list(part.work(batch))
            if isinstance(part, End):
                sent = [*sent, *part.loss.traffic(batch.tokens, step.dtype.itemsize)]
                loss = part.loss.work(batch.tokens)
            elif not isinstance(part, Beginning):
                sent = [*sent, *part.exchanged(batch)]
            name = "end" if isinstance(part, End) else "beginning" if isinstance(part, Beginning) else "block"
            of_unit = {kind: units.get((stage, n, kind), ()) for kind in _KINDS}
            found[self._part(name, s, [*work, *loss], sent, unit=of_unit)] += 1
        if stage == s.stages_of(rank)[0]:
            # Made once for all stages of a rank.
            pairs = 0 if batch.rotation is None else batch.rotation.cos_TP.shape[1]
            found[self._part("batch", s, [], [], (batch.tokens, pairs))] += 1
        return tuple(found.items())

    def _part(
        self,
        name: str,
        s: Strategy,
        work: Iterable[Work],
        sent: Iterable[Traffic],
        batch: tuple = (),
        unit: Mapping[str, Iterable[Traffic]] = NOTHING,
    ) -> Part:
        """The same object whenever it says the same. `unit`: what ZeRO sends for it in the operations of each kind of a whole
        step, of which a micro-batch has its share."""
        work, calls = layers.work.condensed(work), Counter(sent)
        transfers, alone = apart(calls, s)
        for kind, every in unit.items():
            there, here = apart(Counter(every), s)
            share = {"phase": _KINDS[kind], "beside": "unit" if s.overlap else ""}
            transfers += tuple(t._replace(calls=t.calls / s.micro_batches, **share) for t in there)
            alone += tuple(op._replace(phase=_KINDS[kind], times=op.times / s.micro_batches) for op in here)
        key = name, tuple(work), transfers, alone, batch
        if (part := self._parts.get(key)) is None:
            operations = [Operation(w.what or w.kind, w.kind, _PHASES[w.phase], w.shape, w.times) for w in work]
            phases = {_PHASES[w.phase] for w in work}
            operations += [Operation(name, "calls", phase, ()) for phase in (FORWARD, AGAIN, INPUT) if phase in phases]
            operations += [Operation("rotation's angles", "batch", FORWARD, batch)] if batch else []
            part = self._parts[key] = Part(name, (*operations, *alone), s.dtype, transfers)
        return part

    def hop_bytes(self, s: Strategy) -> float:
        _, step, batches = self.step(s, 0, {})
        return prod(crossing(step.stages, batches[0])) * step.dtype.itemsize

    def once(self, s: Strategy, rank: int, place: Place) -> Once:
        _, step, _ = self.step(s, rank, place)
        sent = step.holder.after()
        between = [t for t in step.owed.traffic() if t.axis.startswith("pp")]
        sums = [t for t in step.owed.traffic() if not t.axis.startswith("pp")] + step.scalars()
        sums += [t for t in sent if t.phase == "backward"]
        gathers = [t for t in sent if t.phase != "backward"]
        owned = sum(at.stop - at.start for at in step.holder.ranges)
        entries = step.holder.numbering.size
        update = [Operation("norm", "norm", WEIGHTS, (owned,)), Operation("AdamW", "adamw", WEIGHTS, (owned,)),
                  Operation("step", "calls", WEIGHTS, ())]  # fmt: skip
        update += [Operation("sums", "pass", WEIGHTS, (entries, entries))] if s.zero == 1 else []
        each = [apart(Counter(of), s) for of in (sums, gathers, between)]
        return Once(*(transfers for transfers, _ in each), [*update, *(op for _, alone in each for op in alone)])

    def memory(self, s: Strategy, rank: int, place: Place) -> dict[str, float]:
        training_, step, batches = self.step(s, rank, place)
        return dict.fromkeys(KINDS, 0) | step.memory(training_.plan, batches)

    def in_flight(self, s: Strategy, rank: int) -> int:
        return planned(s.schedule, s.pp, s.micro_batches, s.chunks).peaks("W")[rank]

    def model(self, s: Strategy, causal: bool = True) -> Facts:
        """Attention is computed causally, and so counted."""
        return _facts(s.config, s.sequence_length, s.batch, s.recompute == "full")


@lru_cache(64)
def _facts(config: object, S: int, batch: int, again: bool) -> Facts:
    whole = build(config, DryAxis("tp", 1), dry_weights("float32"))
    work = whole.work(whole.batch([S]))
    once = layers.work.operations(work)
    forward = [w for w in work if w.phase == "forward"]
    hardware = once + (layers.work.operations(forward) if again else 0)
    size = lambda p: prod(p.layout.shape)  # noqa: E731
    # A token meets the experts that it chooses; of a table it reads a row.
    active = sum(size(p) * p.read for p in whole.parameters)
    return Facts(sum(map(size, whole.parameters)), int(active), batch * once, batch * hardware, batch * hardware)


def apart(calls: Mapping[Traffic, int], s: Strategy) -> tuple[tuple[Transfer, ...], tuple[Operation, ...]]:
    """In the planner's words: what goes from rank to rank, and verbs of axes of one rank, which copy. A group of tp's ranks,
    which share heads, is taken for all of tp."""
    transfers, alone = [], []
    for t, n in calls.items():
        names = t.axis.partition("[")[0].split("*")
        phase = {"forward": FORWARD, "backward": INPUT}.get(t.phase, WEIGHTS)
        if prod(s.mesh.get(name, 1) for name in names) == 1:
            alone.append(Operation(t.verb, "alone", phase, (t.message_bytes,), n * t.calls))
        else:
            transfers.append(Transfer(t.verb, ",".join(names), phase, n * t.calls, t.message_bytes))
    return tuple(transfers), tuple(alone)
