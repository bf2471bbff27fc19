"""The pages of practice say what the code says: their numbers are computed, not typed."""

import pytest

from practice import mutants_found, pages
from practice.desk import numbers
from practice.desk.numbers import DOCS, ROOT
from practice.dev import REJECTED_SHARE
from practice.exercise import NoSuchExercise, every
from practice.progress import Progress
from practice.workbook import local_now

SHEET = (ROOT / "practice/cheatsheet.md").read_text()
STALE = "run `python -m launch.practice dev pages`"


def test_the_numbers_of_the_cheatsheet_are_those_of_the_code():
    assert numbers.cheatsheet(SHEET) == SHEET, STALE


@pytest.mark.parametrize("number", ["134,515,008", "1282.84 MiB", "769.70 MiB", "69,120", "3.69"])
def test_a_number_that_is_changed_by_hand_is_noticed(number):
    changed = SHEET.replace(number, "1" + number, 1)
    assert changed != SHEET
    assert numbers.cheatsheet(changed) == SHEET


def test_numbers_that_can_be_worked_out_by_hand():
    assert "| 2,654,208   |" in SHEET  # 3 x 576 x 1536
    assert "884,736" in SHEET  # 576 x (9 + 2 x 3) x 64 + 9 x 64 x 576
    assert "| 131,072         |" in SHEET  # Llama-3-8B: 2 x 32 x 8 x 128 x 2 bytes


def test_a_topic_of_the_cheatsheet_can_be_asked_for():
    topic = pages.cheatsheet("kv")
    assert topic.startswith("KV cache")
    assert "Llama-3-8B" in topic
    assert "<!--" not in pages.cheatsheet()
    assert len(pages.cheatsheet().splitlines()) < 120


def test_a_word_of_the_cheatsheet_is_looked_for_where_no_heading_has_it():
    found = pages.cheatsheet("reduce_scatter")
    assert "reduce_scatter" in found
    assert len(found) < len(pages.cheatsheet()) / 2
    with pytest.raises(NoSuchExercise, match="is no topic, and no line has it"):
        pages.cheatsheet("origami")


def test_every_exercise_is_on_the_board_and_its_papers_in_the_list():
    board = [file for _, _, file, *_ in pages.board(Progress(every()), local_now())]
    assert board == [f"exercises/{e.name}" for e in every()]
    reading = (ROOT / "practice/READING.md").read_text()
    blank = [(n, title, belong) for n, _, title, belong in pages.reading(Progress(every()))]
    rows = [line.split("|") for line in reading.splitlines() if line.startswith("|")][2:]
    assert [(int(r[1]), r[2].strip(), r[3].strip()) for r in rows] == blank, STALE
    assert pages.shared_reading(every()) == reading, STALE
    assert not (ROOT / "practice/STATUS.md").exists(), "the board is a page of the workbook"


def test_the_table_of_promises_is_that_of_the_exercises():
    text = (ROOT / "practice/AUTHORING.md").read_text()
    assert numbers.authoring(text) == text, STALE
    assert "| 27       | No rank makes more than its part of m and v " in text


def test_the_figures_of_the_mutants_are_of_the_exercises_as_they_are():
    text = DOCS.read_text()
    assert numbers.docs(text) == text, STALE
    found = mutants_found.recorded()
    stale = [e.name for e in every() if found.get(e.name, {}).get("of") != mutants_found.digest(e)]
    assert set(found) <= {e.name for e in every()}
    assert stale == [], f"run `python -m launch.practice dev check {' '.join(stale)}`, then `dev pages`"
    assert all(f["rejected"] >= REJECTED_SHARE * f["differ"] and not f["problems"] for f in found.values())
