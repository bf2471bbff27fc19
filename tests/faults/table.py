"""docs/faults.md: every case once, with what was said: `python -m tests.faults.table > docs/faults.md`."""

from __future__ import annotations

import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cases.planted import OUTSIDE
from tests.faults import inputs, served
from tests.faults.cases import DEATHS, FILES, HANGS, HARMLESS, MISMATCHES, NUMBERS, Case
from tests.faults.running import run
from tests.faults.scarce import SCARCE, Scarce
from tests.faults.scarce import seen as in_scarcity
from tests.faults.test_faults import prepared, seen
from tests.faults.test_first_second import seen as in_the_first_second
from tests.faults.test_waits import seen as waited_for
from tests.harness import ROOT
from tests.hosts import ends

HEAD = """# Faults, and what is said of them

Made by `python -m tests.faults.table` from real runs. Each run is a real command in which `RANKWISE_FAULT`
(`parallel/watch/fault.py`) plants one fault in one rank, the last. What the command says is cut short here; the status is that
of mpirun. `make faults` runs all faults on 2, 3 and 4 ranks, on each rank where that matters, and the most telling ones under
Open MPI. Space is that of a /dev/shm and a /tmp of the run's own. `make faults` also has 200 crashes, 50 kills of anything that
a job has, and 100 deadlocks and 100 kills of practice's checks in 64 MB of each: no process and no file is left.
"""
TITLES = {
    "Ranks that disagree": MISMATCHES,
    "Ranks that die": DEATHS,
    "Ranks that do not come (`--timeout 2`)": HANGS,
    "Numbers (`--check-replicas 1`, or the comparison alone)": NUMBERS,
    "Files": FILES,
    "What does no harm": HARMLESS,
}
LONGEST = 230
HOSTS = """## Hosts

Two hosts of two ranks each, h1 and h2 (`tests/hosts`: network namespaces of one machine), in sums that go on for ever, with
`--timeout 1`. Seconds are from the fault until mpirun had ended and no process was left on any host. What is said when all
processes of a host are killed, mpirun's own among them, is mpirun's: it ends before any rank can speak.

| fault | planted | seconds | said | status |
|---|---|---|---|---|"""
SERVED = """## The server, while it runs

`launch.serve` with `ulimit -n 80`, which leaves it room for few connections; keys are given with `--api-key`.

| asked | keys | answered |
|---|---|---|"""
SPACE = """## Space

| lacking | given | command | said | status |
|---|---|---|---|---|"""


# Of three ranks, rank 1: what befalls it before MPI runs.
EARLY = {
    "an import that fails": "import=numpy",
    "our own module fails": "import=parallel.recorder",
    "killed before MPI runs": "signal=9,after=0.05",
    "a segmentation fault before MPI runs": "signal=11,after=0.05",
    "SIGTERM before MPI runs": "signal=15,after=0.05",
    "an end before our first line": "exit=3",
    "killed before our first line": "kill=9",
    "killed while MPI starts": "signal=9,after=1,late=numpy",
    "SIGTERM while MPI starts": "signal=15,after=1,late=numpy",
    "60 MiB of addresses": "memory=60",
    "270 MiB of addresses": "memory=270",
    "6 descriptors": "files=6",
    "14 descriptors": "files=14",
    "34 descriptors": "files=34",
}
# What rank 2 is given, and the others are not.
ODD = ("--seed=3", "--trace=t.json", "--tokens=0", "--help")


def early(name: str) -> str:
    done = in_the_first_second(3, 1, EARLY[name])
    # Where no rank can speak, MPICH's launcher does, of a process.
    theirs = " ".join(line.strip("= ") for line in done.out.splitlines() if re.search("BAD TERM|PID|EXIT STRING", line))
    ours = first_of_ours(done.err)
    # What was printed before it, by Python or a library: its last line.
    before = [line for line in done.err.replace("`", "'").partition(ours)[0].splitlines() if line.strip()] if ours else []
    said = " ".join([*before[-1:], ours or theirs]).replace(str(ROOT), ".")
    return f"| {name} | `{EARLY[name]}` | mlp | `{said}` | {done.status} |"


def given(case: inputs.Input, tmp: Path) -> str:
    done = inputs.seen(case, tmp)
    typed = re.sub(r"/\S*?/tests/", "tests/", case.typed).replace("{tmp}/", "")
    typed = f"{case.before and f'{case.before}; '}{typed} {case.after}".strip().replace("|", "/")
    said = re.sub(r"\S*/inputs\S*?/|/tmp/\S*?/|/\S*?/tests/oracles/", "", next(iter(done.err.splitlines()), ""))
    return f"| {case.name} | `{typed}` | `{short(said)}` | {done.status} |"


