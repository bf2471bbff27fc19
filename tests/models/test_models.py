"""Pretrained models: what transformers computes from the same files, and files that cannot be used."""

import ast
import json
import re
import struct
import tracemalloc
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from layers.rope import Rope
from models.build import build
from models.families.table import ARCHITECTURES, FILES, MODEL_TYPES
from models.open import open_model
from models.piece import ModelError, blocks
from parallel.mesh import Mesh
from parallel.owed import Owed
from parallel.shard import Layout, even
from tests.harness import ROOT

FAMILIES = ROOT / "tests/oracles/families"
NAMES = sorted(p.parent.name for p in FAMILIES.glob("*/expected.npz"))
on_ranks = pytest.mark.mpi


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


def arrays_of(folder):
    """Every tensor of a folder's safetensors files."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def whole_logits(mesh, source, ids, dtype="float64"):
    model = build(source.config, mesh.tp, source.weights(dtype))
    logits, _ = model.forward(ids.ravel(), model.batch([ids.shape[-1]] * (ids.size // ids.shape[-1])))
    return mesh.tp.all_gather(logits, 1, model.embedding.cut).reshape(*ids.shape, -1)


# --- Hugging Face folders


def test_every_family_is_in_the_table_and_has_its_oracle():
    assert {p.stem for p in (ROOT / "models/families").glob("*.py")} == {"__init__", "table", *FILES}
    assert {"gpt2", "llama", "qwen2", "qwen3", "mixtral", "deepseek_v2", "deepseek_v3"} <= set(MODEL_TYPES)
    assert {n.split("-")[0] for n in NAMES} == set(MODEL_TYPES)


@pytest.mark.parametrize("file", ["config_json", "gguf_file", "gguf_keys", "huggingface", "open", "piece", "roles", "source"])
def test_what_is_said_of_a_family_is_in_its_file_alone(file):
    constants = {n.value for n in ast.walk(ast.parse((ROOT / f"models/{file}.py").read_text())) if isinstance(n, ast.Constant)}
    assert constants.isdisjoint({*MODEL_TYPES, *ARCHITECTURES})


@on_ranks
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(mesh, name):
    expected = np.load(FAMILIES / name / "expected.npz")
    logits = whole_logits(mesh, open_model(FAMILIES / name), expected["ids"])
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-12)


@on_ranks
@pytest.mark.parametrize("name", NAMES)
def test_weights_and_gradients_come_back_by_their_own_names(mesh, name):
    expected, source = np.load(FAMILIES / name / "expected.npz"), open_model(FAMILIES / name)
    model, ids = build(source.config, mesh.tp, source.weights("float64")), expected["ids"]
    logits, saved = model.forward(ids.ravel(), model.batch([ids.shape[1]] * len(ids)))
    targets = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -1)], axis=1).ravel()
    nll, saved_loss = model.loss.forward(logits, targets)
    np.testing.assert_allclose(nll.sum() / (targets >= 0).sum(), expected["loss"], rtol=1e-13)
    model.backward(model.loss.backward(np.full(ids.size, 1 / (targets >= 0).sum()), saved_loss), saved)
    Owed(mesh, model.parameters).sum()
    theirs = arrays_of(FAMILIES / name)
    ours = {p.name: p.whole(mesh, p.data) for p in model.parameters}
    for block in model.blocks:
        ours |= {p.name: p.data for p in getattr(block.mlp, "buffers", [])}
    weights = source.exported(ours)
    assert weights.keys() == theirs.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(weights[key], x)
    gradients = source.exported({p.name: p.whole(mesh, p.grad) for p in model.parameters})
    assert {f"grad.{key}" for key in gradients} == {key for key in expected if key.startswith("grad.")}
    for key, g in gradients.items():
        want = expected[f"grad.{key}"]
        np.testing.assert_allclose(g, want, rtol=0, atol=1e-11 * max(1, abs(want).max()), err_msg=key)


def edited(tmp_path, name, config=None, tensors=None, drop=()):
    """A copy of a family's folder with other settings (None: without that key) and other tensors, in one file."""
    folder = tmp_path / "model"
    folder.mkdir(parents=True)
    settings = json.loads((FAMILIES / name / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))
    arrays = {k: x for k, x in arrays_of(FAMILIES / name).items() if k not in drop} | (tensors or {})
    save_file(arrays, folder / "model.safetensors")
    return folder


def refused(path):
    with pytest.raises(ModelError) as error:
        open_model(path)
    text = str(error.value)
    assert "\n" not in text
    return text


