"""What tests of training on a mesh share: a run of some of its steps, how many that are, and a checkpoint that is read and
written again."""

from itertools import product
from typing import NamedTuple

import numpy as np

from layers.optimizer import warmup_cosine
from parallel.checkpoint import Checkpoint, save
from tests.grids import FULL
from training import text
from training.text import Order

# The rate rises for 5 steps, and falls.
STEPS, WARMUP, FEW = 20, 5, 6


def with_steps(entries):
    """Each entry, and how many steps it runs: the first all of them, the others enough to see the rate fall."""
    return [(*entry, STEPS if FULL or not n else FEW) for n, entry in enumerate(entries)]


class Run(NamedTuple):
    """`sequences` of `length` tokens in each step."""

    vocabulary: int
    length: int
    sequences: int

    def truth(self, mesh, trainer):
        """By how many steps: what is told of each of them, and the weights after the last."""
        few, weights, _ = self.trained(mesh, trainer, end=FEW)
        # On one rank they are the trainer's own.
        weights = {name: a.copy() for name, a in weights.items()}
        more, after, _ = self.trained(mesh, trainer, begin=FEW)
        return {FEW: (few, weights), STEPS: (np.concatenate([few, more]), after)}

    def trained(self, mesh, trainer, micro_batches=1, begin=0, end=STEPS):
        """Losses, balance losses and norms of the steps `begin` to `end`; this rank's weights after the last by name, whole;
        its last parts."""
        data = np.random.default_rng(5).integers(0, self.vocabulary, 60 * self.length + 1)
        order, batches, told = Order(60, 7), mesh.over("dp", "ep"), []
        for _ in range(begin):
            order.next(self.sequences)
        for n in range(begin, end):
            chosen = order.next(self.sequences)
            parts = text.dealt(data, chosen, self.length, batches.size, batches.rank, micro_batches)
            loss = trainer.gradients(parts, self.sequences * self.length)
            told.append((loss, trainer.balance, trainer.update(warmup_cosine(n, STEPS, 1e-2, WARMUP))))
        buffers = [p for layer in trainer.routed for p in layer.buffers]
        with mesh.phase("compare"):
            weights = trainer.wholes("data") | {p.name: p.whole(mesh, p.data) for p in buffers}
        return np.array(told), weights, parts


def loaded(trainer, folder, step, mesh, control, again="again"):
    """Go on from a checkpoint in the folder: what is written again, beside it, is what was read, to the bit."""
    before = Checkpoint(folder / f"step-{step:08d}", control)
    trainer.load(before)
    written = Checkpoint(save(folder / again, step, trainer.pieces(), {}, control), control)
    for p, moment in product(trainer.parameters, ("", "m.", "v.")):
        a, b = (c.read(moment + p.name, p.layout, mesh.place, "float64") for c in (before, written))
        assert a.tobytes() == b.tobytes(), moment + p.name
