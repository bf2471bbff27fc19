"""Tests that fail on purpose, for tests/test_harness.py; not collected by the suite."""

import os
import time

import numpy as np
import pytest

from parallel.mesh import Mesh

pytestmark = pytest.mark.mpi
ODD = 1


def reduce(comm):
    return Mesh(comm, tp=comm.size).tp.all_reduce(np.array([10 ** (3 * comm.rank)])).item()


def test_before_a_collective(comm):
    if comm.rank == ODD:
        raise ValueError("planted before the sum")
    reduce(comm)


def test_next(comm):
    assert reduce(comm) == sum(10 ** (3 * r) for r in range(comm.size))


def test_without_a_collective(comm):
    assert comm.rank != ODD, "planted assertion"


def test_stuck(comm):
    if comm.rank == ODD:
        time.sleep(60)
    reduce(comm)


def test_skip_on_one(comm):
    if comm.rank == ODD:
        pytest.skip("planted skip")


def test_fine(comm):
    pass


if os.environ.get("CASE_UNEVEN") and os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == str(ODD):

    def test_only_on_one_rank(comm):
        pass


class TestMarks:
    if os.environ.get("CASE_MARK"):

        @pytest.mark.mpi(minimum=3)
        def test_unknown_argument(self):
            pass