def part(source, name, shape, dim=None, ranks=1, rank=0):
    layout = Layout(shape) if dim is None else Layout(shape, {"tp": (dim, even(shape[dim], ranks))})
    return source.weights("float64").matrix(name, layout, {"tp": rank}, 1).data


def test_experts_stacked_in_one_tensor_are_the_same(tmp_path):
    theirs, source = arrays_of(FAMILIES / "mixtral"), open_model(FAMILIES / "mixtral")
    stacked, lead = {}, "model.layers.{i}.block_sparse_moe"
    for i in range(2):
        w1, w2, w3 = (np.stack([theirs[f"{lead}.experts.{x}.w{j}.weight".format(i=i)] for x in range(4)]) for j in (1, 2, 3))
        stacked[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        stacked[f"model.layers.{i}.mlp.experts.down_proj"] = w2
        stacked[f"model.layers.{i}.mlp.gate.weight"] = theirs[f"{lead}.gate.weight".format(i=i)]
    other = open_model(edited(tmp_path, "mixtral", tensors=stacked, drop=[k for k in theirs if "block_sparse_moe" in k]))
    for name, shape, dim in [("W1", (4, 16, 2, 5), 3), ("W1", (4, 16, 2, 5), 0), ("W2", (4, 5, 16), 1), ("Wr", (16, 4), None)]:
        for rank in range(2):
            a, b = (part(s, f"blocks.1.{name}", shape, dim, 2, rank) for s in (source, other))
            assert a.any()
            assert a.flags.c_contiguous
            np.testing.assert_array_equal(a, b)


def test_gpt2_without_its_models_name_and_with_old_buffers(tmp_path):
    theirs = arrays_of(FAMILIES / "gpt2")
    bare = {k.removeprefix("transformer."): x for k, x in theirs.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8), "h.1.attn.masked_bias": np.array(-1e4, "f4")}
    bare["lm_head.weight"] = bare["wte.weight"]
    source = open_model(edited(tmp_path, "gpt2", tensors=bare, drop=theirs))
    np.testing.assert_array_equal(part(source, "Wte", (23, 12)), bare["wte.weight"])
    table = np.ones((23, 12))
    assert {k: x is table or x.sum() for k, x in source.exported({"Wte": table}).items()} == {
        "wte.weight": table.sum(),
        "lm_head.weight": table.sum(),
    }


def test_a_further_prediction_module_and_inverse_frequencies_are_passed_over(tmp_path):
    more = {
        "model.layers.3.eh_proj.weight": np.ones((2, 2), "f4"),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, "f4"),
    }
    open_model(edited(tmp_path, "deepseek_v3", tensors=more))


@pytest.mark.parametrize("dtype", ["<f2", "<f8", "bfloat16"])
def test_other_float_types(tmp_path, dtype):
    x = np.random.default_rng(0).standard_normal((17, 12)).astype("f4")
    folder = edited(tmp_path, "llama", tensors=None if dtype == "bfloat16" else {"model.embed_tokens.weight": x.astype(dtype)})
    want = x.astype(dtype) if dtype != "bfloat16" else (x.view("u4") & 0xFFFF0000).view("f4")
    if dtype == "bfloat16":
        add_tensor(folder, "model.embed_tokens.weight", "BF16", x.shape, (x.view("u4") >> 16).astype("<u2").tobytes())
    np.testing.assert_array_equal(part(open_model(folder), "Wte", (17, 12), 0, 3, 1), want[6:12])


