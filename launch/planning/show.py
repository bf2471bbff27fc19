"""What was planned, for people: tables and lines."""

from __future__ import annotations

from collections.abc import Sequence

from launch import report
from launch.planning import told
from launch.planning.table import Predicted
from launch.terminal.lines import SECONDS, column, counted, say, size, table
from plan.account import KINDS, PHASES
from plan.collectives import least_block
from plan.scores import Score
from plan.search import Found, Miss
from plan.step import Estimate, Planner
from plan.strategy import Strategy
from plan.times import AXES
from plan.whatif import Change

PARTS = ("forward", "backward", "recompute", "host", "bubble", "optimizer", "jitter")


def mesh(s: Strategy) -> str:
    """pp=8,dp=4,tp=8, without axes of one rank."""
    return ",".join(f"{name}={n}" for name, n in s.mesh.items() if n > 1) or "one rank"


def options(s: Strategy) -> str:
    """What else tells layouts apart, as it is typed."""
    said = [f"--micro-batch {s.micro_batch}"]
    if s.pp > 1:
        said.append(f"--schedule {s.schedule}" + f" --chunks {s.chunks}" * (s.schedule == "interleaved"))
    said += [f"--recompute {s.recompute}"] * (s.recompute != "none") + [f"--zero {s.zero}"] * (s.zero > 0)
    said += ["--sequence-parallel"] * (s.sequence_parallel and s.tp > 1)
    return " ".join(said)


def billions(n: float) -> str:
    return f"{n / 1e9:,.2f}e9" if n >= 1e8 else f"{n:,.0f}"


def asked(name: str, e: Estimate) -> None:
    """The model, the batch, the machine."""
    s, m = e.strategy, e.machine
    active = f", of which a token meets {billions(e.facts.active)}" if e.facts.active < e.facts.parameters else ""
    say(f"{name}: {billions(e.facts.parameters)} parameters{active}; {counted(s.batch, 'sequence')} of "
        f"{counted(s.sequence_length, 'token')}; {counted(s.ranks, 'rank')} of {m.name}, {m.gpus_per_node} a node")  # fmt: skip


def estimate(name: str, planner: Planner, e: Estimate) -> None:
    s = e.strategy
    asked(name, e)
    say(f"{mesh(s)} {options(s)}: {counted(s.micro_batches, 'micro-batch').replace('batchs', 'batches')}", "")
    say(f"a step takes {e.iteration:,.4g} s: {e.tokens_per_second:,.0f} tokens/s, {e.tflops:,.1f} TFLOP/s a GPU, "
        f"MFU {100 * e.mfu:.1f} %, HFU {100 * e.hfu:.1f} %, bubble {100 * e.bubble:.1f} %", "")  # fmt: skip
    seconds = {part: e.seconds[part] for part in PARTS} | {f"exposed {axis}": t for axis, t in e.exposed.items()}
    heading, cells = column("", list(seconds.values()), {"s": 1}, 3)
    hidden = {f"exposed {axis}": t for axis, t in e.hidden.items()}
    table(
        f"Where the slowest rank's step goes (rank {told.rank_number(s, e.slowest)})",
        ("", heading, "%", "hidden s"),
        [(part, cell, f"{100 * t / e.iteration:.1f}", f"{hidden[part]:,.3f}" if hidden.get(part) else "-")
         for (part, t), cell in zip(seconds.items(), cells, strict=True) if t > 1e-6 * e.iteration or hidden.get(part)],
    )  # fmt: skip
    memory(e)
    communication(told.communication(planner, e), s)


def memory(e: Estimate) -> None:
    """A line for each pp rank, those alike together."""
    kinds = [kind for kind in KINDS if any(row[kind] for row in e.memory)]
    rows = [(*(row[kind] for kind in kinds), flight) for row, flight in zip(e.memory, e.in_flight, strict=True)]
    room = f"{size(e.capacity)} a GPU"
    fits = (
        f"fits into {room}" if e.fits else f"does NOT fit into {room}: {size(e.peak_bytes - told.USABLE * e.capacity)} too much"
    )
    table(
        f"Memory of a rank in GiB, by place on pp; {fits}",
        ("pp", *kinds, "in flight", "total"),
        [(report.said(run), *(f"{n / 2**30:,.2f}" for n in rows[run[0]][:-1]), rows[run[0]][-1],
          f"{sum(rows[run[0]][:-1]) / 2**30:,.2f}") for run in report.runs(rows)],
    )  # fmt: skip


def communication(classes: Sequence[dict], s: Strategy) -> None:
    if not classes or not classes[0]["rows"]:
        return
    rows = classes[0]["rows"]
    headings, cells = zip(*(column(name, [r[key] for r in rows], SECONDS, 2)
                            for name, key in (("", "seconds"), ("exposed", "exposed_seconds"))), strict=True)  # fmt: skip
    table(
        f"What a rank of pp {classes[0]['stage_rank']} sends in a step",
        ("verb", "axis", "phase", "ranks", "calls", "message", *headings),
        [(r["verb"], r["axis"], r["phase"], r["ranks"], f"{r['calls']:,.0f}", size(r["message_bytes"]), a, b)
         for r, a, b in zip(rows, *cells, strict=True)],
        keys=3,
    )  # fmt: skip


