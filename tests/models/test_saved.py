"""Models that we write as Hugging Face folders: the files that Transformers has written of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers

from models import saved
from models.build import build
from models.config import Experts, gpt2_like, llama_like
from models.open import open_model
from models.piece import ModelError
from models.tokenizer_file import open_tokenizer
from parallel.alone import Alone
from tests.models.test_gguf import as_gguf
from tests.models.test_models import FAMILIES, NAMES, arrays_of
from tests.models.vocabulary import TEXTS

WRITTEN = [name for name in NAMES if not name.startswith("deepseek")]


def arrays(source):
    """All arrays of a model by our names."""
    model = build(source.config, Alone("tp"), source.weights("float32"))
    return {p.name: p.data.copy() for p in model.parameters}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_tensors_are_those_that_transformers_writes(name):
    source, theirs = open_model(FAMILIES / name), arrays_of(FAMILIES / name)
    settings = saved.described(source.config)
    given = json.loads((FAMILIES / name / "config.json").read_text())
    assert settings["model_type"] == given["model_type"]
    assert settings["architectures"] == given["architectures"]
    ours = saved.tensors(settings, source.config, arrays(source))
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(ours[key], x, err_msg=key)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_settings_say_the_same_model(tmp_path, name):
    source = open_model(FAMILIES / name)
    settings = saved.described(source.config)
    tensors = saved.tensors(settings, source.config, arrays(source))
    saved.write(tmp_path, settings, tensors, saved.beside(None))
    again = open_model(tmp_path)
    assert again.notes == []
    assert saved._same(again.config, source.config)
    assert not saved._same(replace(again.config, eps=1e-3), source.config)


def test_a_gguf_file_that_rotates_neighbours_becomes_a_folder_that_rotates_halves(tmp_path):
    source = open_model(as_gguf(tmp_path, "llama-tied-odd"))
    assert source.config.rope.pairing == "interleaved"
    settings = saved.described(source.config)
    ours = saved.tensors(settings, source.config, arrays(source), "interleaved")
    for key, x in arrays_of(FAMILIES / "llama-tied-odd").items():
        np.testing.assert_array_equal(ours[key], x, err_msg=key)


def test_what_no_family_says_is_refused():
    plain = llama_like(256, 16, 2, 4, 2, 22, 24)
    assert saved.described(plain)["model_type"] == "llama"
    assert saved.described(gpt2_like(256, 16, 2, 4, 22, 24))["model_type"] == "gpt2"
    assert saved.described(replace(plain, experts=Experts(4, 2, 22)))["model_type"] == "mixtral"
    assert saved.described(replace(plain, windows=(5, 5)))["model_type"] == "mistral"
    assert saved.described(replace(plain, windows=(0, 5)))["model_type"] == "smollm3"
    for experts in (Experts(4, 2, 22, 22), Experts(4, 2, 22, scoring="sigmoid"), Experts(4, 2, 22, first=1)):
        with pytest.raises(ModelError, match="no published family that we write has such layers"):
            saved.described(replace(plain, experts=experts))


def test_bytes_are_the_tokens(tmp_path):
    for name, content in saved.beside(None).files.items():
        (tmp_path / name).write_bytes(content)
    tokenizer = open_tokenizer(tmp_path, {})
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text
        assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(list(text.encode())) == text
    assert tokenizer.eos_ids == set()
    assert not tokenizer.chats
