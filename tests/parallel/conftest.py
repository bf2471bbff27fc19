import pytest

from parallel.control import Control


@pytest.fixture
def control(comm):
    own = Control(comm)
    yield own
    own.close()


@pytest.fixture
def folder(comm, tmp_path):
    """The same for all ranks."""
    return comm.bcast(tmp_path)
