"""The workbook's log, what is derived from it, and when an exercise is due. No learner's code runs here."""

import json
import os
import random
import subprocess
import sys
from datetime import date, datetime, timedelta

import pytest

from practice import pages, schedule, workbook
from practice.exercise import every, find
from practice.progress import DRILL, GUIDED, chosen, progress
from practice.schedule import AGAIN, EASY, GOOD, HARD
from practice.workbook import Workbook, WorkbookError
from tests.grids import thinned
from tests.harness import ROOT
from tests.mutated import mutated

NOON = datetime.fromisoformat("2026-11-23T12:00:00+01:00")
FIRST, SECOND = "01_mlp_forward", "20_linear"


class Clock:
    def __init__(self):
        self.time = NOON

    def __call__(self):
        return self.time

    def pass_(self, **span):
        self.time += timedelta(**span)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def book(tmp_path, clock):
    return Workbook(tmp_path / "book", now=clock)


def derived(book):
    return progress(book.log, every())


def checked(book, name, passed=False, **facts):
    book.add("check", exercise=name, passed=passed, right=int(passed), of=1, mistakes=[], **facts)


def passes(book, clock, name=FIRST, mode=GUIDED, minutes=5):
    """An attempt that passes at its first check."""
    book.add("start", exercise=name, mode=mode)
    clock.pass_(minutes=minutes)
    checked(book, name, passed=True)


# --- when it is due


def days(ratings, interview=None):
    """Days until the next practice, each time practised on the day it is due."""
    now, reviews, found = NOON, [], []
    for rating in ratings:
        reviews.append((now, rating))
        due = schedule.recall(reviews, now, interview).due
        found.append((due.date() - now.date()).days)
        now = due + timedelta(hours=12)
    return found


def test_the_days_are_those_for_interviews():
    assert days([GOOD] * 6) == [1, 3, 8, 19, 43, 45]
    assert days([HARD] + [GOOD] * 5) == [1, 2, 4, 8, 16, 30]
    assert days([GOOD] * 3 + [AGAIN] + [GOOD] * 2) == [1, 3, 8, 1, 2, 3]


def test_before_an_interview_nothing_is_put_off_for_more_than_a_third_of_what_is_left():
    assert days([GOOD] * 5, date(2026, 12, 14)) == [1, 3, 5, 4, 2]
    assert days([GOOD] * 4, date(2026, 11, 1)) == days([GOOD] * 4)


def test_what_is_due_today_is_due_from_the_morning_on():
    due = schedule.recall([(NOON, GOOD)], NOON).due
    assert (due.hour, due.date()) == (0, date(2026, 11, 24))
    assert schedule.recall([], NOON) is None
    assert schedule.recall([(NOON, GOOD)], NOON + timedelta(days=9)).likely < 0.9


def rated(**facts):
    return schedule.rating(
        **{"passed": True, "drill": False, "late": False, "solution": False, "nudges": 0, "checks": 2, "pace": 1.0} | facts
    )


def test_a_pass_its_time_and_its_help_are_the_rating():
    assert rated() == GOOD
    assert rated(nudges=1) == rated(pace=1.6) == rated(checks=9) == rated(late=True, passed=False) == HARD
    assert (rated(mistakes=2), rated(mistakes=3)) == (GOOD, HARD)
    assert rated(solution=True) == rated(passed=False) == AGAIN
    assert rated(drill=True, checks=1, pace=0.5) == EASY
    assert rated(drill=True, checks=1, pace=0.6) == rated(checks=1, pace=0.5) == GOOD


# --- what the log says


