"""What the log of a workbook says: attempts, status, times, what is due. Nothing here is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cached_property

from practice import schedule
from practice.exercise import Exercise
from practice.schedule import Recall
from practice.workbook import Event

# A longer pause does not count as work.
PAUSE = timedelta(minutes=10)
GUIDED, REVIEW, DRILL = "guided", "review", "drill"
MARKS = ("-", "WIP", "DONE")


@dataclass
class Attempt:
    """From a blank file to a pass, or to the end of the drill. seconds: at work. rating: None while it goes on."""

    exercise: str
    mode: str
    begun: datetime
    touched: datetime
    seconds: float = 0.0
    ended: datetime | None = None
    checks: int = 0
    nudges: int = 0
    solution: bool = False
    passed: bool = False
    late: bool = False
    rating: int | None = None

    @property
    def unaided(self) -> bool:
        """Passed in a drill, in time, without nudges: the seed's "Confident"."""
        return self.passed and self.mode == DRILL and not (self.nudges or self.solution or self.late)

    def touch(self, at: datetime) -> None:
        if at > self.touched:
            self.seconds += (at - self.touched if self.mode == DRILL else min(at - self.touched, PAUSE)).total_seconds()
            self.touched = at

    def end(self, at: datetime, minutes: float) -> None:
        self.touch(at)
        self.ended = at
        self.rating = schedule.rating(
            passed=self.passed,
            drill=self.mode == DRILL,
            late=self.late,
            solution=self.solution,
            nudges=self.nudges,
            checks=self.checks,
            pace=self.seconds / 60 / minutes,
        )


@dataclass
class Drill:
    begun: datetime
    minutes: int
    exercises: list[str]

    @property
    def until(self) -> datetime:
        return self.begun + timedelta(minutes=self.minutes)


