"""What the desk shows: where one is, the list of exercises, the reading list."""

from __future__ import annotations

import argparse
import json

from practice import pages
from practice.desk import screen
from practice.desk.desk import DRILL_MINUTES, Desk, Refused
from practice.progress import MARKS, chosen


def home(desk: Desk) -> None:
    p, now = desk.progress, desk.book.now()
    if not desk.book.log:
        desk.say(*screen.first(desk.exercises))
    elif p.drill:
        desk.say(*screen.drilling(p, now))
    else:
        # A drill takes exercises that have been passed.
        known = [n for n in chosen(p, now, DRILL_MINUTES) if p.passes(n)]
        desk.say(*screen.home(p, now, known))


def show_list(desk: Desk, args: argparse.Namespace) -> None:
    p, now = desk.progress, desk.book.now()
    due = {n for n, _ in p.due(now)}
    rows, place = [], {n: i for i, n in enumerate(p.path, 1)}
    for e in desk.exercises:
        if (args.due and e.name not in due) or not e.facts["topic"].lower().startswith(args.topic.lower()):
            continue
        recall, best, last = p.recall(e.name, now), p.best(e.name), p.last(e.name)
        rows.append(
            {
                "exercise": e.name,
                "path": place[e.name],
                "topic": e.facts["topic"],
                "ranks": e.ranks,
                "minutes": e.facts["minutes"],
                "status": p.status(e.name),
                "attempts": len(p.of(e.name)),
                "passes": len(p.passes(e.name)),
                "best_seconds": best,
                "last": last.isoformat() if last else None,
                "due": recall.due.date().isoformat() if recall else None,
                "recall": round(recall.likely, 3) if recall else None,
            }
        )
    if args.json:
        reading = [dict(zip(("number", "mark", "title", "exercises"), r, strict=True)) for r in pages.reading(p)]
        print(json.dumps({"exercises": rows, "due": sorted(due), "current": p.current, "reading": reading}, allow_nan=False))
        return
    if not rows:
        print("Nothing is due." if args.due else f"No exercise has the topic {args.topic!r}.")
        return
    columns = ("exercise", "path", "topic", "ranks", "pace", "attempts", "best", "status", "last", "due")
    print(
        screen.table(
            columns,
            [
                (
                    screen.short(r["exercise"]),
                    r["path"],
                    r["topic"],
                    r["ranks"],
                    f"{r['minutes']} min",
                    r["attempts"] or "-",
                    screen.clock(r["best_seconds"]) if r["best_seconds"] is not None else "-",
                    r["status"],
                    (r["last"] or "-")[:10],
                    "now" if r["exercise"] in due else r["due"] or "-",
                )
                for r in rows
            ],
            fold="exercise",
            drop=("ranks", "topic", "attempts"),
        )
    )
    if len(rows) == len(desk.exercises):
        path = " ".join(n.partition("_")[0] for n in p.path)
        desk.say("", *screen.wrapped(f"path: by difficulty, each after what it builds on: {path}", 0))


def read(desk: Desk, number: str | None, mark: str | None) -> None:
    desk.not_in_drill("reading")
    papers = pages.papers()
    if number is None:
        columns = [c.lower() for c in pages.READING_COLUMNS]
        print(screen.table(columns, pages.reading(desk.progress), fold="paper"))
        return
    paper = next((x for x in papers if str(x.number) == number or x.id == number), None)
    if paper is None:
        raise Refused(f"{number!r} is no paper of the list: use a number from 1 to {len(papers)}")
    if mark is not None:
        if mark.upper() not in MARKS:
            raise Refused(f"{mark!r} is no mark: use done, wip or -")
        desk.book.add("read", paper=paper.id, mark=mark.upper())
        pages.write(desk.progress, desk.book.now(), desk.book.folder)
    row = pages.reading(desk.progress)[paper.number - 1]
    desk.say(*screen.wrapped(f"{paper.number}  {row[1]}  {paper.title}", 0))
    desk.say(*(part for line in paper.take.splitlines() for part in screen.wrapped(line, 3)))
    desk.say(f"   exercises {row[3]}" if row[3] else "")
