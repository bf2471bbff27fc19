"""Messages between two ranks: they arrive whole and in order, nobody waits for a send that is started, and one that is taken
for another is named."""

import gc
import re
import weakref

import numpy as np
import pytest

from parallel.call import Watcher
from parallel.control import Control
from parallel.guard import Agreement
from parallel.ledger import Traffic, agrees
from parallel.mesh import Mesh
from parallel.message import MessageMismatch, packed
from parallel.recorder import Recorder
from parallel.slot import CELLS
from parallel.watch.messages import Messages

pytestmark = pytest.mark.mpi
# From nothing to what no MPI sends before the receiver has come.
SIZES = (0, 1, 1000, 2**13, 2**16, 2**20)


def numbers(size, rank, n, dtype="f4"):
    return (np.arange(size) % 97 + 100 * rank + n).astype(dtype)


@pytest.mark.parametrize("check", [True, False])
def test_round_a_ring_with_several_under_way(comm, check):
    """All are started before anyone receives: sends that waited would never end."""
    with Mesh(comm, check=check, watchers=[Messages()] if check else [], tp=comm.size) as mesh:
        tp = mesh.tp
        to, source = (tp.rank + 1) % tp.size, (tp.rank - 1) % tp.size
        with mesh.phase("forward"):
            for n, size in enumerate(SIZES):
                tp.start_send(numbers(size, tp.rank, n), to, f"{n}")
                last = tp.start_send(numbers(3, tp.rank, n, "i8").reshape(3, 1), to)
            for n, size in enumerate(SIZES):
                got = tp.receive((size,), "f4", source, f"{n}")
                np.testing.assert_array_equal(got, numbers(size, source, n), strict=True)
                got = tp.receive((3, 1), "i8", source)
                np.testing.assert_array_equal(got[:, 0], numbers(3, source, n, "i8"), strict=True)
            assert last.wait() is None
            assert last.poke()
            comm.Barrier()
            tp.poke()
        sent = [*(4 * size for size in SIZES), *[24] * len(SIZES)]
        assert agrees(mesh.ledger.report([Traffic(v, "tp", "forward", n) for v in ("send", "receive") for n in sent]))
        (row,) = [row for (verb, *_), row in mesh.ledger.rows.items() if verb == "send"]
        assert row.seconds > 0
        assert row.hidden_seconds > 0


def test_without_the_check_no_byte_more_is_sent():
    x = np.ones(3)
    for watchers in ([], [Watcher(), Messages()], [Agreement(2**26)]):
        assert packed(x, "2F3", watchers)[0] is x
    assert packed(x, "2F3", [Agreement()])[0].nbytes > x.nbytes


def test_a_send_of_any_memory_order_and_to_no_rank(comm):
    with Mesh(comm, tp=comm.size) as mesh:
        tp, x = mesh.tp, np.arange(12.0).reshape(3, 4)
        pending = tp.start_send(x.T[::-1], (tp.rank + 1) % tp.size)
        assert (tp.receive((4, 3), "f8", (tp.rank - 1) % tp.size) == x.T[::-1]).all()
        pending.wait()
        for no_rank in (-1, tp.size):
            for call in (tp.send, tp.start_send):
                with pytest.raises(ValueError, match=f"no rank {no_rank} on axis tp: use 0 to {tp.size - 1}"):
                    call(x, no_rank)
            with pytest.raises(ValueError, match=f"no rank {no_rank} on axis tp"):
                tp.receive((4, 3), "f8", no_rank)
        with pytest.raises(TypeError, match="cannot send dtype float16"):
            tp.start_send(x.astype("f2"), 0)


def test_what_is_sent_lives_until_it_is_complete_and_no_longer(comm):
    """Though nobody keeps what start_send returned."""
    with Mesh(comm, tp=comm.size) as mesh:
        tp, x = mesh.tp, np.ones(2**19)
        alive = weakref.ref(x)
        tp.start_send(x, (tp.rank + 1) % tp.size)
        del x
        gc.collect()
        assert alive() is not None
        assert (tp.receive((2**19,), "f8", (tp.rank - 1) % tp.size) == 1).all()
        comm.Barrier()
        while tp._sends:
            tp.poke()
        assert alive() is None


SENT = np.arange(4.0)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "what", "always"),
    [
        ((4,), "f4", "2F3", True),
        ((8,), "f8", "2F3", True),
        ((3,), "f8", "2F3", True),
        ((4,), "i8", "2F3", True),
        ((2, 2), "f8", "2F3", False),
        ((4,), "f8", "2F4", False),
        ((4,), "f8", "", False),
    ],
)
def test_a_message_taken_for_another_is_named(comm, check, start, shape, dtype, what, always):
    with Mesh(comm, check=check, tp=comm.size) as mesh:
        tp = mesh.tp
        if tp.rank == 0:
            tp.start_send(SENT, 1, "2F3").wait() if start else tp.send(SENT, 1, "2F3")
            tp.send(SENT + 1, 1)
        if tp.rank == 1 and not check and not always:
            # Nobody looks at what it is.
            assert tp.receive(shape, dtype, 0, what).sum() == SENT.sum()
        elif tp.rank == 1:
            here = r"test_message\.py:\d+ in test_a_message_taken_for_another_is_named"
            sent = rf"2F3 \(4,\) float64 at tests/parallel/{here}" if check else "4 float64"
            meant = re.escape(" ".join(filter(None, [what, str(shape), str(np.dtype(dtype))])))
            with pytest.raises(MessageMismatch, match=f"^rank 0 of tp sent {sent}, receive expected {meant}$"):
                tp.receive(shape, dtype, 0, what)
        if tp.rank == 1:
            # After it has been told, the ranks can go on.
            assert (tp.receive((4,), "f8", 0) == SENT + 1).all()


@pytest.mark.mpi(min_size=2)
def test_a_slot_counts_the_messages_that_its_ring_of_verbs_has_forgotten(comm):
    recorder, control = Recorder.of(comm), Control(comm)
    for sends in (40, 0):
        with Mesh(comm, tp=comm.size) as mesh:
            for n in range(sends):
                if comm.rank == 0:
                    mesh.tp.start_send(np.zeros(1), 1, f"{n}")
                if comm.rank == 1:
                    mesh.tp.receive((1,), "f8", 0, f"{n}")
            for _ in range(20):
                mesh.tp.all_reduce(np.zeros(1))
            slots = [recorder.slot(r) for r in range(2)]
            assert [slots[0].begun("send", "tp", 1), slots[1].begun("receive", "tp", 0)] == [sends, sends]
            assert [slots[0].begun("send", "tp", 0), slots[0].begun("send", "dp", 1)] == [0, 0]
            assert len(slots[0].counts) < CELLS
            control.wait()
    control.close()
