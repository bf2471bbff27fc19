"""Input that is broken, or made to harm: each is one line of error, and nothing that it claims is believed."""

import argparse
import json
import os

import numpy as np
import pytest

from launch.options import UsageError
from launch.pretrained import sequences
from models.open import open_model
from models.piece import ModelError
from tests.inside import inside
from tests.launch.serving import tiny_model
from tests.models.test_models import edited, refused


def header(shape, descr="<i8"):
    """An .npy file's beginning."""
    return raw(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}")


def raw(text):
    text = text.ljust(118) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


ARRAYS = {
    "empty": b"",
    "only magic": b"\x93NUMPY",
    "8 TiB that are not there": header("(1099511627776,)"),
    "beyond C": header(f"({2**70},)"),
    "fewer than none": header("(-1,)"),
    "none": header("(0,)"),
    "objects": header("(1,)", "|O"),
    "a pickle": b"\x80\x04N.",
    "half a zip": b"PK\x03\x04",
    "nested": raw("(" * 9000),
    "signs": raw("-" * 9000),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_tokens_file_that_is_none(tmp_path, name):
    file = tmp_path / "ids.npy"
    file.write_bytes(ARRAYS[name])
    args = argparse.Namespace(tokens=None, tokens_file=file)
    with pytest.raises(UsageError, match=f"^--tokens-file {file}.*: use ") as error:
        sequences(args, None, None)
    assert "\n" not in str(error.value)


def test_a_tokens_file_is_not_believed_to_fit(tmp_path):
    file = tmp_path / "ids.npy"
    file.write_bytes(header("(1099511627776,)"))
    try:
        # All holes.
        os.truncate(file, file.stat().st_size + 8 * 2**40)
    except OSError as error:
        pytest.skip(f"no file of 8 TiB here: {error.strerror}")
    with pytest.raises(UsageError, match="holds 1,099,511,627,776 tokens, more than memory does: use fewer"):
        sequences(argparse.Namespace(tokens=None, tokens_file=file), None, None)
    np.save(file, np.arange(6).reshape(2, 3))
    assert sequences(argparse.Namespace(tokens=None, tokens_file=file), None, None).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_text_that_is_not_utf_8(comm, tmp_path):
    # As Python hands on an argument of the bytes 61 ff.
    model = ("--model", str(tiny_model(tmp_path)))
    for command, option in (("generate", "--prompt"), ("generate", "--chat"), ("score", "--text")):
        said = inside(comm, command, *model, option, "a\udcff", status=2)
        assert "text is not Unicode: character " in said
    file = tmp_path / "text"
    file.write_bytes(b"a\xff")
    assert "use a file of UTF-8 text" in inside(comm, "score", *model, "--text-file", file, status=2)


def test_settings_that_no_model_has(tmp_path):
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}
    for n, (config, said) in enumerate(
        [
            ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
            ({"max_position_embeddings": 10**400}, "max_position_embeddings is 1000"),
            ({"rope_scaling": llama3}, "low_freq_factor is 4.0: use less than high_freq_factor, 4"),
        ]
    ):
        assert said in refused(edited(tmp_path / str(n), "llama", config))
    folder = edited(tmp_path / "deep", "llama")
    (folder / "config.json").write_text('{"a":' * 10**5)
    assert "config.json: not JSON: it is nested too deeply" in refused(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", ".", "..", ""])
def test_an_index_that_leads_out_of_its_folder(tmp_path, name):
    folder = edited(tmp_path, "llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert f"weight_map names {name!r}: use files in its own folder" in refused(folder)


def test_nested_arrays_in_a_gguf_header(tmp_path):
    file = tmp_path / "deep.gguf"
    array = (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    keys = (1).to_bytes(8, "little") + b"x" + (9).to_bytes(4, "little") + array * 10**5
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + keys)
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        open_model(file)
