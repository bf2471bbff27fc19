"""What must be the same on several ranks and is not; numbers that are none; faults as they are written down."""

import numpy as np
import pytest

from parallel.control import Control
from parallel.mesh import Mesh
from parallel.replicas import Copy, Diverged, Replicas, copies
from parallel.shard import Layout, covering, even
from parallel.watch.fault import parsed
from parallel.watch.finite import Finite, NotFinite

on_ranks = pytest.mark.mpi


def replicas(comm, every=1, **axes):
    mesh = Mesh(comm, **(axes or {"tp": comm.size}))
    return mesh, Replicas(mesh, Control(comm), every)


def flipped(x):
    """The last bit of the last entry, the other way round."""
    y = x.copy()
    y.reshape(-1)[-1:].view(np.uint8)[0] ^= 1
    return y


@on_ranks
@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("odd", range(4))
def test_one_bit_on_one_rank_is_found_and_named(comm, odd):
    odd %= comm.size
    mesh, check = replicas(comm)
    w = np.linspace(0, 1, 7)
    named = lambda mine: [Copy("norm.w", w), Copy("blocks.3.norm1.w", mine), Copy("b", mine)]  # noqa: E731
    check.check(40, lambda: named(w))
    wrong, right = [odd], [r for r in range(comm.size) if r != odd]
    if comm.size == 2:
        # Of two nobody knows who is right: the first is taken for it.
        wrong, right = [1], [0]
    listed = " and ".join(filter(None, [", ".join(map(str, right[:-1])), str(right[-1])]))
    text = f"rank {wrong[0]} of tp: blocks.3.norm1.w differs from rank{'s' * (len(right) > 1)} {listed} at step 40 (and 1 more)"
    with pytest.raises(Diverged) as caught:
        check.check(40, lambda: named(flipped(w) if comm.rank == odd else w))
    assert str(caught.value) == text
    mesh.close()


@on_ranks
@pytest.mark.mpi(min_size=4, max_size=4)
def test_shards_are_compared_with_those_who_hold_the_same(comm):
    mesh, check = replicas(comm, dp=2, tp=2)
    part = np.full(3, mesh.tp.rank, "f4")
    shard = lambda x: [Copy("W", x, ("tp",))]  # noqa: E731
    check.check(1, lambda: shard(part))
    with pytest.raises(Diverged, match=r"^rank 1 of dp \(rank 3 in all\): W differs from rank 0 at step 2$"):
        check.check(2, lambda: shard(flipped(part) if comm.rank == 3 else part))
    # On three of four ranks alike: the fourth is named, though each of its axes has but two ranks.
    with pytest.raises(Diverged, match=r"^rank 2: w differs from ranks 0, 1 and 3 at step 3$"):
        check.check(3, lambda: [Copy("w", comm.rank == 2)])


@on_ranks
@pytest.mark.mpi(min_size=2)
def test_a_head_that_two_ranks_hold(comm):
    # 10 query heads, 2 to each of 5 key/value heads: some of these are read on two ranks.
    cut = covering(even(10, comm.size), 2)
    layout = Layout((5, 5, 2), {"tp": (1, cut)})
    whole = np.arange(np.prod(layout.shape), dtype="f8").reshape(layout.shape)
    mesh, check = replicas(comm)
    mine = layout.take(whole, mesh.place)
    check.check(1, lambda: copies("Wk", layout, mesh.place, mine))
    heads, (first, last) = cut.shared()[0]
    if comm.rank == last:
        mine[:, heads.start - cut.bounds[last][0]] += 1
    text = rf"^rank {last} of tp: Wk\[:, {heads.start}:{heads.stop}\] differs from rank {first} at step 1$"
    with pytest.raises(Diverged, match=text):
        check.check(1, lambda: copies("Wk", layout, mesh.place, mine))


@on_ranks
def test_only_in_its_turn_and_steps_must_agree(comm):
    _, check = replicas(comm, every=3)
    for step in (1, 2, 4):
        check.check(step, lambda: [Copy("rank", comm.rank)])
    _, never = replicas(comm, every=0)
    never.check(3, lambda: [Copy("rank", comm.rank)])
    if comm.size > 1:
        with pytest.raises(Diverged, match="rank 1 of tp: the step number differs from rank"):
            check.check(6 if comm.rank == 1 else 3, list)


