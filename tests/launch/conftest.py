import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture
def one_thread():
    """BLAS threads as of a rank that has a core: several wait for one another, for long where others want the cores too."""
    with threadpool_limits(1, user_api="blas"):
        yield
