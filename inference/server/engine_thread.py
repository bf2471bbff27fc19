"""The engine in a thread of its own, beside the event loop that talks to clients: orders in, deltas of text out.

Only this thread calls the engine, and only between steps. It passes what came of a step to the loop in one call of
call_soon_threadsafe. Without a request it is asleep.
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
from inference.server.writer import Delta, Writer

# Requests that wait, in what the page is told of a step.
QUEUE_SHOWN = 32


@dataclass(eq=False)
class Job:
    """One answer. `put` is called on the event loop with each delta of it, `fail` with why there will be none. `arrived`,
    `last`: when it was asked for and when its last tokens came, by perf_counter. `cached`: tokens of the prompt that were
    computed already. `tokens`: how many came.
    """

    ask: Ask
    writer: Writer
    put: Callable[[Delta], None]
    fail: Callable[[Exception], None]
    arrived: float
    id: int = -1
    cached: int | None = None
    tokens: int = 0
    last: float = 0.0


class EngineThread(threading.Thread):
    """`watch` is called on the event loop with the outline of each step, see `_outline`; also of requests that
    went away, where no step tells of them."""

    def __init__(
        self, engine: Engine, metrics: Metrics, loop: asyncio.AbstractEventLoop, watch: Callable[[dict], None]
    ) -> None:
        super().__init__(name="engine")
        self.engine, self.metrics, self.loop, self.watch = engine, metrics, loop, watch
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._ids = count(1)
        # Cancelled since the last step: the next outline says so.
        self._gone: list[int] = []

    # --- from the event loop

    def submit(self, jobs: Sequence[Job]) -> asyncio.Future[None]:
        """Add all of these or none. The future raises what Engine.add raises."""
        answer = self.loop.create_future()
        self._orders.put(partial(self._add, jobs, answer))
        return answer

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End those of these that have not ended yet: nobody waits for them."""
        self._orders.put(partial(self._cancel, jobs))

    def stop(self) -> None:
        """Once the orders before this one are done, the thread ends, and with it the other ranks' part."""
        self._orders.put(None)

    # --- in the thread

    def run(self) -> None:
        while self._obeyed(wait=not self._jobs):
            report = self.engine.step()
            if report is not None:
                self._report(report)
            elif self._gone:
                # No step will say so.
                self._tell([], self._outline(None, {}))
        self.engine.stop()

    def _obeyed(self, wait: bool) -> bool:
        """Do what has been ordered; False if that is to stop. `wait`: sleep until there is an order."""
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
            # A preempted request is admitted again, and then finds its own tokens.
            job.cached = computed if job.cached is None else job.cached
        written, ended = [], {}
        for id, tokens, reason, prompt in report.deliveries:
            job = self._jobs[id]
            delta = job.writer.write(tokens, reason, prompt)
            self._time(job, len(delta.ids), report.ended)
            if delta.reason is not None:
                if reason is None:
                    self.engine.finish(id, delta.reason)
                self.metrics.request.observe(report.ended - job.arrived)
                ended[id] = delta.reason
                del self._jobs[id]
            written.append((job, delta))
        failed = [(self._jobs.pop(id), error) for id, error in report.failed.items()]
        ended |= dict.fromkeys(report.failed, "error")
        self._tell(written, self._outline(report, ended), failed)

    def _tell(self, written: Sequence[tuple[Job, Delta]], outline: dict, failed: Sequence[tuple[Job, Exception]] = ()) -> None:
        self.loop.call_soon_threadsafe(self._deliver, written, outline, failed)

    def _time(self, job: Job, tokens: int, now: float) -> None:
        """Note the time to a first token, or that between tokens: those of one step share it evenly."""
        if not tokens:
            return
        if not job.tokens:
            self.metrics.first_token.observe(now - job.arrived)
        else:
            for _ in range(tokens):
                self.metrics.inter_token.observe((now - job.last) / tokens)
        job.tokens += tokens
        job.last = now

    def _outline(self, report: Report | None, ended: dict[int, str]) -> dict:
        """A step as the page shows it, and how things stand after it. `runs`: id, whether prefill, tokens run, drafts among
        these, and tokens that came; `queue`: the first ids that wait. None: requests have gone, and there was no step."""
        self.metrics.state = state = self.engine.scheduler.metrics()
        step = {"step": None, "ms": 0, "runs": [], "preempted": []}
        if report is not None:
            came = {d.id: len(d.tokens) for d in report.deliveries}
            step = {
                "step": report.step.number,
                "ms": round(1e3 * (report.ended - report.began), 2),
                "runs": [[r.id, int(r.prefill), len(r.tokens), r.drafts, came.get(r.id, 0)] for r in report.step.runs],
                "preempted": report.step.preempted,
            }
        ended |= dict.fromkeys(self._gone, "cancelled")
        self._gone = []
        return step | {
            "ended": ended,
            "waiting": state["waiting"],
            "running": state["running"],
            "queue": [r.id for r in self.engine.scheduler.waiting[:QUEUE_SHOWN]],
            "blocks": [state["blocks_used"], state["blocks_kept"], state["blocks_free"]],
        }

    def _deliver(self, written: Sequence[tuple[Job, Delta]], outline: dict, failed: Sequence[tuple[Job, Exception]]) -> None:
        for job, delta in written:
            job.put(delta)
        for job, error in failed:
            job.fail(error)
        self.watch(outline)


def _settle(answer: asyncio.Future[None], error: Exception | None) -> None:
    if answer.cancelled():
        return
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)
