"""Small models in stages on the ranks of a mesh, and whole on one process, with the same weights and the same micro-batches."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
from mpi4py import MPI

from layers.rope import Rope
from models.build import Parts, build
from models.config import Experts, Latent, gpt2_like, llama_like
from models.stage import by_hand, stages
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.schedule import Op, Plan
from training.text import MicroBatch
from training.trainer import Recipe, Trainer

V, LAYERS = 23, 5
CONFIGS = {
    "gpt2": gpt2_like(V, 16, LAYERS, 4, 10, 16),
    "gpt2 untied": gpt2_like(V, 16, LAYERS, 4, 10, 16, tied=False),
    "llama tied": llama_like(V, 16, LAYERS, 4, 2, 14, 16, tied=True),
    "latent": replace(
        llama_like(V, 16, LAYERS, 4, 4, 14, 16), latent=Latent(6, 5, 4, 3, 7), rope=Rope(4, pairing="interleaved"), d_head=9
    ),
    "experts": replace(
        llama_like(V, 16, LAYERS, 4, 2, 14, 16), experts=Experts(5, 2, 9, d_shared=8, scoring="sigmoid", scale=1.3, first=1)
    ),
}
# By how many stages: the blocks of each. Some have none, at either end and between others.
COUNTS = {1: [5], 2: [3, 2], 3: [2, 0, 3], 4: [2, 2, 1, 0], 6: [1, 1, 0, 1, 1, 1], 8: [0, 1, 1, 0, 1, 1, 1, 0]}
# Of each micro-batch: lengths of its sequences.
LENGTHS = [[2, 3], [4], [1, 1, 4], [5], [2], [3, 1], [6], [1], [2, 2]]


def weights():
    return drawn(1, "float64", 0.2)


def parts(m, lengths=LENGTHS):
    """The first m micro-batches, and how many tokens they have."""
    ids = [np.random.default_rng(i).integers(0, V, 1 + sum(lengths[i])) for i in range(m)]
    every = [MicroBatch(a[:-1], a[1:], of) for a, of in zip(ids, lengths, strict=False)]
    return every, sum(len(part.ids) for part in every)


def held(mesh, config, rank_of, counts=None, **more):
    """The stages of this rank."""
    made = Parts(config, mesh.tp, **more)
    return stages(made, weights(), by_hand(counts or COUNTS[len(rank_of)]), rank_of, mesh.pp.rank)


def trainer(mesh, config, plan, counts=None, recompute=False, cuts_rows=False, **recipe):
    rank_of = [*plan.rank_of.values()]
    made = held(mesh, config, rank_of, counts, recompute=recompute, cuts_rows=cuts_rows)
    return Trainer(made, mesh, Recipe(schedule=plan, **recipe))


def one_after_another(plan):
    """A plan for the same stages and micro-batches that finishes each before it begins the next."""
    held = [[s for s, at in plan.rank_of.items() if at == rank] for rank in range(len(plan.ranks))]
    turn = lambda own, i: [*(Op("F", s, i) for s in own), *(Op("B", s, i) for s in reversed(own))]  # noqa: E731
    return Plan(tuple(tuple(op for i in range(plan.micro_batches) for op in turn(own, i)) for own in held))


def gradients(trainer):
    """By name, whole. All ranks call it together."""
    return trainer.wholes("grad")


@cache
def alone(kind, m, alike=False):
    """On one process, all micro-batches as one: loss, norm of the gradient, gradients and weights by name, logits."""
    mesh = Mesh(MPI.COMM_SELF, pp=1, dp=1, tp=1)
    model = build(CONFIGS[kind], mesh.tp, weights())
    trainer = Trainer({0: model}, mesh, Recipe())
    every, tokens = parts(m, ALIKE if alike else LENGTHS)
    one = MicroBatch(
        *(np.concatenate([part[n] for part in every]) for n in (0, 1)), [n for part in every for n in part.lengths]
    )
    loss = trainer.gradients([one], tokens)
    found = gradients(trainer), {p.name: p.data.copy() for p in model.parameters}
    ends = np.cumsum([0, *(len(part.ids) for part in every)])
    logits, _ = model.forward(one.ids, model.batch(one.lengths))
    return loss, trainer.update(0.0), *found, [logits[a:b] for a, b in pairwise(ends)]


# Micro-batches of one shape: what belongs to any of them fits the others.
ALIKE = [[2, 3]] * len(LENGTHS)
