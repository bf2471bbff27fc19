"""Ways to name a wrong answer that need no list of mistakes: its parts, a factor, an order, what depends on what, where."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np

from practice.compare import first_wrong, wrong_entries

# So many entries must show a factor before it is spoken of.
MANY = 4
# Digits of a number, and characters of a text, that are shown where they tell two apart.
DIGITS, WINDOW = 6, 300


def ingredients(name: str, got: np.ndarray, parts: dict[str, np.ndarray], allowed: np.ndarray) -> str:
    """`y = part 0 + 3 x b (right: 1 x each)` where `got` is such a sum of `parts`, by least squares; '' where it is not.

    `parts` broadcast to got's shape. A multiple is named if it is a whole number or a fraction with a denominator up to 16.
    """
    if not got.size or not np.isfinite(got).all():
        return ""
    try:
        columns = np.stack([np.broadcast_to(p, got.shape).ravel() for p in parts.values()], axis=1).astype(np.float64)
    except ValueError:
        return ""
    if len(columns) <= columns.shape[1] or np.linalg.matrix_rank(columns) < columns.shape[1]:
        return ""
    x = got.astype(np.float64).ravel()
    multiples = np.linalg.lstsq(columns, x, rcond=None)[0]
    nice = [Fraction(float(c)).limit_denominator(16) for c in multiples]
    off = np.abs(columns @ np.array([float(c) for c in nice]) - x)
    # A sum with other multiples of the parts rounds differently: the tolerance follows the size of the parts.
    if (off > 4 * np.ravel(allowed) + 1e-14 * np.abs(columns).sum(axis=1)).any() or all(c == 1 for c in nice):
        return ""
    terms = [part if c == 1 else f"{c} x {part}" for part, c in zip(parts, nice, strict=True) if c]
    missing = [part for part, c in zip(parts, nice, strict=True) if not c]
    equation = f"{name} = {' + '.join(terms) or '0'}"
    return f"{equation}   (right: each once{'; missing: ' + ', '.join(missing) if missing else ''})"


def patches(name: str, got: np.ndarray, parts: dict[str, np.ndarray]) -> str:
    """`y[0..2] = part 0 + 2 x part 1, y[3] = part 0` where entries are different exact sums of parts; '' where they are not.

    Multiples up to the number of parts are tried; an entry that fits several ways tells nothing.
    """
    n = len(parts)
    if got.ndim != 1 or not 2 <= n <= 4 or not np.isfinite(got).all():
        return ""
    tried = np.array(list(itertools.product(range(n + 1), repeat=n)))
    sums = tried @ np.stack([np.asarray(p, np.float64) for p in parts.values()])
    ways = [np.flatnonzero(sums[:, i] == got[i]) for i in range(len(got))]
    if any(len(w) != 1 for w in ways):
        return ""
    said = []
    for way, entries in itertools.groupby(range(len(got)), lambda i: int(ways[i][0])):
        if (tried[way] == 1).all():
            continue
        first, *rest = entries
        terms = [part if c == 1 else f"{c} x {part}" for part, c in zip(parts, tried[way].tolist(), strict=True) if c]
        place = f"{first}..{rest[-1]}" if rest else f"{first}"
        said.append(f"{name}[{place}] = {' + '.join(terms) or '0'}")
    return f"{', '.join(said[:3])}{', ...' if len(said) > 3 else ''}   (right: each once)" if said else ""


def factor(
    got: np.ndarray, want: np.ndarray, allowed: np.ndarray, known: dict[str, float]
) -> tuple[float, set[str], int] | None:
    """(c, its names, entries that show it) where got is c times want; None where it is not.

    known: names of values that c, or its inverse, root or inverse root may be.
    """
    size = float(np.sum(want.astype(np.float64) ** 2)) if want.size else 0.0
    if not size or not np.isfinite(got).all():
        return None
    c = float(np.sum(got.astype(np.float64) * want)) / size
    if abs(c) < 1e-9 or abs(c - 1) < 1e-3 or wrong_entries(got, c * want, np.abs(c) * 4 * allowed + allowed).any():
        return None
    candidates = {"-1": -1.0, "2": 2.0, "1/2": 0.5}
    for text, value in known.items():
        if value > 1:
            candidates |= {text: value, f"1/{text}": 1 / value, f"sqrt({text})": value**0.5, f"1/sqrt({text})": value**-0.5}
    names = {text for text, value in candidates.items() if abs(c - value) < 1e-5 * abs(value)}
    return c, names, int((np.abs(want) > 8 * allowed).sum())


def digits(got: np.ndarray, want: np.ndarray) -> int:
    """To how many digits an array is right, seen from its largest entry; 0 where something is not finite."""
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return 0
    off, size = float(np.abs(got - want).max(initial=0.0)), float(np.abs(want).max(initial=0.0))
    return int(-np.log10(off / size)) if 0 < off < size else 0


def factor_said(name: str, found: list[tuple[float, set[str], int]]) -> str:
    """`dW1 is exactly 1/T times what is right`. A name only if it alone fits every case; nothing of an entry or two."""
    if not found or sum(entries for _, _, entries in found) < MANY or max(entries for *_, entries in found) < 2:
        return ""
    names = set.intersection(*(names for _, names, _ in found))
    numbers = {f"{c:.6g}" for c, _, _ in found}
    if len(names) == 1:
        return f"{name} is exactly {(c := names.pop())} times what is right{_meant(c)}"
    return f"{name} is {numbers.pop()} times what is right, everywhere" if len(numbers) == 1 else ""


def _meant(c: str) -> str:
    """What makes a result c times what is right."""
    if c == "-1":
        return ": its sign is turned"
    if c == "1/ranks":
        return ": it is divided by the number of ranks, and should not be"
    if c == "ranks":
        return ": it is multiplied by the number of ranks, or added up once for each of them, and should not be"
    return ""


def order(name: str, got: np.ndarray, want: np.ndarray, allowed: np.ndarray) -> str:
    """`along dim 1, entries [0 1 0 1] of what is right stand where [0 0 1 1] should`."""
    if got.ndim == 2 and got.shape == want.T.shape and got.shape[0] > 1 and got.shape[1] > 1:
        limit = float(np.max(allowed, initial=0.0))
        if _differ(want) and _differ(want.T) and not wrong_entries(got, want.T, limit).any():
            return f"{name} is right but transposed"
    if got.shape != want.shape or not got.size:
        return ""
    for dim in range(got.ndim):
        n = got.shape[dim]
        if not 2 <= n <= 64:
            continue
        if not _differ(np.moveaxis(want, dim, 0)):
            continue
        g, w, a = (np.moveaxis(np.broadcast_to(x, got.shape), dim, 0) for x in (got, want, allowed))
        places = [
            next((j for j in range(n) if not wrong_entries(g[i], w[j], np.maximum(a[i], a[j])).any()), -1) for i in range(n)
        ]
        # What was left 0 looks like a row that is right to be 0: of an order such rows tell nothing.
        if any(j != i and not np.any(g[i]) for i, j in enumerate(places)):
            continue
        if min(places) >= 0 and places != list(range(n)):
            return f"along dim {dim} of {name} stand entries {places} of what is right, in place of {list(range(n))}"
    return ""


def shape(name: str, got: np.ndarray, want: np.ndarray, limit: float) -> str:
    """What a wrong shape comes of: a dim of 1 too many or too few, an empty list, dims in another order, no last reshape."""
    if got.shape == (0,) and want.ndim > 1 and not want.size:
        return f"An array made of an empty list has shape (0,): with nothing to put into it, make {name} of shape {want.shape}."
    longer = got.ndim == want.ndim and len(got) > len(want) > 0 and got.shape[1:] == want.shape[1:]
    if longer and not _off(got[: len(want)], want, limit):
        return f"The first {len(want)} of {name} are right, and {len(got) - len(want)} more follow: cut off what is beyond."
    if got.size != want.size or not got.size:
        return ""
    ones = got.ndim != want.ndim and [n for n in got.shape if n != 1] == [n for n in want.shape if n != 1]
    if ones and not _off(got.reshape(want.shape), want, limit):
        if got.ndim < want.ndim:
            return f"The numbers of {name} are right, but a dim of 1 is missing."
        return f"The numbers of {name} are right, but a dim of 1 is left, as keepdims=True or a slice of one leaves it."
    for dims in itertools.permutations(range(got.ndim)) if got.ndim == want.ndim and got.ndim < 6 else ():
        turned = got.transpose(dims)
        if got.ndim > 2 and turned.shape == want.shape and not _off(turned, want, limit):
            return f"{name} is right but for the order of its dims: transpose it by {dims}."
    if not _off(got.reshape(want.shape), want, limit):
        return f"The numbers of {name} are right, and in the right order: reshape it."
    return ""


def _off(got: np.ndarray, want: np.ndarray, limit: float) -> bool:
    return bool(wrong_entries(got, want, limit).any())


def parts(name: str, got: np.ndarray, rank: int, right: list[tuple[np.ndarray, np.ndarray | float]]) -> str:
    """Whether all ranks' parts stand where this rank's should, or its part where the whole should. right: by rank."""
    wants, limit = [w for w, _ in right], max(float(np.max(a, initial=0.0)) for _, a in right)
    want = wants[rank]
    for dim in range(want.ndim if got.ndim == want.ndim and len(wants) > 1 else 0):
        if len({_without(w, dim) for w in wants}) == 1:
            whole = np.concatenate(wants, axis=dim)
            if got.shape == whole.shape and not wrong_entries(got, whole, limit).any():
                return f"{name} is that of all ranks, one part after another along dim {dim}: this rank's alone is asked for"
        own = np.array_split(want, len(wants), axis=dim)[rank]
        # Only what is the same on every rank is whole on each.
        alike = all(w.shape == want.shape and not wrong_entries(w, want, limit).any() for w in wants)
        if alike and got.size and got.shape == own.shape and not wrong_entries(got, own, limit).any():
            return f"{name} is this rank's part along dim {dim} only: the whole is asked for, on every rank"
    return ""


def elsewhere(name: str, gots: list[np.ndarray], right: list[tuple[np.ndarray, np.ndarray | float]]) -> str:
    """Whether the ranks' parts are together what is right, but cut at other places. gots, right: by rank."""
    wants, limit = [w for w, _ in right], max(float(np.max(a, initial=0.0)) for _, a in right)
    if len(wants) < 2 or any(g.ndim != wants[0].ndim for g in gots):
        return ""
    for dim in range(wants[0].ndim):
        lengths, due = ([x.shape[dim] for x in some] for some in (gots, wants))
        if len({_without(x, dim) for x in (*gots, *wants)}) > 1 or lengths == due or sum(lengths) != sum(due):
            continue
        if not wrong_entries(np.concatenate(gots, axis=dim), np.concatenate(wants, axis=dim), limit).any():
            ours, theirs = (", ".join(map(str, some)) for some in (lengths, due))
            cut = f"{name} is right, but cut at other places along dim {dim}"
            return f"{cut}: the ranks have {ours} of it, and should have {theirs}"
    return ""


