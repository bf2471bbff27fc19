"""What the examiner said to answers that were written from the scaffolds alone, by exercise, before anything was mended."""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("blind.json")
KEYS = ("right", "refused", "wrong", "accepted", "cause", "ingredients", "numbers", "misleading")
COLUMNS = (
    "exercise",
    "right",
    "refused",
    "wrong",
    "passed",
    "told by cause",
    "by ingredients",
    "by numbers only",
    "misleadingly",
)


def rows() -> list[tuple[object, ...]]:
    """One row an exercise, then the sum of all."""
    found = json.loads(FILE.read_text())
    total = {key: sum(f[key] for f in found.values()) for key in KEYS}
    return [(name, *(f[key] for key in KEYS)) for name, f in (found | {"all": total}).items()]
