"""Gradients and weights that are split over data axes (ZeRO-2, ZeRO-3): the same losses, weights and norms on every mesh, the
bytes and the peaks of the closed forms."""

import gc
import tracemalloc
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from mpi4py import MPI

from launch import start
from layers.context import Ring
from models.build import Parts
from models.config import Experts, gpt2_like, llama_like
from models.stage import dealt, stages
from parallel import residence, schedules
from parallel.checkpoint import Checkpoint, save
from parallel.control import Control
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.replicas import Replicas
from parallel.shard import DATA
from parallel.sharded import FlatShard, Units
from tests.apart import on_first
from tests.training.runs import STEPS, Run, loaded, with_steps
from training import text
from training.trainer import NotFinite, Recipe, Trainer

pytestmark = [pytest.mark.mpi, pytest.mark.limit(120)]

V, S, LAYERS = 29, 6, 4
CONFIGS = {
    "untied": llama_like(V, 24, LAYERS, 4, 2, 14, S),
    "tied": gpt2_like(V, 24, LAYERS, 4, 10, S),
    "routed": replace(llama_like(V, 24, LAYERS, 4, 2, 14, S), experts=Experts(5, 2, 7, first=1)),
}
RUN = Run(V, S, 13)


def made(mesh, kind, zero, over=DATA, schedule="1f1b", micro_batches=1, recompute=False, cuts_rows=False, overlap=True):
    plan = schedules.plan(schedule, mesh.pp.size, micro_batches)
    parts = Parts(CONFIGS[kind], mesh.tp, recompute, cuts_rows, Ring(mesh.cp), mesh.ep)
    own = stages(parts, drawn(1, "float64", 0.1), dealt(LAYERS, plan.stages), [*plan.rank_of.values()], mesh.pp.rank)
    recipe = Recipe(clip=0.8, zero=zero, zero_over=over, overlap=overlap, bucket_bytes=5000, schedule=plan)
    return Trainer(own, mesh, recipe)


@pytest.fixture(scope="module")
def alone():
    mesh = Mesh(MPI.COMM_SELF, dp=1)
    return on_first(start.begin(), lambda: {kind: RUN.truth(mesh, made(mesh, kind, 0)) for kind in CONFIGS})


# Ranks: the mesh, the kind of model, the stage of ZeRO, and what else is not as usual. The first of each stay.
EVERY = {
    1: [({"dp": 1}, "tied", 3, {"micro_batches": 3}), ({"dp": 1}, "routed", 2, {"schedule": "zb-v", "micro_batches": 2})],
    2: [
        ({"dp": 2}, "tied", 3, {"micro_batches": 3, "recompute": True}),
        ({"cp": 2}, "untied", 2, {"micro_batches": 2}),
        ({"cp": 2}, "untied", 3, {"overlap": False}),
        ({"pp": 2}, "tied", 3, {"schedule": "zb-h1", "micro_batches": 3}),
    ],
    3: [({"dp": 3}, "untied", 3, {"micro_batches": 2}), ({"dp": 3}, "tied", 2, {"micro_batches": 2, "recompute": True})],
    4: [
        ({"dp": 4}, "tied", 3, {"micro_batches": 3}),
        ({"dp": 2, "tp": 2}, "untied", 3, {"cuts_rows": True, "micro_batches": 2}),
        ({"pp": 2, "dp": 2}, "tied", 3, {"schedule": "zb-v", "micro_batches": 3}),
        ({"dp": 2, "ep": 2}, "routed", 3, {"micro_batches": 2}),
        ({"dp": 2, "cp": 2}, "untied", 3, {"over": ("cp",), "micro_batches": 2}),
        ({"dp": 2, "ep": 2}, "routed", 2, {"over": ("ep",), "recompute": True}),
        ({"pp": 2, "dp": 2}, "untied", 2, {"schedule": "1f1b", "micro_batches": 3}),
        ({"dp": 2, "tp": 2}, "tied", 2, {"overlap": False}),
        ({"dp": 2, "cp": 2}, "tied", 1, {"over": ("dp",), "micro_batches": 2}),
    ],
}