def test_an_attempt_is_from_a_blank_file_to_a_pass(book, clock):
    book.add("start", exercise=FIRST, mode=GUIDED)
    clock.pass_(minutes=4)
    checked(book, FIRST)
    clock.pass_(minutes=1)
    book.add("hint", exercise=FIRST, number=1)
    clock.pass_(hours=2)  # lunch
    checked(book, FIRST, passed=True, saved=(clock() - timedelta(minutes=3)).isoformat())
    (a,) = derived(book).attempts
    assert (a.checks, a.nudges, a.passed, a.rating) == (2, 1, True, HARD)
    assert a.seconds == (4 + 1 + 10 + 3) * 60
    checked(book, FIRST)  # afterwards: no attempt goes on
    assert derived(book).attempts == [a]


def test_status_is_done_by_a_drill_without_help_and_lost_by_one_that_fails(book, clock):
    def status():
        return derived(book).status(FIRST)

    def drill(passed):
        book.add("drill", minutes=25, exercises=[FIRST])
        book.add("start", exercise=FIRST, mode=DRILL)
        clock.pass_(minutes=9)
        checked(book, FIRST, passed=passed)
        book.add("drill_end", untouched=[])

    assert status() == "-"
    passes(book, clock)
    assert status() == "WIP"
    drill(True)
    assert status() == "DONE"
    passes(book, clock)
    assert status() == "DONE"
    drill(False)
    assert status() == "WIP"
    assert [a.rating for a in derived(book).attempts] == [GOOD, GOOD, GOOD, AGAIN]


def test_who_begins_anew_after_seeing_the_solution_is_rated_again(book, clock):
    book.add("start", exercise=FIRST, mode=GUIDED)
    book.add("start", exercise=FIRST, mode=GUIDED)
    book.add("solution", exercise=FIRST)
    clock.pass_(minutes=3)
    passes(book, clock)
    assert [a.rating for a in derived(book).attempts] == [None, AGAIN, GOOD]
    book.add("rate", exercise=FIRST, rating=HARD)
    assert [a.rating for a in derived(book).attempts] == [None, AGAIN, HARD]


def test_due_is_what_is_not_at_hand_least_known_first(book, clock):
    passes(book, clock, SECOND)
    clock.pass_(days=1)
    passes(book, clock, FIRST)
    assert derived(book).due(clock())[0][0] == SECOND
    clock.pass_(days=4)
    assert [n for n, _ in derived(book).due(clock())] == [SECOND, FIRST]
    assert chosen(derived(book), clock(), 25) == [SECOND]
    assert chosen(derived(book), clock(), 30) == [SECOND, FIRST]
    assert chosen(derived(book), clock(), 5, "mlp") == [FIRST]
    assert chosen(derived(book), clock(), 5, "no topic") == []
    book.add("start", exercise=SECOND, mode=GUIDED)
    assert [n for n, _ in derived(book).due(clock())] == [FIRST]


def test_a_streak_forgives_one_day(book, clock):
    for gap in (1, 1, 2, 1):
        checked(book, FIRST)
        clock.pass_(days=gap)
    assert derived(book).streak(clock().date()) == 4
    assert derived(book).streak(clock().date() + timedelta(days=1)) == 4
    assert derived(book).streak(clock().date() + timedelta(days=2)) == 0


def test_a_mistake_made_before_is_remembered(book, clock):
    book.add("check", exercise=FIRST, passed=False, right=0, of=1, mistakes=["no_b2"])
    assert derived(book).made_before(FIRST, "no_b2", clock() + timedelta(days=1)) == NOON
    assert derived(book).made_before(FIRST, "no_b2", NOON) is None
    assert derived(book).made_before(FIRST, "relu", clock() + timedelta(days=1)) is None


def test_events_of_exercises_and_kinds_that_are_not_known_do_no_harm(book):
    book.add("start", exercise="77_future", mode=GUIDED)
    book.add("telepathy", exercise=FIRST)
    book.add("check", exercise=FIRST)
    book.add("start", exercise=FIRST)
    book.add("_start", exercise=FIRST, mode=GUIDED)
    assert derived(book).attempts == []
    assert len(Workbook(book.folder).log) == 5


# --- the file


