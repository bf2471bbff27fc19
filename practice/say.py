"""What the examiner says of a part that is wrong: what is seen, what the answer is made of, which mistake it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np

from practice import answer, digits, dtypes, origin, overwritten, probes, repairs, slips, translate, twists
from practice.compare import wrong_entries
from practice.known import Shown, compared, earlier, kept, known, partly, stale
from practice.part import Case, Outcome, Part, float64
from practice.truth import Truth

URGENT = ("error", "silent", "hang")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
STATE = "The same inputs gave the right answer at first, and now they do not: something is kept from one call to the next"
KEPT = (
    "as a global, a default argument that is changed, an attribute of a class, or an np.empty that is read before it is written"
)
NOBODY_KNOWS = "No known mistake gives this."
FORCED = ": something on the way is made or cast as {} whatever the inputs are"


@dataclass
class Judged:
    """A part's verdict. status: ok, wrong, todo (not implemented), unjudged."""

    part: str
    status: str
    case: str = ""
    lines: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)


def diagnose(truth: Truth, part: Part, failing: list, ran: list) -> Judged:
    """failing: (case, outcomes by rank, what is wrong by rank), the smallest first. ran: (case, outcomes by rank)."""
    case, by_rank, wrong = failing[0]
    judged = Judged(part.name, "wrong", case.label(part))
    # An error or an early end of one rank explains why others wait; and their waiting explains a wrong result.
    rank = min(wrong, key=lambda r: (URGENT.index(wrong[r][0]) if wrong[r][0] in URGENT else len(URGENT), r))
    kind, name = wrong[rank]
    shown, state = compared(failing, ran), _state(failing, ran)
    found = ([] if state else known(truth, shown, _all(shown, ran))) or kept(truth, ran)
    said = stale(truth, ran) if not found else ""
    if said or (state and not found):
        told = [said] if said else [*_kept(truth.answer), *_unread(truth)]
        return replace(judged, lines=[*_seen(truth, part, case, by_rank, wrong, rank), *told], mistakes=["state"])
    # A mistake that also spoils what is right here is told only if nothing else gives this answer; of an error, which is seen
    # alike wherever it comes of, not at all.
    twist = None
    if len(found) == 1 and kind in ("value", "error") and earlier(truth, found[0], case):
        twist = twists.found(truth, _all(shown, ran)) if kind == "value" else None
        found = [] if twist or kind == "error" else found
    returned = _returned(truth, case, rank, by_rank[rank])
    if returned and not found:
        judged.lines = [returned]
        return judged
    outputs = _outputs(truth, failing)
    judged.lines += [*_seen(truth, part, case, by_rank, wrong, rank), *([outputs] if outputs else [])]
    floats = _floats(truth, rank, name, failing) if _breaks(truth, case, rank, by_rank[rank], name) else []
    # Another mistake that is known says what breaks, and why.
    other = found and not any(re.search(r"[Nn]o maximum|overflows", m.sentence) for m in found)
    judged.lines += [] if other and floats and floats[0].startswith(translate.NAIVE) else floats
    equation = _equation(truth, part, case, rank, by_rank[rank], name) if kind == "value" else ""
    judged.lines += [equation] if equation else []
    judged.mistakes = [m.name for m in found]
    for m in found:
        judged.lines += ["", m.sentence, *([f"Seen in the wild: {m.seen}."] if m.seen else [])]
    if not found and floats and floats[0].startswith(translate.NAIVE):
        judged.mistakes = ["naive_softmax"]
    elif not found and kind in ("value", "shape", "nan"):
        ways = _unlisted(truth, failing, ran, shown, rank, name, bool(floats or equation), twist)
        # Where nothing is said, nothing is counted as told.
        judged.mistakes, said = next((way for way in ways if way[1]), ([], []))
        judged.lines += [said] if isinstance(said, str) else said
    elif not found and kind == "dtype" and (lines := repairs.found(truth, case, ran, dtypes.edits)):
        judged.mistakes = [f"repair: {lines[-1]}"]
        # The line that is repaired is told, not the one that was seen, but for a cast that is written out.
        first = judged.lines[0] if "not made float32 again" in judged.lines[0] else judged.lines[0].partition(": ")[0]
        judged.lines = [first, *([outputs] if outputs else []), "", *lines, *dtypes.why(lines[-1])]
    elif (
        not found
        and kind in ("error", "hang")
        and "argument" not in by_rank[rank].error
        and (lines := repairs.found(truth, case, ran))
    ):
        judged.mistakes = [f"repair: {lines[-1]}"]
        judged.lines += ["", *lines]
    return judged


