"""Which known mistake, or pair of them, has a learner's outcomes or costs."""

from __future__ import annotations

import ast
import builtins
import copy
import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator

from practice.answer import stored
from practice.axis import VERBS
from practice.guarded import apart
from practice.part import Case, Mistake, Outcome
from practice.truth import Truth

# How long pairs of mistakes may be looked for, in seconds of the examiner's own computing.
PAIRS = 1.0
# And arguments that are kept.
STALE = 0.5
# How much less and more than a mistake's own excess is still told as that mistake: a rule of thumb, by answers that were seen.
LESS, MORE = 0.25, 2.5
# Of several one is told that is so near, where others are so much further away.
NEAR, FURTHER = 0.3, 2.0
ALIKE, ONE_OF = "This is what costs as much, or about as much:", "One of these takes about as much:"
# Of memory, what is as good as equal; and how many are told of which one may be it.
EQUAL, MOST = 0.02, 3


Shown = list[tuple[Case, list[Outcome]]]


def compared(failing: list, ran: list) -> Shown:
    """What a mistake is compared with: up to three failing cases of different sizes, and two that are right."""
    shown, sizes = [], set()
    for case, by_rank, _ in failing:
        if (case.size, case.dtype) not in sizes and len(shown) < 3 and not case.moved:
            sizes.add((case.size, case.dtype))
            shown.append((case, by_rank))
    wrong = {id(by_rank) for _, by_rank, _ in failing}
    return shown + [(c, o) for c, o in ran if not c.moved and id(o) not in wrong][:2]


def known(truth: Truth, shown: Shown, every: Shown) -> list[Mistake]:
    """The known mistake, or the pair of them, whose outcomes are the learner's; [] if none is.

    every: all cases. Of several that have the outcomes in those that are shown, one that has them in all goes before.
    """
    bad = [case for case, by_rank in shown if any(truth.problem(case, r, o) for r, o in enumerate(by_rank))]
    mistakes = truth.exercise.mistakes
    raised = all(o.error.get("text", "").startswith("raise") for _, some in shown[:1] for o in some)
    # The solution's own first: a mistake of two edits, of which another right answer takes one alone, is another mistake there.
    # Where a mistake leaves rows without a number, as a query that sees no key, answers put there what they like: loose.
    for some, loose in ((slice(1), False), (slice(1, None), False), (slice(None), True)):
        found = []
        for m in mistakes:
            if sources := [s for s in truth.variants((m,))[some] if truth.explains(s, shown, loose)]:
                # Of several, as where all that is seen is one error, one that leaves the earlier parts right, as the learner's.
                spoils = earlier(truth, m, bad[0])
                if not spoils and not raised and (loose or any(truth.explains(s, every) for s in sources)):
                    return [m]
                found.append((spoils, m))
        # What raises the same error alone, of its own, may be one as well as another.
        if found and raised:
            return [found[0][1]] if len(found) == 1 else []
        if found:
            return [min(found, key=lambda f: f[0])[1]]
    # First come pairs of mistakes of which each, like the learner's code, makes these cases wrong and no earlier part.
    touching = [m for m in mistakes if any(truth.touches(m, case) for case in bad)]
    likely = [m for m in touching if not earlier(truth, m, bad[0])]
    pairs = dict.fromkeys(p for some in (likely, touching, mistakes) for p in itertools.combinations(some, 2))
    seconds = PAIRS * truth.patience
    return apart(lambda: _pair(truth, shown, pairs, seconds), seconds) or []


def _pair(truth: Truth, shown: Shown, pairs: Iterable[tuple[Mistake, Mistake]], seconds: float) -> list[Mistake]:
    begun = time.process_time()
    for pair in itertools.takewhile(lambda _: time.process_time() - begun < seconds, pairs):
        # Beside results that are wrong, neither of them makes one wrong that is right.
        if truth.explains(truth.mistaken(pair), shown) and not any(contradicted(truth, m, shown) for m in pair):
            return list(pair)
    return []


