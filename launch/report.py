"""What commands print on rank 0's standard output: aligned tables for people, or one JSON document."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from math import inf, prod

from launch.terminal.lines import BYTES, SECONDS, column, counted, say, table
from parallel.ledger import agrees
from parallel.mesh import Mesh
from reference.compare import Comparison


def header(command: str, args: argparse.Namespace | None = None, mesh: Mesh | None = None) -> dict:
    """How the JSON document of every command begins. One that computes nothing on ranks has no mesh."""
    begun = {"command": command, "ok": True}
    if mesh is None:
        return begun
    offered = {name: getattr(args, name) for name in ("dtype", "seed") if name in args}
    return begun | {"ranks": prod(mesh.sizes.values()), "mesh": mesh.sizes} | offered


def publish(
    as_json: bool,
    result: dict,
    show: Callable[[], None],
    wrong: Sequence[str] = (),
    agreed: str | None = "all agreed",
    between: str = ", ",
    checks: Sequence[Comparison] = (),
    unwritten: Sequence[str | None] = (),
) -> int:
    """Settle `ok`, print the JSON, or what `show` prints and a last line, and return the exit status.

    `wrong`: what does not agree, listed with `between` between. `agreed`: the last line if all does; None where nothing is
    compared. `checks`: against the reference; where there are some, a summary of them leads the report. `unwritten`: why files
    could not be written (None: they were); told last, so that no result is lost to them.
    """
    result["ok"] = not wrong
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        if checks:
            say(summary(checks, result["communication"], wrong), "")
        show()
        if wrong:
            say(f"NOT ALL AGREED: {between.join(wrong)}")
        elif agreed is not None:
            say(agreed)
    lost = [why for why in unwritten if why is not None]
    if lost:
        print(f"error: {'; '.join(lost)}", file=sys.stderr, flush=True)
    return 2 if lost else 1 if wrong else 0


def failed(as_json: bool, result: dict, why: str) -> int:
    """The work ended before there was a result, on all ranks alike: say why, and return the exit status."""
    if as_json:
        print(json.dumps(result | {"ok": False, "error": why}, allow_nan=False))
    print(f"error: {why}", file=sys.stderr, flush=True)
    return 1


def summary(checks: Sequence[Comparison], rows: Sequence[dict], wrong: Sequence[str] = ()) -> str:
    """The report in a line: what disagrees, if anything does; the tensors beside the reference; what was sent."""
    verdict = f"NOT OK: {', '.join(wrong)}; " if wrong else "ok: "
    tensors: dict[str, bool] = {}
    for c in checks:
        # Some are compared by entries and again along a direction through all.
        name = c.tensor.removesuffix(", all")
        tensors[name] = tensors.get(name, True) and c.ok
    worst = 100 * max(map(_used, checks))
    # What is received was sent.
    rows = [r for r in rows if r["verb"] != "receive"]
    messages = sum(r["calls"] for r in rows if r["verb"] == "send")
    calls = sum(r["calls"] for r in rows) - messages
    sent = counted(calls, "collective") + f" and {counted(messages, 'message')}" * bool(messages)
    return (
        f"{verdict}{sum(tensors.values())} of {len(tensors)} tensors agree with the reference, "
        f"worst {worst:,.{1 if worst >= 0.05 else 3}f} % of tolerance; "
        f"{sent}, {sum(r['message_bytes'] for r in rows):,} bytes, {'' if agrees(rows) else 'NOT '}as predicted"
    )


def _used(c: Comparison) -> float:
    """How much of its tolerance an error is."""
    return c.max_abs_error / c.tolerance if c.tolerance else 0.0 if c.ok else inf


def of_ranks(what: str, agree: Iterable[bool]) -> list[str]:
    """The ranks that do not agree on it, in words."""
    return [f"{what} of rank {rank}" for rank, ok in enumerate(agree) if not ok]


def as_predicted(memory: dict[str, int]) -> bool:
    """Whether a rank holds what was predicted, of all that is."""
    predicted = {kind.removeprefix("predicted_"): size for kind, size in memory.items() if kind.startswith("predicted_")}
    return all(memory[kind] == size for kind, size in predicted.items())


def by_rank(memory: Sequence[dict[str, int]]) -> dict[str, list[int]]:
    """The memory of all ranks, counted by kind on each, as JSON has it."""
    return {f"{kind}_bytes_per_rank": [m[kind] for m in memory] for kind in memory[0]}


def wrong(checks: Sequence[Comparison], result: dict) -> list[str]:
    """What does not agree: tensors, communication or memory."""
    held = result["memory"]
    tensors = [c.tensor for c in checks if not c.ok]
    sent = [f"communication of rank {r['rank']}" for r in result["communication"] if "rank" in r]
    kinds = [k for k in ("weights", "saved") if held[f"{k}_bytes_per_rank"] != held[f"predicted_{k}_bytes_per_rank"]]
    return [*tensors, *sent, *kinds]


def comparisons(title: str, checks: Sequence[Comparison]) -> None:
    table(
        title,
        ("tensor", "phase", "entries", "max abs error", "tolerance", "relative error", ""),
        [
            (c.tensor, c.phase, f"{c.entries:,}", *map("{:.1e}".format, numbers), "ok" if c.ok else "WRONG")
            for c in checks
            for numbers in [(c.max_abs_error, c.tolerance, c.relative_error)]
        ],
    )
    for c in checks:
        if not c.ok:
            say(f"WRONG: {c.worst}")


def communication(rows: Sequence[dict], what: str = "one step") -> None:
    """`rows`: as `Ledger.report` has them; None is predicted of what has no closed form."""
    kinds = {"message bytes": "message_bytes", "predicted": "predicted_message_bytes", "wire bytes": "wire_bytes"}
    if any(r.get("crossed_bytes") for r in rows):
        kinds["to other hosts"] = "crossed_bytes"
    predicted = any(r["predicted_message_bytes"] is not None for r in rows)
    if not predicted:
        del kinds["predicted"]
    times = {"": "seconds"} | ({"hidden": "hidden_seconds"} if any(r["hidden_seconds"] for r in rows) else {})
    columns = [column(name, [r[k] for r in rows], SECONDS, 2) for name, k in times.items()]
    table(
        f"Communication of {what}{', counted beside predicted' * predicted} (wire: of a rank, on a ring)",
        ("verb", "axis", "phase", "calls", *kinds, *(heading for heading, _ in columns)),
        [
            (
                *(r[k] for k in ("verb", "axis", "phase", "calls")),
                *("-" if r[k] is None else f"{r[k]:,.0f}" for k in kinds.values()),
                *(cells[n] for _, cells in columns),
            )
            for n, r in enumerate(rows)
        ],
        keys=3,
    )


# What a rank holds, as commands name it in JSON (..._bytes_per_rank) and to people.
MEMORY = {
    "weights": "weights",
    "predicted_weights": "predicted",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "gathered": "gathered at most",
    "predicted_gathered": "predicted",
    "unsummed": "not yet summed",
    "predicted_unsummed": "predicted",
    "saved": "saved for backward",
    "predicted_saved": "predicted",
    "peak": "most held at once, by the system's count",
}


def memory(counted: dict[str, list[int]]) -> None:
    kinds = [kind for kind in MEMORY if f"{kind}_bytes_per_rank" in counted]
    by_rank = list(zip(*(counted[f"{kind}_bytes_per_rank"] for kind in kinds), strict=True))
    alike = runs(by_rank)
    columns = [column(MEMORY[kind], [by_rank[r[0]][n] for r in alike], BYTES) for n, kind in enumerate(kinds)]
    predicted = any(kind.startswith("predicted") for kind in kinds)
    table(
        f"Memory by rank{', counted beside predicted' * predicted}",
        ("rank", *(heading for heading, _ in columns)),
        [(said(ranks), *(cells[n] for _, cells in columns)) for n, ranks in enumerate(alike)],
    )


def load(by_layer: dict[str, list[int]], when: str) -> None:
    """How many tokens chose each expert."""
    table(
        f"Tokens of an expert, {when}",
        ("layer", "mean", "least", "most", "most over mean"),
        [
            (layer, f"{sum(n) / len(n):,.1f}", min(n), max(n), f"{max(n) * len(n) / sum(n):.2f}")
            for layer, n in by_layer.items()
        ],
    )


def runs(by_rank: Sequence[object]) -> list[range]:
    """The ranks, those together that follow one another and have the same."""
    starts = [rank for rank, it in enumerate(by_rank) if rank == 0 or it != by_rank[rank - 1]]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(by_rank)], strict=True)]


def said(ranks: range) -> str:
    """Ranks as a row is headed by them: 3, or 4 and 5, each, or 4 to 15, each."""
    if len(ranks) == 1:
        return f"{ranks[0]}"
    return f"{ranks[0]} {'and' if len(ranks) == 2 else 'to'} {ranks[-1]}, each"


def seconds(medians: dict[str, float], repeats: int, ranks: int, of: str = "") -> None:
    """`of`: what was run, where that is not what the report is about."""
    rows = {f"sharded over {ranks} rank{'s' if ranks > 1 else ''}": "sharded", "its matrix products alone": "matmul_only"}
    rows["unsharded, one process"] = "unsharded"
    heading, cells = column("", [medians[k] for k in rows.values()], SECONDS, 2)
    table(
        f"Time of forward and backward{of}, median of {repeats}",
        ("", heading, "of the products"),
        [(row, cell, f"{medians[k] / medians['matmul_only']:.2f}") for (row, k), cell in zip(rows.items(), cells, strict=True)],
    )
