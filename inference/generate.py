"""Prefill, then decode: one sequence, token by token, through a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from inference.cache import CACHES, Cache, Striped
from inference.sampling import Sampler, Sampling
from layers.batch import Batch
from layers.block import forward_only
from layers.latent_attention import LatentAttention
from layers.transformer import Transformer
from parallel.ledger import Traffic
from parallel.mesh import Mesh


def make_cache(model: Transformer, kind: str, striped: bool = False, blocks: int | None = None) -> Cache | Striped:
    """An empty cache for this rank's share of the model's heads. `striped`: each rank keeps every p-th position, all latents.

    Raises ValueError for a striped cache of a model that keeps keys and values by heads.
    """
    shapes = [block.attention.cache_shapes for block in model.blocks]
    dtype = model.embedding.table_vD.data.dtype
    if striped and not all(isinstance(block.attention, LatentAttention) for block in model.blocks):
        raise ValueError("a striped cache is for latent attention; this model's heads are cut over the ranks already")
    windows = [block.attention.window for block in model.blocks]
    cache = CACHES[kind](shapes, dtype, windows) if blocks is None else CACHES[kind](shapes, dtype, windows, blocks)
    tp = model.embedding.tp
    return Striped(cache, tp.size, tp.rank) if striped else cache


@dataclass(frozen=True)
class Generated:
    """A new token. `logprob`: under the model itself (temperature 1, no filters), if asked for."""

    token: int
    logprob: float | None


@dataclass
class Timings:
    """Seconds of both phases, tokens of prompts, tokens made by decoding, and the bytes that this rank's cache held of one."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    cache_bytes_per_token: float = 0.0


class Generator:
    """Generates sequences of one model on all ranks of its tp axis. All ranks call it together, with the same arguments."""

    def __init__(self, model: Transformer, mesh: Mesh, cache: Cache | Striped) -> None:
        self.model, self.mesh, self.cache = model, mesh, cache
        self.sampler = Sampler(model.embedding.tp, model.embedding.cut)
        self.striped = isinstance(cache, Striped)
        self.timings = Timings()
        model.head.keep_turned()

    def forward(
        self, batch: Sequence[tuple[int, Sequence[int]]], rows: Sequence[int] | None = None, layers: int | None = None
    ) -> np.ndarray:
        """New tokens, by sequence -> logits (len(rows), v) of these rows of the batch; None: of each sequence's last token. The
        cache holds the tokens afterwards. `layers`: run and fill the first ones only."""
        positions = [np.arange(self.cache.lengths[s], self.cache.lengths[s] + len(ids)) for s, ids in batch]
        sizes = [(s, len(ids)) for s, ids in batch]
        for s, n in sizes:
            self.cache.extend(s, n)
        ids_T = np.concatenate([np.asarray(ids, np.int64) for _, ids in batch])
        chosen = np.cumsum([n for _, n in sizes]) - 1 if rows is None else np.asarray(rows)
        return self.model.cached(ids_T, np.concatenate(positions), self.cache.stores(sizes)[:layers], chosen)

    def prefill(self, sequence: int, prompt: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """Run a prompt, `chunk` tokens at a time, in an open sequence -> logits (1, v) of its last token."""
        begun = perf_counter()
        chunk = chunk or len(prompt)
        with self.mesh.phase("prefill"):
            for first in range(0, len(prompt), chunk):
                logits_1v = self.forward([(sequence, prompt[first : first + chunk])])
        self.timings.prefill_seconds += perf_counter() - begun
        self.timings.prefill_tokens += len(prompt)
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
    ) -> Iterator[Generated]:
        """Up to `most` new tokens; one of `ends` is the last. Frees the sequence at the end.

        The first token's time counts as prefill, where its logits come from.
        """
        self.cache.open(request)
        try:
            logits_1v = self.prefill(request, prompt, chunk)
            begun = perf_counter()
            with self.mesh.phase("prefill"):
                first = self._chosen(logits_1v, sampling, request, len(prompt), logprobs)
            self.timings.prefill_seconds += perf_counter() - begun
            yield first
            if first.token in ends:
                return
            for new in self._decoded(list(prompt), first.token, sampling, most, request, logprobs):
                yield new
                if new.token in ends:
                    return
        finally:
            length = self.cache.lengths[request]
            self.timings.cache_bytes_per_token = self.cache.bytes_of(request) / length if length else 0.0
            self.cache.free(request)

    def _decoded(
        self, context: list[int], first: int, sampling: Sampling, most: int, request: int, logprobs: bool
    ) -> Iterator[Generated]:
        """The tokens after `first`, which was chosen from the prompt's logits and has not been run yet."""
        token = first
        for n in range(1, most):
            begun = perf_counter()
            with self.mesh.phase("decode"):
                logits_1v = self.forward([(request, [token])])
                new = self._chosen(logits_1v, sampling, request, len(context) + n, logprobs)
            self.timings.decode_tokens += 1
            self.timings.decode_seconds += perf_counter() - begun
            token = new.token
            yield new

    def _chosen(self, logits_1v: np.ndarray, sampling: Sampling, request: int, position: int, logprobs: bool) -> Generated:
        token = self.sampler.choose(logits_1v, [sampling], [request], [position])[0]
        return Generated(token, self._logprob(logits_1v[0], token) if logprobs else None)

    def _logprob(self, logits_v: np.ndarray, token: int) -> float:
        return float(self.sampler.of_token(self.sampler.log_probabilities(logits_v), token))

    def traffic(self, tokens: int, phase: str, striped: bool | None = None) -> list[Traffic]:
        """What a forward of `tokens` new tokens sends, the choice of the next one left out. `striped`: as if the cache were."""
        sent = forward_only(self.model.traffic_of_logits(Batch([tokens])), phase)
        if self.striped if striped is None else striped:
            sent += [t for block in self.model.blocks for t in block.attention.traffic_striped(tokens, phase)]
        return sent

    def traffic_greedy(self, phase: str, rows: int = 1) -> list[Traffic]:
        """What a greedy choice sends, by the closed form: a value and an id from each rank. Gathered logits would be 4 V."""
        return [Traffic("all_gather", self.sampler.tp.name, phase, 16 * rows * self.sampler.tp.size)]