@pytest.mark.parametrize("case", with_steps(EVERY[start.begin().size]), ids=str)
def test_all_steps_are_the_same(comm, alone, case, monkeypatch):
    axes, kind, zero, more, steps = case
    # What is let go is read by nobody any more.
    monkeypatch.setattr(Units.__init__, "__kwdefaults__", {"release": lambda freed: freed.fill(np.nan)})
    (told, weights), control = alone[kind][steps], Control(comm)
    with Mesh(comm, check=True, **axes) as mesh:
        trainer = made(mesh, kind, zero, **more)
        got, after, parts = RUN.trained(mesh, trainer, more.get("micro_batches", 1), end=steps)
        np.testing.assert_allclose(got, told, rtol=0, atol=1e-10)
        for name, a in after.items():
            np.testing.assert_allclose(a, weights[name], rtol=0, atol=1e-10, err_msg=name)
        assert {name for names in control.everyone([*after]) for name in names} == weights.keys()
        Replicas(mesh, control, 1).check(1, trainer.copies)
        predicted = [t for t in trainer.traffic(parts) for _ in range(steps)] + trainer.exchanged
        assert agrees(r for r in mesh.ledger.report(predicted) if r["phase"] != "compare")
        memory = trainer.memory(parts)
        for what in ("saved", *(("gathered", "unsummed") if zero > 1 else ())):
            assert memory[what] == memory[f"predicted_{what}"], what
        if zero == 3:
            assert all(np.isnan(p.data).all() for p in trainer.parameters if p.data.size)


@pytest.mark.parametrize(("m", "whole"), [(1, (1500, 1500, 2025)), (4, (1500, 3750, 8100))])
@pytest.mark.mpi(min_size=4)
def test_bytes_are_those_of_the_closed_forms(comm, m, whole):
    """P bytes on n ranks, some in the root, some in the last unit."""
    with Mesh(comm, dp=4) as mesh:
        for zero, want in zip((1, 2, 3), whole, strict=True):
            trainer = made(mesh, "untied", zero, micro_batches=m)
            size = lambda parameters: sum(p.data.nbytes for p in parameters)  # noqa: E731
            stage = trainer.stages[0]
            P, last = size(stage.parameters), size(stage.blocks[-1].parameters)
            root = P - sum(size(block.parameters) for block in stage.blocks)
            form = {1: 2 * P, 2: (m + 1) * P, 3: m * (root + 2 * (P - root) - last + P)}
            assert 3 / 4 * {1: 2000, 2: (m + 1) * 1000, 3: m * (200 + 2 * 800 - 100 + 1000)}[zero] == want
            ops = trainer.plan(m).ranks[0]
            assert sum(t.message_bytes for t in trainer.holder.traffic(ops, dict.fromkeys("FIBW", ""))) == form[zero]


def allocated(mesh, zero):
    """Of a trainer with many weights and few tokens: the bytes that stay, what a step takes beside them at most, as the
    allocator has it; the memory by the closed forms; the bytes of a block."""
    n, config = mesh.dp.size, llama_like(V, 96, LAYERS, 4, 2, 256, S)
    data = np.random.default_rng(5).integers(0, V, n * S + 1)
    parts = text.dealt(data, np.arange(n), S, n, mesh.dp.rank, 1)
    gc.collect()
    tracemalloc.start()
    own = stages(Parts(config, mesh.tp), drawn(1, "float64", 0.1), dealt(LAYERS, 1), [0], 0)
    trainer = Trainer(own, mesh, Recipe(zero=zero))
    trainer.step(parts, n * S, 1e-3)
    gc.collect()
    stays, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    trainer.step(parts, n * S, 1e-3)
    comes = tracemalloc.get_traced_memory()[1] - stays
    tracemalloc.stop()
    return stays, comes, trainer.memory(parts), sum(p.data.nbytes for p in own[0].blocks[0].parameters)


def test_what_stays_and_what_comes_and_goes_is_measured(comm):
    with Mesh(comm, dp=comm.size) as mesh:
        # Without ZeRO nothing comes but what layers compute with.
        _, plain, *_ = allocated(mesh, 0)
        for zero in (1, 2, 3):
            stays, comes, memory, unit = allocated(mesh, zero)
            form = sum(memory[kind] for kind in ("weights", "gradients", "optimizer"))
            # And a byte for each entry that is owned, which says whether it is counted.
            assert 0 <= stays - form - memory["optimizer"] // 16 < 3e5
            form = memory.get("gathered", 0) + memory.get("unsummed", 0)
            assert {1: 0, 2: 1.9 * unit, 3: 3.9 * unit}[zero] <= form
            # Not all is there at once: at the last block weights come, gradients do not leave yet. Of two units, or without
            # units of all, this rank's sums arrive in arrays of their own.
            arriving = memory["gradients"] if zero == 1 else 2 * unit
            assert form - unit < comes < form + plain + arriving / comm.size + 3e5


@pytest.fixture
def wrong(comm, alone):
    """Whether two steps on ZeRO-3 give another loss or norm than one process, or none."""

    def found(kind="untied", **more):
        with Mesh(comm, check=True, dp=comm.size) as mesh:
            try:
                got, *_ = RUN.trained(mesh, made(mesh, kind, 3, **more), more.get("micro_batches", 1), end=2)
            except NotFinite:
                return True
        return not np.allclose(got, alone[kind][STEPS][0][:2], rtol=0, atol=1e-10)

    return found


def test_without_a_sabotage_nothing_is_wrong(wrong):
    assert not wrong(micro_batches=2)