def contradicted(truth: Truth, mistake: Mistake, shown: Shown) -> bool:
    """Whether a mistake makes a result wrong that the learner has right in all these cases, beside one that is not."""
    wrong, ours = set(), set()
    for case, theirs in shown:
        if any(o.kind != "ok" for o in theirs):
            return False
        for rank, both in enumerate(zip(theirs, truth.remembered(case, truth.mistaken((mistake,))), strict=True)):
            for found, outcome in zip((wrong, ours), both, strict=True):
                # Before the last line of a name stands what its case is.
                found |= {n.split("\n")[-1] for n in truth.right(case)[rank].results if truth.wrong(case, rank, outcome, n)}
    return bool(ours - wrong)


def kept(truth: Truth, ran: Shown) -> list[Mistake]:
    """The known mistake of which all outcomes, in the order in which the cases were run, are the learner's; [] if none is."""
    ran = [(case, by_rank) for case, by_rank in ran if not case.moved]
    for m in truth.exercise.mistakes:
        if any(truth.in_turn(source, ran) for source in truth.variants((m,))):
            return [m]
    return []


def partly(truth: Truth, failing: list) -> list[Mistake]:
    """The known mistake that has the learner's outcomes wherever these are wrong, in cases of several sizes; [] if none has.

    Where the learner's are right, as where there is nothing to do, which many treat apart, it may have others.
    """
    cases = [(case, by_rank) for case, by_rank, _ in failing if not case.moved]
    if len({case.size for case, _ in cases}) < 2 or any(o.kind != "ok" for _, by_rank in cases for o in by_rank):
        return []
    for m in truth.exercise.mistakes:
        if any(truth.explains(source, cases) for source in truth.variants((m,))):
            return [m]
    return []


def stale(truth: Truth, ran: Shown) -> str:
    """What is said where an argument is that of an earlier call: a table that is kept for some widths or lengths alone, though
    more went into it. '' where nothing of that kind has the learner's outcomes in turn."""
    ran = [(case, by_rank) for case, by_rank in ran if not case.moved]
    if any(truth.problem(ran[0][0], r, o) for r, o in enumerate(ran[0][1])):
        return ""
    begun = time.process_time()
    for names, key, source in _keyed(truth.exercise.solution, truth.answer):
        if truth.in_turn(source, ran):
            some, are = " and ".join(names), "is that" if len(names) == 1 else "are those"
            by = "for all calls" if key == "0" else f"and found again by {key} alone"
            return f"{some} {are} of an earlier call: what is made of {some} is kept, {by}."
    for name, source in _stalled(truth.exercise.solution):
        if truth.in_turn(source, ran):
            return (
                f"{name} is that of an earlier call: something made of it is kept from one call to the next, and found again"
                f" whatever {name} is now."
            )
        if time.process_time() - begun > STALE:
            break
    return ""


def _keyed(solution: str, answer: str) -> Iterator[tuple[list[str], str, str]]:
    """Arguments, a key, and the solution in which they are those of an earlier call of this key: as the answer keeps things."""
    tree = ast.parse(solution)
    functions = [f for f in tree.body if isinstance(f, ast.FunctionDef)]
    for used, key in stored(answer):
        names = sorted(used)
        needed = used | {n.id for n in ast.walk(ast.parse(key)) if isinstance(n, ast.Name)} - set(dir(builtins)) - {"np"}
        some = [n for n, f in enumerate(functions) if needed <= {a.arg for a in f.args.args}]
        for n in some:
            # What is kept may be made in one step, and another step may read the arguments as they are.
            reads = [
                i for i, s in enumerate(functions[n].body) if used & {x.id for x in ast.walk(s) if isinstance(x, ast.Name)}
            ]
            ways = [reads, *([i] for i in reads), *itertools.combinations(reads, 2)]
            for chosen in ways if len(reads) > 1 else [reads]:
                twin = copy.deepcopy(tree)
                body = next(f for f in twin.body if getattr(f, "name", "") == functions[n].name).body
                for i in chosen:
                    for x in (x for x in ast.walk(body[i]) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)):
                        x.id = f"_kept_{x.id}" if x.id in used else x.id
                held = f"{', '.join(f'_kept_{u}' for u in names)}, = globals().setdefault('_kept', {{}})"
                body.insert(0, ast.parse(f"{held}.setdefault({key}, ({', '.join(names)},))").body[0])
                yield names, key, ast.unparse(ast.fix_missing_locations(twin))


