"""What is right in exercise 27 (number by number, from whole arrays), and what is often wrong."""

import numpy as np

from practice.part import Part, float64, mistake

NAMES = ("lr", "b1", "b2", "eps", "wd")


def inputs(draw, N, ranks, t, g, decay):
    """g: the size of the gradients. Where it is 0 they all are. decay 0: wd is 0, and the caller's w is still not to be changed."""
    g_rN = draw(ranks, N, scale=g)
    low, high = (0.05, 0.6, 0.8, 0.02, 0.2), (0.2, 0.9, 0.99, 0.1, 0.6)
    hyper = {n: float(x) for n, x in zip(NAMES, draw.rng.uniform(low, high), strict=True)}
    hyper["wd"] *= decay
    # Far below the norm, or far above.
    hyper["clip"] = float(draw.rng.choice([0.3, 0.4, 6.0])) * (
        float(np.sqrt((g_rN.astype(np.float64).mean(axis=0) ** 2).sum())) or 1.0
    )
    return {"w_N": draw(N), "g_rN": g_rN, "m_N": draw(N), "v_N": draw.cast(draw.rng.uniform(0.1, 2, N)), "t": t, "hyper": hyper}


def call(code, a, dp):
    mine = dp.cut(a["w_N"].size)
    after = want(float64(a), None, dp)
    moments = np.stack([a["m_N"][mine], a["v_N"][mine], after["m"], after["v"]])
    with code.watching(lambda arrays: whole_moments(code, arrays, moments, a["w_N"].size, mine)):
        found = code.step(a["w_N"], a["g_rN"][dp.rank], a["m_N"][mine], a["v_N"][mine], a["t"], dict(a["hyper"]), dp)
    w, m, v = found
    return {"w": w, "m": m, "v": v}


def whole_moments(code, arrays, moments, N, mine):
    """Count the numbers beyond this rank's part in arrays of N that have a moment, before the step or after it, in its place."""
    for x in arrays:
        # Of rank 0's part the place says nothing: it is the beginning of other arrays too.
        if mine.start and mine.stop > mine.start and x.ndim and x.shape[-1] == N and x.dtype.kind == "f":
            far = np.abs(x[..., None, mine] - moments)
            if (far <= 1e-6 + 1e-4 * np.abs(moments)).all(axis=-1).any():
                beyond = N - (mine.stop - mine.start)
                code.counts["moments beyond this rank's part"] = max(code.counts["moments beyond this rank's part"], beyond)


def want(a, ref, dp):
    h, t = a["hyper"], a["t"]
    g = [sum(column) / dp.size for column in a["g_rN"].T.tolist()]
    norm = sum(x * x for x in g) ** 0.5
    rows = []
    for w, x, m, v in zip(a["w_N"].tolist(), g, a["m_N"].tolist(), a["v_N"].tolist(), strict=True):
        x = x * h["clip"] / norm if norm > h["clip"] else x
        m, v = m + (1 - h["b1"]) * (x - m), v + (1 - h["b2"]) * (x * x - v)
        root = (v / (1 - h["b2"] ** t)) ** 0.5
        rows.append((w * (1 - h["lr"] * h["wd"]) - h["lr"] * m / ((1 - h["b1"] ** t) * (root + h["eps"])), m, v))
    w_N, m_N, v_N = np.array(rows).T
    mine = dp.cut(len(w_N))
    return {"w": w_N, "m": m_N[mine], "v": v_N[mine]}


def limits(a, dp):
    half = (dp.size - 1) * a["w_N"].size // dp.size
    return {"numbers sent": 2 * half + 4, "rounds": 4, "moments beyond this rank's part": 0}


PARTS = (
    Part("step", ((10, 4, 1, 2, 1), (11, 4, 3, 2, 1), (23, 4, 2, 2, 1), (7, 4, 5, 2, 0), (40, 4, 12, 2, 1), (9, 4, 2, 0, 1)), inputs, call, want, None, limits,
         random_size=lambda rng: (int(rng.integers(5, 40)), 4, int(rng.integers(1, 9)), int(rng.integers(1, 4)), 1)),
)  # fmt: skip

