"""What is right in exercise 42 (all units whole, gradients by complex step), and what is often wrong."""

from weakref import ref as weak

import numpy as np

from practice.part import Part, mistake

AT_ONCE = "units' weights whole at one time"
LEFT = "units' weights whole after forward"
UNREDUCED = "units' gradients not yet summed"


def shapes(D, F, gain):
    return [(D, F), (F,), (F, D), *([(D,)] if gain else [])]


def run(x, W1, b1, W2, g=1.0):
    """A unit: y = g x + tanh(x W1 + b1) W2; not every one has a g."""
    return g * x + np.tanh(x @ W1 + b1) @ W2


class Watch:
    """Knows which units' weights are whole on this rank: arrays that were gathered or that a unit ran with, until they are gone."""

    def __init__(self, code, parts, a, dp):
        self.code, self.seen, self.unreduced = code, [], 0
        # Of each unit, the numbers that are other ranks'.
        self.foreign = [{*w.tolist()}.difference(part.tolist()) for w, part in zip(flat(a), parts, strict=True)]

    def holds(self, x):
        numbers = x.ravel().tolist()
        return {u for u, foreign in enumerate(self.foreign) if not foreign.isdisjoint(numbers)}

    def met(self, x, units):
        while isinstance(x.base, np.ndarray):
            x = x.base
        self.seen = [(array, units) for array, units in self.seen if array() is not None and array() is not x]
        self.seen.append((weak(x), units))
        self.code.counts[AT_ONCE] = max(self.code.counts[AT_ONCE], len(self.whole()))

    def whole(self):
        return set().union(*(units for array, units in self.seen if array() is not None))


class Dp:
    """The axis, whose gathers are watched."""

    def __init__(self, dp, watch):
        self._dp, self._watch = dp, watch

    def __getattr__(self, name):
        return getattr(self._dp, name)

    def all_gather(self, x, dim=0):
        y = np.array(self._dp.all_gather(x, dim))
        self._watch.met(y, self._watch.holds(y))
        return y

    def all_reduce(self, x, op="sum"):
        y = np.array(self._dp.all_reduce(x, op))
        self._watch.met(y, self._watch.holds(y))
        self._watch.unreduced = 0
        return y

    def reduce_scatter(self, x, dim=0):
        self._watch.unreduced = 0
        return self._dp.reduce_scatter(x, dim)


class Saved:
    def __init__(self, *arrays):
        self.arrays = arrays


class Unit:
    def __init__(self, number, shapes, watch):
        self.shapes, self._number, self._watch = shapes, number, watch

    def _arrays(self, arrays):
        arrays = [np.asarray(w) for w in arrays]
        got = [w.shape for w in arrays]
        if got != self.shapes:
            raise ValueError(f"unit {self._number} takes arrays of shapes {self.shapes}, got {got}")
        for w in arrays:
            self._watch.met(w, {self._number})
        return arrays

    def forward(self, x_tD, arrays):
        W1, b1, W2, *g = self._arrays(arrays)
        h_tF = np.tanh(x_tD @ W1 + b1)
        return (g[0] * x_tD if g else x_tD) + h_tF @ W2, Saved(x_tD, h_tF)

    def backward(self, dy_tD, saved, arrays):
        W1, _, W2, *g = self._arrays(arrays)
        watch = self._watch
        watch.unreduced += 1
        watch.code.counts[UNREDUCED] = max(watch.code.counts[UNREDUCED], watch.unreduced)
        x_tD, h_tF = saved.arrays
        da_tF = (dy_tD @ W2.T) * (1 - h_tF * h_tF)
        dx_tD = (g[0] * dy_tD if g else dy_tD) + da_tF @ W1.T
        # One lies in memory column by column, as matrix products may: its numbers are laid flat row by row all the same.
        grads = [(da_tF.T @ x_tD).T, da_tF.sum(axis=0), h_tF.T @ dy_tD]
        return dx_tD, [*grads, *([(x_tD * dy_tD).sum(axis=0)] if g else [])]


def model(draw, T, D, F, units, ranks):
    a = {"x_TD": draw(T, D), "dy_TD": draw(T, D), "sizes": [(D, F + u, u % 2) for u in range(units)]}
    # Units of different sizes; every second one has a gain.
    return a | {f"w {u}": draw(sum(int(np.prod(s)) for s in shapes(*size))) for u, size in enumerate(a["sizes"])}


