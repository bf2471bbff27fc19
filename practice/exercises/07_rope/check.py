"""What is right in exercise 07 (complex numbers times unit numbers, pair by pair), and what is often wrong."""

import cmath

import numpy as np

from practice.part import Part, mistake


def inputs(draw, T, H, E):
    """Positions in any order, none of them 0, one below it, the same for the same T; a base of its own, never 10000, for each
    case: who keeps a table for positions alone gets that of another base."""
    positions_T = 3 + np.random.default_rng(T).permutation(97)[:T]
    positions_T[1:2] *= -1
    return {"x_THE": draw(T, H, E), "positions_T": positions_T, "base": float(draw.rng.integers(20, 1000)) * 1000}


def far(draw, T, H, E):
    a = inputs(draw, T, H, E)
    return a | {"positions_T": 90_001 + a["positions_T"]}


def turned(pairing):
    def call(code, a, at):
        return {name: code.rope(a["x_THE"], some, a["base"], pairing) for name, some in both(a).items()}

    return call


def both(a):
    """The next positions come with the same base and shape: who keeps a table for these alone turns by those before."""
    return {"y": a["positions_T"], "y of the next positions": a["positions_T"] + 7}


def want(pairing):
    def right(a, ref, at):
        return {name: of_positions(a, ref, some) for name, some in both(a).items()}

    def of_positions(a, ref, positions_T):
        y_THE = np.full_like(a["x_THE"], np.nan)
        E = y_THE.shape[2]
        for i in range(E // 2):
            first, second = (i, i + E // 2) if pairing == "half" else (2 * i, 2 * i + 1)
            for t, position in enumerate(positions_T.tolist()):
                turn = cmath.rect(1, position * ref.rope.frequency(i, E, a["base"], None))
                z_H = (a["x_THE"][t, :, first] + 1j * a["x_THE"][t, :, second]) * turn
                y_THE[t, :, first], y_THE[t, :, second] = z_H.real, z_H.imag
        return y_THE

    return right


def random_size(rng):
    return (*rng.choice([2, 3, 5, 7], 2, replace=False).tolist(), int(rng.choice([6, 8, 10])))


def part(pairing):
    return Part(
        f"pairing {pairing}",
        ((5, 3, 8), (3, 2, 10), (1, 5, 6), (4, 1, 6)),
        inputs,
        turned(pairing),
        want(pairing),
        random_size=random_size,
        influence=(("x_THE", "y"),),
    )


PARTS = (
    part("half"),
    part("interleaved"),
    # In float32 only: in float64 two right answers differ by what rounding a frequency does at such a distance.
    Part(
        "long context",
        ((5, 3, 8),),
        far,
        turned("half"),
        want("half"),
        random_size=random_size,
        dtypes=("float32",),
    ),
)

HALF = "first_P, second_P = i_P, i_P + E // 2"
INTERLEAVED = "first_P, second_P = 2 * i_P, 2 * i_P + 1"
MISTAKES = (
    mistake("overwritten", "The second of each pair is turned with the first one's new value: both need the old ones.",
            ("= a_THP * sin_T1P", "= y_THE[:, :, first_P] * sin_T1P")),
    mistake("reshaped", "x is brought to (H, T, E) by a reshape, which leaves the numbers in their order: rows get the positions of other tokens."
            " Transpose it.", ("(angle_TP)[:, None, :]", "(angle_TP)[np.arange(x_THE.shape[0] * x_THE.shape[1]).reshape(x_THE.shape[:2]) % len(x_THE)]")),
    mistake("nothing", "Nothing was rotated: x is returned as it is.", ("    return y_THE", "    return x_THE.copy()")),
    mistake("half_for_interleaved", "The pairs turned are (i, i + E/2): \"interleaved\" pairs neighbours, (2 i, 2 i + 1).",
            (INTERLEAVED, HALF),
            seen="huggingface/transformers #25199"),
    mistake("interleaved_for_half", "The pairs turned are neighbours, (2 i, 2 i + 1): \"half\" pairs (i, i + E/2).",
            (HALF, INTERLEAVED)),
    mistake("concatenated", "The interleaved pairs are turned rightly but left as two halves, all first entries before all second"
            " ones: each entry goes back to its own place.",
            ("    return y_THE",
             "    if pairing != 'half':\n        y_THE = np.concatenate([y_THE[:, :, first_P], y_THE[:, :, second_P]], axis=2)\n"
             "    return y_THE"),
            seen="vllm-project/vllm-metal #44"),
    mistake("tiled_for_interleaved", "For \"interleaved\" the angles are laid out as two halves (tiled): each stands twice in a row there, for"
            " its two neighbours (repeated).",
            ("a_THP * cos_T1P - b_THP * sin_T1P", "a_THP * cos_T1P[:, :, first_P % (E // 2)] - b_THP * sin_T1P[:, :, first_P % (E // 2)]"),
            ("a_THP * sin_T1P + b_THP * cos_T1P", "a_THP * sin_T1P[:, :, second_P % (E // 2)] + b_THP * cos_T1P[:, :, second_P % (E // 2)]")),
    mistake("repeated_for_half", "For \"half\" each angle stands twice in a row (repeated): its two entries are E/2 apart, so the angles come as"
            " two halves (tiled).",
            ("a_THP * cos_T1P - b_THP * sin_T1P",
             "a_THP * cos_T1P[:, :, (first_P if pairing == 'half' else 2 * i_P) // 2] - b_THP * sin_T1P[:, :, (first_P if pairing == 'half' else 2 * i_P) // 2]"),
            ("a_THP * sin_T1P + b_THP * cos_T1P",
             "a_THP * sin_T1P[:, :, (second_P if pairing == 'half' else 2 * i_P) // 2] + b_THP * cos_T1P[:, :, (second_P if pairing == 'half' else 2 * i_P) // 2]")),
    mistake("backwards", "The angle has the wrong sign: products still depend on the distance only, but the rotation goes"
            " backwards.",
            ("a_THP * cos_T1P - b_THP * sin_T1P", "a_THP * cos_T1P + b_THP * sin_T1P"),
            ("a_THP * sin_T1P + b_THP * cos_T1P", "b_THP * cos_T1P - a_THP * sin_T1P")),
    mistake("one_sign", "Both entries have a plus sign, so this is no rotation: a cos - b sin and a sin + b cos.",
            ("a_THP * cos_T1P - b_THP * sin_T1P", "a_THP * cos_T1P + b_THP * sin_T1P")),
    mistake("i_over_E", "The exponent is i/E: it is 2 i/E, with E/2 pairs from 1 down to nearly 1/base.",
            ("-2 * i_P / E", "-i_P / E")),
    mistake("two_i_twice", "The exponent is 4 i/E: i counts pairs here, and 2 i/E is the exponent of pair i.",
            ("-2 * i_P / E", "-4 * i_P / E")),
    mistake("i_from_one", "Frequencies are counted from 1: the first pair turns by the position itself.",
            ("-2 * i_P / E", "-2 * (i_P + 1) / E")),
    mistake("model_width", "E in the exponent is the width of all heads: it is one head's.",
            ("-2 * i_P / E", "-2 * i_P / (x_THE.shape[1] * E)")),
    mistake("rising", "The frequencies rise with i: they fall, base^(-2 i/E).", ("-2 * i_P / E", "2 * i_P / E")),
    mistake("arange", "The token's place in the array is taken for its position: the positions are given, and a cache or a chunk does"
            " not begin at 0.",
            ("positions_T[:, None] * frequency_P", "np.arange(len(x_THE))[:, None] * frequency_P"),
            seen="Blaizzy/mlx-vlm #1983"),
    mistake("base_fixed", "The base is taken to be 10000 whatever is asked for.", ("float(base)", "10000.0")),
    mistake("float32_angles", "The angles are made in float32: at position 90000 they are off by up to 0.004. Make them in float64, then"
            " round the cosines and sines.",
            ("frequency_P = float(base) ** (-2 * i_P / E)",
             "frequency_P = (float(base) ** (-2 * i_P / E)).astype(x_THE.dtype)"),
            ("positions_T[:, None] * frequency_P", "positions_T[:, None].astype(x_THE.dtype) * frequency_P")),
    mistake("promoted", "float32 became float64: cosines and sines of float64 angles must be rounded to x's dtype.",
            ("np.zeros_like(x_THE)", "np.zeros(x_THE.shape)")),
    mistake("in_place", "x is changed in place: the caller still needs it.", ("np.zeros_like(x_THE)", "x_THE")),
    mistake("float32_product", "The angles are made in float32, whatever x is: at position 90000 they are off by up to 0.004."
            " Make them in float64, then round the cosines and sines.",
            ("positions_T[:, None] * frequency_P", "positions_T[:, None].astype(np.float32) * frequency_P.astype(np.float32)")),
    mistake("float32_cosines", "Cosines and sines are rounded to float32, whatever x is: x may be float64.",
            ("np.cos(angle_TP)", "np.cos(angle_TP).astype(np.float32)"), ("np.sin(angle_TP)", "np.sin(angle_TP).astype(np.float32)")),
)  # fmt: skip
