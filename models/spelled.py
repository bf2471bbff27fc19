"""Tokenizers that are stored in parts: SentencePiece's scores, as GGUF has them, and GPT-2's vocab.json with merges.txt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from models.piece import ModelError
from models.settings import read_json

# GGUF's types of tokens (llama.cpp's llama_token_type): ordinary ones; the one for what is unknown; control tokens, which steer
# the model; user-defined ones, which are one token wherever they stand; unused ones; bytes.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def sentencepiece(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], leading: bool) -> tokenizers.Tokenizer:
    """SentencePiece's BPE (Kudo and Richardson, arXiv 1808.06226): of two neighbours those are joined whose token has the best
    score. What no token spells is spelt by bytes, if there is one for each. `leading`: a space is put before a text.

    Raises ModelError for bytes that are not all there.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    rank = {t: score for t, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    merges = [
        (score, left, right)
        for token, score in rank.items()
        for n in range(1, len(token))
        if (left := token[:n]) in rank and (right := token[n:]) in rank
    ]
    # Of one token made in several ways, whichever comes first in the vocabulary.
    merges.sort(key=lambda m: (-m[0], vocabulary[m[1]], vocabulary[m[2]]))
    known = [f"<0x{b:02X}>" in vocabulary for b in range(256)]
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    if not all(known) and (any(known) or unknown is None):
        raise ModelError(f"the tokenizer has {sum(known)} of 256 tokens for bytes and no token for what is unknown")
    pairs = [(left, right) for _, left, right in merges]
    whole = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    spelt = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": all(known), "ignore_merges": bool(whole)}
    backend = tokenizers.Tokenizer(BPE(vocabulary, pairs, **spelt))
    if whole:
        # Not as added tokens, behind each of which a text would begin anew.
        pattern = "|".join(re.escape(token) for token in sorted(whole, key=len, reverse=True))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    spaces = [normalizers.Prepend("\u2581")] if leading else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if leading else [])])
    return backend


def merged(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], whole: bool = False) -> tokenizers.Tokenizer:
    """BPE of these tokens; `whole`: a word that is one stays one. Raises an Exception, the library's or our own, where merges
    do not fit them."""
    longest = max((len(token.encode()) for token in vocabulary), default=0)
    # Of one that makes no token the library says so, but at one that is longer than all tokens it panics.
    if long := next((pair for pair in merges if len("".join(pair).encode()) > longest), None):
        raise ValueError(f"merge {' '.join(long)!r} makes no token")
    return tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))


def vocab_and_merges(folder: Path, config: Mapping[str, object]) -> tokenizers.Tokenizer:
    """Byte-level BPE from vocab.json and merges.txt, with the tokens that tokenizer_config.json (`config`), added_tokens.json
    and special_tokens_map.json add. Raises ModelError for files that are broken or do not fit one another."""
    vocabulary, file = read_json(folder / "vocab.json"), folder / "merges.txt"
    try:
        lines = file.read_text("utf-8").splitlines()
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        backend = merged(vocabulary, merges)
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror}") from None
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{file}: does not fit vocab.json: {error}") from None
    for token, i in sorted(_added(folder, config, vocabulary).items(), key=lambda pair: pair[1]):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise ModelError(f"{folder}: token {token.content!r} has id {i}, but comes after {backend.get_vocab_size()} others")
    return backend


def _added(folder: Path, config: Mapping[str, object], vocabulary: Mapping[str, int]) -> dict[AddedToken, int]:
    """Tokens that are one wherever they stand, and their ids."""
    ids: dict[str, int] = {}
    special = {"<|endoftext|>"} & vocabulary.keys()
    beside = {name: folder / f"{name}.json" for name in ("added_tokens", "special_tokens_map")}
    said = {name: read_json(file) if file.is_file() else {} for name, file in beside.items()}
    ids |= {token: i for token, i in said["added_tokens"].items() if isinstance(i, int)}
    decoder = config.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and key.isdecimal():
            ids[token["content"]] = int(key)
            special |= {token["content"]} if token.get("special") else set()
    for value in said["special_tokens_map"].values():
        for token in value if isinstance(value, list) else [value]:
            special.add(token["content"] if isinstance(token, dict) and "content" in token else token)
    ids |= {token: vocabulary[token] for token in special if isinstance(token, str) and token in vocabulary}
    return {AddedToken(token, special=token in special, normalized=False): i for token, i in ids.items()}
