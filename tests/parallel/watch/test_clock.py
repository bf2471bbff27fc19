"""One clock for all ranks."""

from time import perf_counter

import pytest

from parallel.watch.clock import Clock, Reading, read


@pytest.mark.mpi
def test_clocks_are_read_within_the_stated_uncertainty(comm):
    """The ranks of one host share a clock; what is put off by a known time must be found so."""
    off = 0.25 * comm.rank
    reading = read(comm, lambda: perf_counter() + off)
    assert abs(reading.offset - off) <= reading.uncertainty
    assert reading.uncertainty < 0.1


def test_a_clock_that_drifts_is_followed():
    """This one is 1 s ahead at its 100 and 2 s at its 200."""
    clock = Clock(Reading(100.0, 1.0, 1e-6), Reading(200.0, 2.0, 3e-6))
    assert [clock.on_first(at) for at in (100.0, 150.0, 200.0)] == [99.0, 148.5, 198.0]
    assert (clock.drift, clock.uncertainty) == (0.01, 3e-6)
    assert Clock(Reading(100.0, 1.0, 1e-6)).on_first(150.0) == 149.0
