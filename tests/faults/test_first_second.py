"""A rank that dies before MPI runs, or starves: all are gone, and one line says who and why."""

from __future__ import annotations

import os
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.ahead import ahead
from tests.faults.running import OPEN_MPI, Seen, run
from tests.grids import thinned

EARLY = Path(__file__).resolve().parent / "early"
MLP = ["-m", "launch.tp_mlp", "--tokens", "5", "--d-model", "6", "--d-ff", "13", "--timed", "200,300,600", "--data", "none"]
KILLED = r"^rank {r} of {n} (was (killed|ended) by SIG\w+|has left)"
# Alone, a rank needs no number.
KILLED_ALONE = r"^(rank {r} of {n} (was killed by SIG\w+|has left)|ended by SIGTERM$)"
# Without descriptors it may be the other rank whose library gives up, as this one does not answer it.
STARVED = r"^(\[\d\] |error: )?rank \d of {n} (failed: |was killed|has left|cannot allocate)"
# Where MPI could not start, it is not tried.
REFUSED = (
    r"^error: rank {r} of {n} may have \d+ (files open|MiB of addresses) \(`ulimit -[nv]`\), and .*: use `ulimit -[nv] \d+`"
)
ENDED = r"^rank {r} of {n} ended before it ran the command"
# MPICH's launcher ends all at once, and its page has the process and the signal, not the rank.
KILLED_FIRST = r"^=   PID \d+ RUNNING AT (?s:.*)\((signal 9|signal 11)\)"
FAILED = r"^\[{r}\] rank {r} of {n} failed: ImportError: planted at {what}"


def at_random(seed: int) -> tuple[int, int, str, bool]:
    """(ranks, the rank, what is planted there, under Open MPI): a signal in the first second."""
    draw = random.Random(seed)
    ranks = draw.choice((1, 2, 3, 4))
    rank = draw.randrange(ranks)
    return ranks, rank, f"signal={draw.choice((9, 11, 6, 15))},after={draw.uniform(0, 1):.3f}", seed % 10 == 0


# MiB of addresses, and descriptors: too few for imports, for MPI, for its ending, for a product.
SCARCE = thinned(
    [f"memory={n}" for n in (60, 100, 150, 170, 200, 240, 270, 320, 360)] + [f"files={n}" for n in range(8, 36, 2)],
    ["memory=60", "memory=270", "files=14", "files=34"],
)
# Less than this is refused, whatever a launcher passes on.
SURELY = {"memory": 264, "files": 26}
SEEDS = thinned(range(50), range(1, 6))
IMPORTS = {
    "at_numpy": (3, 1, "import=numpy", False),
    "at_the_options": (3, 0, "import=launch.options", False),
    "at_the_recorder": (2, 1, "import=parallel.recorder", False),
    "at_numpy_openmpi": (2, 1, "import=numpy", True),
    "at_numpy_alone": (1, 0, "import=numpy", False),
}
RUNS = (
    {f"seed{seed}": at_random(seed) for seed in SEEDS}
    | {name: IMPORTS[name] for name in thinned([*IMPORTS], [name for name in IMPORTS if name != "at_the_options"])}
    | {scarce: (2, 1, scarce, False) for scarce in SCARCE}
    # Before the first line of ours: what is left of the ranks has to see it.
    | {f"exit{code}": (3, 1, f"exit={code}", False) for code in thinned((0, 3), (3,))}
    | {"exit0_openmpi": (3, 1, "exit=0", True), "files6": (2, 1, "files=6", False)}
    | {f"kill{n}_before_our_first_line": (3, 1, f"kill={n}", False) for n in thinned((9, 11), (9,))}
    # MPI cannot have started: the others never come.
    | {f"signal{n}_while_mpi_starts": (2, 0, f"signal={n},after=1,late=numpy", False) for n in thinned((9, 11, 15), (15,))}
)


def form(ranks: int, planted: str) -> str:
    """The line that says why, as a regular expression."""
    kind, _, value = planted.partition("=")
    if kind == "import":
        return FAILED
    if kind == "exit" or planted == "files=6":
        return ENDED
    if kind == "kill":
        return KILLED_FIRST
    if kind in ("memory", "files"):
        return REFUSED if int(value) < SURELY[kind] else f"{REFUSED}|{STARVED}"
    return KILLED_ALONE if ranks == 1 else KILLED


def seen(ranks: int, rank: int, planted: str, other: bool = False) -> Seen:
    """A real run, with something planted in one rank's first second."""
    path = os.pathsep.join(filter(None, [str(EARLY), os.environ.get("PYTHONPATH")]))
    return run(ranks, MLP, limit=20, open_mpi=other, PLANTED=f"rank={rank},{planted}", PYTHONPATH=path)


@pytest.fixture(scope="module")
def runs(request):
    with ahead(request, ThreadPoolExecutor(2), lambda name: seen(*RUNS[name])) as begun:
        yield begun


@pytest.mark.limit(120)
@pytest.mark.parametrize("name", RUNS)
def test_all_are_gone_and_one_line_says_why(runs, name):
    ranks, rank, planted, other = RUNS[name]
    if other and not OPEN_MPI.exists():
        pytest.skip("Open MPI's environment is not there: `make test-openmpi` makes it")
    done: Seen = runs[name].result()
    assert done.status is not None, f"it hangs: {done}"
    assert not done.left, f"left behind: {done.left}\n{done}"
    if done.status == 0:
        # The signal came too late, or there was enough.
        assert planted.startswith(("signal", "memory", "files"))
        assert "late" not in planted
        assert done.err == "", str(done)
        return
    pattern = form(ranks, planted).format(r=rank, n=ranks, what=re.escape(planted.rpartition("=")[2]))
    # Of the libraries of two ranks that cannot reach one another, both may give up.
    times = (1, 2) if "files" in planted else (1,)
    # MPICH's launcher has its page on standard output.
    said = done.out if pattern == KILLED_FIRST else done.err
    assert len(re.findall(pattern, said, re.MULTILINE)) in times, f"nothing like {pattern!r}, or not once, in\n{done}"
