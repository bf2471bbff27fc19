"""Score tokens with a pretrained model: loss, perplexity, bits a byte; on request all logits and every gradient, as files."""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Iterator
from math import exp, isfinite, log
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import pretrained, report
from launch.options import UsageError, axis_sizes, parser, settled
from launch.terminal import targets
from launch.terminal.lines import counted
from models.source import Source
from models.tokenizer import Tokenizer
from parallel.control import Control
from parallel.data import Groups
from parallel.holder import Over
from parallel.ledger import Traffic, agrees, message
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.parameter import Fused, Parameter
from parallel.shard import Cut, even

BUCKET = 4 * 2**20


def options() -> argparse.ArgumentParser:
    p = parser(
        "score",
        "Score tokens with a pretrained model, and write its logits and gradients.",
        (
            'mpirun -n 2 python -m launch.score --text "Is this likely?"',
            'mpirun -n 2 python -m launch.score --text "Is it?" --gradients g.npz',
        ),
        needs="(--text TEXT | ...)",
        without=("seed",),
    )
    pretrained.add_model(p)
    p.add_argument("--mesh", type=axis_sizes, help="ranks along each axis, as in tp=2,dp=2 or ep=4 (default: all along tp)")
    what = p.add_argument_group("what to score, one of these").add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="TEXT", help="what to score, by the model's tokenizer")
    what.add_argument("--text-file", metavar="FILE", type=Path, help="the same from a file")
    what.add_argument("--tokens", type=pretrained.token_ids, help="token ids: 1,2,3")
    what.add_argument("--tokens-file", metavar="F.npy", type=Path, help="token ids, (tokens,) or (sequences, tokens)")
    pretrained.add_special(p)
    p.add_argument("--logits", metavar="OUT.npy", type=targets.File, help="write the logits (sequences, tokens, vocabulary)")
    p.add_argument(
        "--gradients",
        metavar="OUT.npz",
        type=targets.File,
        help="write the gradient of the loss for each of the model's tensors",
    )
    return p


class Task(NamedTuple):
    """Ranks along each axis, the model, and the ids of the tokens to score (B sequences, S tokens)."""

    axes: dict[str, int]
    source: Source
    tokenizer: Tokenizer | None
    ids: np.ndarray


def check(args: argparse.Namespace, ranks: int) -> Task:
    axes = settled(args.mesh, ranks, "tp", ("dp", "ep", "tp"))
    ep = axes.get("ep", 1)
    source = pretrained.opened(args.model, axes["tp"], ep)
    pretrained.check_memory(source, axes["tp"], args.dtype, ep=ep)
    tokenizer = pretrained.tokenizer(source)
    ids = pretrained.sequences(args, source, tokenizer)
    if ids.shape[1] < 2:
        raise UsageError("1 token predicts nothing that could be scored: use 2 or more")
    pretrained.check_ids(ids, source.config, ids.shape[1])
    if len(ids) < axes["dp"] * ep:
        said = f"dp={axes['dp']}" + f",ep={ep}" * (ep > 1)
        fewer = f"dp={len(ids)} or less" if ep == 1 else "fewer ranks"
        raise UsageError(f"cannot deal {counted(len(ids), 'sequence')} to {said}: use {fewer}, or more sequences")
    return Task(axes, source, tokenizer, ids)


def first_bad(nll_T: np.ndarray, logits_Tv: np.ndarray, length: int, first: int) -> tuple[bool, int, int] | None:
    """The sequence and the position of the first token, of sequences number `first` and on, whose loss is no finite number,
    led by whether this rank's own logits were finite there."""
    bad = np.flatnonzero(~np.isfinite(nll_T))
    if not bad.size:
        return None
    sequence, before = divmod(int(bad[0]), length)
    return bool(np.isfinite(logits_Tv[bad[0]]).all()), first + sequence, before + 1


