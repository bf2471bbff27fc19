"""A Hugging Face folder: config.json, and safetensors files, one or several with an index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from models import config_json
from models.families.table import MODEL_TYPES
from models.piece import ModelError, differ
from models.roles import pieces
from models.settings import Settings, read_json
from models.source import Source
from models.wishes import of_folder
from parallel.json_text import parsed

# The dtypes in which weights are stored. A bfloat16 is the upper half of a float32.
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


class Safetensors:
    """The tensors of safetensors files (https://huggingface.co/docs/safetensors: 8 bytes of the header's length, the header in
    JSON, the data). A read opens a map of the file and closes it again.

    The safetensors package checks the headers. Its slices are not used, as they have no bfloat16 for NumPy and keep all pages
    that were read in the process's memory. Raises ModelError for a file that is broken.
    """

    def __init__(self, files: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nbytes = 0
        self._at: dict[str, tuple[Path, str, int]] = {}
        for file in files:
            if not file.exists():
                raise ModelError(f"{file}: no such file: {INDEX} names it")
            try:
                with safe_open(file, framework="numpy"):
                    pass
            except (SafetensorError, OSError) as e:
                raise ModelError(f"{file}: not a whole safetensors file: {e}") from None
            with open(file, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                header = parsed(f.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                if name in self._at:
                    raise ModelError(f"{file}: tensor {name!r} is in {self._at[name][0].name} too")
                start, stop = entry["data_offsets"]
                self.shapes[name] = tuple(entry["shape"])
                self.nbytes += stop - start
                self._at[name] = file, entry["dtype"], 8 + length + start

    def read(self, name: str, at: tuple[slice, ...]) -> np.ndarray:
        file, dtype, offset = self._at[name]
        whole = np.memmap(file, np.dtype(_DTYPES[dtype]).newbyteorder("<"), "r", offset, self.shapes[name])
        part = np.array(whole[at], order="C")
        return (part.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else part

    def file(self, name: str) -> Path:
        return self._at[name][0]

    def unreadable(self, name: str) -> str | None:
        dtype = self._at[name][1]
        return None if dtype in _DTYPES else f"{dtype}, use one of {', '.join(_DTYPES)}"


def _files(folder: Path) -> Safetensors:
    if not (folder / INDEX).exists():
        if not (folder / WHOLE).exists():
            raise ModelError(f"{folder}: neither {WHOLE} nor {INDEX}: save the weights as safetensors")
        return Safetensors([folder / WHOLE])
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise ModelError(f"{folder / INDEX}: weight_map is not the tensors' files by their names")
    outside = [file for file in where.values() if Path(file).name != file or file in ("", "..")]
    if outside:
        raise ModelError(f"{folder / INDEX}: weight_map names {outside[0]!r}: use files in its own folder")
    tensors = Safetensors([folder / file for file in sorted(set(where.values()))])
    for name, file in where.items():
        if name not in tensors.shapes:
            raise ModelError(f"{folder / file}: tensor {name!r} is missing, {INDEX} says that it is there")
    return tensors


def open_folder(folder: Path) -> Source:
    """The model in a folder with config.json. Reads headers only; its tensors are yet to be checked."""
    s = Settings(read_json(folder / "config.json"), str(folder / "config.json"))
    model_type = s.get("model_type")
    # In a list, as what the file says may be of a type that a dict cannot look up.
    if model_type not in list(MODEL_TYPES):
        raise s.refuse("model_type", f"unknown family, use one of {', '.join(MODEL_TYPES)}")
    if s.get("quantization_config") is not None:
        raise s.refuse("quantization_config", "not supported, use the weights in float32, float16 or bfloat16")
    stored = MODEL_TYPES[model_type]
    config = stored.config(s)
    tensors = _files(folder)
    names = stored.names(tensors.shapes)
    bare = names["wte"] not in tensors.shapes and names["wte"].removeprefix(stored.base) in tensors.shapes
    if bare:
        names = {role: name.removeprefix(stored.base) for role, name in names.items()}
    head, table = names["head"], names["wte"]
    wishes, notes = of_folder(folder, s), s.unread(config_json.IDLE)
    if config.tied and differ(tensors, head, table):
        config = replace(config, tied=False)
        notes.append(f"{tensors.file(head)}: {head} is used: it differs from {table}, though tie_word_embeddings is true")
    return Source(
        folder,
        model_type,
        config,
        tensors,
        pieces(config, names, len(tensors.shapes), stored.turned),
        harmless=lambda name: stored.harmless(stored.base + name if bare else name, config),
        copies={head: table} if config.tied else {},
        wishes=wishes,
        notes=[*notes, *wishes.unread],
    )
