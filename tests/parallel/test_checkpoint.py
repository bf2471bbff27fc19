"""Checkpoints: back on any mesh, to the bit; refused when a bit has changed; complete whatever is killed and when."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from parallel import checkpoint as module
from parallel.checkpoint import MANIFEST, Checkpoint, CheckpointError, Piece, latest, pieces, save
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.shard import Cut, Layout, covering, even, replicated
from tests.cases import saving
from tests.harness import ROOT, launcher_free
from tests.launch.test_start import alive

# `CHECKPOINT_KILLS=100 python -m pytest tests/parallel/test_checkpoint.py -rP -k killed_again` for more than there is time for.
KILLS = int(os.environ.get("CHECKPOINT_KILLS", "12"))
FLIPS = 200


class Alone:
    """Control for one process, without MPI."""

    rank, size = 0, 1
    everyone = staticmethod(lambda mine: [mine])
    wait = staticmethod(lambda: None)


@pytest.fixture
def control(comm):
    own = Control(comm)
    yield own
    own.close()


@pytest.fixture
def folder(comm, tmp_path):
    """The same for all ranks."""
    return comm.bcast(tmp_path)


@contextmanager
def first(comm, ranks):
    """Control of the first `ranks` ranks; None on the others."""
    part = comm.Split(0 if comm.rank < ranks else MPI.UNDEFINED, comm.rank)
    own = Control(part) if comm.rank < ranks else None
    yield own
    if own:
        own.close()
        part.Free()
    comm.Barrier()


def on_rank_0(comm, work, *args):
    """work(*args) on rank 0, while no other rank is before or behind."""
    comm.Barrier()
    if comm.rank == 0:
        work(*args)
    comm.Barrier()


def layouts(ranks):
    """Even and uneven cuts along several dims, key/value heads held by several ranks, arrays held whole, and an empty one."""
    return {
        "table": Layout((13, 5), 0, even(13, ranks)),
        "layers.0.W1": Layout((3, 11), 1, even(11, ranks)),
        "layers.0.Wk": Layout((2, 3, 4), 1, covering(even(9, ranks), 3)),
        "layers.0.b": Layout((7,)),
        "ids": Layout((6,), 0, even(6, ranks)),
        "mask": Layout((5,), 0, replicated(5, ranks)),
        "colours": Layout((4, 1, 9), 2, even(9, ranks)),
        "empty": Layout((0, 4)),
    }


def whole(seed):
    dtypes = ["f4", "f8", "f4", "f8", "i8", "?", "u1", "f2"]
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 2 if dtype == "?" else 99, layout.shape).astype(dtype)
        for (name, layout), dtype in zip(layouts(1).items(), dtypes, strict=True)
    }


def parts(seed, ranks, rank):
    held = layouts(ranks)
    return [p for name, x in whole(seed).items() for p in pieces(name, held[name], rank, held[name].take(x, rank))]


def write(folder, step, control, seed=None, **options):
    mine = parts(step if seed is None else seed, control.size, control.rank)
    return save(folder, step, mine, {"seed": step}, control, **options)


def require_whole(checkpoint, seed, ranks, rank):
    for name, layout in layouts(ranks).items():
        should = layout.take(whole(seed)[name], rank)
        got = checkpoint.read(name, layout, rank, should.dtype)
        assert (got.dtype, got.shape, got.tobytes()) == (should.dtype, should.shape, should.tobytes()), name
        assert checkpoint.shape(name) == layout.shape
    assert sorted(checkpoint.names) == sorted(layouts(ranks))


def refused(path, control):
    """The text, which must be the same on every rank, with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint(path, control)
    (text,) = set(control.everyone(str(error.value)))
    return text


def manifest_of(path):
    return json.loads((path / MANIFEST).read_text())


def there(folder):
    return sorted(p.name for p in folder.iterdir())


# --- what a rank writes


@pytest.mark.parametrize("seed", range(30))
def test_together_the_ranks_write_each_index_once(seed):
    rng = np.random.default_rng(seed)
    ranks, length = rng.integers(1, 6), 12
    bounds = [tuple(int(b) for b in np.sort(rng.integers(0, length + 1, 2))) for _ in range(ranks)]
    bounds[rng.integers(ranks)] = 0, length
    x = rng.standard_normal((2, length, 3))
    layout = Layout(x.shape, 1, Cut(length, tuple(bounds)))
    copies, back = np.zeros(length, int), np.full_like(x, np.nan)
    for rank in range(ranks):
        for p in pieces("x", layout, rank, layout.take(x, rank)):
            assert bounds[rank][0] <= p.start < p.stop <= bounds[rank][1]
            copies[p.start : p.stop] += 1
            back[:, p.start : p.stop] = p.data
    assert copies.tolist() == [1] * length
    assert (back == x).all()


