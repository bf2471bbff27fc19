"""Which families there are. A name in `FILES` adds one; docs/models.md says how its file is written."""

from __future__ import annotations

from importlib import import_module

from models.family import Architecture, Family, ModelType

# In the order in which messages list what can be read.
FILES = ("gpt2", "llama", "mistral", "qwen", "smollm3", "mixtral", "deepseek")

_FAMILIES: list[Family] = [import_module(f"models.families.{file}").FAMILY for file in FILES]
MODEL_TYPES: dict[str, ModelType] = {name: stored for f in _FAMILIES for name, stored in f.model_types.items()}
ARCHITECTURES: dict[str, Architecture] = {name: config for f in _FAMILIES for name, config in f.architectures.items()}
