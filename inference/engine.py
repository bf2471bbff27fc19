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
from dataclasses import astuple
from time import perf_counter
from typing import NamedTuple

import numpy as np

from inference.choosing import Chooser, Known, Token
from inference.drafting import Drafting
from inference.penalties import NONE, Penalties
from inference.pool import Extent, Pool
from inference.sampling import NotFinite, Sampler, Sampling
from inference.scheduler import Run, Scheduler, Step
from layers.transformer import Transformer
from parallel.control import Control
from parallel.mesh import Mesh

# For so many seconds, a rank that waits for the next step looks for it without sleeping.
EAGER = 0.002


class Ask(NamedTuple):
    """What a client wants. `stream`: a draw depends on the seed, the position and this number, such as which of n answers it
    is. `top_logprobs`: None for no log-probabilities; k for each token's own and those of the k likeliest; `prompt_logprobs`:
    the same for the prompt's tokens. `max_tokens` may be 0 then. `owner`: only requests of the same one share blocks."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    stream: int = 0
    ends: frozenset[int] = frozenset()
    top_logprobs: int | None = None
    priority: int = 0
    owner: str = ""
    penalties: Penalties = NONE
    prompt_logprobs: int | None = None


class Delivery(NamedTuple):
    """New tokens of a request; `reason` when it is finished: "stop" (the last one is an end token) or "length". `prompt`: the
    prompt's tokens from the second on, once, if their log-probabilities were asked for."""

    id: int
    tokens: list[Token]
    reason: str | None
    prompt: list[Token]


class Report(NamedTuple):
    """A step and what came of it. `failed`: by id, why requests ended without a token. `began`, `ended`: seconds of
    perf_counter."""

    step: Step
    deliveries: list[Delivery]
    failed: dict[int, NotFinite]
    began: float
    ended: float


class _RequestMessage(NamedTuple):
    """What rank 0 sends of a request when it first runs: what is `Known` of it, by fields. `sampling`, `penalties`: theirs;
    `ends`, `prompt`: only if they are needed."""

    id: int
    sampling: tuple
    stream: int
    top_logprobs: int | None
    prompt_logprobs: int | None
    penalties: tuple
    ends: tuple[int, ...]
    prompt: tuple[int, ...]


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
        self.chooser = Chooser(self.sampler)
        self._known: dict[int, Known] = {}
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
        if strange := [i for i, _ in ask.penalties.bias if not 0 <= i < size]:
            raise ValueError(f"token id {strange[0]} of the bias is outside of the vocabulary: use 0 to {size - 1}")
        # Log-probabilities of a prompt need its logits: it is run, though others have run the same.
        more = {"priority": ask.priority, "owner": ask.owner, "reuse": ask.prompt_logprobs is None}
        self.scheduler.add(id, ask.prompt, ask.max_tokens, ends=ask.ends, **more)
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
            tokens, known = made.get(id, []), self._known[id]
            count = next((n for n, t in enumerate(tokens, 1) if t.id in self._asked[id].ends), None)
            deliveries.append(Delivery(id, tokens[:count], reason, known.scored if len(known.answer) == len(tokens) else []))
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
                told = tuple(ask.prompt) if ask.penalties or ask.prompt_logprobs is not None else ()
                ends = tuple(ask.ends) if ask.penalties else ()
                ways = astuple(ask.sampling), ask.stream, ask.top_logprobs, ask.prompt_logprobs, astuple(ask.penalties)
                new.append(_RequestMessage(run.id, *ways, ends, told))
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
        for id, sampling, stream, top, prompt_top, penalties, ends, prompt in message.new:
            self._known[id] = Known(Sampling(*sampling), stream, top, prompt_top, Penalties(*penalties), ends, prompt)
        runs = [self._read(_RunMessage(*fields)) for fields in message.runs]
        blocks = 1 + max(max(run.table) for run in runs)
        if blocks > self.pool.blocks:
            # Without a limit, the pool is doubled, so that a block is copied once on average.
            self.pool.hold(max(blocks, 2 * self.pool.blocks))
        for source, target in message.copies:
            self.pool.copy(source, target)
        with self.mesh.phase("prefill" if any(run.prefill for run in runs) else "decode"):
            logits_Bv = self._forward(runs)
            return self.chooser.chosen(logits_Bv, runs, self._known)

    def _read(self, run: _RunMessage) -> Run:
        known = self._known[run.id]
        known.table[run.same :] = run.blocks
        return Run(run.id, run.first, list(run.tokens), run.drafts, run.sample, run.prefill, known.table, run.behind)

    def _forward(self, runs: Iterable[Run]) -> np.ndarray:
        """(B, v): the logits of each run's last tokens, as many as are wanted."""
        extents = [Extent(run.first - run.behind, len(run.tokens), run.table) for run in runs]
        ids_T = np.concatenate([np.array(run.tokens, np.int64) for run in runs])
        positions_T = np.concatenate([np.arange(run.first, run.first + len(run.tokens)) for run in runs])
        ends = np.cumsum([tokens for _, tokens, _ in extents])
        rows_B = np.concatenate([np.arange(e - self._known[run.id].rows(run), e) for e, run in zip(ends, runs, strict=True)])
        return self.model.cached(ids_T, positions_T, self.pool.stores(extents), rows_B)
