"""SmolLM3 (Hugging Face, 2025): a Llama of which every fourth layer rotates nothing (arXiv 2501.18795)."""

from __future__ import annotations

from dataclasses import replace

from models import config_json, gguf_keys
from models.config import Config
from models.families import llama
from models.family import Family, ModelType
from models.piece import Tensors
from models.settings import Settings

DEFAULTS = config_json.DEFAULTS | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}


def _config(s: Settings) -> Config:
    c, bias = config_json.config_of(s, DEFAULTS), s.flag("attention_bias", False)
    every, rotates = s.size("no_rope_layer_interval", 4), s.get("no_rope_layers")
    if rotates is None:
        rotates = [(i + 1) % every != 0 for i in range(c.layers)]
    if not isinstance(rotates, list) or len(rotates) < c.layers or not set(rotates) <= {0, 1}:
        raise s.refuse("no_rope_layers", f"use 1 (rotates) or 0 for each of {c.layers} layers")
    still = tuple(i for i in range(c.layers) if not rotates[i])
    uses = s.flag("use_sliding_window", False)
    layers = config_json.layer_types(s, c.layers, lambda i: uses and i in still)
    c = config_json.windowed(c, config_json.optional(s, "sliding_window", {"sliding_window": None}), layers)
    return replace(c, bias=bias, bias_out=bias, bias_mlp=s.flag("mlp_bias", False), unrotated=still)


def _architecture(s: Settings, tensors: Tensors) -> Config:
    c = gguf_keys.config_of(s, tensors, pairing="interleaved")
    # llama.cpp has the fourth layers alone, whatever the model's own settings were.
    return replace(c, unrotated=tuple(range(3, c.layers, 4)))


def _settings(c: Config) -> dict:
    kinds = ["sliding_attention" if window else "full_attention" for window in c.windows or [0] * c.layers]
    window = max(c.windows, default=0)
    own = {"no_rope_layers": [int(i not in c.unrotated) for i in range(c.layers)], "layer_types": kinds}
    own |= {"use_sliding_window": window > 0, "sliding_window": window or None}
    return config_json.settings_of(c) | own | {"attention_bias": c.bias, "mlp_bias": c.bias_mlp}


_TYPE = ModelType(_config, llama.names, llama.harmless, settings=_settings, architecture="SmolLM3ForCausalLM")
FAMILY = Family({"smollm3": _TYPE}, {"smollm3": _architecture})
