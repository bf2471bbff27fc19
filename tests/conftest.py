"""Tests run under mpirun: `make test`, or `mpirun -n 4 python -m pytest`, or plain `pytest` as one rank."""

import launch.start as start  # isort: skip  it settles threads and MPI before NumPy loads

import pytest


def pytest_configure(config):
    start.begin()


@pytest.fixture
def comm():
    """The world, as a communicator of the test's own."""
    own = start.begin().Dup()
    yield own
    own.Free()
