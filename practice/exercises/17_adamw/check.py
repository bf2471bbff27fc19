"""What is right in exercise 17 (from the closed forms of the moments, not step by step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake

HYPER = ("lr", "b1", "b2", "eps", "wd")
NAMES = ("w", "m", "v")


def hyper(rng):
    """As far from the usual ones as needed for each of them to be seen."""
    low, high = (0.02, 0.7, 0.9, 0.05, 0.2), (0.1, 0.9, 0.99, 0.2, 0.6)
    return {n: float(x) for n, x in zip(HYPER, rng.uniform(low, high), strict=True)}


def scaled(given, decay):
    return given | {"wd": given["wd"] * decay}


def first(draw, N):
    return {"w_N": draw(N), "g_SN": draw(1, N)} | hyper(draw.rng)


def later(draw, N, t, decay):
    """In the midst of training: any moments, and gradients of several sizes. decay 0: wd is 0, and w still another array."""
    m_N, v_N = draw(N), draw.cast(draw.rng.uniform(0.1, 2, N))
    return {"w_N": draw(N), "g_N": draw(N, scale=3), "m_N": m_N, "v_N": v_N, "t": t} | scaled(hyper(draw.rng), decay)


def several(draw, rows, columns, steps):
    size = draw.cast(10.0 ** draw.rng.uniform(-2, 1, (rows, columns)))
    return {"w_RC": draw(rows, columns), "g_SRC": draw(steps, rows, columns) * size} | hyper(draw.rng)


def zeros(w):
    """m and v before the first step: two arrays, read-only as all arguments are."""
    moments = np.zeros_like(w), np.zeros_like(w)
    for x in moments:
        x.flags.writeable = False
    return moments


def call_first(code, a, at):
    return named(code.adamw(a["w_N"], a["g_SN"][0], *zeros(a["w_N"]), 1, *(a[n] for n in HYPER)))


def call_later(code, a, at):
    return named(code.adamw(a["w_N"], a["g_N"], a["m_N"], a["v_N"], a["t"], *(a[n] for n in HYPER)))


def call_several(code, a, at):
    w, (m, v) = a["w_RC"], zeros(a["w_RC"])
    for t, g in enumerate(a["g_SRC"], 1):
        w, m, v = code.adamw(w, g, m, v, t, *(a[n] for n in HYPER))
    return named((w, m, v))


def named(found):
    w, m, v = found
    return dict(zip(NAMES, (w, m, v), strict=True))


def moment(g, power, b):
    """(1 - b) sum over i of b^(t - i) g_i^power, for all t at once: no recursion."""
    steps = len(g)
    weight = np.array([[(1 - b) * b ** (t - i) if i <= t else 0.0 for i in range(steps)] for t in range(steps)])
    return np.tensordot(weight, g**power, 1)


def truth(w, g, lr, b1, b2, eps, wd):
    """w after all steps: each update shrunk by the decays that come after it, w_0 by all of them."""
    steps = len(g)
    t = np.arange(1, steps + 1).reshape(-1, *[1] * w.ndim)
    m, v = moment(g, 1, b1), moment(g, 2, b2)
    update = lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + eps)
    after = (1 - lr * wd) ** (steps - t)
    return {"w": w * (1 - lr * wd) ** steps - (after * update).sum(axis=0), "m": m[-1], "v": v[-1]}


def want_first(a, ref, at):
    return truth(a["w_N"], a["g_SN"], *(a[n] for n in HYPER))


def want_several(a, ref, at):
    return truth(a["w_RC"], a["g_SRC"], *(a[n] for n in HYPER))


def want_later(a, ref, at):
    """Number by number, in Python."""
    rows = []
    for w, g, m, v in zip(*(a[n].tolist() for n in ("w_N", "g_N", "m_N", "v_N")), strict=True):
        m, v = m + (1 - a["b1"]) * (g - m), v + (1 - a["b2"]) * (g**2 - v)
        root = (v / (1 - a["b2"] ** a["t"])) ** 0.5
        rows.append((w * (1 - a["lr"] * a["wd"]) - a["lr"] * m / ((1 - a["b1"] ** a["t"]) * (root + a["eps"])), m, v))
    return dict(zip(NAMES, np.array(rows).T, strict=True))


def small(rng):
    return int(rng.integers(2, 12))


PARTS = (
    Part("first step", ((3,), (1,)), first, call_first, want_first, random_size=lambda rng: (small(rng),)),
    Part("a later step", ((3, 7, 1), (5, 2, 0), (4, 40, 1)), later, call_later, want_later,
         random_size=lambda rng: (small(rng), int(rng.integers(2, 30)), 1)),
    Part("20 steps", ((3, 5, 20), (1, 4, 3)), several, call_several, want_several,
         random_size=lambda rng: (small(rng), small(rng), int(rng.integers(2, 21)))),
)  # fmt: skip

DECAY = "    w = w - lr * wd * w\n"
MISTAKES = (
    mistake("decay_in_gradient", "The decay is added to the gradient, and so divided by sqrt(v) with it: that is Adam with L2.",
            (DECAY, "    g = g + wd * w\n")),
    mistake("no_correction", "The moments are not corrected: they begin at 0 and are too small for the first 1 / (1 - b) steps.",
            ("m / (1 - b1**t)", "m"), ("v / (1 - b2**t)", "v")),
    mistake("v_not_corrected", "Only m is corrected for its start at 0; v needs 1 - b2^t as well.", ("v / (1 - b2**t)", "v")),
    mistake("from_zero", "The correction takes steps from 0: b^0 is 1 and the first step divides by 0. t is 1 at the first.",
            ("1 - b1**t", "1 - b1**(t - 1)"), ("1 - b2**t", "1 - b2**(t - 1)")),
    mistake("correction_once", "The correction is that of the first step always, 1 - b: it needs the power t.",
            ("1 - b1**t", "1 - b1"), ("1 - b2**t", "1 - b2")),
    mistake("eps_inside", "eps is inside the root; it is added to the root.", ("np.sqrt(vc) + eps", "np.sqrt(vc + eps)")),
    mistake("eps_before_correction", "eps is added to the root of v before the correction: it is then larger early on than asked.",
            ("(np.sqrt(vc) + eps)", "((np.sqrt(v) + eps) / math.sqrt(1 - b2**t))"), ("import numpy as np\n", "import math\n\nimport numpy as np\n")),
    mistake("decay_without_lr", "The decay lacks lr: a step takes lr wd w away, not wd w.",
            ("w - lr * wd * w", "w - wd * w")),
    mistake("decay_after", "The decay comes after the update and shrinks that as well: it belongs to the weight before the step.",
            (DECAY, ""), ("    return w, m, v", "    w = w - lr * wd * w\n    return w, m, v")),
    mistake("no_decay", "There is no weight decay.", (DECAY, "")),
    mistake("v_of_m", "v is made of the corrected m squared; it is the mean of g squared.",
            ("    v = b2 * v + (1 - b2) * g * g\n    mc = m / (1 - b1**t)\n", "    mc = m / (1 - b1**t)\n    v = b2 * v + (1 - b2) * mc * mc\n")),
    mistake("corrected_kept", "The corrected moments are returned and will be corrected again: keep m and v as they are.",
            ("return w, m, v", "return w, mc, vc")),
    mistake("no_root", "The root of v is missing: the step would have the unit of 1/g.", ("np.sqrt(vc)", "vc")),
    mistake("betas_exchanged", "b1 and b2 are exchanged: b1 is the gradient's mean, b2 that of its square.",
            ("    w = w - lr * wd * w\n    m", "    w = w - lr * wd * w\n    b1, b2 = b2, b1\n    m")),
    mistake("in_place", "w is changed in place: the caller's arrays stay as they are here.",
            (DECAY, "    w -= lr * wd * w\n")),
    mistake("v_of_magnitude", "v is the mean of |g|: it is that of g squared.", ("(1 - b2) * g * g", "(1 - b2) * np.abs(g)")),
    mistake("v_of_g", "v is the mean of g: it is that of g squared.", ("(1 - b2) * g * g", "(1 - b2) * g")),
    mistake("one_step_on", "The correction is that of the next step, t + 1: t counts from 1 already.",
            ("1 - b1**t", "1 - b1 ** (t + 1)"), ("1 - b2**t", "1 - b2 ** (t + 1)")),
    mistake("corrections_exchanged", "The corrections are exchanged: m is divided by 1 - b1^t, v by 1 - b2^t.",
            ("m / (1 - b1**t)", "m / (1 - b2 ** t)"), ("v / (1 - b2**t)", "v / (1 - b1 ** t)")),
)  # fmt: skip
