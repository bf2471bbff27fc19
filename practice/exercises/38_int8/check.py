"""What is right in exercise 38 (whole numbers that are known beforehand), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def known(draw, M, N, dim):
    """Numbers whose quotients are at most 0.3 from a whole number, with a 127 or -127 in each row (dim 1) or column; one of them is 0."""
    rows, width = (M, N) if dim == 1 else (N, M)
    q = draw.rng.integers(-126, 127, (rows, width))
    if rows and width:
        q[np.arange(rows), draw.rng.integers(0, width, rows)] = draw.rng.choice([-127, 127], rows)
    off = np.where(np.abs(q) == 127, 0, draw.rng.uniform(-0.3, 0.3, q.shape))
    step = draw.rng.uniform(0.2, 3, (rows, 1)) * 10.0 ** draw.rng.integers(-3, 3, (rows, 1))
    x = (q + off) * step
    if rows > 2:
        x[1] = 0
    return draw.cast(x if dim == 1 else x.T)


def one(draw, M, N, dim):
    return {"x": known(draw, M, N, dim), "dim": dim}


def call_quantise(code, a, at):
    q, scale = code.quantise(a["x"], a["dim"])
    return {"q": q, "scale": scale, "type of q": str(getattr(q, "dtype", type(q).__name__))}


def truth(x, dim):
    """Line by line, with Python's numbers."""
    lines = x if dim == 1 else x.T
    scales = [max(map(abs, line)) / 127 or 1.0 for line in lines.tolist()]
    q = np.array(
        [[int(v / s + (0.5 if v >= 0 else -0.5)) for v in line] for line, s in zip(lines.tolist(), scales, strict=True)],
        np.int8,
    )
    q, scale = q.reshape(lines.shape), np.array(scales, float).reshape(-1, 1)
    return (q, scale) if dim == 1 else (q.T, scale.T)


def want_quantise(a, ref, at):
    q, scale = truth(a["x"], a["dim"])
    return {"q": q, "scale": scale, "type of q": "int8"}


def stored(draw, M, N, dim):
    q, scale = truth(known(draw, M, N, dim).astype(np.float64), dim)
    return {"q": q, "scale": draw.cast(scale)}


def call_dequantise(code, a, at):
    return {"x": code.dequantise(a["q"], a["scale"])}


def want_dequantise(a, ref, at):
    return {"x": np.array([[int(v) for v in row] for row in a["q"]], float).reshape(a["q"].shape) * a["scale"]}


def layer(draw, T, D, F):
    if D > 1000:
        return long_sums(draw, T, D, F)
    q, scale = truth(known(draw, D, F, 0).astype(np.float64), 0)
    return {"x_TD": known(draw, T, D, 1), "Wq_DF": q, "scale_1F": draw.cast(scale), "b_F": draw(F, scale=30)}


def long_sums(draw, T, D, F):
    """Odd numbers of the same sign on both sides: an odd D of them has an odd sum beyond 2^24, which float32 does not have."""
    sign_D, odd = draw.rng.choice([-1, 1], D), lambda *shape: draw.rng.choice([125, 127], shape)
    q_TD, Wq_DF = odd(T, D) * sign_D, odd(D, F) * sign_D[:, None]
    q_TD[:, 0], step = 127 * sign_D[0], draw.rng.uniform(0.2, 3, (T, 1))
    a = {"x_TD": draw.cast(q_TD * step), "Wq_DF": Wq_DF.astype(np.int8)}
    return a | {"scale_1F": draw.cast(draw.rng.uniform(0.2, 3, (1, F))), "b_F": draw(F, scale=30)}


def call_linear(code, a, at):
    return {"y": code.linear(a["x_TD"], a["Wq_DF"], a["scale_1F"], a["b_F"])}


def product(a):
    q, scale = truth(a["x_TD"], 1)
    total = [[sum(int(x) * int(w) for x, w in zip(row, column, strict=True)) for column in a["Wq_DF"].T] for row in q]
    return np.array(total, float).reshape(len(q), a["Wq_DF"].shape[1]), scale


def want_linear(a, ref, at):
    total, scale = product(a)
    return {"y": total * scale * a["scale_1F"] + a["b_F"]}


def terms(a, ref, at):
    total, scale = product(a)
    return {"y": {"x W": total * scale * a["scale_1F"], "b": np.broadcast_to(a["b_F"], total.shape)}}


def random_one(rng):
    return (*rng.choice([2, 3, 4, 5, 7], 2, replace=False).tolist(), int(rng.integers(2)))


def random_layer(rng):
    return tuple(rng.choice([2, 3, 5, 7, 9], 3, replace=False).tolist())


ONE = ((4, 5, 1), (3, 5, 0), (1, 3, 1), (4, 1, 0), (0, 3, 1))
PARTS = (
    Part("quantise", ONE, one, call_quantise, want_quantise, random_size=random_one),
    Part("dequantise", ONE, stored, call_dequantise, want_dequantise, random_size=random_one),
    Part("linear", ((4, 7, 5), (3, 5, 4), (1, 9, 2), (0, 3, 2), (2, 61, 3), (2, 1101, 2)), layer, call_linear, want_linear, terms, random_size=random_layer,
         influence=(("x_TD", "y"),)),
)  # fmt: skip

