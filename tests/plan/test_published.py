"""What papers print of memory, sizes and operations, to the printed digit. Nothing here can be tuned."""

from dataclasses import replace
from math import prod

import pytest

from models.config import gpt2_like, llama_like
from models.published import PUBLISHED
from plan import collectives
from plan.collectives import Group
from plan.memory import by_kind, bytes_a_parameter, saved_of_block
from plan.sizes import sizes
from plan.strategy import Strategy
from plan.theirs import Theirs
from tests.plan.known import GIB, MEGATRON, megatron, planner, rows

KINDS = [(False, "none"), (True, "none"), (False, "selective"), (True, "selective"), (False, "full")]
# GiB saved on the first stage; of the 530B two are printed.
SAVED = {
    "22B": (59.25, 39.5625, 29.25, 9.5625, 4.5),
    "175B": (66.84375, 41.4140625, 37.78125, 12.3515625, 5.8125),
    "530B": (114.0234375, None, None, 23.076171875, None),
    "1T": (131.25, 76.5625, 81.25, 26.5625, 12.5),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_activations_of_megatron(name):
    """2205.05198, table 2 and figure 7; interleaving keeps 1 + (p-1)/(pv) of a stage."""
    for (cut, recompute), want in zip(KINDS, SAVED[name], strict=True):
        if want is not None:
            assert by_kind(megatron(name, cut, recompute), 0)["saved"] / GIB == want


def test_saved_bytes_of_a_block_by_each_formula_of_the_paper():
    printed = {r["technique"]: r["bytes_per_layer_formula"] for r in rows("korthikanti2022_activation_formulas")}
    given = {
        "no parallelism": (1, False, "none"),
        "tensor parallel (baseline)": (8, False, "none"),
        "tensor + sequence parallel": (8, True, "none"),
        "tensor parallel + selective recompute": (8, False, "selective"),
        "tensor + sequence + selective recompute": (8, True, "selective"),
        "full recompute": (8, False, "full"),
    }
    assert given.keys() == printed.keys()
    for technique, (t, cut, recompute) in given.items():
        s = megatron("22B", cut, recompute, tp=t)
        names = {"s": 2048, "b": 4, "h": 6144, "a": 64, "t": t}
        assert saved_of_block(s, again=recompute == "full") == pytest.approx(eval(printed[technique], names), rel=1e-15)


def test_weights_of_megatron_take_18_bytes():
    for name, want in zip(MEGATRON, (45.5625, 45.5625, 31.640625, 32.958984375), strict=True):
        s = megatron(name, grad_dtype="fp32")
        layers, width, *_ = MEGATRON[name]
        assert sizes(s.config).dense.active == 12 * width**2
        each = sizes(s.config).dense.active * layers / (s.tp * s.pp)
        assert sum(bytes_a_parameter(s)) * each / GIB == want


@pytest.mark.parametrize("row", rows("zero2019_table1"), ids=lambda r: f"{r['params_B']}B/{r['dp_degree']}/{r['stage']}")
def test_memory_of_zero(row):
    """1910.02054, table 1; GB are 1e9."""
    n, zero = int(row["dp_degree"]), row["stage"].count("+") + 1
    c = gpt2_like(512, 64, 1, 1, 256, 64)
    s = Strategy(c, 64, n, dp=n, zero=zero, dtype="fp16", grad_dtype="fp16")
    found, digits = sum(bytes_a_parameter(s)) * float(row["params_B"]), len(row["GB_per_device"].partition(".")[2])
    # Whole numbers are cut off there, others rounded.
    assert (round(found + 1e-9, digits) if digits else int(found)) == float(row["GB_per_device"])


@pytest.mark.parametrize(("zero", "volume"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_volume_of_zero(zero, volume):
    """Wire bytes of a step in units of the weights, on very many ranks: 2P, 2P, 2P, 3P."""
    c = gpt2_like(1024, 128, 2, 2, 512, 64)
    s = Strategy(c, 64, 4, dp=4, zero=zero, grad_dtype="bf16")
    theirs = Theirs()
    once, parts = theirs.once(s, 0, {}), theirs.parts(s, {})[0]
    sent = [(t, 1) for t in (*once.sums, *once.gathers)] + [(t, n) for part, n in parts for t in part.transfers]
    by = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
    total = sum(n * by[t.verb] * t.calls * t.message_bytes for t, n in sent)
    size = sizes(c)
    # The learned positions and the last norm are no part of a unit.
    whole = 2 * (size.parameters if zero < 2 else size.parameters - size.positions.weights - size.norm.weights)
    embedding_once = 2 * size.table.weights if zero == 3 else 0
    if zero == 2:
        whole_of_gathers = 2 * size.parameters
        assert total == pytest.approx(whole + whole_of_gathers)
    else:
        assert total == pytest.approx(volume * whole - embedding_once)


def test_memory_of_llama_by_megatrons_own_estimate():
    c = llama_like(128256, 4096, 32, 32, 8, 14336, 8192)
    for row in rows("megatron_memory_of_llama31_8b"):
        tp, cp, pp, dp, b = (int(row[k]) for k in ("tp", "cp", "pp", "dp", "mbs"))
        s = Strategy(c, 8192, 2 * b * dp, b, tp=tp, cp=cp, pp=pp, dp=dp, zero=1)
        kinds = by_kind(s, 0)
        found = (kinds["weights"] + kinds["gradients"] + kinds["optimizer"]) / GIB
        assert found == float(row["weight_optimizer_GiB"])


@pytest.mark.parametrize("row", rows("megatron_memory_of_llama31_8b"), ids=lambda r: "{tp}-{cp}-{pp}-{mbs}".format(**r))
def test_activations_of_llama_by_megatrons_own_estimate(row):
    """41 bytes an entry of a block are ours, where SwiGLU is no single kernel: 8 of two norms and what two products read, 5 of
    heads and attention, 28 of the hidden entries. Two terms are the estimate's own. It takes the ids that the embedding reads
    for 8 bytes in each of D columns (the quarter of the notes' 41.25 where a stage has 32 blocks), once for each of pp
    micro-batches in flight. And beside the head it counts the logits in float32 and 4 bytes of what the head reads."""
    c = llama_like(128256, 4096, 32, 32, 8, 14336, 8192)
    tp, cp, pp, dp, b = (int(row[k]) for k in ("tp", "cp", "pp", "dp", "mbs"))
    s = Strategy(c, 8192, pp * b * dp, b, tp=tp, cp=cp, pp=pp, dp=dp, zero=1, sequence_parallel=tp > 1, fused=False)
    entries = s.tokens * c.d_model / tp
    assert saved_of_block(s) == 41 * entries
    saved, ids = by_kind(s, 0)["saved"], 8 * entries * pp
    head = 4 * entries * (1 + c.vocabulary / c.d_model) if pp == 1 else 0
    assert (saved + ids + head) / GIB == float(row["activation_GiB"])
    # Fused, as everywhere else, it is 34.
    assert saved_of_block(replace(s, fused=True)) == 34 * entries


def test_ring_attention_hides_a_hop_from_a_block_on():
    """2310.01889, table 2, in thousands of tokens; of InfiniBand it prints 24.5 for 24.96, and 149.5 for six of these."""
    for row in rows("ring_attention2023_table2"):
        m = planner().machine
        own = m.__class__(**{**vars(m), "peaks": {"bf16": 1e12 * float(row["tflops"])}})
        own = own.__class__(**{**vars(own), "inside": own.inside.__class__(
            **{**vars(own.inside), "p2p_gbs": float(row["interconnect_GBps"])})})  # fmt: skip
        block = collectives.least_block(own, "bf16")
        if row["spec"] == "A100 InfiniBand":
            assert block == 24960
        else:
            assert round(block / 1e3, 1) == float(row["min_block_x1e3"])
            assert round(6 * block / 1e3, 1) == float(row["min_seq_x1e3"])


def narayanan(row):
    l, h, a, V, S = (int(row[k]) for k in ("layers", "hidden", "heads", "vocab", "seq_len"))  # noqa: E741
    return l, h, V, S, gpt2_like(V, h, l, a, 4 * h, S)


@pytest.mark.parametrize("row", rows("narayanan2021_table1"), ids=lambda r: r["params_B"])
def test_parameters_and_operations_of_narayanan(row):
    l, h, V, S, c = narayanan(row)  # noqa: E741
    # Its equation 2 has no last norm.
    P = sizes(c).parameters - 2 * h
    assert 12 * l * h * h + 13 * l * h + (V + S) * h == P
    assert round(P / 1e9, 1) == float(row["params_B"])
    B, gpus = int(row["global_batch"]), int(row["gpus"])
    s = Strategy(c, S, B, recompute="full", attention="unfused")
    hardware = Theirs().model(s, causal=False).hardware_flops
    assert hardware == pytest.approx(96 * B * S * l * h * h * (1 + S / (6 * h) + V / (16 * l * h)), rel=1e-12)
    achieved = float(row["achieved_tflops_per_gpu"])
    assert hardware / (gpus * achieved * 1e12) == pytest.approx(float(row["iter_s_derived_from_eq3"]), abs=6e-3)
    # The aggregate is of the rate before it was rounded.
    assert abs(gpus * achieved / 1e3 - float(row["agg_pflops"])) <= gpus * 0.5 / 1e3 + 0.05


@pytest.mark.parametrize("row", rows("korthikanti2022_table5"), ids=lambda r: r["model"])
def test_mfu_of_korthikanti(row):
    l, h, a, V, S, B = (int(row[k]) for k in ("layers", "hidden", "heads", "vocab", "seq_len", "global_batch"))  # noqa: E741
    s = Strategy(gpt2_like(V, h, l, a, 4 * h, S), S, B, recompute="selective", attention="unfused")
    facts = Theirs().model(s, causal=False)
    assert facts.model_flops == pytest.approx(72 * B * S * l * h * h * (1 + S / (6 * h) + V / (12 * h * l)), rel=1e-12)
    # Of selective recomputation it counts S/3h where a forward of attention more, on 3 of S/6h, is 4/18.
    assert facts.hardware_flops == pytest.approx(72 * B * S * l * h * h * (1 + 4 * S / (18 * h) + V / (12 * h * l)), rel=1e-12)
    mfu = facts.model_flops / (int(row["gpus"]) * 312e12 * float(row["iter_s_present_work"]))
    assert f"{100 * mfu:.2f}" == row["mfu_check_pct_from_eq7"]


def test_sizes_of_known_models():
    from launch.planning.question import KNOWN

    parameters = {name: round(sizes(c).parameters / 1e9, 2) for name, c in KNOWN.items()}
    assert parameters["llama3-405b"] == 405.85
    assert parameters["deepseek-v3"] == 671.03
    assert parameters["gpt3-175b"] == 174.62
    assert parameters["mixtral-8x7b"] == 46.70
    assert sizes(KNOWN["deepseek-v3"]).met == pytest.approx(37.55e9, rel=1e-3)
    # Only one of each kind of block is built.
    from models.build import build
    from plan.dry import DryAxis, dry_weights

    for c in (PUBLISHED["Llama-3-8B"], PUBLISHED["GPT-2 124M"]):
        whole = build(c, DryAxis("tp", 1), dry_weights("float16"))
        assert sizes(c).parameters == sum(prod(p.layout.shape) for p in whole.parameters)


def test_rings_cost_what_the_formulas_say():
    """Beyond what it takes to start: 2 (p-1)/p n b of an all-reduce, half of it of the others."""
    m = planner().machine
    for p in (2, 4, 8):
        g, b = Group(p, p, 1), (p + 0.4) / (228e9 * p)
        for verb, passes in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1), ("all_to_all", 1)):
            took = collectives.seconds(verb, 2e9, g, m) - collectives.seconds(verb, 1e9, g, m)
            assert took == pytest.approx(passes * (p - 1) / p * 1e9 * b, rel=1e-9)
    # The NICs of the group's own GPUs limit it over nodes.
    groups = [Group(4 * q, q, 4) for q in (1, 2, 4)]
    two = [collectives.seconds("all_reduce", 2e9, g, m) - collectives.seconds("all_reduce", 1e9, g, m) for g in groups]
    share = [2 * (4 * q - 1) / (4 * q) for q in (1, 2, 4)]
    assert two[0] / share[0] == pytest.approx(2 * two[1] / share[1]) == pytest.approx(4 * two[2] / share[2])


def test_all_reduce_on_one_node_beside_its_measurements():
    m = planner().machine
    errors = []
    for row in rows("nccl_all_reduce_a100"):
        p, n = int(row["ranks"]), int(row["message_bytes"])
        errors.append(abs(collectives.seconds("all_reduce", n, Group(p, p, 1), m) / float(row["seconds"]) - 1))
    assert len(errors) == 44
    assert sum(errors) / len(errors) < 0.06
    assert max(errors) < 0.25


def test_which_ranks_meet_follows_from_the_order_of_the_mesh():
    sizes_of = (2, 4, 1, 2, 4)
    assert collectives.group(sizes_of, ("tp",), 8) == Group(4, 4, 1)
    assert collectives.group(sizes_of, ("cp",), 8) == Group(2, 2, 1)
    assert collectives.group(sizes_of, ("dp",), 8) == Group(4, 1, 4)
    assert collectives.group(sizes_of, ("dp", "ep", "cp"), 8) == Group(8, 2, 4)
    assert collectives.group(sizes_of, ("pp",), 8) == Group(2, 1, 2)
    assert collectives.group((1, 1, 1, 1, 16), ("tp",), 8) == Group(16, 8, 2)
