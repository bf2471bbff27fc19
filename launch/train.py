"""Train a language model on text, on any mesh; take it up again on another mesh.

T tokens   D model width   S sequence length   V vocabulary: the 256 bytes
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from math import log, prod
from pathlib import Path
from typing import TYPE_CHECKING

from mpi4py import MPI

from launch import pretrained, report
from launch.measure import products
from launch.measure.training import Run, Task
from launch.options import (
    AUTO,
    COMMON,
    UsageError,
    add_mesh_or_auto,
    add_replicas,
    add_zero,
    amount,
    layers,
    natural,
    only_with,
    parser,
    positive,
    settled,
)
from launch.process.memory import available, lacking
from launch.terminal import progress, targets
from launch.terminal.lines import width
from launch.terminal.printable import printable
from layers.context import KINDS
from layers.pieces import LAYOUTS
from models.build import build
from models.config import Config, Experts, gpt2_like, llama_like
from models.source import Source
from models.stage import by_hand, dealt
from models.tokenizer import Tokenizer
from parallel import schedules
from parallel.checkpoint import CheckpointError, latest
from parallel.ledger import agrees, merged
from parallel.schedule import Plan
from parallel.shard import AXES
from plan.dry import DryAxis, dry_weights
from training import text
from training.trainer import NotFinite

if TYPE_CHECKING:
    from launch.planning.auto import Choice

# What a pretrained model has settled.
OF_ITS_OWN = ("--family", "--d-model", "--heads", "--kv-heads", "--d-ff", "--experts", "--tied")


def options() -> argparse.ArgumentParser:
    p = parser(
        "train",
        "Train a language model on any mesh of pp, dp, ep, cp and tp: one of bytes from scratch, or a pretrained one further.",
        (
            "mpirun -n 4 python -m launch.train --mesh dp=2,tp=2",
            "mpirun -n 4 python -m launch.train --mesh auto",
            "mpirun -n 4 python -m launch.train --mesh pp=4 --layers 4 --micro-batches 8",
            "mpirun -n 4 python -m launch.train --checkpoint kept --save-every 100",
            "mpirun -n 2 python -m launch.train --checkpoint kept --resume",
            "mpirun -n 2 python -m launch.train --model PATH --text FILE --lr 1e-4",
        ),
    )
    add_mesh_or_auto(p)
    p.add_argument("--text", metavar="FILE", help="what to learn from (default: the documentation that comes with Python)")
    _add_model(p)
    t = p.add_argument_group("training")
    t.add_argument("--sequence-length", type=positive, default=128, help="S, tokens of a sequence")
    t.add_argument("--batch-tokens", type=positive, default=2048, help="of a step, over all ranks; a multiple of S")
    t.add_argument("--micro-batches", type=positive, default=1, help="parts in which a rank takes its share of a batch")
    t.add_argument("--schedule", choices=schedules.SCHEDULES, default="1f1b", help="order of the stages' work along pp")
    t.add_argument("--chunks", type=positive, help="stages a rank of pp (default: the schedule's own), for interleaved")
    t.add_argument("--context", choices=KINDS, default="ring", help="how tokens that are cut over cp attend to one another")
    t.add_argument("--layout", choices=LAYOUTS, default="zigzag", help="which tokens of a sequence each rank of cp has")
    t.add_argument(
        "--balance",
        choices=("none", "loss", "bias"),
        default="none",
        help="against experts that are chosen unevenly: a loss for each sequence, or a bias that is moved after each step",
    )
    t.add_argument("--steps", type=positive, default=1000, help="of the optimizer")
    t.add_argument("--lr", type=amount, default=2e-3, help="the largest learning rate, after warm-up")
    t.add_argument("--warmup", type=natural, default=50, help="steps of rising learning rate")
    t.add_argument("--clip", type=amount, default=1.0, help="largest norm of a step's gradient, 0 for any")
    t.add_argument("--weight-decay", type=amount, default=0.1, help="of matrices and tables")
    add_zero(t, "dp, ep and cp", named=True)
    t.add_argument("--recompute", action="store_true", help="keep only the inputs of blocks for backward")
    t.add_argument("--sequence-parallel", action="store_true", help="cut the tokens over tp between the products")
    t.add_argument("--overlap", choices=("on", "off"), default="on", help="send gradients while backward goes on")
    t.add_argument("--bucket-mib", type=amount, default=4.0, help="MiB of gradients sent at once")
    add_replicas(t, "steps")
    _add_kept(p)
    only_with(p, "--save-every", "--resume", checkpoint=True)
    only_with(p, "--zero-over", zero=True)
    only_with(p, "--active", "--shared", experts=True)
    only_with(p, "--balance", experts=True, model=True)
    only_with(p, *OF_ITS_OWN, model=False)
    return p


def _add_model(p: argparse.ArgumentParser) -> None:
    m = p.add_argument_group("model")
    m.add_argument("--family", choices=("llama", "gpt2"), default="llama", help="what it is like")
    m.add_argument("--model", metavar="PATH", type=Path, help="begin from this pretrained model, with its own tokenizer")
    m.add_argument("--layers", type=layers, help="blocks; or of each stage, as in 3,3,2,0 (default: 3; a --model's)")
    m.add_argument("--d-model", type=positive, default=128, help="D")
    m.add_argument("--heads", type=positive, default=4, help="query heads, a divisor of D")
    m.add_argument("--kv-heads", type=positive, help="key/value heads, a divisor of the heads (default: all of them)")
    m.add_argument("--d-ff", type=positive, help="hidden width of the MLPs (default: 4 D; 8/3 D where gated)")
    m.add_argument("--experts", type=natural, default=0, help="routed MLPs in each block; 0: one MLP for all tokens")
    m.add_argument("--active", type=positive, default=2, help="experts that serve a token")
    m.add_argument("--shared", type=natural, default=0, help="experts that serve every token")
    m.add_argument("--tied", action="store_true", help="one table for embedding and output")


def _add_kept(p: argparse.ArgumentParser) -> None:
    k = p.add_argument_group("what is kept")
    k.add_argument("--checkpoint", metavar="DIR", type=targets.FolderOfAll, help="where to save")
    k.add_argument("--save-every", type=natural, default=0, help="steps between checkpoints; 0: only the last")
    k.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, on whatever mesh")
    k.add_argument("--output", metavar="DIR", type=targets.PictureFolder, default="out", help="where loss.csv and loss.png go")
    k.add_argument("--sample", type=natural, default=300, help="tokens of text to write at the end")


def check(args: argparse.Namespace, ranks: int) -> Task | Choice:
    """What is trained, or with --mesh auto what is to be chosen from."""
    # Read once, whatever the mesh.
    on = partial(_on, args, cache(partial(_text, args)))
    if args.mesh != AUTO:
        return on(settled(args.mesh, ranks, along=AXES))
    # Only this needs the planner.
    from launch.planning import auto

    return auto.choice(args, ranks, on)


def _on(args: argparse.Namespace, read: Callable[[], tuple[Tokenizer | None, text.Text]], axes: dict[str, int]) -> Task:
    """On this mesh."""
    config, source = _pretrained(args, axes) if args.model else (_from_scratch(args, axes), None)
    _check_batch(args, axes, config)
    tokenizer, data = read()
    pretrained.check_ids(data.train, config, args.sequence_length)
    if args.checkpoint is not None:
        _check_folder(args.checkpoint, args.resume)
    plan, blocks = _stages(args, axes.get("pp", 1), config.layers)
    _check_memory(config, args, axes)
    return Task(axes, config, plan, blocks, data, source, tokenizer)


def _text(args: argparse.Namespace) -> tuple[Tokenizer | None, text.Text]:
    """How text is spelled in tokens, None for bytes; and the text."""
    tokenizer = pretrained.tokenizer(pretrained.opened(args.model, 1, 1)) if args.model else None
    if args.model and tokenizer is None:
        raise UsageError(f"--model {args.model} has no tokenizer that can be used, and text has no tokens without one")
    try:
        return tokenizer, text.read(args.text, args.sequence_length, None if tokenizer is None else tokenizer.encode)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _pretrained(args: argparse.Namespace, axes: dict[str, int]) -> tuple[Config, Source]:
    source = pretrained.opened(args.model, axes["tp"], axes.get("ep", 1))
    c, window = source.config, max(source.config.windows, default=0)
    if args.balance != "none" and c.experts is None:
        raise UsageError(f"--balance {args.balance} is for experts, which {args.model} has not: leave it out")
    if args.balance == "bias" and not c.experts.correction:
        raise UsageError(f"--balance bias moves a bias that {args.model} has not: use --balance loss")
    if axes.get("cp", 1) > 1 and args.context == "ring" and window:
        raise UsageError(f"cannot attend within the model's window of {window} by the ring: use --context ulysses or gather")
    return c, source


def _from_scratch(args: argparse.Namespace, axes: dict[str, int]) -> Config:
    D, H = args.d_model, args.heads
    kv_heads = args.kv_heads or H
    gated = args.family == "llama"
    d_ff = args.d_ff or (max(1, 8 * D // 3 // 32 * 32) if gated else 4 * D)
    if D % H:
        raise UsageError(f"--heads {H} does not divide --d-model {D}: use a divisor of {D}")
    if H % kv_heads:
        raise UsageError(f"--kv-heads {kv_heads} does not divide --heads {H}: use a divisor of {H}")
    if gated and D // H % 2:
        raise UsageError(f"heads of odd width {D // H} cannot be rotated: use --d-model {2 * D} or --family gpt2")
    if not gated and kv_heads != H:
        raise UsageError(f"--family gpt2 has as many kv-heads as heads, not {kv_heads}: leave --kv-heads out")
    tp = axes["tp"]
    for name, most in (("heads", H), ("d-ff", d_ff)):
        if tp > most:
            raise UsageError(f"cannot cut --{name} {most} over tp={tp}: use at most tp={most}")
    layers = sum(args.layers or (3,))
    sizes = (text.VOCABULARY, D, layers, H, *([kv_heads] if gated else []), d_ff, args.sequence_length, args.tied)
    config = (llama_like if gated else gpt2_like)(*sizes)
    return replace(config, experts=_experts(args, d_ff, axes.get("ep", 1))) if args.experts else config


def _check_batch(args: argparse.Namespace, axes: dict[str, int], config: Config) -> None:
    """Refuse sequences that the ranks cannot share out."""
    dp, tp, H = axes["dp"], axes["tp"], config.heads
    if args.context == "ulysses" and axes.get("cp", 1) > H // tp:
        raise UsageError(f"cannot cut {H // tp} heads of a rank over cp={axes['cp']}: use --context ring")
    S, batch = args.sequence_length, args.batch_tokens
    if config.context < S:
        raise UsageError(f"--sequence-length {S} is beyond the model's context: use at most {config.context}")
    if batch % S:
        raise UsageError(f"--batch-tokens {batch} is not a multiple of --sequence-length {S}: use {max(1, batch // S) * S}")
    ranks = dp * axes.get("ep", 1)
    if batch // S < ranks * args.micro_batches:
        along = f"dp={dp}" if ranks == dp else f"dp={dp} times ep={axes['ep']}"
        raise UsageError(
            f"cannot deal {batch // S} sequences to {along} ranks in {args.micro_batches} micro-batches: "
            f"use --batch-tokens {S * ranks * args.micro_batches} or more"
        )


def _experts(args: argparse.Namespace, d_ff: int, ep: int) -> Experts:
    if args.family != "llama":
        raise UsageError(f"--family {args.family} has no experts: leave --experts out, or use --family llama")
    if args.active > args.experts:
        raise UsageError(f"cannot choose --active {args.active} of --experts {args.experts}: use at most {args.experts}")
    if ep > args.experts:
        raise UsageError(f"cannot cut {args.experts} experts over ep={ep}: use at most ep={args.experts}")
    bias = args.balance == "bias"
    how = {"scoring": "sigmoid" if bias else "softmax", "correction": bias}
    return Experts(args.experts, args.active, d_ff, args.shared * d_ff, **how)


def _stages(args: argparse.Namespace, pp: int, layers: int) -> tuple[Plan, list[range]]:
    """The plan of a step, and the blocks of each of its stages, `layers` together."""
    counts = args.layers or (layers,)
    if sum(counts) != layers:
        raise UsageError(f"--layers {','.join(map(str, counts))}: {args.model} has {layers} layers: use counts of that sum")
    try:
        plan = schedules.plan(args.schedule, pp, args.micro_batches, args.chunks)
        blocks = by_hand(counts) if len(counts) > 1 else dealt(layers, plan.stages)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if len(blocks) != plan.stages:
        said = ",".join(map(str, counts))
        raise UsageError(
            f"--layers {said} is for {len(blocks)} stages, {args.schedule} on pp={pp} has {plan.stages}: give so many"
        )
    return plan, blocks


def _check_memory(config: Config, args: argparse.Namespace, axes: dict[str, int]) -> None:
    weights = sum(p.data.nbytes for p in build(config, DryAxis("tp", axes["tp"]), dry_weights(args.dtype)).parameters)
    # On a rank of pp, on average; as many gradients, and twice as much of the optimizer's state.
    weights //= axes.get("pp", 1)
    split = prod(axes.get(name, 1) for name in args.zero_over)
    arrays = [weights // (split if args.zero >= stage else 1) for stage in (3, 2, 1, 1)]
    if why := lacking(sum(arrays), prod(axes.values()), available()):
        raise UsageError(f"the model, its gradients and the optimizer's state take {why}: use smaller sizes")


def _check_folder(folder: Path, resume: bool) -> None:
    newest = latest(folder) if folder.is_dir() else None
    if resume and newest is None:
        raise UsageError(f"--checkpoint {folder} holds no checkpoint to resume: leave --resume out to start one")
    if not resume and newest is not None:
        raise UsageError(f"--checkpoint {folder} holds {newest.name}: use --resume, or another folder")


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task | Choice) -> int:
    chosen = None
    if args.mesh == AUTO:
        task, chosen = task.made(args, comm)
    rate = products.rate(comm, args.dtype)
    run = Run(args, task, comm)
    try:
        if args.resume:
            run.resume()
        begun_at = len(run.losses)
        seconds = run.steps()
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    except NotFinite as error:
        return report.failed(args.json, report.header("train", args, run.mesh), str(error)) if comm.rank == 0 else 1
    bits = task.text.per_byte * run.validation.bits(progress.items("validation", comm.rank == 0))
    sample = run.sample.text(progress.items("sample", comm.rank == 0))
    steps = len(run.losses) - begun_at
    rows = run.mesh.ledger.report(run.predicted(steps))
    memory, sent, loads = zip(*run.control.everyone((run.trainer.memory(run.shapes), rows, run.load())), strict=True)
    load = {layer: counts for _, layer, counts in sorted((len(name), name, n) for of in loads for name, n in of.items())}
    if comm.rank:
        return 0
    wrong = report.of_ranks("communication", map(agrees, sent))
    wrong += report.of_ranks("memory", [report.as_predicted(m) or not steps for m in memory])
    tokens = steps * args.batch_tokens
    whole = build(task.config, DryAxis("tp", 1), dry_weights(args.dtype))
    flops = whole.flops(args.sequence_length) * tokens
    files, unwritten = run.written(bits, load)
    elsewhere = (*COMMON, "mesh", "checkpoint", "output")
    result = report.header("train", args, run.mesh) | {
        "config": {k: v for k, v in run.settled.items() if k not in elsewhere},
        "parameters": sum(prod(p.layout.shape) for p in whole.parameters),
        "first_step": begun_at + 1,
        "loss": run.losses[begun_at:],
        "validation_bits_per_byte": bits,
        "tokens_per_second": tokens / seconds if steps else None,
        "seconds": seconds,
        "model_flops_per_second": flops / seconds if steps else None,
        "matmul_flops_per_second": rate,
        "utilisation": flops / seconds / rate if steps else None,
        "communication": merged(sent),
        "memory": report.by_rank(memory),
        **({"tokens_per_expert": load, "balance_loss": run.trainer.balance} if load else {}),
        **({} if chosen is None else {"chosen": chosen}),
        "files": files,
        "sample": sample,
    }
    a_byte = [task.text.per_byte * loss for loss in run.losses]
    return report.publish(args.json, result, lambda: show(result, a_byte), wrong, unwritten=unwritten)


def show(result: dict, losses: list[float]) -> None:
    """The report for people. `losses`: in nats a byte, of all steps, those before this start of the run among them."""
    axes, c = ", ".join(f"{name}={n}" for name, n in result["mesh"].items()), result["config"]
    report.say(
        f"{c['family']}-like model of {result['parameters']:,} parameters on {axes}: {c['layers']} layers, D {c['d_model']}, "
        f"{c['heads']} heads, F {c['d_ff']}, sequences of {c['sequence_length']}; {c['batch_tokens']} tokens a step, "
        f"{result['dtype']}, seed {result['seed']}",
        "",
    )
    rows = sorted({1, *(len(losses) * n // 8 for n in range(1, 9))} - {0})
    report.table("Loss", ("step", "nats a byte", "bits a byte"),
                 [(n, f"{losses[n - 1]:.4f}", f"{losses[n - 1] / log(2):.4f}") for n in rows])  # fmt: skip
    report.communication(result["communication"], f"{len(result['loss'])} steps, validation and sample on rank 0")
    report.memory(result["memory"])
    report.say(f"validation: {result['validation_bits_per_byte']:.4f} bits a byte, over the last tenth of the text")
    if result["loss"]:
        report.say(
            f"{result['tokens_per_second']:,.0f} tokens/s; {result['model_flops_per_second'] / 1e9:.1f} of "
            f"{result['matmul_flops_per_second'] / 1e9:.1f} Gflop/s that matrix products alone reach here: "
            f"{result['utilisation']:.0%}"
        )
    if "tokens_per_expert" in result:
        report.load(result["tokens_per_expert"], "of the last step")
    if result["files"]:
        report.say(f"curve: {', '.join(result['files'])}")
    if result["sample"]:
        wrap = partial(textwrap.wrap, width=width() - 4, replace_whitespace=False, drop_whitespace=False)
        lines = [part for line in printable(result["sample"]).splitlines() for part in wrap(line) or [""]]
        print("", "A sample, after 'The ':", *(f"  | {line}" for line in lines), "", sep="\n")


if __name__ == "__main__":
    start.run(options(), check, main)
