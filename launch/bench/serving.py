"""`launch.bench serving`: static against continuous batches, a batch of 8 against one request, and Transformers beside them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

from mpi4py import MPI
from threadpoolctl import threadpool_limits

from inference import workload
from inference.blocks import needed
from inference.engine import Engine
from inference.policies import POLICIES
from inference.workload import Workload
from launch import pretrained, report, start
from launch.measure.serving import Served, serve
from launch.options import UsageError
from layers.transformer import Transformer
from models.build import build
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


def check(args: argparse.Namespace, ranks: int) -> None:
    """Opens the model. Raises UsageError where it cannot be used, or not with this workload."""
    args.source = pretrained.opened(args.model, ranks)
    if args.tokens < 2:
        raise UsageError(f"--tokens {args.tokens} leaves nothing to decode: use 2 or more")
    args.load = workload.drawn(64, (8, 64), min(255, args.source.config.vocabulary - 1), args.seed)
    longest = max(map(len, args.load.prompts)) + max(args.tokens, *args.load.max_tokens)
    if longest > args.source.config.context:
        raise UsageError(
            f"--tokens {args.tokens}: {longest} tokens with the prompt are beyond the model's context of "
            f"{args.source.config.context}: use at most {args.source.config.context - max(map(len, args.load.prompts))}"
        )


def run(model: Transformer, mesh: Mesh, control: Control, load: Workload, policy: str, slots: int) -> Served:
    """A workload that is there at once, through an engine of its own with blocks for all slots; what rank 0 saw."""
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


def measure(args: argparse.Namespace, comm: MPI.Intracomm, in_turn: Callable, ratio: Callable) -> dict:
    """Output tokens a second by round, each in turn: of the whole workload, by policy and by the peer's ways; of decode steps,
    with 8 requests and with one, `args.tokens` tokens each. Ratios are medians of those of the same round."""
    control = Control(comm)
    mesh = start.make_mesh(args, comm, tp=comm.size)
    rates: dict[str, list[float]] = {}
    tokens: dict[str, list[list[int]]] = {}
    missing: dict[str, str] = {}
    few = Workload(args.load.prompts[:WARM], [WARM] * WARM)
    with threadpool_limits(args.threads, user_api="blas"):
        model = build(args.source.config, mesh.tp, args.source.weights(args.dtype))
        ways: dict[str, Callable] = {}
        if args.peer and comm.rank == 0:
            from launch.bench.torch_serving import Peer

            peer = Peer(args.source, args.dtype, args.threads * comm.size)
            ways, missing = peer.ways(few, SLOTS, MAX_BATCH_TOKENS)
        names = control.from_first([*OWN, *ways, *DECODES])
        rounds = range(args.rounds + 1)
        for name in report.progress("serving", comm.rank == 0, len(rounds) * len(names))(n for _ in rounds for n in names):
            # Asleep: while rank 0 measures the peer with all cores, the others must not poll.
            control.wait()
            warm = len(rates.setdefault(name, [])) == 0
            if name in ways:
                seconds, tokens[name] = ways[name](few if warm else args.load)
                rates[name].append(sum(map(len, tokens[name])) / seconds)
            elif name in DECODES:
                many = DECODES[name]
                load = Workload(args.load.prompts[:many], [WARM if warm else args.tokens] * many)
                served = run(model, mesh, control, load, "continuous", many)
                rates[name].append(decode_rate(served) if comm.rank == 0 else 0.0)
            elif name in OWN:
                served = run(model, mesh, control, few if warm else args.load, *OWN[name])
                tokens[name] = served.tokens
                rates[name].append(served.output_tokens / served.seconds if comm.rank == 0 else 0.0)
            else:
                rates[name].append(0.0)
        control.wait()
    if comm.rank:
        return {}
    turns = {name: r[1:] for name, r in rates.items()}
    ratios = {"continuous_to_static": ratio(turns["continuous"], turns["static"])}
    ratios["batch_8_to_batch_1"] = ratio(turns["batch_8"], turns["batch_1"])
    ratios |= {f"continuous_to_{name}": ratio(turns["continuous"], turns[name]) for name in ways}
    same = {name: sum(a == b for a, b in zip(got, tokens["continuous"], strict=True)) for name, got in tokens.items()}
    for name, count in same.items():
        # In float32 some differ at a tie; a ratio between two that compute different things would mean nothing.
        assert 2 * count > len(args.load.prompts), f"{LABELS[name]}: only {count} requests got the same tokens"
    return {
        "model": str(args.source.path),
        "load": {"requests": len(args.load.prompts), "slots": SLOTS, "max_batch_tokens": MAX_BATCH_TOKENS}
        | {"input_tokens": sum(map(len, args.load.prompts)), "output_tokens": sum(args.load.max_tokens)},
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
    print(f"continuous batches give {r['continuous_to_static']:.2f} times the tokens/s of static ones")
    print(
        f"decoding 8 requests at once gives {r['batch_8_to_batch_1']:.2f} times the tokens/s of one ({c['tokens']} tokens each)"
    )
    for name in rates:
        if name.startswith("torch"):
            print(f"rankwise is {r[f'continuous_to_{name}']:.2f} times as fast as {LABELS[name]}, on the same cores")
    for name, why in result["peer_did_not_run"].items():
        print(f"{LABELS[name]} did not run: {why}")
