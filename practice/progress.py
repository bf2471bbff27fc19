"""What the log of a workbook says: attempts, status, times, what is due. Nothing here is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


def _when(text: str) -> datetime:
    """A time without an offset is local."""
    return datetime.fromisoformat(text).astimezone()


def _time(value: object) -> bool:
    # The first and the last year overflow where they are moved to another zone.
    return isinstance(value, str) and 1970 < datetime.fromisoformat(value).year < 9000


def _date(value: object) -> bool:
    return value is None or (isinstance(value, str) and bool(date.fromisoformat(value)))


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 10**6


# By what happened: the facts that an event must have, and those that it may have.
FACTS: dict[str, tuple[dict[str, Callable], dict[str, Callable]]] = {
    "start": ({"exercise": _text, "mode": (GUIDED, REVIEW, DRILL).__contains__}, {}),
    "open": ({"exercise": _text}, {}),
    "check": (
        {"exercise": _text, "passed": _flag},
        {"late": _flag, "saved": _time, "mistakes": _texts, "lines": _texts, "part": _text, "right": _count, "of": _count},
    ),
    "hint": ({"exercise": _text, "number": _count}, {}),
    "solution": ({"exercise": _text}, {}),
    "drill": ({"minutes": _count, "exercises": _texts}, {}),
    "drill_end": ({}, {"untouched": _texts}),
    "rate": ({"exercise": _text, "rating": tuple(schedule.RATINGS).__contains__}, {}),
    "ask": ({"exercise": _text, "question": _count, "right": _flag}, {}),
    "read": ({"paper": _text, "mark": MARKS.__contains__}, {}),
    "interview": ({"date": _date}, {}),
}


def sound(event: Event) -> bool:
    """Whether it is an event of a known kind, and its facts are what that kind's are."""
    with suppress(ValueError):
        if isinstance(event, dict) and _text(event.get("what")) and event["what"] in FACTS and _time(event.get("at")):
            must, may = FACTS[event["what"]]
            there = {name: good(event[name]) for name, good in (must | may).items() if name in event}
            return must.keys() <= there.keys() and all(there.values())
    return False


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
    # Mistakes that the examiner has named.
    told: set[str] = field(default_factory=set)
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
            # A drill says nothing until it ends.
            mistakes=len(self.told) if self.mode != DRILL else 0,
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

    @cached_property
    def path(self) -> list[str]:
        """The exercises by difficulty: what each builds on comes before it; of those that can come next, the quickest does."""
        left, path = {e.name: e for e in self.exercises}, []
        while left:
            ready = [e for e in left.values() if not any(a in left for a in e.facts["after"])] or list(left.values())
            path.append(min(ready, key=lambda e: (e.facts["minutes"] * (1.5 if e.ranks > 1 else 1), e.name)).name)
            del left[path[-1]]
        return path

    def next_new(self) -> str | None:
        """The first exercise that was never begun."""
        return next((e.name for e in self.exercises if not self.of(e.name)), None)

    def made_before(self, name: str, mistake: str, before: datetime) -> datetime | None:
        """When this mistake was last made in an earlier attempt."""
        times = (_when(c["at"]) for c in self.checks.get(name, ()) if mistake in c.get("mistakes", ()))
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
        # What somebody has edited until it is no event any more is ignored, like an event of an unknown kind.
        if not sound(event):
            return
        at, name = _when(event["at"]), event.get("exercise")
        if name is None or name in self.minutes:
            getattr(self, f"_{event['what']}")(event, at, name)

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
            attempt.touch(min(at, _when(event["saved"])))
        attempt.touch(at)
        attempt.checks += not event.get("late", False)
        attempt.told |= set(event.get("mistakes", ()))
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


def mocked(progress: Progress, now: datetime, minutes: float) -> list[str]:
    """The exercises of a mock interview: what fits the time, each of another topic, the least known first, then by the path."""
    topics = {e.name: e.facts["topic"] for e in progress.exercises}
    recalls = {n: r.likely for n in progress.path if (r := progress.recall(n, now))}
    picked: list[str] = []
    for name in sorted(progress.path, key=lambda n: recalls.get(n, 1.0)):
        fits = sum(progress.minutes[n] for n in [*picked, name]) <= minutes
        if fits and topics[name] not in {topics[n] for n in picked}:
            picked.append(name)
    return picked or [min(progress.path, key=lambda n: progress.minutes[n])]


def _in_turn(names: Sequence[str], topics: Mapping[str, str]) -> Iterator[str]:
    """The same names, ordered so that topics take turns as far as possible."""
    left, before = list(names), None
    while left:
        name = next((n for n in left if topics[n] != before), left[0])
        left.remove(name)
        before = topics[name]
        yield name
