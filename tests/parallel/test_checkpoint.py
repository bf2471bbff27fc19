"""Checkpoints: back on any mesh, to the bit; and which of them are kept."""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from parallel.checkpoint import Checkpoint, CheckpointError, latest, pieces, save
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.shard import Layout, even
from tests.harness import ROOT
from tests.parallel.checkpoints import Alone, flip, layouts, manifest_of, on_rank_0, refused, require_whole, there, whole, write


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
    cut = lambda dim: Layout(x.shape, {} if dim is None else {"tp": (dim, even(x.shape[dim], control.size))})  # noqa: E731
    place = {"tp": control.rank}
    mine = pieces("x", cut(saved), place, cut(saved).take(x, place))
    checkpoint = Checkpoint(save(folder, 0, mine, {}, control), control)
    assert (checkpoint.read("x", cut(read), place, "f8") == cut(read).take(x, place)).all()


@pytest.mark.mpi(min_size=4, max_size=4)
def test_two_axes_with_the_arrays_dealt_out_over_dp(comm, control, folder):
    with Mesh(comm, dp=2, tp=2) as mesh:
        mine = []
        for n, (name, layout) in enumerate(layouts(2).items()):
            if n % 2 == mesh.dp.rank:
                mine += pieces(name, layout, mesh.tp.place, layout.take(whole(3)[name], mesh.tp.place))
        path = save(folder, 3, mine, {}, control)
    require_whole(Checkpoint(path, control), 3, 4, control.rank)


@pytest.mark.mpi
def test_format_1_is_still_read(control):
    """Two ranks wrote it, before pieces were boxes."""
    require_whole(Checkpoint(ROOT / "tests/oracles/checkpoint-format-1/step-00000001", control), 1, control.size, control.rank)


@pytest.mark.mpi
def test_an_array_cut_over_two_axes(comm, control, folder):
    """Experts over ep, what each has over tp; read whole, and cut over one axis along a third dim."""
    ep = 2 if comm.size % 2 == 0 else 1
    x = np.random.default_rng(0).standard_normal((5, 6, 4))
    layout = Layout(x.shape, {"ep": (0, even(5, ep)), "tp": (2, even(4, comm.size // ep))})
    with Mesh(comm, ep=ep, tp=comm.size // ep) as mesh:
        mine = pieces("x", layout, mesh.place, layout.take(x, mesh.place))
        checkpoint = Checkpoint(save(folder, 1, mine, {}, control), control)
        assert (checkpoint.read("x", Layout(x.shape), {}, "f8") == x).all()
        other = Layout(x.shape, {"tp": (1, even(6, comm.size))})
        assert (checkpoint.read("x", other, {"tp": comm.rank}, "f8") == other.take(x, {"tp": comm.rank})).all()


@pytest.mark.mpi
@pytest.mark.parametrize("order", ["fortran", "strided", "reversed", "big-endian"])
def test_any_memory_order_is_written_as_it_reads(control, folder, order):
    layout = Layout((9, 4), {"tp": (0, even(9, control.size))})
    x = np.random.default_rng(0).standard_normal((9, 4)).astype("f4")
    place = {"tp": control.rank}
    part = layout.take(x, place)
    laid = {
        "fortran": np.asfortranarray(part),
        "strided": np.repeat(part, 2, axis=1)[:, ::2],
        "reversed": part[::-1].copy()[::-1],
        "big-endian": part.astype(">f4"),
    }[order]
    checkpoint = Checkpoint(save(folder, 0, pieces("x", layout, place, laid), {}, control), control)
    assert (checkpoint.read("x", layout, place, "f4") == part).all()
    swapped = checkpoint.read("x", layout, place, ">f4")
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
    checkpoint.read("table", layouts(comm.size)["table"], {"tp": comm.rank}, "f4")
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
        checkpoint.read("W1", Layout((3, 11)), {}, "f8")
    with pytest.raises(CheckpointError, match="has no tensor 'W1'"):
        checkpoint.shape("W1")
    with pytest.raises(CheckpointError, match=r"table is of shape \(13, 5\), it should be \(5, 13\)"):
        checkpoint.read("table", Layout((5, 13)), {}, "f4")
    for dtype in ("f8", "i4", "f2"):
        with pytest.raises(CheckpointError, match=f"table is float32, not {np.dtype(dtype)}: read it as float32"):
            checkpoint.read("table", Layout((13, 5)), {}, dtype)


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
