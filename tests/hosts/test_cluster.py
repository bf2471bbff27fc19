"""Hosts on one machine: they are apart, they are gone afterwards, and ranks on them compute what ranks of one host do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import MPICH
from tests.hosts import same
from tests.hosts.cluster import FRONT, Cluster, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no hosts: {why_not()}")


def said(cluster, host, *command):
    return subprocess.run(cluster.on(host, command), capture_output=True, text=True, check=True).stdout.strip()


def test_hosts_are_apart_and_side_by_side():
    with Cluster.up(2) as cluster, Cluster.up(1, gbit=1) as other:
        assert [said(cluster, host, "hostname") for host in (FRONT, "h1", "h2")] == [FRONT, "h1", "h2"]
        said(cluster, "h2", "sh", "-c", "echo x >/tmp/x; echo y >/dev/shm/y")
        assert cluster.left() == {FRONT: [], "h1": [], "h2": ["/dev/shm/y", "/tmp/x"]}
        assert other.left() == {FRONT: [], "h1": []}
        assert "rate 1Gbit" in said(other, "h1", "tc", "qdisc", "show", "dev", "eth0")
        said(cluster, "h1", "sh", "-c", "getent hosts h2 && ! getent hosts h3")
        processes = [cluster.process(host) for host in (FRONT, "h1", "h2")]
    assert not cluster.state.exists()
    assert not other.state.exists()
    # A process that nobody has reaped yet has no namespaces any more.
    assert not any(Path(f"/proc/{pid}/ns/net").exists() for pid in processes)


@pytest.mark.skipif(not MPICH, reason="mpirun's options that put ranks on the hosts are MPICH's")
@pytest.mark.limit(180)
def test_ranks_of_two_hosts_compute_what_those_of_one_do(tmp_path):
    with Cluster.up(2) as cluster:
        numbers, apart, _ = same.compared(cluster, "tp_mlp")
        assert numbers > 100
        assert apart == []
        assert not any(cluster.left(patience=2).values())


def test_what_is_asked_by_hand_is_refused_in_a_line():
    command = [sys.executable, "-m", "tests.hosts", "--name", "none", "down"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: no such cluster is up: python -m tests.hosts up 3\n")
