"""Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388): Llamas with biases of queries, keys and values, or norms of heads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from models import config_json, gguf_keys
from models.config import Config
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


def _require_no_window(s: Settings, c: Config) -> None:
    """Raises ModelError where some layer sees less than the whole context."""
    if not s.flag("use_sliding_window", False):
        return
    window = config_json.optional(s, "sliding_window", {"sliding_window": 4096})
    first, kinds = s.size("max_window_layers", 28, least=0), s.get("layer_types")
    windowed = sum(kind != "full_attention" for kind in kinds) if isinstance(kinds, list) else c.layers - first
    if windowed > 0:
        config_json.require_no_window(s, window, c.context)


def _config2(s: Settings) -> Config:
    c = config_json.config_of(s, QWEN2)
    _require_no_window(s, c)
    return replace(c, bias=True)


def _config3(s: Settings) -> Config:
    c = config_json.config_of(s, QWEN3)
    _require_no_window(s, c)
    bias = s.flag("attention_bias", False)
    return replace(c, bias=bias, bias_out=bias, qk_norm=True)


FAMILY = Family(
    {"qwen2": ModelType(_config2, llama.names, llama.harmless), "qwen3": ModelType(_config3, llama.names, llama.harmless)},
    {"qwen2": partial(gguf_keys.config_of, bias=True), "qwen3": partial(gguf_keys.config_of, qk_norm=True)},
)