def search(name: str, found: Found) -> None:
    if found.layouts:
        asked(name, found.layouts[0])
        say("")
        table(
            f"The fastest of {found.feasible:,} layouts that fit, of {found.considered:,} in {found.seconds:.1f} s",
            ("mesh", "options", "s", "tokens/s", "MFU %", "GiB", "bubble %", *(f"{axis} s" for axis in AXES)),
            [(mesh(e.strategy), options(e.strategy).replace("--", ""), f"{e.iteration:,.4g}", f"{e.tokens_per_second:,.0f}",
              f"{100 * e.mfu:.1f}", f"{e.peak_bytes / 2**30:.1f}", f"{100 * e.bubble:.1f}",
              *(f"{t:.2f}" if t else "-" for t in e.exposed.values())) for e in found.layouts],
        )  # fmt: skip
    else:
        say(f"no layout of {found.considered:,} fits")
    say("Why the rest fails:", *map(_miss, found.misses), "")


def _miss(miss: Miss) -> str:
    if miss.missing is None:
        return f"  {miss.count:,}: {miss.why}"
    fix = f": {miss.would_fit} fits" if miss.would_fit else ""
    said = f"{mesh(miss.nearest)} {options(miss.nearest)}"
    return (f"  {miss.count:,} too large: the nearest, {said}, by {size(miss.missing)}, most of it {miss.kind}, "
            f"on stage {miss.stage}{fix}")  # fmt: skip


def changes(title: str, e: Estimate, made: Sequence[Change]) -> None:
    table(
        f"{title}, beside {e.iteration:,.4g} s",
        ("change", "s", "ratio", "limit"),
        [(c.change, "-" if c.seconds is None else f"{c.seconds:,.4g}", "-" if c.ratio is None else f"{c.ratio:.4f}", c.limit)
         for c in made],
    )  # fmt: skip


def explained(planner: Planner, e: Estimate) -> None:
    """The operations of each kind of part on the ranks of the slowest place."""
    device, s = planner.clock.device, e.strategy
    if s.cp > 1:
        least = least_block(planner.machine, s.dtype)
        say(f"at peak rates a hop of ring attention is hidden from {least:,.0f} tokens a rank on", "")
    parts = {part.name: part for stage in planner.account.parts(s, planner.account.places(s)[0]) for part, _ in stage}
    for part in parts.values():
        rows = [(op.name, op.phase, "x".join(f"{n:,.0f}" for n in op.shape), op, device.explained(op, part.dtype))
                for op in sorted(part.operations, key=lambda op: PHASES.index(op.phase))]  # fmt: skip
        table(
            f"Operations of one {part.name} on a micro-batch",
            ("operation", "phase", "kind", "shape", "us", "MB", "limited by"),
            [(name, phase, op.kind, shape, f"{1e6 * seconds:,.1f}", f"{moved / 1e6:,.1f}", limit)
             for name, phase, shape, op, (seconds, moved, limit) in rows],
            keys=2,
        )  # fmt: skip
        for phase in PHASES:
            launches = part.kernels.get(phase, 0)
            if launches:
                alone = sum(device.seconds(op, part.dtype) for op in part.operations if op.phase == phase)
                say(f"{part.name}, {phase}: {1e6 * (alone + launches * device.kernel):,.1f} us of the device with "
                    f"{launches:.0f} launches; {1e6 * launches * device.host:,.1f} us of the host beside it")  # fmt: skip
        say("")


def scored(predicted: Predicted, output: str) -> None:
    n, failed = len(predicted.cells), predicted.failed
    say(
        f"{counted(n, 'row')} predicted, {failed} of them could not be: {output}"
        if failed
        else f"{counted(n, 'row')} predicted: {output}"
    )
    if predicted.score is not None:
        score(predicted.score)


def score(s: Score) -> None:
    def per_cent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.2f}"

    rows = [("mean error", s.mean), ("median error", s.median), (f"worst error, {s.worst_row}", s.worst), ("bias", s.bias)]
    rows += [("floor: one fraction of peak a GPU", s.constant), ("floor: the median of the table's other rows", s.own)]
    table(f"Predicted beside {counted(s.rows, 'measured row')}", ("", "%"), [(name, per_cent(v)) for name, v in rows])
    if s.tau is not None or s.regret is not None:
        say(f"order within groups: Kendall's tau {s.tau:.2f}, " * (s.tau is not None)
            + f"regret {per_cent(s.regret)} %, worst {per_cent(s.worst_regret)} %")  # fmt: skip
