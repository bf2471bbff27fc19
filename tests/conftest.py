"""Tests run under mpirun: `make test`, or `mpirun -n 4 python -m pytest`, or plain `pytest` as one rank."""

import launch.start as start  # isort: skip  it settles threads and MPI before NumPy loads

import os
from pathlib import Path

import pytest
from pytest_mpi import MPIPlugin

from tests.harness import ROOT, Harness, OneLine

# The commands that tests start would be compiled at each start where the environment forbids bytecode beside the sources.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Reports are as wide in every terminal.
os.environ["COLUMNS"] = "80"
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".pytest_cache" / "bytecode"))


def pytest_addoption(parser):
    parser.addoption("--limit", type=float, default=60.0, help="seconds a test may take before all ranks' stacks are printed")
    parser.addoption("--claims", type=Path, help="a folder: files of tests that another run has claimed there are left to it")
    parser.addoption("--grace", type=float, default=3.0, help="seconds ranks may stay in a test after one has failed in it")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    world = start.begin()
    config.addinivalue_line("markers", "limit(seconds): this test's own time limit")
    manager = config.pluginmanager
    for plugin in [p for p in manager.get_plugins() if type(p) is MPIPlugin]:
        manager.unregister(plugin)
    manager.register(OneLine())
    manager.register(Harness(config, world), "harness")
    if world.rank:
        config.pluginmanager.get_plugin("terminalreporter")._tw._file = open(os.devnull, "w")  # noqa: SIM115


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """On a busy machine short work is long: it says nothing of itself, in these ranks."""
    monkeypatch.setattr("launch.terminal.progress.EVERY", float("inf"))


@pytest.fixture
def comm():
    """The world, as a communicator of the test's own."""
    own = start.begin().Dup()
    yield own
    own.Free()


@pytest.fixture
def shared(comm, tmp_path):
    """A folder that is the same on every rank: rank 0's."""
    return Path(comm.bcast(str(tmp_path)))
