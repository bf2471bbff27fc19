"""What is not saved, and saving that fails on one rank: all ranks hear of it, and the last good checkpoint stays."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from parallel.checkpoint import MANIFEST, Checkpoint, CheckpointError, Piece, latest, pieces, save
from parallel.shard import Cut, Layout, even
from tests.parallel.checkpoints import Alone, require_whole, there, write


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ([(0, 0, 2), (0, 3, 4)], "x [4, 6] must be there exactly once; there is x[0:2] in"),
        ([(0, 0, 2), (0, 1, 4)], "x [4, 6] must be there exactly once"),
        ([(0, 0, 3)], "x [4, 6] must be there exactly once"),
        ([(0, 0, 2), (1, 0, 3)], "x [4, 6] must be there exactly once"),
        ([(0, 0, 4), (0, 0, 4)], "x is there twice"),
    ],
)
def test_arrays_that_are_not_there_exactly_once_are_not_saved(tmp_path, held, text):
    x = np.zeros((4, 6))
    mine = [
        Piece("x", x.shape, (start, 0), x[start:stop]) if dim == 0 else Piece("x", x.shape, (0, start), x[:, start:stop])
        for dim, start, stop in held
    ]
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "new", 1, mine, {}, Alone)
    assert text in str(error.value)
    assert there(tmp_path) == []


@pytest.mark.parametrize(("state", "text"), [
    ({"a": (1, 2)}, "use lists for tuples"),
    ({1: 2}, "text for keys"),
    ({"a": float("inf")}, "must be what JSON holds: "),
    ({"a": np.zeros(2)}, "must be what JSON holds: Object of type ndarray"),
])  # fmt: skip
def test_a_state_that_would_not_come_back_is_not_saved(tmp_path, state, text):
    with pytest.raises(CheckpointError, match=text):
        save(tmp_path, 1, [], state, Alone)
    assert there(tmp_path) == []


@pytest.mark.mpi(min_size=2)
def test_ranks_that_mean_different_checkpoints_all_hear_of_it(control, folder):
    odd = control.rank == control.size - 1
    for step, state in ((1 + odd, {}), (1, {"loss": float(odd)})):
        with pytest.raises(CheckpointError, match="step and state must be the same on every rank"):
            save(folder, step, [], state, control)
    x = np.zeros((4, 2), "f8" if odd else "f4")
    mine = [Piece("x", (4, 2), (2 * odd, 0), x[:2])] if odd or control.rank == 0 else []
    with pytest.raises(CheckpointError, match=r"x must be one array, it is F32 \[4, 2\] in rank-0000.*, F64 \[4, 2\] in rank"):
        save(folder, 1, mine, {}, control)
    assert there(folder) == []


@pytest.mark.mpi
def test_a_step_that_is_there_is_not_written_over(comm, control, folder):
    path = write(folder, 1, control)
    with pytest.raises(CheckpointError, match="step-00000001: it is already there: remove it, or save in another folder"):
        write(folder, 1, control, seed=2)
    assert there(folder) == ["step-00000001"]
    require_whole(Checkpoint(path, control), 1, comm.size, comm.rank)


def test_numpys_integers_are_as_good_as_pythons(tmp_path):
    n = np.int64(4)
    path = save(
        tmp_path, n, pieces("x", Layout((n, 2), {"tp": (0, Cut(n, ((n - 4, n),)))}), {"tp": 0}, np.ones((4, 2))), {}, Alone
    )
    assert Checkpoint(path, Alone).shape("x") == (4, 2)
    with pytest.raises(TypeError):
        save(tmp_path, 4.5, [], {}, Alone)


def test_a_step_and_a_number_to_keep_that_are_none_are_refused(tmp_path):
    for step, keep in ((-1, 2), (1, 0)):
        with pytest.raises(ValueError, match=f"cannot save step {step} and keep {keep} steps"):
            save(tmp_path, step, [], {}, Alone, keep)


# --- a rank that fails


def fails_in_mine(held):
    yield held[0]
    raise RuntimeError("planted")


@contextmanager
def room_for(nbytes):
    """This process can write files of so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.mpi
@pytest.mark.parametrize("fault", ["mine", "header", "data", "fsync"])
def test_a_rank_that_fails_leaves_the_last_good_one(comm, control, folder, monkeypatch, fault):
    write(folder, 1, control)
    odd = comm.size - 1
    large = np.random.default_rng(0).standard_normal((comm.size, 40_000))
    mine = pieces(
        "x", Layout(large.shape, {"tp": (0, even(comm.size, comm.size))}), {"tp": comm.rank}, large[comm.rank : comm.rank + 1]
    )
    limit = 2**30
    with monkeypatch.context() as patch:
        if comm.rank == odd:
            limit = {"header": 20, "data": 100_000}.get(fault, limit)
            mine = fails_in_mine(mine) if fault == "mine" else mine
            if fault == "fsync":
                patch.setattr(os, "fsync", lambda fd: os.write(-1, b"x"))
        with pytest.raises(CheckpointError) as error, room_for(limit):
            save(folder, 2, mine, {}, control)
    assert there(folder) == ["step-00000001"]
    (text,) = set(comm.allgather(str(error.value)))
    cause = {"mine": "RuntimeError: planted", "fsync": "OSError: [Errno 9]"}.get(fault, "OSError: [Errno 27] File too large")
    assert f"rank {odd}, {folder}/step-00000002/rank-{odd:04d}-of-{comm.size:04d}.safetensors: {cause}" in text
    require_whole(Checkpoint(latest(folder), control), 1, comm.size, comm.rank)
    # Nothing stands in the way of the next attempt.
    write(folder, 2, control)
    require_whole(Checkpoint(latest(folder), control), 2, comm.size, comm.rank)


@pytest.mark.mpi
@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_a_failure_of_rank_0_alone_is_heard_by_all(comm, control, folder, monkeypatch, call):
    write(folder, 1, control)

    def planted(*args, **options):
        raise OSError(28, "planted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, planted)
        with pytest.raises(CheckpointError, match=r"step-00000002.*planted"):
            write(folder, 2, control)
    assert there(folder) == ["step-00000001"]


@pytest.mark.mpi
def test_mine_is_gone_through_on_all_ranks_though_one_cannot_write(comm, control, folder):
    """Or a rank would wait for ever in a collective of its `mine`."""

    def mine():
        for n in range(3):
            comm.Barrier()
            x = np.zeros((comm.size, 20_000))
            yield Piece(f"x{n}", x.shape, (comm.rank, 0), x[:1])

    with pytest.raises(CheckpointError, match="File too large"), room_for(100_000 if comm.rank == 0 else 2**30):
        save(folder, 1, mine(), {}, control)


@pytest.mark.mpi
def test_all_is_flushed_before_the_rename_and_the_rename_after(comm, control, folder, monkeypatch):
    done, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), done.append(os.fstat(fd).st_ino)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (rename(path, to), done.append("renamed"))[0])
    path = write(folder, 1, control)
    ino = lambda p: p.stat().st_ino  # noqa: E731
    own = ino(path / f"rank-{comm.rank:04d}-of-{comm.size:04d}.safetensors")
    assert done == [own] + ([ino(path / MANIFEST), ino(path), "renamed", ino(folder)] if comm.rank == 0 else [])