def _without(x: np.ndarray, dim: int) -> tuple[int, ...]:
    return x.shape[:dim] + x.shape[dim + 1 :]


def _differ(rows: np.ndarray) -> bool:
    """Whether no two rows are the same: only then is their order seen."""
    return len(np.unique(rows.reshape(len(rows), -1), axis=0)) == len(rows)


def moved(a: np.ndarray, b: np.ndarray) -> set[int]:
    """Indices along the first dim at which two results differ by more than rounding."""
    size = max(1e-12, float(np.abs(a[np.isfinite(a)]).max(initial=0.0)))
    return set(np.flatnonzero(wrong_entries(a, b, 1e-9 * size).reshape(len(a), -1).any(axis=1)).tolist())


def dependence(name: str, row: int, result: str, got: set[int], right: set[int]) -> str:
    """What moving input row `row` moves in the result, against what it should."""
    too_many, too_few = sorted(got - right), sorted(right - got)
    if too_many:
        return f"changing {name}[{row}] changes {result}[{too_many[0]}], which must not depend on it"
    if too_few:
        return f"changing {name}[{row}] leaves {result}[{too_few[0]}] as it is, which must depend on it"
    return ""


def located(name: str, on: str, wrong: np.ndarray, got: np.ndarray, want: np.ndarray) -> list[str]:
    """The first wrong entry (`on` which rank) with both values, and where along the first dim the wrong ones are."""
    index = first_wrong(wrong)
    at = f"[{', '.join(map(str, index))}]" if index else ""
    ours, right = told_apart(got[index], want[index])
    lines = [f"{name}{at}{on}:  got {ours}   want {right}"]
    if wrong.ndim and len(wrong) > 1:
        rows = wrong.reshape(len(wrong), -1).any(axis=1)
        if not rows.all():
            what = "entries" if wrong.ndim == 1 else "rows"
            lines.append(f"of {name}, {what} {_ranges(np.flatnonzero(rows))} are wrong, {_ranges(np.flatnonzero(~rows))} right")
        elif wrong.ndim > 1:
            columns = np.moveaxis(wrong, -1, 0).reshape(wrong.shape[-1], -1).any(axis=1)
            if not columns.all():
                places = f"{_ranges(np.flatnonzero(columns))} are wrong, {_ranges(np.flatnonzero(~columns))} right"
                lines.append(f"of {name}, along the last dim entries {places}")
    return lines


def _ranges(indices: np.ndarray) -> str:
    runs: list[list[int]] = []
    for i in indices.tolist():
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def told_apart(a: float, b: float) -> tuple[str, str]:
    """Two numbers with as many digits as it takes to see that they differ."""
    for digits in range(DIGITS, 18):
        texts = f"{a:.{digits}g}", f"{b:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts


def apart(a: str, b: str) -> tuple[str, str]:
    """Two long texts, cut so that the place where they begin to differ is seen in both."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = 0 if same < WINDOW - 60 else same - 60

    def cut(text: str) -> str:
        shown = text[start : start + WINDOW]
        return f"{'... ' if start else ''}{shown}{' ...' if start + WINDOW < len(text) else ''}"

    return cut(a), cut(b)