def test_shared_heads_are_the_lowest_ranks_to_write():
    layout = Layout((3, 2), 0, covering(even(9, 4), 3))
    assert layout.cut.bounds == ((0, 1), (1, 2), (1, 3), (2, 3))
    keys = [[p.key for p in pieces("Wk", layout, r, np.zeros(layout.local_shape(r)))] for r in range(4)]
    assert keys == [["Wk[0:1]"], ["Wk[1:2]"], ["Wk[2:3]"], []]
    assert [len(pieces("b", Layout((3,)), r, np.zeros(3))) for r in range(4)] == [1, 0, 0, 0]
    with pytest.raises(CheckpointError, match=r"Wk: rank 2's part should be \(2, 2\), it is \(3, 2\)"):
        pieces("Wk", layout, 2, np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (("", (2,), 0, 0, np.zeros(2)), "'' cannot be the name"),
        (("__metadata__", (2,), 0, 0, np.zeros(2)), "cannot be the name"),
        (("x", (), 0, 0, np.zeros(())), "x has no dims: keep single numbers in the state"),
        (("x", (2,), 0, 0, np.zeros(2, complex)), "x is of dtype complex128: use one that safetensors has, F64, F32"),
        (("x", (2, 3), 0, 0, np.zeros((2, 4))), r"x: \(2, 4\) from index 0 of dim 0 on is no part of \(2, 3\)"),
        (("x", (2, 3), 1, 2, np.zeros((2, 2))), r"x: \(2, 2\) from index 2 of dim 1 on is no part of \(2, 3\)"),
        (("x", (2, 3), 1, -1, np.zeros((2, 2))), "no part of"),
        (("x", (2, 3), 1, 0, np.zeros(2)), "no part of"),
        (("x", (2, 3), 2, 0, np.zeros((2, 3))), "no part of"),
    ],
)
def test_what_is_no_piece_is_refused(piece, text):
    with pytest.raises(CheckpointError, match=text):
        Piece(*piece)


# --- there and back


@pytest.mark.mpi
def test_from_any_number_of_ranks_to_any_other(comm, folder):
    for writers in range(1, comm.size + 1):
        with first(comm, writers) as control:
            if control:
                assert write(folder, writers, control) == folder / f"step-0000000{writers}"
        for readers in range(1, comm.size + 1):
            with first(comm, readers) as control:
                if control:
                    checkpoint = Checkpoint(latest(folder), control)
                    assert (checkpoint.step, checkpoint.state) == (writers, {"seed": writers})
                    require_whole(checkpoint, writers, readers, control.rank)


@pytest.mark.mpi
@pytest.mark.parametrize(("saved", "read"), [(0, 1), (1, 0), (None, 2), (2, None), (1, 1)])
def test_cut_along_one_dim_and_read_along_another(control, folder, saved, read):
    x = np.random.default_rng(0).standard_normal((5, 6, 7))
    cut = lambda dim: Layout(x.shape) if dim is None else Layout(x.shape, dim, even(x.shape[dim], control.size))  # noqa: E731
    mine = pieces("x", cut(saved), control.rank, cut(saved).take(x, control.rank))
    checkpoint = Checkpoint(save(folder, 0, mine, {}, control), control)
    assert (checkpoint.read("x", cut(read), control.rank, "f8") == cut(read).take(x, control.rank)).all()


@pytest.mark.mpi(min_size=4, max_size=4)
def test_two_axes_with_the_arrays_dealt_out_over_dp(comm, control, folder):
    with Mesh(comm, dp=2, tp=2) as mesh:
        mine = []
        for n, (name, layout) in enumerate(layouts(2).items()):
            if n % 2 == mesh.dp.rank:
                mine += pieces(name, layout, mesh.tp.rank, layout.take(whole(3)[name], mesh.tp.rank))
        path = save(folder, 3, mine, {}, control)
    require_whole(Checkpoint(path, control), 3, 4, control.rank)


