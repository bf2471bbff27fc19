"""launch.practice as it is typed: every verb, on a workbook of the test's own. The learner's code runs in real processes."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest

from launch import practice as command
from practice.check import check
from practice.desk.desk import Desk, Refused, number_of
from practice.exercise import every, find
from practice.pages import papers
from practice.workbook import Workbook
from tests.harness import ROOT, launcher_free, mpirun

NO_B2 = ("@ W2_FD + b2_D", "@ W2_FD")
BIAS = ("(x_Tf @ W_fD)\n    return y_TD + b_D", "(x_Tf @ W_fD + b_D)\n    return y_TD")


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_WORKBOOK", str(tmp_path / "book"))
    monkeypatch.delenv("RANKWISE_EDITOR", raising=False)
    # What an outer mpirun says of this process is not said of the command.
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "book"


@pytest.fixture
def typed(book, capsys):
    """Type a command in this process: its standard output; with a status of 2 its line of error."""

    def run(*words, status=0):
        assert command.main(words) == status
        out, err = capsys.readouterr()
        if status != 2:
            assert err == ""
            return out
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


def solve(book, name, *edits):
    """Write the solution of an exercise, changed, as the learner's file."""
    text = find(name).solution
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    (book / f"{find(name).name}.py").write_text(text)


def test_a_newcomer_comes_from_the_first_screen_to_a_first_pass(book, typed):
    """Each command is the one that the screen before it names."""

    def run(*words, status=0, own_process=False):
        if own_process:
            done = mpirun(0, "-m", "launch.practice", *words)
            assert (done.returncode, done.stderr) == (status, "")
        out = done.stdout if own_process else typed(*words, status=status)
        assert "\033" not in out
        assert max(map(len, out.splitlines())) <= 90
        return out

    first = run(own_process=True)
    assert f"{len(every())} exercises" in first
    assert "python -m launch.practice start " in first
    assert not book.exists()
    started = run("start")
    assert "01_mlp_forward.py" in started
    assert "python -m launch.practice check" in started
    assert "mlp_forward: not implemented yet (0 of 1 functions done)" in run("check", status=1)
    solve(book, "01", NO_B2)
    wrong = run("check", status=1, own_process=True)
    assert "y = h W2   (right: each once; missing: b2)" in wrong
    assert "The second bias b2 is never added." in wrong
    assert "nudge 1 of 3" in run("hint")
    solve(book, "01")
    passed = run("check")
    assert re.search(r"Passed .*pace 10 min.* 1 nudge · Hard · again on", passed)
    assert "start        02 mlp_backward" in passed
    assert "1 of " in run()
    assert [p.name[:14] for p in (book / "done").iterdir()] == ["01_mlp_forward"]


def test_a_parallel_exercise_starts_its_ranks_by_itself(book, typed):
    typed("start", "lin")
    solve(book, "20", BIAS)
    told = json.loads(typed("check", "--json", "--seed", "3", status=1))
    assert (told["passed"], told["check"]) == (False, 1)
    assert [p["status"] for p in told["parts"]] == ["ok", "ok", "wrong", "ok"]
    assert told["parts"][2]["mistakes"] == ["bias_before_sum"]
    assert told["counts"]["row_forward"][2]["all_reduce"] == 1
    brief = typed("brief")
    assert "No code" in brief
    assert "The bias is added on every rank" in brief
    solve(book, "20")
    assert re.search(r"(?s)It cost, on the rank with most.*1 all_reduce", typed("check"))


def test_work_is_never_overwritten(book, typed):
    typed("start")
    solve(book, "01", NO_B2)
    mine = (book / "01_mlp_forward.py").read_text()
    assert "goes on" in typed("start", "01")
    assert (book / "01_mlp_forward.py").read_text() == mine
    typed("start", "--reset")
    assert [p.read_text() for p in (book / "backup").iterdir()] == [mine]
    (book / "02_mlp_backward.py").write_text("mine, from before")
    assert "holds work" in typed("start", "02", status=2)
    solve(book, "01")
    typed("check")
    typed("start", "01")  # passed and kept: it may make room
    assert "NotImplementedError" in (book / "01_mlp_forward.py").read_text()


def test_the_solution_asks_first_and_marks_the_attempt(book, typed, monkeypatch):
    assert "has not been begun" in typed("solution", "01", status=2)
    typed("start")
    solve(book, "01", NO_B2)
    (book / "answer").write_text("n\n")
    with open(book / "answer") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert "a_TF = x_TD" not in typed("solution")
    shown = typed("solution", "--yes")
    assert "a_TF = x_TD" in shown
    assert "+    y_TD = h_TF @ W2_FD + b2_D" in shown
    solve(book, "01")
    out = typed("check")
    assert "with the solution · Again" in out
    assert "Hard" in typed("rate", "01", "hard")


