"""The block: against PyTorch's stored answers, against the reference, and spoilt."""

import numpy as np
import pytest

from launch.measure import step
from layers.attention import Attention
from layers.batch import Batch
from layers.block import Block
from layers.latent_attention import LatentAttention
from layers.mlp import MLP
from layers.norm import LayerNorm, RMSNorm
from layers.rope import Llama3, Rope, Yarn
from parallel.control import Control
from parallel.ledger import agrees
from parallel.mesh import Mesh
from parallel.parameter import drawn, given
from reference import transformer as reference
from reference.attention import Options
from reference.compare import compare
from reference.layer import compared
from reference.rounding import bounds
from tests.apart import shared
from tests.grids import every_other
from tests.harness import ROOT

pytestmark = pytest.mark.mpi

D, F = 12, 10


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


def gpt2(tp, weights):
    attention = Attention(tp, weights, D, 3, bias=True, bias_out=True)
    return Block(LayerNorm(weights, "n1", D), attention, LayerNorm(weights, "n2", D), MLP(tp, weights, D, F)), None


def llama(tp, weights):
    rope = Rope(8, 500.0, scaling=Llama3(original=64))
    attention = Attention(tp, weights, D, 6, 3, 8)
    norms = [RMSNorm(weights, n, D, 1e-6) for n in ("n1", "n2")]
    return Block(norms[0], attention, norms[1], MLP(tp, weights, D, F, "swiglu", bias=False)), rope


def deepseek(tp, weights):
    scaling = Yarn(factor=4.0, original=16, beta_fast=4.0, beta_slow=0.5, mscale=1.0, mscale_all_dim=0.7)
    rope = Rope(6, 100.0, "interleaved", scaling)
    attention = LatentAttention(tp, weights, D, 3, 7, 4, 6, 3, 5, scale=10**-0.5 * rope.softmax_factor)
    norms = [RMSNorm(weights, n, D, 1e-6) for n in ("n1", "n2")]
    return Block(norms[0], attention, norms[1], MLP(tp, weights, D, F, "swiglu", bias=False)), rope


