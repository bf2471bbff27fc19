"""Which requests run in the next step, how many tokens of each, and in which blocks: continuous batching as plain data.

After Orca (OSDI '22: requests join and leave between any two steps) and vLLM (SOSP '23: paged blocks, preemption by
recomputation), with prefill in chunks beside decodes (Sarathi-Serve, OSDI '24). No arrays, no MPI; an engine drives it:

    scheduler.add(id, prompt, max_tokens)
    while scheduler.requests:
        step = scheduler.schedule()
        ...                                     # step.copies, then one ragged forward of step.runs, then sampling
        for output in scheduler.commit(step, {id: new tokens of each run with sample}):
            ...                                 # output.tokens go to the client, output.reason says why it ended, or None

A request has its tokens, the prompt's and those it got, and knows how many of them are computed: their keys and values are in
its blocks. It decodes when all but the last are; anything else is prefill. A preempted request has lost its blocks: it returns
to prefill with all its tokens. A token is delivered when it is added, so never twice.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from inference.blocks import BLOCK, BlockPool, Link, needed, part_of
from inference.steps import Counts, Output, Run, Step


class QueueFull(RuntimeError):
    """As many requests wait as may; nothing was changed."""


@dataclass(eq=False, slots=True)
class Request:
    """`tokens`: those of the prompt and those that came. `goal`: how many it had when it was admitted, else 0; once these are
    computed, it decodes. `found`: some were computed when it was admitted. `behind`: how many of the first tokens are in no
    block of its table any more."""

    id: int
    prompt: int
    tokens: list[int]
    max_tokens: int
    ends: frozenset[int]
    reuse: bool
    owner: str
    order: tuple[int, int]
    computed: int = 0
    found: bool = False
    goal: int = 0
    table: list[int] = field(default_factory=list)
    behind: int = 0
    published: int = 0
    link: Link | None = None
    draft: list[int] = field(default_factory=list)

    @property
    def decoding(self) -> bool:
        return 0 < self.goal <= self.computed

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.prompt + self.max_tokens - len(self.tokens)


class Scheduler:
    """`blocks` of 16 tokens (None: no limit), at most `slots` requests and `max_batch_tokens` tokens in a step.

    Order. A request counts as though it had come `aging` steps later for each unit of its priority (0 is usual, lower goes
    first). Within a priority, first come is first served. No request is overtaken for ever: only those overtake it that come
    within `aging` steps for each unit between their priorities. The order never changes. It says who is admitted, who gets the
    budget and, from its other end, who is preempted when blocks run out; so the first of the running always gets on.

    A step. Each decoding request runs a token, which is why `max_batch_tokens` may not be less than `slots`. What is left of
    the budget goes to prompts that are under way, then to new ones, then to drafts. Only decodes
    preempt. Nobody is admitted in a step that preempted, nor if the running could not have one more block each afterwards.

    `context`: the most tokens of a request, prompt and new. `prefix_caching` False: no blocks are shared. Blocks that are
    wholly behind the `window` are given back. Raises ValueError for sizes that cannot work.
    """

    def __init__(
        self,
        blocks: int | None = None,
        *,
        slots: int = 16,
        max_batch_tokens: int = 512,
        context: int | None = None,
        queue_limit: int | None = None,
        prefix_caching: bool = True,
        aging: int = 256,
    ) -> None:
        limits = {"blocks": blocks, "slots": slots, "context": context, "queue_limit": queue_limit, "aging": aging}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be 1 or more")
        if max_batch_tokens < slots:
            raise ValueError(f"max_batch_tokens {max_batch_tokens} must be {slots} or more: each of {slots} slots may need one")
        self.slots, self.max_batch_tokens, self.context, self.queue_limit = slots, max_batch_tokens, context, queue_limit
        self.prefix_caching, self.aging = prefix_caching, aging
        # How many tokens any layer of the model sees at most (0: all), as the engine knows.
        self.window = 0
        self.pool = BlockPool(blocks)
        self.requests: dict[int, Request] = {}
        # Both in the order of the docstring.
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.counts = Counts()
        self._added = 0
        self._flight: tuple[Step, list[Request]] | None = None

    # --- what comes from outside, between steps or while one is under way

    def add(
        self,
        id: int,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        ends: Collection[int] = (),
        priority: int = 0,
        reuse: bool = True,
        owner: str = "",
    ) -> None:
        """A request for up to `max_tokens` tokens (0: only its prompt is run), fewer if one of `ends` comes. `reuse` False: all
        of its tokens are computed, though others have computed them (the log-probabilities of a prompt need all its logits).
        Only requests of the same `owner` share blocks.

        Raises ValueError for a request that cannot be served however long it waits, and QueueFull if the queue is full.
        """
        if id in self.requests:
            raise ValueError(f"request {id} is there already: take another id, or cancel it first")
        if not prompt or max_tokens < 0:
            raise ValueError(f"request {id} has {len(prompt)} tokens, use 1 or more, and asks for {max_tokens}, use 0 or more")
        what, total = f"request {id} of {len(prompt)} + {max_tokens} tokens", len(prompt) + max_tokens
        if self.context is not None and total > self.context:
            raise ValueError(f"{what} is longer than the context of {self.context}: shorten it by {total - self.context}")
        # The last token is never run, if it is a new one.
        blocks = needed(max(len(prompt), total - 1))
        if self.pool.size is not None and blocks > self.pool.size:
            raise ValueError(f"{what} needs {blocks} blocks of {BLOCK}, the pool has {self.pool.size}: shorten it or add some")
        if self.queue_limit is not None and len(self.waiting) >= self.queue_limit:
            raise QueueFull(f"{len(self.waiting)} requests wait, of at most {self.queue_limit}: try again later")
        self._added += 1
        order, reuse = (self.counts.steps + self.aging * priority, self._added), reuse and self.prefix_caching
        request = Request(id, len(prompt), list(prompt), max_tokens, frozenset(ends), reuse, owner, order)
        self.requests[id] = request
        insort(self.waiting, request, key=lambda r: r.order)

    def propose(self, id: int, draft: Sequence[int]) -> None:
        """Guesses of a request's next tokens, for the next step only. It runs the first ones, as many as it can; a request that
        is not decoding runs none."""
        if id in self.requests:
            self.requests[id].draft = list(draft)

    def finish(self, id: int, reason: str = "stop") -> bool:
        """End a request now, for instance at a stop text. False if there is none of this id."""
        request = self.requests.pop(id, None)
        if request is None:
            return False
        (self.running if request.goal else self.waiting).remove(request)
        self.pool.cut(request.table, 0)
        self.counts.finished[reason] = self.counts.finished.get(reason, 0) + 1
        return True

    def fail(self, id: int) -> bool:
        """A request's numbers are none. What it has computed is nobody's any more. True: it had found some of it computed, and
        begins again without; False: it is at its own end."""
        request = self.requests[id]
        self.pool.unpublish(request.table)
        if not request.found:
            return not self.finish(id, "error")
        request.reuse = False
        self._preempt(request)
        return True

    def cancel(self, id: int) -> bool:
        """End a request whose client is gone."""
        return self.finish(id, "cancelled")

    # --- a step

    def schedule(self) -> Step:
        """The next step. It is empty only if there is no request; any other must be committed before the next.

        Raises RuntimeError if the last one has not been committed.
        """
        if self._flight is not None:
            raise RuntimeError(f"step {self._flight[0].number} has not been committed")
        step = Step(self.counts.steps, [], [], [], [])
        # Tokens to run, without drafts.
        plan: dict[Request, int] = {}
        self._decodes(plan, step)
        self._prefills(plan, step)
        drafts = self._drafts(plan)
        flight = [r for r in self.running if r in plan]
        step.runs.extend(_run(r, plan[r], drafts.get(r, 0)) for r in flight)
        for request in self.running:
            request.draft = []
        if step:
            self._count(step)
            self._flight = step, flight
        return step

    def _decodes(self, plan: dict[Request, int], step: Step) -> None:
        """One token of each decoding request, in order. Where one needs a block and none is free, the last one is preempted."""
        for request in list(self.running):
            # One that is not decoding is at its prompt, or was preempted just now.
            while request.decoding and request.behind + len(request.table) * BLOCK <= request.computed:
                if self.pool.free:
                    request.table.append(self.pool.take())
                else:
                    step.preempted.append(self._preempt(self.running[-1]))
            if request.decoding:
                plan[request] = 1

    def _prefills(self, plan: dict[Request, int], step: Step) -> None:
        """Prompts under way, then new ones, as far as the budget goes."""
        left = self.max_batch_tokens - len(plan)
        for request in self.running:
            if left and not request.decoding:
                plan[request] = min(left, request.goal - request.computed)
                left -= plan[request]
        while left and self._may_join(step):
            request = self._admit(step)
            if request is None:
                return
            plan[request] = min(left, request.goal - request.computed)
            left -= plan[request]

    def _drafts(self, plan: dict[Request, int]) -> dict[Request, int]:
        """How many drafts each decoding request runs: as many as the rest of the budget, the tokens still to come and the free
        blocks allow. Takes the blocks."""
        drafts, spare = {}, self.max_batch_tokens - sum(plan.values())
        for request in self.running:
            if request in plan and request.draft and request.decoding:
                first = request.computed + 1
                room = request.behind + (len(request.table) + self.pool.free) * BLOCK - first
                # One token comes without a draft.
                drafts[request] = min(len(request.draft), spare, request.left - 1, room)
                spare -= drafts[request]
                self.pool.grow(request.table, first + drafts[request] - request.behind)
        return drafts

    def _may_join(self, step: Step) -> bool:
        """Whether the first of the queue may be admitted, if there are blocks for it."""
        return bool(self.waiting) and len(self.running) < self.slots and not step.preempted

    def _admit(self, step: Step) -> Request | None:
        """Admit the first of the queue, with blocks for all its tokens. None if they are not there: then nobody overtakes
        it."""
        request = self.waiting[0]
        opened = self.pool.open(request.tokens, len(self.running), request.reuse, request.owner)
        if opened is None:
            return None
        del self.waiting[0]
        insort(self.running, request, key=lambda r: r.order)
        request.table, request.published, request.link, request.computed, copy = opened
        request.found = request.computed > 0
        request.goal = len(request.tokens)
        step.admitted.append((request.id, request.computed))
        self.counts.hit_tokens += request.computed
        if copy is not None:
            step.copies.append(copy)
        return request

    def _preempt(self, request: Request) -> int:
        """Back to the queue without its blocks: what it has, prompt and new, is computed again later. Returns its id."""
        self.running.remove(request)
        self.pool.cut(request.table, 0)
        request.computed = request.goal = request.behind = 0
        insort(self.waiting, request, key=lambda r: r.order)
        self.counts.preemptions += 1
        return request.id

    def commit(self, step: Step, new: Mapping[int, Sequence[int]]) -> list[Output]:
        """Take in what came of a step. `new`: for each run with `sample`, the accepted drafts and one token more. Requests that
        were ended in the meantime are left out.

        Returns what is to be delivered. Blocks of rejected drafts are given back, full ones are published. Raises ValueError,
        before anything is changed, for a step that is not under way or tokens that cannot come of it.
        """
        if not step:
            return []
        if self._flight is None or self._flight[0] is not step:
            raise ValueError(f"step {step.number} is not under way")
        flight = zip(step.runs, self._flight[1], strict=True)
        there = [(run, r) for run, r in flight if self.requests.get(r.id) is r and r.goal]
        for run, _ in there:
            came, guessed = list(new.get(run.id, ())), run.tokens[len(run.tokens) - run.drafts :]
            if len(came) not in (range(1, run.drafts + 2) if run.sample else (0,)) or came[:-1] != guessed[: len(came) - 1]:
                wanted = "some of these drafts and one token more" if run.sample else "no token"
                raise ValueError(f"request {run.id} with drafts {guessed} got {came}: expected {wanted}")
        self._flight = None
        outputs = []
        for run, request in there:
            if not run.sample:
                request.computed = run.first + len(run.tokens)
                self._publish(request)
                self._shed(request)
                if not request.left and request.computed == len(request.tokens):
                    outputs.append(Output(request.id, [], "length"))
                    self.finish(request.id, "length")
                continue
            came = list(new[run.id])
            self.counts.accepted_tokens += len(came) - 1
            ended = next((n + 1 for n, token in enumerate(came) if token in request.ends), None)
            request.tokens += came[:ended]
            # The last token has not been run; those before it have, as accepted drafts.
            request.computed = len(request.tokens) - 1
            self.pool.cut(request.table, len(request.tokens) - request.behind)
            self._publish(request)
            self._shed(request)
            reason = "stop" if ended else "length" if not request.left else None
            outputs.append(Output(request.id, came[:ended], reason))
            if reason:
                self.finish(request.id, reason)
        return outputs

    def _publish(self, request: Request) -> None:
        """Publish the full blocks all of whose tokens are computed, and not merely guessed."""
        while self.prefix_caching and (request.published + 1) * BLOCK <= request.computed:
            n = request.published
            tokens = part_of(request.tokens, n * BLOCK, request.owner)
            at = n - request.behind // BLOCK
            request.table[at], request.link = self.pool.publish(request.table[at], request.link, tokens)
            request.published += 1

    def _shed(self, request: Request) -> None:
        """Give back what no later query sees."""
        if self.window:
            unseen = request.computed - self.window + 1
            request.behind += BLOCK * self.pool.shed(request.table, unseen - request.behind)

    # --- what a monitor wants to know

    def _count(self, step: Step) -> None:
        counts = self.counts
        prefill = sum(len(run.tokens) for run in step.runs if run.prefill)
        drafts = sum(run.drafts for run in step.runs)
        counts.steps += 1
        counts.prefill_tokens += prefill
        counts.draft_tokens += drafts
        counts.decode_tokens += sum(len(run.tokens) for run in step.runs) - prefill - drafts
        counts.decode_steps += not prefill
        counts.slots_used += len(self.running)
        counts.positions_held += self.pool.used * BLOCK
        counts.positions_empty += sum(max(0, r.behind + len(r.table) * BLOCK - len(r.tokens)) for r in self.running)

    def metrics(self) -> dict[str, object]:
        """The counts; queues and blocks as they stand, where free is None without a limit; and two shares over all steps:
        `slot_use`, slots with a request, and `kv_waste`, positions of used blocks that have no token of a request."""
        counts, pool = self.counts, self.pool
        return asdict(counts) | {
            "waiting": len(self.waiting),
            "running": len(self.running),
            "blocks_used": pool.used,
            "blocks_kept": pool.kept,
            "blocks_free": None if pool.size is None else pool.free - pool.kept,
            "slot_use": counts.slots_used / (counts.steps * self.slots) if counts.steps else 0.0,
            "kv_waste": counts.positions_empty / counts.positions_held if counts.positions_held else 0.0,
        }


def _run(request: Request, known: int, drafts: int) -> Run:
    """The next `known` tokens of a request, and so many drafts behind them."""
    first, last = request.computed, request.computed + known
    tokens = request.tokens[first:last] + request.draft[:drafts]
    sample = last == len(request.tokens) and request.left > 0
    return Run(request.id, first, tokens, drafts, sample, not request.decoding, request.table.copy(), request.behind)
