"""Where chat templates are stored, and the words that they may call by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

# Transformers' names of special tokens, and what GGUF calls those of them that it has.
WORDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GGUF = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token", "seperator": "sep_token"}


def templates_of_folder(folder: Path, said: Mapping[str, object]) -> dict[str, str]:
    """By name: chat_template.jinja and what lies beside it in additional_chat_templates, or else what tokenizer_config.json
    has `said`, a text or a list of named ones."""
    file, more = folder / "chat_template.jinja", folder / "additional_chat_templates"
    given = said.get("chat_template")
    listed = {t["name"]: t["template"] for t in given} if isinstance(given, list) else {"default": given} if given else {}
    if file.is_file():
        listed = {"default": file.read_text("utf-8")}
    return listed | {path.stem: path.read_text("utf-8") for path in sorted(more.glob("*.jinja"))}


def words_of_folder(said: Mapping[str, object]) -> dict[str, str]:
    """What tokenizer_config.json has `said` of special tokens: each a text, or an object with its content."""
    given = {name: said[name] for name in WORDS if said.get(name) is not None}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in given.items()}


def templates_of_keys(metadata: Mapping[str, object]) -> dict[str, object]:
    """By name: tokenizer.chat_template, and tokenizer.chat_template.NAME."""
    key = "tokenizer.chat_template"
    named = {k.removeprefix(f"{key}."): text for k, text in metadata.items() if k.startswith(f"{key}.")}
    return named | ({"default": metadata[key]} if metadata.get(key) is not None else {})


def words_of_keys(given: Mapping[str, object], token: Callable[[int], str | None]) -> dict[str, str]:
    """The texts of the special tokens whose ids a GGUF file has `given`."""
    ids = {word: given.get(f"{key}_token_id") for key, word in _GGUF.items()}
    return {word: text for word, i in ids.items() if isinstance(i, int) and (text := token(i)) is not None}
