"""What a planner is given and what it asks: the words between an account, a machine and the events of a step.

An *account* says what a layout computes, sends and keeps, without a word about time. There are two, and they are never mixed:
`plan.ours` asks rankwise's own layers, exactly; `plan.theirs` has what Megatron or FSDP do on GPUs, by the formulas of papers.
A *device* says how long one operation takes, `plan.kernels` for a GPU; `plan.collectives` how long a verb takes.
`plan.step` puts both together; nothing else asks which account it was given.

    class Account(Protocol):
        places(strategy)              -> [place]                    the ranks of one stage that differ
        parts(strategy, place)        -> ((Part, how many), ..) of each stage: what it does in one micro-batch
        alike(strategy)               -> a key                      equal where `parts` are, on all places
        hop_bytes(strategy)           -> bytes                      of a message between two stages, of one rank of tp
        once(strategy, rank, place)   -> Once                       what a rank of pp does once a step
        memory(strategy, rank, place) -> {kind: bytes}              of a rank of pp at the peak of a step, by KINDS
        in_flight(strategy, rank)     -> chunks                     of a rank of pp, at the peak
        fullest(strategy)             -> [rank of pp]               of which one holds the most, so that not all need be asked
        model(strategy, causal)       -> Facts                      parameters, and operations of a step of the whole model

`place` is a place on the axes other than pp, `{"tp": 3}`; what is absent is 0. Theirs has one, `{}`; of ours, uneven heads make
ranks of tp differ. A step takes the slowest of them at each stage, memory the fullest.

A Part must be the same object whenever it says the same (the account keeps it): its time is then worked out once, however many
layouts and layers ask. In `plan.theirs` it depends on the model, on tp, cp, ep, the micro-batch and a few switches only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from plan.strategy import Strategy

# When something is done, within a micro-batch. "again": what recomputation does before the backward to the input.
FORWARD, AGAIN, INPUT, WEIGHTS = PHASES = ("forward", "again", "input", "weights")
# What memory is held for. "communication" is what a library keeps for itself.
KINDS = ("weights", "gradients", "optimizer", "saved", "later", "gathered", "unsummed", "logits", "working", "communication")
Place = Mapping[str, int]


class Operation(NamedTuple):
    """One kind of kernel in one phase. `kind`, and what `shape` then is:

    product: (M, N, K, batch) of (M, K) x (K, N); unfused: the same, of attention's products without flash
    flash1, flash2, flash3: (sequences x heads, queries, pairs of a query and a key that it may see, widths E + V of a head),
             of forward or backward, by the phase
    pass:    (bytes read and written,)
    other kinds are their account's and device's own.
    """

    name: str
    kind: str
    phase: str
    shape: tuple[float, ...]
    times: float = 1


class Transfer(NamedTuple):
    """One verb of an axis. `message_bytes` of one call, as the ledger counts them. `axis`: also several joined, "dp,ep,cp".
    `beside`: what it goes on beside: "" nothing, "attend" the attention of its phase, "products" the products of weights,
    "half" half of itself, "unit" everything that its part does in this phase, "step" that it does in all phases."""

    verb: str
    axis: str
    phase: str
    calls: float
    message_bytes: float
    beside: str = ""


@dataclass(frozen=True, eq=False)
class Part:
    """A block, an embedding or a head in one micro-batch, its products in `dtype`. `kernels`: by phase, so many are
    launched."""

    name: str
    operations: tuple[Operation, ...]
    dtype: str
    transfers: tuple[Transfer, ...] = ()
    kernels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Once:
    """What one rank does once a step. `sums`: of gradients, which may go on beside the last backward; `gathers`: of updated
    weights, which may go on beside the first forward; `between`: of a tied table, between the pipeline's ends; `update`: the
    optimizer."""

    sums: Sequence[Transfer]
    gathers: Sequence[Transfer]
    between: Sequence[Transfer]
    update: Sequence[Operation]
    kernels: float = 0


class Facts(NamedTuple):
    """Of the whole model: parameters, those that one token meets; operations of a step, of the model and of the hardware, and
    the hardware's where attention is counted whole."""

    parameters: int
    active: int
    model_flops: float
    hardware_flops: float
    whole_flops: float


class Account(Protocol):
    name: str

    def places(self, s: Strategy) -> list[Place]: ...

    def parts(self, s: Strategy, place: Place) -> list[tuple[tuple[Part, int], ...]]: ...

    def alike(self, s: Strategy) -> Hashable: ...

    def hop_bytes(self, s: Strategy) -> float: ...

    def once(self, s: Strategy, rank: int, place: Place) -> Once: ...

    def memory(self, s: Strategy, rank: int, place: Place) -> dict[str, float]: ...

    def in_flight(self, s: Strategy, rank: int) -> int: ...

    def fullest(self, s: Strategy) -> list[int]: ...

    def model(self, s: Strategy, causal: bool = True) -> Facts: ...


class Device(Protocol):
    """`kernel`: seconds of each launch on the device; `host`: of each on the host, beside it."""

    kernel: float
    host: float

    def seconds(self, operation: Operation, dtype: str) -> float: ...
