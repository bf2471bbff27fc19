"""A small model of language, a batch of sequences of unequal lengths, and the reference's loss of it.

T tokens   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from launch.options import UsageError
from models.config import Config, gpt2_like, llama_like
from reference import transformer as reference
from reference.attention import Options
from training.text import MicroBatch

VOCABULARY = 61


def model(family: str, layers: int, d_model: int, heads: int, d_ff: int, context: int, tied: bool) -> Config:
    """Raises UsageError where the heads do not fit."""
    if d_model % heads:
        raise UsageError(f"--heads {heads} does not divide --d-model {d_model}: use a divisor of {d_model}")
    if family == "llama" and d_model // heads % 2:
        raise UsageError(f"heads of odd width {d_model // heads} cannot be rotated: use --family gpt2")
    if family == "gpt2":
        return gpt2_like(VOCABULARY, d_model, layers, heads, d_ff, context, tied)
    return llama_like(VOCABULARY, d_model, layers, heads, heads, d_ff, context, tied)


def ragged(sequences: int, longest: int, seed: int) -> list[MicroBatch]:
    """One part a sequence, of unequal lengths, so that the numbers of tokens differ wherever they are dealt to."""
    random = np.random.default_rng(seed)
    lengths = [max(1, longest - 3 * n % longest) for n in range(sequences)]
    return [MicroBatch(*random.integers(0, VOCABULARY, (2, n)), [n]) for n in lengths]


def joined(parts: Sequence[MicroBatch]) -> MicroBatch:
    ids, targets = (np.concatenate(arrays) for arrays in zip(*((p.ids, p.targets) for p in parts), strict=True))
    return MicroBatch(ids, targets, [n for p in parts for n in p.lengths])


def reference_loss(config: Config, parts: Sequence[MicroBatch]) -> Callable[[dict], complex]:
    """The reference's own loss of the whole batch, of weights by name."""
    whole = joined(parts)
    asked = Options(whole.lengths, True, None if config.rope is None else {"pairing": "half"})
    return lambda W: reference.cross_entropy(reference.logits(W, whole.ids, asked, config.eps), whole.targets)
