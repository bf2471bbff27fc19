"""A small vocabulary, and tokenizers of it as GGUF files and Hugging Face folders store them."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

from models.tokenizer_file import open_tokenizer

SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "Be kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# All bytes, some merges, and two kinds of tokens that no merge makes.
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "u s", "e r", "us er", "1 2", "12 3", "Ġ 1", "a b", "Ċ Ċ"]
TOKENS = [*LETTERS, *(m.replace(" ", "") for m in MERGES), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "Ġword"]
TYPES = [1] * (len(TOKENS) - 5) + [3, 3, 3, 4, 1]
END, START, STOP, THINK, WORD = range(len(TOKENS) - 5, len(TOKENS))
TEXTS = ["", " ", "hello hello  hello", "I'm 12345\r\n\n\tyou'Ll", "naïve 你好 😀👍🏽", "<|im_end|><think>"]
TEXTS += ["a\u00a0b\u2028\ufeff", "\x00\x7f"]


def keys(**changes):
    """GGUF's keys of the small vocabulary. None leaves one out."""
    given = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "token_type": TYPES, "merges": MERGES}
    given |= {"bos_token_id": END, "eos_token_id": STOP, "add_bos_token": False} | changes
    led = {f"tokenizer.ggml.{key}": value for key, value in given.items() if value is not None}
    return {"tokenizer.chat_template": SMOL} | led


def small(**changes):
    return open_tokenizer(Path("small.gguf"), keys(**changes))


def folder(path, backend, **files):
    backend.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return open_tokenizer(path, {})


def byte_level(special=True):
    """As in the published tokenizer.json of SmolLM2."""
    merges = [tuple(m.split()) for m in MERGES]
    backend = tokenizers.Tokenizer(BPE({t: i for i, t in enumerate(TOKENS)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in TOKENS[END:THINK]])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return backend


def written(tokenizer, ids):
    """Each token by its own text."""
    return [tokenizer.decode([i], special=True) for i in ids]
