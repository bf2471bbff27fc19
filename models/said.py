"""What a client has written, told from what a template writes: each of its characters that a control token could be made of is
replaced by a mark, a private character. Marks stay through whatever a template does with a text, and are taken off at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

# The last private characters of Unicode are marks, as many as there must be: what a client writes may not hold them.
LAST = 0x10FFFD


class Marks:
    """The marks for control tokens of these texts, and a private character for each token itself. A token of blanks alone
    cannot be marked, and is left out of `signs`."""

    def __init__(self, tokens: Iterable[str]) -> None:
        # Blanks, quotes and backslashes are escaped, trimmed and split at by templates.
        every = [(t, {c for c in t if c.isprintable() and c not in ' "\\'}) for t in tokens]
        named = [t for t, letters in every if letters]
        letters = sorted(set().union(*(letters for _, letters in every)))
        self.first = LAST + 1 - len(letters) - len(named)
        self._marks = {ord(c): self.first + n for n, c in enumerate(letters)}
        self._plain = {mark: c for c, mark in self._marks.items()}
        self.signs = {t: chr(self.first + len(letters) + n) for n, t in enumerate(named)}
        self._taken = re.compile(f"[{chr(min(self.first, LAST))}-{chr(LAST)}]")
        # Of several tokens that begin at a place, the longest.
        self._tokens = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))) or r"(?!)")
        self._alike = re.compile(self._tokens.pattern, re.IGNORECASE)

    def said(self, value: object) -> object:
        """The value with every text in it marked. Raises ValueError for a text that holds a mark."""
        if isinstance(value, str):
            if at := self._taken.search(value):
                raise ValueError(f"a text holds U+{ord(at[0]):X}, which stands for a control token here: leave it out")
            return self.again(self.marked(value))
        if isinstance(value, dict):
            return {self.said(key): self.said(of) for key, of in value.items()}
        return [self.said(of) for of in value] if isinstance(value, list) else value

    def again(self, text: str) -> str:
        """A text that a template has made: as Said if there are marks in it."""
        return Said(text, self) if type(text) is str and self._taken.search(text) else text

    def marked(self, plain: str) -> str:
        return plain.translate(self._marks)

    def plain(self, marked: str) -> str:
        return marked.translate(self._plain)

    def signed(self, text: str) -> str:
        """The text with each token that no mark is in replaced by its sign."""
        return self._tokens.sub(lambda token: self.signs[token[0]], text)

    def alike(self, value: object) -> str | None:
        """A control token, in whatever case, that a text of this value holds."""
        if isinstance(value, str):
            return found[0] if (found := self._alike.search(value)) else None
        inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next(filter(None, map(self.alike, inside)), None)


class Said(str):
    """A text with marks, which a template's tests see as it was written. What it cuts from it has the same marks."""

    def __new__(cls, marked: str, marks: Marks) -> Said:
        self = super().__new__(cls, marked)
        # With underscores, as the sandbox keeps these from templates.
        self._marked, self._plain, self._marks = str(marked), marks.plain(marked), marks
        return self

    def __hash__(self) -> int:
        return hash(self._plain)

    def __repr__(self) -> str:
        return self._marks.marked(repr(self._plain))

    def __iter__(self) -> Iterator[Said]:
        return (self[n] for n in range(len(self)))

    def __getitem__(self, at: int | slice) -> Said:
        return Said(self._marked[at], self._marks)

    # --- what is left of it: a character has the same place with its mark and without

    def lstrip(self, chars: str | None = None) -> Said:
        return self[len(self) - len(self._plain.lstrip(_plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> Said:
        return self[: len(self._plain.rstrip(_plain(chars)))]

    def strip(self, chars: str | None = None) -> Said:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> Said:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Said:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: int = -1) -> list[Said]:
        return self._cut(self._plain.split(_plain(sep), maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: int = -1) -> list[Said]:
        return self._cut(self._plain.rsplit(_plain(sep), maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[Said]:
        lines = self._cut(self._plain.splitlines(True), "")
        return lines if keepends else [line[: len(line._plain.splitlines()[0])] for line in lines]

    def partition(self, sep: str) -> tuple[Said, ...]:
        return tuple(self._cut(self._plain.partition(_plain(sep)), ""))

    def rpartition(self, sep: str) -> tuple[Said, ...]:
        return tuple(self._cut(self._plain.rpartition(_plain(sep)), ""))

    def _cut(self, parts: Sequence[str], sep: str | None) -> list[Said]:
        """These parts of it, which stand one after another with `sep` between them, or with blanks."""
        found, at = [], 0
        for part in parts:
            at = self._plain.index(part, at) if sep is None else at
            found.append(self[at : at + len(part)])
            at += len(part) + len(sep or "")
        return found

    # --- what is made of it

    def replace(self, old: str, new: str, count: int = -1) -> str:
        if not old:
            return Said(self._marked.replace(old, new, count), self._marks)
        return Said(str(new).join(map(str, self.split(old, count))), self._marks)


def _plain(text: object) -> object:
    return text._plain if isinstance(text, Said) else text


def _test(name: str) -> Callable:
    return lambda self, *args: getattr(self._plain, name)(*map(_plain, args))


def _cased(name: str) -> Callable:
    def method(self: Said) -> Said:
        made = getattr(self._plain, name)()
        if len(made) != len(self):
            return Said(self._marks.marked(made), self._marks)
        marked = (self._marks.marked(c) if a != b else c for c, a, b in zip(made, self._plain, self._marked, strict=True))
        return Said("".join(marked), self._marks)

    return method


_TESTS = "__contains__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ count endswith find index rfind rindex startswith"
_TESTS += " isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper"
for _name in _TESTS.split():
    setattr(Said, _name, _test(_name))
for _name in ("capitalize", "casefold", "lower", "swapcase", "title", "upper"):
    setattr(Said, _name, _cased(_name))
