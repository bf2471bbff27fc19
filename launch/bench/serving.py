"""`launch.bench serving`: static against continuous batches, a batch of 8 against one request, and Transformers beside them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

from mpi4py import MPI
from threadpoolctl import threadpool_limits

from inference import workload
from inference.blocks import needed
from inference.engine import Engine
from inference.policies import POLICIES
from inference.workload import Workload
from launch import pretrained, report
from launch.bench.sizes import Sizes
from launch.bench.turns import ratio
from launch.measure.serving import Served, serve
from launch.options import UsageError
from launch.terminal import progress
from layers.transformer import Transformer
from models.source import Source
from parallel.control import Control
from parallel.mesh import Mesh

SLOTS, MAX_BATCH_TOKENS = 8, 512
# Requests and tokens of the round that warms up.
WARM = 4
OWN = {"static": ("static", SLOTS), "continuous": ("continuous", SLOTS)}
DECODES = {"batch_8": SLOTS, "batch_1": 1}
LABELS = {
    "static": "static batches",
    "continuous": "continuous batches",
    "torch_continuous": "Transformers, continuous batching",
    "torch_padded": "Transformers, generate, padded batches",
    "batch_8": "decoding 8 requests",
    "batch_1": "decoding 1 request",
}


def check(args: argparse.Namespace, sizes: Sizes, ranks: int) -> tuple[Source, Workload]:
    """The model and the workload. Raises UsageError where it cannot be used, or not with this workload."""
    source, tokens = pretrained.opened(args.model, ranks), sizes.tokens
    if tokens < 2:
        raise UsageError(f"--tokens {tokens} leaves nothing to decode: use 2 or more")
    load = workload.drawn(64, (8, 64), min(255, source.config.vocabulary - 1), args.seed)
    longest, context = max(map(len, load.prompts)), source.config.context
    if longest + max(tokens, *load.max_tokens) > context:
        raise UsageError(
            f"--tokens {tokens}: {longest + max(tokens, *load.max_tokens)} tokens with the prompt are beyond the model's "
            f"context of {context}: use at most {context - longest}"
        )
    return source, load


def run(model: Transformer, mesh: Mesh, control: Control, load: Workload, policy: str, slots: int) -> Served:
    """A workload that is all there at once, through an engine of its own with blocks for all slots: what rank 0 saw."""
    longest = max(len(p) + m for p, m in zip(*load, strict=True))
    scheduler = POLICIES[policy](slots * (needed(longest) + 1), slots=slots, max_batch_tokens=MAX_BATCH_TOKENS)
    engine, served = Engine(model, mesh, control, scheduler), Served([0.0] * len(load.prompts))
    if control.rank:
        engine.follow()
    else:
        for _ in serve(engine, load, served):
            pass
        engine.stop()
    return served


def decode_rate(served: Served) -> float:
    """Tokens a second of the steps in which no prompt was run."""
    steps = zip(served.columns, served.step_tokens, served.step_seconds, strict=True)
    decodes = [(n, s) for column, n, s in steps if not any(r.prefill for r in column.step.runs)]
    return sum(n for n, _ in decodes) / sum(s for _, s in decodes)


def in_turn(
    ways: dict[str, Callable[[bool], float]], names: list[str], rounds: int, control: Control
) -> dict[str, list[float]]:
    """What each way returns, by round. It is called with True to warm up, before that. The peer's ways run on rank 0 alone."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    turns = (name for _ in range(rounds + 1) for name in names)
    for name in progress.items("serving", control.rank == 0, (rounds + 1) * len(names))(turns):
        # Asleep: while rank 0 measures the peer with all cores, the others must not poll.
        control.wait(patient=True)
        rates[name].append(ways[name](not rates[name]) if name in ways else 0.0)
    control.wait(patient=True)
    return {name: r[1:] for name, r in rates.items()}


