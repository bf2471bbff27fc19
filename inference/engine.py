"""Continuous batching on all ranks: each step is one ragged forward over whatever the scheduler has chosen (Orca, OSDI '22).

    T tokens of all runs of a step   B rows whose logits are wanted   v this rank's share of the vocabulary over tp

Rank 0 decides. In one small message a step, it tells the others which tokens run in which blocks. All ranks choose the new
tokens together, so that all know them. The others call `follow`:

    engine = Engine(model, mesh, control, scheduler)
    if control.rank:
        engine.follow()
    else:
        engine.add(id, Ask(prompt, max_tokens)); ...
        while report := engine.step(): ...
        engine.stop()

What a request gets depends on itself alone: greedy tokens on its own logits, sampled ones on (seed, stream, position) besides.
They are the same alone and in any company, in chunks of any size, from shared or recomputed keys, on any number of ranks. Only
rounding may differ, as products of other shapes differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np

from inference.drafting import Drafting
from inference.pool import Extent, Pool
from inference.sampling import NotFinite, Sampler, Sampling
from inference.scheduler import Run, Scheduler, Step
from inference.speculation.rule import matched
from layers.transformer import Transformer
from parallel.control import Control
from parallel.mesh import Mesh

# For so many seconds, a rank that waits for the next step looks for it without sleeping.
EAGER = 0.002


class Ask(NamedTuple):
    """What a client wants. `stream`: a draw depends on the seed, the position and this number, such as which of n answers it
    is. `top_logprobs`: None for no log-probabilities; k for each token's own and those of the k likeliest.
    `owner`: only requests of the same one share blocks."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stream: int = 0
    ends: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    priority: int = 0
    owner: str = ""


