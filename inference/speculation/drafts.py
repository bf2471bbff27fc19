"""Where drafted tokens come from: the text so far, a smaller model, or the target's own first layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from inference.generate import Generator
from inference.sampling import Sampler, Sampling
from inference.speculation.rule import Drafted


class Draft(Protocol):
    """A source of drafted tokens. All ranks call it together and get the same ones."""

    def propose(self, context: Sequence[int], most: int, sampling: Sampling, request: int) -> Drafted:
        """Up to `most` tokens that may follow the context."""

    def accepted(self, context: Sequence[int], many: int) -> None:
        """`many` tokens of the proposal after this context were right: forget what was computed of the others."""

    def close(self) -> None:
        """Forget the sequence."""


class Ngram:
    """Prompt lookup: it proposes what followed when the text last was as it ends now. It looks for the longest ending of
    `shortest` to `longest` tokens. It costs nothing, and is right where text repeats."""

    def __init__(self, longest: int = 6, shortest: int = 3) -> None:
        self.longest, self.shortest = longest, shortest
        self._seen: dict[tuple[int, ...], int] = {}
        self._read = 0

    def propose(self, context: Sequence[int], most: int, sampling: Sampling, request: int) -> Drafted:
        # Where each ending of the context without its last token came last: the place behind it.
        for end in range(self._read + 1, len(context)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._seen[tuple(context[end - n : end])] = end
        self._read = max(self._read, len(context) - 1)
        for n in range(min(self.longest, len(context)), self.shortest - 1, -1):
            after = self._seen.get(tuple(context[-n:]))
            if after is not None:
                tokens = list(context[after : after + most])
                return Drafted(tokens, [None] * len(tokens))
        return Drafted([], [])

    def accepted(self, context: Sequence[int], many: int) -> None:
        """Nothing was computed."""

    def close(self) -> None:
        self._seen, self._read = {}, 0


class ModelDraft:
    """Another model of the same tokens, with a cache of its own. `generator`: of that model. It is sharded as the target
    is, and so is its q; or it is whole on every rank, on an axis of one: then q is cut here, and rank 0's tokens count.

    Its table may have other rows for tokens that are none, behind those that both have: of these it drafts none, and their q
    is 0. Then q is gathered before it is cut as the target's p is."""

    def __init__(self, generator: Generator, sampler: Sampler) -> None:
        self.generator, self.sampler = generator, sampler
        self.whole = generator.sampler.tp.size != sampler.tp.size
        self.alike = not self.whole and generator.sampler.cut.length == sampler.cut.length

    def propose(self, context: Sequence[int], most: int, sampling: Sampling, request: int) -> Drafted:
        generator, cache = self.generator, self.generator.cache
        if request not in cache.lengths:
            cache.open(request)
        # Once all drafts were accepted, the last of them has not been run yet either.
        new = list(context[cache.lengths[request] :])
        tokens: list[int] = []
        log_q: list[np.ndarray | None] = []
        for n in range(most):
            logits_1v = generator.forward([(request, new)])
            logits_1v[:, max(0, self.sampler.cut.length - generator.sampler.first) :] = -np.inf
            if sampling.temperature == 0:
                token, mine = int(generator.sampler.best(logits_1v)[0]), None
            else:
                mine = generator.sampler.filtered(logits_1v[0], sampling)
                token = generator.sampler.draw(mine, sampling, request, len(context) + n, "draft")
                mine = self._cut_as_p(mine)
            tokens.append(token)
            log_q.append(mine)
            new = [token]
        if self.whole:
            tokens = self.sampler.tp.broadcast(np.array(tokens, np.int64)).tolist()
        return Drafted(tokens, log_q)

    def _cut_as_p(self, log_q: np.ndarray) -> np.ndarray:
        """log q at the target's ids of this rank, from that at the draft's."""
        if self.alike:
            return log_q
        theirs = self.generator.sampler
        whole = log_q if self.whole else theirs.tp.all_gather(log_q, 0, theirs.cut)
        ours_V = np.full(self.sampler.cut.length, -np.inf)
        ours_V[: len(whole)] = whole[: len(ours_V)]
        return self.sampler.part(ours_V)

    def accepted(self, context: Sequence[int], many: int) -> None:
        for request, length in list(self.generator.cache.lengths.items()):
            self.generator.cache.truncate(request, min(length, len(context) + many))

    def close(self) -> None:
        for request in list(self.generator.cache.lengths):
            self.generator.cache.free(request)


class LayersDraft:
    """The target's own first `layers` blocks with its norm and head, in its own cache. What they write there of drafted tokens
    is taken back; verifying writes it again."""

    def __init__(self, target: Generator, layers: int) -> None:
        if not 1 <= layers < len(target.model.blocks):
            most = len(target.model.blocks) - 1
            raise ValueError(f"cannot draft with {layers} of the model's {most + 1} layers: use 1 to {most}")
        self.target, self.layers = target, layers

    def propose(self, context: Sequence[int], most: int, sampling: Sampling, request: int) -> Drafted:
        target, cache = self.target, self.target.cache
        before, sampler = cache.lengths[request], target.sampler
        new = list(context[before:])
        tokens: list[int] = []
        log_q: list[np.ndarray | None] = []
        for n in range(most):
            logits_1v = target.forward([(request, new)], layers=self.layers)
            mine = None if sampling.temperature == 0 else sampler.filtered(logits_1v[0], sampling)
            if mine is None:
                token = int(sampler.best(logits_1v)[0])
            else:
                token = sampler.draw(mine, sampling, request, len(context) + n, "draft")
            tokens.append(token)
            log_q.append(mine)
            new = [token]
        cache.truncate(request, before)
        return Drafted(tokens, log_q)

    def accepted(self, context: Sequence[int], many: int) -> None:
        """The target cuts its own cache."""

    def close(self) -> None:
        """The target frees its own cache."""