def _stalled(solution: str) -> Iterator[tuple[str, str]]:
    """Each argument, and the solution in which it is that of an earlier call, found again by nothing, or by the width, the
    length or all of the shape of the first argument. Not an axis, which nobody keeps."""
    axis = re.compile(rf"\b(\w+)\.(?:{'|'.join(VERBS)}|cut|rank|size)\b")
    axes, tree = set(axis.findall(solution)), ast.parse(solution)
    for at, function in ((n, f) for n, f in enumerate(tree.body) if isinstance(f, ast.FunctionDef)):
        names = [a.arg for a in function.args.args]
        keys = ["0", *(f"np.shape({names[0]}){part}" for part in ("[-1:]", "[:1]", ""))] if names else []
        for name, key in itertools.product([n for n in names if n not in axes], keys):
            twin = copy.deepcopy(tree)
            kept = f"{name} = globals().setdefault('_{name}', {{}}).setdefault({key}, {name})"
            twin.body[at].body.insert(0, ast.parse(kept).body[0])
            yield name, ast.unparse(ast.fix_missing_locations(twin))


def earlier(truth: Truth, mistake: Mistake, case: Case) -> bool:
    """Whether a mistake makes an earlier part wrong than that of `case`, the first that is wrong."""
    return truth.spoils(truth.mistaken((mistake,)), case)


def costing(truth: Truth, ran: list, counters: set[str]) -> list[Mistake]:
    """The known mistake, or two of them, that cost the same; of memory, the one that may."""
    shown, some = _dear(truth, ran, counters)
    if counters == {"peak bytes"}:
        # Several may take as much memory, which is only about equal: `either` has them.
        same = [m for m, over in some if over == counters]
        equal = [m for m in same if _bytes_off(truth, m, shown) <= EQUAL]
        return same if len(same) == 1 else equal if len(equal) == 1 else []
    if same := [m for m, over in some if over >= counters and _costs(truth, truth.mistaken((m,)), shown, counters)]:
        # In few cases two may cost the same; where they do in all, `either` has both.
        every = [(c, o) for c, o in ran if not c.moved]
        same = [m for m in same if len(same) == 1 or _costs(truth, truth.mistaken((m,)), every, counters)]
        same = [m for m, over in some if m in same and over == counters] or same
        # What costs too much in an earlier part, too, is not the learner's, who has come so far.
        before = [(c, []) for c in truth.earlier(every[0][0])]
        same = [m for m in same if len(same) == 1 or not _beyond(truth, m, before)]
        return same if len(same) == 1 else []
    for pair in itertools.combinations([m for m, over in some if over <= counters], 2):
        if _costs(truth, truth.mistaken(pair), shown, counters):
            return list(pair)
    return []


def either(truth: Truth, ran: list, counters: set[str]) -> tuple[str, list[Mistake]]:
    """Known mistakes that go beyond the same limits, about as far, and what is said before them; ("", []) if none do."""
    shown, some = _dear(truth, ran, counters)
    alike = [m for m, over in some if over == counters]
    same = [m for m in alike if _costs(truth, truth.mistaken((m,)), shown, counters)]
    if len(same) > 1 and counters != {"peak bytes"}:
        return ONE_OF, same[:MOST]
    if alike and counters == {"peak bytes"}:
        return ONE_OF, sorted(alike, key=lambda m: _bytes_off(truth, m, shown))[:MOST]
    if alike:
        far = sorted((d, n) for n, m in enumerate(alike) if (d := _off(truth, m, shown, counters)) < math.inf)
        # Of several the nearest, if no other is as near.
        near = far and far[0][0] <= NEAR and all(d > FURTHER * max(far[0][0], NEAR / 2) for d, _ in far[1:])
        return (ALIKE, [alike[far[0][1]]]) if len(far) == 1 or near else ("", [])
    # Or two that go beyond different limits, if no other two do.
    beyond = [(m, over) for m, over in some if over <= counters]
    pairs = [p for p in itertools.combinations(beyond, 2) if p[0][1] | p[1][1] == counters and not p[0][1] & p[1][1]]
    return (ALIKE, [m for m, _ in pairs[0]]) if len(pairs) == 1 else ("", [])


