"""What is right in exercise 37 (the stack without segments, gradients by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

KEEP = 0.8


class Saved:
    """What one layer keeps; the log knows how many there are."""

    def __init__(self, log, *arrays):
        self.arrays, self.log = arrays, log
        log["now"] = log.get("now", 0) + 1
        log["most"] = max(log.get("most", 0), log["now"])

    def __del__(self):
        self.log["now"] -= 1


class Layer:
    """y = dropout(tanh(x W))."""

    def __init__(self, W_DD, log):
        self.W_DD, self.log = W_DD, log

    def forward(self, x_TD, rng):
        self.log["runs"] = self.log.get("runs", 0) + 1
        t_TD = np.tanh(x_TD @ self.W_DD)
        drop_TD = ((rng.random(t_TD.shape) < KEEP) / KEEP).astype(t_TD.dtype)
        return t_TD * drop_TD, Saved(self.log, x_TD, t_TD, drop_TD)

    def backward(self, dy_TD, saved):
        x_TD, t_TD, drop_TD = saved.arrays
        da_TD = dy_TD * drop_TD * (1 - t_TD * t_TD)
        return da_TD @ self.W_DD.T, x_TD.T @ da_TD


def numbers_in(x, seen=None):
    """How many numbers are held by x and what it consists of, each array once."""
    seen = {} if seen is None else seen
    if id(x) in seen:
        return 0
    seen[id(x)] = x
    if isinstance(x, np.ndarray):
        whole = x if x.base is None or not isinstance(x.base, np.ndarray) else x.base
        return x.size if whole is x else numbers_in(whole, seen)
    inner = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple, set)) else ()
    if isinstance(x, (Saved, Layer)) or type(x).__module__ == "exercise":
        inner = vars(x).values()
    return sum(numbers_in(i, seen) for i in inner)


def inputs(draw, layers, every, T, D):
    a = {"x_TD": draw(T, D), "W_LDD": draw(layers, D, D, scale=1.2 / D**0.5), "dy_TD": draw(T, D)}
    return a | {"every": every, "seed": int(draw.rng.integers(2**31))}


def started(code, a):
    log = {}
    return log, [Layer(W_DD, log) for W_DD in a["W_LDD"]], np.random.default_rng(a["seed"])


def forward(code, a, at):
    log, layers, rng = started(code, a)
    y, kept = code.run_forward(a["x_TD"], layers, a["every"], rng)
    code.counts["layers run"] = log.get("runs", 0)
    code.counts["layers' saved kept"] = log.get("now", 0)
    # The layers themselves may be kept: their weights are there anyhow.
    weights = {id(x): x for layer in layers for x in (layer.W_DD, layer.W_DD.base)}
    code.counts["numbers kept"] = numbers_in(kept, weights)
    return {"y": y, "the next draw": float(rng.random())}


def backward(code, a, at):
    log, layers, rng = started(code, a)
    _, kept = code.run_forward(a["x_TD"], layers, a["every"], rng)
    other = np.random.default_rng(5)
    code.run_forward(a["x_TD"][::-1] * 0.5, layers, a["every"], other)
    rng.random(3)
    log.update(runs=0, most=log.get("now", 0))
    dx, dWs = code.run_backward(a["dy_TD"], kept, layers, a["every"], rng)
    code.counts["layers run"] = log["runs"]
    code.counts["layers' saved at one time"] = log["most"]
    found = {"dx": dx} | {f"dW {i}": dW for i, dW in enumerate(dWs)}
    return found | {"how many dW": len(dWs), "the next draw": float(rng.random())}


def drops(a, more=0):
    """Each layer's factors, and the draw after them and after `more`."""
    rng = np.random.default_rng(a["seed"])
    found = [(rng.random(a["x_TD"].shape) < KEEP) / KEEP for _ in a["W_LDD"]]
    rng.random(more)
    return found, float(rng.random())


def stack(x_TD, W_LDD, factors):
    for W_DD, factor in zip(W_LDD, factors, strict=True):
        x_TD = np.tanh(np.einsum("td,de->te", x_TD, W_DD)) * factor
    return x_TD


def want_forward(a, ref, at):
    factors, following = drops(a)
    return {"y": stack(a["x_TD"], a["W_LDD"], factors), "the next draw": following}


def want_backward(a, ref, at):
    factors, following = drops(a, 3)

    def loss(moved, name, index):
        return (stack(moved["x"], moved["W"], factors) * a["dy_TD"]).sum() + 0j

    arrays = {"x": a["x_TD"], "W": a["W_LDD"]}
    dx, dW = (ref.gradient.at_entries(loss, arrays, n) for n in "xW")
    found = {"dx": dx} | {f"dW {i}": one for i, one in enumerate(dW)}
    return found | {"how many dW": len(dW), "the next draw": following}


