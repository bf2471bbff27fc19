"""Checkpoints that cannot be trusted: a flipped bit, a missing file, one of another checkpoint, another manifest."""

import random
import re
import shutil

import numpy as np
import pytest

from parallel import checkpoint as module
from parallel.checkpoint import Checkpoint, CheckpointError, Piece, latest, save
from parallel.manifest import MANIFEST, sealed
from parallel.shard import Layout
from parallel.shard_file import DTYPES
from tests.mutated import mutated
from tests.parallel.checkpoints import Alone, flip, manifest_of, on_rank_0, refused, require_whole, write

FLIPS = 200


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
    monkeypatch.setattr(module, "VERSION", 3)
    path = write(tmp_path, 1, Alone)
    monkeypatch.undo()
    assert "version 3: this program reads rankwise checkpoint, versions 1 to 2" in refused(path, Alone)


def test_a_manifest_that_does_not_cover_its_arrays_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "require_covered", lambda tensors: None)
    path = save(tmp_path, 1, [Piece("W1", (4, 6), (0, 2), np.zeros((4, 4)))], {}, Alone)
    monkeypatch.undo()
    assert "W1 [4, 6] must be there exactly once; there is W1[:, 2:6] in rank-0000" in refused(path, Alone)


# --- sealed, as anybody can seal one


def reseal(path, manifest):
    manifest.pop("sha256", None)
    (path / MANIFEST).write_bytes(b"".join(sealed(manifest)))


def own(manifest):
    (file,) = manifest["files"]
    return file


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/rank-0000-of-0001.safetensors", "other.safetensors", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    path = write(tmp_path, 1, Alone)
    manifest = manifest_of(path)
    file = own(manifest)
    shutil.copy(path / file, path.parent / "outside")
    manifest["files"] = {name: manifest["files"][file]}
    for tensor in manifest["tensors"].values():
        for piece in tensor["pieces"]:
            piece["file"] = name
    reseal(path, manifest)
    assert f"{MANIFEST} names {name!r} for rank 0: the file should be {file}, in its own folder" in refused(path, Alone)


@pytest.mark.parametrize("which", [MANIFEST, "rank-0000-of-0001.safetensors"])
def test_a_link_is_refused_though_what_it_leads_to_is_right(tmp_path, which):
    path = write(tmp_path, 1, Alone)
    (path / which).rename(path.parent / "elsewhere")
    (path / which).symlink_to(path.parent / "elsewhere")
    assert f"{which} is a link, which leads out of the checkpoint" in refused(path, Alone)


def test_a_manifest_is_sound_or_refused(tmp_path):
    """Sealed manifests with a few entries changed: refused in a line that says so, or all arrays can be read."""
    path = write(tmp_path, 1, Alone)
    manifest, draw = manifest_of(path), random.Random(0)
    del manifest["sha256"]
    refusals = 0
    for _ in range(400):
        reseal(path, mutated(manifest, draw))
        said = ""
        try:
            checkpoint = Checkpoint(path, Alone)
            for name in checkpoint.names:
                checkpoint.read(name, Layout(checkpoint.shape(name)), 0, DTYPES[checkpoint._tensors[name]["dtype"]])
        except CheckpointError as error:
            said = str(error)
        # Python's own errors would mean that something was used before it was checked.
        assert not re.search("(Type|Key|Index|Attribute|Value|Overflow)Error", said), said
        refusals += bool(said)
    assert 200 < refusals < 400
