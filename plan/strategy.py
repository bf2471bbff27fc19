"""What is planned, as plain data: a model, a batch, and how both are laid out over ranks. Nothing here is about time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from math import gcd, prod

from models.config import Config
from models.stage import dealt
from parallel.schedules import SCHEDULES
from parallel.shard import AXES
from plan.sizes import Sizes, sizes

RECOMPUTE = ("none", "selective", "full", "half")
ATTENTION = ("unfused", "flash1", "flash2", "flash3")
# Bytes of an entry of weights and activations. Activations beside fp8 products stay in bf16.
DTYPES = {"bf16": 2, "fp16": 2, "fp8": 2, "float32": 4}
GRAD_DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
_EVERY = re.compile(r"every:([1-9]\d{0,5})", re.ASCII)
# Schedules on a V, the first and the last stage on one rank.
V = ("zb-v", "dualpipe-v")
# Axes whose ranks have batches of their own, or parts of one: gradients of what they share are summed over all of them.
DATA = ("dp", "ep", "cp")


@dataclass(frozen=True)
class Strategy:
    """A layout of training, named apart from that of an array (`parallel.shard.Layout`).

    `batch`, `micro_batch`: sequences, of a step and of one micro-batch of one data rank. `stage_layers`: blocks by stage in
    depth order, where not as even as it goes. `recompute`: also every:N, each N-th block whole. `zero_over`: ranks in a group
    that shards between them (HSDP), 0 for all data ranks. `fused`: whether norms, activations and the adding up of gradients
    are single kernels. `p2p`: what messages between stages do, blocking, or only delay; None: as
    the schedule's own software does. `jitter`: spread of a rank's time, as a share of it (section 4 of the docs' page).

    Raises ValueError, in one line, for what cannot be.
    """

    config: Config
    sequence_length: int
    batch: int
    micro_batch: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    stage_layers: tuple[int, ...] | None = None
    recompute: str = "none"
    sequence_parallel: bool = False
    zero: int = 0
    zero_over: int = 0
    attention: str = "flash2"
    fused: bool = True
    overlap: bool = True
    tp_overlap: bool = False
    p2p: str | None = None
    scatter_gather: bool = True
    dtype: str = "bf16"
    grad_dtype: str = "fp32"
    jitter: float = 0.0
    skew: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if (why := self._problem()) is not None:
            raise ValueError(why)

    def _problem(self) -> str | None:
        """Why this cannot be, in one line, or None."""
        c, tp, cp, ep = self.config, self.tp, self.cp, self.ep
        if tp > c.heads:
            return f"cannot cut {c.heads} heads over tp={tp}: use at most tp={c.heads}"
        if c.d_ff % tp and c.d_ff < tp:
            return f"cannot cut {c.d_ff} hidden entries over tp={tp}: use at most tp={c.d_ff}"
        if ep > 1 and c.experts is None:
            return f"--mesh ep={ep}: this model has no experts: use ep=1"
        if ep > 1 and c.experts.count % ep:
            near = gcd(ep, c.experts.count)
            return f"cannot deal {c.experts.count} experts to ep={ep} evenly: use for instance ep={near}"
        if self.sequence_length % (2 * cp if cp > 1 else 1):
            return f"cannot cut {self.sequence_length} tokens in zigzag over cp={cp}: use a multiple of {2 * cp}"
        if self.sequence_parallel and tp > 1 and self.tokens < tp:
            return f"cannot cut {self.tokens} tokens over tp={tp} in sequence parallelism: use at most tp={self.tokens}"
        if self.batch % (self.data * self.micro_batch):
            return self._undealt()
        return self._schedule_problem() or self._option_problem()

    def _undealt(self) -> str:
        """What would be right where micro-batches come out uneven: the data ranks below and above that fit."""
        whole = self.batch // self.micro_batch
        said = f"cannot deal {self.batch} sequences to {self.data} data ranks x micro-batch {self.micro_batch}"
        if self.batch % self.micro_batch:
            return f"{said}: use a micro-batch that divides {self.batch}, such as {gcd(self.batch, self.micro_batch)}"
        fit = [n for n in range(1, whole + 1) if whole % n == 0]
        near = [max((n for n in fit if n < self.data), default=None), min((n for n in fit if n > self.data), default=None)]
        return f"{said}: use {' or '.join(str(n) for n in near if n is not None)}"

    def _schedule_problem(self) -> str | None:
        c, v, made = self.config, self.chunks, SCHEDULES.get(self.schedule)
        if made is None:
            return f"there is no schedule {self.schedule}: use {', '.join(SCHEDULES)}"
        if v != made.chunks and not made.any_chunks:
            return f"{self.schedule} has {made.chunks} chunk{'s' * (made.chunks > 1)} a rank, got {v}: use interleaved"
        if self.micro_batches < (least := made.least(self.pp)):
            return (f"{self.schedule} needs {least} micro-batches for pp={self.pp}, got {self.micro_batches}: "
                    f"use {made.instead}")  # fmt: skip
        if self.stage_layers is None:
            if c.layers < self.stages:
                return f"cannot put {c.layers} layers on {self.stages} stages: give --layers, 0 for stages without blocks"
        elif len(self.stage_layers) != self.stages or sum(self.stage_layers) != c.layers:
            said = ",".join(map(str, self.stage_layers))
            return (f"--layers {said} puts {sum(self.stage_layers)} layers on {len(self.stage_layers)} stages, "
                    f"these are {c.layers} on {self.stages}: give the blocks of each")  # fmt: skip
        return None

    def _option_problem(self) -> str | None:
        allowed = {"attention": ATTENTION, "dtype": tuple(DTYPES), "grad_dtype": tuple(GRAD_DTYPES), "zero": (0, 1, 2, 3),
                   "p2p": (None, "blocking", "delay")}  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                use = ", ".join(str(v) for v in values if v is not None)
                return f"--{name.replace('_', '-')} {getattr(self, name)} is not known: use one of {use}"
        if self.recompute not in RECOMPUTE and not _EVERY.fullmatch(self.recompute):
            return f"--recompute {self.recompute} is not known: use one of {', '.join(RECOMPUTE)}, or every:N"
        if self.zero_over and self.data % self.zero_over:
            fit = gcd(self.data, self.zero_over)
            return f"cannot shard {self.data} data ranks in groups of {self.zero_over}: use a divisor, such as {fit}"
        return None

    def varied(self, options: Mapping[str, object]) -> Strategy:
        """With other options of those that no check looks at together with others: recompute, zero and the like. A search
        makes so many that checking each again would be most of its time."""
        other = copy(self)
        vars(other).update(options, family=self.family)
        for derived in ("recomputed_every", "shards"):
            vars(other).pop(derived, None)
        if (why := other._option_problem()) is not None:
            raise ValueError(why)
        return other

    # --- what follows from it

    @property
    def mesh(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in AXES}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the mesh, in the order of AXES."""
        return self.pp, self.dp, self.ep, self.cp, self.tp

    @property
    def stage_shape(self) -> tuple[int, ...]:
        """The same of the ranks of one stage, which meet no other's."""
        return 1, *self.shape[1:]

    @property
    def ranks(self) -> int:
        return prod(self.shape)

    @cached_property
    def sizes(self) -> Sizes:
        """Of the model."""
        return sizes(self.config)

    @cached_property
    def family(self) -> dict:
        """What was worked out for this layout, and for all those that are `varied` from it, by what it depends on."""
        return {}

    @cached_property
    def data(self) -> int:
        """Ranks that have sequences of their own."""
        return self.dp * self.ep

    @cached_property
    def micro_batches(self) -> int:
        return self.batch // (self.data * self.micro_batch)

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch, on one rank of cp: rows of its products."""
        return self.micro_batch * self.sequence_length // self.cp

    @cached_property
    def stages(self) -> int:
        return self.pp * self.chunks

    @property
    def blocks(self) -> Sequence[range]:
        """The numbers of each stage's blocks."""
        return blocks_by_stage(self.config.layers, self.stages, self.stage_layers)

    @property
    def rank_of(self) -> Sequence[int]:
        """The rank of pp that holds it, by stage: a loop, or the V of zb-v and dualpipe-v."""
        return ranks_of(self.pp, self.chunks, self.schedule in V)

    def stages_of(self, rank: int) -> Sequence[int]:
        """The stages of a rank of pp."""
        return (rank, 2 * self.pp - 1 - rank) if self.schedule in V else range(rank, self.stages, self.pp)

    @cached_property
    def recomputed_every(self) -> int:
        """Each so-manieth block is computed again whole; 0: none is."""
        found = _EVERY.fullmatch(self.recompute)
        return int(found[1]) if found else 1 if self.recompute == "full" else 0

    @cached_property
    def shards(self) -> int:
        """Ranks over which ZeRO splits what all data ranks share."""
        return (self.zero_over or self.data * self.cp) if self.zero else 1

    @property
    def blocks_on_messages(self) -> bool:
        """Whether both ranks wait for a message: Megatron's do in its own schedules, those in halves were made not to."""
        return not self.halved if self.p2p is None else self.p2p == "blocking"

    @property
    def halved(self) -> bool:
        """Whether the schedule has backwards in two halves."""
        return self.schedule.startswith(("zb", "dualpipe"))


@lru_cache(4096)
def blocks_by_stage(layers: int, stages: int, by_hand: tuple[int, ...] | None) -> tuple[range, ...]:
    """The numbers of each stage's blocks: by hand, else as evenly as it goes."""
    if by_hand is None:
        return tuple(dealt(layers, stages))
    return tuple(range(end - n, end) for end, n in zip(accumulate(by_hand), by_hand, strict=True))


@lru_cache(65536)
def kinds_of(blocks: range, first: int, every: int) -> tuple[tuple[bool, bool, int], ...]:
    """Of these blocks (routed, computed again, how many), where the `first` of a model are dense. `every`: see
    `Strategy.recomputed_every`."""
    found = []
    for routed, of in enumerate((range(blocks.start, min(blocks.stop, first)), range(max(blocks.start, first), blocks.stop))):
        again = sum(1 for i in of if every and i % every == 0)
        found += [(bool(routed), True, again), (bool(routed), False, len(of) - again)]
    return tuple(kind for kind in found if kind[2])


@lru_cache(4096)
def ranks_of(pp: int, chunks: int, v: bool) -> tuple[int, ...]:
    """The rank of pp of each stage, on a V or on a loop."""
    return (*range(pp), *reversed(range(pp))) if v else tuple(s % pp for s in range(pp * chunks))
