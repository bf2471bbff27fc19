"""The verbs of an axis, and what is true of each: one table, which the ledger, the watchers and the watchdog ask.

A new verb has its row here and its method on `Axis`; one that sums has the order of its sum in `OrderedSums` too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Verb:
    """`how`: the names of what the ranks must agree on beside shape and dtype; of a verb between two, the name of the peer.
    `share`: of the message, what one rank of p sends on a ring. `reduces`: its result is a sum, a maximum or a minimum.
    `starts`: it can also be started, and goes on while the rank computes. `partner`: of a verb between two, what the peer
    calls; "" where all ranks of the axis call the same one."""

    how: tuple[str, ...]
    share: Callable[[int], Fraction]
    reduces: bool = False
    starts: bool = False
    partner: str = ""

    @property
    def one_speaks(self) -> bool:
        """Whether only the root's array is read."""
        return "root" in self.how


def _one(p: int) -> Fraction:
    return Fraction(1)


def _once_round(p: int) -> Fraction:
    return Fraction(p - 1, p)


def _twice_round(p: int) -> Fraction:
    return Fraction(2 * (p - 1), p)


VERBS = {
    "all_reduce": Verb(("op",), _twice_round, reduces=True, starts=True),
    "reduce_scatter": Verb(("dim", "cut"), _once_round, reduces=True, starts=True),
    "all_gather": Verb(("dim", "cut"), _once_round, starts=True),
    "all_to_all": Verb(("split dim", "split", "join dim", "join"), _once_round),
    "shift": Verb(("counts",), lambda p: Fraction(int(p > 1)), starts=True),
    "exchange": Verb((), _one),
    "broadcast": Verb(("root",), _once_round),
    "send": Verb(("to",), _one, starts=True, partner="receive"),
    "receive": Verb(("from",), lambda _: Fraction(0), partner="send"),
}


def method_name(verb: str, started: bool = False) -> str:
    """The method of `Axis` that calls the verb, or starts it."""
    return f"start_{verb}" if started else verb


# Every method of `Axis` that is a verb.
METHODS = tuple(method_name(name, started) for name, verb in VERBS.items() for started in (False, True)[: 1 + verb.starts])
