"""What is to be written is tried before any work, by every option of every command; no result is lost to a picture."""

import json
import os
import re
import resource
from importlib import import_module
from pathlib import Path

import pytest

from launch.__main__ import commands
from launch.terminal import targets
from tests.harness import ROOT
from tests.inside import ran

MODULES = {name: "bench.__main__" if name == "bench" else name for name in commands() if name != "practice"}
# What the parsers need; that it is of no use is not yet found out then.
NEEDED = {
    "generate": ["--tokens", "1"],
    "score": ["--tokens", "1,2"],
    "bench": ["mlp"],
    "trace": ["no-such-file"],
    "export": ["no-such-folder", "neither"],
}
NEEDED |= {"--explain-picture": ["--explain"], "plan --output": ["--table", "rows.csv"]}
# Options that name what is read.
READ = {"--model", "--draft", "--text-file", "--tokens-file", "--compare", "--plan", "--table", "FILE", "CHECKPOINT"}


def declared(module):
    return [a for a in module.options()._actions if isinstance(a.type, type) and issubclass(a.type, targets.Target)]


OPTIONS = [
    (name, (a.option_strings or [a.dest])[0], a.type)
    for name, module in MODULES.items()
    for a in declared(import_module(f"launch.{module}"))
]


def test_every_option_that_names_a_path_is_a_target_or_read():
    paths = {
        (a.option_strings or [a.metavar])[0]
        for module in MODULES.values()
        for a in import_module(f"launch.{module}").options()._actions
        if a.type is Path
    }
    assert paths == READ
    assert {"--trace", "--png", "--pictures", "--checkpoint", "--output", "--logits", "--gradients"} <= {
        o for _, o, _ in OPTIONS
    }


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(("name", "option", "kind"), OPTIONS, ids=[f"{name} {option}" for name, option, _ in OPTIONS])
def test_every_target_is_refused_before_any_work(comm, shared, monkeypatch, name, option, kind):
    module = import_module(f"launch.{MODULES[name]}")
    monkeypatch.setattr(module, "check", lambda *given: None)
    monkeypatch.setattr(module, "main", lambda *given: pytest.fail("work has begun"))
    needed = [word for key in (name, option, f"{name} {option}") for word in NEEDED.get(key, ())]
    target = [option, ROOT / "README.md" / "t"]
    # One that is given by its place comes last.
    done = ran(comm, module, *([*needed, *target] if option.startswith("--") else [*needed[:-1], target[1]]))
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"error: cannot write {option} {ROOT}/README.md/t: ")
    assert len(done.err.splitlines()) == 1


@pytest.fixture
def there(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/linked")
    return tmp_path


BAD = [
    (targets.File, "none/t.json", "there is no folder .*/none$"),
    (targets.File, "file/t.json", "/file is no folder"),
    (targets.File, "folder", "it is a folder: use the name of a file"),
    (targets.File, "/dev/null", "it is no ordinary file: use the name of one"),
    (targets.File, "/proc/t.json", "No such file or directory: use a file in a folder that may be written"),
    (targets.File, "n" * 250, "File name too long"),
    (targets.Picture, "none/none/t.png", "there is no folder .*/none$"),
    (targets.Picture, "file/none/t.png", "there is no folder .*/file$"),
    (targets.Folder, "none/none", "there is no folder .*/none$"),
    (targets.Folder, "file", "it is a file: use a folder"),
    (targets.Folder, "/proc/none", "use a folder that may be written"),
]


@pytest.mark.parametrize(("kind", "name", "why"), BAD)
def test_what_cannot_be_written_is_found_out(there, kind, name, why):
    before = sorted(there.rglob("*"))
    assert re.search(why, targets.problem(kind(there / name)) or "nothing")
    assert sorted(there.rglob("*")) == before


@pytest.mark.parametrize("kind", [targets.File, targets.Picture, targets.Folder])
def test_what_can_be_written_is_tried_and_nothing_left(there, kind):
    before = sorted(there.rglob("*"))
    good = {targets.File: ("new", "file", "link"), targets.Picture: ("new", "none/new"), targets.Folder: ("new", "folder")}
    assert [targets.problem(kind(there / name)) for name in good[kind]] == [None] * len(good[kind])
    assert sorted(there.rglob("*")) == before
    assert (there / "file").read_text() == "kept"


def test_a_full_disk_is_found_out(there):
    """A limit on the size of files, in place of a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert "File too large" in targets.problem(targets.File(there / "new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_written_is_whole_or_as_it_was(there):
    def half(file):
        file.write(b"half")
        raise ValueError("planted")

    assert targets.write(there / "file", half) == f"cannot write {there / 'file'}: planted"
    assert (there / "file").read_text() == "kept"
    assert targets.write(there / "new" / "t", lambda file: file.write(b"all")) is None
    assert targets.write(there / "link", lambda file: file.write(b"all")) is None
    assert (there / "new" / "t").read_text() == (there / "folder" / "linked").read_text() == "all"
    assert (there / "link").is_symlink()


@pytest.mark.mpi
def test_two_targets_have_two_names(comm, shared):
    same = ("--logits", shared / "a", "--gradients", shared / "folder" / ".." / "a")
    if comm.rank == 0:
        (shared / "folder").mkdir()
    done = ran(comm, "score", "--tokens", "1,2", *same)
    assert (done.status, done.err.startswith("error: --logits and --gradients both name ")) == (2, True)


QUICK = ("--layers", "1", "--d-model", "8", "--heads", "2", "--d-ff", "8", "--sequence-length", "8", "--batch-tokens", "16")
DRAWN = {
    "kv_cache": ("launch.pictures.cache.draw_kinds", ("--pictures",), "pictures"),
    "serving_bench": ("launch.pictures.occupancy.picture", ("--scheduler-only", "--requests", "4", "--png"), "png"),
    "pipeline": ("launch.pictures.schedule.draw", ("--simulate", "1,1,1,0", "--draw"), "picture"),
    "train": ("launch.pictures.curve.draw", (*QUICK, "--steps", "1", "--sample", "0", "--text", "TEXT", "--output"), "files"),
}


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("name", DRAWN)
def test_results_are_not_lost_to_a_picture(comm, shared, monkeypatch, name):
    def fails(*given):
        raise RuntimeError("planted")

    what, words, key = DRAWN[name]
    monkeypatch.setattr(what, fails)
    if comm.rank == 0:
        (shared / "text").write_bytes((ROOT / "README.md").read_bytes()[:500])
    comm.Barrier()
    done = ran(comm, name, "--json", *[shared / "text" if w == "TEXT" else w for w in words], shared / "out")
    assert done.status == 2
    assert re.fullmatch(r"error: cannot write \S+: planted", done.err.splitlines()[-1])
    told = json.loads(done.out)
    assert told["ok"]
    written = told[key] if isinstance(told[key], list) else [told[key]] * (told[key] is not None)
    assert all(os.path.exists(path) for path in written)
    assert len(written) == {"kv_cache": 3, "serving_bench": 0, "pipeline": 0, "train": 1}[name]
