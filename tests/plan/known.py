"""Layouts and rows that several tests of plan/ share."""

import csv
import random
from dataclasses import replace
from pathlib import Path

from launch.planning import question, table
from models.config import Experts, gpt2_like, llama_like
from parallel.schedules import SCHEDULES
from plan.machine import read
from plan.step import Planner
from plan.strategy import Strategy
from plan.theirs import Theirs

DATA = Path(__file__).parent / "data"
GIB = 2**30
# (layers, width, heads, pp, chunks, micro-batch) of the models of 2205.05198.
MEGATRON = {"22B": (48, 6144, 64, 1, 1, 4), "175B": (96, 12288, 96, 8, 3, 1), "530B": (105, 20480, 128, 35, 3, 1),
            "1T": (128, 25600, 160, 64, 1, 1)}  # fmt: skip


def rows(name):
    with open(DATA / f"{name}.csv") as file:
        return list(csv.DictReader(file))


def megatron(name, sequence_parallel=False, recompute="none", **more):
    layers, width, heads, pp, chunks, micro = MEGATRON[name]
    c = gpt2_like(51200, width, layers, heads, 4 * width, 2048)
    options = {"pp": pp, "tp": 8, "schedule": "interleaved" if chunks > 1 else "1f1b", "chunks": chunks, "attention": "unfused"}
    options |= {"dtype": "fp16", "grad_dtype": "fp16", "overlap": False, "batch": 4 * pp * micro, "micro_batch": micro}
    return Strategy(c, 2048, sequence_parallel=sequence_parallel, recompute=recompute, **{**options, **more})


def planner(machine="a100-80gb", **more):
    return Planner(Theirs(), read(machine), **more)


def predicted(name):
    """The rows of a measured table, predicted as the command does."""
    planners = {}

    def planner_of(values):
        key = values["machine"], values.get("node_gbs")
        return planners.setdefault(key, Planner(Theirs(), question.machine_of(values)))

    return table.predict(table.read(DATA / f"{name}.csv"), {}, planner_of)


MODELS = {
    "gpt2": gpt2_like(8192, 512, 6, 8, 2048, 256),
    "llama": llama_like(12800, 768, 12, 12, 4, 2048, 512),
    "routed": replace(llama_like(4096, 256, 4, 8, 8, 512, 256), experts=Experts(6, 2, 384, 128, 1)),
}


def some_layouts(n, seed=0):
    """So many layouts that can be, of all kinds, drawn at random."""
    draw, found = random.Random(seed), []
    while len(found) < n:
        c = MODELS[draw.choice(list(MODELS))]
        size = lambda *of: draw.choice(of)  # noqa: E731
        options = {
            "pp": size(1, 2, 3, 4), "dp": size(1, 2, 4), "ep": size(1, 1, 2), "cp": size(1, 1, 2), "tp": size(1, 2, 4, 8),
            "micro_batch": size(1, 2, 4), "schedule": size(*SCHEDULES),
            "recompute": size("none", "selective", "full", "half", "every:2"), "sequence_parallel": size(False, True),
            "zero": size(0, 1, 2, 3), "attention": size("unfused", "flash2"), "fused": size(False, True),
            "overlap": size(False, True), "tp_overlap": size(False, True), "p2p": size(None, "blocking", "delay"),
            "scatter_gather": size(False, True), "grad_dtype": size("fp32", "bf16"),
        }  # fmt: skip
        options["chunks"] = {"interleaved": 2, "zb-v": 2, "dualpipe-v": 2}.get(options["schedule"], 1)
        m = size(1, 2, 3, 4, 7, 8, 12)
        batch = m * options["micro_batch"] * options["dp"] * options["ep"]
        try:
            found.append(Strategy(c, 256, batch, **options))
        except ValueError:
            continue
    return found
