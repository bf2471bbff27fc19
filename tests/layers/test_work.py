"""What layers say that they compute: operations, by hand; and that no product is made where it is not counted.

That the products of every layer are those that it makes is held where it is run, in the tests beside this one.
"""

import ast
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from layers.batch import Batch
from layers.work import AGAIN, WEIGHTS, Work, again, condensed, linear, operations, products
from models.build import build
from models.config import Experts, Latent, gpt2_like, llama_like
from models.published import PUBLISHED
from parallel.parameter import drawn
from parallel.products import counted, matmul
from plan.dry import DryAxis, dry_weights

ROOT = Path(__file__).resolve().parents[2]
# One number a row: each is a sum by the BLAS, and a pass over the array.
SUMS = {"x_TD[at] @ mean_D", "g @ mean_D", "p_NRC @ ones_C[:C]"}
# As few rows as `product` has ways for; its caller is counted.
FEW = {"filled_RI @ W_IO", "x_TI @ W_IO", "np.matmul(x_I, W_IO, out=y_O)"}
WAYS = {f"np.{name}" for name in ("matmul", "dot", "einsum", "tensordot", "inner", "outer")}


def multiplied(path):
    """The expressions of a file that multiply matrices, but by `matmul`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)) or (
            isinstance(node, ast.Call) and ast.unparse(node.func) in WAYS
        ):
            yield ast.unparse(node)


def test_every_product_of_a_model_is_made_where_it_is_counted():
    rooms = [path for room in ("layers", "parallel", "inference", "training", "models") for path in (ROOT / room).rglob("*.py")]
    found = {text for path in rooms if path.name != "products.py" for text in multiplied(path)}
    assert found == SUMS | FEW
    assert [*multiplied(ROOT / "parallel" / "products.py")] == ["np.matmul(a, b, out=out)"]


def test_products_are_counted_inside_and_nowhere_else():
    a, b = np.ones((5, 2, 3), "f4"), np.ones((5, 3, 4), "f4")
    out = np.empty((5, 2, 4), "f4")
    with counted() as made:
        assert matmul(a, b, out) is out
        matmul(a[0], b[0])
        matmul(a[:, :0], b)
        with counted() as inner:
            matmul(a[0], b[0])
    matmul(a[0], b[0])
    assert made == {(2, 4, 3, 5): 1, (2, 4, 3, 1): 1}
    assert inner == {(2, 4, 3, 1): 1}
    assert (out == 3).all()


def test_a_linear_layer_multiplies_three_times():
    work = linear(5, 2, 3)
    assert [(w.phase, w.shape) for w in work] == [
        ("forward", (5, 3, 2, 1)),
        ("backward", (5, 2, 3, 1)),
        (WEIGHTS, (2, 3, 5, 1)),
    ]
    assert operations(work) == 3 * 2 * 5 * 2 * 3
    assert operations([*work, *again(work)]) == operations(work)
    assert products([*work, *again(work)])[5, 3, 2, 1] == 2
    assert condensed([*work, *work]) == [w._replace(times=2) for w in work]
    assert products(linear(0, 2, 3)) == Counter()


LLAMA = replace(llama_like(31, 24, 2, 9, 3, 14, 40), d_head=8)
EXPERTS = Experts(8, 3, 6, 6, 1, "sigmoid")
LATENT = Latent(8, 4, 2, 4, 6)
CONFIGS = {
    "gpt2": gpt2_like(29, 24, 2, 6, 14, 16),
    "untied, heads that share": LLAMA,
    "within a window": replace(LLAMA, windows=(0, 5), unrotated=(1,)),
    "latent, routed": replace(LLAMA, kv_heads=9, latent=LATENT, experts=EXPERTS),
}


def by_weights(config, S):
    """Operations of a sequence: 6 a token for each weight that multiplies it, 6 H (E + V) for each key that a query sees."""
    D, L, V = config.d_model, config.layers, config.vocabulary
    E = config.d_head or D // config.heads
    dense = (3 if config.activation == "swiglu" else 2) * D * config.d_ff
    if config.latent is None:
        attention, widths = D * E * (2 * config.heads + 2 * config.kv_heads), 2 * E
    else:
        m = config.latent
        n = m.d_nope + m.d_rope
        attention = D * (m.d_latent + m.d_rope + m.d_query_latent) + m.d_query_latent * config.heads * n
        attention += m.d_latent * config.heads * (m.d_nope + m.d_value) + config.heads * m.d_value * D
        widths = n + m.d_value
    routed = 0 if config.experts is None else L - config.experts.first
    x = config.experts
    expert = 0 if x is None else 3 * D * (x.active * x.d_ff + x.d_shared) + D * x.count
    weights = V * D + L * attention + (L - routed) * dense + routed * expert
    keys = sum(min(n, window or n) for window in config.windows or [0] * L for n in range(1, S + 1))
    return 6 * S * weights + 6 * config.heads * widths * keys


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_operations_are_six_a_weight_and_a_key(kind, recompute):
    model = build(CONFIGS[kind], DryAxis("tp", 1), dry_weights("float32"), recompute)
    for S in (1, 7, 300):
        assert operations(model.work(model.batch([S]))) == by_weights(CONFIGS[kind], S)
        assert model.flops(S) * S == pytest.approx(by_weights(CONFIGS[kind], S), rel=1e-15)


def test_a_routed_model_counts_the_experts_that_serve_a_token():
    model = build(PUBLISHED["DeepSeek-V3"], DryAxis("tp", 1), dry_weights("float16"))
    # 37.1 billion active parameters without the embedding's table, and keys.
    assert 36.6e9 < model.flops(1) / 6 < 37.2e9


def test_ranks_share_the_work_out():
    """What is not cut over tp is done on every rank: the products of latents."""
    for ranks in (2, 3):
        parts = [build(CONFIGS["untied, heads that share"], DryAxis("tp", ranks, r), dry_weights("f4")) for r in range(ranks)]
        whole = build(CONFIGS["untied, heads that share"], DryAxis("tp", 1), dry_weights("f4"))
        # 3 key/value heads that 9 query heads share: on 2 ranks the middle one is on both.
        shared = (ranks == 2) * 2 * 6 * 7 * 2 * 24 * 8
        assert sum(m.flops(7) for m in parts) * 7 == pytest.approx(whole.flops(7) * 7 + shared)


@pytest.mark.parametrize("sabotage", ["a product more", "a block left out", "a shape"])
def test_a_wrong_closed_form_is_seen(sabotage, monkeypatch):
    config = CONFIGS["gpt2"]
    model, ids = build(config, DryAxis("tp", 1), drawn(1, "float32")), np.arange(9)
    monkeypatch.setattr(DryAxis, "all_reduce", lambda self, x, op="sum": x, raising=False)
    monkeypatch.setattr(DryAxis, "sum_rows", lambda self, x, rows: x, raising=False)
    monkeypatch.setattr(DryAxis, "gather_rows", lambda self, x, rows: x, raising=False)
    batch = Batch([4, 5])
    with counted() as made:
        logits, saved = model.forward(ids, batch)
        model.backward(logits, saved)
    work = model.work(batch)
    assert made == products(work)
    bent = {
        "a product more": [*work, *linear(9, 24, 24)[:1]],
        "a block left out": [w for part in (model.beginning, model.blocks[0], model.end) for w in part.work(batch)],
        "a shape": [Work(w.kind, w.phase, w.shape[::-1] if w.kind == "product" else w.shape, w.times) for w in work],
    }
    assert made != products(bent[sabotage])
    assert AGAIN not in {w.phase for w in work}
