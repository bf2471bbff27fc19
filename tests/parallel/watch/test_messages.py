"""Messages that nobody receives, and buffers that change while they are under way, are told; others are not."""

from __future__ import annotations

import numpy as np
import pytest

from parallel.buffer import BufferChanged
from parallel.mesh import Mesh
from parallel.ordered import in_rank_order
from parallel.shard import even
from parallel.sums import of_mpi
from parallel.watch.messages import Messages, NeverReceived
from tests.inside import ran


def mesh_of(comm, sums=of_mpi):
    return Mesh(comm, watchers=[Messages()], sums=sums, tp=comm.size)


@pytest.mark.mpi(min_size=2)
def test_a_message_that_is_never_received(comm):
    mesh = mesh_of(comm)
    if comm.rank == 0:
        mesh.tp.send(np.zeros(3), 1)
        mesh.tp.send(np.zeros(2, "f4"), 1)
    if comm.rank == 1:
        mesh.tp.receive((3,), "f8", 0)
    with pytest.raises(NeverReceived) as error:
        mesh.close()
    assert str(error.value).startswith(
        "on tp, 1 of 2 messages from rank 0 to rank 1 was never received: the last is send (2,) float32 to 1 at tests/parallel/"
    )


@pytest.mark.mpi
@pytest.mark.parametrize("size", [1, 2**19])
def test_one_that_was_started_and_is_never_received(comm, size):
    mesh, to = mesh_of(comm), (comm.rank + 1) % comm.size
    tp = mesh.tp
    tp.start_send(np.zeros(size), to, "1F0")
    told = rf"from rank 0 to rank {1 % comm.size} was never received: the last is start_send of 1F0 \({size},\) float64 to"
    with pytest.raises(NeverReceived, match=told):
        mesh.close()
    # The send has a buffer of the library's, which ends with its receiver. A mesh that was closed would make another axis.
    tp._comm.Recv(np.empty(size), (comm.rank - 1) % comm.size)


@pytest.mark.mpi(min_size=2)
def test_all_are_received(comm):
    with mesh_of(comm) as mesh:
        if comm.rank == 0:
            mesh.tp.send(np.zeros(3), 1)
            mesh.tp.start_send(np.zeros(3), 1)
        if comm.rank == 1:
            assert (mesh.tp.receive((3,), "f8", 0) == 0).all()
            assert (mesh.tp.receive((3,), "f8", 0) == 0).all()


@pytest.mark.mpi
@pytest.mark.parametrize("poked", [True, False])
def test_a_send_under_way_whose_buffer_is_changed(comm, poked):
    with mesh_of(comm) as mesh:
        x = np.arange(6.0)
        pending = mesh.tp.start_send(x, (comm.rank + 1) % comm.size)
        x[3] = 9
        # MPI reads x when it likes: what arrives is nobody's.
        mesh.tp.receive((6,), "f8", (comm.rank - 1) % comm.size)
        done = (lambda: [pending.poke() for _ in iter(int, 1)]) if poked else pending.wait
        with pytest.raises(BufferChanged, match=r"start_send .* at tests/.*changed: \[3\] was 3.0, is 9.0: wait"):
            done()


@pytest.mark.mpi
@pytest.mark.parametrize("sums", [of_mpi, in_rank_order])
def test_a_sum_under_way_whose_buffer_is_changed(comm, sums):
    mesh, x = mesh_of(comm, sums), np.arange(6.0).reshape(2, 3)
    pending = mesh.tp.start_all_reduce(x)
    if comm.rank == comm.size - 1:
        x[1, 0] += 1
        with pytest.raises(BufferChanged, match=r"start_all_reduce .* at tests/.*changed: \[1, 0\] was 3.0, is 4.0: wait"):
            pending.wait()
    else:
        pending.wait()
        assert (x == comm.size * np.arange(6.0).reshape(2, 3)).all()


@pytest.mark.mpi
@pytest.mark.parametrize("sums", [of_mpi, in_rank_order])
def test_a_scattered_sum_under_way_whose_buffer_is_changed(comm, sums):
    mesh, x, cut = mesh_of(comm, sums), np.arange(6.0), even(6, comm.size)
    right = mesh.tp.start_reduce_scatter(x, cut).wait()
    assert (right == comm.size * x[slice(*cut.bounds[comm.rank])]).all()
    pending = mesh.tp.start_reduce_scatter(x, cut)
    x[2] = 7
    with pytest.raises(BufferChanged, match=r"\[2\] was 2.0, is 7.0"):
        pending.wait()


@pytest.mark.mpi
def test_a_gathering_under_way_whose_buffer_is_changed(comm):
    mesh, x = mesh_of(comm), np.arange(3.0)
    pending = mesh.tp.start_gather_rows(x, even(3 * comm.size, comm.size)) if comm.size > 1 else None
    pending = pending or mesh.tp.start_all_gather(x, even(3, 1))
    x[1] = 7
    with pytest.raises(BufferChanged, match=r"start_all_gather .*\[1\] was 1.0, is 7.0"):
        pending.wait()


@pytest.mark.mpi(min_size=2)
def test_a_command_with_checks_on_has_none(comm):
    done = ran(comm, "dp_train", "--steps", "2", "--check-collectives", "on", "--deterministic")
    assert (done.status, done.err) == (0, "")
