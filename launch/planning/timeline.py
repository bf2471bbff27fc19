"""A planned step as a trace: what docs/trace.md describes, a process a pp rank, of place 0 on the other axes."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.simulation import Costs, Timing, simulate
from parallel.watch import trace_file
from parallel.watch.clock import Clock, Reading
from parallel.watch.trace import Record, Span, TracedCall
from plan.account import AGAIN, FORWARD, INPUT, PHASES, WEIGHTS
from plan.step import Estimate, Planner
from plan.times import AXES, StageTimes

# Operations of a step: more make a file that no viewer opens.
MOST = 50_000
WHEN = {"F": (FORWARD,), "B": (AGAIN, INPUT, WEIGHTS), "I": (AGAIN, INPUT), "W": (WEIGHTS,)}
# A verb of an axis stands for all of its kind within an operation.
VERB = {"tp": "all_reduce", "cp": "shift", "ep": "all_to_all", "dp": "reduce_scatter"}


def timing(planner: Planner, e: Estimate) -> Timing:
    """The whole step, no micro-batch left out. Raises ValueError where it is too long."""
    s = e.strategy
    n = 2 * s.micro_batches * s.stages
    if n > MOST:
        raise ValueError(f"a timeline of {n:,} operations is too long: use fewer micro-batches, at most {MOST:,} operations")
    costs = Costs(tuple((t.F, t.I, t.W) for t in e.stages), e.hop, s.blocks_on_messages)
    return simulate(planner.planned(s, s.micro_batches), costs)


def document(planner: Planner, e: Estimate, command: list[str]) -> Iterator[bytes]:
    """The text of the file, in parts."""
    parts = trace_file.document(list(records(planner, e)), {"command": command, "planned": True})
    return (part.encode() for part in parts)


def records(planner: Planner, e: Estimate) -> Iterator[Record]:
    timed, s = timing(planner, e), e.strategy
    hop, numbers = e.hop, {}
    size = max(s.pp, 1)
    clock = Clock(Reading(0.0, 0.0, 0.0))
    for rank, (ops, times) in enumerate(zip(timed.plan.ranks, timed.times, strict=True)):
        spans, verbs = [], []
        for op, (begin, end) in zip(ops, times, strict=True):
            phase = "forward" if op.kind == "F" else "backward"
            spans.append(Span(phase, "phase", begin, end))
            spans.append(Span(str(op), "forward" if op.kind == "F" else "backward", begin, end))
            need, to = timed.plan.needs(op), timed.plan.to(op)
            source = None if need is None or timed.plan.place[need] == rank else timed.plan.place[need]
            target = None if to in (None, rank) else to
            inner, outer = begin, end
            if hop and s.blocks_on_messages:
                # What goes and comes at the same time is drawn at both ends, half of the hop at each.
                share = hop / max(1, (source is not None) + (target is not None))
                if source is not None:
                    inner = begin + share
                    verbs.append(_message("receive", rank, source, numbers, (begin, inner), phase, planner, e))
                if target is not None:
                    outer = end - share
                    verbs.append(_message("send", rank, target, numbers, (outer, end), phase, planner, e))
            elif hop and target is not None:
                verbs.append(_message("send", rank, target, numbers, (end, end + hop), phase, planner, e))
            verbs += _inside(e.stages[op.stage], op.kind, inner, outer, rank, phase, numbers)
        last = max((end for _, end in times), default=0.0)
        tail = planner.clock.tail(s, rank, planner.account.places(s)[0], *e.rooms[rank])
        at = last
        for seconds, verb, axis in ((tail.exposed, "all_reduce", "dp"), (tail.tied, "all_reduce", "pp")):
            if seconds:
                verbs.append(_verb(verb, axis, rank, numbers, (at, at + seconds), "step", 0))
                at += seconds
        spans.append(Span("step", "phase", last, at + tail.optimizer))
        spans.append(Span("AdamW", "optimizer", at, at + tail.optimizer))
        spans.append(Span("training step", "step", min(b for b, _ in times), at + tail.optimizer))
        yield Record(rank, size, "planned", clock, spans, verbs, [])


def _inside(
    stage: StageTimes, kind: str, begin: float, end: float, rank: int, phase: str, numbers: dict
) -> Iterator[TracedCall]:
    """The verbs that are seen within one operation, at its end."""
    at = end
    for n, axis in enumerate(AXES):
        seconds = sum(stage.phases[PHASES.index(when)].exposed[n] for when in WHEN[kind])
        if seconds > 0 and axis in VERB:
            begun = max(begin, at - seconds)
            yield _verb(VERB[axis], axis, rank, numbers, (begun, at), phase, 0)
            at = begun


def _verb(verb: str, axis: str, rank: int, numbers: dict, at: tuple[float, float], phase: str, n: int) -> TracedCall:
    """A verb in which other ranks than those of the file take part: alone in it."""
    number = numbers[verb, axis, rank] = numbers.get((verb, axis, rank), -1) + 1
    return TracedCall(axis, (rank,), 0, number, verb, False, (), "bfloat16", "", None, n, phase, "planned", "", *at, None)


def _message(
    verb: str, rank: int, other: int, numbers: dict, at: tuple[float, float], phase: str, planner: Planner, e: Estimate
) -> TracedCall:
    s = e.strategy
    ends = (rank, other) if verb == "send" else (other, rank)
    number = numbers[verb, ends] = numbers.get((verb, ends), -1) + 1
    started = verb == "send" and not s.blocks_on_messages
    how, n = ("to" if verb == "send" else "from"), round(planner.account.hop_bytes(s))
    shape = (s.tokens, s.config.d_model)
    return TracedCall("pp", tuple(range(s.pp)), 0, number, verb, started, shape, "bfloat16", f"{how} {other}", other, n, phase,
                      "planned", "", *at, None)  # fmt: skip