def one_unit(draw, D, F, ranks):
    size = (D, F, 1)
    return {"sizes": [size], "w 0": draw(sum(int(np.prod(s)) for s in shapes(*size)))}


def flat(a):
    return [a[f"w {u}"] for u in range(len(a["sizes"]))]


def arrays(a, u):
    """The unit's arrays, as they lie in its numbers."""
    found, rest = [], a[f"w {u}"]
    for shape in shapes(*a["sizes"][u]):
        found.append(np.array(rest[: np.prod(shape)]).reshape(shape))
        rest = rest[np.prod(shape) :]
    return found


def part(w, dp):
    own = w[dp.cut(w.size)].copy()
    own.flags.writeable = False
    return own


def begun(code, a, dp):
    """This rank's tokens, its parts, the units, and the axis that is watched."""
    parts = [part(w, dp) for w in flat(a)]
    watch = Watch(code, parts, a, dp)
    units = [Unit(u, shapes(*size), watch) for u, size in enumerate(a["sizes"])]
    return a["x_TD"][dp.cut(len(a["x_TD"]))], parts, units, Dp(dp, watch), watch


def kept_whole(kept, watch, seen=None):
    """The units of which other ranks' numbers are in what forward has kept."""
    seen = set() if seen is None else seen
    if id(kept) in seen:
        return set()
    seen.add(id(kept))
    if isinstance(kept, np.ndarray):
        return watch.holds(kept)
    inner = kept.values() if isinstance(kept, dict) else kept if isinstance(kept, (list, tuple)) else ()
    inner = vars(kept).values() if type(kept).__module__ == "exercise" and hasattr(kept, "__dict__") else inner
    return set().union(*(kept_whole(x, watch, seen) for x in inner))


def gather(code, a, dp):
    got = code.gather(part(flat(a)[-1], dp), shapes(*a["sizes"][-1]), dp)
    return {"how many arrays": len(got)} | {f"array {i}": x for i, x in enumerate(got)}


def forward(code, a, dp):
    x, parts, units, watched, watch = begun(code, a, dp)
    y, kept = code.forward(x, parts, units, watched)
    code.counts[LEFT] = len(watch.whole() | kept_whole(kept, watch))
    return {"y": y}


def backward(code, a, dp):
    x, parts, units, watched, _ = begun(code, a, dp)
    _, kept = code.forward(x, parts, units, watched)
    if code.between:
        code.forward(x[::-1] * 0.5, parts[:1], units[:1], watched)
    dx, dws = code.backward(a["dy_TD"][dp.cut(len(a["dy_TD"]))], kept, parts, units, watched)
    return {"dx": dx} | by_unit(list(dws))


def by_unit(dws):
    first, *others, last = dws if len(dws) > 1 else (*dws, dws[0])
    return {"how many dw": len(dws), "first dw": first, "last dw": last, "other dw": np.concatenate([first[:0], *others])}


def want_gather(a, ref, dp):
    own = arrays(a, len(a["sizes"]) - 1)
    return {"how many arrays": len(own)} | {f"array {i}": x for i, x in enumerate(own)}


def want_forward(a, ref, dp):
    x = a["x_TD"]
    for u in range(len(a["sizes"])):
        x = run(x, *arrays(a, u))
    return {"y": x[dp.cut(len(x))]}


def gradient(a, ref, name, own):
    """Of the sum over all ranks' tokens, at this rank's own rows or numbers."""

    def loss(moved, name, index):
        x = moved["x_TD"]
        for u in range(len(a["sizes"])):
            x = run(x, *arrays(a | moved, u))
        return (x * a["dy_TD"]).sum() + 0j

    given = {n: x for n, x in a.items() if isinstance(x, np.ndarray)}
    return ref.gradient.at_entries(loss, given, name, [np.r_[own], *(np.arange(n) for n in a[name].shape[1:])])


def want_backward(a, ref, dp):
    found = {"dx": gradient(a, ref, "x_TD", dp.cut(len(a["x_TD"])))}
    return found | by_unit([gradient(a, ref, f"w {u}", dp.cut(w.size)) for u, w in enumerate(flat(a))])


