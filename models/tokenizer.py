"""Text to token ids and back, whole and as it comes, through the `tokenizers` library."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import tokenizers
from tokenizers import AddedToken, decoders

from models.chat import Chat
from models.piece import ModelError
from models.template_error import TemplateError

# These control tokens end a turn or a text, even if a file names another one as its eos.
_ENDS = {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>"}
_ENDS |= {"<\uff5cend\u2581of\u2581sentence\uff5c>"}  # DeepSeek's
_TURNS = "<|im_start|>", "<|im_end|>"


def _alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (GPT-2): itself if it can be printed, else one from 256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _alphabet()


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
        templates: Mapping[str, str] | None = None,
        words: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        # Some files do not mark these as control tokens.
        turns = [t for t in _TURNS if backend.token_to_id(t) is not None]
        marked = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        backend.add_tokens([AddedToken(t, special=True, normalized=False) for t in turns if t not in marked])
        self._special = backend
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = {i for i, token in self._added.items() if token.special}
        self._byte_level, self._strip = _spelling(backend.decoder)
        self._bytes: dict[int, bytes] = {}
        self.vocabulary = backend.get_vocab_size()
        self.bos_id, self.add_bos = bos_id, add_bos and bos_id is not None
        self.eos_ids = set(eos_ids) | {i for i in self._special_ids if self._added[i].content in _ENDS}
        self._chat = Chat(templates, words or {}, (self._added[i].content for i in self._special_ids)) if templates else None

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A second tokenizer, as encode_special_tokens is a tokenizer's setting and not a call's."""
        plain = tokenizers.Tokenizer.from_str(self._special.to_str())
        plain.encode_special_tokens = True
        return plain

    def encode(self, text: str, special: bool = False, bos: bool | None = None) -> list[int]:
        """Token ids of `text`. `special`: a control token's text becomes that token. `bos`: whether bos leads, by
        default `add_bos`.

        A byte that the vocabulary lacks is left out (SmolLM2 lacks 0x04 and 20 others). Raises ValueError for text that is not
        Unicode: half a surrogate pair, as JSON may hold.
        """
        ids = self._encoded(self._special if special else self._plain, text)
        lead = self.add_bos if bos is None else bos
        return [self.bos_id, *ids] if lead and self.bos_id is not None else ids

    def _encoded(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is None:
                raise ValueError(f"the tokenizer fails at this text: {error}") from None
            raise ValueError(f"text is not Unicode: character {at} is half a surrogate pair, {text[at]!r}") from None

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of `ids`, with control tokens only if `special`. Bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(self.bytes_of(int(i), special) for i in ids).decode("utf-8", "replace")
        return text[1:] if self._strip and text.startswith(" ") else text

    @cached_property
    def _signs(self) -> tokenizers.Tokenizer:
        """A tokenizer that knows control tokens by their signs. So it reads a conversation as one text, as Transformers does,
        and what is spelt like a control token is text."""
        signs, stored = self._chat.marks.signs, json.loads(self._special.to_str())
        for token in stored["added_tokens"]:
            if token["content"] in signs:
                token |= {"content": signs[token["content"]], "normalized": False}
        model, vocab = stored["model"], stored["model"]["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {signs.get(token, token): i for token, i in vocab.items()}
        else:
            model["vocab"] = [[signs.get(token, token), score] for token, score in vocab]
        if model.get("unk_token"):
            model["unk_token"] = signs.get(model["unk_token"], model["unk_token"])
        return tokenizers.Tokenizer.from_str(json.dumps(stored | {"post_processor": None}))

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] = (),
        more: Mapping[str, object] | None = None,
        answer: bool = True,
    ) -> list[int]:
        """Token ids of a conversation by the model's chat template, up to where the assistant speaks next (`answer`).

        `messages`: dicts of role, content and what else a template reads, such as tool_calls. `tools`: as OpenAI describes
        them. `more`: variables of the template, such as enable_thinking. Tokens are Transformers', but a control token's text
        in these is text. Raises ValueError for messages that are none, that the template refuses or that have no template.
        """
        if self._chat is None:
            raise ValueError("this model has no chat template: give it a prompt to continue")
        try:
            text = self._chat.text(messages, tools, more or {}, answer)
        except RecursionError:
            raise ValueError("the messages, or the tools, are nested too deeply") from None
        return self._encoded(self._signs, text)

    @property
    def chats(self) -> bool:
        """Whether there is a chat template, and no mistake in it."""
        try:
            return self._chat is not None and bool(self._chat.template(False) and self._signs)
        except TemplateError:
            return False

    def as_json(self) -> str:
        """What a tokenizer.json says of it."""
        return self._special.to_str(pretty=True)

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
        token = self._special.id_to_token(i) if i >= 0 else None
        if token is None:
            return b""
        if i in self._added:
            return token.encode()
        if self._byte_level:
            return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()
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