def _unlisted(
    truth: Truth,
    failing: list,
    ran: list,
    shown: Shown,
    rank: int,
    name: str,
    explained: bool,
    twist: twists.Twist | None,
) -> Iterator[tuple[list[str], str | list[str]]]:
    """What no list of mistakes has, the surest first: its names and what is said of it, if it is there. The twist may have
    been found before."""
    case, part = failing[0][0], truth.parts[failing[0][0].part]
    mended = cache(partial(repairs.found, truth, case, ran))
    if name.endswith("left alone"):
        yield [], "What was given is not left alone: it is changed. Work on copies, of what is in it too."
        return
    # Where an answer has no wrong number, only NaN, anything that gives NaN would explain it.
    if not any(truth.numbers(case, r, o) for r, o in enumerate(failing[0][1])):
        lines = (dtypes.narrow(truth.answer) and mended(dtypes.edits)) or mended()
        yield [f"repair: {x}" for x in lines[-1:]], lines or ("" if explained else NOBODY_KNOWS)
        return
    yield ["state"], overwritten.found(truth, [case for case, _, _ in failing if not case.moved])
    yield [], _parts(truth, failing, rank, name)
    yield ["shape"], _shape(truth, failing, rank, name)
    slip = _sure(truth, failing, slips.found(truth, shown))
    if slip and slip.likely:
        # A number that the file has not got may be two of its own.
        if slip.number is not None and not answer.has(truth.answer, slip.number):
            yield [f"repair: {x}" for x in mended()[-1:]], mended()
        yield [slip.name], slip.sentence
    if dtypes.narrow(truth.answer) and (lines := mended(dtypes.edits)):
        which, lines = dtypes.told(lines)
        yield [which], lines
    if digits.single(truth, part, failing, ran):
        yield ["float32"], digits.narrow(failing)
    if digits.half(truth, failing):
        yield ["float16"], digits.HALF
    if lost := digits.lost(truth, failing):
        yield [f"repair: {x}" for x in mended()[-1:]], mended()
        yield [], lost
    # A number that nobody would write may stand for another thing: a bracket that is not there, a factor too many.
    if twist := _sure(truth, failing, twist or twists.found(truth, _all(shown, ran))):
        # That is in our words: the learner's own line, where it is found. Names that they have not got tell them nothing.
        if not twist.named(truth.exercise.scaffold, answer.asked(truth.answer, part.name)):
            yield [f"twist: {twist.sentence}"], [twist.sentence, *mended()]
        yield [f"repair: {x}" for x in mended()[-1:]], mended()
    some = partly(truth, failing)
    yield [m.name for m in some], ["", *(m.sentence for m in some)] if some else ""
    if lines := mended():
        said = _probe(truth, part, failing, rank, name, ran)
        yield [f"repair: {lines[-1]}"], [*([said] if said else []), *lines]
    if slip:
        yield [slip.name], slip.sentence
    # Where a smaller case hides it, as where all scores are far below 0 and not above.
    breaks = any(_breaks(truth, case, r, o, n) for case, some, _ in failing for r, o in enumerate(some) for n in o.results)
    if breaks and not explained and (lines := _broken(truth, rank, failing)):
        yield [], ["In another case numbers break:", *lines]
    said = _probe(truth, part, failing, rank, name, ran)
    yield [], said or [*([] if explained else [NOBODY_KNOWS]), *_unread(truth)]


