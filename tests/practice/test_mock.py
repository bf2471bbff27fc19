"""A drill is as long as what it asks for; a mock interview goes across topics by the clock."""

from practice.exercise import find
from practice.progress import mocked
from tests.practice.test_cli import book, drill  # noqa: F401  fixtures


def test_a_drill_is_as_long_as_its_exercise_takes(drill):  # noqa: F811
    drill.desk.drill("20", None, "")
    assert drill.desk.progress.drill.minutes == find("20").facts["minutes"]
    drill.desk.stop()
    drill.desk.drill("20", 7, "")
    assert drill.desk.progress.drill.minutes == 7


def test_a_mock_interview_is_of_short_exercises_of_different_topics(drill):  # noqa: F811
    progress, now = drill.desk.progress, drill.desk.book.now()
    for minutes in (20, 45):
        names = mocked(progress, now, minutes)
        topics = [find(n).facts["topic"] for n in names]
        assert len(set(topics)) == len(topics) >= 2
        assert sum(find(n).facts["minutes"] for n in names) <= minutes
    assert len(mocked(progress, now, 5)) == 1
    drill.desk.mock(20)
    said = drill.said()
    assert "A mock interview of 20 minutes." in said
    assert "drill · 20 min" in said
    assert drill.desk.progress.drill.exercises == mocked(progress, now, 20)
    drill.desk.mock(20)
    assert "20:00 left" in drill.said()
