"""The engine in a thread of its own, beside the event loop that talks to clients: orders in, pieces of text out.

All calls of the engine come from this thread, between steps; what the loop is told goes through call_soon_threadsafe, once a
step. Without a request the thread is asleep.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue

from inference.engine import Ask, Engine, Report
from inference.server.metrics import Metrics
from inference.server.writer import Piece, Writer


@dataclass(eq=False)
class Job:
    """One answer. `put` is called on the event loop with each piece of it. `arrived`: when, by perf_counter. Then: its number,
    tokens of the prompt that were found computed, tokens so far, and when the last ones came."""

    ask: Ask
    writer: Writer
    put: Callable[[Piece], None]
    arrived: float
    id: int = -1
    cached: int | None = None
    tokens: int = 0
    last: float = 0.0


class EngineThread(threading.Thread):
    """`watch` is called on the event loop with the outline of each step, see `_outline`."""

    def __init__(
        self, engine: Engine, metrics: Metrics, loop: asyncio.AbstractEventLoop, watch: Callable[[dict], None]
    ) -> None:
        super().__init__(name="engine")
        self.engine, self.metrics, self.loop, self.watch = engine, metrics, loop, watch
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._ids = count(1)
        # Those of whom the next outline is to tell that they are gone.
        self._gone: list[int] = []

    # --- from the event loop

    def submit(self, jobs: Sequence[Job]) -> asyncio.Future[None]:
        """All of them or none. The future raises what Engine.add raises."""
        answer = self.loop.create_future()
        self._orders.put(partial(self._add, jobs, answer))
        return answer

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more; those that have ended are left aside."""
        self._orders.put(partial(self._cancel, jobs))

    def stop(self) -> None:
        """After what has been ordered before, the thread ends and lets the other ranks go."""
        self._orders.put(None)

    # --- in the thread

    def run(self) -> None:
        while self._obeyed(wait=not self._jobs):
            report = self.engine.step()
            if report is not None:
                self._report(report)
        self.engine.stop()

    def _obeyed(self, wait: bool) -> bool:
        """Do what has been ordered; False if that is to stop. `wait`: until there is something."""
        while True:
            try:
                order = self._orders.get(wait)
            except Empty:
                return True
            if order is None:
                return False
            order()
            self.metrics.state = self.engine.scheduler.metrics()
            wait = False

    def _add(self, jobs: Sequence[Job], answer: asyncio.Future[None]) -> None:
        error = None
        added = []
        try:
            for job in jobs:
                job.id = next(self._ids)
                self.engine.add(job.id, job.ask)
                added.append(job)
                self._jobs[job.id] = job
        except (ValueError, RuntimeError) as e:
            error = e
            for job in added:
                self.engine.finish(job.id, "refused")
                del self._jobs[job.id]
        self.loop.call_soon_threadsafe(_settle, answer, error)

    def _cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self._jobs.get(job.id) is job:
                self.engine.cancel(job.id)
                self._gone.append(job.id)
                del self._jobs[job.id]

    def _report(self, report: Report) -> None:
        for id, computed in report.step.admitted:
            job = self._jobs[id]
            # What a preempted request finds again are its own tokens.
            job.cached = computed if job.cached is None else job.cached
        written, ended = [], dict.fromkeys(self._gone, "cancelled")
        self._gone = []
        for id, tokens, reason in report.deliveries:
            job = self._jobs[id]
            piece = job.writer.write(tokens, reason)
            self._time(job, len(piece.ids), report.ended)
            if piece.reason is not None:
                if reason is None:
                    self.engine.finish(id, piece.reason)
                self.metrics.request.observe(report.ended - job.arrived)
                ended[id] = piece.reason
                del self._jobs[id]
            written.append((job, piece))
        self.metrics.state = state = self.engine.scheduler.metrics()
        self.loop.call_soon_threadsafe(self._deliver, written, _outline(report, ended, state))

    def _time(self, job: Job, tokens: int, now: float) -> None:
        """Of so many new tokens the first may be the job's first; the others came `gap` apart, as far as anybody can tell."""
        if not tokens:
            return
        if not job.tokens:
            self.metrics.first_token.observe(now - job.arrived)
        else:
            self.metrics.inter_token.observe((now - job.last) / tokens, tokens)
        job.tokens += tokens
        job.last = now

    def _deliver(self, written: Sequence[tuple[Job, Piece]], outline: dict) -> None:
        for job, piece in written:
            job.put(piece)
        self.watch(outline)


def _settle(answer: asyncio.Future[None], error: Exception | None) -> None:
    if answer.cancelled():
        return
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)


def _outline(report: Report, ended: dict[int, str], state: dict) -> dict:
    """A step as one who watches sees it. `runs`: id, whether prefill, tokens run, of these drafts, and tokens that came."""
    came = {d.id: len(d.tokens) for d in report.deliveries}
    return {
        "step": report.step.number,
        "ms": round(1e3 * (report.ended - report.began), 2),
        "runs": [[r.id, int(r.prefill), len(r.tokens), r.drafts, came.get(r.id, 0)] for r in report.step.runs],
        "preempted": report.step.preempted,
        "ended": ended,
        "waiting": state["waiting"],
        "running": state["running"],
        "blocks": [state["blocks_used"], state["blocks_kept"], state["blocks_free"]],
    }