def _sure(truth: Truth, failing: list, change: Any) -> Any:
    """A slip or a twist, where with other numbers, too, it gives what the learner's file gives."""
    return change if change and repairs.agrees(truth, failing[0][0], change.source) else None


def _kept(source: str) -> list[str]:
    """That something is kept between calls, and what, where the file shows it."""
    found = answer.kept(source)[:2]
    return [f"{STATE}: {', '.join(k.name for k in found)}.", *map(str, found)] if found else [f"{STATE}, {KEPT}."]


def _unread(truth: Truth) -> list[str]:
    functions: dict[str, list[str]] = {}
    for function, name in answer.unread(truth.answer, truth.exercise.solution, truth.exercise.rights.values()):
        functions.setdefault(name, []).append(function)
    return [f"{' and '.join(some)} must go by the argument {name}, and does not read it." for name, some in functions.items()]


def _wide(source: str, function: str, first: dict | None) -> list[str]:
    """Which line makes float64 of float32, or which of the function or of the file may; first: the one that was seen to."""
    if not first and (found := (answer.wide(source, function) or answer.wide(source))[:3]):
        return [": float64 is made in", *map(str, found)]
    return [origin.said(first or {})]


def _all(shown: Shown, ran: list) -> Shown:
    """All cases, those that are shown first."""
    return shown + [(c, o) for c, o in ran if not c.moved and not any(o is other for _, other in shown)]


def _state(failing: list, ran: list) -> bool:
    """Whether the same inputs gave a right answer first, and later a wrong one."""
    wrong = {id(by_rank) for _, by_rank, _ in failing}
    right = [case for case, by_rank in ran if id(by_rank) not in wrong]
    return any(case in right for case, _, _ in failing)


def _outputs(truth: Truth, failing: list) -> str:
    """`right: dW2, db2; wrong: dx, dW1, db1` of a part with several results, over all cases that fail."""
    names = list(truth.right(failing[0][0])[0].results)
    answered = [(case, r, o) for case, by_rank, _ in failing for r, o in enumerate(by_rank) if o.kind == "ok"]
    # Names that describe their case are not the same in all, and long.
    told = any("\n" in n for n in names) or any(list(truth.right(case)[r].results) != names for case, r, _ in answered)
    if len(names) < 2 or told:
        return ""
    wrong = [n for n in names if any(truth.wrong(case, r, o, n) for case, r, o in answered)]
    right = [n for n in names if n not in wrong]
    return f"right: {', '.join(right) or 'none'}; wrong: {', '.join(wrong)}" if wrong else ""


def _breaks(truth: Truth, case: Case, rank: int, outcome: Outcome, name: str) -> bool:
    """Whether the result holds NaN or infinities that do not belong there."""
    got, want = outcome.results.get(name), truth.right(case)[rank].results.get(name)
    arrays = all(isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in (got, want))
    return bool(arrays and got.shape == want.shape and (np.isfinite(want) & ~np.isfinite(got)).any())


def _floats(truth: Truth, rank: int, name: str, failing: list) -> list[str]:
    """Where in the learner's file numbers break."""
    case, by_rank, _ = failing[0]
    nan = np.isnan(by_rank[rank].results[name]) & ~np.isnan(truth.right(case)[rank].results[name])
    return _broken(truth, rank, failing) or [translate.NAN if nan.any() else translate.INFINITE]


def _broken(truth: Truth, rank: int, failing: list) -> list[str]:
    """The same, by what NumPy noted that it does not note of the solution."""
    solved = [o for case, _, _ in failing for o in truth.simulated(case, truth.exercise.solution)]
    usual = {(e["what"], e["in"]) for o in solved for e in o.noted}
    events = [e for _, by_rank, _ in failing for e in by_rank[rank].noted if (e["what"], e["in"]) not in usual]
    # What the code asks NumPy to ignore does no harm where something else explains it; inf/inf may well come of it.
    solution, heard = truth.exercise.solution, [e for e in events if not e["hushed"]]
    ratio = any((e["what"], e["in"]) == ("invalid value", "divide") for e in heard)
    return (not ratio and translate.broken(heard, solution)) or translate.broken(events, solution)


