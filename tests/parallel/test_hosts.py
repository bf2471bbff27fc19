"""Who shares a host: numbers, leaders, and that MPI's own word is taken once."""

import pytest

from parallel import hosts
from parallel.hosts import Hosts, numbered
from parallel.mesh import Mesh


def test_hosts_are_numbered_by_their_first_rank():
    assert numbered(["b", "a", "b", "c"]) == (0, 1, 0, 2)
    assert numbered([7]) == (0,)


def test_leaders_are_the_numbers_that_every_host_has():
    known = Hosts((0, 0, 1, 0), 3)
    assert (known.host, known.number, known.leaders, known.most, known.count) == (0, 2, 1, 3, 2)
    assert (known.leads, known.shares, known.here) == (False, True, [0, 1, 3])
    assert known.led == [[[0, 1, 3], [2]]]
    assert Hosts((0, 1, 0, 1, 0), 1).led == [[[0, 4], [1]], [[2], [3]]]
    assert not Hosts((0, 1, 2), 1).shares


def test_every_rank_is_led_once():
    for given in ((0, 0, 1, 1), (0, 1, 1, 1), (0, 1, 0, 2, 2, 2)):
        led = Hosts(given, 0).led
        assert sorted(r for of_leader in led for ranks in of_leader for r in ranks) == [*range(len(given))]


@pytest.mark.mpi
def test_ranks_of_this_machine_share_it_and_an_axis_knows(comm):
    assert hosts.of(comm) == (0,) * comm.size
    duplicate = comm.Dup()
    assert hosts.of(duplicate) is hosts.of(comm)
    duplicate.Free()
    apart = tuple(7 - r // 2 for r in range(comm.size))
    with Mesh(comm, hosts=apart, tp=comm.size) as mesh:
        assert mesh.tp.hosts == tuple(r // 2 for r in range(comm.size))
        alone = mesh.tp.group([comm.rank])
        assert alone.hosts == (0,)
