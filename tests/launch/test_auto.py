"""launch.train --mesh auto: the planner's choice, what it says of it, and what is refused."""

from math import prod

import pytest

from launch import train as launch_train
from launch.options import AUTO, UsageError, mesh_or_auto
from launch.planning import here
from parallel.shard import AXES
from tests.inside import inside, ran

pytestmark = [pytest.mark.mpi, pytest.mark.limit(120)]

SMALL = ["--layers", 4, "--d-model", 32, "--heads", 4, "--sequence-length", 16, "--batch-tokens", 256, "--micro-batches", 2]
SMALL += ["--sample", 0, "--steps", 2, "--warmup", 1]
HELD = ("weights", "gradients", "optimizer", "gathered", "unsummed", "saved")


@pytest.fixture
def train(comm, shared):
    text = shared / "text"
    if comm.rank == 0:
        text.write_bytes(bytes(range(32, 126)) * 40)
    comm.Barrier()

    def run(*options, status=0, json=True):
        common = [*SMALL, "--text", text, "--output", shared / "out", *options]
        return inside(comm, "train", *common, *(["--json"] if json else []), status=status)

    return run


def test_a_mesh_is_chosen_and_holds_what_was_predicted(comm, train):
    got = train("--mesh", "auto", "--zero", 3)
    chosen = got["chosen"]
    assert got["mesh"] == chosen["mesh"]
    assert prod(got["mesh"].values()) == comm.size
    if comm.size > 1:
        assert 0 < chosen["predicted_seconds"] <= chosen["next"]["predicted_seconds"]
        assert chosen["next"]["mesh"] != chosen["mesh"]
    every = [got["memory"][f"{kind}_bytes_per_rank"] for kind in HELD if f"{kind}_bytes_per_rank" in got["memory"]]
    assert max(map(sum, zip(*every, strict=True))) == chosen["predicted_bytes"]


def choice(ranks, *options):
    """Before anything is sent."""
    args = launch_train.options().parse_args([*map(str, SMALL), "--mesh", "auto", *map(str, options)])
    return args, launch_train.check(args, ranks)


@pytest.mark.parametrize(("ranks", "possible"), [(1, 1), (2, 4), (3, 4), (4, 10)])
@pytest.mark.mpi(max_size=1)
def test_every_mesh_that_can_be_is_there(comm, ranks, possible):
    _, found = choice(ranks)
    assert len(found.candidates) == found.possible == possible
    assert {prod(c.task.axes.values()) for c in found.candidates} == {ranks}
    assert all(c.fullest > 0 for c in found.candidates)


@pytest.mark.mpi(max_size=1)
def test_only_what_fits_is_there_and_where_nothing_does_the_least_is_told(comm):
    _, found = choice(4)
    most, least = (of(c.fullest for c in found.candidates) / 2**20 for of in (max, min))
    _, some = choice(4, "--memory-mib", (most + least) / 2)
    assert 0 < len(some.candidates) < some.possible == found.possible
    assert max(c.fullest for c in some.candidates) <= (most + least) / 2 * 2**20
    said = r"--memory-mib 0.01 is too little for all of 10 meshes: use 1 or more, which \S+ needs"
    with pytest.raises(UsageError, match=said):
        choice(4, "--memory-mib", 0.01)


def test_it_is_the_fastest_by_the_plan_and_says_why(comm, monkeypatch, capsys):
    args, found = choice(comm.size)
    monkeypatch.setattr(here, "estimates", lambda args, control, comm, every, how: [1 / (1 + s.pp) + s.tp for s in every])
    task, chosen = found.made(args, comm)
    assert task.axes == dict.fromkeys(AXES, 1) | {"pp": comm.size}
    assert chosen["mesh"] == task.axes
    said = " ".join(capsys.readouterr().out.split())
    if comm.rank == 0 and comm.size > 1:
        assert f"--mesh pp={comm.size}: of {found.possible} possible the fastest by the plan" in said
        assert "; next " in said
    else:
        assert said == ("" if comm.rank else "--mesh dp=1: of 1 possible the only one that fits")


def test_the_limit_is_for_a_choice(comm):
    done = ran(comm, "train", "--mesh", f"dp={comm.size}", "--memory-mib", 4)
    assert done.status == 2
    assert "--memory-mib does nothing without --mesh auto" in done.err
    done = ran(comm, "train", "--mesh", "best")
    assert done.status == 2
    assert "'best' is no axis of a mesh" in done.err


def test_a_run_goes_on_on_the_mesh_that_is_chosen_then(comm, train, shared, monkeypatch):
    monkeypatch.setattr(here, "estimates", lambda args, control, comm, every, how: [-float(s.dp) for s in every])
    own = ("--mesh", "auto", "--checkpoint", shared / "kept", "--save-every", 2, "--steps", 4)
    first = train(*own)
    assert first["mesh"]["dp"] == comm.size
    assert mesh_or_auto("auto") == AUTO
    monkeypatch.setattr(here, "estimates", lambda args, control, comm, every, how: [-float(s.tp) for s in every])
    again = train(*own, "--resume")
    assert again["mesh"]["tp"] == comm.size
    assert again["loss"] == []


@pytest.mark.mpi(min_size=3, max_size=3)
def test_bench_plan_refuses_what_some_case_cannot_deal(comm):
    """8 sequences go to one rank and to four micro-batches, but not to three ranks along dp."""
    refused = inside(comm, "bench.__main__", "plan", status=2)
    assert refused == "error: cannot deal 8 sequences to 3 ranks, and to 4 micro-batches, evenly: use --tokens 3072"
