"""Writes a model as a Hugging Face folder: config.json, safetensors, and where it learned bytes a tokenizer of these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from safetensors.numpy import save
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from layers.rope import Rope, pairing_permutation
from models.config import Config
from models.families.table import MODEL_TYPES
from models.huggingface import WHOLE
from models.open import open_model
from models.piece import ModelError
from models.roles import pieces
from models.settings import Settings
from models.source import Source
from models.tokenizer import BYTE_OF
from models.tokenizer_file import open_tokenizer

# More tensors than any model has.
ALL = 10**9
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
# The files of a tokenizer, and what its makers want, which go along unchanged.
BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "generation_config.json"),
)


def described(config: Config) -> dict:
    """config.json of a model: of the first family that, reading it, finds the very `config`. Rotation is of halves there.

    Raises ModelError where no family can say it.
    """
    for model_type, stored in MODEL_TYPES.items():
        if stored.settings is None:
            continue
        settings = {"model_type": model_type, "architectures": [stored.architecture], **stored.settings(config)}
        try:
            back = stored.config(Settings(settings, model_type))
        except ModelError:
            continue
        if _same(back, _by_halves(config)):
            return settings
    raise ModelError("no published family that we write has such layers: dense, or experts chosen by softmax, none shared")


def read_back(settings: Mapping[str, object], where: str) -> Config:
    """The Config that `described` gave. Raises ModelError for anything else."""
    s = Settings(dict(settings), where)
    model_type = s.get("model_type")
    if model_type not in list(MODEL_TYPES):
        raise s.refuse("model_type", f"unknown family, use one of {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[model_type].config(s)


def _by_halves(config: Config) -> Config:
    rope = config.rope
    return config if rope is None else replace(config, rope=Rope(rope.width, rope.base, "half", rope.scaling))


def _same(a: Config, b: Config) -> bool:
    """Whether two are one; widths of heads that follow from others may be said or not."""
    plain = [replace(c, rope=None, d_head=c.d_head or c.d_model // c.heads) for c in (a, b)]
    if plain[0] != plain[1] or (a.rope is None) != (b.rope is None):
        return False
    if a.rope is None:
        return True
    factors = [(r.width, r.pairing, r.softmax_factor, getattr(r.scaling, "table_factor", 1.0)) for r in (a.rope, b.rope)]
    return factors[0] == factors[1] and np.array_equal(a.rope.frequencies_P, b.rope.frequencies_P)


@dataclass
class _Nothing:
    """No tensors are there yet."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    nbytes: int = 0


def tensors(settings: dict, config: Config, ours: dict[str, np.ndarray], pairing: str = "half") -> dict[str, np.ndarray]:
    """The tensors of the folder by their names, from `ours`, all whole arrays of the model by our names. `pairing`: by which
    its heads are rotated; in the folder it is by halves."""
    stored = MODEL_TYPES[settings["model_type"]]
    if pairing == "interleaved":
        for name in ours:
            if name.rpartition(".")[2] in ("Wq", "Wk", "bq", "bk"):
                ours[name] = ours[name][..., pairing_permutation(config.rope.width)]
    of = pieces(config, stored.names({}), ALL, stored.turned)
    return Source(Path("."), settings["model_type"], config, _Nothing(), of).exported(ours)


class Beside(NamedTuple):
    """What goes into the folder beside the weights: files by their names, and what config.json says of ends."""

    files: dict[str, bytes]
    ids: dict[str, int | list[int] | None]


def beside(model: Path | None) -> Beside:
    """The tokenizer of the model that was begun from, a folder or a GGUF file; without one, that of the 256 bytes. Raises
    ModelError where it is not there any more, or cannot be used."""
    if model is None:
        files = {"tokenizer.json": by_bytes().to_str(pretty=True).encode() + b"\n"}
        return Beside(files | {"tokenizer_config.json": _json(CLASS)}, {"bos_token_id": None, "eos_token_id": None})
    source = open_model(model)
    tokenizer = open_tokenizer(source.path, source.metadata)
    if tokenizer is None:
        raise ModelError(f"{model}: there is no tokenizer any more")
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(source.wishes.ends) or None}
    if model.is_dir():
        return Beside({name: (model / name).read_bytes() for name in BESIDE if (model / name).is_file()}, ids)
    said = CLASS | {"add_bos_token": tokenizer.add_bos}
    for name, i in (("bos_token", tokenizer.bos_id), ("eos_token", min(source.wishes.ends, default=None))):
        said |= {} if i is None else {name: tokenizer.bytes_of(i, special=True).decode("utf-8", "replace")}
    if "tokenizer.chat_template" in source.metadata:
        said["chat_template"] = source.metadata["tokenizer.chat_template"]
    return Beside({"tokenizer.json": tokenizer.as_json().encode(), "tokenizer_config.json": _json(said)}, ids)


def write(folder: Path, settings: dict, tensors: Mapping[str, np.ndarray], more: Beside) -> list[Path]:
    """Write the files into `folder`, which is there. Returns what was written."""
    said = settings | more.ids | {"dtype": str(next(iter(tensors.values())).dtype)}
    files = {"config.json": _json(said), WHOLE: save(dict(tensors), {"format": "pt"}), **more.files}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def by_bytes() -> tokenizers.Tokenizer:
    """A tokenizer whose tokens are the 256 bytes, each by its number."""
    backend = tokenizers.Tokenizer(BPE(dict(BYTE_OF), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _json(values: Mapping[str, object]) -> bytes:
    return json.dumps(values, indent=2, sort_keys=True).encode() + b"\n"
