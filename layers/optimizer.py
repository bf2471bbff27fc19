"""Optimizers: they read gradients and change weights, in place, each rank its own part."""

from __future__ import annotations

import numpy as np

from parallel.parameter import Parameter


class SGD:
    """v = momentum v + g; w -= lr v (Sutskever et al., 2013, as PyTorch writes it). `lr` may be changed between steps."""

    def __init__(self, parameters: list[Parameter], lr: float, momentum: float = 0.9) -> None:
        self.parameters, self.lr, self.momentum = parameters, lr, momentum
        self._velocity = [np.zeros_like(p.data) for p in parameters]

    def step(self) -> None:
        """One update from the gradients that backward has added since zero_grad."""
        for p, v in zip(self.parameters, self._velocity, strict=True):
            v *= self.momentum
            v += p.grad
            p.data -= p.data.dtype.type(self.lr) * v

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.zero_grad()