def test_a_second_pass_is_compared_with_the_first(book, typed):
    for edits in ((), (("a_TF = x_TD @ W1_DF + b1_F", "a_TF = b1_F + x_TD @ W1_DF"),)):
        typed("start", "01")
        solve(book, "01", *edits)
        out = typed("check")
    assert "Last time, " in out
    shown = typed("solution")
    assert "--- your pass before: 01_mlp_forward." in shown
    assert "+    a_TF = b1_F + x_TD @ W1_DF" in shown
    assert typed("hint").count("· nudge ") == 3


def test_questions_are_answered_in_numbers(book, typed, monkeypatch):
    typed("start")
    (book / "answers").write_text("1_769_000\n512\n1\n")
    with open(book / "answers") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        out = typed("ask", status=1)
    assert "right: 1.76947e+06 = " in out
    assert "both needed; right is 1,024" in out
    assert "that is ReLU" in out
    assert [e["right"] for e in Workbook(book).log if e["what"] == "ask"] == [True, False, False]
    assert [number_of(t) for t in ("46,080", "2.5e3", "3/4", "three", "1/0")] == [46080, 2500, 0.75, None, None]


class Drill:
    """A desk with a clock of its own."""

    def __init__(self, book):
        self.time = datetime.fromisoformat("2026-11-23T12:00:00+01:00")
        self.lines, self.book = [], book
        self.desk = Desk(Workbook(book, now=lambda: self.time), self.judge, self.lines.append)

    @staticmethod
    def judge(exercise, path):
        return check(exercise, path, command.Reference(), command.command)

    def said(self):
        text = "\n".join(self.lines)
        self.lines.clear()
        return text


@pytest.fixture
def drill(book):
    return Drill(book)


def test_in_a_drill_the_examiner_is_silent_until_the_end(drill, book):
    drill.desk.drill("01", 25, "")
    assert "01 mlp_forward" in drill.said()
    solve(book, "01", NO_B2)
    drill.desk.check(None, verbose=False)
    assert drill.said() == "01 mlp_forward · 0 of 1"
    for verb in (drill.desk.hint, drill.desk.brief, lambda _: drill.desk.solution(None, True), drill.desk.ask):
        with pytest.raises(Refused, match="25:00 are left"):
            verb(None)
    with pytest.raises(Refused):
        drill.desk.start("02", reset=False)
    drill.time += timedelta(minutes=11)
    drill.desk.stop()
    said = drill.said()
    assert "drill over · 11:00 · 01 mlp_forward 0 of 1" in said
    assert "Again  again on 24 Nov" in said
    assert "The second bias b2 is never added." in said
    assert drill.desk.progress.status("01_mlp_forward") == "WIP"


def test_a_drill_ends_with_its_last_pass_and_goes_on_before(drill, book):
    drill.desk.book.add("drill", minutes=40, exercises=["01_mlp_forward", "17_adamw"])
    drill.desk._deal("01_mlp_forward")
    solve(book, "01")
    drill.time += timedelta(minutes=4)
    assert drill.desk.check(None, verbose=False)[0]
    assert drill.desk.progress.current == "17_adamw"
    solve(book, "17")
    drill.time += timedelta(minutes=9)
    drill.desk.check(None, verbose=False)
    said = drill.said()
    assert "01 mlp_forward 1 of 1 in 4:00" in said
    assert re.search(r"01 mlp_forward +Easy", said)
    assert re.search(r"17 adamw +Good", said)
    assert drill.desk.progress.drill is None
    assert drill.desk.progress.status("17_adamw") == "DONE"


def test_after_the_bell_a_pass_is_late_and_an_untouched_file_is_not_rated(drill, book):
    drill.desk.drill("01", 5, "")
    solve(book, "01")
    drill.time += timedelta(minutes=6)
    assert drill.desk.check(None, verbose=False)[1]["drill"] == "over"
    assert "after the bell" in drill.said()
    (late,) = drill.desk.progress.attempts
    assert (late.passed, late.late, late.rating) == (False, True, 2)
    drill.desk.drill("02", 5, "")
    drill.desk.stop()
    assert "nothing was begun" in drill.said()
    assert drill.desk.progress.attempts[-1].rating is None


def test_lists_and_pages(book, typed):
    told = json.loads(typed("list", "--json"))
    assert [r["exercise"] for r in told["exercises"]] == [e.name for e in every()]
    assert typed("list", "--due") == "Nothing is due.\n"
    assert "Megatron-LM (" in typed("read")
    assert "5  DONE  Megatron-LM" in typed("read", "5", "done")
    assert "5  -  Megatron-LM" in typed("read", "5", "-")
    typed("board")
    assert re.search(r"^\| 20 \| tensor parallelism +\| exercises/20_linear ", (book / "STATUS.md").read_text(), re.MULTILINE)
    assert "2 (p-1)/p" in typed("cheat", "comm")
    assert "interview in" in typed("interview", (datetime.now() + timedelta(days=9)).date().isoformat())


