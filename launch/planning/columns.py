"""The words in which a layout is asked for: the columns of a table, and options of the command by the same names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from launch.options import MOST
from parallel.schedules import SCHEDULES
from plan.strategy import ATTENTION, DTYPES, GRAD_DTYPES

FAMILIES = ("gpt2", "llama", "deepseek")


class Column(NamedTuple):
    """`read`: text -> value; raises ValueError with what would be right. `help`: of the option."""

    read: Callable[[str], object]
    help: str
    metavar: str | None = None


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        # Tables that other programs wrote may have 8.0.
        plain = text.removesuffix(".0")
        if not plain.isdecimal() or not least <= int(plain) <= MOST:
            raise ValueError(f"use a whole number from {least} to {MOST}")
        return int(plain)

    return read


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError("use a number of 0 or more")
    return value


def _above_zero(text: str) -> float:
    try:
        value = _amount(text)
    except ValueError:
        value = 0.0
    if value == 0:
        raise ValueError("use a number above 0")
    return value


def _one_of(*values: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in values:
            raise ValueError(f"use one of {', '.join(values)}")
        return text

    return read


def switch(text: str) -> bool:
    switches = {"0": False, "1": True, "off": False, "on": True, "false": False, "true": True}
    # Tables that other programs wrote may have 1.0.
    if (said := text.lower().removesuffix(".0")) not in switches:
        raise ValueError("use 0 or 1, off or on")
    return switches[said]


def _zero(text: str) -> int:
    if text.removesuffix(".0") not in ("0", "1", "2", "3"):
        raise ValueError("use one of 0, 1, 2, 3")
    return int(text[0])


def _recompute(text: str) -> str:
    if text not in ("none", "selective", "full", "half") and not re.fullmatch(r"every:[1-9]\d{0,5}", text, re.ASCII):
        raise ValueError("use one of none, selective, full, half, every:N")
    return text


def stage_layers(text: str) -> tuple[int, ...]:
    """7*11 1: eleven of 7, then 1; between them blanks or commas."""
    found: list[int] = []
    for word in text.replace(",", " ").split():
        blocks, _, times = word.partition("*")
        if not blocks.isdecimal() or not (times or "1").isdecimal() or int(times or 1) * int(blocks or 0) > MOST:
            raise ValueError("use the blocks of each stage, as in 3,3,2,0 or 7*11 1")
        if len(found) + int(times or 1) > 100_000:
            raise ValueError("use at most 100,000 stages")
        found += [int(blocks)] * int(times or 1)
    if not sum(found):
        raise ValueError("use the blocks of each stage, as in 3,3,2,0 or 7*11 1")
    return tuple(found)


_positive, _natural = _whole(1), _whole(0)
MODEL = {
    "family": Column(_one_of(*FAMILIES), "what it is like, where no --model is given", f"{{{','.join(FAMILIES)}}}"),
    "layers": Column(_positive, "blocks"),
    "d_model": Column(_positive, "D", "N"),
    "heads": Column(_positive, "query heads", "N"),
    "kv_heads": Column(_positive, "key/value heads (default: all of them)", "N"),
    "d_head": Column(_positive, "width of a head (default: D / heads)", "N"),
    "d_ff": Column(_positive, "hidden width of the MLPs (default: 4 D for gpt2, 8/3 D, rounded up to 256, where gated)", "N"),
    "vocabulary": Column(_positive, "V", "N"),
    "tied": Column(switch, "one table for embedding and output"),
    "experts": Column(_natural, "routed MLPs in a block", "N"),
    "experts_active": Column(_positive, "experts that serve a token (default: 2)", "N"),
    "d_expert": Column(_positive, "hidden width of an expert (default: that of the MLPs)", "N"),
    "d_shared": Column(_natural, "hidden width of the expert that serves all tokens", "N"),
    "dense_layers": Column(_natural, "first blocks that have no experts", "N"),
    "d_latent": Column(_positive, "of latent attention: width of keys' and values' latent", "N"),
    "d_query_latent": Column(_natural, "of queries' latent, 0 for none", "N"),
    "d_nope": Column(_positive, "of a head's part that is not rotated", "N"),
    "d_rope": Column(_positive, "of a head's rotated part", "N"),
    "d_value": Column(_positive, "of a head's values", "N"),
}
BATCH = {
    "sequence_length": Column(_positive, "S, tokens of a sequence (default: the context of --model)", "N"),
    "batch": Column(_positive, "sequences of a step, over all ranks", "N"),
    "micro_batch": Column(_positive, "sequences of a micro-batch (default: 1)", "N"),
}
MACHINE = {
    "node_gbs": Column(_above_zero, "GB/s of a node and direction, between nodes", "X"),
    "gpus_per_node": Column(_positive, "GPUs of a node", "N"),
    "memory_gib": Column(_above_zero, "GiB of a GPU", "X"),
}
AXES = {name: Column(_positive, f"ranks of {name}", "N") for name in ("dp", "pp", "cp", "tp", "ep")}
LAYOUT = {
    "schedule": Column(_one_of(*SCHEDULES), "order of the stages' work along pp (default: 1f1b)", f"{{{','.join(SCHEDULES)}}}"),
    "chunks": Column(_positive, "stages of a rank (default: the schedule's)", "V"),
    "stage_layers": Column(stage_layers, "blocks by stage"),
    "recompute": Column(_recompute, "none, selective, full, half or every:N (default: none)", "KIND"),
    "sequence_parallel": Column(switch, "cut the tokens over tp between the products"),
    "zero": Column(_zero, "ZeRO's stage (default: 0)", "{0,1,2,3}"),
    "zero_over": Column(_natural, "ranks that shard between them (default: all data ranks)", "N"),
    "attention": Column(
        _one_of(*ATTENTION), "its kernel (default: the best that the machine has)", f"{{{','.join(ATTENTION)}}}"
    ),
    "fused": Column(switch, "norms, activations and sums of gradients as single kernels (default: 1)", "{0,1}"),
    "overlap": Column(switch, "sum gradients while backward goes on (default: on)", "{on,off}"),
    "tp_overlap": Column(switch, "hide half of tp's verbs (default: off)", "{on,off}"),
    "p2p": Column(_one_of("blocking", "delay"), "what a message between stages does to both ranks", "{blocking,delay}"),
    "scatter_gather": Column(switch, "each rank of tp sends its part of a message (default: 1)", "{0,1}"),
    "dtype": Column(_one_of(*DTYPES), "of weights and activations (default: bf16)", f"{{{','.join(DTYPES)}}}"),
    "grad_dtype": Column(_one_of(*GRAD_DTYPES), "of gradients (default: fp32)", f"{{{','.join(GRAD_DTYPES)}}}"),
    "jitter": Column(_amount, "spread of a rank's time, as a share (default: 0)", "X"),
}
WHICH = {"machine": Column(str, "NAME, FILE.toml or here"), "model": Column(str, "FILE or a known name")}
# All that a table's header may say; other columns are copied.
COLUMNS = WHICH | MACHINE | MODEL | BATCH | AXES | LAYOUT


def read(name: str, text: str) -> object:
    """Raises ValueError that names the column and the value."""
    try:
        return COLUMNS[name].read(text.strip())
    except ValueError as error:
        raise ValueError(f"{name} {text!r}: {error}") from None