def _seen(truth: Truth, part: Part, case: Case, by_rank: list[Outcome], wrong: dict, rank: int) -> list[str]:
    """What is wrong, as it is seen from outside."""
    kind, name = wrong[rank]
    outcome, on = by_rank[rank], "" if len(by_rank) == 1 else f" on rank {rank}"
    if kind == "error":
        first, *rest = translate.sentence(outcome.error)
        return [f"{first}{on}" if rest else first, *rest, *_refused(truth, outcome.error)]
    if kind == "hang":
        return translate.waits(by_rank)
    if kind == "silent":
        return [f"no answer{on}: {outcome.waits}"]
    got, want = outcome.results.get(name), truth.right(case)[rank].results[name]
    if kind == "absent":
        given = "nothing" if got is None else f"{got!r:.60}"
        return [f"{name}{on}: an array of shape {want.shape} is asked for, {given} was returned"]
    if kind == "shape":
        return [f"{name}{on} has shape {np.shape(got)}, should have {want.shape}"]
    if kind == "dtype":
        got = np.asarray(got)
        expected = case.dtype if want.dtype.kind == "f" else want.dtype
        first, *more = [FORCED.format(got.dtype) if want.dtype.kind == "f" and got.dtype.kind == "f" else ""]
        if case.dtype == "float32" and got.dtype == np.float64:
            first, *more = _wide(truth.answer, part.name, outcome.origins.get(name))
        return [f"{name}{on} is {got.dtype}, should be {expected}{first}", *more]
    if not isinstance(want, np.ndarray):
        # All lines of a name but the last describe the case.
        *case_lines, last = (name + on).split("\n")
        ours, right = probes.apart(repr(got), repr(want))
        return [*case_lines, f"{last}:  got {ours}", f"{' ' * len(last)}   want {right}"]
    got = np.asarray(got)
    off = wrong_entries(got, want, truth.right(case)[rank].allowed.get(name, 0.0))
    lines = probes.located(name, on, off, got, want)
    if len(by_rank) > 1 and len(wrong) < len(by_rank):
        ranks = ", ".join(str(r) for r in range(len(by_rank)) if r not in wrong)
        lines.append(f"wrong on ranks {', '.join(map(str, sorted(wrong)))}; right on {ranks}")
    return lines


def _refused(truth: Truth, error: dict) -> list[str]:
    """Of an error that the file raises itself: that none is due, where no other could be meant."""
    due = set(re.findall(r"\bRaises (\w+)", truth.exercise.scaffold))
    own = error["text"].startswith("raise ") and due <= {error["type"]}
    return ["Your file raises this itself, and here nothing is to be raised: what is asked for is possible."] if own else []


def _returned(truth: Truth, case: Case, rank: int, outcome: Outcome) -> str:
    """`f must return two values, y and saved; it returned nothing`, where their number is not the solution's."""
    solved = truth.simulated(case, truth.exercise.solution)[rank].returned
    for function, (count, text) in outcome.returned.items():
        want, what = solved.get(function, (count, ""))
        # A list of the solution's may have any length: only tuples are values to unpack.
        if what == f"{want} values" and want > 1 and count != want:
            names = truth.exercise.returns(function)
            listed = f", {', '.join(names[:-1])} and {names[-1]}" if len(names) == want else ""
            return f"{function} must return {NUMBERS.get(want, want)} values{listed}; it returned {text}"
        if what.startswith("one array") and text.endswith(" values"):
            return f"{function} must return one array; it returned {text}"
    return ""


def _equation(truth: Truth, part: Part, case: Case, rank: int, outcome: Outcome, name: str) -> str:
    if part.ingredients is None:
        return ""
    a = float64(case.arrays(part))
    parts = part.ingredients(a, truth.reference, truth.places[rank]).get(name)
    allowed = truth.right(case)[rank].allowed.get(name)
    if not parts or allowed is None:
        return ""
    got = outcome.results[name]
    equation = probes.ingredients(name, got, parts, np.broadcast_to(allowed, got.shape))
    return equation or (probes.patches(name, got, parts) if name in part.exact else "")


