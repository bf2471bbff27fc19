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
from tests.harness import ROOT
from tests.models.vocabulary import END, MERGES, SMOL, STOP, TEXTS, THINK, TOKENS, TYPES, WORD, byte_level, folder, keys, small
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


SCORED = json.loads((ROOT / "tests/oracles/sentencepiece.json").read_text())


def scored(**changes):
    given = SCORED["keys"] | changes
    return open_tokenizer(Path("scored.gguf"), {f"tokenizer.ggml.{k}": v for k, v in given.items() if v is not None})


@pytest.mark.parametrize("text", SCORED["texts"])
def test_gguf_scores_give_the_ids_of_sentencepiece(text):
    tokenizer, ids = scored(), SCORED["texts"][text]
    assert tokenizer.encode(text) == [tokenizer.bos_id, *ids]
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text.replace("\u2581", " ")


def test_gguf_token_types_and_what_sentencepiece_leaves_out():
    tokenizer = scored(add_space_prefix=False, add_bos_token=False)
    tokens = SCORED["keys"]["tokens"]
    assert tokenizer.encode("a<s>")[-1] != tokens.index("<s>")
    assert tokenizer.encode("a<s>", special=True)[-1] == tokens.index("<s>")
    assert tokenizer.encode("<sep>a") == [tokens.index("<sep>"), tokens.index("a")]
    assert tokenizer.eos_ids == {2}
    assert tokenizer.decode(tokenizer.encode(" a b")) == " a b"
    assert scored(token_type=None).encode("a", bos=False) == [tokens.index("\u2581a")]


def test_a_wrong_order_of_scores_is_seen():
    turned = scored(scores=[-s for s in SCORED["keys"]["scores"]])
    assert any(turned.encode(text, bos=False) != ids for text, ids in SCORED["texts"].items())


def test_vocab_and_merges_are_the_tokenizer_that_they_were_saved_from(tmp_path):
    """As GPT-2's and Qwen2's own repositories have them."""
    for name, pre in (("GPT2Tokenizer", "gpt-2"), ("Qwen2Tokenizer", "qwen2")):
        path = tmp_path / name
        path.mkdir()
        plain = [t for t, kind in zip(TOKENS, TYPES, strict=True) if kind == 1]
        ids = {t: i for i, t in enumerate(TOKENS) if t not in plain}
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
        # The last ordinary token has the last id.
        vocabulary = {t: i for i, t in enumerate([*plain, *ids])}
        (path / "vocab.json").write_text(json.dumps({t: vocabulary[t] for t in plain}))
        added = {str(vocabulary[t]): {"content": t, "special": t != "<think>"} for t in ids}
        said = {"tokenizer_class": name, "added_tokens_decoder": added, "eos_token": "<|im_end|>", "chat_template": SMOL}
        (path / "tokenizer_config.json").write_text(json.dumps(said))
        got, want = open_tokenizer(path, {}), small(pre=pre)
        for text in TEXTS:
            theirs = [TOKENS[i] for i in want.encode(text, special=True)]
            assert [got._plain.id_to_token(i) for i in got.encode(text, special=True)] == theirs
        assert got.eos_ids == {vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]}
        assert got.decode(got.encode(TEXTS[4])) == TEXTS[4]
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ModelError, match=r"vocab.json is of a BertTokenizer, use one of GPT2Tokenizer or Qwen2Tokenizer, or a"):
        open_tokenizer(path, {})
    (path / "tokenizer_config.json").unlink()
    (path / "merges.txt").write_text("x y z\n")
    with pytest.raises(ModelError, match=r"merges.txt: does not fit vocab.json: "):
        open_tokenizer(path, {})


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
        ({"model": "t5"}, "small.gguf: tokenizer.ggml.model 't5' is neither byte-level BPE, 'gpt2', nor SentencePiece's"),
        ({"model": "llama"}, "small.gguf: the tokenizer has no tokenizer.ggml.scores: use the model's Hugging"),
        ({"model": "llama", "scores": [0.5]}, f"{len(TOKENS)} tokens and 1 scores"),
        ({"model": "llama", "scores": ["0"]}, "tokenizer.ggml.scores is ..0.., not a list of numbers"),
        (
            {"model": "llama", "scores": [0.0] * len(TOKENS)},
            "the tokenizer has 0 of 256 tokens for bytes and no token for",
        ),
        ({"token_type": [7] * len(TOKENS)}, "tokenizer.ggml.token_type has 7, use 1 to 6"),
        ({"pre": "falcon"}, "tokenizer.ggml.pre 'falcon' is none of default, gpt-2, smollm, "),
        ({"merges": None}, "the tokenizer has no tokenizer.ggml.merges"),
        ({"tokens": [*TOKENS[:-1], "h"]}, f"{len(TOKENS)} tokens, of which {len(TOKENS) - 1} differ, and {len(TOKENS)} token"),
        ({"token_type": [1]}, f"{len(TOKENS)} tokens, of which {len(TOKENS)} differ, and 1 token types"),
        ({"merges": ["h y"]}, "the tokenizer's merges do not fit its tokens: "),
        ({"merges": ["<|endoftext|> <|endoftext|>"]}, "its tokens: merge '.*' makes no token"),
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


def test_a_tokenizer_at_which_the_library_panics(tmp_path):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(ModelError, match=r"tokenizer.json: not a tokenizer: "):
        open_tokenizer(tmp_path, {})


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
