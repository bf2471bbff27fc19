"""Experts shared out over ranks: tokens travel to them and come back, compared with the reference, counted and timed.

T tokens of all ranks   D model width   F hidden width of an expert   X experts   A active for a token
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Iterator
from math import ceil
from statistics import median
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report
from launch.explain import view
from launch.measure import products, step
from launch.measure.experts import Job, Stepped, laid_out, moved, rows_here
from launch.options import UsageError, axis_sizes, natural, parser, positive, settled
from launch.terminal.lines import BYTES, SECONDS, column, counted
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.shard import even
from reference import layer
from reference import transformer as reference
from reference.compare import Comparison

# Experts shown one by one, and characters of the longest bar.
SHOWN, BAR = 16, 30
# Tokens that may be computed to derive the entries of one tensor: not by the clock, so that the same command compares the same.
BUDGET = 3000


class Task(NamedTuple):
    """Ranks along each axis, what is compared, and what is timed."""

    axes: dict[str, int]
    compared: Job
    timed: Job


def options() -> argparse.ArgumentParser:
    p = parser(
        "ep_moe",
        "Run a routed MLP whose experts are shared out over ranks, forward and backward, and compare it with a reference. "
        "Each rank has tokens of its own.",
        (
            "mpirun -n 4 python -m launch.ep_moe --experts 8 --active 2",
            "mpirun -n 4 python -m launch.ep_moe --mesh ep=2,tp=2 --shared 1",
            "mpirun -n 3 python -m launch.ep_moe --tokens 9,0,4 --router sigmoid --groups 2",
        ),
    )
    p.add_argument("--experts", type=positive, default=8, help="X, shared out over ep, evenly or not")
    p.add_argument("--active", type=positive, default=2, help="A, experts that serve a token")
    p.add_argument("--shared", type=natural, default=0, help="experts that serve every token besides; each rank has them")
    p.add_argument("--router", choices=("softmax", "sigmoid"), default="softmax", help="sigmoid: with a correction")
    p.add_argument("--groups", type=positive, default=1, help="of experts; a token's are all in its best groups")
    p.add_argument("--active-groups", type=positive, help="a token's best groups (default: half of them)")
    p.add_argument("--mesh", type=axis_sizes, metavar="ep=N,tp=N", help="ranks along each axis (default: all along ep)")
    p.add_argument(
        "--tokens",
        type=_counts,
        metavar="N[,N...]",
        default="23",
        help="of each rank of ep; one number is that of the first, and others have up to 4 more",
    )
    p.add_argument("--d-model", type=positive, default=32, help="D, width of input and output")
    p.add_argument("--d-ff", type=positive, default=48, help="F, hidden width of an expert, cut over tp, evenly or not")
    p.add_argument(
        "--timed", type=_sizes, metavar="T,D,F", default="1024,128,256", help="sizes of the step that is timed; T of all ranks"
    )
    view.add_options(p)
    return p


def _counts(text: str) -> tuple[int, ...]:
    """An argparse type: numbers of tokens, which may be 0."""
    return tuple(natural(part) for part in text.split(","))


def _sizes(text: str) -> tuple[int, int, int]:
    """An argparse type: T,D,F."""
    sizes = tuple(positive(part) for part in text.split(","))
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not T,D,F: use three sizes, such as 1024,128,256")
    return sizes


def check(args: argparse.Namespace, ranks: int) -> Task:
    view.check(args, ranks)
    axes = settled(args.mesh, ranks, "ep", ("ep", "tp"))
    ep, tp, X = axes["ep"], axes["tp"], args.experts
    if ep > X:
        raise UsageError(f"cannot cut {counted(X, 'expert')} over ep={ep}: use at most ep={X}")
    if args.active > X:
        raise UsageError(f"--active {args.active} is more than --experts {X}: use 1 to {X}")
    for option, d_ff in (("--d-ff", args.d_ff), ("--timed F", args.timed[2])):
        if tp > d_ff:
            raise UsageError(f"cannot cut {option} {d_ff} over tp={tp}: use at most tp={d_ff} or a larger {option}")
    tokens = args.tokens if len(args.tokens) > 1 else tuple(args.tokens[0] + 3 * rank % 5 for rank in range(ep))
    if len(tokens) != ep:
        raise UsageError(f"--tokens has {len(tokens)} numbers for ep={ep}: use one, or {ep}")
    if not sum(tokens):
        raise UsageError("--tokens has no token at all: use 1 or more on some rank")
    T, D, F = args.timed
    compared = _job(args, tokens, args.d_model, args.d_ff)
    try:
        compared.dry(ep, tp)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Task(axes, compared, _job(args, even(max(T, ep), ep).sizes, D, F))


def _job(args: argparse.Namespace, tokens: tuple[int, ...], d_model: int, d_ff: int) -> Job:
    """As the models whose routers these are: Mixtral's, DeepSeek-V3's with a correction and groups worth their two best."""
    sigmoid, G = args.router == "sigmoid", args.groups
    routing = {"scoring": args.router, "correction": sigmoid, "groups": G, "active_groups": args.active_groups or ceil(G / 2)}
    routing["group_top"] = min(2 if sigmoid else 1, max(1, args.experts // G))
    sizes = (d_model, d_ff, args.experts, args.active, args.shared * d_ff)
    return Job(tuple(tokens), *sizes, routing, args.dtype, args.seed)


def compared(
    job: Job, whole: dict[str, np.ndarray], fixed: dict[str, np.ndarray], c_TA: np.ndarray, share: tuple[int, int]
) -> Iterator[Comparison]:
    """This share of the tensors beside the reference. `whole`: x and the weights by name, y, and gradients led by d; `fixed`:
    the correction, where there is one."""
    asked = {name: value for name, value in job.routing.items() if name != "correction"}
    routing, (_, dy) = reference.Routing(job.active, **asked), job.inputs()

    def forward(W: dict, rows: object = slice(None)) -> np.ndarray:
        return reference.routed(W | fixed, W["x"][rows], routing)

    def rows(name: str, index: tuple[int, ...] | None) -> np.ndarray:
        """The tokens that moving one entry may move. Moving all at once is for all tokens, whatever was chosen here."""
        if index is None or name not in ("x", "W1", "W2"):
            return np.arange(len(dy))
        return np.array(index[:1]) if name == "x" else np.flatnonzero((c_TA == index[0]).any(axis=1))

    def loss(W: dict, name: str, index: tuple[int, ...] | None) -> complex:
        at = rows(name, index)
        return np.sum(dy[at] * forward(W, at)) if len(at) else 0j

    def most(name: str) -> int:
        share = {"x": 1 / len(dy), "W1": job.active / job.experts, "W2": job.active / job.experts}.get(name, 1)
        return int(BUDGET / max(1, len(dy) * share))

    yield from layer.compared([forward], loss, whole, dy, most, share)


def layouts(args: argparse.Namespace, task: Task, c_TA: np.ndarray, comm: MPI.Intracomm) -> list[dict]:
    """The timed layer all along ep, all along tp, and as the mesh has it: bytes by the closed forms, and the time of a step."""
    job, p, found = task.timed, comm.size, []
    for ep, tp in dict.fromkeys([(p, 1), (task.axes["ep"], task.axes["tp"]), (1, p)]):
        if ep > job.experts or tp > job.d_ff:
            continue
        with Mesh(comm, ep=ep, tp=tp) as mesh:
            stepped = Stepped(job._replace(tokens=even(sum(job.tokens), ep).sizes), mesh)
            runs = mesh.control.everyone(step.timed(stepped.phases, comm))
        seconds = median(map(max, zip(*runs, strict=True)))
        found.append(laid_out(job, c_TA, ep, tp) | {"seconds": seconds})
    return found


def verdict(found: list[dict], matmul_seconds: float, active: int) -> dict | None:
    """All along ep beside all along tp: `bytes` that a rank sends, gradients too. One of them saves bytes, and where its
    busiest rank is the busier, `break_even_bytes_per_second` is the rate of sending above which the other is better; None: at
    no rate.
    None at all where the layer cannot be laid out both ways."""
    ep, tp = (next((a for a in found if a[one] == 1), None) for one in ("tp", "ep"))
    if ep is None or tp is None or ep is tp:
        return None
    sent = [max(a["wire_bytes_per_rank"]) + a["gradient_wire_bytes"] for a in (ep, tp)]
    less = "ep" if sent[0] < sent[1] else "tp"
    waits = (ep["busiest"] - tp["busiest"]) * matmul_seconds * (1 if less == "ep" else -1)
    rate = abs(sent[1] - sent[0]) / waits if waits > 0 else None
    return {"ranks": ep["ep"], "active": active, "bytes": sent, "fewer_bytes": less, "break_even_bytes_per_second": rate}


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    control, job, first = Control(comm), task.compared, comm.rank == 0
    mesh = start.make_mesh(args, comm, **task.axes)
    stepped = Stepped(job, mesh)
    measured, c_TA = stepped.run(control)
    fixed = {b.name: b.data.astype(np.float64) for b in stepped.moe.buffers}
    mine = list(compared(job, measured.whole, fixed, c_TA, (comm.rank, comm.size)))
    checks = [c for of_rank in control.everyone(mine) for c in of_rank]
    explained = view.explained(args, control, mesh, stepped.moe.parameters, stepped.phases)
    larger = Stepped(task.timed, mesh)
    with mesh.phase("choice"):
        chosen = larger.choice(larger.moe.forward(larger.x)[1], control)
    served = rows_here(chosen, larger.moe.cut, mesh.ep.rank)
    limit = products.of(larger.moe.work(len(larger.x), served=served), args.dtype)
    seconds = step.seconds(larger.phases, limit, lambda: _alone(task.timed).phases, comm)
    found = layouts(args, task, chosen, comm)
    if not first:
        return 0
    goes, load = moved(c_TA, job.cut, stepped.moe.cut), np.bincount(c_TA.reshape(-1), minlength=job.experts)
    result = report.header("ep_moe", args, mesh) | {
        "config": {k: v for k, v in job._asdict().items() if k not in ("routing", "dtype", "seed")} | job.routing,
        "checks": [c.as_json() for c in checks],
        "communication": measured.communication,
        "memory": measured.memory,
        "tokens_per_expert": load.tolist(),
        "worst_over_mean": float(load.max() / load.mean()),
        "pairs_sent_per_rank": [goes[mesh.place_of(rank)["ep"]].left for rank in range(comm.size)],
        "timed": dict(zip(("tokens", "d_model", "d_ff"), (sum(task.timed.tokens), *task.timed[1:3]), strict=True)),
        "seconds": seconds,
        "layouts": found,
        "ep_beside_tp": verdict(found, seconds["matmul_only"], job.active),
        **({"explain": explained} if explained else {}),
    }
    wrong = [*report.wrong(checks, result), *measured.wrong]
    shown = lambda: view.show(explained, lambda: show(result, checks))  # noqa: E731
    return report.publish(args.json, result, shown, wrong, checks=checks, unwritten=view.draw(args, explained))


def _alone(job: Job) -> Stepped:
    """All tokens on one process."""
    return Stepped(job._replace(tokens=(sum(job.tokens),)), Mesh(MPI.COMM_SELF, ep=1, tp=1))


def show(result: dict, checks: list[Comparison]) -> None:
    """The report for people."""
    c, mesh = result["config"], result["mesh"]
    router = c["scoring"] + (f", best {c['active_groups']} of {c['groups']} groups" if c["groups"] > 1 else "")
    report.say(
        f"Routed MLP on ep={mesh['ep']}, tp={mesh['tp']}: {counted(c['experts'], 'expert')}, "
        f"{c['active']} active for a token ({router}), shared width {c['d_shared']}; "
        f"T {counted(sum(c['tokens']), 'token')}, by rank of ep {', '.join(map(str, c['tokens']))}; "
        f"D {c['d_model']}, F {c['d_ff']}, {result['dtype']}, seed {result['seed']}",
        "",
    )
    report.comparisons("Sharded result against the reference: a grid of entries, and along a direction through all", checks)
    report.communication(result["communication"])
    report.memory(result["memory"])
    _load(result)
    T, D, F = result["timed"].values()
    report.seconds(result["seconds"], step.REPEATS, result["ranks"], f" at T {T}, D {D}, F {F}")
    _layouts(result)


def _load(result: dict) -> None:
    load, ep = result["tokens_per_expert"], result["mesh"]["ep"]
    holds, most = even(len(load), ep), max(load)
    shown = sorted(sorted(range(len(load)), key=lambda e: -load[e])[:SHOWN])
    report.table(
        f"Tokens per expert{f', the {SHOWN} busiest of {len(load)}' * (len(load) > SHOWN)}",
        ("expert", "rank of ep", "tokens", ""),
        [(e, holds.owner(e), load[e], ("#" * round(BAR * load[e] / most)).ljust(BAR, ".")) for e in shown],
    )
    report.say(
        f"The busiest expert serves {result['worst_over_mean']:.2f} times the mean. Pairs (token, expert) that left each rank: "
        f"{', '.join(map(str, result['pairs_sent_per_rank']))}",
        "",
    )


def _layouts(result: dict) -> None:
    found = result["layouts"]
    sent, cells = column("sent by a rank, most", [max(a["wire_bytes_per_rank"]) for a in found], BYTES)
    dense, sums = column("gradients, once a step", [a["gradient_wire_bytes"] for a in found], BYTES)
    took, times = column("step", [a["seconds"] for a in found], SECONDS, 2)
    report.table(
        "The timed layer, its tokens shared out evenly, in other layouts",
        ("layout", "experts a rank", "an expert's first product", sent, dense, "busiest rank over mean", took),
        [
            (f"ep={a['ep']},tp={a['tp']}", a["experts_per_rank"], f"{T}x{D} @ {D}x{n}", cells[i], sums[i],
             f"{a['busiest']:.2f}", times[i])
            for i, a in enumerate(found) for T, D, n in [a["product"]]
        ],
    )  # fmt: skip
    if result["ep_beside_tp"] is not None:
        report.say(*said(result["ep_beside_tp"]), "")


def said(of: dict) -> Iterator[str]:
    """When which is better, in words."""
    (ep, tp), p, A = of["bytes"], of["ranks"], of["active"]
    less, rate = of["fewer_bytes"], of["break_even_bytes_per_second"]
    yield (
        f"ep={p} sends {ep / tp:.2f} of the bytes of tp={p}: a rank sends its own tokens' rows, each to "
        f"{counted(A, 'expert')}, where tp sums the rows of all {p} ranks' tokens."
    )
    if rate is None:
        yield f"By bytes and balance {less} is better at any rate of sending."
    else:
        other = "tp" if less == "ep" else "ep"
        yield (
            f"By bytes and balance {less} is better where a rank sends less than {rate / 2**20:,.1f} MiB/s; above, {other}, "
            "as its busiest rank is less behind the mean."
        )


if __name__ == "__main__":
    start.run(options(), check, main)