class Scored:
    """A forward of this rank on its share of the sequences. `nats`: of all ranks' tokens together.

    `predicted`: what it and each further method send, by the closed forms.
    """

    def __init__(self, task: Task, mesh: Mesh, dtype: str) -> None:
        self.mesh, self.source, (B, S) = mesh, task.source, task.ids.shape
        # Ranks of both have sequences of their own.
        self.data, ep = mesh.over("dp", "ep"), mesh.ep if "ep" in mesh.sizes else None
        first = mesh.tp.rank == self.data.rank == 0
        self.model, self.load_seconds = pretrained.load(task.source, mesh.tp, dtype, first, ep, alike=False)
        model = self.model
        sequences = even(B, self.data.size, "sequences")
        # By tokens: sequences are dealt out whole.
        self.cut = Cut(B * S, tuple((a * S, e * S) for a, e in sequences.bounds))
        mine = sequences.take(task.ids, 0, self.data.rank)
        batch = model.batch([S] * len(mine))
        targets = np.concatenate([mine[:, 1:], np.full((len(mine), 1), -1)], axis=1)
        begun = perf_counter()
        with mesh.phase("forward"):
            self.logits_Tv, self.saved = model.forward(mine.reshape(-1), batch)
            nll_T, self.saved_loss = model.loss.forward(self.logits_Tv, targets.reshape(-1))
        with mesh.phase("score"):
            self.nats = self.data.all_reduce(np.array([nll_T.sum(dtype=np.float64)])).item()
            self.bad = first_bad(nll_T, self.logits_Tv, S, sequences.bounds[self.data.rank][0])
        self.seconds = perf_counter() - begun
        self.count = B * (S - 1)
        self.traffic = [*model.traffic(batch), *model.exchanged(batch)]
        self.predicted = [t for t in self.traffic if t.phase == "forward"] + [Traffic("all_reduce", self.data.name, "score", 8)]

    def logits(self) -> np.ndarray:
        """(B S, V), of all ranks."""
        tp, data, V = self.mesh.tp, self.data, self.source.config.vocabulary
        with self.mesh.phase("score"):
            mine_TV = tp.all_gather(self.logits_Tv, 1, self.model.embedding.cut)
            whole_TV = data.all_gather(mine_TV, 0, self.cut)
        for axis, rows in ((tp.name, len(mine_TV)), (data.name, len(whole_TV))):
            self.predicted.append(Traffic("all_gather", axis, "score", message((rows, V), mine_TV.itemsize)))
        return whole_TV

    def gradients(self) -> dict[str, np.ndarray]:
        """Of the mean loss, whole, by the names of our parameters."""
        model, dtype = self.model, self.logits_Tv.dtype
        # What came over ep is in the gradients of what is cut over it already.
        over: dict[Over, dict[Parameter | Fused, None]] = {Over(self.data): {}, Over(self.mesh.dp): {}}
        for p in model.filling_order:
            over[Over(self.mesh.dp if "ep" in p.layout.cuts else self.data)][p.home] = None
        sums = Groups(over, BUCKET)
        with self.mesh.phase("backward"):
            dnll_T = np.full(len(self.logits_Tv), 1 / self.count, dtype)
            model.backward(model.loss.backward(dnll_T, self.saved_loss), self.saved, sums)
            sums.finish()
            owed = Owed(self.mesh, model.parameters)
            owed.sum()
        with self.mesh.phase("score"):
            whole = {p.name: p.whole(self.mesh, p.grad) for p in model.parameters}
        self.predicted += [t for t in self.traffic if t.phase == "backward"] + sums.traffic((), {}) + owed.traffic()
        self.predicted += [t for p in model.parameters for t in gathers(p)]
        return whole


def gathers(p: Parameter) -> Iterator[Traffic]:
    """What `p.whole` sends, one axis after another."""
    shape = list(p.data.shape)
    for axis, (dim, cut) in p.layout.cuts.items():
        shape[dim] = sum(cut.sizes)
        yield Traffic("all_gather", axis, "score", message(shape, p.data.itemsize))
        shape[dim] = cut.length


def main(args: argparse.Namespace, comm: MPI.Intracomm, task: Task) -> int:
    control = Control(comm)
    mesh = start.make_mesh(args, comm, **task.axes)
    scored, unwritten = Scored(task, mesh, args.dtype), []
    if not isfinite(scored.nats):
        every = enumerate(control.everyone(scored.bad))
        bad = [(finite, rank, *where) for rank, (finite, *where) in ((rank, bad) for rank, bad in every if bad is not None)]
        _, rank, sequence, position = min(bad)
        why = f"rank {rank} has a loss that is no finite number, of the token at position {position} of sequence {sequence}"
        why += ": weights, or what is made of them, are NaN or infinite"
        return report.failed(args.json, report.header("score", args, mesh), why) if comm.rank == 0 else 1
    if args.logits is not None:
        whole_BSV = scored.logits().reshape(*task.ids.shape, -1)
        if comm.rank == 0:
            unwritten.append(targets.write(args.logits, lambda file: np.save(file, whole_BSV)))
    if args.gradients is not None:
        gradients = scored.gradients()
        if comm.rank == 0:
            exported = task.source.exported(gradients)
            unwritten.append(targets.write(args.gradients, lambda file: np.savez(file, **exported)))
    rows = mesh.ledger.report(scored.predicted)
    sent, memory = zip(*control.everyone((agrees(rows), pretrained.held(scored.model))), strict=True)
    if comm.rank:
        return 0
    loss = scored.nats / scored.count
    data = 0 if task.tokenizer is None else sum(len(task.tokenizer.decode(row[1:].tolist()).encode()) for row in task.ids)
    result = report.header("score", args, mesh) | {
        "model": str(task.source.path),
        "family": task.source.family,
        "notes": task.source.notes,
        "sequences": len(task.ids),
        "tokens": task.ids.shape[1],
        "loss": loss,
        "perplexity": exp(loss) if loss < 700 else None,
        "bits_per_byte": scored.nats / log(2) / data if data else None,
        "load_seconds": scored.load_seconds,
        "seconds": scored.seconds,
        "communication": rows,
        "memory": report.by_rank(memory),
    }
    wrong = report.of_ranks("communication", sent)
    return report.publish(args.json, result, lambda: show(result), wrong, unwritten=unwritten)


def show(result: dict) -> None:
    """The report for people."""
    axes = ", ".join(f"{name}={n}" for name, n in result["mesh"].items())
    report.say(
        f"{result['family']} model {result['model']} on {axes}, {result['dtype']}: {result['sequences']} sequence(s) of "
        f"{result['tokens']} tokens",
        "",
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
