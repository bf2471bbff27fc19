"""Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388): Llamas with biases of queries, keys and values, or norms of heads;
Qwen3-MoE has experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from models import config_json, gguf_keys
from models.config import Config, Experts
from models.families import llama
from models.family import Family, ModelType
from models.settings import Settings

QWEN2 = config_json.DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
}
QWEN3 = QWEN2 | {"head_dim": 128}
QWEN3_MOE = QWEN2 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
}
BLOCK = llama.BLOCK | {
    "router": "mlp.gate.weight",
    "x_gate": "mlp.experts.{x}.gate_proj.weight",
    "x_up": "mlp.experts.{x}.up_proj.weight",
    "x_down": "mlp.experts.{x}.down_proj.weight",
}


def _window(s: Settings) -> int | None:
    window = config_json.optional(s, "sliding_window", {"sliding_window": 4096})
    return window if s.flag("use_sliding_window", False) else None


def _windowed(s: Settings, c: Config) -> Config:
    first, window = s.size("max_window_layers", 28, least=0), _window(s)
    return config_json.windowed(c, window, config_json.layer_types(s, c.layers, lambda i: i >= first))


def _config2(s: Settings) -> Config:
    return replace(_windowed(s, config_json.config_of(s, QWEN2)), bias=True)


def _config3(s: Settings) -> Config:
    bias = s.flag("attention_bias", False)
    return replace(_windowed(s, config_json.config_of(s, QWEN3)), bias=bias, bias_out=bias, qk_norm=True)


def _config3_moe(s: Settings) -> Config:
    c, bias = config_json.config_of(s, QWEN3_MOE), s.flag("attention_bias", False)
    s.pass_over("max_window_layers", "layer_types")
    c = replace(config_json.windowed(c, _window(s)), bias=bias, bias_out=bias, qk_norm=True)
    s.only("decoder_sparse_step", 1)
    dense = s.get("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        raise s.refuse("mlp_only_layers", "not supported, use only the first layers, as in [0, 1]")
    count = s.size("num_local_experts" if s.get("num_experts") is None else "num_experts", 128)
    return replace(
        c,
        experts=Experts(
            count,
            s.size("num_experts_per_tok", 8, most=count),
            s.size("moe_intermediate_size", 768),
            first=len(dense),
            normed=s.flag("norm_topk_prob", False),
        ),
    )


def _settings(c: Config) -> dict:
    kinds = ["sliding_attention" if window else "full_attention" for window in c.windows or [0] * c.layers]
    own = {"use_sliding_window": any(c.windows), "sliding_window": max(c.windows, default=0) or None}
    return config_json.settings_of(c) | own | {"layer_types": kinds}


def _settings3(c: Config) -> dict:
    return _settings(c) | {"attention_bias": c.bias}


def _settings3_moe(c: Config) -> dict:
    e = c.experts or Experts(1, 1, c.d_ff)
    own = {"num_experts": e.count, "num_experts_per_tok": e.active, "moe_intermediate_size": e.d_ff}
    return _settings3(c) | own | {"norm_topk_prob": e.normed, "mlp_only_layers": list(range(e.first))}


_KINDS = {"names": llama.names, "harmless": llama.harmless}
FAMILY = Family(
    {
        "qwen2": ModelType(_config2, **_KINDS, settings=_settings, architecture="Qwen2ForCausalLM"),
        "qwen3": ModelType(_config3, **_KINDS, settings=_settings3, architecture="Qwen3ForCausalLM"),
        "qwen3_moe": ModelType(
            _config3_moe,
            partial(llama.names, block=BLOCK),
            llama.harmless,
            settings=_settings3_moe,
            architecture="Qwen3MoeForCausalLM",
        ),
    },
    {
        "qwen2": partial(gguf_keys.config_of, bias=True),
        "qwen3": partial(gguf_keys.config_of, qk_norm=True),
        "qwen3moe": partial(gguf_keys.config_of, qk_norm=True),
    },
)
