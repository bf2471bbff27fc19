"""Speculative decoding (Leviathan, Kalman and Matias, arXiv 2211.17192): draft some tokens, verify them in one forward.

    g drafted tokens (gamma)   p, q the target's and the draft's distribution, after temperature and filters   v a rank's ids

A drafted token x is accepted with probability min(1, p(x) / q(x)); the first rejected one is drawn again from the residual
norm(max(0, p - q)); if all are accepted, one more is drawn from p. What comes out is distributed as the target's own tokens,
whatever the draft. Only the owner of a token knows its p and q, and all ranks are told; greedy is the case of one-hot p and q.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np

from inference.cache import Cache, Striped
from inference.generate import Generator, Step
from inference.sampling import Sampler, Sampling, uniform
from layers.transformer import Transformer
from parallel.mesh import Mesh

MOST = 8


# --- the rule


def log_acceptance(log_p: float, log_q: float) -> float:
    """log min(1, p / q) of a token that was drawn from q, so that q is not 0."""
    return min(0.0, log_p - log_q)


def residual(sampler: Sampler, log_p_v: np.ndarray, log_q_v: np.ndarray) -> np.ndarray:
    """log of norm(max(0, p - q)) at this rank's ids. The sum is 1 - sum min(p, q): 0 only where nothing can be rejected."""
    rest_v = np.maximum(np.exp(log_p_v) - np.exp(log_q_v), 0)
    with np.errstate(divide="ignore"):
        log_rest_v = np.log(rest_v)
    return log_rest_v - sampler.log_normaliser(log_rest_v)


@dataclass(frozen=True)
class Drafted:
    """Tokens, and the distribution that each was really drawn from: log q at this rank's ids, or None where it was certain."""

    tokens: list[int]
    log_q: list[np.ndarray | None]


def matched(best: list[int], drafted: Sequence[int]) -> list[int]:
    """The greedy case: the best token of each row, as far as the drafted ones are the same, and one more."""
    same = [a == b for a, b in zip(best, drafted, strict=False)]
    return best[: (same.index(False) if False in same else len(same)) + 1]


def verified(
    sampler: Sampler,
    logits_gv: np.ndarray,
    drafted: Drafted,
    sampling: Sampling,
    request: int,
    position: int,
) -> list[int]:
    """The tokens of a round, from the target's logits of the g + 1 rows: those accepted and one more.

    `position`: of the first of them. Random numbers are functions of (seed, request, position), the same on every rank.
    """
    if sampling.temperature == 0:
        return matched(sampler.best(logits_gv).tolist(), drafted.tokens)
    tokens: list[int] = []
    for i, (x, log_q_v) in enumerate(zip(drafted.tokens, drafted.log_q, strict=True)):
        log_p_v = sampler.filtered(logits_gv[i], sampling)
        log_q_v = sampler.certain(x) if log_q_v is None else log_q_v
        log_p, log_q = sampler.of_token(np.stack([log_p_v, log_q_v], axis=1), x)
        if np.log(uniform(sampling.seed, request, position + i)) < log_acceptance(log_p, log_q):
            tokens.append(x)
            continue
        left_v = residual(sampler, log_p_v, log_q_v)
        return [*tokens, sampler.draw(left_v, sampling, request, position + i, "residual")]
    log_p_v = sampler.filtered(logits_gv[-1], sampling)
    return [*tokens, sampler.draw(log_p_v, sampling, request, position + len(tokens))]


# --- drafts


class Draft(Protocol):
    """Where drafted tokens come from. All ranks call together and get the same tokens."""

    def propose(self, context: Sequence[int], most: int, sampling: Sampling, request: int) -> Drafted:
        """Up to `most` tokens that may follow the context."""

    def accepted(self, context: Sequence[int], many: int) -> None:
        """Of the last proposal after this context, `many` tokens were right: forget what was computed of the others."""

    def close(self) -> None:
        """Forget the sequence."""


class Ngram:
    """Prompt lookup: what followed the last time that the context ended as it does now, by its longest ending of up to
    `longest` tokens, at least `shortest`. Costs nothing, and is right where text repeats."""

    def __init__(self, longest: int = 6, shortest: int = 3) -> None:
        self.longest, self.shortest = longest, shortest
        self._seen: dict[tuple[int, ...], int] = {}
        self._read = 0

    def propose(self, context: Sequence[int], most: int, sampling: Sampling, request: int) -> Drafted:
        # Endings of all but the last token: each remembers the place after its latest occurrence.
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
        """The context only grows by what is right."""

    def close(self) -> None:
        self._seen, self._read = {}, 0


