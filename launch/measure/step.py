"""One step of a layer, forward and backward, on a mesh: run and gathered, counted beside predicted, and timed.

A layer has parameters, `forward(x, *more)`, `backward(dy, saved)`, `traffic` and `saved_bytes`, of a Batch or of
(tokens, rows).
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from layers.batch import Batch
from layers.context import Gather
from layers.moe import MoE
from layers.saved import nbytes
from layers.work import products
from parallel import threads
from parallel.control import Control
from parallel.ledger import merged, message
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.products import counted
from parallel.rows import own

REPEATS = 5


@dataclass(frozen=True)
class Measured:
    """What one step computed, sent and held.

    `whole`: y, dx, weights by name and gradients led by d. `communication`, `memory`: as in a command's JSON.
    `wrong`: gradients that several ranks hold and that differ between them, and ranks that made other products than predicted.
    """

    whole: dict[str, np.ndarray]
    communication: list[dict]
    memory: dict[str, list[int]]
    wrong: list[str]


def run(layer: object, x: np.ndarray, dy: np.ndarray, mesh: Mesh, control: Control, *more: Batch) -> Measured:
    """One step on all ranks, gathered and counted. x, dy: whole, and cut here as the batch says."""
    batch = more[0] if more else Batch([len(x)])
    # Of a batch where attention is in it, else of so many tokens.
    asked = more if hasattr(layer, "attention") or hasattr(layer, "context") else (len(x), batch.rows)
    with counted() as made:
        y, saved, dx = phases(layer, part(x, mesh, batch), part(dy, mesh, batch), mesh, *more)
    served = [layer.served(saved)] if isinstance(layer, MoE) else []
    wrong = [] if made == products(layer.work(*asked, *served)) else [f"products of rank {control.rank}"]
    predicted = [*layer.traffic(*asked), *Owed(mesh, layer.parameters).traffic()]
    communication = merged(control.everyone(mesh.ledger.report(predicted)))
    sizes = control.everyone((sum(p.data.nbytes for p in layer.parameters), nbytes(saved), layer.saved_bytes(*asked)))
    places = map(mesh.place_of, range(control.size))
    held = [sum(message(p.layout.local_shape(place), x.itemsize) for p in layer.parameters) for place in places]
    with mesh.phase("compare"):
        gathered = lambda a: Gather(mesh.cp).gathered(mesh.tp.gather_rows(a, batch.rows), batch)  # noqa: E731
        whole = {"y": gathered(y), "dx": gathered(dx)}
        for p in layer.parameters:
            whole |= {p.name: p.whole(mesh, p.data), f"d{p.name}": p.whole(mesh, p.grad)}
            alike = [getattr(mesh, axis).broadcast(p.grad) for axis in mesh.sizes if axis not in p.layout.cuts]
            alike.append(p.layout.take(whole[f"d{p.name}"], mesh.place))
            if not all(np.array_equal(a, p.grad, equal_nan=True) for a in alike):
                wrong.append(f"d{p.name}")
    memory = {
        "weights_bytes_per_rank": [weights for weights, _, _ in sizes],
        "predicted_weights_bytes_per_rank": held,
        "saved_bytes_per_rank": [kept for _, kept, _ in sizes],
        "predicted_saved_bytes_per_rank": [predicted for _, _, predicted in sizes],
    }
    return Measured(whole, communication, memory, sorted({name for names in control.everyone(wrong) for name in names}))


def part(whole: np.ndarray, mesh: Mesh, batch: Batch) -> np.ndarray:
    """This rank's rows of an array of all tokens."""
    return own(batch.take(whole), batch.rows, mesh.tp.rank)


def phases(layer: object, x: np.ndarray, dy: np.ndarray, mesh: Mesh, *more: object) -> tuple[np.ndarray, tuple, np.ndarray]:
    """One step as the ledger enters it, in its phases: y, what was saved, dx."""
    with mesh.phase("forward"):
        y, saved = layer.forward(x, *more)
    with mesh.phase("backward"):
        dx = layer.backward(dy, saved)
        Owed(mesh, layer.parameters).sum()
    return y, saved, dx


def of(layer: object, mesh: Mesh, x: np.ndarray, dy: np.ndarray, *more: object) -> Callable[[], None]:
    """A step as training does it, to be timed."""
    return partial(once, layer, Owed(mesh, layer.parameters), x, dy, *more)


def once(layer: object, owed: Owed, x: np.ndarray, dy: np.ndarray, *more: object) -> None:
    for p in layer.parameters:
        p.zero_grad()
    _, saved = layer.forward(x, *more)
    layer.backward(dy, saved)
    owed.sum()


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that a step holds at once beside what is there before it, as Python and NumPy count it, which slows it down."""
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def timed(step: Callable[[], object], comm: MPI.Intracomm) -> list[float]:
    """Seconds of each of REPEATS calls, after one to warm up; all ranks start together."""
    seconds = []
    for _ in range(REPEATS + 1):
        comm.Barrier()
        begun = perf_counter()
        step()
        seconds.append(perf_counter() - begun)
    return seconds[1:]


def seconds(
    sharded: Callable[[], object], products: Callable[[], object], unsharded: Callable[[], Callable], comm: MPI.Intracomm
) -> dict[str, float]:
    """Medians of the slowest rank: the sharded step, and its matrix products alone. On rank 0 also the step on one process
    with all cores, which `unsharded` prepares."""
    control = Control(comm)
    steps = control.everyone({"sharded": timed(sharded, comm), "matmul_only": timed(products, comm)})
    medians = {kind: median(max(run) for run in zip(*(s[kind] for s in steps), strict=True)) for kind in steps[0]}
    if comm.rank == 0:
        alone = unsharded()
        with threadpool_limits(threads.cores(), user_api="blas"):
            medians["unsharded"] = median(timed(alone, MPI.COMM_SELF))
    control.wait(patient=True)
    control.close()
    return medians
