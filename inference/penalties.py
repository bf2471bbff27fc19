"""What a request changes in the logits before a token is chosen by them: biases, ends that may not come yet, penalties.

    v this rank's share of the vocabulary

Each rank changes its own ids, from the tokens so far, which all ranks know: nothing is sent. The order is vLLM's. What comes
next, temperature and filters, sees the changed logits; log-probabilities that are told are the model's own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Penalties:
    """With n the times that a token is in the answer so far, its logit z becomes, one after another:

    z + bias; -inf for an end token before the answer has `min_tokens`; z / `repetition` if z > 0, else z * `repetition`, for
    tokens of the prompt and the answer (arXiv 1909.05858, as in Transformers); z - `frequency` n - `presence` [n > 0] (OpenAI).

    Raises ValueError for a repetition that is not above 0.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    min_tokens: int = 0
    bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.repetition > 0:
            raise ValueError(f"repetition penalty {self.repetition} must be above 0")

    def __bool__(self) -> bool:
        return self != NONE

    def applied(
        self, z_v: np.ndarray, first: int, prompt: Sequence[int], answer: Sequence[int], ends: Collection[int]
    ) -> np.ndarray:
        """z at the ids from `first` on, in float64. `prompt`, `answer`: the tokens so far."""
        z_v = z_v.astype(np.float64)

        def here(ids: Collection[int], **more: bool) -> tuple[np.ndarray, ...]:
            """Those that are this rank's, each once, as places in z."""
            ids = np.fromiter(ids, np.int64, len(ids)) - first
            return np.unique(ids[(ids >= 0) & (ids < len(z_v))], **more)

        for id, bias in self.bias:
            if first <= id < first + len(z_v):
                z_v[id - first] += bias
        if len(answer) < self.min_tokens:
            z_v[here(ends)] = -np.inf
        if self.repetition != 1:
            at = here([*prompt, *answer])
            z_v[at] = np.where(z_v[at] > 0, z_v[at] / self.repetition, z_v[at] * self.repetition)
        if self.presence or self.frequency:
            at, counts = here(answer, return_counts=True)
            z_v[at] -= self.frequency * counts + self.presence
        return z_v


NONE = Penalties()
