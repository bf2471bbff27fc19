"""JSON from a file that somebody else may have written."""

from __future__ import annotations

import json


def parsed(text: str | bytes) -> object:
    """What a JSON text says. Raises ValueError for a text that is none, or is nested more deeply than Python can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
