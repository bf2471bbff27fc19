"""Opens a pretrained model, whichever of the formats it is stored in."""

from __future__ import annotations

from pathlib import Path

from models.huggingface import open_folder
from models.piece import ModelError
from models.source import Source


def open_model(path: Path | str) -> Source:
    """The model at `path`: a folder with config.json and safetensors files, a .gguf file, or a folder with just one of these.

    Reads headers only. Raises ModelError for files that are absent, broken, of an unknown family, with settings that we do not
    have, or with tensors that are missing, surplus or misshapen.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder: give a folder with config.json, or a .gguf file")
    file = path
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            inside = f"{len(files)} .gguf files" if files else "no config.json and no .gguf file"
            raise ModelError(f"{path}: {inside}: give a folder with config.json, or one .gguf file")
        file = files[0]
    if file.is_dir():
        source = open_folder(file)
    elif file.suffix == ".gguf":
        # Here, as importing the gguf package takes 0.1 s, which a folder can do without.
        from models.gguf_file import open_file

        source = open_file(file)
    else:
        raise ModelError(f"{path}: neither a folder nor a .gguf file: give the folder with config.json, or a .gguf file")
    source.check()
    return source
