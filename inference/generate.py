"""Prefill, then decode: one sequence, token by token, through a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from inference.cache import CACHES, Cache, Striped
from inference.sampling import Sampler, Sampling
from layers.block import forward_only
from layers.latent_attention import LatentAttention
from layers.transformer import Transformer
from parallel.ledger import Traffic
from parallel.mesh import Mesh


def make_cache(model: Transformer, kind: str, striped: bool = False, blocks: int | None = None) -> Cache | Striped:
    """An empty cache for this rank's share of the model's heads. `striped`: of latents, every p-th position on each rank.

    Raises ValueError for a striped cache of a model that keeps keys and values by heads.
    """
    shapes = [block.attention.cache_shapes for block in model.blocks]
    dtype = model.embedding.table_vD.data.dtype
    if striped and not all(isinstance(block.attention, LatentAttention) for block in model.blocks):
        raise ValueError("a striped cache is for latent attention; this model's heads are cut over the ranks already")
    cache = CACHES[kind](shapes, dtype) if blocks is None else CACHES[kind](shapes, dtype, blocks)
    tp = model.embedding.tp
    return Striped(cache, tp.size, tp.rank) if striped else cache


@dataclass(frozen=True)
class Step:
    """A new token; its log-probability under the model itself (temperature 1, no filters), if asked for."""

    token: int
    logprob: float | None


@dataclass
class Clock:
    """Seconds of the two phases, the prompt's tokens, those made by decoding, and what the cache held of one on this rank."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    cache_bytes_per_token: float = 0.0


class Generator:
    """Sequences of one model on all ranks of its tp axis. All ranks call it together, with the same arguments."""

    def __init__(self, model: Transformer, mesh: Mesh, cache: Cache | Striped) -> None:
        self.model, self.mesh, self.cache = model, mesh, cache
        self.sampler = Sampler(model.embedding.tp, model.embedding.cut)
        self.striped = isinstance(cache, Striped)
        self.clock = Clock()
        model.head.keep_turned()

    def forward(
        self, batch: Sequence[tuple[int, Sequence[int]]], rows: Sequence[int] | None = None, layers: int | None = None
    ) -> np.ndarray:
        """New tokens of some sequences, (sequence, ids) each -> logits (len(rows), v) of those rows of the batch; None: of each
        sequence's last token. The cache holds them afterwards; with `layers`, only in so many first layers."""
        positions = [np.arange(self.cache.lengths[s], self.cache.lengths[s] + len(ids)) for s, ids in batch]
        sizes = [(s, len(ids)) for s, ids in batch]
        for s, n in sizes:
            self.cache.extend(s, n)
        ids_T = np.concatenate([np.asarray(ids, np.int64) for _, ids in batch])
        chosen = np.cumsum([n for _, n in sizes]) - 1 if rows is None else np.asarray(rows)
        return self.model.cached(ids_T, np.concatenate(positions), self.cache.stores(sizes)[:layers], chosen)

    def prefill(self, sequence: int, prompt: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """The prompt, `chunk` tokens at a time, into an open sequence -> logits (1, v) of its last token."""
        begun = perf_counter()
        chunk = chunk or len(prompt)
        with self.mesh.phase("prefill"):
            for first in range(0, len(prompt), chunk):
                logits_1v = self.forward([(sequence, prompt[first : first + chunk])])
        self.clock.prefill_seconds += perf_counter() - begun
        self.clock.prefill_tokens += len(prompt)
        return logits_1v

    def tokens(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        most: int,
        *,
        request: int = 0,
        ends: frozenset[int] = frozenset(),
        chunk: int | None = None,
        logprobs: bool = False,
    ) -> Iterator[Step]:
        """Up to `most` new tokens, the last of them one of `ends` if one of these comes. Frees the sequence at the end.

        The first token's time belongs to prefill, as its logits come from it.
        """
        self.cache.open(request)
        try:
            logits_1v = self.prefill(request, prompt, chunk)
            begun = perf_counter()
            with self.mesh.phase("prefill"):
                first = self._chosen(logits_1v, sampling, request, len(prompt), logprobs)
            self.clock.prefill_seconds += perf_counter() - begun
            yield first
            if first.token in ends:
                return
            for step in self._decoded(list(prompt), first.token, sampling, most, request, logprobs):
                yield step
                if step.token in ends:
                    return
        finally:
            length = self.cache.lengths[request]
            self.clock.cache_bytes_per_token = self.cache.bytes_of(request) / length if length else 0.0
            self.cache.free(request)

    def _decoded(
        self, context: list[int], first: int, sampling: Sampling, most: int, request: int, logprobs: bool
    ) -> Iterator[Step]:
        """The tokens after `first`, which was chosen from the prompt's logits and has not been run."""
        token = first
        for n in range(1, most):
            begun = perf_counter()
            with self.mesh.phase("decode"):
                logits_1v = self.forward([(request, [token])])
                step = self._chosen(logits_1v, sampling, request, len(context) + n, logprobs)
            self.clock.decode_tokens += 1
            self.clock.decode_seconds += perf_counter() - begun
            token = step.token
            yield step

    def _chosen(self, logits_1v: np.ndarray, sampling: Sampling, request: int, position: int, logprobs: bool) -> Step:
        token = self.sampler.choose(logits_1v, [sampling], [request], [position])[0]
        return Step(token, self._logprob(logits_1v[0], token) if logprobs else None)

    def _logprob(self, logits_v: np.ndarray, token: int) -> float:
        return float(self.sampler.of_token(self.sampler.log_probabilities(logits_v), token))

    def traffic(self, tokens: int, phase: str, striped: bool | None = None) -> list[Traffic]:
        """What a forward of `tokens` new tokens sends, without the choice of the next one. `striped`: as if the cache were."""
        sent = forward_only(self.model.traffic_of_logits(tokens), phase)
        if self.striped if striped is None else striped:
            sent += [t for block in self.model.blocks for t in block.attention.traffic_striped(tokens, phase)]
        return sent

    def traffic_greedy(self, phase: str, rows: int = 1) -> list[Traffic]:
        """What a greedy choice sends, by the closed form: a value and an id from each rank; gathered logits would be 4 V."""
        return [Traffic("all_gather", self.sampler.tp.name, phase, 16 * rows * self.sampler.tp.size)]
