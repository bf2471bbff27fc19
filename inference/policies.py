"""What continuous batching is compared with: other schedulers, which differ in who may join and in what may share a step."""

from __future__ import annotations

from inference.scheduler import Request, Scheduler, Step


class Static(Scheduler):
    """Nobody is admitted before all of the running are finished. Then the batch is filled at once, even where the budget lets
    some of its prompts run in later steps only."""

    def _may_join(self, step: Step) -> bool:
        # All of the running have been admitted in this very step.
        return super()._may_join(step) and len(self.running) == len(step.admitted)

    def _prefills(self, plan: dict[Request, int], step: Step) -> None:
        while self._may_join(step) and self._admit(step):
            pass
        super()._prefills(plan, step)


class Apart(Scheduler):
    """Prefill and decodes in steps of their own: prefill first, but not twice in a row if somebody decodes."""

    _after_prefill = False

    def schedule(self) -> Step:
        step = super().schedule()
        self._after_prefill = any(run.prefill for run in step.runs)
        return step

    def _decodes(self, plan: dict[Request, int], step: Step) -> None:
        if self._after_prefill:
            super()._decodes(plan, step)

    def _prefills(self, plan: dict[Request, int], step: Step) -> None:
        if not plan:
            super()._prefills(plan, step)
        if not plan:
            super()._decodes(plan, step)


class StaticApart(Apart, Static):
    """Both."""


POLICIES: dict[str, type[Scheduler]] = {"continuous": Scheduler, "static": Static}
# The same with prefill and decodes apart.
APART: dict[str, type[Scheduler]] = {"continuous": Apart, "static": StaticApart}