class ModelDraft:
    """Another model of the same vocabulary, with a cache of its own. `generator`: of that model, sharded as the target (its q
    is then cut alike), or whole on every rank, on an axis of one (its q is then cut here, and rank 0's tokens count)."""

    def __init__(self, generator: Generator, sampler: Sampler) -> None:
        self.generator, self.sampler = generator, sampler
        self.whole = generator.sampler.tp.size != sampler.tp.size

    def propose(self, context: Sequence[int], most: int, sampling: Sampling, request: int) -> Drafted:
        generator, cache = self.generator, self.generator.cache
        if request not in cache.lengths:
            cache.open(request)
        # After full acceptance, the last drafted token has not been run yet either.
        new = list(context[cache.lengths[request] :])
        tokens: list[int] = []
        log_q: list[np.ndarray | None] = []
        for n in range(most):
            logits_1v = generator.forward([(request, new)])
            if sampling.temperature == 0:
                token, mine = int(generator.sampler.best(logits_1v)[0]), None
            else:
                mine = generator.sampler.filtered(logits_1v[0], sampling)
                token = generator.sampler.draw(mine, sampling, request, len(context) + n, "draft")
                mine = self.sampler.part(mine) if self.whole else mine
            tokens.append(token)
            log_q.append(mine)
            new = [token]
        if self.whole:
            tokens = self.sampler.tp.broadcast(np.array(tokens, np.int64)).tolist()
        return Drafted(tokens, log_q)

    def accepted(self, context: Sequence[int], many: int) -> None:
        for request, length in list(self.generator.cache.lengths.items()):
            self.generator.cache.truncate(request, min(length, len(context) + many))

    def close(self) -> None:
        for request in list(self.generator.cache.lengths):
            self.generator.cache.free(request)


class LayersDraft:
    """The target's own first `layers` blocks with its norm and head, in its own cache: what they write there of drafted tokens
    is taken back, and written again when these are verified."""

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
        """The target's cache is cut by the target."""

    def close(self) -> None:
        """The target frees its own cache."""


# --- how many to draft


