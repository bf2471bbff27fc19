"""Tokenizers as Hugging Face folders and GGUF files store them, and files that cannot be used."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, normalizers, processors
from tokenizers.models import BPE

from models.piece import ModelError
from models.tokenizer_file import open_tokenizer
from tests.models.vocabulary import END, SMOL, STOP, TEXTS, THINK, TOKENS, WORD, byte_level, folder, keys, small
from tests.mutated import mutated


def test_a_folder_gives_what_the_gguf_gives(tmp_path):
    theirs = folder(tmp_path, byte_level(), tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "chat_template": SMOL})
    ours = small(bos_token_id=None)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.encode(text, special=True) == ours.encode(text, special=True)
    messages = [{"role": "user", "content": "hello"}]
    assert theirs.chat(messages) == ours.chat(messages)
    assert theirs.eos_ids == ours.eos_ids
    assert theirs.bos_id is None


def test_a_folders_bos_and_eos(tmp_path):
    config = {"bos_token_id": END, "eos_token_id": WORD}
    tokenizer = folder(tmp_path, byte_level(), config=config, generation_config={"eos_token_id": [THINK, 5]})
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.eos_ids) == (END, False, {WORD, THINK, 5, END, STOP})
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", END)])
    assert folder(tmp_path, backend, config=config).encode("ab")[0] == END
    assert folder(tmp_path, backend, tokenizer_config={"add_bos_token": False, "bos_token": "<|endoftext|>"}).encode("") == []
    added = folder(tmp_path, byte_level(), tokenizer_config={"add_bos_token": True, "bos_token": "<|endoftext|>"})
    assert added.encode("ab", special=True) == [END, *added.encode("ab", bos=False)]


def test_truncation_and_padding_that_a_folder_has_stored_are_not_for_us(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert len(folder(tmp_path, backend).encode("ababab")) == 3


def test_where_a_folder_keeps_its_template(tmp_path):
    messages = [{"role": "user", "content": "a"}]
    listed = [{"name": "tool_use", "template": "?"}, {"name": "default", "template": SMOL}]
    tokenizer = folder(tmp_path, byte_level(), tokenizer_config={"chat_template": listed})
    assert "Be kind." in tokenizer.decode(tokenizer.chat(messages))
    (tmp_path / "chat_template.jinja").write_text(SMOL.replace("kind", "brief"))
    tokenizer = open_tokenizer(tmp_path, {})
    assert "Be brief." in tokenizer.decode(tokenizer.chat(messages))


def sentencepiece(strip=True):
    """As in the published tokenizer.json of Llama 2."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "▁▁", "ab"]
    merges = [("▁", "a"), ("▁", "▁"), ("a", "b")]
    backend = tokenizers.Tokenizer(
        BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps[: 4 if strip else 3])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def test_sentencepiece(tmp_path):
    tokenizer = folder(tmp_path, sentencepiece(), tokenizer_config={"bos_token": "<s>", "add_bos_token": True})
    assert tokenizer.eos_ids == {2}
    for text in ("a b  ab", " a", "é😀\n"):
        ids = tokenizer.encode(text)
        assert ids[0] == 1
        assert tokenizer.decode(ids) == text == tokenizer._plain.decode(ids)
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text
        stream = tokenizer.stream(continues=True)
        assert "".join(map(stream.push, ids)) + stream.flush() == f" {text}"
    (tmp_path / "unstripped").mkdir()
    tokenizer = folder(tmp_path / "unstripped", sentencepiece(strip=False))
    assert tokenizer.decode(tokenizer.encode("a")) == " a"