@on_ranks
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused_before_it_is_sent(comm, bad):
    mesh = Mesh(comm, watchers=[Finite()], tp=comm.size)
    x_TD = np.ones((4, 5), "f4")
    # Finite, though its sum is beyond float32.
    mesh.tp.all_gather(np.full((1, 9), 3e38, "f4"), 0, even(comm.size, comm.size))
    mesh.tp.all_reduce(np.array([comm.rank]))
    if comm.rank == comm.size - 1:
        x_TD[2, 3] = x_TD[3, 4] = bad
        count = "2 NaN and 0 infinite" if np.isnan(bad) else "0 NaN and 2 infinite"
        with mesh.phase("backward"), pytest.raises(NotFinite) as caught:
            mesh.tp.all_reduce(x_TD)
        text = str(caught.value)
        assert text.startswith(f"rank {comm.rank} of tp sends {count} of 20 numbers, the first at [2, 3], in all_reduce (4, 5)")
        assert text.endswith("(backward): mesh.tp.all_reduce(x_TD)")
        assert "tests/parallel/test_replicas.py:" in text


@on_ranks
@pytest.mark.mpi(min_size=2)
def test_finite_terms_with_an_infinite_sum(comm):
    mesh = Mesh(comm, watchers=[Finite()], tp=comm.size)
    with np.errstate(all="ignore"), pytest.raises(NotFinite, match="gets 0 NaN and 3 infinite of 3 numbers"):
        mesh.tp.all_reduce(np.full(3, 3e38, "f4"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' in RANKWISE_FAULT is no part of a fault"),
        ("rank=1,at=all_reduce:3", "says no kind"),
        ("rank=1,at=all_reduce:3,kind=raise,kind=raise", "'kind=raise' in RANKWISE_FAULT is no part"),
        ("rank=x,at=all_reduce:3,kind=raise", "rank=x"),
        ("rank=1,at=all_reduce,kind=raise", "at=all_reduce in RANKWISE_FAULT is no call"),
        ("rank=1,at=all_reduce:0,kind=raise", "N from 1"),
        ("rank=1,at=allreduce:1,kind=raise", "at=allreduce:1"),
        ("rank=1,at=all_reduce:1,kind=explode", "kind=explode in RANKWISE_FAULT is unknown: use one of raise, "),
        ("rank=1,at=all_reduce:1,kind=exit", "use exit:3"),
        ("rank=1,at=all_reduce:1,kind=kill:9", "use kill"),
        ("rank=1,at=all_reduce:1,kind=sleep:long", "'long' is no number"),
        ("rank=1,at=all_reduce:1,kind=sleep:nan", "'nan' is no number"),
        ("rank=1,at=all_reduce:1,kind=exit:1.5", "'1.5' is no number"),
        ("rank=1,at=all_reduce:1,kind=root", "kind=root in RANKWISE_FAULT has no meaning for all_reduce: use at broadcast"),
        ("rank=1,at=all_reduce:1,kind=skip,when=in", "when=in in RANKWISE_FAULT has no meaning for skip: use before"),
        ("rank=1,at=all_reduce:1,kind=kill,when=never", "use before or in or after"),
        ("rank=1,at=send:1,kind=nan,when=after", "nothing comes of send"),
    ],
)
def test_a_fault_that_is_none_is_refused(text, problem):
    with pytest.raises(ValueError, match="RANKWISE_FAULT") as caught:
        parsed(text)
    assert problem in str(caught.value)


def test_a_fault_as_it_is_written_down():
    fault = parsed("rank=1,at=tp.all_reduce:3,kind=sleep:0.5,when=after")
    assert (fault.rank, fault.axis, fault.verb, fault.call) == (1, "tp", "all_reduce", 3)
    assert (fault.kind, fault.amount, fault.when) == ("sleep", 0.5, "after")
    assert parsed("rank=0,at=all_gather:1,kind=flip").when == "after"
