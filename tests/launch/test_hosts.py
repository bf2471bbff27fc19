"""launch.hosts: who runs where, and a machine file that the planner reads; folders that not all hosts share are refused."""

from __future__ import annotations

import argparse
import os
import tomllib

import pytest

from launch import hosts
from launch.hosts import Rank, require_even
from launch.measure.hosts import bus, neighbours
from launch.options import UsageError
from launch.terminal import targets
from parallel import threads
from parallel.control import Control
from plan import machine
from plan.wired import GUESS, Link, Wired, written
from tests.grids import at
from tests.inside import inside


@at(1, 4)
@pytest.mark.mpi
def test_it_says_who_runs_where_and_the_planner_reads_what_it_measured(comm, shared):
    file = shared / "ours.toml"
    got = inside(comm, "hosts", "--largest", "65536", "--write-machine", file, "--json")
    (host,) = got["hosts"]
    assert (host["host"], host["ranks"]) == (os.uname().nodename, list(range(comm.size)))
    assert host["cores"] == threads.cores()
    assert abs(host["clock_offset_seconds"]) <= host["clock_uncertainty_seconds"] + 1e-3
    assert [(link["from"]["rank"], link["to"]["rank"]) for link in got["links"]] == [(0, 1)] * (comm.size > 1)
    assert {(s["way"], s["over"], s["ranks"]) for s in got["all_reduce"]} == (
        {(way, "inside a host", comm.size) for way in ("mpi", "shared")} if comm.size > 1 else set()
    )
    read = machine.read(file)
    assert (read.gpus_per_node, read.name) == (comm.size, "hosts")
    assert read.source["between.node_gbs"] == "no other host was there: as inside the host"


@pytest.mark.mpi(max_size=1)
def test_a_machine_file_needs_its_name(comm):
    assert "use FILE.toml" in inside(comm, hosts, "--write-machine", "ours.txt", status=2)


def test_what_was_measured_is_what_the_planner_reads():
    inside_host, between = Link(5e-6, 4e9), Link(50e-6, 1.1e8)
    text = written(Wired("ours", 4, 8.0, 6e10, 1.2e10, 4e-7, inside_host, 3e9, 2e-5, between, 0.8), "somewhere")
    read = machine.parsed(tomllib.loads(text))
    assert (read.gpus_per_node, read.memory_gib, read.peak("float32"), read.memory) == (4, 8.0, 6e10, 1.2e10)
    assert (read.inside.gbs, read.inside.alpha_us, read.inside.p2p_gbs) == (3.0, (20.0, 0.0), 4.0)
    assert (read.between.node_gbs, read.between.efficiency, read.between.alpha_us) == (0.11, 0.8, (50.0, 0.0))
    assert (read.source["between.node_gbs"], read.source["flash1"]) == ("somewhere", GUESS)


def test_hosts_that_make_no_mesh_are_refused():
    def ranks(*firsts):
        return [Rank(r, f"h{first}", first, 2, 1, 0.0, 0.0, 1.0) for r, first in enumerate(firsts)]

    require_even(ranks(0, 0, 2, 2), [[0, 1], [2, 3]])
    with pytest.raises(UsageError, match="h0 has 2, h2 has 1: give each the same"):
        require_even(ranks(0, 0, 2), [[0, 1], [2]])
    with pytest.raises(UsageError, match="do not follow one another"):
        require_even(ranks(0, 1, 0, 1), [[0, 2], [1, 3]])


def test_each_link_between_neighbours_is_measured_once():
    assert [neighbours([[0]] * n) for n in (1, 2, 3)] == [[], [(0, 1)], [(0, 1), (1, 2), (2, 0)]]
    assert bus(4, 1000, 0.5) == 3000


@at(3)
@pytest.mark.mpi(min_size=2)
def test_a_folder_that_not_all_see_is_refused(comm, shared, tmp_path):
    """As on hosts that do not share it: the last rank means a folder of its own by the same name."""
    control = Control(comm)
    for folder, blind in ((shared / "kept", False), (shared if comm.rank < comm.size - 1 else tmp_path, True)):
        args = argparse.Namespace(checkpoint=targets.FolderOfAll(folder), output=targets.File(tmp_path / "x"))
        problem = targets.unshared(args, comm.rank, control.everyone)
        seen = f"is not seen by rank {comm.size - 1}: use a folder that all hosts share"
        assert problem is None if not blind else problem.endswith(seen)
        control.wait()
        left = [name for name in os.listdir(shared) if name.startswith(".rankwise")]
        # Before any rank goes on to the next.
        control.wait()
        assert left == []
    control.close()
