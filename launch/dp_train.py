"""Data parallelism of a small language model: gradients averaged by tokens against the reference, and weights after some steps
against the same steps on one process.

T tokens   D model width   V vocabulary
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from mpi4py import MPI

from launch import report
from launch.options import UsageError, add_replicas, amount, parser, positive
from models.build import build
from models.config import Config, gpt2_like, llama_like
from parallel.control import Control
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.replicas import Copy, Replicas
from parallel.shard import even
from reference import transformer as reference
from reference.attention import Options
from reference.compare import Comparison, compare
from reference.layer import compared
from reference.rounding import bounds
from training.text import Part
from training.trainer import Plan, Trainer

RATE, VOCABULARY = 1e-2, 61
# Comparisons use weights and biases of this spread at least.
SPREAD = 0.1


def options() -> argparse.ArgumentParser:
    p = parser("dp_train", "Train a small model data-parallel, and compare with a reference and with one process.")
    p.add_argument("--family", choices=("llama", "gpt2"), default="llama", help="what the model is like")
    p.add_argument("--layers", type=positive, default=1, help="blocks")
    p.add_argument("--d-model", type=positive, default=24, help="D")
    p.add_argument("--heads", type=positive, default=3, help="query heads, a divisor of D")
    p.add_argument("--d-ff", type=positive, default=40, help="hidden width of the MLP")
    p.add_argument("--sequences", type=positive, default=9, help="of a step, dealt out over the ranks, evenly or not")
    p.add_argument("--sequence-length", type=positive, default=12, help="tokens of the longest; the others are shorter")
    p.add_argument("--steps", type=positive, default=5, help="of AdamW")
    p.add_argument("--micro-batches", type=positive, default=1, help="parts in which a rank takes its sequences")
    p.add_argument("--zero", action="store_true", help="split the optimizer's state over the ranks (ZeRO stage 1)")
    p.add_argument("--recompute", action="store_true", help="keep only the inputs of blocks for backward")
    p.add_argument("--overlap", choices=("on", "off"), default="on", help="send gradients while backward goes on")
    p.add_argument("--bucket-mib", type=amount, default=0.01, help="MiB of gradients sent at once")
    add_replicas(p, "steps")
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    if args.d_model % args.heads:
        raise UsageError(f"--heads {args.heads} does not divide --d-model {args.d_model}: use a divisor of {args.d_model}")
    if args.family == "llama" and args.d_model // args.heads % 2:
        raise UsageError(f"heads of odd width {args.d_model // args.heads} cannot be rotated: use --family gpt2")
    least = ranks * args.micro_batches
    if args.sequences < least:
        raise UsageError(
            f"cannot deal --sequences {args.sequences} to {ranks} ranks in {args.micro_batches} micro-batches: "
            f"use {least} or more"
        )


def model_config(args: argparse.Namespace) -> Config:
    sizes = (VOCABULARY, args.d_model, args.layers, args.heads)
    if args.family == "gpt2":
        return gpt2_like(*sizes, args.d_ff, args.sequence_length)
    return llama_like(*sizes, args.heads, args.d_ff, args.sequence_length)


def batch(args: argparse.Namespace) -> list[Part]:
    """One part a sequence, of unequal lengths, so that the ranks' numbers of tokens differ."""
    random = np.random.default_rng(args.seed)
    lengths = [max(1, args.sequence_length - 3 * n % args.sequence_length) for n in range(args.sequences)]
    return [Part(*random.integers(0, VOCABULARY, (2, n)), [n]) for n in lengths]


def joined(parts: Sequence[Part]) -> Part:
    ids, targets = (np.concatenate(arrays) for arrays in zip(*((p.ids, p.targets) for p in parts), strict=True))
    return Part(ids, targets, [n for p in parts for n in p.lengths])


def share(parts: list[Part], ranks: int, rank: int, micro_batches: int) -> list[Part]:
    """This rank's sequences, in micro-batches."""
    first, last = even(len(parts), ranks, "sequences").bounds[rank]
    cut = even(last - first, micro_batches, "sequences")
    return [joined(parts[first + a : first + b]) for a, b in cut.bounds]


class Ran:
    """Steps of a trainer: `loss` of each, the weights before, the first step's gradients and the weights after, by name."""

    def __init__(self, args: argparse.Namespace, mesh: Mesh, control: Control, micro_batches: int) -> None:
        overlap, bucket = args.overlap == "on", max(1, int(args.bucket_mib * 2**20))
        model = build(model_config(args), mesh.tp, drawn(args.seed, args.dtype, SPREAD), args.recompute)
        self.trainer = Trainer(model, mesh, Plan(clip=1.0, zero=args.zero, overlap=overlap, bucket_bytes=bucket))
        parts = batch(args)
        self.tokens = sum(len(p.ids) for p in parts)
        self.parts = share(parts, mesh.dp.size, mesh.dp.rank, micro_batches)
        self.before = self._named("data")
        replicas = Replicas(mesh, control, args.check_replicas)
        self.loss, self.gradients, self.sizes = [], [], []
        for _ in range(args.steps):
            self.loss.append(self.trainer.gradients(self.parts, self.tokens))
            with mesh.phase("compare"):
                # With ZeRO, a rank has the sums of its part only.
                self.trainer.sums.gather(self.trainer.flat.grad)
            self.gradients.append(self._named("grad"))
            self.trainer.update(RATE)
            replicas.check(len(self.loss), lambda: [*self.trainer.copies(), Copy("the losses", self.loss)])
        self.after = self._named("data")

    def _named(self, what: str) -> dict[str, np.ndarray]:
        return {p.name: getattr(p, what).copy() for p in self.trainer.model.parameters}