def test_folders_that_cannot_be_used(tmp_path):
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match=r"tokenizer.json: the decoder WordPiece is neither byte-level BPE's nor"):
        folder(tmp_path, backend)
    backend.decoder = None
    with pytest.raises(ModelError, match=r"tokenizer.json: the decoder none is neither"):
        folder(tmp_path, backend)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: not JSON"):
        open_tokenizer(tmp_path, {})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer.json: not a tokenizer"):
        open_tokenizer(tmp_path, {})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "llama"}, "small.gguf: tokenizer.ggml.model 'llama' is not byte-level BPE, 'gpt2': use the model's Hugging"),
        ({"pre": "falcon"}, "tokenizer.ggml.pre 'falcon' is none of default, gpt-2, smollm, "),
        ({"merges": None}, "the tokenizer has no tokenizer.ggml.merges"),
        ({"tokens": [*TOKENS[:-1], "h"]}, f"{len(TOKENS)} tokens, of which {len(TOKENS) - 1} differ, and {len(TOKENS)} token"),
        ({"token_type": [1]}, f"{len(TOKENS)} tokens, of which {len(TOKENS)} differ, and 1 token types"),
        ({"merges": ["h y"]}, "the tokenizer's merges do not fit its tokens: "),
        ({"merges": ["hy"]}, "tokenizer.ggml.merges is ..hy.., not a list of pairs of texts"),
        ({"merges": [3]}, "tokenizer.ggml.merges is .3., not a list of pairs of texts"),
        ({"model": 3}, "tokenizer.ggml.model is 3, not a text"),
        ({"pre": ["smollm"]}, "tokenizer.ggml.pre is ..smollm.., not a text"),
        ({"tokens": 3}, "tokenizer.ggml.tokens is 3, not a list of texts"),
        ({"tokens": [*range(300)]}, r"tokenizer.ggml.tokens is .0, 1, .*\.\.\., not a list of texts"),
        ({"token_type": 1.5}, "tokenizer.ggml.token_type is 1.5, not a list of whole numbers"),
        ({"token_type": [True] * len(TOKENS)}, "not a list of whole numbers"),
        ({"bos_token_id": "0"}, "tokenizer.ggml.bos_token_id is '0', not a whole number"),
        ({"eos_token_id": 1.0}, "tokenizer.ggml.eos_token_id is 1.0, not a whole number"),
        ({"add_bos_token": 7}, "tokenizer.ggml.add_bos_token is 7, not true or false"),
        ({"eos_token_id": 10**6}, f"tokenizer.ggml.eos_token_id is 1000000, there are {len(TOKENS)} tokens"),
    ],
)
def test_gguf_that_cannot_be_used(changes, error):
    with pytest.raises(ModelError, match=error):
        small(**changes)


def test_a_gguf_template_that_is_no_text():
    with pytest.raises(ModelError, match=r"tokenizer.chat_template is 3, not a text"):
        open_tokenizer(Path("small.gguf"), keys() | {"tokenizer.chat_template": 3})


@pytest.mark.parametrize("name", ["tokenizer_config", "config", "generation_config", "tokenizer"])
def test_a_folder_is_sound_or_refused(tmp_path, name):
    """What a file of it says, changed in a few places: refused in a line, or a tokenizer that works."""
    files = {
        "config": {"bos_token_id": END, "eos_token_id": WORD},
        "generation_config": {"eos_token_id": [THINK, 5]},
        "tokenizer_config": {
            "bos_token": "<|endoftext|>",
            "eos_token": {"content": "<|im_end|>"},
            "add_bos_token": False,
            "chat_template": [{"name": "default", "template": SMOL}],
        },
    }
    folder(tmp_path, byte_level(), **files)
    file, draw, refusals = tmp_path / f"{name}.json", random.Random(0), 0
    right = json.loads(file.read_text())
    wrong = [json.dumps(mutated(right, draw)) for _ in range(150)] + ["[" * 10**5 + "]" * 10**5, "[]", "null", ""]
    for text in wrong:
        file.write_text(text)
        try:
            tokenizer = open_tokenizer(tmp_path, {})
        except ModelError as error:
            refusals += 1
            said = str(error)
        else:
            said = ""
            assert all(type(i) is int for i in tokenizer.eos_ids)
            assert tokenizer.chats in (True, False)
        assert "\n" not in said
    assert refusals > 10


def test_no_tokenizer(tmp_path):
    assert open_tokenizer(tmp_path, {}) is None
    assert open_tokenizer(tmp_path / "model.gguf", {"general.architecture": "llama"}) is None
