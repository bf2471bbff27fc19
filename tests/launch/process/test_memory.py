"""Memory: what a host has left, and what asks for more is refused before any work; an array that there is no room for."""

import time

import pytest

from launch.process import memory
from tests.harness import ROOT, mpirun
from tests.inside import inside

MIB = 2**20
LLAMA = ("--model", ROOT / "tests/oracles/families/llama")
MEMINFO = "MemTotal: 9000 kB\nMemAvailable:    8192 kB\n"


@pytest.mark.parametrize(
    ("files", "kib"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 8192),
        # Version 2: the host's path, of which a container sees the top alone; no limit; a limit above one.
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/memory.max": "max"}, 8192),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/memory.max": str(4096 * 1024),
                "sys/fs/cgroup/a/memory.current": str(3096 * 1024),
                "sys/fs/cgroup/a/memory.stat": f"file 5\ninactive_file {1000 * 1024}\n",
                "sys/fs/cgroup/a/b/memory.max": "max",
            },
            2000,
        ),
        # Version 1.
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n3:memory:/x",
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(100 * 1024),
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": str(120 * 1024),
                "sys/fs/cgroup/memory/x/memory.stat": f"inactive_file 1\ntotal_inactive_file {30 * 1024}\n",
            },
            10,
        ),
    ],
)
def test_what_is_left_is_the_least_of_the_host_and_the_groups(tmp_path, files, kib):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.available(tmp_path) == (None if kib is None else 1024 * kib)


def test_all_ranks_of_a_host_ask_together(monkeypatch):
    monkeypatch.setattr(memory.launcher, "local_size", lambda: 4)
    assert memory.lacking(100 * MIB, 8, None) is None
    assert memory.lacking(100 * MIB, 8, 400 * MIB) is None
    assert memory.lacking(100 * MIB, 8, 399 * MIB) == "100.0 MiB on each of 4 ranks, and this host has 399.0 MiB free"
    # These ranks are not all that were started.
    assert memory.lacking(3 * 2**30, 1, 2**31) == "3.0 GiB, and this host has 2.0 GiB free"


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        (
            "serve",
            ("--port", "0", "--kv-memory-mib", "900000000"),
            "--kv-memory-mib 900000000 and the model's weights ",
        ),
        ("serving_bench", ("--kv-blocks", "900000000"), "--kv-blocks 900000000 and the model's weights "),
    ],
)
def test_a_cache_beyond_the_hosts_memory_is_refused(comm, command, words, says):
    refused = inside(comm, command, *LLAMA, *words, status=2)
    assert refused.startswith(f"error: {says}take ")
    # What it says would be right is.
    most = refused.rpartition(" ")[2]
    assert "free: use at most" in refused
    assert 0 < int(most) < 900000000


@pytest.mark.mpi(max_size=2)
@pytest.mark.parametrize("command", ["generate", "score", "speculate", "serving_bench", "serve"])
def test_weights_beyond_the_hosts_memory_are_refused(comm, monkeypatch, command):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    words = {"serve": ("--port", "0"), "serving_bench": ()}.get(command, ("--tokens", "1,2"))
    assert "error: the weights of " in (refused := inside(comm, command, *LLAMA, *words, status=2))
    assert "use more hosts, or a smaller model" in refused


@pytest.mark.mpi(max_size=2)
def test_training_beyond_the_hosts_memory_is_refused(comm):
    refused = inside(comm, "train", "--d-model", "9999360", "--text", ROOT / "README.md", status=2)
    assert refused.startswith("error: the model, its gradients and the optimizer's state take 51.2 PiB")


@pytest.mark.parametrize("ranks", [0, 2])
def test_an_array_that_there_is_no_room_for_is_one_line(ranks):
    begun = time.monotonic()
    done = mpirun(ranks, "-m", "launch.tp_mlp", "--d-model", "1000000000", "--d-ff", "1000000000", timeout=30)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.startswith(f"error: rank {done.stderr[12]} of {ranks or 1} cannot allocate ")
    assert "an array with shape (1000000000, " in done.stderr
    assert ", at layers/linear.py:" in done.stderr
    assert done.stderr.endswith(": use smaller sizes\n")
    assert len(done.stderr.splitlines()) == 1
    assert time.monotonic() - begun < 2 + 3
