"""The screens of launch.practice, as lines of at most 80 columns. Colours only carry what the words already say."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from practice import schedule
from practice.check import Verdict
from practice.exercise import Exercise
from practice.progress import GUIDED, Attempt, Progress

WIDTH = 80
COMMAND = "python -m launch.practice"
CODES = {"ok": "32", "bad": "31", "dim": "2", "bold": "1"}
# How many lines of the learner's own output are shown.
PRINTED_LINES = 8


def colours() -> bool:
    """Whether to paint: there is a terminal, and the user has not turned colours off (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, kind: str) -> str:
    return f"\033[{CODES[kind]}m{text}\033[0m" if colours() else text


def short(name: str) -> str:
    """20_linear -> 20 linear"""
    return name.replace("_", " ", 1)


def day(when: datetime) -> str:
    return f"{when.day} {when:%b}"


def clock(seconds: float) -> str:
    """12:07, or 1:02:07 from an hour on"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def ends(left: str, right: str) -> str:
    return f"{left}{' ' * max(2, WIDTH - len(left) - len(right))}{right}"


def wrapped(text: str, indent: int) -> list[str]:
    """A line at `indent`, folded where it is too long; the spaces inside, which hold columns, stay."""
    pad = " " * indent
    if len(text) + indent <= WIDTH:
        return [pad + text if text else ""]
    return textwrap.wrap(text, WIDTH, initial_indent=pad, subsequent_indent=pad, break_long_words=False, break_on_hyphens=False)


def plural(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def formula(expression: str) -> str:
    """An answer's expression as a person writes it: without module names, ^ for powers."""
    return re.sub(r"\b(math|np)\.", "", expression).replace("**", "^")


# --- where one stands


def first(exercises: Sequence[Exercise]) -> list[str]:
    file = f"workbook/{exercises[0].name}.py"
    return [
        f"rankwise practice: {len(exercises)} exercises, NumPy only, on real MPI ranks where it matters.",
        "",
        f"  1  {COMMAND} start        writes {file}",
        '  2  fill in what says "yours"              any editor',
        f"  3  {COMMAND} check        says what is wrong, or passes it",
        "",
        "Later: hint (three nudges), drill (clock, no help), list (what is due)",
        "Your work stays in workbook/, with its history, progress.json; git ignores it.",
    ]


def home(p: Progress, now: datetime, drill: Sequence[str]) -> list[str]:
    """drill: the exercises that a drill would take."""
    names = [e.name for e in p.exercises]
    wide = max(len(n) for n in names) + 1
    passed, confident = sum(bool(p.passes(n)) for n in names), sum(p.status(n) == "DONE" for n in names)
    streak = p.streak(now.date())
    left = f" {day(now)} · {passed} of {len(names)} passed, {confident} in a drill"
    left += f" · streak {plural(streak, 'day')}" if streak else ""
    to_go = (p.interview - now.date()).days if p.interview else -1
    lines = [ends(left, f"interview in {plural(to_go, 'day')}" if to_go >= 0 else "").rstrip()]
    due = p.due(now)
    for number, (name, r) in enumerate(due[:3]):
        last = f"last {day(p.last(name))}"
        lines.append(f" {'due' if number == 0 else '':<5} {short(name):<{wide}} {last:<12}  recall {100 * r.likely:.0f} %")
    if len(due) > 3:
        lines.append(f"       and {len(due) - 3} more, another day")
    going = p.current and p.open(p.current)
    if going:
        done = [plural(going.checks, "check"), plural(going.nudges, "nudge")]
        started = "today" if going.begun.date() == now.date() else day(going.begun)
        lines.append(f" now   {short(p.current):<{wide}} started {started}, {', '.join(done)}")
    new = p.next_new()
    if new and not (going and p.current == new):
        lines.append(f" next  {short(new):<{wide}} {_facts(p.exercises[names.index(new)])}")
    first_due = f"start {due[0][0].partition('_')[0]}" if due else f"start {new.partition('_')[0]}" if new else "drill"
    arrow = f" ->  {COMMAND} {'check' if going else first_due}"
    if drill and first_due != "drill":
        numbers = ", then ".join(n.partition("_")[0] for n in drill)
        arrow += f"      or  drill  ({sum(p.minutes[n] for n in drill):g} min: {numbers})"
    return [*lines, arrow]


def _facts(e: Exercise) -> str:
    return f"{e.facts['title']}, {e.facts['minutes']} min" + (f", {e.ranks} ranks" if e.ranks > 1 else "")