@pytest.mark.mpi
@pytest.mark.parametrize("order", ["fortran", "strided", "reversed", "big-endian"])
def test_any_memory_order_is_written_as_it_reads(control, folder, order):
    layout = Layout((9, 4), 0, even(9, control.size))
    x = np.random.default_rng(0).standard_normal((9, 4)).astype("f4")
    part = layout.take(x, control.rank)
    laid = {
        "fortran": np.asfortranarray(part),
        "strided": np.repeat(part, 2, axis=1)[:, ::2],
        "reversed": part[::-1].copy()[::-1],
        "big-endian": part.astype(">f4"),
    }[order]
    checkpoint = Checkpoint(save(folder, 0, pieces("x", layout, control.rank, laid), {}, control), control)
    assert (checkpoint.read("x", layout, control.rank, "f4") == part).all()
    swapped = checkpoint.read("x", layout, control.rank, ">f4")
    assert swapped.dtype == ">f4"
    assert (swapped == part).all()


@pytest.mark.mpi
def test_random_state_and_large_integers_come_back(control, folder):
    rng = np.random.default_rng(5)
    rng.random(3)
    state = {
        "rng": rng.bit_generator.state,
        "position": [2**200, -(2**64)],
        "text": 'ä "\n',
        "x": [0.1, None, True],
        "sha256": "",
    }
    checkpoint = Checkpoint(save(folder, 7, [], state, control), control)
    assert checkpoint.state == state
    again = np.random.default_rng(0)
    again.bit_generator.state = checkpoint.state["rng"]
    assert (again.random(9) == rng.random(9)).all()


@pytest.mark.mpi
def test_each_file_is_hashed_once_and_only_what_is_needed_is_opened(comm, control, folder, monkeypatch):
    path = write(folder, 1, control)
    hashed, opened = [], []
    digest, memmap = hashlib.file_digest, np.memmap
    monkeypatch.setattr(hashlib, "file_digest", lambda f, kind: (hashed.append(Path(f.name).name), digest(f, kind))[1])
    monkeypatch.setattr(np, "memmap", lambda file, *rest: (opened.append(file.name), memmap(file, *rest))[1])
    checkpoint = Checkpoint(path, control)
    assert sorted(file for of_rank in comm.allgather(hashed) for file in of_rank) == sorted(manifest_of(path)["files"])
    checkpoint.read("table", layouts(comm.size)["table"], comm.rank, "f4")
    assert opened == [f"rank-{comm.rank:04d}-of-{comm.size:04d}.safetensors"]


@pytest.mark.mpi
def test_other_tools_read_each_file(comm, control, folder):
    numpy_of = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    path = write(folder, 1, control)
    back = {name: np.zeros_like(x) for name, x in whole(1).items()}
    for file in path.glob("*.safetensors"):
        for key, data in numpy_of.load_file(file).items():
            name, _, index = key.partition("[")
            at = tuple(slice(*map(int, i.split(":"))) if i != ":" else slice(None) for i in index.rstrip("]").split(", ") if i)
            back[name][at] = data
            assert back[name].dtype == data.dtype
    assert all((back[name] == x).all() for name, x in whole(1).items())
    # What no one else notices, and the reason for the hashes in the manifest.
    file = path / f"rank-0000-of-{comm.size:04d}.safetensors"
    on_rank_0(comm, flip, file, -1)
    numpy_of.load_file(file)
    assert f"{file.name} is not what was saved" in refused(path, control)


@pytest.mark.mpi
def test_a_checkpoint_of_one_rank_has_plain_names_and_all_pieces_are_aligned(comm, control, folder):
    for file in write(folder, 1, control).glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__")["ranks"] == str(comm.size)
        assert not any("[" in key for key in header) or comm.size > 1
        sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "U8": 1, "BOOL": 1}
        assert all((8 + length + t["data_offsets"][0]) % sizes[t["dtype"]] == 0 for t in header.values())


# --- what is asked of a checkpoint that it does not have


