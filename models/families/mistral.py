"""Mistral (Jiang et al., arXiv 2310.06825): a Llama whose attention sees a window of the last tokens only. GGUF files call it
llama, too."""

from __future__ import annotations

from models import config_json
from models.config import Config
from models.families import llama
from models.family import Family, ModelType
from models.settings import Settings

DEFAULTS = config_json.DEFAULTS | {
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def _config(s: Settings) -> Config:
    return config_json.windowed(config_json.config_of(s, DEFAULTS), config_json.optional(s, "sliding_window", DEFAULTS))


def _settings(c: Config) -> dict:
    return config_json.settings_of(c) | {"sliding_window": c.window or None}


_TYPE = ModelType(_config, llama.names, llama.harmless, settings=_settings, architecture="MistralForCausalLM")
FAMILY = Family({"mistral": _TYPE}, {})