def measure(args: argparse.Namespace, sizes: Sizes, opened: tuple, comm: MPI.Intracomm, mesh: Mesh) -> dict:
    """Output tokens a second by round, each in turn: of the whole workload, by policy and by the peer's ways; of decode steps,
    with 8 requests and with one, `sizes.tokens` tokens each. Ratios are medians of those of the same round."""
    (source, load), control = opened, Control(comm)
    few = Workload(load.prompts[:WARM], [WARM] * WARM)
    tokens: dict[str, list[list[int]]] = {}
    missing: dict[str, str] = {}

    def whole(name: str, warm: bool) -> float:
        served = run(model, mesh, control, few if warm else load, *OWN[name])
        tokens[name] = served.tokens
        return 0.0 if control.rank else served.output_tokens / served.seconds

    def decoding(many: int, warm: bool) -> float:
        some = Workload(load.prompts[:many], [WARM if warm else sizes.tokens] * many)
        served = run(model, mesh, control, some, "continuous", many)
        return 0.0 if control.rank else decode_rate(served)

    def by_peer(name: str, warm: bool) -> float:
        seconds, tokens[name] = theirs[name](few if warm else load)
        return sum(map(len, tokens[name])) / seconds

    with threadpool_limits(args.threads, user_api="blas"):
        model, _ = pretrained.load(source, mesh.tp, args.dtype, comm.rank == 0)
        theirs: dict[str, Callable] = {}
        if args.peer and comm.rank == 0:
            from launch.bench.torch_serving import Peer

            theirs, missing = Peer(source, args.dtype, args.threads * comm.size).ways(few, SLOTS, MAX_BATCH_TOKENS)
        ways = {name: partial(whole, name) for name in OWN} | {name: partial(by_peer, name) for name in theirs}
        ways |= {name: partial(decoding, many) for name, many in DECODES.items()}
        turns = in_turn(ways, control.from_first(list(ways)), sizes.rounds, control)
    if comm.rank:
        return {}
    ratios = {"continuous_to_static": ratio(turns["continuous"], turns["static"])}
    ratios["batch_8_to_batch_1"] = ratio(turns["batch_8"], turns["batch_1"])
    ratios |= {f"continuous_to_{name}": ratio(turns["continuous"], turns[name]) for name in theirs}
    same = {name: sum(a == b for a, b in zip(got, tokens["continuous"], strict=True)) for name, got in tokens.items()}
    for name, count in same.items():
        # In float32 some differ at a tie; a ratio between two that compute different things would mean nothing.
        assert 2 * count > len(load.prompts), f"{LABELS[name]}: only {count} requests got the same tokens"
    return {
        "model": str(source.path),
        "load": {"requests": len(load.prompts), "slots": SLOTS, "max_batch_tokens": MAX_BATCH_TOKENS}
        | {"input_tokens": sum(map(len, load.prompts)), "output_tokens": sum(load.max_tokens)},
        "tokens_per_second": {name: median(r) for name, r in turns.items()},
        "turns": turns,
        "ratios": ratios,
        "same_tokens": same,
        "peer_did_not_run": missing,
    }


def show(result: dict) -> None:
    c, load, rates = result["config"], result["load"], result["tokens_per_second"]
    report.table(
        f"Serving {result['model']}, {result['dtype']}: {load['requests']} requests, {load['input_tokens']:,} tokens in, "
        f"{load['output_tokens']:,} out, {load['slots']} slots; {result['ranks']} ranks of {c['threads']} BLAS thread(s), "
        f"{c['rounds']} rounds in turn",
        ("", "output tokens/s", "slowest", "fastest", "requests with the same tokens"),
        [
            (
                LABELS[name],
                *(f"{v:.1f}" for v in (rate, min(result["turns"][name]), max(result["turns"][name]))),
                f"{result['same_tokens'][name]} of {load['requests']}" if name in result["same_tokens"] else "",
            )
            for name, rate in rates.items()
        ],
    )
    r = result["ratios"]
    report.say(f"continuous batches give {r['continuous_to_static']:.2f} times the tokens/s of static ones")
    report.say(
        f"decoding 8 requests at once gives {r['batch_8_to_batch_1']:.2f} times the tokens/s of one ({c['tokens']} tokens each)"
    )
    for name in rates:
        if name.startswith("torch"):
            report.say(f"rankwise is {r[f'continuous_to_{name}']:.2f} times as fast as {LABELS[name]}, on the same cores")
    for name, why in result["peer_did_not_run"].items():
        report.say(f"{LABELS[name]} did not run: {why}")
