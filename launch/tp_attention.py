"""Tensor-parallel attention of every kind, compared with the reference, counted and timed.

T tokens   D model width   H heads   K key/value heads   E head width   C latent width   R rotated width, beside a latent
"""

from __future__ import annotations

from launch import start  # isort: skip  it settles threads and MPI before NumPy loads

import argparse
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import progress, report
from launch.explain import view
from launch.lines import counted
from launch.measure import products, step
from launch.options import UsageError, only_with, parser, positive
from layers.attention import Attention
from layers.batch import Batch
from layers.latent_attention import LatentAttention
from layers.rope import Linear, Llama3, Rope, Scaling, Yarn
from parallel.axis import Axis
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import drawn
from parallel.rows import cut_rows, own
from parallel.shard import covering, even
from reference import attention as reference
from reference import layer
from reference.compare import Comparison

KINDS = ("mha", "gqa", "mqa", "mla")
SCALINGS: dict[str, tuple[type, dict[str, float]]] = {
    "linear": (Linear, {"factor": 4.0}),
    "llama3": (Llama3, {}),
    "yarn": (Yarn, {"mscale_all_dim": 0.707}),
}
# Comparisons use biases and norm weights of this spread: a bias of zero would be right wherever it is added.
SPREAD = 0.1
# Inputs of this size make the softmax sharp: a flat one forgives a wrong scale or mask.
SHARP = 2.0
EPS = 1e-6
# Seconds that deriving the entries of one tensor may take, and about what its parts take: a head, a row of its scores, a score,
# a weight that is read, and one that is multiplied. Not measured here, so that the same command compares the same entries.
BUDGET, HEAD, ROW, SCORE, READ, PRODUCT = 0.5, 3e-4, 2.5e-5, 6e-8, 4e-9, 1e-9


def options() -> argparse.ArgumentParser:
    p = parser(
        "tp_attention",
        "Run tensor-parallel attention, forward and backward, and compare it with a reference.",
        (
            "mpirun -n 4 python -m launch.tp_attention --heads 9 --d-model 144",
            "mpirun -n 2 python -m launch.tp_attention --sequences 1,7,64,129",
            "mpirun -n 3 python -m launch.tp_attention --kind mla --rope interleaved",
        ),
    )
    p.add_argument("--kind", choices=KINDS, default="gqa", help="multi-head, grouped-query, multi-query or latent")
    p.add_argument(
        "--sequences",
        metavar="N,N",
        type=_counts,
        nargs="+",
        default=[[4]],
        help="how many sequences, or their lengths: 1,7,64,129 (default: 4)",
    )
    p.add_argument("--tokens", type=positive, help="T, of all sequences together (default: 96, or the sum of the lengths)")
    p.add_argument("--d-model", type=positive, default=64, help="D, width of input and output")
    p.add_argument("--heads", type=positive, default=8, help="H, query heads, dealt out over the ranks, evenly or not")
    p.add_argument("--kv-heads", type=positive, help="K, a divisor of H (default for gqa: the largest up to H/2)")
    p.add_argument("--d-head", type=positive, help="E, width of a head (default: D/H)")
    p.add_argument(
        "--rope", choices=("none", "half", "interleaved"), default="half", help="rotary positions, and their pairing"
    )
    p.add_argument("--rope-base", metavar="X", type=float, default=10000.0, help="its base")
    p.add_argument(
        "--rope-scaling",
        metavar="KIND",
        type=_scaling,
        default=None,
        help="linear, llama3 or yarn, as in yarn:factor=40,original=4096 (default: none)",
    )
    p.add_argument(
        "--bidirectional", action="store_true", help="every token reads its whole sequence, not only what is before it"
    )
    p.add_argument("--sequence-parallel", action="store_true", help="cut the tokens over the ranks outside the layer")
    p.add_argument(
        "--no-bias", action="store_true", help="leave the biases of queries, keys, values and output out (mla has none)"
    )
    p.add_argument("--qk-norm", action="store_true", help="RMS norm of each head's queries and keys, as Qwen3 (not mla)")
    mla = p.add_argument_group("sizes of --kind mla")
    mla.add_argument("--d-latent", type=positive, help="C, width of the latent (default: 4E)")
    mla.add_argument("--d-query-latent", type=positive, help="width of the queries' latent (default: they have none)")
    mla.add_argument("--d-nope", type=positive, help="width of a head's queries and keys without position (default: E)")
    mla.add_argument(
        "--d-rope", type=positive, help="R, width of the rotated key that all heads share (default: the even of E/2)"
    )
    mla.add_argument("--d-value", type=positive, help="width of a head's values (default: E)")
    only_with(p, "--d-latent", "--d-query-latent", "--d-nope", "--d-rope", "--d-value", kind=("mla",))
    only_with(p, "--no-bias", "--qk-norm", kind=("mha", "gqa", "mqa"))
    only_with(p, "--rope-base", "--rope-scaling", rope=("half", "interleaved"))
    p.add_argument("--layers", type=positive, default=1, help="L, for the table of the KV cache")
    view.add_options(p)
    return p


