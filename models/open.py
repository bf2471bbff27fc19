"""Opens a pretrained model, whichever of the formats it is stored in."""

from __future__ import annotations

from pathlib import Path

from models.huggingface import open_folder
from models.piece import ModelError
from models.source import Source


def open_model(path: Path | str) -> Source:
    """The model at `path`: a folder with config.json and safetensors files, a GGUF file whatever its name, one of a set of
    them, or a folder with just one of these.

    Reads headers only. Raises ModelError for files that are absent, broken, of an unknown family, with settings that we do not
    have, or with tensors that are missing, surplus or misshapen.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder: give a folder with config.json, or a GGUF file")
    if path.is_dir() and (path / "config.json").exists():
        source = open_folder(path)
    else:
        # Here, as importing the gguf package takes 0.1 s, which a folder can do without.
        from models.gguf_file import open_file

        source = open_file(_file_in(path) if path.is_dir() else _begins_as_gguf(path))
    source.check()
    return source


def _file_in(folder: Path) -> Path:
    """The one GGUF file of a folder, or the first of its one set."""
    from models.gguf_file import SPLIT

    files = sorted(folder.glob("*.gguf"))
    names = {file: SPLIT.fullmatch(file.name) for file in files}
    firsts = [file for file, said in names.items() if said is None or int(said["number"]) == 1]
    if len(firsts) != 1:
        inside = f"{len(files)} .gguf files" if files else "no config.json and no .gguf file"
        raise ModelError(f"{folder}: {inside}: give a folder with config.json, or one .gguf file")
    return firsts[0]


def _begins_as_gguf(file: Path) -> Path:
    """`file`, if it is called a GGUF file, or begins as one: some keep them under the digest of their bytes."""
    try:
        with open(file, "rb") as f:
            begins = f.read(4)
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror}") from None
    if file.suffix != ".gguf" and begins != b"GGUF":
        raise ModelError(f"{file}: neither a folder nor a GGUF file: give the folder with config.json, or a GGUF file")
    return file
