"""Text to token ids and back, whole and as it comes, through the `tokenizers` library."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from models.piece import ModelError

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
# GGUF's types of extraordinary tokens: control tokens steer the model, and user-defined ones are one token wherever they stand.
_CONTROL, _USER_DEFINED = 3, 4
# These control tokens end a turn or a text, even if a file names another one as its eos.
_ENDS = {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>"}
_ENDS |= {"<\uff5cend\u2581of\u2581sentence\uff5c>"}  # DeepSeek's
_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


def _alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (GPT-2): itself if it can be printed, else one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _alphabet()


class Tokenizer:
    """`bos_id`: the token that begins a text, or None. `add_bos`: whether `encode` puts it there. `eos_ids`: tokens that end
    a text. `vocabulary`: how many tokens there are; a model may have rows for more.

    Special tokens are the control tokens, such as <|im_end|>. Text that looks like one stays text unless the caller asks for
    `special`, so that what a user types can neither end a turn nor begin one. Safe to use from several threads.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        add_bos: bool = False,
        template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        # Some files do not mark these as control tokens.
        turns = [t for t in (_IM_START, _IM_END) if backend.token_to_id(t) is not None]
        marked = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        backend.add_tokens([AddedToken(t, special=True, normalized=False) for t in turns if t not in marked])
        backend.encode_special_tokens = True
        self._plain = backend
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = {i for i, token in self._added.items() if token.special}
        self._byte_level, self._strip = _spelling(backend.decoder)
        self._bytes: dict[int, bytes] = {}
        self.vocabulary = backend.get_vocab_size()
        self.bos_id, self.add_bos = bos_id, add_bos and bos_id is not None
        self.eos_ids = set(eos_ids) | {i for i in self._special_ids if self._added[i].content in _ENDS}
        self._template = template

    @cached_property
    def _special(self) -> tokenizers.Tokenizer:
        # A second tokenizer, as encode_special_tokens is a tokenizer's setting and not a call's. A copy does not have it.
        return tokenizers.Tokenizer.from_str(self._plain.to_str())

    def encode(self, text: str, special: bool = False, bos: bool | None = None) -> list[int]:
        """Token ids of `text`. `special`: a control token's text becomes that token. `bos`: whether bos leads, by
        default `add_bos`.

        A byte that the vocabulary lacks is left out (SmolLM2 lacks 0x04 and 20 others). Raises ValueError for text that is not
        Unicode: half a surrogate pair, as JSON may hold.
        """
        backend = self._special if special else self._plain
        try:
            ids = backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None) if isinstance(text, str) else None
            if at is None:
                raise
            raise ValueError(f"text is not Unicode: character {at} is half a surrogate pair, {text[at]!r}") from None
        lead = self.add_bos if bos is None else bos
        return [self.bos_id, *ids] if lead and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of `ids`, with control tokens only if `special`. Bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(self.bytes_of(int(i), special) for i in ids).decode("utf-8", "replace")
        return text[1:] if self._strip and text.startswith(" ") else text

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks next, in ChatML.

        `messages`: dicts of role and content. The template's own system prompt leads unless the first message is one. Raises
        ValueError for any other message, and for a model whose chat template is not ChatML's or which has none.
        """
        if self._template is None:
            raise ValueError("this model has no chat template: give it a prompt to continue")
        start, end = (self._plain.token_to_id(t) for t in (_IM_START, _IM_END))
        if _IM_START not in self._template or start is None or end is None:
            raise ValueError(f"this model's chat template is not ChatML ({_IM_START}), the only one known: give it a prompt")
        turns = [_checked(n, m) for n, m in enumerate(messages)]
        if not turns:
            raise ValueError("there is no message to answer: give one at least")
        default = _default_system(self._template)
        if default is not None and turns[0][0] != "system":
            turns.insert(0, ("system", default))
        newline = self.encode("\n", bos=False)
        said = [[start, *self.encode(f"{role}\n{content}", bos=False), end, *newline] for role, content in turns]
        ids = [*chain.from_iterable(said), start, *self.encode("assistant\n", bos=False)]
        return [self.bos_id, *ids] if self.add_bos else ids

    @property
    def chats(self) -> bool:
        """Whether there is a template that `chat` knows."""
        return self._template is not None and _IM_START in self._template and self._plain.token_to_id(_IM_START) is not None

    def stream(self, stop: Sequence[str] = (), continues: bool = False) -> Stream:
        """A stream that turns ids into text one by one. `stop`: texts at which it ends. `continues`: the text goes on from
        another. A SentencePiece model's space before the first word then belongs to it."""
        return Stream(self, stop, continues)

    def bytes_of(self, i: int, special: bool = False) -> bytes:
        """The bytes of one token, maybe part of a character. There are none for an id without a token, which a vocabulary that
        is rounded up has, and none for a control token unless `special`."""
        if i in self._special_ids and not special:
            return b""
        known = self._bytes.get(i)
        if known is None:
            known = self._bytes[i] = self._spelt(i)
        return known

    def _spelt(self, i: int) -> bytes:
        token = self._plain.id_to_token(i) if i >= 0 else None
        if token is None:
            return b""
        if i in self._added:
            return token.encode()
        if self._byte_level:
            return bytes(_BYTE_OF[c] for c in token) if all(c in _BYTE_OF for c in token) else token.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