def terms(a, ref, dp):
    """A gradient is the sum of what each rank's tokens give."""
    own = dp.cut(flat(a)[0].size)
    tokens = {f"tokens of rank {q.rank}": q.cut(len(a["x_TD"])) for q in dp.others()}
    given = {what: a | {"x_TD": a["x_TD"][t], "dy_TD": a["dy_TD"][t]} for what, t in tokens.items() if t.stop > t.start}
    return {"first dw": {what: gradient(one, ref, "w 0", own) for what, one in given.items()}}


def once(a, dp):
    """Numbers that a rank sends if each unit's go round once."""
    return sum((dp.size - 1) * w.size // dp.size for w in flat(a))


def limits_gather(a, dp):
    return {"numbers sent": (dp.size - 1) * flat(a)[-1].size // dp.size, "rounds": 1}


def limits_forward(a, dp):
    return {AT_ONCE: 1, LEFT: 0, "numbers sent": once(a, dp), "rounds": len(a["sizes"])}


def limits_backward(a, dp):
    return {AT_ONCE: 1, UNREDUCED: 1, "numbers sent": 2 * once(a, dp), "rounds": 2 * len(a["sizes"])}


def random_size(rng):
    return int(rng.choice([2, 5, 7, 9])), int(rng.choice([2, 3, 5])), int(rng.integers(1, 4)), int(rng.integers(1, 3)), 4


def random_backward(rng):
    return int(rng.choice([2, 5, 7])), int(rng.choice([2, 3])), int(rng.integers(1, 4)), int(rng.integers(2, 4)), 4


def random_unit(rng):
    return int(rng.choice([2, 3, 5])), int(rng.integers(1, 5)), 4


SIZES = ((3, 2, 1, 2, 4), (5, 1, 1, 1, 4), (9, 3, 2, 3, 4))
PARTS = (
    Part("gather", ((2, 3, 4), (1, 1, 4)), one_unit, gather, want_gather, limits=limits_gather, random_size=random_unit),
    Part("forward", SIZES, model, forward, want_forward, limits=limits_forward, random_size=random_size),
    Part("backward", SIZES[:2], model, backward, want_backward, terms, limits_backward, random_size=random_backward),
)

RUN = "x_tD, saved = unit.forward(x_tD, gather(w_n, unit.shapes, dp))"
BACK = "dy_tD, grads = units[i].backward(dy_tD, kept[i], gather(parts[i], units[i].shapes, dp))"
SUM = "dws[i] = dp.reduce_scatter(dw_N)"
FIRST = "    for i in reversed(range(len(units))):\n"
MISTAKES = (
    mistake("not_let_go", "This is right, but a variable still holds one unit's arrays while the next unit's are gathered: delete it, or hand"
            " the arrays over without a name.", (RUN, "arrays = gather(w_n, unit.shapes, dp)\n        x_tD, saved = unit.forward(x_tD, arrays)")),
    mistake("held_in_backward", "This is right, but in backward a variable still holds one unit's arrays while the next unit's are gathered:"
            " delete it, or hand the arrays over without a name.",
            (BACK, "arrays = gather(parts[i], units[i].shapes, dp)\n        dy_tD, grads = units[i].backward(dy_tD, kept[i], arrays)")),
    mistake("all_gathered_first", "This is right, but all units' weights are whole on every rank at one time, so nothing is saved: gather a"
            " unit's before it runs, and let them go before the next ones are gathered.",
            ("    kept = []\n", "    kept = []\n    whole = [gather(w_n, unit.shapes, dp) for w_n, unit in zip(parts, units, strict=True)]\n"),
            (RUN, "x_tD, saved = unit.forward(x_tD, whole[len(kept)])")),
    mistake("kept_for_backward", "This is right, but the gathered weights are kept from forward to backward: let them go, and gather them"
            " again.", (RUN, "arrays = gather(w_n, unit.shapes, dp)\n        x_tD, saved = unit.forward(x_tD, arrays)"),
            ("kept.append(saved)", "kept.append((saved, arrays))"), (BACK, "dy_tD, grads = units[i].backward(dy_tD, *kept[i])")),
    mistake("last_one_kept", "This is right, but the last unit's weights are kept until backward: forward is to leave none whole.",
            (RUN, "arrays = gather(w_n, unit.shapes, dp)\n        x_tD, saved = unit.forward(x_tD, arrays)\n        last = arrays if unit is units[-1] else None\n"
             "        del arrays"), ("kept.append(saved)", "kept.append((saved, last))"),
            (BACK, "saved, arrays = kept.pop()\n        dy_tD, grads = units[i].backward(dy_tD, saved, arrays or gather(parts[i], units[i].shapes, dp))\n        del arrays")),
    mistake("mean", "The gradients are averaged over the ranks: dy is divided already, so they are summed.", (SUM, SUM + " / dp.size"),
            seen="pytorch/torchtitan #2318"),
    mistake("by_tokens", "The gradients are divided by this rank's tokens: dy is divided already by those of all ranks.",
            (SUM, SUM + " / max(len(dy_tD), 1)")),
    mistake("own_gradient", "The gradient is of this rank's tokens only: the other ranks' tokens have passed through the same weights.",
            (SUM, "dws[i] = dw_N[dp.cut(len(dw_N))]")),
    mistake("all_reduced", "This is right, but the gradients are all-reduced and then cut: a reduce-scatter gives the part at half the bytes.",
            (SUM, "dws[i] = dp.all_reduce(dw_N)[dp.cut(len(dw_N))]")),
    mistake("summed_twice", "The gradients are summed twice over the ranks, so they arrive dp.size times: reduce_scatter sums by itself.",
            (SUM, "dws[i] = dp.reduce_scatter(dp.all_reduce(dw_N))")),
    mistake("array_by_array", "Each array's gradient is cut by itself: the part is dp.cut(N) of all the unit's numbers, laid flat one after another.",
            ("dw_N = np.concatenate([g.ravel() for g in grads])\n        dws[i] = dp.reduce_scatter(dw_N)",
             "dws[i] = np.concatenate([dp.reduce_scatter(g.ravel()) for g in grads])")),
    mistake("summed_at_the_end", "This is right, but all units' gradients stay whole until the end: sum each unit's as soon as it has them.",
            ("        " + SUM + "\n", "        dws[i] = dw_N\n"), ("    return dy_tD, dws", "    return dy_tD, [dp.reduce_scatter(dw_N) for dw_N in dws]")),
    mistake("columns_first", "The arrays are flattened column by column: they are laid flat row by row, as NumPy has them.",
            ("g.ravel()", 'g.ravel("F")')),
    mistake("as_in_memory", "A gradient's numbers are taken as they lie in memory, and a transposed array lies otherwise: they are laid"
            " flat row by row.", ("g.ravel()", 'g.ravel("K")')),
    mistake("read_by_columns", "The gathered numbers are read column by column: they lie row by row.", (".reshape(shape)", '.reshape(shape, order="F")')),
    mistake("all_from_the_start", "Every array is read from the first number on: each begins where the one before ended.", ("        start += size\n", "")),
    mistake("gathered_twice", "This is right, but backward gathers each unit's weights twice: once is enough for dx and for the gradients.",
            (BACK, "units[i].backward(dy_tD, kept[i], gather(parts[i], units[i].shapes, dp))\n        " + BACK)),
    mistake("no_tokens_no_call", "A rank without tokens leaves the others waiting: it gathers and sums like all, for they need its part.",
            ("    kept = []\n", "    kept = []\n    if not len(x_tD):\n        return x_tD, [unit.forward(x_tD, [np.zeros(s) for s in unit.shapes])[1] for unit in units]\n"),
            seen="deepspeedai/DeepSpeed #4808"),
    mistake("turned_round", "The gradients stand in the order of backward: the first unit's comes first.", ("return dy_tD, dws", "return dy_tD, dws[::-1]")),
    mistake("units_in_order", "Backward goes through the units from the first: dy comes from behind, so the last one is first.",
            ("in reversed(range(len(units)))", "in range(len(units))")),
    mistake("same_dy", "dy goes into every unit as it came: each one gets what the one behind it gave.",
            (FIRST, "    dz_tD = dy_tD\n" + FIRST), ("units[i].backward(dy_tD,", "units[i].backward(dz_tD,")),
    mistake("kept_global", "What is kept is shared by all calls: another forward has overwritten it.",
            ("    kept = []\n", "    kept = globals().setdefault('_kept', [])\n    kept.clear()\n")),
)  # fmt: skip
