"""NaN and infinity, caught by the verb that is about to send them."""

from __future__ import annotations

import linecache
import os

import numpy as np

from parallel.call import ROOT, Call, Watched, Watcher
from parallel.verbs import VERBS


class NotFinite(ArithmeticError):
    """A NaN or an infinity was about to be sent. Raised on the ranks that have it."""


class Finite(Watcher):
    """Raises NotFinite where what is sent has a NaN or an infinity. It looks at the sum, which has one if any entry has."""

    def begin(self, axis: Watched, call: Call, x: np.ndarray | None) -> None:
        if x is not None:
            _require_finite(axis, call, x, "sends")

    def end(self, axis: Watched, call: Call, y: np.ndarray | None, entered: float, left: float) -> None:
        # The sum over ranks of finite terms may be infinite.
        if y is not None and VERBS[call.verb].reduces:
            _require_finite(axis, call, y, "gets")


def _require_finite(axis: Watched, call: Call, x: np.ndarray, does: str) -> None:
    if x.dtype.kind != "f":
        return
    with np.errstate(all="ignore"):
        if np.isfinite(x.sum()):
            return
    finite = np.isfinite(x)
    if finite.all():
        return
    nans = int(np.isnan(x).sum())
    first = ", ".join(str(int(i)) for i in np.unravel_index(int(np.argmin(finite)), x.shape))
    raise NotFinite(
        f"rank {axis.rank} of {axis.name} {does} {nans:,} NaN and {x.size - int(finite.sum()) - nans:,} infinite of {x.size:,} "
        f"numbers, the first at [{first}], in {call} at {call.site} ({call.phase}): {_source(call.site)}"
    )


def _source(site: str) -> str:
    """The line of the program, whose names say which tensor it is."""
    file, _, line = site.rpartition(":")
    return linecache.getline(os.path.join(ROOT, file), int(line)).strip()