class Stream:
    """Text of ids that come one by one. All that `push` has returned, and what `flush` returns in the end, is `decode` of all.

    The stream holds back the bytes of a character that is not complete, and text that may become a stop string. The text ends
    before the stop string that is complete first. `stopped` is then true, and what comes after is discarded. A token takes the
    same time whatever has come before.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), continues: bool = False) -> None:
        if not all(stop):
            raise ValueError("a stop string is empty: give at least one character")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._strip = tokenizer._strip and not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, i: int) -> str:
        """The text that has become certain with this token: often a word, sometimes nothing."""
        return self._passed(self._decoder.decode(self._tokenizer.bytes_of(int(i))))

    def flush(self) -> str:
        """What was held back; to be called at the end."""
        text = self._passed(self._decoder.decode(b"", True))
        text, self._held = text + self._held, ""
        return text

    def _passed(self, text: str) -> str:
        if self.stopped:
            return ""
        if self._strip and text:
            text, self._strip = text.removeprefix(" "), False
        text = self._held + text
        # The first to be complete, not the first to begin. So it does not matter how the tokens cut the text.
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self._held, self.stopped = "", True
            return text[: min(ends)[1]]
        longest = max((len(s) for s in self._stop), default=1)
        begun = (n for n in range(min(longest - 1, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stop))
        sure = len(text) - next(begun, 0)
        self._held = text[sure:]
        return text[:sure]


def open_tokenizer(path: Path, metadata: dict[str, object]) -> Tokenizer | None:
    """The tokenizer of the model at `path`, from a GGUF file's `metadata` or a folder's tokenizer.json; None if there is none.

    Raises ModelError for a tokenizer that is broken or of a kind that we do not have.
    """
    if "tokenizer.ggml.model" in metadata:
        return _from_gguf(path, metadata)
    if (path / "tokenizer.json").is_file():
        return _from_folder(path)
    return None


def _from_gguf(path: Path, metadata: dict[str, object]) -> Tokenizer:
    """Byte-level BPE from a GGUF file's keys (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if key.startswith("tokenizer.ggml.")}
    instead = "use the model's Hugging Face folder with its tokenizer.json"
    if given["model"] != "gpt2":
        raise ModelError(f"{path}: tokenizer.ggml.model {given['model']!r} is not byte-level BPE, 'gpt2': {instead}")
    pre = given.get("pre", "default")
    if pre not in PRE:
        raise ModelError(f"{path}: tokenizer.ggml.pre {pre!r} is none of {', '.join(PRE)}: {instead}")
    for key in ("tokens", "merges"):
        if key not in given:
            raise ModelError(f"{path}: the tokenizer has no tokenizer.ggml.{key}: {instead}")
    tokens: list[str] = list(given["tokens"])
    types = list(given.get("token_type", [1] * len(tokens)))
    merges = [tuple(merge.split(" ")) for merge in given["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise ModelError(f"{path}: {len(tokens)} tokens, of which {len(vocabulary)} differ, and {len(types)} token types")
    ids = {key: given[f"{key}_token_id"] for key in ("bos", "eos", "eot", "eom") if f"{key}_token_id" in given}
    for key, i in ids.items():
        if not 0 <= i < len(tokens):
            raise ModelError(f"{path}: tokenizer.ggml.{key}_token_id is {i}, there are {len(tokens)} tokens")
    try:
        backend = tokenizers.Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    except Exception as e:  # the library raises nothing narrower
        raise ModelError(f"{path}: the tokenizer's merges do not fit its tokens: {e}") from None
    if PRE[pre] is _QWEN2:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    for kind in (_CONTROL, _USER_DEFINED):
        added = [
            AddedToken(t, normalized=False, special=kind == _CONTROL) for t, of in zip(tokens, types, strict=True) if of == kind
        ]
        backend.add_tokens(added)
    add_bos = bool(given.get("add_bos_token", pre in _WHOLE_WORDS))
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, ids.pop("bos", None), ids.values(), add_bos, template)


def _from_folder(folder: Path) -> Tokenizer:
    """tokenizer.json, with what the files beside it say of bos, eos and the chat template."""
    file = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises nothing narrower
        raise ModelError(f"{file}: not a tokenizer: {e}") from None
    said, config, generation = (_json(folder / f"{name}.json") for name in ("tokenizer_config", "config", "generation_config"))
    bos = _id(backend, said.get("bos_token"), config.get("bos_token_id"))
    eos = [_id(backend, said.get("eos_token"), None)]
    for i in (config.get("eos_token_id"), generation.get("eos_token_id")):
        eos += i if isinstance(i, list) else [i]
    add_bos = said.get("add_bos_token")
    if add_bos is None:
        # Then only the post-processor knows, which puts tokens round a text.
        add_bos = backend.encode("", add_special_tokens=True).ids[:1] == [bos]
    template = said.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    try:
        return Tokenizer(backend, bos, [i for i in eos if i is not None], add_bos, template)
    except ModelError as e:
        raise ModelError(f"{file}: {e}") from None


def _json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as e:
        raise ModelError(f"{file}: not JSON: {e}") from None


def _id(backend: tokenizers.Tokenizer, token: str | dict | None, otherwise: int | None) -> int | None:
    """The id of a token that is given by its text, or by a dict with its text; `otherwise` if it is not given."""
    text = token["content"] if isinstance(token, dict) else token
    return otherwise if text is None else backend.token_to_id(text)


def _spelling(decoder: decoders.Decoder | None) -> tuple[bool, bool]:
    """Whether tokens are spelt in GPT-2's characters for bytes, and not as SentencePiece spells them; and whether the first
    space of a text is stripped."""
    steps = {} if decoder is None else json.loads(decoder.__getstate__())
    parts = {part["type"]: part for part in steps.get("decoders", [steps] if steps else [])}
    if parts.keys() - {"Fuse"} == {"ByteLevel"}:
        return True, False
    spaces = parts.get("Metaspace", parts.get("Replace", {}))
    if parts.keys() <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"} and "\u2581" in (
        spaces.get("replacement"),
        spaces.get("pattern", {}).get("String"),
    ):
        return False, "Strip" in parts or spaces.get("prepend_scheme", "never") != "never"
    raise ModelError(f"the decoder {'+'.join(parts) or 'none'} is neither byte-level BPE's nor SentencePiece's")


def _checked(n: int, message: dict[str, str]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {n} has role {role!r}: use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {n} has content {content!r}: use a text")
    return role, content


def _default_system(template: str) -> str | None:
    """The system prompt of a ChatML template for a conversation without one: a system turn that it holds as one whole text."""
    for turn in re.finditer(r"<\|im_start\|>system(?:\n|\\n)((?:(?!<\|im_)[^{}])+)<\|im_end\|>", template):
        if not re.search(r"""['"]\s*[+~|]""", turn[1]):
            return re.sub(r"\\(.)", lambda escaped: "\n" if escaped[1] == "n" else escaped[1], turn[1])
    return None