def drilling(p: Progress, now: datetime) -> list[str]:
    """The one line of a drill that runs."""
    left = (p.drill.until - now).total_seconds()
    time = f"{clock(left)} left" if left > 0 else "the time is over"
    return [f" drill · {time} · at {short(p.current)} · check says how many parts are right, drill stop ends it"]


def started(e: Exercise, p: Progress, path: str, editing: bool) -> list[str]:
    missing = [a for a in e.facts["after"] if a in p.minutes and not p.passes(a)]
    lines = [f"{short(e.name)} · {_facts(e)}", f"  {path}"]
    if missing:
        lines.append(f"  builds on {', '.join(map(short, missing))}")
    if not editing:
        lines.append(f'  fill in what says "yours", then  {COMMAND} check')
    return lines


# --- a verdict


def count(verdict: Verdict) -> tuple[int, int]:
    return sum(j.status == "ok" for j in verdict.parts), len(verdict.parts)


def verdict(e: Exercise, v: Verdict, number: int, before: dict[str, datetime], verbose: bool = False) -> list[str]:
    """The examiner's verdict. number: of this check in its attempt. before: when each mistake was made in earlier attempts."""
    right, of = count(v)
    head = " · ".join([short(e.name), *([f"{e.ranks} ranks"] if e.ranks > 1 else []), *([f"check {number}"] if number else [])])
    lines = [ends(head, f"{right} of {of} pass" if of else "not run")]
    if v.general:
        for line in v.general:
            lines += wrapped(line, 1)
        return lines + list(_printed(v, verbose))
    if v.parts and all(j.status in ("todo", "ok") for j in v.parts) and right < of:
        todo = next(j.part for j in v.parts if j.status == "todo")
        return [*lines, f" {todo}: not implemented yet ({right} of {of} functions done)", *_printed(v, verbose)]
    fine = [j for j in v.parts if j.status == "ok"]
    wide = max((len(j.part) for j in v.parts), default=0) + 2
    columns = max(1, WIDTH // (wide + 5))
    for i in range(0, len(fine), columns):
        lines.append("".join(f" {painted('ok', 'ok')}  {j.part:<{wide}}" for j in fine[i : i + columns]).rstrip())
    for j in fine:
        lines += [folded for line in j.lines for folded in wrapped(f"{j.part}: {line}", 5)]
    wrong = next((j for j in v.parts if j.status == "wrong" and j.lines), None)
    for j in v.parts:
        if j.status == "wrong":
            remark = f"{j.case}, smallest case that fails" if j.case else "is wrong too"
            lines.append(f" {painted('--', 'bad')}  {j.part:<{wide}}{remark}".rstrip())
            for line in j.lines:
                lines += wrapped(line, 5)
            for m in j.mistakes:
                lines += [f"     You have made this mistake before ({day(before[m])})."] if m in before else []
        elif j.status == "todo":
            lines.append(f" ..  {j.part:<{wide}}not implemented yet")
        elif j.status == "unjudged":
            lines.append(f" ..  {j.part:<{wide}}not judged" + (f" until {wrong.part} is right" if wrong else ""))
    lines += [folded for remark in v.remarks for folded in wrapped(remark, 5)]
    return lines + list(_printed(v, verbose))


def _printed(v: Verdict, verbose: bool) -> Iterator[str]:
    lines = v.printed.splitlines()
    if lines:
        shown = lines if verbose else lines[:PRINTED_LINES]
        yield " It printed:"
        yield from (f"   | {line[: WIDTH - 5]}" for line in shown)
        if len(shown) < len(lines):
            yield f"   | ... and {len(lines) - len(shown):,} lines more (check --verbose)"


def costs(v: Verdict) -> list[str]:
    """What each part counted, on the rank that counted most, and the solution's where it differs."""
    lines = []
    wide = max((len(p) for p in v.counts), default=0) + 2
    for part, by_rank in v.counts.items():
        own, best = _most(by_rank), _most(v.best.get(part, by_rank))
        if own or best:
            same = all(own.get(k, 0) == best.get(k, 0) for k in {**own, **best} if k != "peak bytes")
            lines += wrapped(f"{part:<{wide}}{_counted(own)}" + ("" if same else f"   (the solution: {_counted(best)})"), 5)
    return ["", " It cost, on the rank with most:", *lines] if lines else []


def _most(by_rank: Sequence[dict[str, int]]) -> dict[str, int]:
    keys = dict.fromkeys(k for c in by_rank for k in c)
    return {k: n for k in keys if (n := max(c.get(k, 0) for c in by_rank))}


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items()) or "nothing"


