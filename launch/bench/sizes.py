"""The sizes at which a subject of `launch.bench` is measured."""

from __future__ import annotations

import argparse
from typing import NamedTuple

# Where a subject means other sizes than the parser's own.
DEFAULTS = {
    "mlp": {"tokens": 2048, "d_model": 1024, "d_ff": 4096, "rounds": 11},
    "attention": {"tokens": 2048, "d_model": 1024, "heads": 16, "rounds": 11},
    "context": {"tokens": 8192, "d_model": 256, "heads": 4, "rounds": 7},
    "train": {"tokens": 4096, "d_model": 512, "d_ff": 2048, "heads": 8, "rounds": 5},
    "decode": {"tokens": 64, "rounds": 7},
    "speculate": {"tokens": 128, "rounds": 5},
    "serving": {"tokens": 32, "rounds": 3},
    "trace": {"tokens": 1024, "d_model": 512, "d_ff": 2048, "heads": 8, "rounds": 15},
    "plan": {"tokens": 2048, "d_model": 256, "heads": 8, "rounds": 5},
}


class Sizes(NamedTuple):
    """As given or by default; None where the subject has no such size."""

    tokens: int
    rounds: int
    layers: int
    sequence_length: int
    d_model: int | None
    d_ff: int | None
    heads: int | None
    kv_heads: int | None


def settled(args: argparse.Namespace) -> Sizes:
    given = {name: getattr(args, name) for name in Sizes._fields if getattr(args, name) is not None}
    sizes = dict.fromkeys(Sizes._fields) | DEFAULTS[args.what] | given
    return Sizes(**sizes | {"kv_heads": sizes["kv_heads"] or sizes["heads"]})
