"""Mixtral (Jiang et al., arXiv 2401.04088): a Llama whose MLPs are experts. GGUF files call it llama, too."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from models import config_json
from models.config import Config, Experts
from models.families import llama
from models.family import Family, ModelType
from models.settings import Settings

DEFAULTS = config_json.DEFAULTS | {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
CLASS = "MixtralForCausalLM"
BLOCK = llama.BLOCK | {
    "router": "block_sparse_moe.gate.weight",
    "x_gate": "block_sparse_moe.experts.{x}.w1.weight",
    "x_up": "block_sparse_moe.experts.{x}.w3.weight",
    "x_down": "block_sparse_moe.experts.{x}.w2.weight",
}


def _config(s: Settings) -> Config:
    c = config_json.config_of(s, DEFAULTS)
    c = config_json.windowed(c, s.size("sliding_window", None))
    count = s.size("num_local_experts", 8)
    return replace(c, experts=Experts(count, s.size("num_experts_per_tok", 2, most=count), c.d_ff))


def _settings(c: Config) -> dict:
    e = c.experts or Experts(1, 1, c.d_ff)
    return config_json.settings_of(c) | {"num_local_experts": e.count, "num_experts_per_tok": e.active}


_NAMES = partial(llama.names, block=BLOCK)
FAMILY = Family({"mixtral": ModelType(_config, _NAMES, llama.harmless, settings=_settings, architecture=CLASS)}, {})
