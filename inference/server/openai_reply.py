"""Answers in the shapes of OpenAI's API: whole, or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple

from inference.server.openai_request import Call
from inference.server.writer import Delta, Said, prompt_said
from models.tokenizer import Tokenizer


class Usage(NamedTuple):
    """Tokens: of the prompts, those of them that were computed already, and of the answers, with their end tokens."""

    prompt: int
    cached: int
    answers: int

    def as_json(self) -> dict:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answers,
            "total_tokens": self.prompt + self.answers,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Reply:
    """The reply to one call. Answers have an index: the n of the first prompt come first, then those of the next."""

    def __init__(self, call: Call, model: str, tokenizer: Tokenizer | None, prompts: Sequence[list[int]] = ()) -> None:
        self.call, self.tokenizer, self.prompts = call, tokenizer, prompts
        self.id = f"{'chatcmpl' if call.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._begun: set[int] = set()
        self._scored: set[int] = set()

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> dict:
        """The answer of each index, as one delta that holds all of it."""
        choices = []
        for index, delta in enumerate(deltas):
            said = {"message": {"role": "assistant", "content": delta.text, "refusal": None}}
            choices.append(self._choice(index, said if self.call.chat else {"text": self._text(index, delta)}, delta))
        kind = "chat.completion" if self.call.chat else "text_completion"
        return self._head | {"object": kind, "choices": choices, "usage": usage.as_json()}

    def chunks(self, index: int, delta: Delta) -> list[dict]:
        """What a stream sends of a delta: nothing if it has nothing that the client asked for."""
        if not self.call.chat:
            if not self._has_news(delta) and (index in self._begun or not self.call.echo):
                return []
            return [self._chunk([self._choice(index, {"text": self._text(index, delta)}, delta)])]
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(self._chunk([self._delta(index, {"role": "assistant", "content": ""})]))
        if self._has_news(delta):
            content = {"content": delta.text} if delta.text or not delta.reason else {}
            chunks.append(self._chunk([self._choice(index, {"delta": content}, delta)]))
        return chunks

    def usage_chunk(self, usage: Usage) -> dict:
        """The last chunk of a stream with stream_options.include_usage."""
        return self._chunk([]) | {"usage": usage.as_json()}

    def _text(self, index: int, delta: Delta) -> str:
        """A delta's text; with echo, that of the first one of an answer is led by the prompt."""
        if not self.call.echo or index in self._begun:
            return delta.text
        self._begun.add(index)
        return self._prompt(index) + delta.text

    def _prompt(self, index: int) -> str:
        prompt = self.call.prompts[index // self.call.n]
        if isinstance(prompt, str):
            return prompt
        return "" if self.tokenizer is None else self.tokenizer.decode(prompt, special=True)

    def _has_news(self, delta: Delta) -> bool:
        return bool(delta.text or delta.reason or (self._wants_logprobs and delta.said) or (self.call.token_ids and delta.ids))

    @property
    def _wants_logprobs(self) -> bool:
        return self.call.top_logprobs is not None

    def _delta(self, index: int, delta: dict) -> dict:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _choice(self, index: int, text: dict, delta: Delta) -> dict:
        logprobs = None
        if self._wants_logprobs:
            logprobs = self._chat_logprobs(delta.said) if self.call.chat else self._logprobs(index, delta)
        choice = {"index": index, **text, "logprobs": logprobs, "finish_reason": delta.reason}
        return choice | ({"token_ids": delta.ids} if self.call.token_ids else {})

    def _chunk(self, choices: list[dict]) -> dict:
        usage = {"usage": None} if self.call.include_usage else {}
        kind = "chat.completion.chunk" if self.call.chat else "text_completion"
        return self._head | {"object": kind, "choices": choices} | usage

    # --- log-probabilities

    def _logprobs(self, index: int, delta: Delta) -> dict:
        """`tokens`: one that is no whole character is spelt bytes:\\xe2\\x82, so that two of them differ. `top_logprobs`:
        the likeliest tokens, and the token itself. `text_offset`: from the prompt's first character on."""
        text, tops = self._prompt(index), []
        said = [s._replace(at=len(text) + s.at) for s in delta.said]
        if self.call.echo and index not in self._scored:
            # The prompt's come with the first delta.
            self._scored.add(index)
            said = prompt_said(self.tokenizer, text, self.prompts[index // self.call.n], delta.prompt) + said
        for s in said:
            if s.token.logprob is None:
                tops.append(None)
                continue
            top = {_spelt(self._bytes(i)): logprob for i, logprob in s.token.top}
            tops.append(top | {_spelt(s.bytes): s.token.logprob})
        return {
            "tokens": [_spelt(s.bytes) for s in said],
            "token_logprobs": [s.token.logprob for s in said],
            "top_logprobs": tops,
            "text_offset": [s.at for s in said],
        }

    def _chat_logprobs(self, said: Sequence[Said]) -> dict:
        content = [
            _entry(s.bytes, s.token.logprob) | {"top_logprobs": [_entry(self._bytes(i), logprob) for i, logprob in s.token.top]}
            for s in said
        ]
        return {"content": content, "refusal": None}

    def _bytes(self, id: int) -> bytes:
        return b"" if self.tokenizer is None else self.tokenizer.bytes_of(id, special=True)


def _entry(spelt: bytes, logprob: float) -> dict:
    return {"token": spelt.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelt)}


def _spelt(spelt: bytes) -> str:
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in spelt)
