"""Real commands with a fault planted in one of their ranks: each ends as promised, and says which rank, which verb, where.

`make faults` runs every case at every size. The suite leaves out what is like another, and deals out sizes and ranks
by turns.
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parallel.watch.fault import ALTER, BEFALL
from tests.ahead import ahead
from tests.faults.cases import CASES, COMMANDS, NONZERO, Case
from tests.faults.running import OPEN_MPI, Seen, run
from tests.grids import thinned
from tests.harness import ROOT

MESHES = {2: "dp=1,tp=2", 3: "dp=1,tp=3", 4: "dp=2,tp=2"}
CHOSEN = thinned(CASES, [case for case in CASES if not case.alike])
# On two cores: most of a hang is waiting.
AT_ONCE = 3
# Seconds: many times what a healthy run takes, and the longest time limit of a case.
LIMIT = 45


def dealt() -> list[tuple[Case, int, int, bool]]:
    """(case, ranks, the rank with the fault, under Open MPI)."""
    found = []
    for i, case in enumerate(CHOSEN):
        for n in thinned(case.ranks, [case.ranks[i % len(case.ranks)]]):
            every = range(n) if case.each else [n - 1]
            found += [(case, n, r, False) for r in thinned(every, [every[i % len(every)]])]
    others = [case for case in CASES if case.open_mpi]
    return found + [(case, 3, 1, True) for case in thinned(others, others[:2])]


def named(case: Case, ranks: int, rank: int, other: bool) -> str:
    return f"{case.name}-{rank}of{ranks}{'-openmpi' * other}".replace(" ", "_")


DEALT = dealt()
NAMES = [named(*what) for what in DEALT]


def prepared(tmp: Path) -> Path:
    """A folder with what the commands read: a text, and models that cannot be used."""
    (tmp / "text.txt").write_bytes((ROOT / "README.md").read_bytes()[:3000])
    model = ROOT / "tests/oracles/families/llama"
    for name in ("short", "bare"):
        (tmp / name).mkdir()
        shutil.copy(model / "model.safetensors", tmp / name)
    shutil.copy(model / "config.json", tmp / "short")
    whole = tmp / "short/model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    return tmp


def damaged_checkpoint(tmp: Path) -> None:
    """One byte of one file of a checkpoint, the other way round."""
    done = run(1, arguments(Case("", None, "train", more=("--checkpoint", str(tmp / "damaged"))), 1, tmp))
    assert done.status == 0, done
    file = next((tmp / "damaged").glob("step-*/rank-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def arguments(case: Case, ranks: int, tmp: Path) -> list[str]:
    words = ["-m", *COMMANDS[case.command].split(), *case.more]
    return [w.format(mesh=MESHES.get(ranks, f"dp=1,tp={ranks}"), tmp=tmp) for w in words]


def seen(case: Case, ranks: int, rank: int, other: bool, shared: Path, own: Path) -> Seen:
    for path in shared.iterdir():
        (own / path.name).symlink_to(path)
    if case.name == "a damaged checkpoint":
        damaged_checkpoint(own)
    fault = None if case.fault is None else f"rank={rank},{case.fault}"
    return run(ranks, arguments(case, ranks, own), fault, LIMIT, other)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    shared = prepared(tmp_path_factory.mktemp("faults"))
    folders = {name: tmp_path_factory.mktemp("run") for name in NAMES}

    def work(case: Case, ranks: int, rank: int, other: bool) -> Seen:
        return seen(case, ranks, rank, other, shared, folders[named(case, ranks, rank, other)])

    with ahead(request, ThreadPoolExecutor(AT_ONCE), work) as begun:
        yield begun


@pytest.mark.limit(4 * LIMIT)
@pytest.mark.parametrize(("case", "ranks", "rank", "other"), DEALT, ids=NAMES)
def test_it_ends_as_promised(request, runs, case, ranks, rank, other):
    if other and not OPEN_MPI.exists():
        pytest.skip("Open MPI's environment is not there: `make test-openmpi` makes it")
    done: Seen = runs[request.node.callspec.id].result()
    assert done.status is not None, f"still running after {LIMIT} s: {done}"
    assert not done.left, f"left behind: {done.left}\n{done}"
    assert done.status != 0 if case.status == NONZERO else done.status == case.status, str(done)
    pair = case.command == "train" and ranks == 4
    partner = rank ^ 1 if rank ^ 1 < ranks else rank - 1
    others = [str(r) for r in range(ranks) if r != rank and (r == partner or not pair)]
    listed = f"ranks {', '.join(others[:-1])} and {others[-1]}" if len(others) > 1 else f"rank {others[0]}"
    for text, patterns in ((done.err, case.says), (done.out, case.prints)):
        for words in patterns:
            pattern = words.replace("{r}", str(rank)).replace("{o}", listed).replace("{n}", str(ranks))
            assert re.search(pattern, text), f"nothing like {pattern!r} in\n{done}"
    # The first cause, once.
    assert len(re.findall(r"(?m)^(\[\d\] )?rank \d of \d (failed|was killed|has left)", done.err)) <= 1, str(done)
    if case.status == 0:
        assert done.err == "", str(done)
        assert done.out.rstrip().splitlines()[-1].startswith("all agreed"), str(done)
    if case.status == 2:
        assert done.err.count("error: ") == 1, str(done)
        assert "Traceback" not in done.err, str(done)


def test_there_are_forty():
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    assert sum(case.open_mpi for case in CASES) >= 10
    assert {*COMMANDS} == {case.command for case in CASES}
    chosen = [case for case in CASES if not case.alike]
    kinds = {re.search(r"kind=(\w+)", case.fault)[1] for case in chosen if case.fault}
    assert kinds - {"explode"} == {*BEFALL, *ALTER}, "every kind of fault has a case in the suite"
    assert {case.command for case in chosen} == {case.command for case in CASES}
    assert len({ranks for _, ranks, _, _ in DEALT}) == 3
