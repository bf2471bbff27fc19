from pathlib import Path

import pytest


@pytest.fixture
def shared(comm, tmp_path):
    """A folder that is the same on every rank: rank 0's."""
    return Path(comm.bcast(str(tmp_path)))