def case(files: Sequence[str], folder: Path) -> list[str]:
    """Where the arrays of the failing case are, and how to call one's code on them."""
    if not files:
        return [" No case has failed: there are no arrays to look at."]
    here = Path.cwd()
    data, script = (str(Path(f).relative_to(here)) if Path(f).is_relative_to(here) else f for f in files)
    return [f" the case     {data}", f" call it      python {script}"]


def passed(e: Exercise, p: Progress, a: Attempt, now: datetime, next_name: str | None) -> list[str]:
    """After a pass: time, rating, next date, the idea, where to go on."""
    pace = f"{clock(a.seconds)} at work (pace {e.facts['minutes']} min)"
    helped = "with the solution" if a.solution else plural(a.nudges, "nudge") if a.nudges else "no nudges"
    recall = p.recall(e.name, now)
    again = f" · again on {day(recall.due)}" if recall else ""
    lines = ["", f" {painted('Passed', 'ok')} · {pace} · {helped} · {schedule.RATINGS[a.rating]}{again}"]
    earlier = [b for b in p.passes(e.name) if b is not a]
    if earlier:
        lines.append(
            f" Last time, {day(earlier[-1].ended)}: {clock(earlier[-1].seconds)}, {plural(earlier[-1].nudges, 'nudge')}"
        )
    lines.append("")
    lines += wrapped(" ".join(e.notes.split("\n\n")[0].replace("**", "").split()), 1)
    lines += ["", f" the rest     practice/exercises/{e.name}/notes.md", f" compare      {COMMAND} solution"]
    if e.facts["ask"]:
        lines.append(f" questions    {COMMAND} ask")
    if a.nudges < len(e.hints) and a.mode == GUIDED:
        lines.append(f" nudges       {len(e.hints) - a.nudges} not used")
    if next_name:
        lines.append(f" next         {COMMAND} start        {short(next_name)}")
    return lines


def drill_end(p: Progress, now: datetime, results: Sequence[tuple[str, int, int, Attempt]], seconds: float) -> list[str]:
    """results: (name, parts right, parts, attempt). One line each, then when each comes again."""
    done = [
        f"{short(n)} {right} of {of}" + (f" in {clock(a.seconds)}" if a.passed else " after the bell" if a.late else "")
        for n, right, of, a in results
    ]
    lines = wrapped(" · ".join([f"drill over · {clock(seconds)}", *(done or ["nothing was begun"])]), 1)
    for name, *_, a in results:
        if a.rating is None:
            continue
        recall = p.recall(name, now)
        before = [b for b in p.passes(name) if b is not a]
        last = f"(last time {clock(before[-1].seconds)}, {plural(before[-1].nudges, 'nudge')})" if before else ""
        lines.append(f" {short(name):<26} {schedule.RATINGS[a.rating]:<6} again on {day(recall.due):<8} {last}".rstrip())
    return lines


def width() -> int:
    """Columns of a table or a page: COLUMNS, else the terminal's, else 80."""
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], fold: str, drop: Sequence[str] = ()) -> str:
    """Aligned columns, numbers to the right. Where they are too wide, those of `drop` are left out, one after the other, and
    then the cells of the column `fold` are folded."""
    columns, cells = list(columns), [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [columns, *cells]) for i in range(len(columns))]
    for name in drop:
        if sum(widths) + 2 * (len(widths) - 1) > width():
            i = columns.index(name)
            del columns[i], widths[i]
            cells = [row[:i] + row[i + 1 :] for row in cells]
    i = columns.index(fold)
    widths[i] = min(widths[i], max(20, width() - sum(widths) + widths[i] - 2 * (len(widths) - 1)))
    right = [i > 0 and all(re.fullmatch(r"[\d:., ]+( min)?|-", r[i]) for r in cells) for i in range(len(columns))]
    lines = []
    for row in [columns, *cells]:
        # A cell that is folded has its other lines below it, where the row has nothing else.
        first, *more = textwrap.wrap(row[i], widths[i]) or [""]
        for line in [[*row[:i], first, *row[i + 1 :]], *([""] * i + [part] + [""] * (len(row) - i - 1) for part in more)]:
            lines.append([f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(line, widths, right, strict=True)])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def page(text: str) -> str:
    """Markdown as a terminal shows it: paragraphs filled, lines of code that are too wide folded."""
    lines, prose, code = [], [], False
    for line in [*text.split("\n"), ""]:
        code ^= line.startswith("```")
        if line and not code and not re.match(r"\||#|```", line):
            prose.append(line)
            continue
        lines += textwrap.wrap(" ".join(prose), width(), break_on_hyphens=False)
        prose = []
        lines += [line] if len(line) <= width() else textwrap.wrap(line, width(), subsequent_indent="    ")
    return "\n".join(lines[:-1])
