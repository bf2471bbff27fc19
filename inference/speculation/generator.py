"""A generator that drafts some tokens and verifies them in one forward of the target (arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import numpy as np

from inference.cache import Cache, Striped
from inference.generate import Generated, Generator
from inference.sampling import NotFinite, Sampling
from inference.speculation.drafts import Draft, LayersDraft, ModelDraft, Ngram
from inference.speculation.gain import Account, Gamma
from inference.speculation.rule import Drafted, verified
from layers.transformer import Transformer
from parallel.mesh import Mesh


class Speculative(Generator):
    """A generator that drafts and verifies. Its tokens are distributed as a plain one's. Greedy ones are the same, unless the
    two best logits are within rounding: several tokens at once are summed in another order than one at a time."""

    def __init__(
        self, model: Transformer, mesh: Mesh, cache: Cache | Striped, draft: str | Generator, gamma: int | None = None
    ) -> None:
        """`draft`: "ngram", "layers=K", or the generator of another model, whose tokens are the same. `gamma` None: as many as
        pay."""
        super().__init__(model, mesh, cache)
        self.gamma = Gamma(gamma)
        self.account = Account()
        if isinstance(draft, Generator):
            self.draft: Draft = ModelDraft(draft, self.sampler)
        elif draft == "ngram":
            self.draft = Ngram()
        else:
            self.draft = LayersDraft(self, int(draft.removeprefix("layers=")))

    def _decoded(
        self, context: list[int], first: int, sampling: Sampling, most: int, request: int, logprobs: bool
    ) -> Iterator[Generated]:
        """The tokens after `first`, which was chosen from the prompt's logits and has not been run yet, in rounds."""
        context = [*context, first]
        made = 1
        try:
            while made < most:
                begun = perf_counter()
                # A round makes one token more than it drafts.
                asked = self._agreed(self.gamma.next())
                with self.mesh.phase("draft"):
                    drafted = self._drafted(context, min(asked, most - made - 1), sampling, request)
                middle = perf_counter()
                with self.mesh.phase("decode"):
                    rows = [context[-1], *drafted.tokens]
                    logits_gv = self.forward([(request, rows)], rows=range(len(rows)))
                    position = len(context)
                    tokens = verified(self.sampler, logits_gv, drafted, sampling, request, position)
                    logs = [self._logprob(logits_gv[i], t) if logprobs else None for i, t in enumerate(tokens)]
                self.cache.truncate(request, position - 1 + len(tokens))
                self.draft.accepted(context, len(tokens) - 1)
                ended = perf_counter()
                context += tokens
                made += len(tokens)
                self.timings.decode_tokens += len(tokens)
                self.timings.decode_seconds += ended - begun
                self.account.add(len(drafted.tokens), len(tokens) - 1, middle - begun, ended - middle)
                self.gamma.learn(asked, len(drafted.tokens), len(tokens) - 1, middle - begun, ended - middle)
                yield from (Generated(t, p) for t, p in zip(tokens, logs, strict=True))
        finally:
            self.draft.close()

    def _drafted(self, context: list[int], most: int, sampling: Sampling, request: int) -> Drafted:
        if not most:
            return Drafted([], [])
        try:
            return self.draft.propose(context, most, sampling, request)
        except NotFinite as error:
            raise error.at(request, len(context), " of the draft") from None

    def _agreed(self, gamma: int) -> int:
        """Rank 0's choice, since the ranks' times differ. A fixed one needs no message."""
        if self.gamma.fixed is not None:
            return gamma
        with self.mesh.phase("draft"):
            return int(self.sampler.tp.broadcast(np.array([gamma], np.int64))[0])
