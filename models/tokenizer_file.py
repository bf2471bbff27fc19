"""Tokenizers as they are stored: in a GGUF file's keys, or as a folder's tokenizer.json and the files beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from models.chat_file import WORDS, templates_of_folder, templates_of_keys, words_of_folder, words_of_keys
from models.piece import ModelError
from models.settings import read_json
from models.spelled import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, merged, sentencepiece, vocab_and_merges
from models.tokenizer import Tokenizer

# Patterns that cut text into words before merging, by GGUF's `tokenizer.ggml.pre`. Each pattern cuts what the one before has
# left. The patterns are those of the models' own tokenizer.json, as in llama.cpp's list (llama-vocab.cpp).
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
PRE = {
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    "deepseek-v3": _DEEPSEEK3,
}
# These take a word that is a token whole, whatever the merges would make of it. Their texts begin with bos unless the file
# says otherwise.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}
# How the classes of transformers that read vocab.json and merges.txt cut text into words.
_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}


def open_tokenizer(path: Path, metadata: dict[str, object]) -> Tokenizer | None:
    """The tokenizer of the model at `path`, from a GGUF file's `metadata`, or a folder's tokenizer.json, or its vocab.json with
    merges.txt; None if there is none.

    Raises ModelError for a tokenizer that is broken or of a kind that we do not have.
    """
    if "tokenizer.ggml.model" in metadata:
        return _from_gguf(path, metadata)
    if (path / "tokenizer.json").is_file() or all((path / name).is_file() for name in ("vocab.json", "merges.txt")):
        return _from_folder(path)
    return None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _is_text(value: object) -> bool:
    # JSON may spell half a surrogate pair.
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


# What GGUF's keys of a tokenizer must be; the tokenizers library panics at some of what they are not.
_GGUF_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("model", "pre"), ("a text", _is_text)),
    "tokens": ("a list of texts", _are(_is_text)),
    "merges": ("a list of pairs of texts", _are(lambda merge: _is_text(merge) and merge.count(" ") == 1)),
    "token_type": ("a list of whole numbers", _are(_is_whole)),
    "scores": ("a list of numbers", _are(lambda value: isinstance(value, int | float))),
    **dict.fromkeys((f"{key}_token_id" for key in ("bos", "eos", "eot", "eom")), ("a whole number", _is_whole)),
    **dict.fromkeys(("add_bos_token", "add_space_prefix"), ("true or false", lambda value: isinstance(value, bool))),
}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _from_gguf(path: Path, metadata: dict[str, object]) -> Tokenizer:
    """Byte-level BPE, or SentencePiece's, from a GGUF file's keys (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}
    instead = "use the model's Hugging Face folder with its tokenizer.json"
    for key, (what, right) in _GGUF_TYPES.items():
        if key in given and not right(given[key]):
            raise ModelError(f"{path}: tokenizer.ggml.{key} is {_shown(given[key])}, not {what}: {instead}")
    templates = templates_of_keys(metadata)
    for name, template in templates.items():
        if not _is_text(template):
            key = "tokenizer.chat_template" + f".{name}" * (name != "default")
            raise ModelError(f"{path}: {key} is {_shown(template)}, not a text: {instead}")
    if given["model"] not in ("gpt2", "llama"):
        raise ModelError(
            f"{path}: tokenizer.ggml.model {given['model']!r} is neither byte-level BPE, 'gpt2', nor SentencePiece's, 'llama': "
            f"{instead}"
        )
    bytewise, pre = given["model"] == "gpt2", given.get("pre", "default")
    if bytewise and pre not in PRE:
        raise ModelError(f"{path}: tokenizer.ggml.pre {pre!r} is none of {', '.join(PRE)}: {instead}")
    for key in ("tokens", "merges" if bytewise else "scores"):
        if key not in given:
            raise ModelError(f"{path}: the tokenizer has no tokenizer.ggml.{key}: {instead}")
    tokens: list[str] = given["tokens"]
    types = given.get("token_type", [NORMAL] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise ModelError(f"{path}: {len(tokens)} tokens, of which {len(vocabulary)} differ, and {len(types)} token types")
    if strange := sorted(set(types) - set(range(NORMAL, BYTE + 1))):
        raise ModelError(f"{path}: tokenizer.ggml.token_type has {strange[0]}, use {NORMAL} to {BYTE}: {instead}")
    ids = {key: given[f"{key}_token_id"] for key in ("bos", "eos", "eot", "eom") if f"{key}_token_id" in given}
    for key, i in ids.items():
        if not 0 <= i < len(tokens):
            raise ModelError(f"{path}: tokenizer.ggml.{key}_token_id is {i}, there are {len(tokens)} tokens")
    if bytewise:
        merges = [tuple(merge.split(" ")) for merge in given["merges"]]
        try:
            backend = merged(vocabulary, merges, pre in _WHOLE_WORDS)
        except Exception as e:  # the library raises nothing narrower
            raise ModelError(f"{path}: the tokenizer's merges do not fit its tokens: {e}") from None
        _by_bytes(backend, pre)
    else:
        if len(given["scores"]) != len(tokens):
            raise ModelError(f"{path}: {len(tokens)} tokens and {len(given['scores'])} scores: {instead}")
        backend = sentencepiece(tokens, given["scores"], types, bool(given.get("add_space_prefix", True)))
    for kind in (UNKNOWN, CONTROL, *([USER_DEFINED] if bytewise else [])):
        special = kind != USER_DEFINED
        backend.add_tokens(
            [AddedToken(t, normalized=False, special=special) for t, of in zip(tokens, types, strict=True) if of == kind]
        )
    add_bos = bool(given.get("add_bos_token", not bytewise or pre in _WHOLE_WORDS))
    words = words_of_keys(given, lambda i: tokens[i] if 0 <= i < len(tokens) else None)
    return Tokenizer(backend, ids.pop("bos", None), ids.values(), add_bos, templates, words)


def _by_bytes(backend: tokenizers.Tokenizer, pre: str) -> None:
    """Words by the patterns of `pre`, each spelt in GPT-2's characters for bytes."""
    if PRE[pre] is _QWEN2:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()


def _from_parts(folder: Path, said: dict, config: dict) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt, read as tokenizer_config.json (`said`) or else config.json says."""
    qwen = str(config.get("model_type")).startswith("qwen")
    name = str(said.get("tokenizer_class") or ("Qwen2Tokenizer" if qwen else "GPT2Tokenizer")).removesuffix("Fast")
    if name not in _CLASSES:
        known = " or ".join(_CLASSES)
        raise ModelError(f"{folder}: vocab.json is of a {name}, use one of {known}, or a folder with tokenizer.json")
    backend = vocab_and_merges(folder, said)
    _by_bytes(backend, _CLASSES[name])
    if said.get("add_prefix_space") and name == "GPT2Tokenizer":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(True)
    return backend


def _from_folder(folder: Path) -> Tokenizer:
    """tokenizer.json, or vocab.json with merges.txt, with what the files beside say of bos, eos and the chat template."""
    file = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library raises nothing narrower, and its panics are no Exceptions
        raise ModelError(f"{file}: not a tokenizer: {e}") from None
    said, config, generation = (_beside(folder, name) for name in ("tokenizer_config", "config", "generation_config"))
    if backend is None:
        file, backend = folder / "vocab.json", _from_parts(folder, said, config)
    last = max(backend.get_vocab().values(), default=0)
    if last > 2 * backend.get_vocab_size() + 2**20:
        # The library would go through all ids up to it.
        raise ModelError(f"{file}: one of {backend.get_vocab_size()} tokens has the id {last}")
    # Older folders have these apart.
    said = _beside(folder, "special_tokens_map") | {key: value for key, value in said.items() if value is not None}
    _read_flags(backend, said.get("added_tokens_decoder") or {})
    bos = _id(backend, said.get("bos_token"), config.get("bos_token_id"))
    eos = [_id(backend, said.get("eos_token"), None)]
    for i in (config.get("eos_token_id"), generation.get("eos_token_id")):
        eos += i if isinstance(i, list) else [i]
    add_bos = said.get("add_bos_token")
    if add_bos is None:
        # Then only the post-processor knows, which puts tokens round a text.
        add_bos = backend.encode("", add_special_tokens=True).ids[:1] == [bos]
    try:
        templates = templates_of_folder(folder, said)
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError(f"{folder}: a chat template cannot be read: {e}") from None
    try:
        return Tokenizer(backend, bos, [i for i in eos if i is not None], add_bos, templates, words_of_folder(said))
    except ModelError as e:
        raise ModelError(f"{file}: {e}") from None


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _read_flags(backend: tokenizers.Tokenizer, decoder: dict[str, dict]) -> None:
    """Tokens as tokenizer_config.json has them: its word on what is a control token, or takes the blanks beside it, is the
    last."""
    for i, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        known = backend.token_to_id(token["content"])
        if int(i) == (backend.get_vocab_size() if known is None else known):
            backend.add_tokens([AddedToken(token["content"], **{key: bool(token[key]) for key in _FLAGS if key in token})])


def _is_token(value: object) -> bool:
    return _is_text(value["content"] if isinstance(value, dict) and "content" in value else value)


def _is_template(value: object) -> bool:
    return isinstance(value, dict) and _is_text(value.get("name")) and _is_text(value.get("template"))


def _is_decoder(value: object) -> bool:
    return isinstance(value, dict) and all(
        i.isdecimal() and isinstance(t, dict) and _is_text(t.get("content")) for i, t in value.items()
    )


# What the files beside tokenizer.json must say, where they say anything.
_IDS = "a whole number or a list of them", lambda value: _is_whole(value) or _are(_is_whole)(value)
_TYPES = {
    **dict.fromkeys(WORDS, ("a text or an object with its content", _is_token)),
    "added_tokens_decoder": ("an object of tokens by their ids", _is_decoder),
    "add_bos_token": ("true or false", lambda value: isinstance(value, bool)),
    "chat_template": ("a text or a list of them with names", lambda value: _is_text(value) or _are(_is_template)(value)),
    "bos_token_id": ("a whole number", _is_whole),
    "eos_token_id": _IDS,
}


def _beside(folder: Path, name: str) -> dict:
    """What a file beside tokenizer.json says; {} without one."""
    file = folder / f"{name}.json"
    values = read_json(file) if file.is_file() else {}
    for key, (what, right) in _TYPES.items():
        if values.get(key) is not None and not right(values[key]):
            raise ModelError(f"{file}: {key} is {_shown(values[key])}, not {what}")
    return values


def _id(backend: tokenizers.Tokenizer, token: str | dict | None, otherwise: int | None) -> int | None:
    """The id of a token that is given by its text, or by a dict with its text; `otherwise` if it is not given."""
    text = token["content"] if isinstance(token, dict) else token
    return otherwise if text is None else backend.token_to_id(text)
