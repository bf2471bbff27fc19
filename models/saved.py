"""Writes a model as a Hugging Face folder: config.json, safetensors, and where it learned bytes a tokenizer of these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from layers.rope import Rope, pairing_permutation
from models.config import Config
from models.families.table import MODEL_TYPES
from models.huggingface import WHOLE
from models.piece import ModelError
from models.roles import pieces
from models.settings import Settings
from models.source import Source
from models.tokenizer import BYTE_OF

# More tensors than any model has.
ALL = 10**9
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


def write(folder: Path, settings: dict, tensors: Mapping[str, np.ndarray], beside: Path | None) -> list[Path]:
    """Write the files into `folder`, which is there. `beside`: the folder whose tokenizer the model has; None: it has bytes for
    tokens. Returns what was written."""
    dtype = str(next(iter(tensors.values())).dtype)
    said = settings | {"dtype": dtype, "bos_token_id": None, "eos_token_id": None}
    files = {"config.json": _json(said), WHOLE: save(dict(tensors), {"format": "pt"})}
    if beside is None:
        files |= {"tokenizer.json": by_bytes().to_str(pretty=True).encode() + b"\n"}
        files["tokenizer_config.json"] = _json({"tokenizer_class": "PreTrainedTokenizerFast"})
    else:
        files |= {name: (beside / name).read_bytes() for name in BESIDE if (beside / name).is_file()}
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
