"""Score tokens with a pretrained model: loss, perplexity, bits a byte; on request all logits and every gradient, as files."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
import json
from math import exp, log, prod
from pathlib import Path
from time import perf_counter

import numpy as np
from mpi4py import MPI

from launch import pretrained, report
from launch.options import UsageError, mesh, parser, settled
from models.build import build
from parallel.control import Control
from parallel.data import Flat, GradientSums
from parallel.ledger import Traffic, agrees, message, sent_by
from parallel.shard import Cut, even

BUCKET = 4 * 2**20


def options() -> argparse.ArgumentParser:
    p = parser("score", "Score tokens with a pretrained model, and write its logits and gradients.")
    pretrained.add_model(p)
    p.add_argument("--mesh", type=mesh, help="ranks along each axis, as in tp=2,dp=2 (all along tp)")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="what to score, by the model's tokenizer")
    what.add_argument("--text-file", metavar="FILE", type=Path, help="the same from a file")
    what.add_argument("--tokens", type=pretrained.token_ids, help="token ids: 1,2,3")
    what.add_argument("--tokens-file", metavar="F.npy", type=Path, help="token ids, (tokens,) or (sequences, tokens)")
    p.add_argument("--logits", metavar="OUT.npy", type=Path, help="write the logits (sequences, tokens, vocabulary)")
    p.add_argument(
        "--gradients", metavar="OUT.npz", type=Path, help="write the gradient of the loss for each of the model's tensors"
    )
    return p


def check(args: argparse.Namespace, ranks: int) -> None:
    args.mesh = settled(args.mesh, ranks, "tp")
    args.source = pretrained.opened(args.model, args.mesh["tp"])
    args.tokenizer = pretrained.tokenizer(args.source)
    args.ids = pretrained.sequences(args)
    if args.ids.shape[1] < 2:
        raise UsageError("1 token predicts nothing that could be scored: use 2 or more")
    pretrained.check_ids(args.ids, args.source.config, args.ids.shape[1])
    if len(args.ids) < args.mesh["dp"]:
        raise UsageError(
            f"cannot deal {len(args.ids)} sequences to dp={args.mesh['dp']}: use dp={len(args.ids)} or less, or more sequences"
        )
    for out in (args.logits, args.gradients):
        if out is not None and not out.absolute().parent.is_dir():
            raise UsageError(f"cannot write {out}: there is no folder {out.absolute().parent}")


def main(args: argparse.Namespace, comm: MPI.Intracomm, opened: None) -> int:
    control = Control(comm)
    mesh = start.make_mesh(args, comm, **args.mesh)
    begun = perf_counter()
    model = build(args.source.config, mesh.tp, args.source.weights(args.dtype))
    load_seconds = perf_counter() - begun

    B, S = args.ids.shape
    sequences = even(B, mesh.dp.size, "sequences")
    mine = sequences.take(args.ids, 0, mesh.dp.rank)
    targets = np.concatenate([mine[:, 1:], np.full((len(mine), 1), -1)], axis=1)
    begun = perf_counter()
    with mesh.phase("forward"):
        logits_Tv, saved = model.forward(mine.reshape(-1), [S] * len(mine))
        nll_T, saved_loss = model.loss.forward(logits_Tv, targets.reshape(-1))
    with mesh.phase("score"):
        total = mesh.dp.all_reduce(np.array([nll_T.sum(dtype=np.float64)])).item()
    seconds = perf_counter() - begun
    loss = total / (B * (S - 1))
    predicted = [t for t in model.traffic(mine.size) if t.phase == "forward"] + [Traffic("all_reduce", "dp", "score", 8)]
    V, b = args.source.config.vocabulary, logits_Tv.itemsize
    if args.logits is not None:
        # By tokens over dp: sequences are dealt out whole.
        tokens = Cut(B * S, tuple((a * S, e * S) for a, e in sequences.bounds))
        with mesh.phase("score"):
            whole_TV = mesh.dp.all_gather(mesh.tp.all_gather(logits_Tv, 1, model.embedding.cut), 0, tokens)
        predicted += [Traffic("all_gather", "tp", "score", message((mine.size, V), b))]
        predicted += [Traffic("all_gather", "dp", "score", message((B * S, V), b))]
        if comm.rank == 0:
            pretrained.write(args.logits, lambda file: np.save(file, whole_TV.reshape(B, S, V)))
    if args.gradients is not None:
        flat = Flat(model.filling_order)
        sums = GradientSums(flat, mesh.dp, BUCKET)
        with mesh.phase("backward"):
            dnll_T = np.full(mine.size, 1 / (B * (S - 1)), logits_Tv.dtype)
            model.backward(model.loss.backward(dnll_T, saved_loss), saved, sums.filled)
            sums.finish()
        with mesh.phase("score"):
            gradients = {p.name: p.whole(mesh.tp, p.grad) for p in model.parameters}
        predicted += [t for t in model.traffic(mine.size) if t.phase == "backward"] + sums.traffic()
        predicted += [
            Traffic("all_gather", "tp", "score", message((prod(p.layout.shape) // cut.length, sum(cut.sizes)), b))
            for p in model.parameters
            if (cut := p.layout.cut) is not None
        ]
        if comm.rank == 0:
            exported = args.source.exported(gradients)
            pretrained.write(args.gradients, lambda file: np.savez(file, **exported))
    rows = mesh.ledger.report(sent_by(mesh.tp.rank, predicted))
    told = control.everyone((agrees(rows), pretrained.peak_bytes(), sum(p.data.nbytes for p in model.parameters)))
    if comm.rank:
        return 0
    wrong = [f"communication of rank {r}" for r, (ok, _, _) in enumerate(told) if not ok]
    data = None if args.tokenizer is None else sum(len(args.tokenizer.decode(row[1:].tolist()).encode()) for row in args.ids)
    result = {
        "command": "score",
        "ok": not wrong,
        "ranks": comm.size,
        "mesh": mesh.sizes,
        "dtype": args.dtype,
        "model": str(args.source.path),
        "family": args.source.family,
        "sequences": B,
        "tokens": S,
        "loss": loss,
        "perplexity": exp(loss) if loss < 700 else None,
        "bits_per_byte": None if not data else total / log(2) / data,
        "load_seconds": load_seconds,
        "seconds": seconds,
        "communication": rows,
        "memory": {
            "weights_bytes_per_rank": [weights for _, _, weights in told],
            "peak_bytes_per_rank": [peak for _, peak, _ in told],
        },
    }
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(result)
        print(f"NOT ALL AGREED: {', '.join(wrong)}" if wrong else "all agreed")
    return 1 if wrong else 0


def show(result: dict) -> None:
    """The report for people."""
    axes = ", ".join(f"{name}={n}" for name, n in result["mesh"].items())
    print(
        f"{result['family']} model {result['model']} on {axes}, {result['dtype']}: {result['sequences']} sequence(s) of "
        f"{result['tokens']} tokens\n"
    )
    rows = [("loss, nats a token", f"{result['loss']:.6f}")]
    rows += [("perplexity", f"{result['perplexity']:.4f}")] if result["perplexity"] is not None else []
    rows += [("bits a byte", f"{result['bits_per_byte']:.4f}")] if result["bits_per_byte"] is not None else []
    rows += [("seconds to load", f"{result['load_seconds']:.2f}"), ("seconds to score", f"{result['seconds']:.2f}")]
    report.table("Each token but the first, given those before it", ("", ""), rows)
    report.communication(result["communication"], "it all on rank 0")
    report.memory(result["memory"])


if __name__ == "__main__":
    start.run(options(), check, main)