def add_tensor(folder, name, dtype, shape, data):
    """Put a tensor of whatever type in place of that of this name, as a file of its own beside an index."""
    rest = load_file(folder / "model.safetensors")
    del rest[name]
    save_file(rest, folder / "a.safetensors")
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    (folder / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    index = {"weight_map": dict.fromkeys(rest, "a.safetensors") | {name: "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_the_page_on_models_quotes_the_families_as_they_are():
    code = "".join(p.read_text() for p in (ROOT / "models/families").glob("*.py"))
    quoted = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.DOTALL)
    lines = {line for block in quoted for line in block.splitlines() if line.strip() != "..."}
    assert len(lines) > 10
    assert not [line for line in lines if line not in code]


# --- only its slices


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_reads_its_slices_and_no_more(name, monkeypatch):
    source, read = open_model(FAMILIES / name), []
    original = source.tensors.read
    monkeypatch.setattr(
        source.tensors, "read", lambda tensor, at: read.append(prod(a.stop - a.start for a in at)) or original(tensor, at)
    )
    monkeypatch.setattr("models.piece.blocks", lambda shape: blocks(shape, 7))
    c = source.config
    shapes = {"Wte": ((c.vocabulary, c.d_model), 0)}
    if c.experts is not None:
        shapes["blocks.1.W1"] = (c.experts.count, c.d_model, 2, c.experts.d_ff), 3
    elif c.activation == "swiglu":
        shapes["blocks.1.W1"] = (c.d_model, 2, c.d_ff), 2
    E = c.latent.d_nope + c.latent.d_rope if c.latent else c.d_head or c.d_model // c.heads
    query = "Wuq" if c.latent and c.latent.d_query_latent else "Wq"
    shapes[f"blocks.1.{query}"] = ((c.latent and c.latent.d_query_latent) or c.d_model, c.heads, E), 1
    shapes["blocks.1.Wo"] = (c.heads, c.latent.d_value if c.latent else E, c.d_model), 0
    for ours, (shape, dim) in shapes.items():
        whole, parts = part(source, ours, shape), []
        for rank in range(3):
            read.clear()
            parts.append(part(source, ours, shape, dim, 3, rank))
            assert sum(read) == parts[-1].size
            assert max(read) <= 7
        np.testing.assert_array_equal(np.concatenate(parts, axis=dim), whole)


@pytest.mark.parametrize(("shape", "most"), [((3, 5, 4), 7), ((3, 5, 4), 20), ((3, 5, 4), 1), ((11,), 4), ((2, 3), 100)])
def test_blocks_cover_each_entry_once(shape, most):
    seen = np.zeros(shape, int)
    for block in blocks(shape, most):
        seen[block] += 1
        assert seen[block].size <= most
    assert (seen == 1).all()


def quarters_take_their_own_memory(source):
    """Of an MLP with D 4096, F 1024, whose matrices are 16 MiB in float32: rows and columns."""
    for name, shape, dim in (("W1", (4096, 2, 1024), 2), ("W2", (1024, 4096), 0)):
        tracemalloc.start()
        got = part(source, f"blocks.0.{name}", shape, dim, 4, 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert got.nbytes <= peak < got.nbytes + 8 * 2**20


def test_the_memory_that_reading_takes_is_that_of_the_part(tmp_path):
    D, F, lead = 4096, 1024, "model.layers.0."
    shapes = {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F), "self_attn.o_proj": (D, 2)}
    shapes |= {f"self_attn.{a}_proj": (2, D) for a in "qkv"} | {f"{n}_layernorm": (D,) for n in ("input", "post_attention")}
    shapes = {lead + k: s for k, s in shapes.items()} | {"model.embed_tokens": (17, D), "model.norm": (D,)}
    tensors = {f"{k}.weight": np.zeros(s, "f4") for k, s in shapes.items()}
    config = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    config |= {"num_hidden_layers": 1, "tie_word_embeddings": True}
    quarters_take_their_own_memory(open_model(edited(tmp_path, "llama", config, tensors, arrays_of(FAMILIES / "llama"))))


# Sabotages.


@on_ranks
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", lambda c: replace(c, rope=Rope(6, 500.0, "interleaved", c.rope.scaling))),
        ("llama", lambda c: replace(c, rope=Rope(6, 500.0))),
        ("mistral", lambda c: replace(c, windows=())),
        ("mistral", lambda c: replace(c, windows=(6, 5))),
        ("smollm3", lambda c: replace(c, unrotated=())),
        ("smollm3-windows", lambda c: replace(c, windows=(4, 4, 4))),
        ("qwen3_moe", lambda c: replace(c, experts=replace(c.experts, normed=False))),
        ("deepseek_v3", lambda c: replace(c, rope=Rope(6, 100.0, "half", c.rope.scaling))),
        (
            "deepseek_v3",
            lambda c: replace(c, rope=Rope(6, 100.0, "interleaved", replace(c.rope.scaling, attention_factor=1.0))),
        ),
        ("deepseek_v3", lambda c: replace(c, experts=replace(c.experts, group_top=1))),
        ("deepseek_v2", lambda c: replace(c, latent=replace(c.latent, eps=1e-5))),
        ("deepseek_v2", lambda c: replace(c, experts=replace(c.experts, group_top=2))),
    ],
)
def test_a_setting_read_wrongly_is_seen(mesh, name, change):
    expected, source = np.load(FAMILIES / name / "expected.npz"), open_model(FAMILIES / name)
    source.config = change(source.config)
    assert abs(whole_logits(mesh, source, expected["ids"]) - expected["logits"]).max() > 1e-7
