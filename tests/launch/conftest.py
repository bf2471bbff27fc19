from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture
def shared(comm, tmp_path):
    """A folder that is the same on every rank: rank 0's."""
    return Path(comm.bcast(str(tmp_path)))


@pytest.fixture
def one_thread():
    """BLAS threads as of a rank that has a core: several wait for one another, for long where others want the cores too."""
    with threadpool_limits(1, user_api="blas"):
        yield