def test_the_log_is_only_added_to_and_readable(book, clock):
    passes(book, clock)
    before = book.progress.read_text()
    passes(book, clock, SECOND)
    assert book.progress.read_text().startswith(before.rstrip("\n]}"))
    assert json.loads(book.progress.read_text())["version"] == workbook.VERSION
    assert len(book.progress.read_text().splitlines()) == 2 + len(book.log)


def test_a_write_that_is_interrupted_leaves_the_file_as_it_was(book, clock, monkeypatch):
    passes(book, clock)
    before = book.progress.read_bytes()

    def power_cut(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(KeyboardInterrupt):
        book.add("hint", exercise=FIRST, number=1)
    assert book.progress.read_bytes() == before
    monkeypatch.undo()
    book.add("hint", exercise=FIRST, number=2)
    assert [e.get("number") for e in Workbook(book.folder).log] == [None, None, 2]


def test_writers_side_by_side_lose_nothing(book):
    code = "from pathlib import Path; from practice.workbook import Workbook\nb = Workbook(Path('{}'))\n"
    code += "for n in range(20): b.add('open', exercise='{}', n=n)"
    run = [sys.executable, "-c", code.format(book.folder, FIRST)]
    both = [subprocess.Popen(run, cwd=ROOT) for _ in range(2)]
    assert [p.wait(timeout=30) for p in both] == [0, 0]
    assert sorted(e["n"] for e in Workbook(book.folder).log) == sorted([*range(20), *range(20)])


def test_the_file_of_a_newer_program_is_refused_and_left_alone(book):
    book.folder.mkdir()
    text = '{"version": 2, "attempts": "told in another way"}'
    book.progress.write_text(text)
    with pytest.raises(WorkbookError, match=r"newer rankwise \(version 2, this one knows 1\)"):
        Workbook(book.folder)
    with pytest.raises(WorkbookError):
        book.add("open", exercise=FIRST)
    assert book.progress.read_text() == text


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 1, "log": [{"what": "start"}]}', "\0\xff"])
def test_a_file_that_cannot_be_read_is_kept_and_told(text, book, clock):
    book.folder.mkdir()
    book.progress.write_bytes(text.encode("latin-1"))
    said = []
    fresh = Workbook(book.folder, now=clock, say=said.append)
    assert fresh.log == []
    (kept,) = book.folder.glob("progress.unreadable-*.json")
    assert kept.read_bytes() == text.encode("latin-1")
    assert kept.name in said[0]
    fresh.add("open", exercise=FIRST)
    assert len(Workbook(book.folder).log) == 1


def test_what_stands_in_a_file_is_never_lost(book, clock):
    book.write(FIRST, "first")
    book.write(FIRST, "first")
    book.write(FIRST, "second")
    book.write(FIRST, "third")
    kept = sorted((book.folder / "backup").iterdir())
    assert {p.read_text() for p in kept} == {"first", "second"}
    book.keep(FIRST)
    book.write(FIRST, "fourth")
    book.keep(FIRST)
    assert [p.read_text() for p in book.kept(FIRST)] == ["third", "fourth"]


# --- the pages


def test_pages_change_between_their_marks_only(book, clock, tmp_path):
    folder = tmp_path / "pages"
    passes(book, clock)
    book.add("read", paper="megatron", mark="WIP")
    status, reading = pages.write(derived(book), clock(), folder)
    assert "| 01 | MLP " in status.read_text()
    assert "2026-11-23" in status.read_text()
    (row,) = [line for line in reading.read_text().splitlines() if "Megatron-LM (" in line and line.startswith("|")]
    assert "| WIP  |" in row
    assert " 20" in row
    status.write_text(status.read_text().replace("# Practice: status", "# My own heading"))
    once = status.read_text(), reading.read_text()
    pages.write(derived(book), clock(), folder)
    assert (status.read_text(), reading.read_text()) == once
    status.write_text("nothing")
    with pytest.raises(ValueError, match="one pair"):
        pages.write(derived(book), clock(), folder)