BLOCKS = {"gpt2": gpt2, "llama": llama, "deepseek": deepseek}
SCALING = {
    "llama": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    "deepseek": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
    | {"beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.7},
}
ROPE = {
    "gpt2": None,
    "llama": {"pairing": "half", "base": 500.0, "scaling": SCALING["llama"]},
    "deepseek": {"pairing": "interleaved", "base": 100.0, "scaling": SCALING["deepseek"]},
}
EPS = {"gpt2": 1e-5, "llama": 1e-6, "deepseek": 1e-6}


def run(mesh, comm, kind, weights, x, dy, lengths, sabotage=None):
    """One step: all tensors by name, the weights', x's and y's included."""
    block, rope = BLOCKS[kind](mesh.tp, weights)
    if sabotage:
        sabotage(block)
    ran = step.run(block, x, dy, mesh, Control(comm), Batch.of(lengths, rope, x.dtype))
    assert agrees(ran.communication)
    assert not ran.wrong
    assert ran.memory["saved_bytes_per_rank"] == ran.memory["predicted_saved_bytes_per_rank"]
    return ran.whole | {"x": x}, block


def tensors(comm, kind, whole, lengths, dy):
    """Comparisons of everything with the reference's block."""
    o = Options(lengths, True, ROPE[kind])

    def forward(W):
        return reference.block(W, o, EPS[kind])

    of = ([forward], lambda W, name, index: np.sum(dy * forward(W)), whole, dy, lambda name: 8)
    return shared(comm, lambda share: compared(*of, share))


@pytest.mark.parametrize("kind", BLOCKS)
def test_outputs_and_all_gradients_are_those_of_pytorch(mesh, comm, kind):
    if kind != "llama" and mesh.tp.size > 3:
        pytest.skip("these blocks have 3 heads")
    with np.load(ROOT / "tests/oracles/blocks.npz") as stored:
        of = {n.removeprefix(f"{kind}."): a for n, a in stored.items() if n.startswith(kind)}
        lengths = stored["lengths"].tolist()
    whole, block = run(mesh, comm, kind, given(of), of["x"], of["dy"], lengths)
    assert {p.name for p in block.parameters} | {"x", "y", "dx", "dy"} | {f"d{p.name}" for p in block.parameters} == of.keys()
    o = Options(lengths, True, ROPE[kind])
    arrays = {n: of[n] for n in ("x", *(p.name for p in block.parameters))}
    allowed = bounds([lambda W: reference.block(W, o, EPS[kind])], arrays, of["dy"], "float64")
    for name in ("y", *(f"d{n}" for n in arrays)):
        # Theirs is as far from the truth as ours may be.
        c = compare(name, "", whole[name], of[name], 2 * float(allowed[name.removeprefix("d")].max()))
        assert c.ok, c.worst
        assert c.relative_error < 1e-12


@pytest.mark.parametrize(("kind", "dtype"), every_other(BLOCKS, ["float32", "float64"]))
def test_every_tensor_equals_the_reference(mesh, comm, kind, dtype):
    if kind != "llama" and mesh.tp.size > 3:
        pytest.skip("these blocks have 3 heads")
    lengths = [1, 3, 9]
    x, dy = np.random.default_rng(0).standard_normal((2, sum(lengths), D)).astype(dtype)
    whole, _ = run(mesh, comm, kind, drawn(1, dtype, 0.1), x, dy, lengths)
    checks = tensors(comm, kind, whole, lengths, dy)
    assert not [c.worst for c in checks.values() if not c.ok]
    if dtype == "float64":
        assert max(c.relative_error for c in checks.values()) < 1e-12


def dropped_residual_gradient(block):
    backward = block.attention.backward
    # What comes back through the attention loses the residual's part: dh is subtracted where it will be added.
    block.norm1.backward = lambda dn, saved, whole=block.norm1.backward: whole(dn, saved) - block.spoilt

    def spy(dh, saved, later):
        block.spoilt = dh
        return backward(dh, saved)

    block.attention.backward = spy


def forgotten_eps(block):
    block.norm2.eps = 0.0


def mean_not_taken_off(block):
    block.norm1.forward = lambda x: type(block.norm1).forward(block.norm1, x + 0.01 * x[:, :1])


@pytest.mark.parametrize(
    ("sabotage", "red"),
    [(dropped_residual_gradient, {"dx"}), (forgotten_eps, {"y", "dx"}), (mean_not_taken_off, {"y"})],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_sabotage_is_seen(mesh, comm, sabotage, red):
    kind, lengths = "llama", [1, 3, 9]
    x, dy = np.random.default_rng(0).standard_normal((2, sum(lengths), D))
    whole, _ = run(mesh, comm, kind, drawn(1, "float64", 0.1), x, dy, lengths, sabotage)
    checks = tensors(comm, kind, whole, lengths, dy)
    assert red <= {n for n, c in checks.items() if not c.ok}


@pytest.mark.parametrize("make", [RMSNorm, LayerNorm])
def test_norms_in_blocks_of_rows(make, monkeypatch):
    """Also at a width that is no power of two, with rows that do not fill the last block, and a row of zeros."""
    from layers import norm as norms

    monkeypatch.setattr(norms, "BLOCK", 20)
    x, dy = np.random.default_rng(0).standard_normal((2, 7, 9))
    x[2] = 0
    norm = make(drawn(1, "float64", 0.3), "n", 9, 1e-3)
    y, saved = norm.forward(x)
    dx = norm.backward(dy, saved)
    whole = (
        {"y": y, "x": x, "dx": dx} | {p.name: p.data for p in norm.parameters} | {f"d{p.name}": p.grad for p in norm.parameters}
    )

    def forward(W):
        W = {"bn1" if n == "bn" else "wn1" if n == "wn" else n: a for n, a in W.items()}
        return reference.norm(W, 1, W["x"], 1e-3)

    for c in compared([forward], lambda W, name, index: np.sum(dy * forward(W)), whole, dy):
        assert c.ok, c.worst
        assert c.relative_error < 1e-13