ERRORS = {
    ("start", "nothing"): f"'nothing' is no exercise: use 1 to {len(every())}, or a name that python -m launch.practice list",
    ("start", "mlp"): "'mlp' is the beginning of several: use one of",
    ("check",): "no exercise has been started: python -m launch.practice start",
    ("check", "20"): "start 20",
    ("check", "--seed", "-1"): "is no seed",
    ("drill", "stop"): "no drill is running",
    ("drill", "--minutes", "0"): "from 1 to 600",
    ("drill", "--topic", "origami"): "use one of MLP,",
    ("read", "99"): f"from 1 to {len(papers())}",
    ("read", "1", "maybe"): "use done, wip or -",
    ("cheat", "origami"): "is no topic",
    ("rate", "01", "good"): "no finished attempt",
    ("interview", "soon"): "write 2026-12-20",
    ("juggle",): "juggle",
    ("watch", "20"): "start 20",
}


@pytest.mark.parametrize("words", ERRORS, ids=" ".join)
def test_what_cannot_be_done_is_one_line(words, typed, book):
    assert ERRORS[words] in typed(*words, status=2)
    assert not list(book.glob("*"))


def test_a_newer_workbook_is_refused_and_an_unreadable_one_kept(book, typed, capsys):
    book.mkdir()
    (book / "progress.json").write_text('{"version": 9}')
    assert "newer rankwise" in typed("list", status=2)
    (book / "progress.json").write_text("{")
    assert command.main(["list"]) == 0
    assert "It is kept as progress.unreadable-" in capsys.readouterr().err


def test_a_workbook_that_cannot_be_is_one_line(book, typed):
    book.write_text("a file")
    # Before any work: `check` would run the learner's file first.
    for words in (["start"], ["check", "20"], ["board"]):
        assert f"cannot write workbook {book}: it is a file: use a folder: give RANKWISE_WORKBOOK" in typed(*words, status=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_its_status(book, typed, number):
    typed("start", "20")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.practice", "watch", "20"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    said = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}[number]
    assert (process.returncode, err.splitlines()[-1]) == (128 + number, said)


def test_under_mpirun_it_says_so_once(book):
    done = mpirun(2, "-m", "launch.practice")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines().count("error: practice starts its own ranks: run it without mpirun") == 1


# --- a terminal


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *words, **environ):
        self.master, slave = pty.openpty()
        environ = launcher_free() | {"TERM": "xterm"} | environ
        run = [sys.executable, "-m", "launch.practice", *words]
        own = {"stdin": slave, "stdout": slave, "stderr": slave, "cwd": ROOT, "env": environ}
        self.process = subprocess.Popen(run, **own, start_new_session=True)
        os.close(slave)

    def until(self, text, seconds=30):
        """What it has written since, up to `text`."""
        seen, end = "", time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([self.master], [], [], 0.2)[0]:
                seen += os.read(self.master, 4096).decode()
        return seen

    def press(self, keys):
        os.write(self.master, keys.encode())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)


def test_watch_checks_at_each_save_and_knows_its_keys(book, typed):
    typed("start")
    with Terminal("watch") as terminal:
        assert "not implemented yet" in terminal.until("q quit")
        solve(book, "01", NO_B2)
        assert "\033[31m--" in terminal.until("q quit")
        terminal.press("h")
        terminal.until("nudge 1 of 3")
        solve(book, "01")
        assert "\033[32mPassed" in terminal.until("q quit")
        terminal.press("n")
        terminal.until("02 mlp_backward")
        terminal.until("q quit")
        terminal.press("q")
        assert terminal.process.wait(timeout=10) == 1
    assert [e["what"] for e in Workbook(book).log][-2:] == ["start", "check"]


def test_colours_are_not_for_everyone(book, typed):
    typed("start")
    solve(book, "01", NO_B2)
    with Terminal("check", NO_COLOR="1") as terminal:
        assert "\033" not in terminal.until("hint")


def test_watch_without_a_terminal_prints_lines_and_ends_at_an_interrupt(book, typed):
    typed("start")
    run = [sys.executable, "-m", "launch.practice", "watch"]
    own = {"cwd": ROOT, "env": launcher_free(), "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(run, **own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = []
    try:
        while not seen or not seen[-1].startswith("watching"):
            seen.append(process.stdout.readline())
            assert seen[-1], process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "not implemented yet" in "".join(seen)
