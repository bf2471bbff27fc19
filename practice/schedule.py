"""When an exercise is due again: FSRS (github.com/open-spaced-repetition), set for interviews and not for vocabulary.

Retention .95, at most 45 days, no learning steps, no fuzz: six passes rated Good come after 1, 3, 8, 19, 43 and 45 days.
With the package's defaults they would come after 2, 11, 46, 163 and 497 days.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

RETENTION = 0.95
LONGEST_DAYS = 45
AGAIN, HARD, GOOD, EASY = 1, 2, 3, 4
# So many mistakes may be named in an attempt that is Good.
TOLD = 2
RATINGS = {AGAIN: "Again", HARD: "Hard", GOOD: "Good", EASY: "Easy"}


@dataclass(frozen=True)
class Recall:
    """due: when to practise next. likely: the chance of recall at the time that was asked for, 0 to 1."""

    due: datetime
    likely: float


def recall(reviews: Sequence[tuple[datetime, int]], now: datetime, interview: date | None = None) -> Recall | None:
    """What FSRS says after these (time, rating), oldest first; None after none. Days are local ones: due when a day begins.

    Before an interview nothing is put off for more than a third of the days that are left.
    """
    if not reviews:
        return None
    import fsrs  # 0.1 s that only who has passed something spends

    card, memory = fsrs.Card(card_id=1), None
    for when, rating in reviews:
        left = (interview - when.date()).days if interview else -1
        longest = min(LONGEST_DAYS, max(1, left // 3)) if left >= 0 else LONGEST_DAYS
        memory = fsrs.Scheduler(
            desired_retention=RETENTION,
            maximum_interval=longest,
            learning_steps=(),
            relearning_steps=(),
            enable_fuzzing=False,
        )
        card, _ = memory.review_card(card, fsrs.Rating(rating), when.astimezone(UTC))
    due = card.due.astimezone(now.tzinfo).replace(hour=0, minute=0, second=0, microsecond=0)
    return Recall(due, float(memory.get_card_retrievability(card, max(now, when).astimezone(UTC))))


def rating(
    *, passed: bool, drill: bool, late: bool, solution: bool, nudges: int, checks: int, pace: float, mistakes: int = 0
) -> int:
    """How well an exercise is known, as an attempt shows it. pace: time taken over the exercise's minutes.

    mistakes: those that the examiner named on the way, each once: to be told is a help too.
    """
    if solution or not (passed or late):
        return AGAIN
    if late or nudges or pace > 1.5 or checks > 8 or mistakes > TOLD:
        return HARD
    return EASY if drill and checks == 1 and pace <= 0.5 else GOOD
