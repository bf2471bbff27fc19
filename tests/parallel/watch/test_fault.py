"""A fault planted in a send that is started: the check names the message, and who sent it hears of a NaN or an exception."""

import numpy as np
import pytest

from parallel.guard import CollectiveMismatch
from parallel.mesh import Mesh
from parallel.message import MessageMismatch
from parallel.watch.fault import Planted, parsed, plant
from parallel.watch.finite import Finite, NotFinite
from parallel.watch.messages import Messages

PLACE = r"at tests/parallel/watch/test_fault\.py:\d+ in test_\w+, receive expected"


def test_nothing_comes_of_a_send_that_could_be_nan():
    with pytest.raises(ValueError, match="nothing comes of start_send that could be NaN: use before"):
        parsed("rank=0,at=start_send:1,kind=nan,when=after")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("kind", "sender", "told"),
    [
        ("raise", Planted, None),
        ("nan", NotFinite, None),
        ("shape", None, rf"sent 2F0 \(4,\) float64 {PLACE} 2F0 \(3,\) float64"),
        ("dtype", None, rf"sent 2F0 \(3,\) int64 {PLACE} 2F0 \(3,\) float64"),
        ("skip", None, rf"sent 2F1 \(3,\) float64 {PLACE} 2F0 \(3,\) float64"),
        ("order", None, rf"sent 2F1 \(3,\) float64 {PLACE} 2F0 \(3,\) float64"),
        ("double", None, rf"sent 2F0 \(3,\) float64 {PLACE} 2F1 \(3,\) float64"),
    ],
)
def test_a_fault_in_a_send_that_is_started(comm, kind, sender, told):
    # Never closed, as after an exception: what was not received stays.
    mesh = Mesh(comm, check=True, watchers=[Messages(), Finite()], tp=comm.size)
    plant(parsed(f"rank=0,at=start_send:1,kind={kind}"), mesh, comm.rank)
    if comm.rank == 0 and sender is not None:
        with pytest.raises(sender):
            mesh.tp.start_send(np.ones(3), 1, "2F0")
    elif comm.rank == 0:
        for n in range(3):
            mesh.tp.start_send(np.ones(3), 1, f"2F{n}")
    elif comm.rank == 1 and told is not None:
        receive = lambda n: mesh.tp.receive((3,), "f8", 0, f"2F{n}")  # noqa: E731
        with pytest.raises(MessageMismatch, match=told):
            list(map(receive, range(3)))


@pytest.mark.mpi(min_size=2)
def test_a_fault_in_an_exchange(comm):
    p, x = comm.size, np.ones((comm.size, 2))
    with Mesh(comm, check=True, ep=p) as mesh:
        plant(parsed("rank=0,at=exchange:2,kind=flip"), mesh, comm.rank)
        nothing = mesh.ep.exchange(x[:0], [0] * p, [0] * p)
        assert nothing.shape == (0, 2)
        wrong = mesh.ep.exchange(x, [1] * p, [1] * p) != 1
        assert np.argwhere(wrong).tolist() == ([[0, 0]] if comm.rank == 0 else [])
    mesh = Mesh(comm, check=True, ep=p)
    plant(parsed("rank=0,at=exchange:1,kind=dtype"), mesh, comm.rank)
    with pytest.raises(CollectiveMismatch, match=r"exchange \(2,\) int64 .*exchange \(2,\) float64"):
        mesh.ep.exchange(x, [1] * p, [1] * p)
    with pytest.raises(ValueError, match="kind=shape in RANKWISE_FAULT has no meaning for exchange"):
        parsed("rank=0,at=exchange:1,kind=shape")
