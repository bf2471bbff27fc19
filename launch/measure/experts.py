"""A step of a routed MLP on a mesh of ep and tp: run and gathered, counted beside predicted, and laid out in other ways.

T tokens of all ranks   D model width   F hidden width of an expert   X experts   A active for a token   p ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from launch.measure.step import Measured
from layers.dispatch import Moved
from layers.moe import MoE
from layers.saved import nbytes
from layers.work import products
from parallel.axis import Axis
from parallel.control import Control
from parallel.data import GradientSums
from parallel.flat import Flat
from parallel.holder import Over
from parallel.ledger import merged, message, wire_bytes
from parallel.mesh import Mesh
from parallel.parameter import Weights, drawn
from parallel.products import counted
from parallel.shard import Cut, even
from plan.dry import DryAxis, dry_weights

BUCKET = 4 * 2**20
# A correction of zero would be right wherever it is added.
SPREAD = 0.1


class Job(NamedTuple):
    """A routed MLP and the tokens of each rank of ep. `routing`: the options of `layers.routing.Router`, by name."""

    tokens: tuple[int, ...]
    d_model: int
    d_ff: int
    experts: int
    active: int
    d_shared: int
    routing: dict[str, object]
    dtype: str
    seed: int

    @property
    def cut(self) -> Cut:
        """Of all tokens over ep."""
        return Cut(sum(self.tokens), tuple(pairwise([0, *accumulate(self.tokens)])))

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """x and dy (T, D), of all tokens, the same on every rank and mesh."""
        return tuple(np.random.default_rng(self.seed).standard_normal((2, sum(self.tokens), self.d_model)).astype(self.dtype))

    def build(self, tp: Axis, ep: Axis, weights: Weights | None = None) -> MoE:
        """Raises ValueError for sizes that do not fit the axes or one another."""
        weights = drawn(self.seed, self.dtype, SPREAD) if weights is None else weights
        sizes = (self.d_model, self.d_ff, self.experts, self.active, self.d_shared)
        return MoE(tp, weights, *sizes, **self.routing, ep=ep)

    def dry(self, ep: int, tp: int, rank: int = 0) -> MoE:
        """As one rank of ep holds it, without MPI and memory."""
        return self.build(DryAxis("tp", tp), DryAxis("ep", ep, rank), dry_weights(self.dtype))


class Stepped:
    """A job's layer on a mesh, and steps of it on this rank's tokens."""

    def __init__(self, job: Job, mesh: Mesh) -> None:
        self.job, self.mesh, self.moe = job, mesh, job.build(mesh.tp, mesh.ep)
        self.x, self.dy = (job.cut.take(a, 0, mesh.ep.rank) for a in job.inputs())
        # As the trainer does: what came over ep is in the experts' gradients already.
        self.dense = [p for p in self.moe.parameters if "ep" not in p.layout.cuts]
        self.sums = GradientSums(Flat(self.dense), Over(mesh.ep), BUCKET, overlap=False)

    def phases(self) -> tuple[np.ndarray, tuple, np.ndarray]:
        """One step as the ledger enters it: y, what was saved, dx."""
        for p in self.moe.parameters:
            p.zero_grad()
        with self.mesh.phase("forward"):
            y, saved = self.moe.forward(self.x)
        with self.mesh.phase("backward"):
            dx = self.moe.backward(self.dy, saved)
            self.sums.filled(self.dense)
            self.sums.finish()
        return y, saved, dx

    def choice(self, saved: tuple, control: Control) -> np.ndarray:
        """The experts (T, A) of every token, on every rank."""
        _, c_TA, _ = saved[2]
        every = control.everyone(c_TA if self.mesh.tp.rank == 0 else None)
        return np.concatenate([c for c in every if c is not None])

    def run(self, control: Control) -> tuple[Measured, np.ndarray]:
        """One step, gathered and counted, and the choice (T, A). Bytes are predicted from the counts of all ranks' choice."""
        job, mesh, moe = self.job, self.mesh, self.moe
        with counted() as made:
            y, saved, dx = self.phases()
        c_TA, T = self.choice(saved, control), len(self.x)
        goes = moved(c_TA, job.cut, moe.cut)[mesh.ep.rank]
        predicted = [*moe.traffic(T, moved=goes), *self.sums.traffic()]
        communication = merged(control.everyone(mesh.ledger.report(predicted)))
        sizes = (sum(p.data.nbytes for p in moe.parameters), nbytes(saved), moe.saved_bytes(T, moved=goes))
        weights, kept, to_keep = map(list, zip(*control.everyone(sizes), strict=True))
        places = map(mesh.place_of, range(control.size))
        size = moe.W1_xD2f.data.itemsize
        memory = {
            "weights_bytes_per_rank": weights,
            "predicted_weights_bytes_per_rank": [
                sum(message(p.layout.local_shape(place), size) for p in moe.parameters) for place in places
            ],
            "saved_bytes_per_rank": kept,
            "predicted_saved_bytes_per_rank": to_keep,
        }
        whole, wrong = self._gathered(y, dx)
        served = rows_here(c_TA, moe.cut, mesh.ep.rank)
        if made != products(moe.work(T, served=served)):
            wrong.append(f"products of rank {control.rank}")
        return Measured(whole, communication, memory, sorted({n for of in control.everyone(wrong) for n in of})), c_TA

    def _gathered(self, y: np.ndarray, dx: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
        """Everything whole, by name; and the gradients of which this rank holds something else."""
        mesh, apart = self.mesh, []
        with mesh.phase("compare"):
            whole = {n: mesh.ep.all_gather(a, 0, self.job.cut) for n, a in {"x": self.x, "y": y, "dx": dx}.items()}
            for p in self.moe.parameters:
                whole |= {p.name: p.whole(mesh, p.data), f"d{p.name}": p.whole(mesh, p.grad)}
                if not np.array_equal(p.layout.take(whole[f"d{p.name}"], mesh.place), p.grad, equal_nan=True):
                    apart.append(f"d{p.name}")
        return whole, apart


def moved(c_TA: np.ndarray, tokens: Cut, experts: Cut) -> list[Moved]:
    """What leaves each rank of ep and what comes to it, from the choice of all tokens."""
    n_RX = np.array([np.bincount(tokens.take(c_TA, 0, r).reshape(-1), minlength=experts.length) for r in range(tokens.ranks)])
    stay = [int(n_RX[r, slice(*at)].sum()) for r, at in enumerate(experts.bounds)]
    return [
        Moved(int(n_RX[r].sum()) - stay[r], int(n_RX[:, slice(*at)].sum()) - stay[r]) for r, at in enumerate(experts.bounds)
    ]


def laid_out(job: Job, c_TA: np.ndarray, ep: int, tp: int) -> dict:
    """What a step would be on ep * tp ranks that share the tokens out evenly over ep, from the choice of all tokens.

    `wire_bytes_per_rank`, of ep: the layer's own, by its closed form; `gradient_wire_bytes`: the sum over ep of what is not
    cut over it, once a step; `busiest`: the most products of a rank, by the mean of the ranks.
    """
    tokens, n_X = even(len(c_TA), ep, "tokens"), np.bincount(c_TA.reshape(-1), minlength=job.experts)
    goes = moved(c_TA, tokens, even(job.experts, ep))
    wire, rows = [], []
    for rank in range(ep):
        moe = job.dry(ep, tp, rank)
        sent = moe.traffic(tokens.size(rank), moved=goes[rank])
        wire.append(sum(wire_bytes(t.verb, t.message_bytes, {"ep": ep, "tp": tp}[t.axis]) for t in sent))
        rows.append(int(n_X[slice(*moe.cut.bounds[rank])].sum()))
    dense = sum(p.data.nbytes for p in moe.parameters if "ep" not in p.layout.cuts)
    f = even(job.d_ff, tp).sizes[0]
    return {
        "ep": ep,
        "tp": tp,
        "experts_per_rank": even(job.experts, ep).sizes[0],
        "product": [round(len(c_TA) * job.active / job.experts), job.d_model, 2 * f],
        "wire_bytes_per_rank": wire,
        "gradient_wire_bytes": wire_bytes("all_reduce", dense, ep),
        "busiest": max(rows) * ep * f * tp / (sum(rows) * job.d_ff),
    }


def rows_here(c_TA: np.ndarray, experts: Cut, rank: int) -> Sequence[int]:
    """Of each expert of this rank of ep, how many tokens it serves."""
    return np.bincount(c_TA.reshape(-1), minlength=experts.length)[slice(*experts.bounds[rank])].tolist()