def test_a_missing_tensor_another_shape_and_another_dtype_are_refused(tmp_path):
    checkpoint = Checkpoint(write(tmp_path, 1, Alone), Alone)
    with pytest.raises(CheckpointError, match=r"step-00000001 has no tensor 'W1': it has .*layers\.0\.W1.* and 4 more"):
        checkpoint.read("W1", Layout((3, 11)), 0, "f8")
    with pytest.raises(CheckpointError, match="has no tensor 'W1'"):
        checkpoint.shape("W1")
    with pytest.raises(CheckpointError, match=r"table is of shape \(13, 5\), it should be \(5, 13\)"):
        checkpoint.read("table", Layout((5, 13)), 0, "f4")
    for dtype in ("f8", "i4", "f2"):
        with pytest.raises(CheckpointError, match=f"table is float32, not {np.dtype(dtype)}: read it as float32"):
            checkpoint.read("table", Layout((13, 5)), 0, dtype)


# --- what cannot be trusted


def flip(file, at, bit=0):
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.mpi
@pytest.mark.limit(120)
def test_flipped_bits_are_refused_by_file_and_tensor(comm, control, folder):
    path = write(folder, 1, control)
    manifest = manifest_of(path)
    spans = [(p["file"], *p["bytes"], p["key"]) for t in manifest["tensors"].values() for p in t["pieces"]]
    files = sorted(path.iterdir())
    sizes = [f.stat().st_size for f in files]
    rng = np.random.default_rng(comm.size)
    in_tensor = 0
    for bit in rng.choice(8 * sum(sizes), FLIPS, replace=False):
        n = int(np.searchsorted(np.cumsum(sizes), bit // 8, "right"))
        file, at = files[n], int(bit) // 8 - sum(sizes[:n])
        on_rank_0(comm, flip, file, at, int(bit) % 8)
        text = refused(path, control)
        keys = [key for name, start, stop, key in spans if name == file.name and start <= at < stop]
        said = f"{path}: {file.name} is not what was saved: "
        if keys:
            # One bit is one tensor.
            assert text == f"{said}{keys[0]} changed"
        else:
            assert text.startswith(said)
            assert ("the SHA-256 at its end" if file.name == MANIFEST else "did not change, what is around did") in text
        in_tensor += len(keys)
        on_rank_0(comm, flip, file, at, int(bit) % 8)
    assert 0 < in_tensor < FLIPS
    require_whole(Checkpoint(path, control), 1, comm.size, comm.rank)


@pytest.mark.mpi
def test_files_of_another_length_are_refused(comm, control, folder):
    path = write(folder, 1, control)
    rng = np.random.default_rng(0)
    ends = {p["file"]: p for t in manifest_of(path)["tensors"].values() for p in t["pieces"] if p["bytes"][0] < p["bytes"][1]}
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        lengths = [0, 1, len(content) - 1, len(content) + 1, *rng.integers(2, len(content) - 1, 8)]
        for length in lengths:
            on_rank_0(comm, file.write_bytes, (content + b"\0")[:length])
            text = refused(path, control)
            assert f"{file.name} is not what was saved" in text
            if file.name != MANIFEST:
                assert f"should have {len(content)} bytes and has {length}" in text
                # The last piece is cut off, whatever is.
                key = ends[file.name]["key"]
                assert (f"{key} changed" in text or "more changed" in text) == (length < len(content)), text
        on_rank_0(comm, file.write_bytes, content)
    Checkpoint(path, control)


@pytest.mark.mpi
def test_a_deleted_file_is_named_with_the_tensors_in_it(comm, control, folder):
    path = write(folder, 1, control)
    last = f"rank-{comm.size - 1:04d}-of-{comm.size:04d}.safetensors"
    on_rank_0(comm, (path / last).unlink)
    text = refused(path, control)
    assert f"{last} is missing: " in text
    assert re.search(r"layers\.0\.W1.*should be in it", text)
    on_rank_0(comm, (path / MANIFEST).unlink)
    assert f"{path}: {MANIFEST} is missing" in refused(path, control)
    on_rank_0(comm, lambda: [file.unlink() for file in path.iterdir()])
    assert f"{path}: {MANIFEST} is missing" in refused(latest(folder), control)


@pytest.mark.mpi(min_size=2)
def test_swapped_files_say_whose_they_are(comm, control, folder):
    path = write(folder, 1, control)
    names = [f"rank-{r:04d}-of-{comm.size:04d}.safetensors" for r in range(2)]
    for old, new in ((names[0], "x"), (names[1], names[0]), ("x", names[1])):
        on_rank_0(comm, (path / old).rename, path / new)
    lines = refused(path, control).splitlines()
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith(f"{path}: {names[rank]} is not what was saved: ")
        assert " changed" in line
        assert line.endswith(f"step 1, rank {1 - rank}, ranks {comm.size}")


@pytest.mark.mpi
@pytest.mark.parametrize("foreign", ["step", "run", "added", "manifest", "manifest of the same step"])
def test_what_belongs_to_another_checkpoint_is_refused(comm, control, folder, foreign):
    path = write(folder / "a", 1, control)
    # Of the same shapes, with other values; another step as well, unless it is another run's same step.
    step = 1 if foreign in ("run", "manifest of the same step") else 2
    other = write(folder / "b", step, control, seed=2)
    file = f"rank-0000-of-{comm.size:04d}.safetensors"
    added = f"rank-0000-of-{comm.size + 1:04d}.safetensors"
    source = MANIFEST if "manifest" in foreign else file
    on_rank_0(comm, shutil.copy, other / source, path / (added if foreign == "added" else source))
    text = refused(path, control)
    should = {
        "step": f"{file} is not what was saved: .*; it calls itself .* step 2, rank 0,",
        "run": f"{file} is not what was saved: .* changed$",
        "added": f"{added} is not in {MANIFEST}: it belongs to another checkpoint",
        "manifest": f"{MANIFEST} is of step 2, its folder of step 1",
        "manifest of the same step": f"{file} is not what was saved: .* changed",
    }[foreign]
    assert re.search(should, text), text


def test_a_manifest_of_another_program_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "VERSION", 2)
    path = write(tmp_path, 1, Alone)
    monkeypatch.undo()
    assert "version 2: this program reads rankwise checkpoint, version 1" in refused(path, Alone)


def test_a_manifest_that_does_not_cover_its_arrays_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_require_covered", lambda tensors: None)
    path = save(tmp_path, 1, [Piece("W1", (4, 6), 1, 2, np.zeros((4, 4)))], {}, Alone)
    monkeypatch.undo()
    assert "W1 [4, 6] must be there exactly once, cut along one dim; there is W1[:, 2:6] in rank-0000" in refused(path, Alone)


# --- what is not saved


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ([(0, 0, 2), (0, 3, 4)], "x [4, 6] must be there exactly once, cut along one dim; there is x[0:2] in"),
        ([(0, 0, 2), (0, 1, 4)], "x [4, 6] must be there exactly once"),
        ([(0, 0, 3)], "x [4, 6] must be there exactly once"),
        ([(0, 0, 2), (1, 0, 3)], "x [4, 6] must be there exactly once"),
        ([(0, 0, 4), (0, 0, 4)], "x is there twice"),
    ],
)
def test_arrays_that_are_not_there_exactly_once_are_not_saved(tmp_path, held, text):
    x = np.zeros((4, 6))
    mine = [Piece("x", x.shape, dim, start, x[start:stop] if dim == 0 else x[:, start:stop]) for dim, start, stop in held]
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
    mine = [Piece("x", (4, 2), 0, 2 * odd, x[:2])] if odd or control.rank == 0 else []
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
    path = save(tmp_path, n, pieces("x", Layout((n, 2), 0, Cut(n, ((n - 4, n),))), 0, np.ones((4, 2))), {}, Alone)
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
    mine = pieces("x", Layout(large.shape, 0, even(comm.size, comm.size)), comm.rank, large[comm.rank : comm.rank + 1])
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
            yield Piece(f"x{n}", x.shape, 0, comm.rank, x[:1])

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


