"""The verbs of launch.practice that work on the learner's files: start, check, hint, solution, drill, ask, brief."""

from __future__ import annotations

import difflib
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from practice import schedule
from practice.check import Verdict
from practice.desk import screen
from practice.desk.questions import number_of
from practice.desk.screen import COMMAND, short
from practice.exercise import Exercise, every, find
from practice.progress import DRILL, GUIDED, REVIEW, Progress, chosen, mocked, progress
from practice.replay import keep
from practice.workbook import Workbook

# How near a numeric answer must be.
NEAR = 0.02
# How much of what is due a drill takes on, at interview pace.
DRILL_MINUTES = 25


class Refused(ValueError):
    """A request that cannot be met now; the text says what can be done. Exit status 2."""


class Desk:
    """A workbook, the exercises, and `judge(exercise, path) -> Verdict`, which runs a learner's file."""

    def __init__(self, workbook: Workbook, judge: Callable[[Exercise, Path], Verdict], say: Callable[[str], None]) -> None:
        self.book, self.judge, self._say = workbook, judge, say

    @cached_property
    def exercises(self) -> list[Exercise]:
        return every()

    @property
    def progress(self) -> Progress:
        return progress(self.book.log, self.exercises)

    def say(self, *lines: str) -> None:
        for line in lines:
            self._say(line)

    def path(self, e: Exercise) -> str:
        """A learner's file as it is shown: relative to the current folder, if that is above it."""
        file, here = self.book.file(e.name), Path.cwd()
        return str(file.relative_to(here)) if file.is_relative_to(here) else str(file)

    def choose(self, name: str | None) -> Exercise:
        """The exercise of that name; without a name the current one."""
        p = self.progress
        if name:
            return find(name)
        if p.current is None:
            raise Refused(f"no exercise has been started: {COMMAND} start")
        return find(p.current)

    def not_in_drill(self, what: str) -> None:
        drill = self.progress.drill
        if drill:
            left = max(0.0, (drill.until - self.book.now()).total_seconds())
            raise Refused(f"no {what} in a drill, {screen.clock(left)} are left: `{COMMAND} drill stop` ends it")

    # --- start

    def start(self, name: str | None, reset: bool) -> None:
        self.not_in_drill("start")
        p, now = self.progress, self.book.now()
        if name is None:
            due = p.due(now)
            name = p.current if p.current and p.open(p.current) else due[0][0] if due else p.next_new()
        if name is None:
            raise Refused(f"all have been begun and none is due: name one, or {COMMAND} drill")
        e = find(name)
        going, file = p.open(e.name), self.book.file(e.name)
        if going and file.exists() and not reset:
            self.book.add("open", exercise=e.name)
            self.say(f"{short(e.name)} goes on · {self.path(e)}", f"  begin anew:  {COMMAND} start {e.name[:2]} --reset")
        else:
            if file.exists() and not reset and not self._settled(e):
                raise Refused(
                    f"{self.path(e)} holds work that has not passed: `{COMMAND} start {e.name[:2]} --reset` backs it up"
                )
            self.begin(e, REVIEW if p.passes(e.name) else GUIDED)
            self.say(*screen.started(e, p, self.path(e), bool(os.environ.get("RANKWISE_EDITOR"))))
        self.edit(e)

    def begin(self, e: Exercise, mode: str) -> None:
        self.book.write(e.name, e.scaffold)
        self.book.add("start", exercise=e.name, mode=mode)

    def edit(self, e: Exercise) -> None:
        editor = os.environ.get("RANKWISE_EDITOR")
        if editor:
            subprocess.run([*shlex.split(editor), str(self.book.file(e.name))], check=False)

    def _settled(self, e: Exercise) -> bool:
        """Whether the file holds nothing that would be lost: the blank scaffold, or what passed and is kept."""
        text = self.book.file(e.name).read_text(errors="replace")
        return text.strip() in ("", e.scaffold.strip()) or any(
            text == k.read_text(errors="replace") for k in self.book.kept(e.name)
        )

    # --- check

    def check(self, name: str | None, verbose: bool, as_json: bool = False, case: bool = False) -> tuple[bool, dict[str, Any]]:
        """Run the check, print and record its verdict. Returns whether it passed, and the verdict as JSON.

        case: write the arrays of the case that failed, and a script that calls the learner's code on them.
        """
        if case:
            self.not_in_drill("cases")
        e = self.choose(name)
        if not self.book.file(e.name).exists():
            raise Refused(f"there is no {self.path(e)}: {COMMAND} start {e.name[:2]}")
        if self.progress.drill:
            return self._check_in_drill(e, as_json)
        before = self.progress.open(e.name)
        v = self._judged(e)
        p, now = self.progress, self.book.now()
        number = before.checks + 1 if before else 0
        if not as_json:
            mistakes = {m for j in v.parts for m in j.mistakes}
            began = before.begun if before else now
            known = {m: when for m in mistakes if (when := p.made_before(e.name, m, began))}
            self.say(*screen.verdict(e, v, number, known, verbose))
        if v.passed and before:
            self.book.keep(e.name)
            after = p.of(e.name)[-1]
            if not as_json:
                due = [n for n, _ in p.due(now)]
                self.say(*screen.costs(v), *screen.passed(e, p, after, now, next(iter(due), p.next_new())))
        elif v.passed and not as_json:
            self.say(*screen.costs(v), "", f" It passes still; a new attempt:  {COMMAND} start {e.name[:2]}")
        elif not as_json and not v.general and before and before.nudges < len(e.hints):
            self.say("", f" a nudge:  {COMMAND} hint")
        kept = [str(p) for p in keep(self.book.folder, e, v.failed)] if case and v.failed else []
        if case and not as_json:
            self.say("", *screen.case(kept, self.book.folder))
        return v.passed, self._as_json(e, v, number) | ({"case": kept} if case else {})

    def _judged(self, e: Exercise, late: bool = False) -> Verdict:
        """Write the verdict to the log."""
        file = self.book.file(e.name)
        saved = datetime.fromtimestamp(file.stat().st_mtime).astimezone().replace(microsecond=0)
        sha = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        v = self.judge(e, file)
        right, of = screen.count(v)
        wrong = next((j for j in v.parts if j.status == "wrong"), None)
        self.book.add(
            "check",
            exercise=e.name,
            passed=v.passed,
            right=right,
            of=of,
            mistakes=sorted({m for j in v.parts for m in j.mistakes}),
            **({"part": wrong.part, "case": wrong.case, "lines": wrong.lines[:16]} if wrong else {"lines": v.general[:16]}),
            seconds=round(v.seconds, 2),
            saved=saved.isoformat(),
            sha=sha,
            **({"late": True} if late else {}),
        )
        return v

    def _as_json(self, e: Exercise, v: Verdict, number: int) -> dict[str, Any]:
        p = self.progress
        recall, ended = p.recall(e.name, self.book.now()), [a for a in p.of(e.name) if a.rating]
        return {
            "exercise": e.name,
            "passed": v.passed,
            "check": number,
            "seconds": round(v.seconds, 3),
            "general": v.general,
            "parts": [vars(j) for j in v.parts],
            "counts": v.counts,
            "printed": v.printed[:10000],
            "remarks": v.remarks,
            "rating": schedule.RATINGS[ended[-1].rating] if v.passed and ended else None,
            "due": recall.due.date().isoformat() if recall else None,
        }

    def rate(self, name: str | None, rating: str) -> None:
        e = self.choose(name)
        if not any(a.rating for a in self.progress.of(e.name)):
            raise Refused(f"{e.name} has no finished attempt to rate")
        self.book.add("rate", exercise=e.name, rating={v.lower(): k for k, v in schedule.RATINGS.items()}[rating])
        recall = self.progress.recall(e.name, self.book.now())
        self.say(f"{short(e.name)}: {rating.capitalize()} · again on {screen.day(recall.due)}")

    # --- help

    def hint(self, name: str | None) -> None:
        self.not_in_drill("nudges")
        e = self.choose(name)
        attempt = self.progress.open(e.name)
        if not attempt:
            self.say(f"{short(e.name)} · no attempt is going on: all nudges")
        numbers = [min(attempt.nudges + 1, len(e.hints))] if attempt else range(1, len(e.hints) + 1)
        for number in numbers:
            if attempt:
                self.book.add("hint", exercise=e.name, number=number)
            self.say(f"{short(e.name)} · nudge {number} of {len(e.hints)}")
            for line in e.hints[number - 1].splitlines():
                self.say(*screen.wrapped(line, 2))

    def solution(self, name: str | None, sure: bool) -> None:
        self.not_in_drill("solution")
        e = self.choose(name)
        p = self.progress
        attempt = p.open(e.name)
        if not attempt and not p.passes(e.name):
            raise Refused(f"{e.name} has not been begun: {COMMAND} start {e.name[:2]}")
        if attempt:
            if not sure and not self._asked(
                "This attempt will count as Again: it comes back tomorrow. Show the solution? y/n "
            ):
                self.say("Not shown.")
                return
            self.book.add("solution", exercise=e.name)
        self.say(e.solution.rstrip())
        file = self.book.file(e.name)
        own = file.read_text(errors="replace") if file.exists() else None
        before = [p for p in self.book.kept(e.name) if p.read_text(errors="replace") != own]
        if own is not None:
            self._compare(f"yours: {file.name}", own, "the solution", e.solution)
        if before and own is not None:
            self._compare(f"your pass before: {before[-1].name}", before[-1].read_text(errors="replace"), "yours", own)

    def _compare(self, label: str, one: str, other_label: str, other: str) -> None:
        diff = difflib.unified_diff(one.splitlines(), other.splitlines(), label, other_label, lineterm="", n=1)
        self.say("", *diff)

    def _asked(self, question: str) -> bool:
        print(question, end="", flush=True)
        answer = sys.stdin.readline()
        if not answer.endswith("\n"):
            print()
        return answer.strip().lower() in ("y", "yes")

    def brief(self, name: str | None) -> None:
        self.not_in_drill("brief")
        e = self.choose(name)
        file = self.book.file(e.name)
        last = next(iter(self.progress.checks.get(e.name, ())[-1:]), None)
        self.say(
            "I practise this exercise. Give me one nudge: a question or a pointer, in at most three sentences.",
            "No code, no solution, even if I ask.",
            "",
            "The task:",
            e.task,
        )
        if file.exists():
            self.say("", "My code:", "```python", file.read_text(errors="replace").rstrip(), "```")
        if last and not last["passed"]:
            where = f"{last['part']}, case {last['case']}" if last.get("part") else "The run"
            self.say("", f"{where}, as my examiner sees it:", *last.get("lines", ()))

    def ask(self, name: str | None) -> bool:
        """Numeric questions; an answer within 2 % is right. Returns whether all were."""
        from practice.dev import answer

        self.not_in_drill("questions")
        e = self.choose(name)
        all_right = True
        for number, question in enumerate(e.facts["ask"]):
            self.say(*screen.wrapped(f"{number + 1}. {question['text']}", 0))
            print("   > ", end="", flush=True)
            text = sys.stdin.readline()
            if not text.strip():
                self.say("")
                return False
            given, right = number_of(text), answer(question["answer"])
            hit = given is not None and abs(given - right) <= NEAR * abs(right)
            self.book.add("ask", exercise=e.name, question=number, right=hit)
            if hit:
                self.say(*screen.wrapped(f"right: {right:,.6g} = {screen.formula(question['answer'])}", 3))
                continue
            all_right = False
            feedback = "" if given is not None else "that is no number; "
            for wrong in question.get("wrong", ()) if given is not None else ():
                if abs(given - answer(wrong["value"])) <= NEAR * abs(answer(wrong["value"])):
                    feedback = f"{wrong['says']}; "
                    break
            self.say(*screen.wrapped(f"{feedback}right is {right:,.6g} = {screen.formula(question['answer'])}", 3))
        return all_right

    # --- drill

    def drill(self, name: str | None, minutes: int | None, topic: str) -> None:
        """minutes: None for as long as its exercises take at interview pace."""
        p, now = self.progress, self.book.now()
        if p.drill:
            self.say(*screen.drilling(p, now))
            return
        names = [find(name).name] if name else chosen(p, now, minutes or DRILL_MINUTES, topic)
        if not names:
            topics = ", ".join(dict.fromkeys(e.facts["topic"] for e in self.exercises))
            raise Refused(f"no exercise has the topic {topic!r}: use one of {topics}")
        self._begin_drill(names, minutes)

    def mock(self, minutes: int) -> None:
        """A mock interview: short exercises of different topics, one after another, by the clock."""
        p, now = self.progress, self.book.now()
        if p.drill:
            self.say(*screen.drilling(p, now))
            return
        names = mocked(p, now, minutes)
        self.say(f"A mock interview of {minutes} minutes. Say what you do as you do it: shapes, then the line, then its cost.")
        self._begin_drill(names, minutes)
        self.say("", f"  Afterwards they ask:  {COMMAND} ask {names[0][:2]}")

    def _begin_drill(self, names: list[str], minutes: int | None) -> None:
        minutes = minutes or round(sum(self.progress.minutes[n] for n in names))
        self.book.add("drill", minutes=minutes, exercises=names)
        self.say(
            f"drill · {minutes} min · {', then '.join(map(short, names))}",
            "  No nudges, no solution, no references. check says how many parts are right, and the",
            "  examiner speaks at the end:  drill stop, the last pass, or the first check after the bell.",
        )
        self._deal(names[0])

    def _deal(self, name: str) -> None:
        e = find(name)
        self.begin(e, DRILL)
        self.say(f"  {self.path(e)}  ({screen.plural(e.facts['minutes'], 'minute')}): {e.facts['title']}")
        self.edit(e)

    def _check_in_drill(self, e: Exercise, as_json: bool) -> tuple[bool, dict[str, Any]]:
        drill, now = self.progress.drill, self.book.now()
        if e.name not in drill.exercises or not self.progress.open(e.name):
            raise Refused(f"the drill is at {self.progress.current}: `{COMMAND} drill stop` ends it")
        if now >= drill.until:
            self.stop(quiet=as_json)
            done = self.progress.checks[e.name][-1]
            return False, {"exercise": e.name, "drill": "over", "right": done["right"], "of": done["of"]}
        v = self._judged(e)
        right, of = screen.count(v)
        document = {"exercise": e.name, "drill": "on", "passed": v.passed, "right": right, "of": of}
        if not as_json:
            self.say(f"{short(e.name)} · {right} of {of}" if of else f"{short(e.name)} · it does not run")
        if v.passed:
            self.book.keep(e.name)
            rest = drill.exercises[drill.exercises.index(e.name) + 1 :]
            if rest:
                self._deal(rest[0])
            else:
                self.stop(quiet=as_json)
                document["drill"] = "over"
        return v.passed, document

    def stop(self, quiet: bool = False) -> None:
        """End the drill: examine the exercise in work aloud, and rate all."""
        p, now = self.progress, self.book.now()
        if not p.drill:
            raise Refused(f"no drill is running: {COMMAND} drill begins one")
        drill, spoken, untouched = p.drill, [], []
        for name in drill.exercises:
            e, attempt = find(name), p.open(name)
            if not attempt or attempt.mode != DRILL:
                continue
            file = self.book.file(name)
            if not file.exists() or file.read_text(errors="replace").strip() == e.scaffold.strip():
                untouched.append(name)
                continue
            spoken.append((e, self._judged(e, late=now >= drill.until)))
        self.book.add("drill_end", untouched=untouched)
        if quiet:
            return
        p = self.progress
        results = []
        for name in drill.exercises:
            attempt = next((a for a in p.of(name) if a.mode == DRILL and a.begun >= drill.begun), None)
            if attempt and name not in untouched:
                last = p.checks[name][-1]
                results.append((name, last["right"], last["of"], attempt))
        spent = min((now - drill.begun).total_seconds(), drill.minutes * 60)
        self.say("", *screen.drill_end(p, now, results, spent))
        for e, v in spoken:
            if not v.passed:
                self.say("", *screen.verdict(e, v, 0, {}))
