"""What is handed over or put off stays as it is; and sabotages of a step in stages, each of which is seen."""

import numpy as np
import pytest
from mpi4py import MPI

from launch import start
from parallel import schedules
from parallel.buffer import BufferChanged
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.schedule import Op, Plan
from parallel.watch.messages import Messages
from tests.grids import every_other
from tests.layers.test_later import Frozen
from tests.models.staged import ALIKE, CONFIGS, alone, gradients, parts, trainer
from training.work import Work

pytestmark = pytest.mark.mpi

M = 4
PP = {"pp": start.begin().size, "dp": 1, "tp": 1}


class Freezing(Work):
    """Nobody may write what an operation has made, nor the memory that it is a part of."""

    def __call__(self, op, x):
        made = part = super().__call__(op, x)
        while isinstance(part, np.ndarray):
            part.setflags(write=False)
            part = part.base
        return made


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.setattr("training.trainer.Work", Freezing)
    monkeypatch.setattr("training.work.Later", Frozen)


@pytest.mark.parametrize(("kind", "cut"), every_other(CONFIGS, [False, True]))
def test_nothing_is_written_that_was_handed_over_or_put_off(comm, frozen, kind, cut):
    """`cut`: the rows over tp, where the ranks allow both; blocks then compute their forward a second time, too."""
    grid = {"pp": comm.size // 2, "dp": 1, "tp": 2} if cut and comm.size % 2 == 0 else PP
    every, tokens = parts(M)
    with Mesh(comm, check=True, watchers=[Messages()], **grid) as mesh:
        for name in ("zb-h1", "zb-v"):
            plan = schedules.plan(name, mesh.pp.size, M)
            made = trainer(mesh, CONFIGS[kind], plan, recompute=cut, cuts_rows=cut)
            assert made.gradients(every, tokens) == pytest.approx(alone(kind, M)[0], rel=1e-13)


def test_writing_into_what_was_handed_over_is_seen(monkeypatch, frozen):
    """Two stages on one rank: one's result is the other's argument."""

    class Writing(Freezing):
        def _forward(self, op, x):
            if op.stage:
                x += 0
            return super()._forward(op, x)

    monkeypatch.setattr("training.trainer.Work", Writing)
    mesh = Mesh(MPI.COMM_SELF, pp=1, dp=1, tp=1)
    made = trainer(mesh, CONFIGS["gpt2"], schedules.plan("zb-v", 1, M))
    with pytest.raises(ValueError, match="read-only"):
        made.gradients(*parts(M))


# --- sabotages


@pytest.fixture
def wrong(comm, monkeypatch):
    """Whose gradients are not those of one process, on any rank, and whether their norm is; with another Work, or with a
    trainer that `change` has changed."""

    def found(name, kind="llama tied", work=Work, change=lambda trainer: None):
        monkeypatch.setattr("training.trainer.Work", work)
        every, tokens = parts(M, ALIKE)
        _, norm, whole, *_ = alone(kind, M, alike=True)
        with Mesh(comm, check=True, **PP) as mesh:
            made = trainer(mesh, CONFIGS[kind], schedules.plan(name, mesh.pp.size, M))
            change(made)
            made.gradients(every, tokens)
            mine = [t for t, g in gradients(made).items() if not np.allclose(g, whole[t], rtol=0, atol=1e-10)]
            found = {t for tensors in mesh.control.everyone(mine) for t in tensors}
            return found, made.update(0.0) == pytest.approx(norm, rel=1e-12)

    return found


@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_without_a_sabotage_nothing_is_wrong(wrong, name):
    assert wrong(name) == (set(), True)


@pytest.mark.parametrize("name", ["1f1b", "zb-v"])
def test_a_backward_from_the_saved_values_of_another_micro_batch_is_seen(wrong, name):
    class Late(Work):
        def _backward(self, op, dy):
            before, mine = self.__dict__.setdefault("before", {}), self._saved[op[1:]]
            self._saved[op[1:]], before[op.stage] = before.get(op.stage, mine), mine
            return super()._backward(op, dy)

    found, _ = wrong(name, work=Late)
    assert found >= {"Wte", "blocks.0.W1", "blocks.4.W2"}


@pytest.mark.parametrize("name", ["zb-h1", "zb-v"])
def test_weights_of_the_last_micro_batch_that_are_forgotten_are_seen(wrong, name):
    class Forgetful(Work):
        def _weights(self, op, nothing):
            if op.micro_batch == M - 1:
                later = self._later[op[1:]]
                later._put = [(tell, arrays) for tell, arrays in later._put if not arrays]
            super()._weights(op, nothing)

    found, _ = wrong(name, work=Forgetful)
    assert found >= {"Wte", "blocks.0.W1", "blocks.4.W2"}
    # Norms are not put off.
    assert "wnf" not in found


def test_a_loss_divided_by_the_micro_batches_is_seen(wrong):
    class Mean(Work):
        def __init__(self, stages, micro_batches, tokens=1, *more):
            super().__init__(stages, micro_batches, tokens * len(micro_batches), *more)

    found, norm = wrong("1f1b", work=Mean)
    assert found >= {"Wte", "wnf", "blocks.0.W1"}
    assert not norm


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("end", ["first", "last", "neither"])
def test_a_tied_table_that_is_summed_on_one_end_only_is_seen(wrong, monkeypatch, end):
    """As after a sum to one rank, or none."""
    whole = Owed.sum

    def on_one_end(self):
        own = {id(p): p.grad.copy() for _, held in self._sums for p, _ in held}
        whole(self)
        for axis, held in self._sums:
            if end == "neither" or (axis.rank == 0) == (end == "last"):
                for p, _ in held:
                    p.grad[...] = own[id(p)]

    monkeypatch.setattr(Owed, "sum", on_one_end)
    found, norm = wrong("1f1b")
    assert found == {"Wte"}
    # It is counted by the lower rank.
    assert norm == (end == "first")
    # On a V both ends are on one rank.
    assert wrong("zb-v") == (set(), True)


@pytest.mark.mpi(min_size=2)
def test_a_tied_table_that_is_counted_twice_is_seen(wrong):
    found, norm = wrong("1f1b", change=lambda trainer: [counted.fill(True) for counted in trainer._counted])
    assert not found
    assert not norm


def last_stage_last(p):
    """A plan on a V: all F, then all I, then all W, those of the first stage before those of the last."""
    turn = [("F", 0), ("F", 1), ("I", 1), ("I", 0), ("W", 0), ("W", 1)]
    stage = lambda r, up: 2 * p - 1 - r if up else r  # noqa: E731
    return Plan(tuple(tuple(Op(kind, stage(r, up), i) for kind, up in turn for i in range(M)) for r in range(p)))


@pytest.mark.parametrize(("name", "zero"), [("zb-h1", False), ("zb-v", True), ("interleaved", False), ("a user's", False)])
def test_sums_over_dp_go_on_while_other_stages_are_computed(comm, name, zero):
    """In small buckets. A tied table waits for both its stages, whatever ranks these are on."""
    pp, (every, tokens) = 2 if comm.size == 4 else 1, parts(M)
    grid = {"pp": pp, "dp": comm.size // pp, "tp": 1}
    with Mesh(comm, check=True, watchers=[Messages()], **grid) as mesh:
        plan = last_stage_last(pp) if name == "a user's" else schedules.plan(name, pp, M)
        made = trainer(mesh, CONFIGS["llama tied"], plan, zero=zero, bucket_bytes=500)
        loss, norm, whole, *_ = alone("llama tied", M)
        made.plan(M)
        mesh.ledger.rows.clear()
        assert made.gradients(every, tokens * mesh.dp.size) == pytest.approx(loss, rel=1e-13)
        assert made.update(0.0) == pytest.approx(norm, rel=1e-12)
        if not zero:
            assert agrees(mesh.ledger.report(made.traffic(every)))
            for tensor, g in gradients(made).items():
                np.testing.assert_allclose(g, whole[tensor], rtol=0, atol=1e-12, err_msg=tensor)


def test_a_sum_over_dp_that_begins_before_the_last_weights_is_seen(comm, monkeypatch):
    class Early(Work):
        def _backward(self, op, dy):
            dx = super()._backward(op, dy)
            if op.micro_batch == M - 1:
                self.holder.filled(self.stages[op.stage].filling_order)
            return dx

    every, tokens = parts(M)
    monkeypatch.setattr("training.trainer.Work", Early)
    with Mesh(comm, check=True, watchers=[Messages()], pp=1, dp=comm.size, tp=1) as mesh:
        made = trainer(mesh, CONFIGS["gpt2"], schedules.plan("zb-h1", 1, M))
        # The last W follows the last I.
        with pytest.raises(BufferChanged, match=r"start_all_reduce .* was under way when its buffer was changed"):
            made.gradients(every, tokens * comm.size)
