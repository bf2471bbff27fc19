"""The flight recorder: every rank can read where every other one is."""

import re
import time
from contextlib import closing

import numpy as np
import pytest

from parallel import pipeline, schedules
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.recorder import Recorder
from parallel.slot import KEPT

SITE = r"tests/parallel/test_recorder\.py:\d+ in \w+"


@pytest.mark.mpi
def test_every_rank_can_read_what_every_rank_did(comm):
    control, recorder = Control(comm), Recorder.of(comm)
    with Mesh(comm, tp=comm.size) as mesh:
        x = np.zeros((3, 2))
        for _ in range(KEPT + 3):
            mesh.tp.all_reduce(x)
        assert recorder.slot(comm.rank).waiting is None
        going = mesh.tp.start_all_reduce(x)
        control.wait()
        for rank in range(comm.size):
            slot = recorder.slot(rank)
            flying = [v for v in slot.verbs if not v.done]
            assert [(v.verb, v.what) for v in flying if v.axis] == [("all_reduce", "start_all_reduce (3, 2) float64 op sum")]
            assert (flying[0].number, flying[0].ranks) == (KEPT + 3, tuple(range(comm.size)))
            before = [v for v in slot.verbs if v.axis and v.done][-1]
            assert before.what == "all_reduce (3, 2) float64 op sum"
            assert re.fullmatch(SITE, f"{before.site} in {before.function}")
            assert len(slot.verbs) == KEPT
            assert slot.waiting is None or slot.waiting.what == "control.wait"
        control.wait()
        going.wait()
        control.wait()
        assert all(v.done for r in range(comm.size) for v in recorder.slot(r).verbs if v.axis)
    control.close()


@pytest.mark.mpi(min_size=2)
def test_a_rank_that_waits_is_seen_where_it_waits(comm):
    recorder, world = Recorder.of(comm), comm.rank

    def waiting():
        """The verb of a mesh that rank 1 waits in, read once: it goes on meanwhile."""
        verb = recorder.slot(1).waiting
        return verb if verb and verb.axis else None

    with Mesh(comm, tp=comm.size) as mesh, closing(Control(comm)) as control:
        if world == 0:
            deadline = time.monotonic() + 10
            while waiting() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert str(waiting()).startswith(
                "receive (3,) float32 from 0 #0 on tp (rank 0) at tests/parallel/test_recorder.py:"
            )
            mesh.tp.send(np.zeros(3, "f4"), 1)
        if world == 1:
            mesh.tp.receive((3,), "f4", 0)
        control.wait()
        assert waiting() is None
        control.wait()


@pytest.mark.mpi(min_size=2)
def test_the_operation_that_a_rank_is_at_is_seen_until_there_is_none(comm):
    recorder = Recorder.of(comm)
    with Mesh(comm, pp=comm.size) as mesh, closing(Control(comm)) as control:
        for operation in (f"{comm.rank}F10", f"{comm.rank}B1", ""):
            mesh.pp.operation(operation)
            control.wait()
            assert [recorder.slot(r).operation for r in range(comm.size)] == [
                operation and f"{r}{operation[1:]}" for r in range(comm.size)
            ]
            control.wait()
        # The executor says each, and at the end that there are no more.
        plan, at = schedules.plan("zb-h1", comm.size, 3), []

        def do(op, x):
            at.append((str(op), recorder.slot(comm.rank).operation))
            return np.zeros(1)

        pipeline.run(plan, mesh.pp, do, lambda i: (1,), float)
        assert at == [(str(op), str(op)) for op in plan.ranks[comm.rank]]
        assert recorder.slot(comm.rank).operation == ""
