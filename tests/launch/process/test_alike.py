"""Ranks that were given different options, files or versions are told so before any work, by name."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from launch.process.alike import OWN, Given, difference
from tests.inside import ran

MLP = ("--tokens", "5", "--d-model", "6", "--d-ff", "13", "--timed", "5,6,13", "--data", "none")
TRAIN = ("--layers", "1", "--d-model", "16", "--heads", "4", "--d-ff", "22", "--sequence-length", "24", "--batch-tokens", "144")


def given(**options) -> Given:
    return Given.of(argparse.Namespace(**options))


def none_asked(names):
    raise AssertionError(f"files are the same, and need not be read: {names}")


def of(every):
    """Digests as the ranks would exchange them."""
    return lambda names: [{name: g.digest(name) for name in names} for g in every]


def test_the_fewest_are_named_with_both_values():
    every = [given(lr=0.1), given(lr=0.3), given(lr=0.1)]
    assert difference(every, none_asked) == "--lr: rank 1 has 0.3, ranks 0 and 2 have 0.1: give all ranks the same"
    assert difference([given(lr=0.1)] * 3, none_asked) is None


def test_an_option_that_is_missing():
    assert difference([given(lr=1), given(lr=1, clip=2)], none_asked).startswith("--clip: rank 1 has 2, rank 0 has none: ")


def test_help_on_one_rank():
    assert difference([given(lr=1), Given.of(None)], none_asked).startswith("--help: rank 1 has True, rank 0 has False: ")


def test_versions():
    old = replace(given(), versions=given().versions | {"NumPy": "1.0"})
    assert "NumPy: rank 1 has 1.0, rank 0 has " in difference([given(), old], none_asked)


def test_files_are_read_only_where_they_are_not_one(tmp_path):
    (tmp_path / "a").write_text("text")
    (tmp_path / "b").write_text("text")
    same = given(text=tmp_path / "a")
    assert difference([same, given(text=tmp_path / "a")], none_asked) is None
    # As two hosts see two copies by one name.
    copied = replace(same, files=given(text=tmp_path / "b").files, paths=given(text=tmp_path / "b").paths)
    assert difference([same, copied], of([same, copied])) is None
    (tmp_path / "b").write_text("test")
    other = replace(same, files=given(text=tmp_path / "b").files, paths=given(text=tmp_path / "b").paths)
    assert difference([same, other], of([same, other])).startswith("the content of --text: rank 1 has ")


def test_a_folder_is_its_files(tmp_path):
    (tmp_path / "weights").write_text("1")
    before = given(model=str(tmp_path))
    (tmp_path / "weights").write_text("22")
    after = given(model=str(tmp_path))
    assert before.files["--model"] != after.files["--model"]
    assert given(model=str(tmp_path), prompt="no file\0", n=[1, 2]).files.keys() == {"--model", OWN}


def test_what_is_written_may_differ(tmp_path):
    (tmp_path / "out").write_text("1")
    assert Given.of(argparse.Namespace(trace=tmp_path / "out"), ["trace"]).files.keys() == {OWN}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("command", "words", "odd", "says"),
    [
        ("tp_mlp", MLP, ("--seed", "1"), "--seed: rank {r} has 1, "),
        ("tp_mlp", MLP, ("--activation", "relu"), "--activation: rank {r} has 'relu', "),
        ("tp_mlp", MLP, ("--timeout", "7"), "--timeout: rank {r} has 7.0, "),
        ("tp_mlp", MLP, ("--tokens", "0"), "rank {r}: argument --tokens: '0' is not a size"),
        ("train", TRAIN, ("--lr", "0.5"), "--lr: rank {r} has 0.5, "),
        ("train", TRAIN, ("--clip", "0.5"), "--clip: rank {r} has 0.5, "),
        ("train", TRAIN, ("--check-replicas", "1"), "--check-replicas: rank {r} has 1, "),
        ("dp_train", (), ("--steps", "3"), "--steps: rank {r} has 3, "),
    ],
)
def test_commands_refuse_ranks_that_differ(comm, command, words, odd, says):
    last = comm.size - 1
    done = ran(comm, command, *words, *(odd if comm.rank == last else ()))
    assert (done.status, done.out) == (2, "")
    # Of two ranks nobody knows which is the odd one: both are named.
    assert says.format(r=last).removesuffix(", ") in done.err, done.err
    assert len(done.err.splitlines()) == 1
