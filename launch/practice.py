"""Practice: exercises with an examiner that names the mistake, and when each is due again.

With no verb: where you are, and the next command. NAME is an exercise's number or the beginning of its name; without it, the
current one. Your work is in workbook/, or in the folder that RANKWISE_WORKBOOK names; RANKWISE_EDITOR is opened by `start`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import FrameType
from typing import NoReturn

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

from launch.process import launcher, signals, words  # noqa: E402
from launch.terminal import targets  # noqa: E402
from launch.terminal.help import Parser, epilog  # noqa: E402
from launch.terminal.printable import lost, prepared  # noqa: E402
from practice import pages  # noqa: E402
from practice.check import Verdict, check  # noqa: E402
from practice.desk import screen  # noqa: E402
from practice.desk.desk import Desk, Refused  # noqa: E402
from practice.desk.show import home, read, show_list  # noqa: E402
from practice.exercise import Exercise, NoSuchExercise  # noqa: E402
from practice.run import NoRoom  # noqa: E402
from practice.schedule import RATINGS  # noqa: E402
from practice.workbook import Workbook, WorkbookError  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
# Verbs whose work would be lost where the workbook cannot be written.
WRITING = ("start", "check", "watch", "hint", "solution", "ask", "drill", "mock", "rate", "board", "interview")


STATUSES = ("fine", "a check has not passed, or an answer was wrong", "what cannot be done now: a line says what can be")


class Reference:
    """What check files are handed: the reference's modules by name, each loaded when it is first asked for."""

    def __getattr__(self, name: str) -> object:
        module = importlib.import_module(f"reference.{name}")
        setattr(self, name, module)
        return module


