"""Settings of a model's files, asked for by key, type and default. An error names the file, the key and the value."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from sys import float_info

from models.piece import ModelError
from parallel.json_text import parsed


class Settings:
    """`values` by key, from the file `where`. An absent key has the default that the caller passes; a null has it too if that
    is None. `taken`: the keys that were asked for. `parts`: settings that stand inside of these.

    Raises ModelError for a value of a wrong type or out of range, and for an absent key without a default (`...`).
    """

    def __init__(self, values: dict, where: str) -> None:
        self.values, self.where = values, where
        self.taken: set[str] = set()
        self.parts: list[Settings] = []

    def part(self, values: dict, name: str) -> Settings:
        """Settings that stand inside of these, under `name`."""
        self.parts.append(Settings(values, f"{self.where}: {name}"))
        return self.parts[-1]

    def unread(self, idle: Collection[str] = ()) -> list[str]:
        """A line for each place with keys that nobody has asked for, neither `idle` (of no consequence) nor off."""
        left = [key for key, value in self.values.items() if key not in self.taken and key not in idle]
        left = [key for key in left if self.values[key] not in (None, False, {}, [])]
        said = [f"{key} {_shown(self.values[key])}" for key in left]
        lines = [f"{self.where}: not known and not used: {', '.join(said)}"] if said else []
        return lines + [line for part in self.parts for line in part.unread(idle)]

    def refuse(self, key: str, right: str) -> ModelError:
        """The error to raise for the value at `key`. `right`: what would be right."""
        given = repr(self.values[key]) if key in self.values else "not given"
        return ModelError(f"{self.where}: {key} is {given}: {right}")

    def get(self, key: str, default: object = None) -> object:
        self.taken.add(key)
        if key not in self.values and default is ...:
            raise self.refuse(key, "it has no default")
        return self.values.get(key, default)

    def pass_over(self, *keys: str) -> None:
        """These are of no consequence here, whatever they say."""
        self.taken.update(keys)

    def size(self, key: str, default: int | None = ..., least: int = 1, most: int | None = None) -> int | None:
        """A whole number from `least` on, up to `most`; None only where that is the default."""
        value = self.get(key, default)
        if value is None and default is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not least <= value <= (float_info.max if most is None else most)
        ):
            raise self.refuse(key, f"use a whole number, {least} {'or more' if most is None else f'to {most}'}")
        return value

    def number(self, key: str, default: float | None = ..., least: float = 0.0) -> float | None:
        """A finite number from `least` on; None only where that is the default."""
        value = self.get(key, default)
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= float_info.max:
            raise self.refuse(key, f"use a number, {least:g} or more")
        return float(value)

    def rotated(self, key: str, width: int) -> int:
        """`width`, which comes from `key`, if it can be rotated. A huge one is refused here, as tables of angles are made
        before anything is compared with the tensors' shapes."""
        if width % 2 or width > 2**16:
            raise self.refuse(key, f"cannot rotate a width of {width}, use an even one, 2 to 65536")
        return width

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null is false."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, "use true or false")
        return bool(value)

    def only(self, key: str, default: object, *allowed: object) -> object:
        """A value that must be the default or one of `allowed`, as the layers can do no other."""
        value = self.get(key, default)
        known = [default, *allowed]
        if value not in known:
            raise self.refuse(key, f"not supported: only {' or '.join(map(repr, known))} is")
        return value


def read_json(file: Path) -> dict:
    try:
        values = parsed(file.read_text("utf-8"))
    except OSError as e:
        raise ModelError(f"{file}: {e.strerror}") from None
    except ValueError as e:
        raise ModelError(f"{file}: not JSON: {e}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{file}: holds {type(values).__name__}, use an object of keys and values")
    return values


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
