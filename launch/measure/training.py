"""A training run on one rank, as launch.train makes it: what it trains, where in the text it is, what is kept of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from time import perf_counter
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import start
from launch.measure.losses import LossTable
from launch.pictures import curve
from launch.pictures import load as experts
from launch.pretrained import name_of
from launch.terminal import progress, targets
from layers.optimizer import warmup_cosine
from layers.step import Recipe
from models.config import Config
from models.piece import ModelError
from models.saved import described
from models.source import Source
from models.tokenizer import Tokenizer
from parallel.checkpoint import Checkpoint, CheckpointError, latest, save
from parallel.control import Control
from parallel.ledger import Traffic
from parallel.parameter import drawn
from parallel.replicas import Copy, Replicas
from parallel.schedule import Plan
from parallel.shard import AXES
from plan.training import Training, sequences
from training import text
from training.evaluation import Sample, Spelling, Validation
from training.trainer import NotFinite, Trainer

# What a run that is taken up again must have in common with the one that was left; the rest may change.
FIXED = ("family", "layers", "d_model", "heads", "kv_heads", "d_ff", "tied", "sequence_length", "batch_tokens", "steps", "lr")
FIXED += ("warmup", "clip", "weight_decay", "seed", "dtype")
ROUTED = ("experts", "active", "shared", "balance")
# Of the loss that balances experts (DeepSeek-V2, arXiv 2405.04434: .003), or of the bias (DeepSeek-V3, 2412.19437).
ALPHA, GAMMA = 0.003, 0.001


class Task(NamedTuple):
    """Ranks along each axis, the model, the plan of a step and the blocks of each stage; the text; the pretrained model to
    begin from, if there is one, and its tokenizer."""

    axes: dict[str, int]
    config: Config
    plan: Plan
    blocks: list[range]
    text: text.Text
    source: Source | None = None
    tokenizer: Tokenizer | None = None

    @property
    def spelling(self) -> Spelling:
        return Spelling() if self.tokenizer is None else Spelling(self.tokenizer.encode, self.tokenizer.decode)

    def training(self, args: argparse.Namespace) -> Training:
        """As the options have it."""
        bucket = max(1, int(args.bucket_mib * 2**20))
        recipe = Recipe(args.clip, args.zero, args.zero_over, args.overlap == "on", bucket, args.weight_decay, self.plan)
        rates = {"loss": {"alpha": ALPHA}, "bias": {"gamma": GAMMA}, "none": {}}[args.balance]
        recipe = replace(recipe, layout=args.layout, **rates)
        axes, count = dict.fromkeys(AXES, 1) | self.axes, args.batch_tokens // args.sequence_length
        dealt = sequences(count, args.sequence_length, axes["dp"] * axes["ep"], args.micro_batches)
        how = args.dtype, args.recompute, args.sequence_parallel, args.context
        return Training(self.config, axes, self.plan, self.blocks, dealt, recipe, *how)


class Run:
    """A training run on one rank: the trainer, where in the text it is, and the losses so far."""

    def __init__(self, args: argparse.Namespace, task: Task, comm: MPI.Intracomm) -> None:
        self.args, self.control = args, Control(comm)
        self.mesh = start.make_mesh(args, comm, **task.axes)
        training = task.training(args)
        weights = drawn(args.seed, args.dtype) if task.source is None else task.source.weights(args.dtype)
        self.trainer = Trainer(training.stages(self.mesh, weights), self.mesh, training.recipe)
        self.task, self.train, S = task, task.text.train, args.sequence_length
        self.validation = Validation(self.trainer, task.text.validation, S, args.batch_tokens // S)
        self.sample = Sample(self.trainer, S, args.sample, args.seed, task.spelling)
        self.order = text.Order(text.whole_sequences(self.train, args.sequence_length), args.seed)
        self.losses: list[float] = []
        self.table: LossTable | None = None
        self.replicas = Replicas(self.mesh, self.control, args.check_replicas)
        self.saves = 0
        # Every step has these shapes.
        chosen = np.zeros(args.batch_tokens // args.sequence_length, int)
        self.shapes = self._dealt(chosen)
        # The options, with what they left open.
        sizes = ("layers", "d_model", "heads", "kv_heads", "d_ff", "tied")
        self.settled = vars(args) | {name: getattr(task.config, name) for name in sizes}
        self.settled["layers_of_stages"] = [len(blocks) for blocks in task.blocks]
        if task.source is not None:
            self.settled |= {"family": task.source.family, "model": name_of(task.source.path)}
        self.identity = {name: self.settled[name] for name in (*FIXED, *(ROUTED if args.experts else ()))}
        if task.source is not None:
            self.identity["model"] = self.settled["model"]
        self.identity["text"] = sha256(self.train.tobytes()).hexdigest()

    def _dealt(self, chosen: np.ndarray) -> list[text.MicroBatch]:
        args, over = self.args, self.mesh.over("dp", "ep")
        return text.dealt(self.train, chosen, args.sequence_length, over.size, over.rank, args.micro_batches)

    def steps(self) -> float:
        """All steps that are left, and the checkpoints among them: seconds of the steps."""
        args, seconds = self.args, 0.0
        if self.control.rank == 0:
            self.table = LossTable(args.output / "loss.csv", args.batch_tokens, self.losses, self.task.text.per_byte)
        if not self.losses:
            self._tell_what_is_kept(0)
        with progress.steps("training", args.steps, len(self.losses), args.batch_tokens, self.control.rank == 0) as advance:
            while len(self.losses) < args.steps:
                begun = perf_counter()
                loss = self.step()
                seconds += perf_counter() - begun
                advance(loss)
                if self.table is not None:
                    self.table.add(loss)
                done = len(self.losses)
                if args.checkpoint is not None and (done == args.steps or (args.save_every and done % args.save_every == 0)):
                    self.save()
        self._require_finite()
        return seconds

    def step(self) -> float:
        args = self.args
        parts = self._dealt(self.order.next(args.batch_tokens // args.sequence_length))
        lr = warmup_cosine(len(self.losses), args.steps, args.lr, min(args.warmup, args.steps))
        try:
            # What NumPy would warn of, the trainer looks for.
            with np.errstate(over="ignore", invalid="ignore"):
                loss = self.trainer.step(parts, args.batch_tokens, lr)
        except NotFinite as error:
            raise NotFinite(f"step {len(self.losses) + 1}: {error}") from None
        self.losses.append(loss)
        self.replicas.check(len(self.losses), lambda: self.copies(parts))
        return loss

    def copies(self, parts: list[text.MicroBatch]) -> Iterator[Copy]:
        """What must be the same on several ranks after a step on these micro-batches."""
        yield Copy("the random state of the text's order", self.order.state())
        for n, part in enumerate(parts):
            yield Copy(f"the tokens of micro-batch {n}", part.ids, ("dp", "ep"))
        yield from self.trainer.copies()
        yield Copy("the losses", self.losses)

    def save(self) -> None:
        """Raises NotFinite, and saves nothing, where a value is not finite."""
        self._require_finite()
        state = {"run": self.identity, "order": self.order.state(), "losses": self.losses, "model": self._described()}
        save(self.args.checkpoint, len(self.losses), self.trainer.pieces(), state, self.control)
        self.saves += 1
        self._tell_what_is_kept(len(self.losses))

    def _require_finite(self) -> None:
        try:
            self.trainer.require_finite()
        except NotFinite as error:
            raise NotFinite(f"after step {len(self.losses)}: {error}") from None

    def _described(self) -> dict | None:
        """What launch.export needs to know of the model: config.json, by which pairs its heads are rotated, and where its
        tokenizer is (null: its tokens are bytes); null for one that no published family says."""
        config, source = self.task.config, self.task.source
        try:
            settings = described(config)
        except ModelError:
            return None
        pairing = "half" if config.rope is None else config.rope.pairing
        return {"config": settings, "pairing": pairing, "beside": None if source is None else str(source.path.resolve())}

    def _tell_what_is_kept(self, step: int) -> None:
        """What is said where the run is interrupted."""
        args = self.args
        start.kept(
            f"step {step} of {args.steps} is kept in {args.checkpoint}: the same command "
            f"{'' if args.resume else 'with --resume '}goes on from there"
            if step
            else "no step is kept: --checkpoint DIR and --save-every N keep some"
        )

    def resume(self) -> None:
        """Go on from the newest checkpoint. Raises CheckpointError on all ranks if it is damaged, or of another run."""
        checkpoint = Checkpoint(latest(self.args.checkpoint), self.control)
        was = checkpoint.state.get("run")
        if not isinstance(was, dict):
            raise CheckpointError(f"{checkpoint.path}: its state is not that of a training run")
        self._lengthen(was)
        for name, here in self.identity.items():
            if was.get(name) != here:
                what = "was made from another text" if name == "text" else f"has {name} {was.get(name)}, this run {here}"
                raise CheckpointError(f"{self.args.checkpoint}: the checkpoint {what}: use the same, or another folder")
        self.trainer.load(checkpoint)
        try:
            self.order.resume(checkpoint.state["order"])
            self.losses = [float(loss) for loss in checkpoint.state["losses"]]
            if len(self.losses) != checkpoint.step:
                raise ValueError(f"{len(self.losses)} losses")
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise CheckpointError(f"{checkpoint.path}: its state is not that of a training run: {error!r}") from None
        self._tell_what_is_kept(len(self.losses))

    def _lengthen(self, was: dict) -> None:
        """A run may go on beyond its end: the learning rate then falls by a cosine to the new one."""
        before, now = was.get("steps"), self.args.steps
        if isinstance(before, int) and before < now:
            was["steps"] = now
            if self.control.rank == 0:
                line = f"the run was to end at step {before}: its learning rate goes on by the cosine that ends at step {now}"
                print(f"note: {line}", file=sys.stderr, flush=True)

    def written(self, validation_bits: float, load: dict[str, list[int]]) -> tuple[list[str], list[str | None]]:
        """The files of the curve and the experts' load, and why those that are not there could not be written. Rank 0."""
        table, picture = self.table, self.args.output / "loss.png"
        table.add()
        a_byte = [self.task.text.per_byte * loss for loss in self.losses]
        why = targets.write(picture, lambda file: curve.draw(file, a_byte, validation_bits))
        unwritten = {table.path: table.problem, picture: why}
        if load:
            bars = self.args.output / "load.png"
            unwritten[bars] = targets.write(bars, lambda file: experts.draw(file, load))
        return [str(path) for path, why in unwritten.items() if why is None], list(unwritten.values())

    def predicted(self, steps: int) -> list[Traffic]:
        """What this rank sends by the closed forms: in `steps` steps and their checkpoints, the validation, the sample."""
        trainer = self.trainer
        sent = [replace(t, calls=steps * t.calls) for t in trainer.traffic(self.shapes)]
        sent += [replace(t, calls=self.saves * t.calls) for t in trainer.checkpoint_traffic()]
        return [*sent, *self.trainer.exchanged, *self.validation.traffic(), *self.sample.traffic()]

    def load(self) -> dict[str, list[int]]:
        """How many tokens chose each expert in the last step, by layer: of this rank's stages."""
        return {layer.router.Wr_DX.name.removesuffix(".Wr"): n.tolist() for layer, n in self.trainer.chosen.items()}
