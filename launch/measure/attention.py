"""Attention of every kind as commands ask for it: the options of its sizes, the layer by them, and the reference's answer.

T tokens   D model width   H heads   K key/value heads   E head width   C latent width   R rotated width, beside a latent
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from functools import partial
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from launch import report
from launch.explain import view
from launch.measure import products, step
from launch.options import UsageError, only_with, positive
from launch.terminal import progress
from launch.terminal.lines import counted
from layers.attention import Attention
from layers.batch import Batch
from layers.context import Local
from layers.latent_attention import LatentAttention
from layers.pieces import LAYOUTS
from layers.rope import Linear, Llama3, Rope, Scaling, Yarn
from parallel.axis import Axis
from parallel.control import Control
from parallel.mesh import Mesh
from parallel.parameter import Weights, drawn
from reference import attention as reference
from reference import layer
from reference.compare import Comparison

Layer = Attention | LatentAttention

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


def add_options(p: argparse.ArgumentParser, option: str) -> None:
    """`option`: which names the kind of attention."""
    p.add_argument(
        option, dest="attention", choices=KINDS, default="gqa", help="multi-head, grouped-query, multi-query or latent"
    )
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
    p.add_argument("--heads", type=positive, default=8, help="H, query heads, dealt out over tp, evenly or not")
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
    p.add_argument("--sequence-parallel", action="store_true", help="cut the tokens over tp outside the layer")
    p.add_argument(
        "--no-bias", action="store_true", help="leave the biases of queries, keys, values and output out (mla has none)"
    )
    p.add_argument("--qk-norm", action="store_true", help="RMS norm of each head's queries and keys, as Qwen3 (not mla)")
    mla = p.add_argument_group(f"sizes of {option} mla")
    mla.add_argument("--d-latent", type=positive, help="C, width of the latent (default: 4E)")
    mla.add_argument("--d-query-latent", type=positive, help="width of the queries' latent (default: they have none)")
    mla.add_argument("--d-nope", type=positive, help="width of a head's queries and keys without position (default: E)")
    mla.add_argument(
        "--d-rope", type=positive, help="R, width of the rotated key that all heads share (default: the even of E/2)"
    )
    mla.add_argument("--d-value", type=positive, help="width of a head's values (default: E)")
    only_with(p, "--d-latent", "--d-query-latent", "--d-nope", "--d-rope", "--d-value", attention=("mla",))
    only_with(p, "--no-bias", "--qk-norm", attention=("mha", "gqa", "mqa"))
    only_with(p, "--rope-base", "--rope-scaling", rope=("half", "interleaved"))


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


def check(args: argparse.Namespace, option: str) -> Sizes:
    """Raises UsageError for sizes that do not fit together."""
    H, D = args.heads, args.d_model
    if args.d_head is None and D % H:
        raise UsageError(f"--heads {H} does not divide --d-model {D}: use a divisor of {D}, or give --d-head")
    E = args.d_head or D // H
    grouped = args.kv_heads or largest_group(H)
    K = {"mha": H, "mqa": 1, "mla": H}.get(args.attention, grouped)
    if args.kv_heads not in (None, K):
        raise UsageError(f"{option} {args.attention} has {K} kv-heads, not {args.kv_heads}: use {option} gqa, or no --kv-heads")
    if H % K:
        raise UsageError(f"--kv-heads {K} does not divide --heads {H}: use a divisor of {H}")
    latent = [args.d_latent, args.d_nope, args.d_rope, args.d_value]
    if args.attention == "mla":
        latent = [given or width for given, width in zip(latent, (4 * E, E, max(2, E // 4 * 2), E), strict=True)]
        if latent[2] % 2:
            raise UsageError(f"--d-rope {latent[2]} cannot be rotated in pairs: use an even width")
    elif args.rope != "none" and E % 2:
        raise UsageError(f"--rope {args.rope} cannot rotate heads of odd width {E} in pairs: use an even width, or --rope none")
    if args.rope_base <= 1:
        raise UsageError(f"--rope-base {args.rope_base:g} is no base: use a number above 1, such as 10000")
    lengths = _lengths([n for part in args.sequences for n in part], args.tokens)
    return Sizes(sum(lengths), lengths, K, E, *latent)


def largest_group(heads: int) -> int:
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
    width = sizes.d_rope if args.attention == "mla" else sizes.d_head
    return None if args.rope == "none" else Rope(width, args.rope_base, args.rope, args.rope_scaling)


def build(
    args: argparse.Namespace, sizes: Sizes, tp: Axis, context: Local | None = None, weights: Weights | None = None
) -> Layer:
    """`weights`: drawn by the seed, unless given."""
    weights = weights or drawn(args.seed, args.dtype, SPREAD)
    more = {"causal": not args.bidirectional, "cuts_rows": args.sequence_parallel, "context": context}
    rotated = rope(args, sizes)
    correction = rotated.softmax_factor if rotated else 1.0
    if args.attention == "mla":
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


class Ran(NamedTuple):
    """A step, judged and timed: what the command tells of it, as JSON has it; and what its report needs beside that."""

    told: dict
    checks: list[Comparison]
    wrong: list[str]
    explained: dict | None


def batch(args: argparse.Namespace, sizes: Sizes, mesh: Mesh, layout: str = "zigzag") -> Batch:
    """The sequences, cut over cp by the layout, and inside of that over tp where the options say so."""
    every, cut_over = LAYOUTS[layout](sizes.lengths, mesh.cp.size), mesh.tp.size if args.sequence_parallel else None
    return Batch.of(sizes.lengths, rope(args, sizes), args.dtype, cut_over, every=every, rank=mesh.cp.rank)


def run(args: argparse.Namespace, comm: MPI.Intracomm, sizes: Sizes, mesh: Mesh, layer: Layer, batch: Batch) -> Ran | None:
    """One step of the layer beside the reference, explained where that is asked for, and timed. All ranks call it; rank 0
    gets what it is."""
    control, first, checks = Control(comm), comm.rank == 0, []
    x, dy = inputs(sizes.tokens, args.d_model, args.dtype, args.seed)
    measured = step.run(layer, x, dy, mesh, control, batch)
    if first:
        shown = progress.items("the reference, tensor by tensor", True, 1 + 2 * (1 + len(layer.parameters)))
        asked = reference_options(args, sizes.lengths)
        checks = list(shown(compared(asked, args.heads, measured.whole | {"x": x}, dy)))
    control.wait(patient=True)
    parts = tuple(step.part(a, mesh, batch) for a in (x, dy))
    explained = view.explained(args, control, mesh, layer.parameters, partial(step.phases, layer, *parts, mesh, batch))
    alone = Mesh(MPI.COMM_SELF, tp=1) if first else None
    limit = products.of(layer.work(batch), args.dtype)
    whole = Batch.of(sizes.lengths, rope(args, sizes), args.dtype)
    single = lambda: step.of(build(args, sizes, alone.tp), alone, x, dy, whole)  # noqa: E731
    seconds = step.seconds(step.of(layer, mesh, *parts, batch), limit, single, comm)
    if not first:
        return None
    scaling = args.rope_scaling and {"kind": type(args.rope_scaling).__name__.lower(), **asdict(args.rope_scaling)}
    settled = vars(args) | sizes._asdict() | {"rope_scaling": scaling}
    told = {
        "config": {k: v for k, v in settled.items() if k not in ("json", "dtype", "seed", "trace", "sequences", *view.OPTIONS)},
        "checks": [c.as_json() for c in checks],
        "communication": measured.communication,
        "memory": measured.memory,
        "seconds": seconds,
        **({"explain": explained} if explained else {}),
    }
    return Ran(told, checks, measured.wrong, explained)


def published(args: argparse.Namespace, result: dict, ran: Ran, show: Callable[[], None]) -> int:
    """Print the JSON, or what `show` prints where no view is asked for, and return the exit status."""
    shown = lambda: view.show(ran.explained, show)  # noqa: E731
    wrong = [*report.wrong(ran.checks, result), *ran.wrong]
    return report.publish(args.json, result, shown, wrong, checks=ran.checks, unwritten=view.draw(args, ran.explained))


def said(result: dict, kind: str) -> str:
    """The sizes, in words. `kind`: of attention."""
    c = result["config"]
    widths = f"C {c['d_latent']}, R {c['d_rope']}" if kind == "mla" else f"K {c['kv_heads']} kv_heads, E {c['d_head']}"
    lengths = ", ".join(map(str, c["lengths"][:8])) + (", ..." if len(c["lengths"]) > 8 else "")
    return (
        f"T {counted(c['tokens'], 'token')} in sequences of {lengths}; D {c['d_model']}, H {counted(c['heads'], 'head')}, "
        f"{widths}; rope {c['rope']}, {'bidirectional' if c['bidirectional'] else 'causal'}, {result['dtype']}, "
        f"seed {result['seed']}"
    )


def show(result: dict, checks: list[Comparison]) -> None:
    """The tables of what was compared, sent and held."""
    report.comparisons("Sharded result against the reference: a grid of entries, and along a direction through all", checks)
    report.communication(result["communication"])
    report.memory(result["memory"])