def waits(kind: str) -> str:
    return f"| a rank that does not come: {kind} | | planted | `{first_of_ours(waited_for(kind).err)}` | 1 |"


def odd(option: str) -> str:
    words = ["-m", "launch.tp_mlp", "--tokens", "5", "--data", "none"]
    done = run(2, [*words, ":", "-n", "1", sys.executable, *words, option])
    return f"| another command line on rank 2 | `{option}` | mlp | `{first_of_ours(done.err)}` | {done.status} |"


def other_content() -> str:
    """Rank 2 is in another folder, where another file has the same name."""
    words = ["-m", "launch.train", "--steps", "1", "--text", "README.md", "--output", "/tmp/none"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "README.md").write_text("another text\n" * 500)
        args = [*words, ":", "-n", "1", "-wdir", folder, sys.executable, *words]
        done = run(2, args, PYTHONPATH=str(ROOT), PYTHONSAFEPATH="1")
    return f"| another text of this name on rank 2 | `--text README.md` | train | `{first_of_ours(done.err)}` | {done.status} |"


def first_of_ours(err: str) -> str:
    """The first line that this project has written."""
    said = next((line for line in err.splitlines() if re.match(r"(\[\d\] )?(error: )?ranks? \d|error: ", line)), "")
    return short(said)


def short(said: str) -> str:
    """As code in a table."""
    said = said.replace("|", "/").replace("`", "'")
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} …"


def on_hosts(case: ends.Case) -> str:
    done = ends.seen(case)
    said = first_of_ours(done.err) or next((line for line in done.err.splitlines() if line.startswith("[mpiexec")), "")
    planted = f"`{case.done}`" if case.done else ""
    seconds = "" if case.at_start else f"{done.gone:.1f}"
    return f"| {case.name} | {planted} | {seconds} | `{said}` | {done.status} |"


def scarce(case: Scarce) -> str:
    done = in_scarcity(case)
    said = next((line for line in done.err.splitlines() if line.startswith("error")), "" if done.status else "all agreed")
    given = [f"{name}: {value}" for name, value in case.mounts.items()] + [f"{n}={value}" for n, value in case.environ.items()]
    command = "practice check" if case.practice else "mlp" if case.ranks else "mlp, without mpirun"
    said = re.sub(r"/\S+/mpirun", ".venv/bin/mpirun", said)
    return f"| {case.name} | `{', '.join(given)}` | {command} | `{said}` | {done.status} |"


def row(case: Case, shared: Path) -> str:
    ranks = 3 if 3 in case.ranks else case.ranks[0]
    with tempfile.TemporaryDirectory() as own:
        done = seen(case, ranks, ranks - 1, False, shared, Path(own))
    # On a busy machine progress comes first.
    told = (line for line in done.err.splitlines() if line and not line.endswith(" left"))
    said = next((line for line in told if not line.startswith("=")), "")
    said = said or next((line for line in done.out.splitlines() if line.startswith(("WRONG", "all agreed"))), "")
    said = re.sub(r"\S*/run\S*?/|/tmp/\S*?/", "", said)
    fault = "" if case.fault is None else f"`{case.fault}`"
    return f"| {case.name} | {fault} | {case.command} | `{short(said)}` | {done.status} |"


def main() -> None:
    print(HEAD)
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(2) as pool:
        prepared(Path(tmp))
        for title, cases in TITLES.items():
            print(f"## {title}\n\n| fault | planted | command | said | status |\n|---|---|---|---|---|")
            print(*pool.map(lambda case: row(case, Path(tmp)), cases), "", sep="\n")
            sys.stdout.flush()
        for title, (make, kinds) in {
            "Before the work": (early, EARLY),
            "Ranks that were given other options": (odd, ODD),
            "Waits that are no verb (`--timeout 1`)": (waits, OUTSIDE),
        }.items():
            print(f"## {title}\n\n| fault | planted | command | said | status |\n|---|---|---|---|---|")
            more = [other_content()] if make is odd else []
            print(*pool.map(make, kinds), *more, "", sep="\n")
            sys.stdout.flush()
        inputs.prepared(Path(tmp, "inputs"))
        inputs.checkpoints(Path(tmp, "inputs"))
        for title, cases in inputs.INPUTS.items():
            print(f"## {title}\n\n| fault | typed | said | status |\n|---|---|---|---|")
            print(*pool.map(lambda case: given(case, Path(tmp, "inputs")), cases), "", sep="\n")
        print(SERVED, *served.rows(), "", sep="\n")
        print(SPACE, *pool.map(scarce, SCARCE), "", sep="\n")
        print(HOSTS, *map(on_hosts, ends.CASES), sep="\n")


if __name__ == "__main__":
    main()