def _probe(truth: Truth, part: Part, failing: list, rank: int, name: str, ran: list) -> str:
    case, by_rank, _ = failing[0]
    got, right = by_rank[rank].results[name], truth.right(case)[rank]
    want, allowed = right.results[name], right.allowed.get(name)
    numbers = isinstance(want, np.ndarray) and isinstance(got, np.ndarray) and want.dtype.kind in "fiu"
    if numbers and got.shape == want.shape and (sentence := _factor(truth, part, failing, rank, name)):
        return sentence
    allowed = np.zeros(1) if allowed is None else allowed
    fits = numbers and got.shape == want.shape
    sentence = probes.order(name, got, want, allowed if fits else np.max(allowed, initial=0.0)) if numbers else ""
    return sentence or next(iter(_dependence(truth, part, rank, ran)), "")


def _parts(truth: Truth, failing: list, rank: int, name: str) -> str:
    """Whether all ranks' parts stand where this rank's should, or the other way round."""
    case, by_rank, _ = failing[0]
    right = [(r.results.get(name), r.allowed.get(name, 0.0)) for r in truth.right(case)]
    got = by_rank[rank].results.get(name)
    if not all(isinstance(x, np.ndarray) and x.dtype.kind in "fiu" for x in (got, *(w for w, _ in right))):
        return ""
    if got.shape == right[rank][0].shape:
        return ""
    all_got = [o.results.get(name) for o in by_rank]
    cut = probes.elsewhere(name, all_got, right) if all(isinstance(x, np.ndarray) for x in all_got) else ""
    return cut or probes.parts(name, got, rank, right)


def _shape(truth: Truth, failing: list, rank: int, name: str) -> str:
    """What a wrong shape comes of, if the numbers are right."""
    case, by_rank, _ = failing[0]
    got, right = by_rank[rank].results.get(name), truth.right(case)[rank]
    want, allowed = right.results.get(name), right.allowed.get(name, 0.0)
    if not all(isinstance(x, np.ndarray) and x.dtype.kind in "fiu" for x in (got, want)) or got.shape == want.shape:
        return ""
    return probes.shape(name, got, want, float(np.max(allowed, initial=0.0)))


def _factor(truth: Truth, part: Part, failing: list, rank: int, name: str) -> str:
    """A factor that explains all cases that fail; it has a name if one name alone fits them all."""
    found = []
    for case, by_rank, _ in failing:
        got, right = by_rank[rank].results.get(name), truth.right(case)[rank]
        want, allowed = right.results.get(name), right.allowed.get(name)
        if not truth.wrong(case, rank, by_rank[rank], name) and by_rank[rank].kind == "ok":
            continue
        if allowed is None or not isinstance(got, np.ndarray) or got.shape != want.shape:
            return ""
        known = dict(zip(part.size_names, map(float, case.size), strict=True)) | {"ranks": float(len(truth.places))}
        known |= part.factors(*case.size) if part.factors else {}
        factor = probes.factor(got, want, np.broadcast_to(allowed, want.shape), known)
        if factor is None:
            return ""
        found.append(factor)
    return probes.factor_said(name, found)


def _dependence(truth: Truth, part: Part, rank: int, ran: list) -> list[str]:
    for name, result in part.influence:
        base = next((o for c, o in ran if not c.moved), None)
        for case, by_rank in ran:
            if not (case.moved and case.moved[0] == name) or base is None or by_rank[rank].kind != "ok":
                continue
            solved = [truth.simulated(replace(case, moved=m), truth.exercise.solution)[rank] for m in (None, case.moved)]
            try:
                got, right = (
                    probes.moved(a.results[result], b.results[result]) for a, b in ((base[rank], by_rank[rank]), solved)
                )
            except (KeyError, ValueError, TypeError):
                continue
            # A row that moves nothing of its own place, as a query that sees one key, tells little of a mask.
            sentence = probes.dependence(name, case.moved[1], result, got, right) if case.moved[1] in right else ""
            if sentence:
                return [sentence]
    return []
