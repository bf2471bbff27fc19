"""Settings of a model's file, asked for by key, type and default. An error names the file, the key and the value."""

from __future__ import annotations

from sys import float_info

from models.piece import ModelError


class Settings:
    """`values` by key, from the file `where`. An absent key has the default that the caller passes; a null has it too if that
    is None. `taken`: the keys that were asked for.

    Raises ModelError for a value of a wrong type or out of range, and for an absent key without a default (`...`).
    """

    def __init__(self, values: dict, where: str) -> None:
        self.values, self.where = values, where
        self.taken: set[str] = set()

    def refuse(self, key: str, right: str) -> ModelError:
        """The error to raise for the value at `key`. `right`: what would be right."""
        given = repr(self.values[key]) if key in self.values else "not given"
        return ModelError(f"{self.where}: {key} is {given}: {right}")

    def get(self, key: str, default: object = None) -> object:
        self.taken.add(key)
        if key not in self.values and default is ...:
            raise self.refuse(key, "it has no default")
        return self.values.get(key, default)

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
