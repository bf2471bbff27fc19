"""Numbers as a learner types them, in answer to a question."""

from __future__ import annotations


def number_of(text: str) -> float | None:
    """46,080 or 46_080 or 2.5e3 or 3/4 -> a number; None if it is none."""
    top, _, bottom = text.strip().replace(",", "").replace("_", "").replace(" ", "").partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None
