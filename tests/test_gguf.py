"""GGUF files: what the gguf package dequantises, the same models as in safetensors, a real one, and files that cannot be used."""

import tracemalloc
from importlib.util import find_spec
from itertools import pairwise

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

from layers.rope import Llama3, Yarn
from models.config import build
from models.source import ModelError, open_model
from parallel.mesh import Mesh
from tests.test_models import FAMILIES, arrays_of, edited, part, refused, whole_logits

on_ranks = pytest.mark.mpi


@pytest.fixture
def mesh(comm):
    with Mesh(comm, check=True, tp=comm.size) as mesh:
        yield mesh


def write(file, architecture, keys, tensors, metadata=None):
    """A GGUF file by the gguf package. keys: under the architecture; tensors: arrays, or (bytes, type)."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in {f"{architecture}.{k}": v for k, v in keys.items()} | (metadata or {}):
        pass
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in ({f"{architecture}.{k}": v for k, v in keys.items()} | (metadata or {})).items():
        add.get(type(value), writer.add_array)(key, value)
    for name, x in tensors.items():
        data, kind = x if isinstance(x, tuple) else (np.ascontiguousarray(x), None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# --- the families, from their safetensors by what llama.cpp's converter does

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}
INSIDE = {
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
EXPERT = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def named(name):
    for theirs, gguf_name in INSIDE.items():
        name = name.replace(theirs, gguf_name) if name not in OUTSIDE else OUTSIDE[name]
    return name


def interleaved(w, heads):
    """Rows of each head from halves to pairs."""
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def converted(name, c, split=True):
    """A family's tensors as GGUF has them. `split`: the latent's up-projection in two."""
    found, experts = {}, {}
    for key, x in arrays_of(FAMILIES / name).items():
        if ".experts." in key:
            layer, x_, role = key.split(".")[2], int(key.split(".experts.")[1].split(".")[0]), key.split(".")[-2]
            experts.setdefault(f"blk.{layer}.ffn_{EXPERT[role]}_exps.weight", {})[x_] = x
        elif key.endswith("kv_b_proj.weight") and split:
            kv = x.reshape(c.heads, c.latent.d_nope + c.latent.d_value, -1)
            layer = named(key).removesuffix("attn_kv_b.weight")
            found[f"{layer}attn_k_b.weight"] = kv[:, : c.latent.d_nope].transpose(0, 2, 1)
            found[f"{layer}attn_v_b.weight"] = kv[:, c.latent.d_nope :]
        elif name.startswith(("llama", "mixtral")) and ("q_proj" in key or "k_proj" in key):
            found[named(key)] = interleaved(x, c.heads if "q_proj" in key else c.kv_heads)
        else:
            found[named(key)] = x.T if name == "gpt2" and ".c_" in key else x
    return found | {key: np.stack([of[i] for i in range(len(of))]) for key, of in experts.items()}


def keys_of(c):
    """A Config as a GGUF file says it."""
    keys = {"block_count": c.layers, "context_length": c.context, "embedding_length": c.d_model, "vocab_size": c.vocabulary}
    keys |= {"feed_forward_length": c.d_ff, "attention.head_count": c.heads}
    keys |= {f"attention.layer_norm_{'epsilon' if c.norm == 'layer' else 'rms_epsilon'}": c.eps}
    if c.latent:
        m = c.latent
        keys |= {"attention.head_count_kv": 1, "attention.key_length": m.d_latent + m.d_rope, "attention.value_length": m.d_latent}
        keys |= {"attention.key_length_mla": m.d_nope + m.d_rope, "attention.value_length_mla": m.d_value}
        keys |= {"attention.kv_lora_rank": m.d_latent, "rope.dimension_count": m.d_rope}
        keys |= {"attention.q_lora_rank": m.d_query_latent} if m.d_query_latent else {}
    elif c.rope is not None:
        E = c.d_head or c.d_model // c.heads
        keys |= {"attention.head_count_kv": c.kv_heads, "attention.key_length": E, "attention.value_length": E}
        keys |= {"rope.dimension_count": E}
    if c.rope is not None:
        keys["rope.freq_base"] = float(1 / Rope_1(c)) if False else base_of(c)
    if c.experts:
        e = c.experts
        keys |= {"expert_count": e.count, "expert_used_count": e.active, "expert_feed_forward_length": e.d_ff}
    return keys