SCATTER = "dp.reduce_scatter(g_N) / dp.size"
MISTAKES = (
    mistake("all_reduced", "This is right, but the gradients are all-reduced: each rank needs its part of the sum only, a reduce-scatter,"
            " at half the bytes.", (SCATTER, "dp.all_reduce(g_N)[dp.cut(len(g_N))] / dp.size")),
    mistake("sum", "The gradients are summed: the mean over the ranks is asked for.", (SCATTER, "dp.reduce_scatter(g_N)")),
    mistake("own_gradient", "The gradients of the other ranks are not in it: each rank steps with its own.",
            (SCATTER, "g_N[dp.cut(len(g_N))]")),
    mistake("local_norm", "The norm is that of this rank's part: parts are clipped differently. Sum the squares over the ranks.",
            ("np.sqrt(dp.all_reduce(square))", "np.sqrt(square)")),
    mistake("norm_of_own", "The norm is taken of this rank's own gradient, before the mean: it is the mean that is clipped.",
            ("norm = np.sqrt(dp.all_reduce(square))[0]", "norm = np.sqrt((g_N**2).sum())")),
    mistake("clipped_alone", "Each rank clips its own gradient, and the mean is taken of what is left: it is the mean that is clipped.",
            (SCATTER, "dp.reduce_scatter(g_N * min(1, clip / np.sqrt((g_N**2).sum()))) / dp.size"),
            ("    g_n = g_n * min(1, clip / norm)\n", "")),
    mistake("norm_of_all_own", "The norm is that of all ranks' own gradients, one after another, before the mean: it is the mean that is clipped, and"
            " own gradients may cancel in it.", ("    norm = np.sqrt(dp.all_reduce(square))[0]\n", "    norm = np.sqrt(dp.all_reduce((g_N**2).sum(keepdims=True)))[0] / dp.size\n")),
    mistake("norm_of_all_own_whole", "The norm is that of all ranks' own gradients, one after another, before the mean: it is the mean that is clipped, and"
            " own gradients may cancel in it.", ("    norm = np.sqrt(dp.all_reduce(square))[0]\n", "    norm = np.sqrt(dp.all_reduce((g_N**2).sum(keepdims=True)))[0]\n")),
    mistake("norms_added", "The parts' norms are added: add their squares, then take the root.",
            ("np.sqrt(dp.all_reduce(square))", "dp.all_reduce(np.sqrt(square))")),
    mistake("norm_mean", "The squares are averaged over the ranks: a norm is of all N numbers, so they are summed.",
            ("np.sqrt(dp.all_reduce(square))", "np.sqrt(dp.all_reduce(square) / dp.size)")),
    mistake("norm_largest", "The largest part's norm is taken for the whole: sum the squares over the ranks.",
            ("dp.all_reduce(square)", "dp.all_reduce(square, op='max')")),
    mistake("no_root", "The norm lacks its root: it is the sum of squares.", ("np.sqrt(dp.all_reduce(square))", "dp.all_reduce(square)")),
    mistake("always_scaled", "Gradients within the limit are scaled up to it: the factor is at most 1.",
            ("min(1, clip / norm)", "clip / norm")),
    mistake("not_clipped", "The gradients are not clipped.", ("    g_n = g_n * min(1, clip / norm)\n", "")),
    mistake("clipped_late", "The moments have not seen the clipping: clip before m and v.",
            ("    g_n = g_n * min(1, clip / norm)\n", ""),
            ("    w_n = w_n - lr * wd * w_n\n", "    w_n = w_n - lr * wd * w_n\n    lr = lr * min(1, clip / norm)\n")),
    mistake("not_gathered", "Only this rank's part of w has been stepped: the other parts are the old ones, and the ranks' weights differ.",
            ("return dp.all_gather(w_n), m_n, v_n", "w_N = w_N.copy()\n    w_N[dp.cut(len(w_N))] = w_n\n    return w_N, m_n, v_n")),
    mistake("summed_back", "Parts that overlap nowhere were summed from whole arrays of old weights: use all_gather, or zeros elsewhere.",
            ("return dp.all_gather(w_n), m_n, v_n", "w_N = w_N.copy()\n    w_N[dp.cut(len(w_N))] = w_n\n    return dp.all_reduce(w_N), m_n, v_n")),
    mistake("state_everywhere", "Every rank returns all of m and v: its share is dp.cut(N), a p-th of them.",
            ("return dp.all_gather(w_n), m_n, v_n", "return dp.all_gather(w_n), dp.all_gather(m_n), dp.all_gather(v_n)")),
    mistake("whole_inside", "This is right, but the moments are made whole within the step: each rank makes its own part of m and v only.",
            ("    m_n = b1 * m_n + (1 - b1) * g_n\n",
             "    m_N = np.zeros_like(w_N)\n    m_N[dp.cut(len(w_N))] = m_n\n    m_n = b1 * m_N[dp.cut(len(w_N))] + (1 - b1) * g_n\n")),
    mistake("decay_in_gradient", "The decay is added to the gradient, and so divided by sqrt(v) with it: that is Adam with L2.",
            ("    w_n = w_n - lr * wd * w_n\n", ""), ("g_n = g_n * min(1, clip / norm)", "g_n = g_n * min(1, clip / norm) + wd * w_n")),
    mistake("no_correction", "The moments are not corrected for their start at 0: m / (1 - b1^t), v / (1 - b2^t).",
            ("m_n / (1 - b1**t)", "m_n"), ("v_n / (1 - b2**t)", "v_n")),
    mistake("eps_inside", "eps is added inside the root: it belongs outside, sqrt(v / (1 - b2^t)) + eps.",
            ("(np.sqrt(v_n / (1 - b2**t)) + eps)", "np.sqrt(v_n / (1 - b2**t) + eps)")),
    mistake("t_from_zero", "The correction takes steps from 0: the first step divides by 0.",
            ("1 - b1**t", "1 - b1 ** (t - 1)"), ("1 - b2**t", "1 - b2 ** (t - 1)")),
    mistake("all_reduced_norm", "This is right, but the gradients are all-reduced whole and then cut: a reduce-scatter sends half of that. The norm"
            " needs one more number, the sum of the parts' squares.",
            (SCATTER, "(mean_N := dp.all_reduce(g_N) / dp.size)[dp.cut(len(g_N))]"),
            ("norm = np.sqrt(dp.all_reduce(square))[0]", "norm = np.sqrt((mean_N**2).sum())")),
    mistake("own_times_rank", "This rank's weights are taken from rank x n on: where parts are not equally long they begin elsewhere, at"
            " dp.cut(N).start.", ("w_N[dp.cut(len(w_N))]", "w_N[dp.rank * len(m_n) : (dp.rank + 1) * len(m_n)]")),
    mistake("v_not_clipped", "v is made of the gradient before clipping: both moments take the clipped one.",
            ("    g_n = g_n * min(1, clip / norm)\n", "    before_n, g_n = g_n, g_n * min(1, clip / norm)\n"), ("(1 - b2) * g_n**2", "(1 - b2) * before_n**2")),
    mistake("m_not_clipped", "m is made of the gradient before clipping: both moments take the clipped one.",
            ("    g_n = g_n * min(1, clip / norm)\n", "    before_n, g_n = g_n, g_n * min(1, clip / norm)\n"), ("(1 - b1) * g_n", "(1 - b1) * before_n")),
    mistake("norm_zero", "Where all gradients are 0 they are divided by a norm of 0, and 0/0 is NaN: they stay 0 then.",
            ("g_n * min(1, clip / norm)", "g_n / norm * min(norm, clip)")),
    mistake("v_not_corrected", "Only m is corrected for its start at 0; v needs 1 - b2^t as well.", ("v_n / (1 - b2**t)", "v_n")),
    mistake("one_step_on", "The correction is that of the next step, t + 1: t counts from 1 already.",
            ("1 - b1**t", "1 - b1 ** (t + 1)"), ("1 - b2**t", "1 - b2 ** (t + 1)")),
    mistake("decay_without_lr", "The decay lacks lr: a step takes lr wd w away, not wd w.", ("w_n - lr * wd * w_n", "w_n - wd * w_n")),
    mistake("decay_after", "The decay comes after the update and shrinks that as well: it belongs to the weight before the step.",
            ("    w_n = w_n - lr * wd * w_n\n", ""), ("    return dp.all_gather(w_n), m_n", "    w_n = w_n - lr * wd * w_n\n    return dp.all_gather(w_n), m_n")),
    mistake("no_decay", "There is no weight decay.", ("    w_n = w_n - lr * wd * w_n\n", "")),
    mistake("norm_of_sum", "The norm is that of the sum over the ranks: it is the mean that is clipped.",
            ("norm = np.sqrt(dp.all_reduce(square))[0]", "norm = np.sqrt(dp.all_reduce(square))[0] * dp.size")),
)  # fmt: skip