@dataclass
class Progress:
    """What the log says of the exercises in this version. Events of other exercises are ignored."""

    exercises: Sequence[Exercise]
    attempts: list[Attempt] = field(default_factory=list)
    checks: dict[str, list[Event]] = field(default_factory=dict)
    asked: dict[str, dict[int, bool]] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    days: set[date] = field(default_factory=set)
    current: str | None = None
    drill: Drill | None = None
    interview: date | None = None

    @cached_property
    def minutes(self) -> dict[str, float]:
        return {e.name: e.facts["minutes"] for e in self.exercises}

    def of(self, name: str) -> list[Attempt]:
        return [a for a in self.attempts if a.exercise == name]

    def open(self, name: str) -> Attempt | None:
        """The attempt that goes on, if one does."""
        return next((a for a in self.attempts if a.exercise == name and a.ended is None), None)

    def passes(self, name: str) -> list[Attempt]:
        return [a for a in self.of(name) if a.passed]

    def best(self, name: str) -> float | None:
        """Seconds of the fastest pass without the solution."""
        return min((a.seconds for a in self.passes(name) if not a.solution), default=None)

    def last(self, name: str) -> datetime | None:
        return max((a.touched for a in self.of(name)), default=None)

    def status(self, name: str) -> str:
        """-, WIP, or DONE: passed in a drill without help, and not failed in one since."""
        mark = MARKS[0]
        for a in self.of(name):
            mark = MARKS[2] if a.unaided or (mark == MARKS[2] and a.rating != schedule.AGAIN) else MARKS[1]
        return mark

    def recall(self, name: str, now: datetime) -> Recall | None:
        reviews = [(a.ended, a.rating) for a in self.of(name) if a.rating]
        return schedule.recall(reviews, now, self.interview)

    def due(self, now: datetime) -> list[tuple[str, Recall]]:
        """The exercises that are due and not in work, the least known first."""
        known = [(e.name, self.recall(e.name, now)) for e in self.exercises if not self.open(e.name)]
        return sorted(((n, r) for n, r in known if r and r.due <= now), key=lambda d: d[1].likely)

    def next_new(self) -> str | None:
        """The first exercise that was never begun."""
        return next((e.name for e in self.exercises if not self.of(e.name)), None)

    def made_before(self, name: str, mistake: str, before: datetime) -> datetime | None:
        """When this mistake was last made in an earlier attempt."""
        times = (datetime.fromisoformat(c["at"]) for c in self.checks.get(name, ()) if mistake in c.get("mistakes", ()))
        return max((t for t in times if t < before), default=None)

    def streak(self, today: date) -> int:
        """Days of practice in a row up to today; a single day off does not end the row."""
        days, day, missed = 0, today, 0
        while missed < 2:
            if day in self.days:
                days, missed = days + 1, 0
            elif day != today:
                missed += 1
            day -= timedelta(days=1)
        return days

    # --- one event

    def take(self, event: Event) -> None:
        at, what, name = datetime.fromisoformat(event["at"]).astimezone(), event["what"], event.get("exercise")
        taken = getattr(self, f"_{what}", None)
        if taken and (name is None or name in self.minutes):
            # An event without its facts (somebody has edited the file) is ignored, like an unknown one.
            with suppress(KeyError, TypeError, ValueError):
                taken(event, at, name)

    def _start(self, event: Event, at: datetime, name: str) -> None:
        going = self.open(name)
        if going:
            # The exercise is begun anew: that its solution was seen stays on record.
            going.touched, going.ended = at, at
            going.rating = schedule.AGAIN if going.solution else None
        self.attempts.append(Attempt(name, event["mode"], at, at))
        self.current = name

    def _open(self, event: Event, at: datetime, name: str) -> None:
        self.current = name

    def _check(self, event: Event, at: datetime, name: str) -> None:
        self.checks.setdefault(name, []).append(event)
        self.days.add(at.date())
        self.current = name
        attempt = self.open(name)
        if attempt is None:
            return
        if event.get("saved"):
            attempt.touch(min(at, datetime.fromisoformat(event["saved"])))
        attempt.touch(at)
        attempt.checks += not event.get("late", False)
        attempt.late = event.get("late", False) and event["passed"]
        attempt.passed = event["passed"] and not attempt.late
        if event["passed"]:
            attempt.end(at, self.minutes[name])

    def _hint(self, event: Event, at: datetime, name: str) -> None:
        attempt = self.open(name)
        if attempt:
            attempt.touch(at)
            attempt.nudges = max(attempt.nudges, event["number"])

    def _solution(self, event: Event, at: datetime, name: str) -> None:
        attempt = self.open(name)
        if attempt:
            attempt.touch(at)
            attempt.solution = True

    def _drill(self, event: Event, at: datetime, name: None) -> None:
        self.drill = Drill(at, event["minutes"], [n for n in event["exercises"] if n in self.minutes])

    def _drill_end(self, event: Event, at: datetime, name: None) -> None:
        for a in self.attempts:
            if a.mode == DRILL and a.ended is None:
                a.end(at, self.minutes[a.exercise])
                if a.exercise in event.get("untouched", ()):
                    a.rating = None
        self.drill = None

    def _rate(self, event: Event, at: datetime, name: str) -> None:
        ended = [a for a in self.of(name) if a.rating]
        if ended:
            ended[-1].rating = event["rating"]

    def _ask(self, event: Event, at: datetime, name: str) -> None:
        self.asked.setdefault(name, {})[event["question"]] = event["right"]

    def _read(self, event: Event, at: datetime, name: None) -> None:
        self.marks[event["paper"]] = event["mark"]

    def _interview(self, event: Event, at: datetime, name: None) -> None:
        self.interview = date.fromisoformat(event["date"]) if event["date"] else None


def progress(log: Sequence[Event], exercises: Sequence[Exercise]) -> Progress:
    state = Progress(exercises)
    for event in log:
        state.take(event)
    return state


def chosen(progress: Progress, now: datetime, minutes: float, topic: str = "") -> list[str]:
    """The exercises of a drill, as many as fit: those that are due, then the least known, then new ones; topics in turn."""
    topics: Mapping[str, str] = {e.name: e.facts["topic"] for e in progress.exercises}
    wanted = [n for n in topics if topics[n].lower().startswith(topic.lower())]
    recalls = {n: r for n in wanted if (r := progress.recall(n, now))}
    due = sorted((n for n, r in recalls.items() if r.due <= now), key=lambda n: recalls[n].likely)
    new = [n for n in wanted if not progress.of(n)]
    rest = due or sorted(recalls, key=lambda n: recalls[n].likely)[:1] or new[:1] or wanted[:1]
    picked: list[str] = []
    left = minutes
    for name in _in_turn(rest, topics):
        if not picked or progress.minutes[name] <= left:
            picked.append(name)
            left -= progress.minutes[name]
    return picked


def _in_turn(names: Sequence[str], topics: Mapping[str, str]) -> Iterator[str]:
    """The same names, ordered so that topics take turns as far as possible."""
    left, before = list(names), None
    while left:
        name = next((n for n in left if topics[n] != before), left[0])
        left.remove(name)
        before = topics[name]
        yield name