# --- what is kept


@pytest.mark.mpi
def test_older_steps_go_and_later_ones_stay(control, folder):
    for step in (3, 10, 7):
        write(folder, step, control)
    # 7 is the newest of its run, whoever was at 10 before.
    assert there(folder) == ["step-00000003", "step-00000007", "step-00000010"]
    write(folder, 8, control)
    assert there(folder) == ["step-00000007", "step-00000008", "step-00000010"]
    write(folder, 123_456_789, control, keep=1)
    assert there(folder) == ["step-123456789"]
    write(folder, 123_456_790, control, keep=3)
    assert len(there(folder)) == 2


@pytest.mark.mpi
def test_the_newest_is_found_by_number_and_leftovers_are_not(comm, control, folder):
    assert latest(folder) is None
    assert latest(folder / "nowhere") is None
    comm.Barrier()
    for step in (99_999_999, 100_000_000):
        write(folder, step, control)
    for name in (".step-100000007.partial", ".step-00000001.removed", "step-100000008.tmp", "step-200"):
        on_rank_0(comm, os.makedirs, folder / name / "inside")
    on_rank_0(comm, (folder / "step-100000009").touch)
    assert latest(folder) == folder / "step-100000000"
    write(folder, 100_000_001, control)
    assert [name for name in there(folder) if name.startswith(".")] == []


