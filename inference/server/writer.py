"""A request's tokens as text, in deltas: text that is certain, with the tokens that it is made of."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from inference.choosing import Token
from models.tokenizer import Tokenizer


class Said(NamedTuple):
    """A token, its bytes, and how many characters of the answer come before it."""

    token: Token
    bytes: bytes
    at: int


class Delta(NamedTuple):
    """What is new of an answer. `ids`: the tokens that came, an end token among them, whether or not `text` has their text.
    `said`: those whose text is certain. `reason`: why the answer ends, "stop" or "length"; None if it goes on. `prompt`: the
    prompt's tokens from the second on, in one delta, if their log-probabilities were asked for."""

    text: str
    said: list[Said]
    ids: list[int]
    reason: str | None
    prompt: tuple[Token, ...] = ()

    def then(self, other: Delta) -> Delta:
        said, ids = self.said + other.said, self.ids + other.ids
        return Delta(self.text + other.text, said, ids, other.reason, self.prompt + other.prompt)


def prompt_said(tokenizer: Tokenizer | None, text: str, ids: Sequence[int], tokens: Sequence[Token]) -> list[Said]:
    """The tokens `ids` of a prompt of this `text`, and where they are in it. `tokens`: those from the second on; the first has
    no log-probability."""
    decoder, at, said = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for i, token in zip(ids, [Token(ids[0], None, []), *tokens], strict=True):
        spelt = b"" if tokenizer is None else tokenizer.bytes_of(i, special=True)
        said.append(Said(token, spelt, min(at, len(text))))
        written = decoder.decode(spelt)
        # bos that was put before the text, and a space that SentencePiece puts there, are not in it.
        if at or text.startswith(written):
            at += len(written)
        elif text.startswith(written.removeprefix(" ")):
            at += len(written.removeprefix(" "))
    return said


class Writer:
    """Holds back text that may become one of `stop`, a character whose bytes are not all there, and the tokens of both.

    Tokens after a stop text never come out, nor those that only spell a part of it. `tokenizer` None: there is no text at all.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), ends: frozenset[int] = frozenset()) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self._stream = None if tokenizer is None else tokenizer.stream(stop, continues=True)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._came = self._sure = 0
        self._held: deque[Said] = deque()

    def write(self, tokens: Sequence[Token], reason: str | None, prompt: Sequence[Token] = ()) -> Delta:
        """What is certain once these have come. `reason`: if they are the last; a stop text makes it "stop". `prompt`: see
        Delta."""
        text, ids, stopped = "", [], False
        for token in tokens:
            ids.append(token.id)
            if token.id in self.ends:
                break
            text += self._push(token)
            stopped = self._stream is not None and self._stream.stopped
            if stopped:
                reason = "stop"
                break
        if reason and self._stream is not None:
            text += self._stream.flush()
            stopped = self._stream.stopped
        self._sure += len(text)
        said = []
        while self._held and (self._held[0].at < self._sure or self._stream is None or (reason and not stopped)):
            said.append(self._held.popleft())
        return Delta(text, said, ids, "stop" if stopped else reason, tuple(prompt))

    def _push(self, token: Token) -> str:
        if self._stream is None:
            self._held.append(Said(token, b"", 0))
            return ""
        self._held.append(Said(token, self.tokenizer.bytes_of(token.id, special=True), self._came))
        self._came += len(self._decoder.decode(self.tokenizer.bytes_of(token.id)))
        return self._stream.push(token.id)