def _counts(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _scaling(text: str) -> Scaling | None:
    """An argparse type: none, or a scaling with its numbers, yarn:factor=40."""
    name, _, given = text.partition(":")
    if text == "none":
        return None
    if name not in SCALINGS:
        raise argparse.ArgumentTypeError(f"unknown scaling {name!r}: use one of none, {', '.join(SCALINGS)}")
    kind, numbers = SCALINGS[name]
    known = [f.name for f in fields(kind)]
    numbers = dict(numbers)
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        try:
            numbers[key] = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not a number of {name}: use for instance factor=8") from None
        if key not in known or not numbers[key] > 0:
            raise argparse.ArgumentTypeError(f"{part!r} is no setting of {name}: use {', '.join(known)}, each above 0")
    return kind(**numbers)


class Sizes(NamedTuple):
    """What the options may leave open, settled: `lengths` of the sequences, and widths; a latent's only where there is one."""

    tokens: int
    lengths: list[int]
    kv_heads: int
    d_head: int
    d_latent: int | None
    d_nope: int | None
    d_rope: int | None
    d_value: int | None


def check(args: argparse.Namespace, ranks: int) -> Sizes:
    view.check(args, ranks)
    H, D = args.heads, args.d_model
    if args.d_head is None and D % H:
        raise UsageError(f"--heads {H} does not divide --d-model {D}: use a divisor of {D}, or give --d-head")
    E = args.d_head or D // H
    grouped = args.kv_heads or _largest_group(H)
    K = {"mha": H, "mqa": 1, "mla": H}.get(args.kind, grouped)
    if args.kv_heads not in (None, K):
        raise UsageError(f"--kind {args.kind} has {K} kv-heads, not {args.kv_heads}: use --kind gqa, or no --kv-heads")
    if H % K:
        raise UsageError(f"--kv-heads {K} does not divide --heads {H}: use a divisor of {H}")
    if ranks > H:
        raise UsageError(f"cannot cut --heads {H} over {ranks} ranks: use at most {H} ranks or more --heads")
    latent = [args.d_latent, args.d_nope, args.d_rope, args.d_value]
    if args.kind == "mla":
        latent = [given or width for given, width in zip(latent, (4 * E, E, max(2, E // 4 * 2), E), strict=True)]
        if latent[2] % 2:
            raise UsageError(f"--d-rope {latent[2]} cannot be rotated in pairs: use an even width")
    elif args.rope != "none" and E % 2:
        raise UsageError(f"--rope {args.rope} cannot rotate heads of odd width {E} in pairs: use an even width, or --rope none")
    if args.rope_base <= 1:
        raise UsageError(f"--rope-base {args.rope_base:g} is no base: use a number above 1, such as 10000")
    lengths = _lengths([n for part in args.sequences for n in part], args.tokens)
    return Sizes(sum(lengths), lengths, K, E, *latent)


def _largest_group(heads: int) -> int:
    """The largest number of key/value heads that divides the heads, up to half of them."""
    return next(k for k in range(max(1, heads // 2), 0, -1) if heads % k == 0)


def _lengths(given: list[int], tokens: int | None) -> list[int]:
    """The lengths of the sequences, from their number or from all their lengths."""
    if len(given) > 1:
        if tokens not in (None, sum(given)):
            raise UsageError(f"--tokens {tokens} is not the sum of --sequences {','.join(map(str, given))}: use {sum(given)}")
        return given
    count, tokens = given[0], tokens or 96
    if count > tokens:
        raise UsageError(f"cannot cut --tokens {tokens} into {count} sequences: use at most {tokens}")
    # Ragged: each has one token, and the n-th gets n shares of the others.
    ends = [count + (tokens - count) * n * (n + 1) // (count * (count + 1)) - (count - n) for n in range(count + 1)]
    return np.diff(ends).tolist()


def inputs(tokens: int, d_model: int, dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x and dy (T, D), the same on every rank and mesh."""
    x, dy = np.random.default_rng(seed).standard_normal((2, tokens, d_model))
    return (SHARP * x).astype(dtype), dy.astype(dtype)


def rope(args: argparse.Namespace, sizes: Sizes) -> Rope | None:
    width = sizes.d_rope if args.kind == "mla" else sizes.d_head
    return None if args.rope == "none" else Rope(width, args.rope_base, args.rope, args.rope_scaling)


def build(args: argparse.Namespace, sizes: Sizes, tp: Axis) -> Attention | LatentAttention:
    weights = drawn(args.seed, args.dtype, SPREAD)
    more = {"causal": not args.bidirectional, "cuts_rows": args.sequence_parallel}
    rotated = rope(args, sizes)
    correction = rotated.softmax_factor if rotated else 1.0
    if args.kind == "mla":
        widths = (sizes.d_latent, sizes.d_nope, sizes.d_rope, sizes.d_value, args.d_query_latent or 0)
        scale = (sizes.d_nope + sizes.d_rope) ** -0.5 * correction
        return LatentAttention(tp, weights, args.d_model, args.heads, *widths, eps=EPS, scale=scale, **more)
    widths = (args.d_model, args.heads, sizes.kv_heads, sizes.d_head)
    bias, norm, scale = not args.no_bias, EPS if args.qk_norm else None, sizes.d_head**-0.5 * correction
    return Attention(tp, weights, *widths, bias=bias, bias_out=bias, qk_norm=norm, scale=scale, **more)


def reference_options(args: argparse.Namespace, lengths: list[int]) -> reference.Options:
    """What the reference is asked for, in its own words."""
    rotation = None
    if args.rope != "none":
        scaling = None
        if args.rope_scaling is not None:
            scaling = asdict(args.rope_scaling) | {"rope_type": type(args.rope_scaling).__name__.lower()}
            scaling["original_max_position_embeddings"] = scaling.pop("original", None)
        rotation = {"pairing": args.rope, "base": args.rope_base, "scaling": scaling}
    return reference.Options(lengths, not args.bidirectional, rotation, EPS, EPS)


def compared(
    asked: reference.Options, H: int, whole: dict[str, np.ndarray], dy: np.ndarray, share: tuple[int, int] = (0, 1)
) -> Iterator[Comparison]:
    """Every tensor beside the reference, or this share of them. `whole` holds x and the weights by name, y, and gradients led
    by d."""
    heads = range(H)

    def loss(W: dict[str, np.ndarray], name: str, index: tuple[int, ...] | None) -> complex:
        return np.sum(dy * reference.attention(W, asked, **reference.reached(W, asked, name, index)))

    def most(name: str) -> int:
        """As many entries as the budget allows, by the rows of scores that moving one of them changes."""
        moved = reference.reached(whole, asked, name, (0,) * whole[name].ndim)
        weights = sum(a.size for n, a in whole.items() if n[0] == "W") / H
        seconds = [HEAD + ROW * n + SCORE * n * n + weights * (READ + PRODUCT * n) for n in asked.lengths]
        each = max(seconds) if "sequences" in moved else sum(seconds)
        return int(BUDGET / (each * len(moved.get("heads", heads))))

    yield from layer.compared([lambda W, h=h: reference.attention(W, asked, [h]) for h in heads], loss, whole, dy, most, share)


def cache(args: argparse.Namespace, sizes: Sizes, ranks: int) -> list[dict]:
    """What each kind of attention would keep of a token in a KV cache: elements, in all layers and on the fullest rank."""
    H, E, L = args.heads, sizes.d_head, args.layers
    grouped = sizes.kv_heads if args.kind == "gqa" else _largest_group(H)
    latent, rotated = sizes.d_latent or 4 * E, sizes.d_rope or max(2, E // 4 * 2)
    held = lambda kv_heads: max(covering(even(H, ranks), H // kv_heads).sizes)  # noqa: E731
    rows = [(kind, f"2 {n} E L", 2 * kv * E * L, 2 * held(kv) * E * L) for kind, n, kv in
            (("mha", "H", H), ("gqa", "K", grouped), ("mqa", "1", 1))]  # fmt: skip
    rows.append(("mla", "(C + R) L", (latent + rotated) * L, (latent + rotated) * L))
    size = np.dtype(args.dtype).itemsize
    return [
        {"kind": kind, "formula": formula, "elements": n, "elements_per_rank": here, "bytes": n * size}
        for kind, formula, n, here in rows
    ]


def main(args: argparse.Namespace, comm: MPI.Intracomm, sizes: Sizes) -> int:
    control = Control(comm)
    mesh = start.make_mesh(args, comm, tp=comm.size)
    attention = build(args, sizes, mesh.tp)
    x, dy = inputs(sizes.tokens, args.d_model, args.dtype, args.seed)
    rows = cut_rows(sizes.tokens, comm.size) if args.sequence_parallel else None
    batch = Batch.of(sizes.lengths, rope(args, sizes), args.dtype, rows)
    measured = step.run(attention, x, dy, mesh, control, batch, rows=rows)
    first, checks = comm.rank == 0, []
    if first:
        shown = progress.items("the reference, tensor by tensor", True, 1 + 2 * (1 + len(attention.parameters)))
        asked = reference_options(args, sizes.lengths)
        checks = list(shown(compared(asked, args.heads, measured.whole | {"x": x}, dy)))
    control.wait(patient=True)
    parts = tuple(own(a, rows, comm.rank) for a in (x, dy))
    again = partial(step.phases, attention, *parts, mesh, batch)
    explained = view.explained(args, control, mesh, attention.parameters, again)
    alone = Mesh(MPI.COMM_SELF, tp=1) if first else None
    limit = (products.latent_attention if args.kind == "mla" else products.attention)(attention, x, sizes.lengths)
    single = lambda: step.of(build(args, sizes, alone.tp), alone, x, dy, replace(batch, rows=None))  # noqa: E731
    seconds = step.seconds(step.of(attention, mesh, *parts, batch), limit, single, comm)
    if not first:
        return 0
    scaling = args.rope_scaling and {"kind": type(args.rope_scaling).__name__.lower(), **asdict(args.rope_scaling)}
    settled = vars(args) | sizes._asdict() | {"rope_scaling": scaling}
    result = report.header("tp_attention", args, mesh) | {
        "config": {k: v for k, v in settled.items() if k not in ("json", "dtype", "seed", "trace", "sequences", *view.OPTIONS)},
        "checks": [c.as_json() for c in checks],
        "communication": measured.communication,
        "memory": measured.memory,
        "kv_cache_per_token": cache(args, sizes, comm.size),
        "seconds": seconds,
        **({"explain": explained} if explained else {}),
    }
    wrong = [*report.wrong(checks, result), *measured.apart]
    shown = lambda: view.show(explained, lambda: show(result, checks))  # noqa: E731
    return report.publish(args.json, result, shown, wrong, checks=checks, unwritten=view.draw(args, explained))


def show(result: dict, checks: list[Comparison]) -> None:
    """The report for people."""
    ranks, c = result["ranks"], result["config"]
    cut = even(c["heads"], ranks)
    kv = covering(cut, c["heads"] // c["kv_heads"])
    dealt, read = (", ".join(f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in heads.bounds) for heads in (cut, kv))
    mla = c["kind"] == "mla"
    widths = f"C {c['d_latent']}, R {c['d_rope']}" if mla else f"K {c['kv_heads']} kv_heads, E {c['d_head']}"
    lengths = ", ".join(map(str, c["lengths"][:8])) + (", ..." if len(c["lengths"]) > 8 else "")
    report.say(
        f"Tensor-parallel attention ({c['kind']}) on tp={ranks}: T {counted(c['tokens'], 'token')} in sequences of {lengths}; "
        f"D {c['d_model']}, H {counted(c['heads'], 'head')}, {widths}; rope {c['rope']}, "
        f"{'bidirectional' if c['bidirectional'] else 'causal'}, {result['dtype']}, seed {result['seed']}",
        f"Heads by rank: {dealt}" + ("" if mla else f"; key/value heads: {read}"),
        "",
    )
    report.comparisons("Sharded result against the reference: a grid of entries, and along a direction through all", checks)
    report.communication(result["communication"])
    report.memory(result["memory"])
    report.table(
        "KV cache a token, by kind of attention",
        ("kind", "elements", "", "bytes", "elements on the fullest rank"),
        [(r["kind"], r["formula"], f"{r['elements']:,}", f"{r['bytes']:,}", f"{r['elements_per_rank']:,}") for r in
         result["kv_cache_per_token"]],
    )  # fmt: skip
    report.seconds(result["seconds"], step.REPEATS, ranks)


if __name__ == "__main__":
    start.run(options(), check, main)