def _bytes_off(truth: Truth, mistake: Mistake, shown: Shown) -> float:
    """By how much, at most, the learner's peak differs from a mistake's, where that is beyond the limit."""
    off = 0.0
    for case, theirs in shown:
        ours = truth.remembered(case, truth.mistaken((mistake,)))
        for a, b, most in zip(ours, theirs, truth.limits(case), strict=True):
            both = a.counts.get("peak bytes", 0), b.counts.get("peak bytes", 0)
            if max(both) > most.get("peak bytes", math.inf):
                off = max(off, abs(both[0] - both[1]) / max(both))
    return off


def _dear(truth: Truth, ran: list, counters: set[str]) -> tuple[Shown, list[tuple[Mistake, set[str]]]]:
    """Cases that are compared, those where it costs too much and the largest first; mistakes that are right and cost too much
    there, each with what of."""
    every = [(c, o) for c, o in ran if not c.moved]
    over = [any(counters & set(o.over(m)) for o, m in zip(some, truth.limits(c), strict=True)) for c, some in every]
    order = sorted(range(len(every)), key=lambda n: (not over[n], -math.prod(every[n][0].size)))
    shown = [every[n] for n in order[:3]]
    some = [(m, over) for m in truth.exercise.mistakes if (over := _beyond(truth, m, shown))]
    # A mistake that makes an answer wrong, be it in a size that costs little, is not the learner's, whose answers are right.
    return shown, [(m, over) for m, over in some if not any(truth.touches(m, case) for case, _ in every)]


def _costs(truth: Truth, source: str | None, shown: Shown, counters: set[str]) -> bool:
    """Whether this source counts what is counted of the learner's."""
    return source is not None and all(
        a.kind == "ok" and all(_near(a.counts.get(k, 0), b.counts.get(k, 0), k, most.get(k, 0)) for k in counters)
        for case, theirs in shown
        for a, b, most in zip(truth.remembered(case, source), theirs, truth.limits(case), strict=True)
    )


def _off(truth: Truth, mistake: Mistake, shown: Shown, counters: set[str]) -> float:
    """How far the learner's costs are from the mistake's, as a share of what these are beyond the limits; infinite where it is
    too far: what costs a tenth of it is another mistake. Memory, which depends on how things are written, is not looked at."""
    off = 0.0
    for counter in counters - {"peak bytes"}:
        excess = [0, 0]
        for case, theirs in shown:
            ours = truth.remembered(case, truth.mistaken((mistake,)))
            for *both, limits in zip(ours, theirs, truth.limits(case), strict=True):
                for i, outcome in enumerate(both):
                    excess[i] += max(0, outcome.counts.get(counter, 0) - limits.get(counter, 0))
        if not LESS * excess[0] <= excess[1] <= MORE * excess[0]:
            return math.inf
        off = max(off, abs(excess[1] - excess[0]) / excess[0])
    return off


def _beyond(truth: Truth, mistake: Mistake, shown: Shown) -> set[str]:
    """The counters of which a mistake that gives right answers counts more than is allowed."""
    over: set[str] = set()
    for case, _ in shown:
        outcomes = truth.remembered(case, truth.mistaken((mistake,)))
        for rank, (outcome, limits) in enumerate(zip(outcomes, truth.limits(case), strict=True)):
            if truth.problem(case, rank, outcome):
                return set()
            over |= set(outcome.over(limits))
    return over


def _near(a: int, b: int, counter: str, most: int) -> bool:
    """Whether costs agree: counts must be equal; memory, which depends on how things are written, about equal if too much."""
    return a == b if counter != "peak bytes" else abs(a - b) <= 0.3 * max(a, b) or max(a, b) <= most