def command(ranks: int, job: str) -> list[str]:
    """What starts the learner's process: plain Python, or mpirun for several ranks."""
    own = [sys.executable, "-I", str(ROOT / "launch/process/practice_rank.py"), str(ROOT), str(ranks), job]
    if ranks == 1:
        return own
    beside = Path(sys.executable).parent / "mpirun"
    return [str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun", "-n", str(ranks), *own]


class _Parser(Parser):
    """One line for what is wrong, as all commands have it."""

    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def minutes(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is no time for a drill: use a whole number of minutes from 1 to 600")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: use a whole number from 0 to {2**32 - 1}")
    return int(text)


def day(text: str) -> date | None:
    if text == "none":
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no date: write 2026-12-20, or none") from None


def options() -> argparse.ArgumentParser:
    p = _Parser(
        prog="python -m launch.practice",
        usage="python -m launch.practice [VERB [NAME] [options]]",
        description=__doc__,
        epilog=epilog(("python -m launch.practice start 20", "python -m launch.practice check"), STATUSES),
    )
    verbs = p.add_subparsers(dest="verb", metavar="VERB", prog=p.prog)

    def verb(name: str, what: str, named: bool = True) -> argparse.ArgumentParser:
        v = verbs.add_parser(name, help=what, description=what, epilog=epilog((), STATUSES))
        if named:
            v.add_argument("name", nargs="?", metavar="NAME", help="number or beginning of the name (default: the current one)")
        return v

    v = verb("start", "write the scaffold of an exercise, without NAME the next one, into the workbook; never over your work")
    v.add_argument("--reset", action="store_true", help="begin anew; what stands there is kept in workbook/backup/")
    v = verb("check", "run your file: pass it, or say what is wrong")
    v.add_argument("--verbose", action="store_true", help="all that it prints")
    v.add_argument("--case", action="store_true", help="keep the failing case: its arrays, and a script that calls your code")
    v.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    v.add_argument("--seed", type=seed, help="of the inputs (default: drawn anew each time)")
    verb("watch", "check at each save; keys: h nudge, l list, n next, q quit, Enter check again")
    verb("hint", "the next of three nudges, marked in the attempt")
    v = verb("solution", "the solution; before a pass it asks first, and the attempt counts as Again")
    v.add_argument("--yes", action="store_true", help="without asking")
    verb("ask", "numeric questions on an exercise; an answer within 2 percent is right")
    v = verb("drill", "what is due, with a clock and no help; the examiner speaks at the end. `drill stop` ends it")
    v.add_argument("--minutes", type=minutes, help="length (default: the pace of its exercises)")
    v.add_argument("--topic", default="", help="of this topic only")
    v.add_argument("--no-hints", action="store_true", help="as every drill is")
    v = verb("mock", "a mock interview: short exercises of different topics by the clock, as in a drill", named=False)
    v.add_argument("--minutes", type=minutes, default=20, help="length (default: %(default)s)")
    v = verb("rate", "correct the rating of the last attempt")
    v.add_argument("rating", choices=[r.lower() for r in RATINGS.values()])
    v = verb("list", "all exercises: status, attempts, best time, what is due", named=False)
    v.add_argument("--due", action="store_true", help="only what is due")
    v.add_argument("--topic", default="", help="only this topic")
    v.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    verb("board", "write STATUS.md and READING.md into the workbook", named=False)
    v = verb("read", "the reading list; with a number what to take from it; with a mark set it", named=False)
    v.add_argument("number", nargs="?", metavar="N", help="number in the list")
    v.add_argument("mark", nargs="?", metavar="MARK", help="done, wip, or - for not read")
    v = verb("cheat", "the cheatsheet, or one topic of it", named=False)
    v.add_argument("topic", nargs="?", default="", help="beginning of a heading")
    verb("brief", "text for a chatbot: the task, your code, what the examiner says, and to nudge only")
    v = verb("interview", "the day of an interview: nothing is put off beyond a third of the days left", named=False)
    v.add_argument("date", type=day, help="as 2026-12-20, or none")
    v = verb("dev", "for authors of exercises", named=False)
    v.add_argument("what", choices=("check", "say", "run", "rights", "pages"), help="pages: all generated pages")
    v.add_argument("name", nargs="*", help="exercises (default: all)")
    v.add_argument("--file", type=Path, help="run: the file to run in place of the solution")
    v.add_argument("--quick", action="store_true", help="check: without mutants")
    v.add_argument("--seeds", type=int, default=200, help="rights: so many draws of the inputs (default: %(default)s)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        # `rate good` and `rate 20 good`, `read 3 -`: a single dash is no option here.
        args = options().parse_args(arguments)
        if (launcher.size() or 1) > 1:
            # With a status of their own the others would end rank 0 before it has spoken.
            if launcher.rank():
                return 0
            raise Refused("practice starts its own ranks: run it without mpirun")
        status = run(args)
        if unwritten := lost():
            raise Refused(unwritten)
        return status
    except SystemExit:
        # Help has been printed, or an error.
        if unwritten := lost():
            print(f"error: {unwritten}", file=sys.stderr)
            return 2
        raise
    except (Refused, NoSuchExercise, WorkbookError, NoRoom) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # The terminal has put ^C into the line.
        print(f"\n{words.SAID[signal.SIGINT]}", file=sys.stderr)
        return signals.status_of(signal.SIGINT)
    except OSError as error:
        unwritten = lost()
        if unwritten == "":
            return 0
        if unwritten is None and not str(error.filename).startswith(str(folder())):
            raise
        why = unwritten or f"{error.filename}: {error.strerror}: give RANKWISE_WORKBOOK a folder to write in"
        print(f"error: {why}", file=sys.stderr)
        return 2


def ended(number: int, frame: FrameType | None) -> NoReturn:
    if number in words.SAID:
        print(words.SAID[number], file=sys.stderr)
    sys.exit(signals.status_of(number))


def folder() -> Path:
    return Path(os.environ.get("RANKWISE_WORKBOOK") or ROOT / "workbook").expanduser()


def run(args: argparse.Namespace) -> int:
    if args.verb == "dev":
        from practice.desk import dev

        return dev.main(args, Reference(), command)

    if args.verb in WRITING and (why := targets.problem(targets.Folder(folder()))) is not None:
        raise Refused(f"cannot write workbook {folder()}: {why}: give RANKWISE_WORKBOOK a folder to write in")

    def judge(e: Exercise, path: Path) -> Verdict:
        return check(e, path.resolve(), Reference(), command, seed=getattr(args, "seed", None))

    desk = Desk(Workbook(folder(), say=lambda text: print(text, file=sys.stderr)), judge, print)
    match args.verb:
        case None:
            home(desk)
        case "start":
            desk.start(args.name, args.reset)
        case "check":
            passed, told = desk.check(args.name, args.verbose, args.json, args.case)
            if args.json:
                print(json.dumps(told, allow_nan=False))
            return 0 if passed else 1
        case "watch":
            from practice.desk import watch

            return watch.watch(desk, desk.choose(args.name))
        case "hint":
            desk.hint(args.name)
        case "solution":
            desk.solution(args.name, args.yes)
        case "ask":
            return 0 if desk.ask(args.name) else 1
        case "drill":
            if args.name == "stop":
                desk.stop()
            else:
                desk.drill(args.name, args.minutes, args.topic)
        case "mock":
            desk.mock(args.minutes)
        case "rate":
            desk.rate(args.name, args.rating)
        case "list":
            show_list(desk, args)
        case "board":
            for path in pages.write(desk.progress, desk.book.now(), desk.book.folder):
                print(f"written: {path}")
        case "read":
            read(desk, args.number, args.mark)
        case "cheat":
            desk.not_in_drill("cheatsheet")
            print(screen.page(pages.cheatsheet(args.topic)))
        case "brief":
            desk.brief(args.name)
        case "interview":
            desk.book.add("interview", date=args.date.isoformat() if args.date else None)
            home(desk)
    return 0


if __name__ == "__main__":
    # A kill, or a terminal that is closed, ends the learner's processes too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ended)
    if sys.stdin is not None:
        # An answer that is no text is a wrong answer.
        sys.stdin.reconfigure(errors="replace")
    if problem := prepared():
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
