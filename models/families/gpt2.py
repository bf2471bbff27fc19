"""GPT-2 (Radford et al., 2019). Its matrices are stored (in, out), as its authors' were."""

from __future__ import annotations

import re
from dataclasses import replace

from models import config_json, gguf_keys
from models.config import Config, gpt2_like
from models.family import Family, ModelType
from models.piece import Tensors
from models.roles import Names, Shapes, by_role
from models.settings import Settings

BLOCK = {
    "n1": "ln_1.weight",
    "qkv": "attn.c_attn.weight",
    "o": "attn.c_proj.weight",
    "n2": "ln_2.weight",
    "up": "mlp.c_fc.weight",
    "down": "mlp.c_proj.weight",
}


def _config(s: Settings) -> Config:
    s.only("activation_function", *config_json.ACTIVATIONS["gelu"])
    s.only("scale_attn_weights", True)
    s.only("scale_attn_by_inverse_layer_idx", False)
    s.only("add_cross_attention", False)
    D, heads, context = s.size("n_embd", 768), s.size("n_head", 12), s.size("n_positions", 1024)
    if D % heads:
        raise s.refuse("n_head", f"use a divisor of n_embd, {D}")
    sizes = s.size("vocab_size", 50257), D, s.size("n_layer", 12), heads, s.size("n_inner", None) or 4 * D, context
    return replace(gpt2_like(*sizes, s.flag("tie_word_embeddings", True)), eps=s.number("layer_norm_epsilon", 1e-5))


def _settings(c: Config) -> dict:
    return {
        "vocab_size": c.vocabulary,
        "n_positions": c.context,
        "n_embd": c.d_model,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.d_ff,
        "layer_norm_epsilon": c.eps,
        "activation_function": config_json.ACTIVATIONS["gelu"][0],
        "tie_word_embeddings": c.tied,
    }


def _names(there: Shapes) -> Names:
    ends = {"wte": "wte.weight", "wpe": "wpe.weight", "nf": "ln_f.weight"}
    ends = {role: f"transformer.{name}" for role, name in ends.items()} | {"head": "lm_head.weight"}
    return by_role("transformer.h", BLOCK, ends)


def _harmless(name: str, config: Config) -> bool:
    """Masks, which older versions of transformers saved."""
    return re.fullmatch(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)", name) is not None


def _architecture(s: Settings, tensors: Tensors) -> Config:
    c = gguf_keys.config_of(s, tensors, pairing=None, norm="layer", activation="gelu", bias=True)
    return replace(c, positions=c.context)


_STORED = {"turned": False, "base": "transformer.", "settings": _settings, "architecture": "GPT2LMHeadModel"}
FAMILY = Family({"gpt2": ModelType(_config, _names, _harmless, **_STORED)}, {"gpt2": _architecture})
