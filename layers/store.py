"""A cache's side of one layer: it keeps new tokens, and knows by which way attention reads them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from layers.attend import Keep
from layers.attention import Attention
from layers.latent_attention import LatentAttention
from layers.rope import Rotation


class Store:
    """Of a cache that holds, on each rank, every token of what this rank's heads read."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep

    def __call__(self, *new: np.ndarray) -> Iterable[tuple]:
        """As `keep`."""
        return self.keep(*new)

    def attended(self, attention: Attention | LatentAttention, x_TD: np.ndarray, rotation: Rotation | None) -> np.ndarray:
        """x (T, D), new tokens -> y (T, D), what `attention` makes of them and of what is kept."""
        return attention.cached(x_TD, rotation, self.keep)


class StripedStore(Store):
    """Of a cache of latents that holds every p-th position on each of p ranks."""

    def attended(self, attention: LatentAttention, x_TD: np.ndarray, rotation: Rotation | None) -> np.ndarray:
        return attention.cached_striped(x_TD, rotation, self.keep)