def expected_tokens(alpha: float, gamma: int) -> float:
    """Of a round: (1 - alpha^(gamma + 1)) / (1 - alpha) (equation 1)."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speedup(alpha: float, gamma: int, cost: float, verify: float = 1.0) -> float:
    """The factor in wall time (theorem 3.8). `cost`: a drafted token's time over a plain step's; `verify`: the time of the
    target on gamma + 1 tokens over its time on one, which the theorem takes to be 1."""
    return expected_tokens(alpha, gamma) / (gamma * cost + verify)


def operations(alpha: float, gamma: int, cost: float) -> float:
    """The factor in arithmetic operations (theorem 3.11). `cost`: the draft's operations a token over the target's."""
    return (gamma * cost + gamma + 1) / expected_tokens(alpha, gamma)


@dataclass
class Account:
    """What a run of rounds has shown. `tested` drafts were compared with the target, up to the first rejected one of a round;
    accepted / tested estimates alpha, where accepted / drafted would not."""

    rounds: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0
    tokens: int = 0
    draft_seconds: float = 0.0
    verify_seconds: dict[int, list[float]] = field(default_factory=dict)

    @property
    def alpha(self) -> float | None:
        return self.accepted / self.tested if self.tested else None

    def add(self, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        self.rounds += 1
        self.drafted += drafted
        self.tested += min(accepted + 1, drafted)
        self.accepted += accepted
        self.tokens += accepted + 1
        self.draft_seconds += draft_seconds
        self.verify_seconds.setdefault(drafted + 1, []).append(verify_seconds)


class Gamma:
    """How many tokens to draft next: always the same, or (`fixed` None) as acceptance and measured times advise.

    alpha is a mean that forgets, over drafts tested. Times are a unit that all rounds tell of, so that a machine that turns
    busy changes no choice, times what so many rows cost in units: `COSTS` at first, and slowly what they were found to. Where
    drafting does not pay it is tried again now and then, for text changes: RETRY rounds later, one token at a time as long as
    they are right, and twice as late each time that it did not pay again.
    """

    # What this many rows cost in rows of one, before it is measured.
    COSTS = (1.0, 1.45, 1.8, 1.85, 1.95, 2.05, 2.2, 2.3, 2.4)
    RETRY, LATEST = 16, 128
    KEPT, KEPT_UNIT = 0.9, 0.7

    def __init__(self, fixed: int | None) -> None:
        self.fixed, self.alpha = fixed, 0.7
        self._unit, self._draft = 0.0, 0.0
        self._rows = list(self.COSTS)
        self._silent, self._wait = 0, self.RETRY

    def next(self) -> int:
        if self.fixed is not None:
            return self.fixed
        best = max(range(MOST + 1), key=self._rate)
        if best == 0 and self._silent >= self._wait:
            return 1
        return best

    def _rate(self, gamma: int) -> float:
        """Tokens a unit of time."""
        return expected_tokens(self.alpha, gamma) / (self._rows[gamma] + gamma * self._draft)

    def learn(self, asked: int, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        kept = self.KEPT
        for n in range(min(accepted + 1, drafted)):
            self.alpha = kept * self.alpha + (1 - kept) * (n < accepted)
        unit = verify_seconds / self._rows[drafted]
        self._unit = self.KEPT_UNIT * self._unit + (1 - self.KEPT_UNIT) * unit if self._unit else unit
        self._rows[drafted] = kept * self._rows[drafted] + (1 - kept) * verify_seconds / self._unit
        if drafted:
            each = draft_seconds / drafted / self._unit
            self._draft = kept * self._draft + (1 - kept) * each if self._draft else each
        if asked == 0:
            self._silent += 1
        elif max(range(MOST + 1), key=self._rate) > 0:
            self._silent, self._wait = 0, self.RETRY
        elif accepted < drafted:
            self._silent, self._wait = 0, min(2 * self._wait, self.LATEST)


class Speculative(Generator):
    """A generator that drafts and verifies. Its tokens are distributed as a plain one's. Greedy ones are the same, but where
    the two best logits are within rounding: verifying several tokens at once sums in another order than one at a time."""

    def __init__(
        self, model: Transformer, mesh: Mesh, cache: Cache | Striped, draft: str | Generator, gamma: int | None = None
    ) -> None:
        """`draft`: "ngram", "layers=K", or the generator of another model. `gamma` None: as many as pay."""
        super().__init__(model, mesh, cache)
        self.gamma = Gamma(gamma)
        self.account = Account()
        if isinstance(draft, Generator):
            if draft.model.embedding.cut.length != model.embedding.cut.length:
                raise ValueError(
                    f"the draft's vocabulary of {draft.model.embedding.cut.length} is not the model's "
                    f"{model.embedding.cut.length}: use a draft of the same"
                )
            self.draft: Draft = ModelDraft(draft, self.sampler)
        elif draft == "ngram":
            self.draft = Ngram()
        else:
            self.draft = LayersDraft(self, int(draft.removeprefix("layers=")))

    def _decoded(
        self, context: list[int], first: int, sampling: Sampling, most: int, request: int, logprobs: bool
    ) -> Iterator[Step]:
        """Rounds: `first` was chosen from the prompt's logits and has not been run."""
        context = [*context, first]
        made = 1
        try:
            while made < most:
                begun = perf_counter()
                # No more than are wanted: a round makes one more than it drafts.
                asked = self._agreed(self.gamma.next())
                with self.mesh.phase("draft"):
                    drafted = (
                        self.draft.propose(context, min(asked, most - made - 1), sampling, request)
                        if asked
                        else Drafted([], [])
                    )
                middle = perf_counter()
                with self.mesh.phase("decode"):
                    rows = [context[-1], *drafted.tokens]
                    logits_gv = self.forward([(request, rows)], rows=range(len(rows)))
                    position = len(context)
                    tokens = verified(self.sampler, logits_gv, drafted, sampling, request, position)
                    told = [self._logprob(logits_gv[i], t) if logprobs else None for i, t in enumerate(tokens)]
                self.cache.truncate(request, position - 1 + len(tokens))
                self.draft.accepted(context, len(tokens) - 1)
                ended = perf_counter()
                context += tokens
                made += len(tokens)
                self.clock.decode_tokens += len(tokens)
                self.clock.decode_seconds += ended - begun
                self.account.add(len(drafted.tokens), len(tokens) - 1, middle - begun, ended - middle)
                self.gamma.learn(asked, len(drafted.tokens), len(tokens) - 1, middle - begun, ended - middle)
                yield from (Step(t, p) for t, p in zip(tokens, told, strict=True))
        finally:
            self.draft.close()

    def _agreed(self, gamma: int) -> int:
        """Rank 0's choice, as clocks differ; a fixed one needs no message."""
        if self.gamma.fixed is not None:
            return gamma
        with self.mesh.phase("draft"):
            return int(self.sampler.tp.broadcast(np.array([gamma], np.int64))[0])