MOST, SCALE, ROUND = (
    "np.abs(x).max(axis=dim, keepdims=True)",
    "np.where(most > 0, most / 127, 1).astype(x.dtype)",
    "np.rint(x / scale).astype(np.int8)",
)
SUM, Y = "xq_TD.astype(np.int32) @ Wq_DF.astype(np.int32)", "sum_TF.astype(x_TD.dtype) * scale_T1 * scale_1F + b_F"
MISTAKES = (
    mistake("cut_off", "The quotients are cut towards 0: astype does not round.", (ROUND, "(x / scale).astype(np.int8)")),
    mistake("floor", "The quotients are rounded down: to the nearest is asked for.", (ROUND, "np.floor(x / scale).astype(np.int8)")),
    mistake("by_128", "The scale is max |x| / 128: with 127 the largest becomes 127, and nothing overflows.", ("most / 127", "most / 128"),
            (ROUND, "np.clip(np.rint(x / scale), -128, 127).astype(np.int8)")),
    mistake("wraps", "The scale is max |x| / 128, and 128 does not fit into int8: it wraps to -128.", ("most / 127", "most / 128")),
    mistake("by_255", "The scale is 2 max |x| / 255: it is max |x| / 127.", ("most / 127", "2 * most / 255")),
    mistake("one_scale", "There is one scale for the whole array: one a row or column is asked for, of x one a token.", (MOST, "np.abs(x).max(initial=0) + 0 * x.max(axis=dim, keepdims=True)")),
    mistake("other_dim", "The largest is taken along the other dim.", (MOST, "np.abs(x).max(axis=1 - dim, keepdims=True, initial=0)")),
    mistake("no_magnitude", "The largest number is taken, not the largest magnitude: -5 is larger than 3 here.", (MOST, "np.maximum(x.max(axis=dim, keepdims=True), 0)"),
            (ROUND, "np.clip(np.rint(x / scale), -127, 127).astype(np.int8)")),
    mistake("magnitude_last", "The magnitude of the largest number is taken, not the largest magnitude: of 3 and -5 that is 3.",
            (MOST, "np.abs(x.max(axis=dim, keepdims=True))"), (ROUND, "np.clip(np.rint(x / scale), -127, 127).astype(np.int8)")),
    mistake("span", "The scale is made of the span, max - min: absmax is symmetric about 0.",
            (MOST, "(x.max(axis=dim, keepdims=True) - x.min(axis=dim, keepdims=True)) / 2"), (ROUND, "np.clip(np.rint(x / scale), -127, 127).astype(np.int8)")),
    mistake("no_zero", "The scale of a row or column of zeros is 0, or next to it: the scale is 1 then.", (SCALE, "(most / 127).astype(x.dtype)")),
    *(mistake(f"at_least_{least}", f"The largest magnitude is taken to be {least} at least: where all is 0 the scale is 1, and small numbers"
              " have scales as small.", (SCALE, f"(np.maximum(most, {least}) / 127).astype(x.dtype)"))
      for least in ("1e-5", "1e-6", "1e-8")),
    mistake("scale_turned", "The scale is turned over: 127 / max |x| is what one multiplies with; what is returned is max |x| / 127.",
            ("return q, scale", "return q, 1 / scale"), ("* scale_T1 *", "/ scale_T1 *")),
    mistake("scale_flat", "The scale has lost its dim of length 1: then it does not broadcast against q.", ("return q, scale", "return q, scale.squeeze(dim)"),
            ("xq_TD, scale_T1 = quantise(x_TD, 1)", "xq_TD, scale_T1 = quantise(x_TD, 1)\n    scale_T1 = scale_T1[:, None]")),
    mistake("floats_kept", "q is rounded but still floats: int8 is asked for.", (ROUND, "np.rint(x / scale)")),
    mistake("int32_kept", "q is int32: int8 is asked for, a quarter of the memory.", (ROUND, "np.rint(x / scale).astype(np.int32)")),
    mistake("divided", "dequantise divides by the scale: it multiplies.", ("q.astype(scale.dtype) * scale", "q.astype(scale.dtype) / scale")),
    mistake("in_int8", "The product is done in int8 and wraps: widen both to int32 first.", (SUM, "xq_TD @ Wq_DF")),
    mistake("in_int16", "The product is done in int16 and wraps after a few terms: widen to int32.", (SUM, "xq_TD.astype(np.int16) @ Wq_DF.astype(np.int16)")),
    mistake("in_float32", "The product is done in float32, which has not all whole numbers beyond 2^24: many terms are no longer exact. Widen to int32.",
            (SUM, "xq_TD.astype(np.float32) @ Wq_DF.astype(np.float32)")),
    mistake("no_token_scale", "The token's scale is missing.", (Y, "sum_TF.astype(x_TD.dtype) * scale_1F + b_F")),
    mistake("no_column_scale", "W's scale is missing.", (Y, "sum_TF.astype(x_TD.dtype) * scale_T1 + b_F")),
    mistake("bias_scaled", "The bias is multiplied with the scales: it is added at the end.", (Y, "(sum_TF + b_F) * scale_T1 * scale_1F")),
    mistake("no_bias", "b is not added.", (Y, "sum_TF.astype(x_TD.dtype) * scale_T1 * scale_1F")),
    mistake("x_not_quantised", "x is not quantised: y is x times the dequantised weights. Both are to be int8.", (Y, "x_TD @ (Wq_DF * scale_1F) + b_F")),
    mistake("x_by_columns", "x is quantised with a scale a column, over the tokens: that scale depends on the summed index. One a token.",
            ("quantise(x_TD, 1)", "quantise(x_TD, 0)"), (Y, "(xq_TD * scale_T1) @ (Wq_DF * scale_1F) + b_F")),
)  # fmt: skip
