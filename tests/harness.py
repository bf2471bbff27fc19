"""pytest on several ranks: one outcome a test, one report, and no rank that waits for another for ever.

Each rank runs pytest; after each test they exchange what happened on a communicator of the harness's own, so that a rank
that failed early cannot be paired with another's next test. A rank that does not come within the time limit, or soon after
another has failed, ends the run: every rank's Python stack is printed and all ranks are aborted.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from mpi4py import MPI
from pytest_mpi import MPIPlugin

from launch.process.watchdog import seen, table
from parallel.recorder import Recorder

ROOT = Path(__file__).resolve().parent.parent
# How long a verb of a mesh may take.
VERB_LIMIT = 20.0
# Whose mpirun ends as its ranks do. Others say a page of their own, with a status of their own.
MPICH = MPI.get_vendor()[0] == "MPICH"
PHASES = ("setup", "call", "teardown")


class OneLine(MPIPlugin):
    """pytest-mpi's marks and options without its page about the MPI library."""

    def pytest_terminal_summary(self, terminalreporter, exitstatus, *args):
        library = MPI.Get_library_version().split("\n")[0].split(",")[0]
        terminalreporter.write_line(f"{MPI.COMM_WORLD.size} ranks, {' '.join(library.split())}")


class Harness:
    def __init__(self, config: pytest.Config, world: MPI.Intracomm) -> None:
        self.config, self.comm = config, world.Dup()
        self.rank, self.size = world.rank, world.size
        self.limit, self.grace = config.getoption("--limit"), config.getoption("--grace")
        self.claims = config.getoption("--claims")
        if self.claims and self.size > 1:
            raise pytest.UsageError("--claims is for runs on one rank")
        self.mine = cache(partial(claimed, self.claims)) if self.claims else lambda file: True
        self.item: pytest.Item | None = None
        self.started = self.failed = 0.0
        self.failure = ""
        self.recorder = Recorder.of(world)
        self.folder = Path(self.comm.bcast(tempfile.mkdtemp() if self.rank == 0 else None))
        self.pids = self.comm.allgather(os.getpid())
        self.stacks = open(self.folder / f"stack-{self.rank}", "w")  # noqa: SIM115  open as long as the process
        # A signal handler in C: it prints the Python stack of a rank that is blocked inside MPI too.
        faulthandler.register(signal.SIGUSR1, file=self.stacks, all_threads=False)
        # The real standard error, not what pytest captures.
        capture = config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            self.stderr = os.dup(2)
        threading.Thread(target=self._watch, daemon=True).start()

    # --- the limit

    def _watch(self) -> None:
        while True:
            time.sleep(0.1)
            item, now = self.item, time.monotonic()
            if item is None:
                continue
            mark = item.get_closest_marker("limit")
            limit = mark.args[0] if mark else self.limit
            if self.failed and now - self.failed > self.grace:
                self._end(f"{item.nodeid}: rank {self.rank} failed, and the others did not come", self.failure)
            elif self.recorder.stuck() > VERB_LIMIT:
                self._end(f"{item.nodeid}: rank {self.rank} has been in one verb for {VERB_LIMIT:g} s", self.failure)
            elif now - self.started > limit:
                self._end(f"{item.nodeid}: not finished after {limit:g} s", self.failure)

    def _end(self, why: str, failure: str) -> None:
        """Print every rank's stack, once, and end all ranks."""
        try:
            os.close(os.open(self.folder / "ending", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(10)
        for pid in self.pids:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(0.3)
        text = [f"\n=== {why}", table(seen(self.recorder), [[]] * self.size)]
        if failure:
            text.append(f"--- rank {self.rank} of {self.size} failed:\n{failure}")
        for rank in range(self.size):
            # The harness's and pytest's own frames say nothing about the test.
            lines = (self.folder / f"stack-{rank}").read_text().splitlines()
            inner = [line for line in lines if not re.search(r"_pytest|pluggy|runpy|/pytest/", line)]
            text.append("\n".join([f"--- stack of rank {rank} of {self.size}", *inner]))
        os.write(self.stderr, ("\n".join(text) + "\n").encode())
        # The launcher drops what it has not yet passed on when the job is aborted.
        time.sleep(0.3)
        # An abort waits for the main thread, which may be in a long computation.
        threading.Timer(1.0, os._exit, (1,)).start()
        MPI.COMM_WORLD.Abort(1)

    # --- one outcome a test

    def exchange(self, mine: object) -> list:
        """What every rank passed. Ranks that wait are asleep; the watch ends a wait for one that never comes."""
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.0002)
        return self.comm.allgather(mine)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        if not self.mine(item.path):
            return True
        if self.claims and nextitem is not None and nextitem.path != item.path:
            # Who takes that file is not settled: everything is torn down.
            nextitem = None
        self.failed, self.failure, self.started, self.item = 0.0, "", time.monotonic(), item
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = {r.when: r for r in runtestprotocol(item, log=False, nextitem=nextitem)}
        every = self.exchange({when: (r.outcome, r.longreprtext) for when, r in reports.items()})
        self.item = None
        for when in PHASES:
            phase = [e.get(when, ("absent", "")) for e in every]
            outcomes = {outcome for outcome, _ in phase}
            if outcomes == {"absent"}:
                continue
            if len(outcomes) > 1 or "failed" in outcomes:
                reports.setdefault(when, reports["setup"])
                reports[when].outcome, reports[when].longrepr = "failed", self._merged(phase)
                if hasattr(reports[when], "wasxfail"):
                    del reports[when].wasxfail
            item.ihook.pytest_runtest_logreport(report=reports[when])
            if len(outcomes) > 1 and when != "teardown":
                item.ihook.pytest_runtest_logreport(report=reports["teardown"])
                break
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _merged(self, phase: list[tuple[str, str]]) -> str:
        """One text for all ranks: the failures, or if none failed the odd outcomes, grouped by what they say."""
        told = [p for p in phase if p[0] == "failed"] or phase
        groups = {p: [r for r, other in enumerate(phase) if other == p] for p in dict.fromkeys(told)}
        return "\n".join(f"[{outcome} on rank(s) {ranks} of {self.size}]\n{text}" for (outcome, text), ranks in groups.items())

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> object:
        outcome = yield
        report = outcome.get_result()
        if report.failed and not self.failed:
            self.failure, self.failed = report.longreprtext, time.monotonic()

    # --- what is run, and how it ends

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Files without a test for several ranks are not imported by them."""
        if self.size > 1 and collection_path.match("test_*.py") and "mark.mpi" not in collection_path.read_text():
            return True
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("mpi"):
                if mark.args or mark.kwargs.keys() - {"min_size", "max_size"}:
                    raise pytest.UsageError(f"{item.nodeid}: the mpi mark takes min_size and max_size, not {mark}")
                if self.size > mark.kwargs.get("max_size", self.size):
                    reason = f"for at most {mark.kwargs['max_size']} ranks, these are {self.size}"
                    item.add_marker(pytest.mark.skip(reason=reason))
        if self.size > 1:
            # Pure logic needs no ranks: it is tested by the run on one.
            pure = [item for item in items if item.get_closest_marker("mpi") is None]
            items[:] = [item for item in items if item.get_closest_marker("mpi") is not None]
            config.hook.pytest_deselected(items=pure)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        ids = "\n".join(item.nodeid for item in session.items)
        found = self.exchange(blake2b(ids.encode()).hexdigest())
        if len(set(found)) > 1:
            raise pytest.UsageError(
                f"the ranks collected different tests: {[found.index(f) for f in found]} (rank of the first alike)"
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        session.exitstatus = max(self.exchange(int(exitstatus)))

    def pytest_unconfigure(self) -> None:
        # A launcher ends the ranks that still print when the first one leaves with a status.
        self.exchange(None)
        self.stacks.close()
        (self.folder / f"stack-{self.rank}").unlink()
        self.exchange(None)
        if self.rank == 0:
            self.folder.rmdir()


def claimed(folder: Path, file: Path) -> bool:
    """Whether this run is the first that comes to a file of tests, of those that share them out in `folder`."""
    try:
        (folder / str(file.relative_to(ROOT)).replace("/", ".")).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def launcher_free() -> dict[str, str]:
    """The environment without what an outer mpirun has put there for its own ranks."""
    # For each test pytest sets and deletes a variable, also while another thread reads this.
    environ = {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}
    kept = ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_MCA_rmaps_default_mapping_policy")
    ours = re.compile(r"PMI|PMIX|OMPI_|PRTE|HYDRA|HYDI|MPI_|MPIR_|.*_NUM_THREADS$|VECLIB|RANKWISE_KEPT")
    return {k: v for k, v in environ.items() if k.startswith(kept) or not ours.match(k)}


def begun(ranks: int, *args: str, stderr: int = subprocess.PIPE, **more: object) -> subprocess.Popen[str]:
    """`mpirun -n ranks python *args` (ranks 0: plain python) from the root of the project, as a user would type it."""
    launcher = [str(Path(sys.executable).parent / "mpirun"), "-n", str(ranks)] if ranks else []
    more = {"env": launcher_free()} | more
    return subprocess.Popen(
        [*launcher, sys.executable, *args],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        **more,
    )


def mpirun(ranks: int, *args: str, timeout: float = 60, **environ: str) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    process = begun(ranks, *args, env=launcher_free() | environ)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"mpirun -n {ranks} {' '.join(args)}: still running after {timeout} s\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def command(name: str, ranks: int, *args: str, status: int = 0, timeout: float = 120) -> dict | str:
    """launch.NAME as a user types it: its JSON, or with a status other than 0 its one line of error."""
    done = mpirun(ranks, "-m", f"launch.{name}", *args, timeout=timeout)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if not status:
        return json.loads(done.stdout)
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]