def test_the_reading_list_has_what_exercises_name():
    papers = {paper.id: paper for paper in pages.papers()}
    assert [paper.number for paper in papers.values()] == list(range(1, len(papers) + 1))
    assert all(len(paper.take.splitlines()) == 2 for paper in papers.values())
    named = {r for e in every() for r in e.facts["reads"]}
    assert named <= set(papers), "an exercise's `reads` must be an id of practice/READING.md"
    numbers = "1706.03762 2104.09864 2305.13245 2211.17192 1909.08053 2405.04434 1910.02054 2205.05198 2104.04473 2205.14135"
    titles = " ".join(paper.title for paper in papers.values())
    assert all(n in titles for n in [*numbers.split(), "2309.06180", "twopug.com"])


def test_prerequisites_come_before_and_exist():
    names = {e.name for e in every()}
    for e in every():
        # Those that are not written yet are passed over: later numbers are what must not be.
        assert all(a < e.name for a in e.facts["after"])
        assert e.facts["minutes"] > 0
        assert find(e.name).name in names


# --- a log that somebody has edited


def at(minute, what, **facts):
    return {"at": f"2026-03-01T10:{minute:02}:00+01:00", "what": what, **facts}


LOG = [
    at(0, "start", exercise=FIRST, mode=GUIDED),
    at(1, "check", exercise=FIRST, passed=False, mistakes=["a"], saved="2026-03-01T10:01:00+01:00", lines=["x"]),
    at(2, "hint", exercise=FIRST, number=1),
    at(3, "check", exercise=FIRST, passed=True, right=1, of=1),
    at(4, "rate", exercise=FIRST, rating=GOOD),
    at(5, "ask", exercise=FIRST, question=0, right=True),
    at(6, "read", paper="megatron", mark="WIP"),
    at(7, "interview", date="2026-12-01"),
    at(8, "drill", minutes=30, exercises=[FIRST, SECOND]),
    at(9, "start", exercise=SECOND, mode=DRILL),
    at(10, "drill_end", untouched=[]),
]
BROKEN = {
    "deep": "[" * 10**5 + "]" * 10**5,
    "an exercise that is a list": [at(0, "open", exercise=[FIRST])],
    "minutes that are a text": [at(0, "drill", minutes="30", exercises=[FIRST])],
    "half a surrogate pair": [at(0, "read", paper="\ud800", mark="WIP")],
    "a time without its offset": [LOG[0], {**LOG[3], "saved": "2026-03-01T10:00:00"}],
    "the first year": [{**LOG[0], "at": "0001-01-01T00:00:00"}],
}


def used(folder, clock, text):
    """All that the commands ask of a log, and one event more."""
    folder.mkdir(exist_ok=True)
    (folder / "progress.json").write_text(text)
    book = Workbook(folder, now=clock, say=lambda line: None)
    p = derived(book)
    for e in p.exercises:
        p.status(e.name), p.best(e.name), p.last(e.name), p.made_before(e.name, "a", NOON)
    p.due(NOON), p.next_new(), p.streak(NOON.date()), chosen(p, NOON, 30)
    assert p.drill is None or p.drill.until
    book.add("open", exercise=FIRST)
    assert derived(book).current == FIRST


@pytest.mark.parametrize("name", BROKEN)
def test_a_log_that_somebody_has_broken_is_kept_or_passed_over(tmp_path, clock, name):
    broken = BROKEN[name]
    used(tmp_path, clock, broken if isinstance(broken, str) else json.dumps({"version": 1, "log": broken}))


def test_a_log_with_any_entry_changed_can_be_used(tmp_path, clock):
    draw = random.Random(0)
    for _ in range(thinned(300, 100)):
        used(tmp_path, clock, json.dumps({"version": 1, "log": mutated(LOG, draw)}))
    assert len(derived(Workbook(tmp_path)).exercises) == len(every())
