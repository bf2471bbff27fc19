"""Real commands with a fault planted in one of their ranks: each ends as promised, and says which rank, which verb, where.

`make faults` runs every case at every size (FAULTS=all); the suite runs each once, its size and its rank dealt out by turns.
"""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from parallel.watch.fault import ALTER, BEFALL
from tests.faults.cases import CASES, COMMANDS, NONZERO, Case
from tests.faults.running import OPEN_MPI, Seen, run
from tests.harness import ROOT

MESHES = {2: "dp=1,tp=2", 3: "dp=1,tp=3", 4: "dp=2,tp=2"}
ALL = os.environ.get("FAULTS") == "all"
# On two cores: most of a hang is waiting.
AT_ONCE = 3
# What a healthy run of a command takes, and the longest time limit of a case, many times over.
LIMIT = 45


def dealt() -> list[tuple[Case, int, int, bool]]:
    """(case, ranks, the rank with the fault, under Open MPI)."""
    found = []
    for i, case in enumerate(CASES):
        for n in case.ranks if ALL else [case.ranks[i % len(case.ranks)]]:
            every = range(n) if case.each else [n - 1]
            found += [(case, n, r, False) for r in (every if ALL else [every[i % len(every)]])]
    others = [case for case in CASES if case.open_mpi]
    return found + [(case, 3, 1, True) for case in (others if ALL else others[:2])]


DEALT = dealt()
NAMES = [f"{case.name}-{r}of{n}{'-openmpi' * other}".replace(" ", "_") for case, n, r, other in DEALT]


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
def runs(request, tmp_path_factory) -> dict[str, Future]:
    """The runs of the tests that were chosen, some at once, each begun before its test asks for it."""
    folder = prepared(tmp_path_factory.mktemp("faults"))
    chosen = {item.callspec.id for item in request.session.items if item.function is test_it_ends_as_promised}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {
            name: pool.submit(seen, *what, folder, tmp_path_factory.mktemp("run"))
            for name, what in zip(NAMES, DEALT, strict=True)
            if name in chosen
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.limit(4 * LIMIT)
@pytest.mark.parametrize(("case", "ranks", "rank", "other"), DEALT, ids=NAMES)
def test_it_ends_as_promised(request, runs, case, ranks, rank, other):
    if other and not OPEN_MPI.exists():
        pytest.skip("Open MPI's environment is not there: `make test-openmpi` makes it")
    done: Seen = runs[request.node.callspec.id].result()
    assert done.status is not None, f"still running after {LIMIT} s: {done}"
    assert not done.left, f"left behind: {done.left}\n{done}"
    assert done.status != 0 if case.status == NONZERO else done.status == case.status, str(done)
    pair = ranks in case.pairs or (case.command == "train" and ranks == 4)
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
    assert {"mlp", "attention", "train", "dp", "generate"} == {case.command for case in CASES}
    kinds = {re.search(r"kind=(\w+)", case.fault)[1] for case in CASES if case.fault}
    assert kinds - {"explode"} == {*BEFALL, *ALTER}, "every kind of fault has a case"