def segments(a):
    return -(-len(a["W_LDD"]) // a["every"])


def forward_limits(a, at):
    return {"layers run": len(a["W_LDD"]), "numbers kept": segments(a) * a["x_TD"].size, "layers' saved kept": 0}


def backward_limits(a, at):
    return {"layers run": len(a["W_LDD"]), "layers' saved at one time": 2 * a["every"]}


def random_size(rng):
    return int(rng.integers(1, 9)), int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.choice([2, 3, 4]))


SIZES = ((5, 2, 3, 4), (7, 3, 2, 3), (9, 2, 1, 2), (4, 4, 2, 3), (3, 1, 3, 2), (2, 5, 3, 2))
PARTS = (
    Part("run_forward", SIZES, inputs, forward, want_forward, limits=forward_limits, random_size=random_size),
    Part("run_backward", SIZES, inputs, backward, want_backward, limits=backward_limits, random_size=random_size),
)  # fmt: skip

RUN, KEPT = "x_TD, _ = layer.forward(x_TD, rng)", "kept.append((x_TD, rng.bit_generator.state))"
AGAIN = "        for layer in layers[first : first + every]:\n            x_TD, one = layer.forward(x_TD, rng)\n            saved.append(one)\n"
MISTAKES = (
    mistake("all_kept", "This is right, but what every layer saves is kept: that is what checkpointing is to avoid.",
            ("    kept = []\n", "    kept = []\n    extra = []\n"), (RUN, "x_TD, _ = layer.forward(x_TD, rng)\n            extra.append(_)"),
            ("return x_TD, kept", "kept = [(*k, extra) for k in kept]\n    return x_TD, kept"), ("x_TD, state = kept[n]", "x_TD, state = kept[n][:2]")),
    mistake("last_kept", "This is right, but what the last segment's layers save is kept, so that they need not run again: keep inputs alone, and run"
            " the last segment again like the others.",
            (RUN, "x_TD, one = layer.forward(x_TD, rng)\n            if first + every >= len(layers):\n                last.append(one)"),
            ("    kept = []\n", "    kept = []\n    last = []\n"), ("return x_TD, kept", "return x_TD, (kept, last)"),
            ("    now = rng", "    kept, last = kept\n    now = rng"), (AGAIN, "        if n == len(kept) - 1:\n            saved = last\n" + AGAIN.replace("first + every]", "first + every if n < len(kept) - 1 else first]"))),
    mistake("every_input", "This is right, but the input of every layer is kept: that of each segment's first layer is enough.",
            ("    kept = []\n", "    kept = []\n    extra = []\n"), (RUN, "extra.append(x_TD)\n            x_TD, _ = layer.forward(x_TD, rng)"),
            ("return x_TD, kept", "kept = [(*k, extra) for k in kept]\n    return x_TD, kept"), ("x_TD, state = kept[n]", "x_TD, state = kept[n][:2]")),
    mistake("last_lost", "The last segment, which is shorter, is left out: L need not be a multiple of `every`.",
            ("range(0, len(layers), every)", "range(0, len(layers) // every * every, every)")),
    mistake("first_input", "Every segment is run again from x: from its own input.", ("x_TD, state = kept[n]", "x_TD, state = kept[0][0], kept[n][1]")),
    mistake("outputs_kept", "The segments' outputs are kept where their inputs belong.",
            ("        for layer in layers[first : first + every]:\n            x_TD, _ =", "        noted = kept.pop()[1]\n        for layer in layers[first : first + every]:\n"
             "            x_TD, _ ="), ("    return x_TD, kept", "        kept.append((x_TD, noted))\n    return x_TD, kept")),
    mistake("drawn_anew", "The layers draw other numbers when they are run again: set the generator to the state of the segment's start.",
            ("        rng.bit_generator.state = state\n", "")),
    mistake("one_state", "All segments begin with the state of the first: each has its own.",
            ("        rng.bit_generator.state = state\n", "        rng.bit_generator.state = kept[0][1]\n")),
    mistake("late_state", "The state is noted at the segment's end: what its layers draw is before that.",
            ("        kept.append((x_TD, rng.bit_generator.state))\n", "        given = x_TD\n"),
            ("    return x_TD, kept", "        kept.append((given, rng.bit_generator.state))\n    return x_TD, kept")),
    mistake("left_behind", "After backward the generator is where the last segment left it: the caller's next draws repeat old numbers. Put it back.",
            ("    rng.bit_generator.state = now\n", "")),
    mistake("forward_state", "After backward the generator is put back to where run_forward left it: what the caller has drawn since then would be"
            " drawn again. Note where it is when run_backward begins.", ("return x_TD, kept", "return x_TD, (kept, rng.bit_generator.state)"),
            ("    now = rng.bit_generator.state\n", "    kept, now = kept\n")),
    mistake("start_state", "After backward the generator is put back to where run_forward began: the caller's next draws repeat old numbers. Note"
            " where it is when run_backward begins.", ("    rng.bit_generator.state = now\n", "    rng.bit_generator.state = kept[0][1]\n")),
    mistake("set_once", "The generator is set once, to the state at the run's beginning, and the segments, run again from the last, draw each"
            " other's numbers: set it for each segment to the state of its own start.",
            ("        rng.bit_generator.state = state\n", "        if n == len(kept) - 1:\n            rng.bit_generator.state = kept[0][1]\n")),
    mistake("drew_first", "run_forward moves the generator by more than its layers draw.", ("    kept = []\n", "    kept = []\n    rng.random()\n")),
    mistake("from_the_start", "This is right, but each layer is run again from its segment's start: once for the whole segment is enough.",
            (AGAIN, AGAIN + "        for i in range(1, len(saved)):\n            own, at = kept[n]\n            rng.bit_generator.state = at\n"
             "            for layer in layers[first : first + i]:\n                own, one = layer.forward(own, rng)\n")),
    mistake("from_the_first_layer", "This is right, but each segment is run again from the first layer and the first input: keep each segment's input, and"
            " begin there.", ("        kept.append((x_TD, rng.bit_generator.state))\n", "        kept[1:] = [first]\n"),
            ("    kept = []\n", "    kept = [(x_TD, rng.bit_generator.state)]\n"), ("range(len(kept))", "range(-(-len(layers) // every))"),
            ("x_TD, state = kept[n]", "x_TD, state = kept[0]"), ("        saved = []\n", "        saved = []\n        for layer in layers[:first]:\n            x_TD, _ = layer.forward(x_TD, rng)\n        _ = None\n")),
    mistake("all_again", "This is right, but all segments are run again before the first backward: then everything is held after all.",
            ("    dWs = [None] * len(layers)\n", "    dWs = [None] * len(layers)\n    held = []\n"), ("        saved = []\n", "        saved = []\n        held.append(saved)\n"),
            (AGAIN + "        for i in reversed",) * 2),
    mistake("forward_twice", "This is right, but run_forward runs layers that it need not: each one once.",
            (RUN, RUN + "\n        rng_state = rng.bit_generator.state\n        layers[first].forward(x_TD, rng)\n        rng.bit_generator.state = rng_state"),
            ("    kept = []\n    for first",) * 2),
    mistake("segments_in_order", "The segments go backward from the first: dy comes from behind, so the last one is first.",
            ("for n in reversed(range(len(kept))):", "for n in range(len(kept)):")),
    mistake("layers_in_order", "Within a segment the layers go backward from the first: from the last.",
            ("for i in reversed(range(len(saved))):", "for i in range(len(saved)):")),
    mistake("newest_saved", "Every layer of a segment gets what its last one saved.", ("backward(dy_TD, saved[i])", "backward(dy_TD, saved[-1])")),
    mistake("list_turned", "The gradients stand in the order of backward: dW of the first layer comes first.",
            ("return dy_TD, dWs", "return dy_TD, dWs[::-1]")),
    mistake("turned_within", "Within each segment the gradients stand from its last layer to its first, in the order of backward: dW of its first layer"
            " comes first.", ("return dy_TD, dWs\n", "return dy_TD, [dW for n in range(len(kept)) for dW in dWs[n * every : (n + 1) * every][::-1]]\n")),
    mistake("segments_turned", "The gradients of the segments stand from the last to the first: dW of the first layer comes first.",
            ("return dy_TD, dWs\n", "return dy_TD, [dW for n in reversed(range(len(kept))) for dW in dWs[n * every : (n + 1) * every]]\n")),
    mistake("same_gradient", "dy goes into every segment as it came: each one gets what the one behind it gave.",
            ("    dWs = [None] * len(layers)\n", "    dWs = [None] * len(layers)\n    dz_TD = dy_TD\n"), ("        saved = []\n", "        saved = []\n        dy_TD = dz_TD\n")),
    mistake("kept_global", "kept is shared by all calls: another run has overwritten it.",
            ("    kept = []\n", "    kept = globals().setdefault('_kept', [])\n    kept.clear()\n")),
)  # fmt: skip