def reference_loss(args: argparse.Namespace) -> Callable[[dict], complex]:
    """The reference's own loss of the whole batch, of weights by name."""
    config, whole = model_config(args), joined(batch(args))
    told = Options(whole.lengths, True, None if config.rope is None else {"pairing": "half"})
    return lambda W: reference.cross_entropy(reference.logits(W, whole.ids, told, config.eps), whole.targets)


def against_the_reference(args: argparse.Namespace, ran: Ran) -> Iterator[Comparison]:
    """The first step's loss and gradients."""
    loss = reference_loss(args)
    whole = {"y": np.array(ran.loss[0], args.dtype)} | ran.before | {f"d{n}": g for n, g in ran.gradients[0].items()}
    yield from compared([loss], lambda W, name, index: loss(W), whole, np.array(1.0), lambda name: 4)


def against_one_process(args: argparse.Namespace, ran: Ran, alone: Ran) -> Iterator[Comparison]:
    """Weights after all steps. What rounding may do to a gradient g, d, moves AdamW's step of this entry by at most 4 d / |g|
    of the rate, as it divides by the gradient's own size; and by no more than twice the rate, whatever g is."""
    before = {n: a.astype(np.float64) for n, a in ran.before.items()}
    off = bounds([reference_loss(args)], before, np.array(1.0), args.dtype)
    u = np.finfo(args.dtype).eps / 2
    for name, got in ran.after.items():
        size = np.sqrt(np.mean([g[name].astype(np.float64) ** 2 for g in alone.gradients], axis=0)) + 1e-8
        allowed = args.steps * (RATE * np.minimum(2, 4 * off[name].max() / size) + 8 * u * np.abs(got))
        yield compare(f"{name}, step {args.steps}", "step", got, alone.after[name].astype(np.float64), allowed)


def main(args: argparse.Namespace, comm: MPI.Intracomm, opened: None) -> int:
    control = Control(comm)
    mesh = start.make_mesh(args, comm, dp=comm.size, tp=1)
    ran = Ran(args, mesh, control, args.micro_batches)
    predicted = [t for t in ran.trainer.traffic(ran.parts) for _ in range(args.steps)]
    rows = [r for r in mesh.ledger.report(predicted) if r["phase"] != "compare"]
    told = control.everyone((len(joined(ran.parts).ids), agrees(rows), ran.trainer.memory(ran.parts), ran.loss, ran.after))
    first, checks = comm.rank == 0, []
    if first:
        alone = Ran(args, Mesh(MPI.COMM_SELF, dp=1, tp=1), Control(MPI.COMM_SELF), 1)
        total = 2 + 2 * len(ran.before) + len(ran.after)
        shown = report.progress("the reference, tensor by tensor", True, total)
        checks = list(shown(chain(against_the_reference(args, ran), against_one_process(args, ran, alone))))
    control.wait()
    if not first:
        return 0
    memory = [m for _, _, m, _, _ in told]
    wrong = [c.tensor for c in checks if not c.ok]
    wrong += [f"communication of rank {r}" for r, (_, ok, *_) in enumerate(told) if not ok]
    wrong += [f"memory of rank {r}" for r, m in enumerate(memory) if m["saved"] != m["predicted_saved"]]
    apart = [r for r, (*_, loss, after) in enumerate(told)
             if loss != ran.loss or any(not np.array_equal(after[n], a) for n, a in ran.after.items())]  # fmt: skip
    wrong += [f"weights of rank {r}, unlike rank 0's" for r in apart]
    result = {
        "command": "dp_train",
        "ok": True,
        "ranks": comm.size,
        "mesh": mesh.sizes,
        "dtype": args.dtype,
        "seed": args.seed,
        "config": {k: v for k, v in vars(args).items() if k not in ("json", "dtype", "seed", "trace")},
        "tokens_per_rank": [tokens for tokens, *_ in told],
        "loss": ran.loss,
        "checks": [],
        "communication": rows,
        "memory": {f"{kind}_bytes_per_rank": [m[kind] for m in memory] for kind in memory[0]},
    }
    return report.publish(args.json, result, checks, wrong, lambda: show(args, result, checks))


def show(args: argparse.Namespace, result: dict, checks: list[Comparison]) -> None:
    """The report for people."""
    print(
        f"Data parallelism on dp={result['ranks']}: a {args.family}-like model, {args.layers} layer(s), D {args.d_model}, "
        f"V {VOCABULARY}; a step's tokens by rank: {', '.join(map(str, result['tokens_per_rank']))}; {args.dtype}, "
        f"seed {args.seed}\n"
    )
    report.table("Loss, the mean over the tokens of all ranks", ("step", "nats a token"),
                 [(n + 1, f"{loss:.6f}") for n, loss in enumerate(result["loss"])])  # fmt: skip
    titles = {
        "forward": "First step: loss and averaged gradients against the reference, on the whole batch",
        "step": f"After {args.steps} steps of AdamW: weights against the same steps on one process",
    }
    report.comparisons(titles["forward"], [c for c in checks if c.phase != "step"])
    report.comparisons(titles["step"], [c for c in checks if c.phase == "step"])
    report.communication(result["communication"], f"{args.steps} steps on rank 0")
    report.memory(result["memory"])


if __name__ == "__main__":
    start.run(options(), check, main)
