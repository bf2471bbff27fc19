import pytest

from parallel.control import Control
from parallel.mesh import Mesh


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


@pytest.fixture
def control(comm):
    control = Control(comm)
    yield control
    control.close()
