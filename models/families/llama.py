"""Llama (Touvron et al., arXiv 2302.13971), and the tensors' names that other families have in common with it."""

from __future__ import annotations

import re
from dataclasses import replace

from models import config_json, gguf_keys
from models.config import Config
from models.family import Family, ModelType
from models.piece import Tensors
from models.roles import Names, Shapes, by_role
from models.settings import Settings

DEFAULTS = config_json.DEFAULTS | {"intermediate_size": 11008, "max_position_embeddings": 2048}
BLOCK = {
    "n1": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "qn": "self_attn.q_norm.weight",
    "kn": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "n2": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
# Transformers 5 stacks experts in memory, and writes them so if it is asked not to keep the original format.
_STACKED = {
    "router": "mlp.gate.weight",
    "x_gate_up": "mlp.experts.gate_up_proj",
    "x_down": "mlp.experts.down_proj",
}


def _config(s: Settings) -> Config:
    c, bias = config_json.config_of(s, DEFAULTS), s.flag("attention_bias", False)
    return replace(c, bias=bias, bias_out=bias, bias_mlp=s.flag("mlp_bias", False))


def _settings(c: Config) -> dict:
    return config_json.settings_of(c) | {"attention_bias": c.bias, "mlp_bias": c.bias_mlp}


def names(there: Shapes, block: Names = BLOCK) -> Names:
    if any(name.endswith(_STACKED["x_gate_up"]) for name in there):
        block = {role: name for role, name in block.items() if role not in ("x_gate", "x_up")} | _STACKED
    ends = {"wte": "model.embed_tokens.weight", "nf": "model.norm.weight", "head": "lm_head.weight"}
    return by_role("model.layers", block, ends)


def harmless(name: str, config: Config) -> bool:
    """Rotary frequencies, which older versions of transformers saved; the configuration gives them."""
    return re.fullmatch(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", name) is not None


def _architecture(s: Settings, tensors: Tensors) -> Config:
    c = gguf_keys.config_of(s, tensors, pairing="interleaved")
    return config_json.windowed(c, s.size("attention.sliding_window", 0, least=0) or None)


# Whoever makes GGUF files of Llamas turns their weights, so that neighbours are rotated instead of halves.
_TYPE = ModelType(_config, names, harmless, settings=_settings, architecture="LlamaForCausalLM")
FAMILY = Family({"llama": _TYPE}, {"llama": _architecture})