def test_weights_that_are_dropped_before_their_last_use_are_seen(wrong, monkeypatch):
    plain = residence.uses
    early = lambda *about: [use._replace(drops=True) for use in plain(*about)]  # noqa: E731
    monkeypatch.setattr(residence, "uses", early)
    assert wrong()


def test_a_gather_that_is_missing_under_recomputation_is_seen(wrong, monkeypatch):
    plain = residence.uses

    def once(*about):
        seen, found = set(), []
        for use in plain(*about):
            found.append(use._replace(gathers=use.gathers and use.unit not in seen))
            seen.add(use.unit)
        return found

    monkeypatch.setattr(residence, "uses", once)
    assert wrong(recompute=True)


def test_a_root_whose_gradient_leaves_before_all_its_uses_is_seen(wrong, monkeypatch):
    plain = residence.fills
    monkeypatch.setattr(
        residence, "fills", lambda *about: [f._replace(sends=f.unit != 0 or n == 0) for n, f in enumerate(plain(*about))]
    )
    assert wrong("tied")


@pytest.mark.mpi(min_size=2)
def test_a_gather_into_the_array_that_is_still_in_use_is_seen(wrong, monkeypatch):
    plain = Units._gather
    room = {}

    def into_the_same(self, use):
        for shard in self.units[use.unit]:
            whole = room.setdefault(shard.numbering.size, np.empty(shard.numbering.size))
            whole[...] = np.nan
        plain(self, use)

    attach = FlatShard.attach

    def at_home(self, whole):
        if self.gathers:
            whole = np.copyto(room[self.numbering.size], whole) or room[self.numbering.size]
        attach(self, whole)

    monkeypatch.setattr(Units, "_gather", into_the_same)
    monkeypatch.setattr(FlatShard, "attach", at_home)
    assert wrong()


@pytest.mark.mpi(min_size=4)
def test_a_sum_over_the_rest_that_comes_too_early_or_never_is_seen(comm, alone, monkeypatch):
    right = alone["untied"][STEPS][0][0, 2]

    def norm():
        with Mesh(comm, check=True, dp=2, cp=comm.size // 2) as mesh:
            return RUN.trained(mesh, made(mesh, "untied", 3, over=("cp",)), end=1)[0][0, 2]

    assert norm() == pytest.approx(right, rel=1e-12)
    finish = Units.finish

    def sums(self):
        for shard in self.shards:
            shard.grad[...] = shard.over.rest.all_reduce(shard.grad)

    def left_out(self):
        for shard in self.shards:
            shard.over = shard.over._replace(rest=None)
        finish(self)

    for wrongly in (left_out, lambda self: (sums(self), left_out(self))):
        monkeypatch.setattr(Units, "finish", wrongly)
        assert abs(norm() - right) > 1e-3


# Meshes, each on the first ranks that it needs, and the stage of ZeRO there.
MOVES = [({"dp": 4}, 3), ({"pp": 2, "tp": 2}, 1), ({"cp": 2, "ep": 2}, 2), ({"tp": 3}, 0), ({"dp": 1}, 3)]


def on_each(comm, work):
    """work(number, mesh, control, trainer) on the ranks of each of MOVES, one after another."""
    for n, (axes, zero) in enumerate(MOVES):
        chosen = comm.Get_group().Range_incl([(0, prod(axes.values()) - 1, 1)])
        if (own := comm.Create_group(chosen)) != MPI.COMM_NULL:
            control = Control(own)
            with Mesh(own, check=True, **axes) as mesh:
                work(n, mesh, control, made(mesh, "untied", zero))
            control.close()
            own.Free()
        chosen.Free()
        comm.Barrier()


@pytest.mark.mpi(min_size=4)
def test_what_one_mesh_has_written_any_other_reads(comm, alone, shared):
    """A run goes on from mesh to mesh as if it had never been left; what one has written, each reads, to the bit."""
    told, weights = alone["untied"][STEPS]
    each = STEPS // len(MOVES)

    def go_on(n, mesh, control, trainer):
        begin, end = n * each, (n + 1) * each
        if n:
            trainer.load(Checkpoint(shared / f"step-{begin:08d}", control))
        got, after, _ = RUN.trained(mesh, trainer, 1, begin, end)
        np.testing.assert_allclose(got[:, 0], told[begin:end, 0], rtol=0, atol=1e-10)
        save(shared, end, trainer.pieces(), {}, control, keep=len(MOVES))
        for name, a in after.items() if end == STEPS else ():
            np.testing.assert_allclose(a, weights[name], rtol=0, atol=1e-10, err_msg=name)

    def read(n, mesh, control, trainer):
        for step in range(each, STEPS + 1, each):
            loaded(trainer, shared, step, mesh, control, f"by-{n}")

    on_each(comm, go_on)
    on_each(comm, read)
