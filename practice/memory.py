"""The memory that a learner's code takes."""

from __future__ import annotations

import builtins
import sys
import tracemalloc
from types import ModuleType
from typing import Any


class Memory:
    """Within, memory that is taken is traced, without that of imports: NumPy imports some of its modules when it needs them."""

    def __enter__(self) -> Memory:
        # Bytes that imports have taken, the peak before the last of them, and how deep in imports this is.
        self._modules, self._before, self._depth, self._usual = 0, 0, 0, builtins.__import__
        tracemalloc.start()
        builtins.__import__ = self._imported
        return self

    def __exit__(self, *_: object) -> None:
        builtins.__import__ = self._usual
        tracemalloc.stop()

    def begin(self) -> int:
        """The bytes that are held now; from here on the peak counts."""
        self._before = 0
        tracemalloc.reset_peak()
        return tracemalloc.get_traced_memory()[0] - self._modules

    def peak(self) -> int:
        return max(self._before, tracemalloc.get_traced_memory()[1] - self._modules)

    def _imported(self, *args: Any, **kwargs: Any) -> ModuleType:
        if self._depth or not tracemalloc.is_tracing():
            return self._usual(*args, **kwargs)
        known, peak, held = len(sys.modules), self.peak(), tracemalloc.get_traced_memory()[0]
        self._depth += 1
        try:
            return self._usual(*args, **kwargs)
        finally:
            self._depth -= 1
            if len(sys.modules) > known:
                self._before = peak
                self._modules += tracemalloc.get_traced_memory()[0] - held
                tracemalloc.reset_peak()
