"""The pages of a workbook, STATUS.md and READING.md. Only what stands between two comment marks is written.

practice/READING.md is the list that all share, without marks: no learner's command writes beside the exercises.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from practice.exercise import Exercise, NoSuchExercise
from practice.progress import MARKS, Progress
from practice.workbook import replace

HERE = Path(__file__).resolve().parent
END = "<!-- end of table -->"


def between(text: str, name: str, table: str) -> str:
    """The text with the lines between `<!-- name: ... -->` and the next end mark replaced."""
    replaced, pairs = re.subn(
        rf"(<!-- {name}\b[^\n]*-->\n).*?^{re.escape(END)}$",
        lambda m: f"{m[1]}{table}{END}",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    if pairs != 1:
        raise ValueError(f"a page needs one pair of lines `<!-- {name}: ... -->` and `{END}`, this has {pairs}")
    return replaced


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table whose columns are aligned, so that it reads and diffs well."""
    cells = [list(map(str, columns)), *(list(map(str, r)) for r in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]) + "\n"


# --- reading


@dataclass(frozen=True)
class Paper:
    """number: as `read` takes it, from 1. id: as exercises name it in `reads`."""

    number: int
    id: str
    title: str
    take: str


def papers() -> list[Paper]:
    text = (HERE / "READING.md").read_text()
    papers = re.findall(r"^## (\w+): (.+)\n((?:(?!## ).+\n?)+)", text, flags=re.MULTILINE)
    return [Paper(n, id, title, take.strip()) for n, (id, title, take) in enumerate(papers, 1)]


def reading(p: Progress) -> list[tuple[int, str, str, str]]:
    """Rows (number, mark, title, the numbers of the exercises it belongs to)."""
    belong = {
        paper.id: " ".join(e.name.partition("_")[0] for e in p.exercises if paper.id in e.facts["reads"]) for paper in papers()
    }
    belong["interview"] = belong.get("interview") or "all"
    return [(paper.number, p.marks.get(paper.id, MARKS[0]), paper.title, belong[paper.id]) for paper in papers()]


READING_COLUMNS = ("#", "Mark", "Paper", "Exercises")


# --- the board

BOARD_COLUMNS = ("#", "Topic", "File", "Status", "Last Practice", "Due", "Best")


def board(p: Progress, now: datetime) -> list[tuple[str, ...]]:
    rows = []
    for e in p.exercises:
        recall, last, best = p.recall(e.name, now), p.last(e.name), p.best(e.name)
        rows.append(
            (
                e.name.partition("_")[0],
                e.facts["topic"],
                f"exercises/{e.name}",
                p.status(e.name),
                f"{last:%Y-%m-%d}" if last else MARKS[0],
                f"{recall.due:%Y-%m-%d}" if recall else MARKS[0],
                f"{best / 60:.0f} of {e.facts['minutes']} min" if best is not None else MARKS[0],
            )
        )
    return rows


STATUS = f"""# Practice: status

Written by `python -m launch.practice board`. `-` not begun, `WIP` begun, `DONE` passed in a drill, without help.

<!-- exercises -->
{END}

<!-- reading -->
{END}
"""


def shared_reading(exercises: Sequence[Exercise]) -> str:
    """practice/READING.md with its table as the exercises have it now."""
    rows = [(number, title, belong) for number, _, title, belong in reading(Progress(exercises))]
    columns = [c for c in READING_COLUMNS if c != "Mark"]
    return between((HERE / "READING.md").read_text(), "table", table(columns, rows))


def write(p: Progress, now: datetime, folder: Path) -> list[Path]:
    """Bring STATUS.md and READING.md in `folder` up to date; they are made where there are none."""
    reading_table = table(READING_COLUMNS, reading(p))
    status, papers_page = folder / "STATUS.md", folder / "READING.md"
    folder.mkdir(parents=True, exist_ok=True)
    text = status.read_text() if status.exists() else STATUS
    text = between(text, "exercises", table(BOARD_COLUMNS, board(p, now)))
    replace(status, between(text, "reading", reading_table))
    text = papers_page.read_text() if papers_page.exists() else (HERE / "READING.md").read_text()
    replace(papers_page, between(text, "table", reading_table))
    return [status, papers_page]


def cheatsheet(topic: str = "") -> str:
    """The cheatsheet, the section whose heading begins with `topic`, or else what has that word in it, under its heading.

    Raises NoSuchExercise naming the topics there are.
    """
    text = re.sub(r"^<!--.*-->\n", "", (HERE / "cheatsheet.md").read_text(), flags=re.MULTILINE)
    if not topic:
        return text.rstrip()
    sections = re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", text, flags=re.MULTILINE)
    chosen = [f"{title}\n{body.rstrip()}" for title, body in sections if title.lower().startswith(topic.lower())]
    chosen = chosen or [found for title, body in sections if (found := _holding(title, body, topic))]
    if not chosen:
        titles = ", ".join(title for title, _ in sections)
        raise NoSuchExercise(f"{topic!r} is no topic, and no line has it: use a word of the sheet, or one of {titles}")
    return "\n\n".join(chosen)


def _holding(title: str, body: str, word: str) -> str:
    """The paragraphs of a section that hold a word, and of a table its head and the rows that do; '' where none does."""
    found = []
    for paragraph in re.split(r"\n\s*\n", body.strip()):
        lines = paragraph.splitlines()
        rows = [line for line in lines if line.startswith("|")]
        hits = [line for line in rows[2:] if word.lower() in line.lower()]
        if hits:
            found.append("\n".join([*rows[:2], *hits]))
        elif not rows and word.lower() in paragraph.lower():
            found.append(paragraph)
    return "\n\n".join([title, *found]) if found else ""
