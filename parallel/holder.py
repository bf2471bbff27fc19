"""What the parts of a model ask for while they are computed: weights before they use them, room for gradients before they fill
them.

    with holder.using(part.parameters):         # the weights are there
        x = part.forward(x)

    holder.filling(part.parameters)             # gradients of a micro-batch begin
    holder.filled(part.parameters)              # and are complete
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from parallel.axis import Axis
from parallel.parameter import Parameter
from parallel.schedule import Op


class Over(NamedTuple):
    """The ranks that a gradient is summed over: those of `axis`, which share the sum out where it is split, and then, where
    these are not all, those of `rest`."""

    axis: Axis
    rest: Axis | None = None

    @property
    def number(self) -> tuple[int, int]:
        """This rank's among all of them, and how many there are."""
        rest, others = (0, 1) if self.rest is None else (self.rest.rank, self.rest.size)
        return self.axis.rank + self.axis.size * rest, self.axis.size * others


class Holder:
    """Holds nothing back: all weights are in place, gradients stay where they are."""

    def begin(self, ops: Sequence[Op], phases: Mapping[str, str]) -> None:
        """This rank's operations from here on, in order; `phases`: that of each kind, for the ledger."""

    @contextmanager
    def using(self, parameters: Iterable[Parameter]) -> Iterator[None]:
        """The weights of a part are there while it is computed."""
        yield

    def filling(self, parameters: Iterable[Parameter]) -> None:
        """A backward is about to add a micro-batch's gradients of these."""

    def filled(self, parameters: Iterable[Parameter]) -> None:
        """A micro-batch's gradients of these are complete."""


IN_PLACE = Holder()
