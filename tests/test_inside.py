"""Commands run inside the ranks that are there: what tests.inside returns of them, and that it can fail."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from launch import start
from launch.options import UsageError, parser
from parallel.control import Control
from tests.inside import inside, ran

pytestmark = pytest.mark.mpi


def command(main=lambda args, comm, opened: 0, check=lambda args, ranks: None):
    return SimpleNamespace(options=lambda: parser("fake", "A command of a test."), check=check, main=main)


def saying(text, rank=0, file="stdout", status=0):
    """The main of a command that says this on one rank, and ends so."""

    def main(args, comm, opened):
        if comm.rank == rank:
            print(text, file=getattr(sys, file))
        return status

    return command(main)


def test_what_the_first_rank_prints_comes_to_all_and_nothing_is_shown(comm, capsys):
    assert inside(comm, saying('{"ok": true}'), "--json") == {"ok": True}
    assert inside(comm, saying("all agreed")) == "all agreed\n"
    assert ran(comm, saying("a log", file="stderr", status=1)) == (1, "", "a log\n")
    print("shown")
    assert capsys.readouterr() == ("shown\n", "")


def test_what_a_check_has_opened_comes_to_main(comm):
    def main(args, comm, opened):
        if comm.rank == 0:
            print(args.seed, comm.size, opened)
        return 0

    kept = command(main, check=lambda args, ranks: f"opened for {ranks}")
    assert inside(comm, kept, "--seed", 5) == f"5 {comm.size} opened for {comm.size}\n"
    assert inside(comm, kept, ranks=1) == "0 1 opened for 1\n"


def test_options_and_input_that_cannot_be_used_are_one_line(comm):
    def check(args, ranks):
        # Only the last rank can see it.
        if comm.rank == ranks - 1:
            raise UsageError("cannot use it: use another")

    refused = "error: argument --seed: '-1' is not a seed: use a whole number of 0 or more"
    assert inside(comm, command(), "--seed", "-1", status=2) == refused
    rank = f"rank {comm.size - 1}: " if comm.size > 1 else ""
    assert inside(comm, command(check=check), status=2) == f"error: {rank}cannot use it: use another"


@pytest.mark.mpi(min_size=2)
def test_another_rank_that_prints_is_seen(comm):
    for file in ("stdout", "stderr"):
        with pytest.raises(AssertionError, match="printed by other ranks than the first"):
            inside(comm, saying("rank 1 is here", 1, file))


@pytest.mark.mpi(min_size=2)
def test_ranks_that_end_differently_are_seen(comm, monkeypatch):
    # `outcome` settles the status on all ranks; this is one that forgot to.
    monkeypatch.setattr(start, "outcome", lambda args, problem, check, main, comm: comm.rank)
    with pytest.raises(AssertionError, match=r"statuses by rank: \[0, 1"):
        inside(comm, command())


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (saying("all agreed"), 1),
        (saying("WRONG", status=1), 0),
        (saying("no word of an error", file="stderr", status=2), 2),
        (saying("error: one\nerror: two", file="stderr", status=2), 2),
        (saying("error: on the wrong stream", status=2), 2),
        (command(lambda args, comm, opened: 2), 2),
    ],
    ids=["fine, not wrong", "wrong, not fine", "no error", "two errors", "on standard output", "silent"],
)
def test_another_end_or_another_error_is_seen(comm, said, status):
    with pytest.raises(AssertionError):
        inside(comm, said, status=status)


def test_communicators_that_a_command_leaves_are_freed(comm):
    left = []

    def main(args, own, opened):
        # As commands do, which end with their process.
        mesh = start.make_mesh(args, own, tp=own.size)
        mesh.tp.all_reduce(np.zeros(1))
        Control(own).close()
        left.extend([own, Control(own)._comm, mesh.tp._comm, mesh.tp.group(range(own.size))._comm, mesh.tp.duplicate()])
        left.extend(own.made)
        return 0

    inside(comm, command(main))
    # The axis' own, its group's, that of the agreement on what it does, and those of the two controls and of `outcome`.
    assert len(left) >= 5 + 7
    assert all(freed == MPI.COMM_NULL for freed in left)
    assert comm != MPI.COMM_NULL