class Token(NamedTuple):
    """`logprob`: under the model itself (temperature 1, no filters), if asked for; `top`: the likeliest, descending."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]


class Delivery(NamedTuple):
    """New tokens of a request; `reason` when it is finished: "stop" (the last one is an end token) or "length"."""

    id: int
    tokens: list[Token]
    reason: str | None


class Report(NamedTuple):
    """A step and what came of it. `failed`: by id, why requests ended without a token. `began`, `ended`: seconds of
    perf_counter."""

    step: Step
    deliveries: list[Delivery]
    failed: dict[int, NotFinite]
    began: float
    ended: float


class _RequestMessage(NamedTuple):
    """What rank 0 sends of a request when it first runs. `sampling`: its fields."""

    id: int
    sampling: tuple
    stream: int
    top_logprobs: int | None


class _RunMessage(NamedTuple):
    """What rank 0 sends of a run. Its table is the request's latest one up to block `same`, then `blocks`; `behind` tokens were
    in blocks before these."""

    id: int
    first: int
    tokens: tuple[int, ...]
    drafts: int
    sample: bool
    prefill: bool
    same: int
    blocks: tuple[int, ...]
    behind: int


class _StepMessage(NamedTuple):
    """What rank 0 sends of a step."""

    new: tuple[_RequestMessage, ...]
    gone: tuple[int, ...]
    copies: tuple[tuple[int, int], ...]
    runs: tuple[tuple, ...]


@dataclass
class _Known:
    """What every rank knows of a request that has run. `table`: that of its latest run."""

    sampling: Sampling
    stream: int
    top_logprobs: int | None
    table: list[int] = field(default_factory=list)


class Engine:
    """One model on all ranks of its tp axis, and on rank 0 the scheduler that feeds it. Rank 0 calls `add` to `stop`, from one
    thread; the others call `follow`. `speculate`: draft by prompt lookup, request by request, where it pays."""

    def __init__(self, model: Transformer, mesh: Mesh, control: Control, scheduler: Scheduler, speculate: bool = False) -> None:
        self.model, self.mesh, self.control, self.scheduler = model, mesh, control, scheduler
        self.sampler = Sampler(model.embedding.tp, model.embedding.cut)
        shapes = [block.attention.cache_shapes for block in model.blocks]
        windows = [block.attention.window for block in model.blocks]
        scheduler.window = max(windows, default=0) if all(windows) else 0
        self.pool = Pool(shapes, model.embedding.table_vD.data.dtype, scheduler.pool.size or 0, windows)
        self._known: dict[int, _Known] = {}
        self._asked: dict[int, Ask] = {}
        self._gone: set[int] = set()
        self._drafting = Drafting() if speculate else None
        model.head.keep_turned()

    # --- rank 0

    def add(self, id: int, ask: Ask) -> None:
        """A new request. Once it has ended, its id may be used again. Raises ValueError for a request that cannot be served
        however long it waits, and QueueFull if the queue is full."""
        size = self.model.embedding.cut.length
        wrong = [t for t in ask.prompt if not 0 <= t < size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is outside of the vocabulary: use 0 to {size - 1}")
        if ask.top_logprobs is not None and not 0 <= ask.top_logprobs <= size:
            raise ValueError(f"top_logprobs {ask.top_logprobs} is no number of tokens: use 0 to {size}")
        self.scheduler.add(id, ask.prompt, ask.max_tokens, ends=ask.ends, priority=ask.priority, owner=ask.owner)
        self._asked[id] = ask

    def finish(self, id: int, reason: str = "stop") -> bool:
        """End a request now, for instance at a stop text; its blocks are free at once. False if there is none of this id."""
        if not self.scheduler.finish(id, reason):
            return False
        self._ended(id)
        return True

    def cancel(self, id: int) -> bool:
        """End a request whose client is gone."""
        return self.finish(id, "cancelled")

    def _ended(self, id: int) -> None:
        del self._asked[id]
        if id in self._known:
            self._gone.add(id)
        if self._drafting is not None:
            self._drafting.forget(id)

    def step(self) -> Report | None:
        """Run one step on all ranks, or return None at once if no request is there."""
        began = perf_counter()
        if self._drafting is not None:
            self._draft(self._drafting)
        step = self.scheduler.schedule()
        if not step:
            return None
        came = self._run(self._send(self._message(step)))
        failed = {id: tokens for id, tokens in came.items() if isinstance(tokens, NotFinite)}
        made = {id: tokens for id, tokens in came.items() if id not in failed}
        for id in list(failed):
            if self.scheduler.fail(id):
                # It shared what another had computed, who may have been the one.
                del failed[id]
            else:
                self._ended(id)
        deliveries = []
        for id, _, reason in self.scheduler.commit(step, {id: [t.id for t in tokens] for id, tokens in made.items()}):
            count = next((n for n, t in enumerate(made[id], 1) if t.id in self._asked[id].ends), None)
            deliveries.append(Delivery(id, made[id][:count], reason))
            if reason:
                self._ended(id)
        if self._drafting is not None:
            for run in step.runs:
                if run.id in made and not run.prefill:
                    self._drafting.learn(run.id, run.drafts, len(made[run.id]) - 1)
        return Report(step, deliveries, failed, began, perf_counter())

    def stop(self) -> None:
        """Let `follow` return on the other ranks."""
        self._send(None)

    def _draft(self, drafting: Drafting) -> None:
        decoding = {r.id: r.tokens for r in self.scheduler.running if r.decoding}
        for id, guess in drafting.draft(decoding, len(decoding)).items():
            self.scheduler.propose(id, guess)

    def _message(self, step: Step) -> _StepMessage:
        new, runs = [], []
        for run in step.runs:
            known = None if run.id in self._gone else self._known.get(run.id)
            if known is None:
                ask = self._asked[run.id]
                new.append(_RequestMessage(run.id, astuple(ask.sampling), ask.stream, ask.top_logprobs))
            before = [] if known is None else known.table
            same = next((n for n, (a, b) in enumerate(zip(before, run.table, strict=False)) if a != b), None)
            same = min(len(before), len(run.table)) if same is None else same
            blocks = tuple(run.table[same:])
            runs.append((run.id, run.first, tuple(run.tokens), run.drafts, run.sample, run.prefill, same, blocks, run.behind))
        message = _StepMessage(tuple(new), tuple(sorted(self._gone)), tuple(step.copies), tuple(runs))
        self._gone.clear()
        return message

    def _send(self, message: _StepMessage | None) -> _StepMessage | None:
        """Rank 0's message on every rank. Ranks that wait for it fall asleep after a while."""
        self.control.wait(patient=True, eager=EAGER)
        fields = self.control.from_first(None if message is None else tuple(message))
        return None if fields is None else _StepMessage(*fields)

    # --- all ranks

    def follow(self) -> None:
        """Take part in rank 0's steps until it stops."""
        while (message := self._send(None)) is not None:
            self._run(message)

    def _run(self, message: _StepMessage) -> dict[int, list[Token] | NotFinite]:
        """Run a step: the new tokens of each run whose logits are wanted, which are accepted drafts and one more; or why there
        are none."""
        for id in message.gone:
            del self._known[id]
        for id, sampling, stream, top_logprobs in message.new:
            self._known[id] = _Known(Sampling(*sampling), stream, top_logprobs)
        runs = [self._read(_RunMessage(*fields)) for fields in message.runs]
        blocks = 1 + max(max(run.table) for run in runs)
        if blocks > self.pool.blocks:
            # Without a limit, the pool is doubled, so that a block is copied once on average.
            self.pool.hold(max(blocks, 2 * self.pool.blocks))
        for source, target in message.copies:
            self.pool.copy(source, target)
        with self.mesh.phase("prefill" if any(run.prefill for run in runs) else "decode"):
            logits_Bv = self._forward(runs)
            return self._chosen(logits_Bv, [run for run in runs if run.sample])

    def _read(self, run: _RunMessage) -> Run:
        known = self._known[run.id]
        known.table[run.same :] = run.blocks
        return Run(run.id, run.first, list(run.tokens), run.drafts, run.sample, run.prefill, known.table, run.behind)

    def _forward(self, runs: Iterable[Run]) -> np.ndarray:
        """(B, v): the logits of the last 1 + drafts tokens of each run with `sample`."""
        extents = [Extent(run.first - run.behind, len(run.tokens), run.table) for run in runs]
        ids_T = np.concatenate([np.array(run.tokens, np.int64) for run in runs])
        positions_T = np.concatenate([np.arange(run.first, run.first + len(run.tokens)) for run in runs])
        ends = np.cumsum([tokens for _, tokens, _ in extents])
        rows = [np.arange(end - 1 - run.drafts, end) for end, run in zip(ends, runs, strict=True) if run.sample]
        rows_B = np.concatenate(rows) if rows else np.empty(0, np.int64)
        return self.model.cached(ids_T, positions_T, self.pool.stores(extents), rows_B)

    def _chosen(self, logits_Bv: np.ndarray, runs: Iterable[Run]) -> dict[int, list[Token] | NotFinite]:
        """The new tokens of each run, from its rows; or why there are none, which all ranks find alike."""
        ends = np.cumsum([1 + run.drafts for run in runs])
        rows = {run.id: np.arange(end - 1 - run.drafts, end) for run, end in zip(runs, ends, strict=True)}
        greedy = [run.id for run in runs if self._known[run.id].sampling.temperature == 0]
        best: dict[int, int] = {}
        ranks: dict[int, int] = {}
        if greedy:
            rows_G = np.concatenate([rows[id] for id in greedy])
            ids_G, at = self.sampler.best_or_none(logits_Bv[rows_G])
            best = dict(zip(rows_G.tolist(), ids_G.tolist(), strict=True))
            ranks = {int(rows_G[n]): rank for n, rank in at.items()}
        made: dict[int, list[Token] | NotFinite] = {}
        for run in runs:
            known, mine = self._known[run.id], rows[run.id]
            first, drafts = run.first + len(run.tokens) - run.drafts, run.tokens[len(run.tokens) - run.drafts :]
            try:
                if known.sampling.temperature == 0:
                    ids = matched([best[row] for row in mine.tolist()], drafts)
                    if (row := int(mine[len(ids) - 1])) in ranks:
                        raise NotFinite(ranks[row], run.id, first + len(ids) - 1)
                else:
                    ids = self._drawn(logits_Bv[mine], drafts, known, run.id, first)
            except NotFinite as error:
                made[run.id] = error
                continue
            made[run.id] = [self._token(logits_Bv[row], id, known) for row, id in zip(mine, ids, strict=False)]
        return made

    def _drawn(self, logits_gv: np.ndarray, drafts: list[int], known: _Known, id: int, position: int) -> list[int]:
        """The tokens from `position` on, drawn as they would be one by one: as many as equal the drafts, and one more.

        A guess without a distribution is accepted with probability p, as by the rule of speculative sampling. But here, what
        comes does not depend on what was guessed: guesses depend on the company."""
        ids: list[int] = []
        for row, guess in zip(logits_gv, [*drafts, None], strict=True):
            try:
                log_p_v = self.sampler.filtered(row, known.sampling)
            except NotFinite as error:
                raise error.at(id, position + len(ids)) from None
            ids.append(self.sampler.draw(log_p_v, known.sampling, known.stream, position + len(ids)))
            if ids[-1] != guess:
                break
        return ids

    def _token(self, logits_v: np.ndarray, id: int, known: _Known) -> Token:
        if known.top_logprobs is None:
            return Token(id, None, [])
        norm = self.sampler.log_normaliser(logits_v)
        own = float(self.sampler.of_token(logits_v.astype(np.float64), id) - norm)
        if not known.top_logprobs:
            return Token(id, own, [])
        ids, values = self.sampler.likeliest(logits_v, known.top_logprobs)
        return Token(id, own, list(zip(ids, (values.astype(np.float64) - norm).tolist(), strict=True)))
