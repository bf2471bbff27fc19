"""Text to ids and back: a small vocabulary made here, folders as Hugging Face writes them, and the real model where it is."""

import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from models import default
from models.default import default_model
from models.source import ModelError, open_model
from models.tokenizer import PRE, Stream, Tokenizer, open_tokenizer

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "Be kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# All bytes, some merges, and two kinds of tokens that no merge makes.
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "u s", "us er", "1 2", "12 3", "Ġ 1", "a b", "Ċ Ċ"]
TOKENS = [*LETTERS, *(m.replace(" ", "") for m in MERGES), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "Ġword"]
TYPES = [1] * (len(TOKENS) - 5) + [3, 3, 3, 4, 1]
END, START, STOP, THINK, WORD = range(len(TOKENS) - 5, len(TOKENS))


def keys(**changes):
    """GGUF's keys of the small vocabulary. None leaves one out."""
    given = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "token_type": TYPES, "merges": MERGES}
    given |= {"bos_token_id": END, "eos_token_id": STOP, "add_bos_token": False} | changes
    found = {f"tokenizer.ggml.{key}": value for key, value in given.items() if value is not None}
    return {"tokenizer.chat_template": SMOL} | found


def small(**changes):
    return open_tokenizer(Path("small.gguf"), keys(**changes))


def written(tokenizer, ids):
    """Each token by its own text."""
    return [tokenizer.decode([i], special=True) for i in ids]


# Whole texts.

TEXTS = ["", " ", "hello hello  hello", "I'm 12345\r\n\n\tyou'Ll", "naïve 你好 😀👍🏽 e\u0301", "<|im_end|><think>", "a\u00a0b\u2028\ufeff", "\x00\x7f"]


@pytest.mark.parametrize("pre", PRE)
def test_what_is_encoded_comes_back(pre):
    tokenizer = small(pre=pre)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == ("naïve 你好 😀👍🏽 é" if "naïve" in text and pre in ("qwen2", "megrez", "deepseek-r1-qwen") else text)
        assert set(ids).isdisjoint({END, START, STOP})
        with_special = tokenizer.encode(text, special=True)
        assert tokenizer.decode(with_special, special=True) == tokenizer.decode(ids)


def test_merges_and_words():
    tokenizer = small()
    assert written(tokenizer, tokenizer.encode("hello hello user")) == ["hello", " hello", " ", "user"]


WORDS = {
    "gpt-2": ["I", "'m", " owed", " 12345", "€", "\n\n   ", " x", "'Ll"],
    "smollm": ["I", "'m", " owed", " ", "1", "2", "3", "4", "5", "€", "\n\n   ", " x", "'Ll"],
    "llama-bpe": ["I", "'m", " owed", " ", "123", "45", "€\n\n", "   ", " x", "'Ll"],
    "qwen2": ["I", "'m", " owed", " ", "1", "2", "3", "4", "5", "€\n\n", "   ", " x", "'Ll"],
    "tekken": ["I", "'m", " owed", " ", "1", "2", "3", "4", "5", "€\n\n", "   ", " x", "'", "Ll"],
    "deepseek-v3": ["I", "'m", " owed", " ", "123", "45", "€\n\n", "   ", " x", "'Ll"],
    "default": ["I", "'", "m", " owed", " ", "123", "45", "€", "\n\n   ", " x", "'", "Ll"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_text_is_cut_into_words_as_the_file_says(pre):
    text, words = "I'm owed 12345€\n\n    x'Ll", WORDS[pre]
    assert "".join(words) == text
    letter = dict(zip(sorted(range(256), key=lambda b: tokenizers_letter(b)), LETTERS, strict=True))
    spelt = ["".join(letter[b] for b in word.encode()) for word in words]
    # A vocabulary in which every word of this text is a token.
    merges, tokens = [], [*LETTERS]
    for word in spelt:
        for n in range(1, len(word)):
            if word[: n + 1] not in tokens:
                merges.append(f"{word[:n]} {word[n]}")
                tokens.append(word[: n + 1])
    tokenizer = small(pre=pre, tokens=tokens, merges=merges, token_type=None, bos_token_id=None, eos_token_id=None)
    assert written(tokenizer, tokenizer.encode(text)) == words


def tokenizers_letter(byte):
    """The library's own letter for a byte."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0][-1]