# --- kills


def test_killed_before_each_of_its_system_calls(tmp_path):
    """One process, which saves a third step and is killed before its first, second, ... call: at every one in turn."""
    calls = ("open", "write", "flush", "fsync", "close", "__exit__", "mkdir", "rename", "unlink", "rmdir", "scandir")
    before = tmp_path / "before"
    for step in (1, 2):
        write(before, step, Alone)
    # What an earlier kill has left: removing it can be killed too.
    (before / ".step-00000009.partial").mkdir()
    (before / ".step-00000009.partial" / "rank-0000-of-0001.safetensors").touch()
    outcomes = []
    for at in range(1000):
        folder = Path(shutil.copytree(before, tmp_path / f"{at}"))
        child = os.fork()
        if child == 0:
            left = at

            def count(frame, event, function):
                nonlocal left
                if event == "c_call" and function.__name__ in calls:
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            try:
                sys.setprofile(count)
                write(folder, 3, Alone)
                sys.setprofile(None)
                os._exit(0)
            finally:
                # Whatever was raised: this copy of pytest must not go on.
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        found = [int(p.name[5:]) for p in sorted(folder.glob("step-*"))]
        assert found in ([1, 2], [1, 2, 3], [2, 3]), "the older is not removed before the newer is complete"
        for step in found:
            require_whole(Checkpoint(folder / f"step-0000000{step}", Alone), step, 1, 0)
        outcomes.append(found)
        if status == 0:
            break
        write(folder, 4, Alone)
        assert there(folder) == [f"step-0000000{found[-1]}", "step-00000004"]
        shutil.rmtree(folder)
    assert status == 0
    # Before the commit, between it and the removal of the oldest, and after: each was met, in this order.
    counts = [outcomes.count(found) for found in ([1, 2], [1, 2, 3], [2, 3])]
    assert outcomes == [[1, 2]] * counts[0] + [[1, 2, 3]] * counts[1] + [[2, 3]] * counts[2]
    assert min(counts) > 1
    print(f"killed before, between and after: {counts}")


@pytest.mark.limit(30 + 6 * KILLS)
def test_killed_again_and_again_while_saving_the_newest_is_always_whole(tmp_path, comm):
    """Real ranks, one of which is killed at a random moment; another number of ranks goes on from what is left."""
    control = Control(comm)
    rng = np.random.default_rng()
    mine = [p for name, x in saving.contents(0).items() for p in pieces(name, saving.layouts(1)[name], 0, x)]
    save(tmp_path, 0, mine, {"next": 1}, control)
    steps, amid = [0], 0
    for n in range(KILLS):
        ranks = 2 + n % 2
        killed_one_of(ranks, tmp_path, rng)
        amid += bool(list(tmp_path.glob(".step-*.partial")))
        for path in tmp_path.glob("step-*"):
            saving.require_of_its_step(Checkpoint(path, control), 1, 0)
        steps.append(int(latest(tmp_path).name[5:]))
    print(f"{KILLS} kills, {amid} of them amid a save; newest steps {steps}")
    assert steps == sorted(steps)
    assert steps[-1] > 0
    assert amid > 0, "no kill came while something was being written: this showed nothing"
    control.close()


def killed_one_of(ranks, folder, rng):
    """Start the command that saves without end, on so many ranks, and kill one at a random moment."""
    launcher = [str(Path(sys.executable).parent / "mpirun"), "-n", f"{ranks}"]
    process = subprocess.Popen(
        [*launcher, sys.executable, "-m", "tests.cases.saving", str(folder)],
        cwd=ROOT,
        env=launcher_free(dict(os.environ)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        first_lines = []
        for line in process.stdout:
            first_lines.append(line)
            if line.startswith("pids "):
                break
        pids = first_lines[-1].split()[1:]
        assert len(pids) == ranks, "".join(first_lines)
        time.sleep(rng.uniform(0, 0.4))
        os.kill(int(rng.choice(pids)), signal.SIGKILL)
        process.communicate(timeout=20)
        assert not alive(pids, seconds=5)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
