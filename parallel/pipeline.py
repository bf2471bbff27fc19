"""A pipeline plan on real ranks: each does its operations in order, and arrays go from stage to stage.

    run(plan, mesh.pp, do, shape, dtype)        # do(op, x): what the operation makes of the array that it needs

Sends never wait, and what a rank receives from another it receives in the order of the other's plan. So a plan that `check`
lets pass cannot deadlock, and nothing has to be said about what a message is: neither tags nor shapes travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from itertools import zip_longest

import numpy as np

from parallel.axis import Axis
from parallel.control import Control
from parallel.ledger import Traffic
from parallel.schedule import Op, Plan
from parallel.text import named

# The phase of what is sent, by the kind of the operation that made it.
PHASES = {"F": "forward", "I": "backward", "B": "backward", "W": "backward"}


class PlanMismatch(RuntimeError):
    """Ranks hold different plans. Raised on all of them, with the same text, before the first message."""


def run(
    plan: Plan,
    pp: Axis,
    do: Callable[[Op, np.ndarray | None], np.ndarray | None],
    shape: Callable[[int], tuple[int, ...]],
    dtype: np.dtype | type | str,
    phases: Mapping[str, str] = PHASES,
) -> None:
    """Do this rank's operations. `do` returns what the next stage needs, and must not write it any more; where nobody needs it,
    what it returns is dropped. `shape`: of what crosses, by micro-batch."""
    coming = [deque(plan.sent(source, pp.rank)) for source in range(pp.size)]
    there: dict[Op, np.ndarray | None] = {}
    sends = []
    for op in plan.ranks[pp.rank]:
        pp.operation(str(op))
        need = plan.needs(op)
        while need is not None and need not in there:
            source = plan.rank_of[need.stage]
            came = coming[source].popleft()
            with pp.ledger.phase(phases[came.kind]):
                there[came] = pp.receive(shape(came.micro_batch), dtype, source, what=str(came))
        with pp.ledger.phase(phases[op.kind]):
            made = do(op, None if need is None else there.pop(need))
            to = plan.to(op)
            if to == pp.rank:
                there[op] = made
            elif to is not None:
                sends.append(pp.start_send(made, to, what=str(op)))
    pp.operation("")
    for send in sends:
        send.wait()


def traffic(plan: Plan, pp: Axis, nbytes: Callable[[int], int], phases: Mapping[str, str] = PHASES) -> list[Traffic]:
    """What `run` sends and receives on this rank. `nbytes`: of what crosses, by micro-batch."""
    sent = [("send", op) for op in plan.ranks[pp.rank] if plan.to(op) not in (None, pp.rank)]
    received = [("receive", op) for source in range(pp.size) for op in plan.sent(source, pp.rank)]
    return [Traffic(verb, pp.name, phases[op.kind], nbytes(op.micro_batch)) for verb, op in sent + received]


def require_same(plan: Plan, control: Control) -> None:
    """Raise PlanMismatch on every rank unless all hold the same plan: then collectives inside operations pair up, too."""
    every = control.everyone(blake2b(plan.text().encode(), digest_size=8).digest())
    if len(set(every)) > 1:
        raise PlanMismatch(_difference(control.everyone(plan.text().split("\n"))))


def _difference(every: Sequence[list[str]]) -> str:
    """In words, where plans first differ: a line a rank of pp."""
    for line, of_rank in enumerate(zip_longest(*every, fillvalue="")):
        for n, words in enumerate(zip_longest(*(ops.split(",") for ops in of_rank), fillvalue="")):
            if len(set(words)) > 1:
                having = {word: [rank for rank, other in enumerate(words) if other == word] for word in words}
                said = [f"{named(r)} {'has' if len(r) == 1 else 'have'} {word or 'nothing'}" for word, r in having.items()]
                return f"plans differ: as operation {n} of rank {line} of pp, {', '.join(sorted(said, key=len))}"
    return "plans differ: some are for more ranks"
